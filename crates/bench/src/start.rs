//! How long it takes from the start of a program to its guest's first effect, and to its end; and
//! how many whole lives fit into a second.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow};

use crate::guest;
use crate::stats::{Row, rows};
use crate::subject::{Programs, Subject, live};

const MIB: u32 = 128;
/// The size of Debian's vmlinux, in bytes.
const LARGE: usize = 58 << 20;
/// How long lives are counted.
const SPAN: Duration = Duration::from_secs(2);

pub(crate) fn run(programs: &Programs, runs: u32, folder: &Path) -> Result<Vec<Row>> {
    let tiny = guest::write(folder, "tiny", &guest::tiny(), 0)?;
    let large = guest::write(folder, "large", &guest::tiny(), LARGE)?;
    let subjects = programs.subjects();
    let mut first: Vec<_> = subjects
        .iter()
        .map(|one| (one.name(), Vec::new()))
        .collect();
    let mut reaped = first.clone();
    let mut loading = first.clone();
    // Interleaved, so that what else goes on hits all alike.
    for _ in 0..runs {
        for (index, &subject) in subjects.iter().enumerate() {
            let life = live(&mut programs.command(subject, &tiny, MIB))?;
            let with_large = live(&mut programs.command(subject, &large, MIB))?;
            first[index].1.push(milliseconds(life.first));
            reaped[index].1.push(milliseconds(life.reaped));
            let more = milliseconds(with_large.first) - milliseconds(life.first);
            loading[index].1.push(more);
        }
    }
    let mut all = rows("start to first effect, ms", &first);
    all.extend(rows("start to reaped, ms", &reaped));
    // The floor reads the file: it is no floor of this.
    loading.remove(0);
    all.extend(rows("58 MiB kernel: later first effect, ms", &loading));
    for at_once in [1, 8] {
        let mut rates = Vec::new();
        for &subject in &subjects {
            rates.push((
                subject.name(),
                vec![lives(programs, subject, &tiny, at_once)?],
            ));
        }
        all.extend(rows(
            &format!("lives a second, {at_once} at a time"),
            &rates,
        ));
    }
    Ok(all)
}

/// How many lives a second, with so many going on at a time.
fn lives(programs: &Programs, subject: Subject, tiny: &Path, at_once: u32) -> Result<f64> {
    let since = Instant::now();
    let count = || -> Result<u32> {
        let mut count = 0;
        while since.elapsed() < SPAN {
            live(&mut programs.command(subject, tiny, MIB))?;
            count += 1;
        }
        Ok(count)
    };
    let counts = thread::scope(|scope| {
        let workers: Vec<_> = (0..at_once).map(|_| scope.spawn(count)).collect();
        let counts = workers.into_iter().map(|worker| {
            let count = worker.join().map_err(|_| anyhow!("a worker panicked"));
            count.and_then(|count| count)
        });
        counts.collect::<Result<Vec<u32>>>()
    })?;
    Ok(f64::from(counts.iter().sum::<u32>()) / since.elapsed().as_secs_f64())
}

fn milliseconds(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}
