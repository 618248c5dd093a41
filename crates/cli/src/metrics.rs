//! `--metrics`: the file that a machine's metrics are written to while it lives.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Error, bail};
use kiln_vmm::{Metrics, VmHandle};

use crate::args::{MetricsArgs, MetricsFormat};

/// Where metrics go, and how.
pub(crate) struct MetricsFile {
    path: PathBuf,
    /// Beside it: written first, and then put in its place.
    temporary: PathBuf,
    format: MetricsFormat,
    interval: Option<Duration>,
}

impl MetricsFile {
    /// The file that the arguments name, if they do; refused where it cannot be written.
    pub(crate) fn from_args(args: &MetricsArgs) -> Result<Option<Self>, Error> {
        let Some(path) = &args.metrics else {
            return Ok(None);
        };
        let format = args.metrics_format.unwrap_or_else(|| by_extension(path));
        let file = Self::new(path, format, args.metrics_interval.0)
            .with_context(|| format!("write metrics to `{}`", path.display()))?;
        Ok(Some(file))
    }

    fn new(path: &Path, format: MetricsFormat, interval: Option<Duration>) -> Result<Self, Error> {
        // Behind a symbolic link it is the file there that is replaced, and nothing else than a
        // file: not a terminal, not a pipe, not /dev/null.
        let path = match fs::canonicalize(path) {
            Ok(found) if !found.is_file() => bail!("it is there and not a regular file"),
            Ok(found) => found,
            Err(_) => path.to_owned(),
        };
        let Some(name) = path.file_name() else {
            bail!("it has no file name");
        };
        let mut temporary = name.to_owned();
        temporary.push(format!(".{}.tmp", std::process::id()));
        let temporary = path.with_file_name(temporary);
        write_new(&temporary, "")?;
        fs::remove_file(&temporary)?;
        Ok(Self {
            path,
            temporary,
            format,
            interval,
        })
    }

    /// Replaces the file, so that whoever reads it finds all of one time.
    fn write(&self, metrics: &Metrics) -> Result<(), Error> {
        let text = match self.format {
            MetricsFormat::Json => serde_json::to_string_pretty(metrics)? + "\n",
            MetricsFormat::Prometheus => metrics.to_prometheus(),
        };
        write_new(&self.temporary, &text)
            .and_then(|()| fs::rename(&self.temporary, &self.path))
            .inspect_err(|_| drop(fs::remove_file(&self.temporary)))
            .with_context(|| format!("write metrics to `{}`", self.path.display()))
    }

    /// Writes the machine's metrics from now on, on a thread.
    pub(crate) fn follow(self, handle: VmHandle) -> Result<Follower, Error> {
        let (end, ended) = mpsc::channel();
        let thread = thread::Builder::new()
            .name("kiln-metrics".to_owned())
            .spawn(move || {
                let mut told = false;
                while let Some(interval) = self.interval {
                    if let Err(error) = self.write(&handle.metrics())
                        && !std::mem::replace(&mut told, true)
                    {
                        tracing::warn!("{error:#} (told once)");
                    }
                    if ended.recv_timeout(interval) != Err(RecvTimeoutError::Timeout) {
                        break;
                    }
                }
                // Where there is no interval this is what is waited for.
                let _ = ended.recv();
                self.write(&handle.metrics())
            })
            .context("start a thread for metrics")?;
        Ok(Follower { end, thread })
    }
}

/// Writes a file that was not there. What is in its place - left by an earlier run, or a link put
/// there by somebody else - is removed and not written to.
fn write_new(path: &Path, text: &str) -> io::Result<()> {
    let create = || File::options().write(true).create_new(true).open(path);
    let mut file = match create() {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
            fs::remove_file(path)?;
            create()?
        }
        created => created?,
    };
    file.write_all(text.as_bytes())
}

fn by_extension(path: &Path) -> MetricsFormat {
    match path.extension() {
        Some(extension) if extension == "prom" => MetricsFormat::Prometheus,
        _ => MetricsFormat::Json,
    }
}

/// The thread that writes.
pub(crate) struct Follower {
    end: mpsc::Sender<()>,
    thread: JoinHandle<Result<(), Error>>,
}

impl Follower {
    /// After the machine's end: has its last metrics written.
    pub(crate) fn finish(self) -> Result<(), Error> {
        drop(self.end);
        match self.thread.join() {
            Ok(written) => written,
            Err(_) => bail!("the thread that writes the metrics panicked"),
        }
    }
}
