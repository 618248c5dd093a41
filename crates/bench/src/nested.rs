//! Measuring where a nanosecond is an instruction: in the nested machine, which is started with
//! `--icount` and given a list of jobs.
//!
//! The outer half runs on the host: it hands out the jobs and takes the figures. QEMU's emulation
//! of a guest within a guest stands still now and then; then what is left of the jobs goes to
//! another machine. The inner half runs this same program in the machine.

use std::io::{BufRead as _, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::{Deserialize, Serialize};

use crate::subject::Programs;
use crate::{block, boot, exits, net};

/// How long the machine may say nothing. On an idle host it starts in ten seconds and a guest boots
/// in twenty.
const SILENCE: Duration = Duration::from_secs(200);
/// How many machines in a row may end without a single figure.
const FRUITLESS: u32 = 4;
/// How often a job is tried in one machine: a guest stands still more often than the machine does.
const ATTEMPTS: u32 = 3;
/// How long one machine may take for all its jobs, in seconds.
const LIMIT: &str = "7200";
const MEMORY: &str = "3000M";

/// What guests are made of.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct GuestFiles {
    pub(crate) vmlinux: PathBuf,
    pub(crate) bzimage: PathBuf,
    /// An initrd whose init says [`boot::HELLO`] and nothing else.
    pub(crate) hello: PathBuf,
    /// An initrd whose guest measures its disk.
    pub(crate) block: PathBuf,
    /// An initrd whose guest measures its network.
    pub(crate) net: PathBuf,
    /// The disk of tools.
    pub(crate) tools: PathBuf,
}

/// Something to measure once.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Job {
    Boot(boot::Case),
    Exits(exits::Case),
    Block(block::Case),
    Net(net::Case),
}

/// The figures of a job: what, and how much.
pub(crate) type Figures = Vec<(String, f64)>;

/// All that the inner half is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    programs: Programs,
    guest: Option<GuestFiles>,
    jobs: Vec<Job>,
}

/// A line that the inner half prints.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// A job goes on.
    Progress(String),
    /// A job is done: its place in the order.
    Done(usize, Figures),
    /// An attempt at a job failed.
    Failed(usize, String),
}

/// What is measured, and in what.
pub(crate) struct Plan<'a> {
    /// The program with the command `nested`.
    pub(crate) xtask: &'a Path,
    pub(crate) programs: &'a Programs,
    pub(crate) guest: Option<&'a GuestFiles>,
}

impl Plan<'_> {
    /// Does all jobs, and returns each with its figures, in any order.
    pub(crate) fn collect(&self, jobs: &[Job]) -> Result<Vec<(Job, Figures)>> {
        let mut left = jobs.to_vec();
        let mut done = Vec::new();
        let mut fruitless = 0;
        while !left.is_empty() {
            let before = done.len();
            self.in_one_machine(&mut left, &mut done)?;
            fruitless = if done.len() > before {
                0
            } else {
                fruitless + 1
            };
            if fruitless == FRUITLESS {
                bail!("{FRUITLESS} nested machines in a row measured nothing");
            }
            // Where one of them is what makes the machine stand still, the others come first.
            if !left.is_empty() {
                left.rotate_left(1);
            }
        }
        Ok(done)
    }

    /// Does the jobs until all are done or the machine shows no sign of life.
    fn in_one_machine(&self, left: &mut Vec<Job>, done: &mut Vec<(Job, Figures)>) -> Result<()> {
        let jobs = left.clone();
        let order = Order {
            programs: self.programs.clone(),
            guest: self.guest.cloned(),
            jobs: jobs.clone(),
        };
        let file = tempfile::NamedTempFile::new().context("make a temporary file")?;
        serde_json::to_writer(&file, &order).context("write the order")?;
        let mut machine = Tied(self.machine(file.path())?);
        let output = machine.0.stdout.take().context("its output is no pipe")?;
        let (lines, inbox) = mpsc::channel();
        thread::spawn(move || {
            for line in BufReader::new(output).lines().map_while(Result::ok) {
                if lines.send(line).is_err() {
                    break;
                }
            }
        });
        loop {
            let line = match inbox.recv_timeout(SILENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("bench: the nested machine stands still: another goes on");
                    return Ok(());
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(()),
            };
            match serde_json::from_str(&line) {
                Ok(Line::Progress(what)) => eprintln!("bench:   {what}"),
                Ok(Line::Done(index, figures)) => {
                    let job = *jobs.get(index).context("the machine did another job")?;
                    eprintln!("bench: {} of {}: {job:?}", index + 1, jobs.len());
                    if let Some(at) = left.iter().position(|one| *one == job) {
                        left.remove(at);
                    }
                    done.push((job, figures));
                }
                Ok(Line::Failed(index, why)) => {
                    eprintln!("bench: {:?} failed: {why}", jobs.get(index));
                }
                Err(_) => eprintln!("bench: {line}"),
            }
        }
    }

    fn machine(&self, order: &Path) -> Result<Child> {
        let program = std::env::current_exe().context("find this program")?;
        let mut command = Command::new(self.xtask);
        command.args([
            "nested",
            "--icount",
            "--memory",
            MEMORY,
            "--timeout",
            LIMIT,
            "--",
        ]);
        command.arg(program).arg("inside").arg(order);
        command
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .spawn()
            .context("start a nested machine")
    }
}

/// A process that ends when this is dropped.
struct Tied(Child);

impl Drop for Tied {
    fn drop(&mut self) {
        // Both fail only when the process has ended and was waited for.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where the inner half works.
pub(crate) struct Inside {
    pub(crate) programs: Programs,
    pub(crate) guest: Option<GuestFiles>,
    /// A folder in memory.
    pub(crate) folder: PathBuf,
}

impl Inside {
    fn measure(&self, job: Job) -> Result<Figures> {
        match job {
            Job::Boot(case) => boot::measure(case, self),
            Job::Exits(case) => exits::measure(case, self),
            Job::Block(case) => block::measure(case, self),
            Job::Net(case) => net::measure(case, self),
        }
    }

    /// What guests are made of.
    pub(crate) fn guest(&self) -> Result<&GuestFiles> {
        self.guest.as_ref().context("there is no guest to run")
    }
}

/// Does the jobs of an order, and prints their figures.
pub(crate) fn inside(order: &Path) -> Result<()> {
    let order = std::fs::File::open(order).context("open the order")?;
    let order: Order = serde_json::from_reader(BufReader::new(order)).context("read the order")?;
    let folder = PathBuf::from("/dev/shm/kiln-bench");
    std::fs::create_dir_all(&folder).context("make a folder in memory")?;
    let guest = order
        .guest
        .map(|guest| in_memory(&guest, &folder))
        .transpose()?;
    let inside = Inside {
        programs: order.programs,
        guest,
        folder,
    };
    warm_up(&inside.programs);
    for (index, job) in order.jobs.iter().enumerate() {
        let figures = (1..=ATTEMPTS).find_map(|_| {
            let figures = inside.measure(*job);
            figures
                .map_err(|error| say(&Line::Failed(index, format!("{error:#}"))))
                .ok()
        });
        if let Some(figures) = figures {
            say(&Line::Done(index, figures))?;
        }
    }
    Ok(())
}

/// Copies what is read by those who are measured to memory, where each finds it alike.
fn in_memory(guest: &GuestFiles, folder: &Path) -> Result<GuestFiles> {
    let copy = |from: &Path, name: &str| -> Result<PathBuf> {
        let to = folder.join(name);
        std::fs::copy(from, &to).with_context(|| format!("copy {}", from.display()))?;
        Ok(to)
    };
    Ok(GuestFiles {
        vmlinux: copy(&guest.vmlinux, "vmlinux")?,
        bzimage: copy(&guest.bzimage, "bzimage")?,
        hello: copy(&guest.hello, "hello")?,
        block: copy(&guest.block, "block")?,
        net: copy(&guest.net, "net")?,
        tools: copy(&guest.tools, "tools")?,
    })
}

/// Runs each program once: it and its libraries are then in memory.
fn warm_up(programs: &Programs) {
    for program in [Some(&programs.kiln), programs.qemu.as_ref()]
        .into_iter()
        .flatten()
    {
        // Whether it works is seen when it is measured.
        let _ = Command::new(program)
            .arg("--version")
            .stdout(Stdio::null())
            .status();
    }
}

/// Tells the outer half that a job goes on.
pub(crate) fn progress(what: &str) -> Result<()> {
    say(&Line::Progress(what.to_owned()))
}

fn say(line: &Line) -> Result<()> {
    println!("{}", serde_json::to_string(line).context("write a line")?);
    Ok(())
}
