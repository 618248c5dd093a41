//! Running other programs so that none of them outlives us.

use std::ffi::OsStr;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;

use anyhow::{Context, Result, bail, ensure};

/// Where programs are that the search path of an ordinary user lacks.
const SYSTEM_FOLDERS: [&str; 3] = ["/usr/local/sbin", "/usr/sbin", "/sbin"];

/// Returns the path of `program`, looked for in the search path and in the folders of system
/// programs.
pub fn find(program: &str) -> Option<PathBuf> {
    if program.contains('/') {
        return Some(PathBuf::from(program)).filter(|path| path.is_file());
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    std::env::split_paths(&path)
        .chain(SYSTEM_FOLDERS.iter().map(PathBuf::from))
        .map(|folder| folder.join(program))
        .find(|path| path.is_file())
}

/// Returns a command that runs `program` and is killed by the kernel when the thread that started
/// it ends, whatever ended it.
pub fn tied(program: impl AsRef<OsStr>) -> Command {
    let program = program.as_ref();
    let found = program.to_str().and_then(find);
    let mut command = Command::new("setpriv");
    command.args(["--pdeathsig", "KILL", "--"]);
    command.arg(found.as_deref().map_or(program, Path::as_os_str));
    command
}

/// Returns `command` as a user would type it, to show it.
pub fn show(command: &Command) -> String {
    let words: Vec<_> = std::iter::once(command.get_program())
        .chain(command.get_args())
        .map(|word| word.to_string_lossy().into_owned())
        .collect();
    let tie = ["setpriv", "--pdeathsig", "KILL", "--"];
    let words = if words.starts_with(&tie.map(String::from)) {
        &words[tie.len()..]
    } else {
        &words
    };
    words.join(" ")
}

/// Runs `command` with its output on our standard error, and waits for it.
///
/// # Errors
///
/// When it cannot be started or does not succeed.
pub fn run(command: &mut Command) -> Result<()> {
    let errors = std::io::stderr();
    let output = rustix::io::dup(&errors).context("duplicate standard error")?;
    let status = command
        .stdin(Stdio::null())
        .stdout(output)
        .status()
        .with_context(|| format!("start `{}`", show(command)))?;
    ensure!(status.success(), "`{}` failed: {status}", show(command));
    Ok(())
}

/// Runs `command` and returns what it prints.
///
/// # Errors
///
/// When it cannot be started, does not succeed (the error then has what it said), or prints
/// something that is not UTF-8.
pub fn output(command: &mut Command) -> Result<String> {
    let output = command
        .stdin(Stdio::null())
        .output()
        .with_context(|| format!("start `{}`", show(command)))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`{}` failed: {}: {}",
            show(command),
            output.status,
            said.trim()
        );
    }
    String::from_utf8(output.stdout)
        .with_context(|| format!("read what `{}` prints", show(command)))
}

/// Runs `program` with `input` as its standard input, and returns what it prints.
///
/// # Errors
///
/// When it cannot be started or does not succeed.
pub fn filter(program: &str, arguments: &[&str], input: &[u8]) -> Result<Vec<u8>> {
    let mut command = tied(program);
    command
        .args(arguments)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut child = command
        .spawn()
        .with_context(|| format!("start `{program}`"))?;
    let mut stdin = child
        .stdin
        .take()
        .context("the program has no standard input")?;
    let output = thread::scope(|scope| {
        // A program that fails closes its input; its exit status then says more than the write.
        scope.spawn(move || stdin.write_all(input).ok());
        child.wait_with_output()
    });
    let output = output.with_context(|| format!("read what `{program}` prints"))?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!(
            "`{}` failed: {}: {}",
            show(&command),
            output.status,
            said.trim()
        );
    }
    Ok(output.stdout)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_filter_gets_its_input_and_gives_its_output() {
        let input = vec![7; 1 << 20];
        assert_eq!(filter("cat", &[], &input).unwrap(), input);
    }

    #[test]
    fn a_failing_filter_tells_what_it_said() {
        let error =
            filter("sh", &["-c", "echo broken >&2; exit 3"], &vec![0; 1 << 20]).unwrap_err();
        let text = error.to_string();
        assert!(
            text.contains("broken") && text.contains("exit status: 3"),
            "{text}"
        );
    }

    #[test]
    fn commands_are_shown_without_what_ties_them() {
        let mut command = tied("no-such-program");
        command.arg("x");
        assert_eq!(show(&command), "no-such-program x");
    }

    #[test]
    fn system_programs_are_found_whatever_the_search_path() {
        assert!(find("sh").is_some());
        assert!(find("no-such-program").is_none());
        assert!(find("/no/such/program").is_none());
    }
}
