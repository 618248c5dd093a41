//! Measuring where a nanosecond is an instruction: in the nested machine, which is started with
//! `--icount` and given a list of jobs.
//!
//! The outer half runs on the host: it hands out the jobs and takes the figures, each as soon as it
//! is there. QEMU's emulation of a guest within a guest stands still now and then; then what is left
//! of the jobs goes to another machine, and figures that are there are kept. The inner half runs
//! this same program in the machine.

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
const SILENCE: Duration = Duration::from_secs(300);
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

/// A job that is not done.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Task {
    job: Job,
    /// Its place in the order.
    index: usize,
    /// What was measured of it already, in this machine or another.
    figures: Figures,
}

impl Task {
    /// Whether this was measured already.
    pub(crate) fn has(&self, what: &str) -> bool {
        self.figures.iter().any(|(known, _)| known == what)
    }

    /// Notes a figure, and tells the outer half, which keeps it whatever comes next.
    pub(crate) fn note(&mut self, what: &str, value: f64) -> Result<()> {
        self.figures.push((what.to_owned(), value));
        say(&Line::Figure(self.index, what.to_owned(), value))
    }
}

/// All that the inner half is told.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Order {
    programs: Programs,
    guest: Option<GuestFiles>,
    tasks: Vec<Task>,
}

/// A line that the inner half prints.
#[derive(Debug, Serialize, Deserialize)]
enum Line {
    /// A job goes on.
    Progress(String),
    /// A figure of a job: its place in the order, what it is, and how much.
    Figure(usize, String, f64),
    /// All of a job is done: its place in the order.
    Done(usize),
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
        let task = |(index, job): (usize, &Job)| Task {
            job: *job,
            index,
            figures: Figures::new(),
        };
        let mut left: Vec<_> = jobs.iter().enumerate().map(task).collect();
        let mut done = Vec::new();
        let mut fruitless = 0;
        while !left.is_empty() {
            let was_of_use = self.in_one_machine(&mut left, &mut done)?;
            fruitless = if was_of_use { 0 } else { fruitless + 1 };
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

    /// Does the jobs until all are done or the machine shows no sign of life. Gives whether
    /// anything was measured.
    fn in_one_machine(&self, left: &mut Vec<Task>, done: &mut Vec<(Job, Figures)>) -> Result<bool> {
        let order = Order {
            programs: self.programs.clone(),
            guest: self.guest.cloned(),
            tasks: left.clone(),
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
        let mut was_of_use = false;
        loop {
            let line = match inbox.recv_timeout(SILENCE) {
                Ok(line) => line,
                Err(RecvTimeoutError::Timeout) => {
                    eprintln!("bench: the nested machine stands still: another goes on");
                    return Ok(was_of_use);
                }
                Err(RecvTimeoutError::Disconnected) => return Ok(was_of_use),
            };
            match serde_json::from_str(&line) {
                Ok(line) => was_of_use |= take_note(line, left, done)?,
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

/// Follows what the machine says. Gives whether it has measured something.
fn take_note(line: Line, left: &mut Vec<Task>, done: &mut Vec<(Job, Figures)>) -> Result<bool> {
    let find = |left: &[Task], index| {
        let place = left.iter().position(|task| task.index == index);
        place.context("the machine did another job")
    };
    match line {
        Line::Progress(what) => eprintln!("bench:   {what}"),
        Line::Figure(index, what, value) => {
            let at = find(left, index)?;
            eprintln!("bench: {:?}: {what}: {value:.1}", left[at].job);
            left[at].figures.push((what, value));
            return Ok(true);
        }
        Line::Done(index) => {
            let Task { job, figures, .. } = left.remove(find(left, index)?);
            eprintln!("bench: {} to go", left.len());
            done.push((job, figures));
            return Ok(true);
        }
        Line::Failed(index, why) => {
            eprintln!("bench: {:?} failed: {why}", left[find(left, index)?].job);
        }
    }
    Ok(false)
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
    /// Measures what of a task was not measured yet.
    fn measure(&self, task: &mut Task) -> Result<()> {
        let figures = match task.job {
            Job::Boot(case) => boot::measure(case, self)?,
            Job::Exits(case) => exits::measure(case, self)?,
            Job::Block(case) => return block::measure(case, self, task),
            Job::Net(case) => return net::measure(case, self, task),
        };
        figures
            .into_iter()
            .try_for_each(|(what, value)| task.note(&what, value))
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
    for mut task in order.tasks {
        let index = task.index;
        for _ in 0..ATTEMPTS {
            match inside.measure(&mut task) {
                Ok(()) => {
                    say(&Line::Done(index))?;
                    break;
                }
                Err(error) => say(&Line::Failed(index, format!("{error:#}")))?,
            }
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

#[cfg(test)]
mod tests {
    use super::*;

    fn task(index: usize) -> Task {
        let job = serde_json::json!({"Net": {"subject": "Kiln", "run": index}});
        Task {
            job: serde_json::from_value(job).unwrap(),
            index,
            figures: Figures::new(),
        }
    }

    #[test]
    fn figures_of_a_job_that_ends_early_are_kept_for_the_next_machine() {
        let (mut left, mut done) = (vec![task(4), task(7)], Vec::new());
        let figure = |index, what: &str| Line::Figure(index, what.into(), 2.5);
        assert!(take_note(figure(7, "send"), &mut left, &mut done).unwrap());
        let failed = Line::Failed(7, "it stands still".into());
        assert!(!take_note(failed, &mut left, &mut done).unwrap());
        assert!(left[1].has("send") && !left[1].has("receive") && !left[0].has("send"));

        assert!(take_note(figure(7, "receive"), &mut left, &mut done).unwrap());
        assert!(take_note(Line::Done(7), &mut left, &mut done).unwrap());
        assert_eq!((left.len(), left[0].index), (1, 4));
        let (job, figures) = &done[0];
        assert_eq!(*job, task(7).job);
        assert_eq!(figures, &[("send".into(), 2.5), ("receive".into(), 2.5)]);
        assert!(take_note(Line::Done(7), &mut left, &mut done).is_err());
    }
}
