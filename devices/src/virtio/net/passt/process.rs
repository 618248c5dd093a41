//! passt as a child of ours.

use std::ffi::{OsStr, OsString};
use std::fs::{File, Permissions};
use std::io::{self, PipeReader, Read};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, pidfd_open, pidfd_send_signal,
    waitid,
};

use super::PasstError;

/// How long passt may take to start.
pub(super) const PATIENCE: Duration = Duration::from_secs(10);
/// How much of what it complains about is looked at.
const COMPLAINTS: u64 = 64 << 10;

/// Gives passt its socket as descriptor 3, since one of 2024 takes none that is lower, and a
/// `Command` can hand over no other than 0 to 2 without a copy of this process, whose memory may be
/// that of many guests.
const SHELL: &str = r#"exec "$0" "$@" 3<&0 </dev/null"#;

/// The running program. It ends with this, and with its socket, whose other end is ours: so also
/// where we are killed.
#[derive(Debug)]
pub(super) struct Process {
    /// The process, whoever may have its number by now.
    pidfd: OwnedFd,
    /// What it complains about. It is never waited for to be read.
    errors: PipeReader,
    /// Nobody has waited for it yet.
    is_left: bool,
}

impl Process {
    /// Starts the program, and gives our end of its socket once it is ready.
    pub(super) fn start(
        program: &Path,
        arguments: &[OsString],
        patience: Duration,
    ) -> Result<(Self, OwnedFd), PasstError> {
        let failed = |source| PasstError::Start {
            program: program.to_owned(),
            source,
        };
        let (ours, theirs) = UnixStream::pair().map_err(failed)?;
        let (ready, says_ready) = io::pipe().map_err(failed)?;
        let (errors, complains) = io::pipe().map_err(failed)?;
        // It opens this anew by its path, as another user where we are root.
        let says_ready = File::from(OwnedFd::from(says_ready));
        let everyone = Permissions::from_mode(0o222);
        says_ready.set_permissions(everyone).map_err(failed)?;
        // What does not fit is lost: nothing of passt's waits for us.
        rustix::io::ioctl_fionbio(&complains, true).map_err(|error| failed(error.into()))?;
        let child = Command::new("/bin/sh")
            .args(["-c", SHELL])
            .arg(program)
            .args([
                "--foreground",
                "--quiet",
                "--fd",
                "3",
                "--pid",
                "/dev/stdout",
            ])
            .args(arguments)
            // A Ctrl-C on our terminal is for us, and for the guest to be shut down with a network.
            .process_group(0)
            .stdin(Stdio::from(OwnedFd::from(theirs)))
            .stdout(Stdio::from(says_ready))
            .stderr(Stdio::from(complains))
            .spawn()
            .map_err(failed)?;
        let pid = i32::try_from(child.id()).ok().and_then(Pid::from_raw);
        let pidfd = pid
            .ok_or(rustix::io::Errno::SRCH)
            .and_then(|pid| pidfd_open(pid, PidfdFlags::empty()))
            .map_err(|error| failed(error.into()))?;
        let mut process = Self {
            pidfd,
            errors,
            is_left: true,
        };
        if let Err(how) = wait_ready(ready, patience) {
            process.kill();
            let ended = process.reap(WaitIdOptions::EXITED);
            let problem = match how {
                NotReady::Ended => process.explain(ended.as_ref()),
                NotReady::Silent => format!("it is not ready after {} s", patience.as_secs()),
            };
            return Err(PasstError::Ended {
                program: program.to_owned(),
                problem,
            });
        }
        Ok((process, ours.into()))
    }

    /// Readable once the process has ended.
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    /// Why the process has ended, where it has; it is then gone for good.
    pub(super) fn ended(&mut self) -> Option<String> {
        let status = self.reap(WaitIdOptions::EXITED | WaitIdOptions::NOHANG);
        if self.is_left {
            return None;
        }
        Some(self.explain(status.as_ref()))
    }

    pub(super) fn kill(&self) {
        if self.is_left {
            let _ = pidfd_send_signal(&self.pidfd, Signal::KILL);
        }
    }

    /// Waits for the process, and for no other.
    fn reap(&mut self, options: WaitIdOptions) -> Option<WaitIdStatus> {
        if !self.is_left {
            return None;
        }
        loop {
            match waitid(WaitId::PidFd(self.pidfd.as_fd()), options) {
                Ok(Some(status)) => {
                    self.is_left = false;
                    return Some(status);
                }
                Ok(None) => return None,
                Err(rustix::io::Errno::INTR) => {}
                // Somebody else has waited for it: the program that we are a part of.
                Err(_) => {
                    self.is_left = false;
                    return None;
                }
            }
        }
    }

    /// How it ended, and the last thing that it complained about; not to be called before.
    fn explain(&mut self, status: Option<&WaitIdStatus>) -> String {
        let how = match status {
            Some(status) => match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => format!("exit status {code}"),
                (_, Some(signal)) => format!("signal {signal}"),
                _ => "unknown status".to_owned(),
            },
            None => "unknown status".to_owned(),
        };
        let mut bytes = Vec::new();
        // A child of its own could still have the pipe open.
        let _ = rustix::io::ioctl_fionbio(&self.errors, true);
        let _ = (&mut self.errors).take(COMPLAINTS).read_to_end(&mut bytes);
        match last_complaint(&String::from_utf8_lossy(&bytes)) {
            Some(complaint) => format!("{how}: {complaint}"),
            None => how,
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
        self.reap(WaitIdOptions::EXITED);
    }
}

/// The line that says why it ended: the last one that is not about a missing system log.
fn last_complaint(text: &str) -> Option<String> {
    let mut lines = text.lines().map(str::trim).rev();
    let line = lines.find(|line| !line.is_empty() && !line.starts_with("Failed to send "))?;
    let printable = |c: char| if c.is_control() { ' ' } else { c };
    Some(line.chars().take(200).map(printable).collect())
}

enum NotReady {
    Ended,
    Silent,
}

/// Waits until the program has written its number, which it does when all is set up.
fn wait_ready(mut ready: PipeReader, patience: Duration) -> Result<(), NotReady> {
    let since = Instant::now();
    loop {
        let left = patience.saturating_sub(since.elapsed());
        let timeout = Timespec::try_from(left).map_err(|_| NotReady::Silent)?;
        let mut fds = [PollFd::new(&ready, PollFlags::IN)];
        match poll(&mut fds, Some(&timeout)) {
            Ok(0) => return Err(NotReady::Silent),
            Ok(_) => {
                return match ready.read(&mut [0; 32]) {
                    Ok(0) | Err(_) => Err(NotReady::Ended),
                    Ok(_) => Ok(()),
                };
            }
            Err(rustix::io::Errno::INTR) => {}
            Err(_) => return Err(NotReady::Silent),
        }
    }
}

/// The program of this name in `PATH`.
pub(super) fn find(name: &str, path: Option<&OsStr>) -> Option<PathBuf> {
    let folders = std::env::split_paths(path?);
    let is_program = |file: &PathBuf| {
        let metadata = file.metadata();
        metadata.is_ok_and(|one| one.is_file() && one.permissions().mode() & 0o111 != 0)
    };
    folders
        .filter(|folder| folder.is_absolute())
        .map(|folder| folder.join(name))
        .find(is_program)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_complaint_is_one_line_without_noise() {
        let text = "Failed to send 3 bytes to syslog\nDon't run as root.\nNo \u{7}port\n\nFailed to send 5 bytes to syslog\n";
        assert_eq!(last_complaint(text).as_deref(), Some("No  port"));
        assert_eq!(last_complaint("\nFailed to send 5 bytes to syslog"), None);
    }

    #[test]
    fn programs_are_found_where_path_says() {
        let folder = tempfile::tempdir().unwrap();
        let at = folder.path().join("passt");
        let path = format!("relative:/absent:{}", folder.path().display());
        let find = || find("passt", Some(OsStr::new(&path)));
        assert_eq!(find(), None);
        std::fs::write(&at, "").unwrap();
        assert_eq!(find(), None, "not a program");
        std::fs::set_permissions(&at, Permissions::from_mode(0o755)).unwrap();
        assert_eq!(find(), Some(at));
        assert_eq!(super::find("passt", None), None);
    }
}
