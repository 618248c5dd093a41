//! Where commands that run guests are run: on this machine, if its KVM has hardware behind it, or
//! else in the nested machine.

use std::ffi::OsString;
use std::os::unix::process::ExitStatusExt as _;
use std::process::Command;

use anyhow::{Context, Result};

use crate::host::{HostKvm, host_kvm};
use crate::{nested, process};

/// Runs `command` as root where it can run guests with any kernel, and returns its exit status.
/// `name` says what is run, for a message about where.
///
/// On this machine the command gets a network of its own, so that it can make tap interfaces
/// without root's rights and they are gone with it.
///
/// # Errors
///
/// When the command cannot be started, or the nested machine fails.
pub fn run(name: &str, options: &nested::Options, command: &[OsString]) -> Result<u8> {
    let why = match host_kvm() {
        HostKvm::Hardware => return run_here(options, command),
        HostKvm::Emulated => "this machine's KVM only emulates guests",
        HostKvm::None => "this machine has no KVM that we may use",
    };
    eprintln!("xtask: {why}: {name} in a nested machine");
    nested::run(options, command)
}

fn run_here(options: &nested::Options, command: &[OsString]) -> Result<u8> {
    let mut here = here(options, command);
    let status = here
        .status()
        .with_context(|| format!("start `{}`", process::show(&here)))?;
    let status = status
        .code()
        .unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    Ok(u8::try_from(status).unwrap_or(nested::FAILED))
}

/// The command that runs `command` on this machine, as [`run`] does.
pub(crate) fn here(options: &nested::Options, command: &[OsString]) -> Command {
    here_as(options, rustix::process::geteuid().is_root(), command)
}

fn here_as(options: &nested::Options, is_root: bool, command: &[OsString]) -> Command {
    let mut here = process::tied("unshare");
    here.arg("--net");
    if !is_root {
        here.args(["--user", "--map-root-user"]);
    }
    here.arg("--");
    if let Some(limit) = options.limit {
        here.args([
            "timeout",
            "--foreground",
            "--kill-after=5",
            &limit.as_secs().to_string(),
        ]);
    }
    // A new network has even the loopback interface down.
    here.args([
        "sh",
        "-c",
        r#"PATH=$PATH:/usr/sbin:/sbin; ip link set lo up && exec "$@""#,
        "sh",
    ]);
    here.args(command);
    here
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[test]
    fn a_command_here_has_a_network_of_its_own_and_a_limit() {
        let options = nested::Options {
            limit: Some(Duration::from_secs(9)),
            ..nested::Options::default()
        };
        let line = process::show(&here_as(&options, false, &["prog".into(), "arg".into()]));
        let isolated = "unshare --net --user --map-root-user -- timeout";
        assert!(line.contains(isolated), "{line}");
        assert!(
            line.contains("--kill-after=5 9 sh -c") && line.ends_with("sh prog arg"),
            "{line}"
        );
        let unlimited = nested::Options::default();
        let line = process::show(&here_as(&unlimited, true, &["prog".into()]));
        assert!(
            !line.contains("timeout") && !line.contains("--user"),
            "{line}"
        );
    }
}
