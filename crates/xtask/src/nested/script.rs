//! What the nested machine is told to run, as shell scripts in its initrd.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;
use std::path::PathBuf;

use anyhow::{Context, Result};

/// The variables that the command gets from our environment, besides those that begin with
/// [`PREFIXES`].
const NAMES: [&str; 11] = [
    "CI",
    "HOME",
    "LANG",
    "LC_ALL",
    "LD_LIBRARY_PATH",
    "LOGNAME",
    "PATH",
    "SHELL",
    "TERM",
    "TZ",
    "USER",
];
const PREFIXES: [&str; 3] = ["CARGO", "KILN_", "RUST"];

/// What `stage2` is told besides the command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Settings {
    /// The command gets a terminal.
    pub(super) terminal: bool,
    /// The command gets our input.
    pub(super) input: bool,
    /// The folder shared for results.
    pub(super) output: Option<PathBuf>,
}

pub(super) fn settings(settings: &Settings) -> Vec<u8> {
    let word = |yes| if yes { "yes" } else { "no" };
    let mut text = format!(
        "terminal={}\ninput={}\noutput=",
        word(settings.terminal),
        word(settings.input)
    )
    .into_bytes();
    if let Some(output) = &settings.output {
        quote(output.as_os_str(), &mut text);
    }
    text.push(b'\n');
    text
}

/// Returns the script that runs `command` in our working folder with what it needs of
/// `environment`.
pub(super) fn command(
    command: &[OsString],
    environment: impl Iterator<Item = (OsString, OsString)>,
) -> Result<Vec<u8>> {
    let folder = std::env::current_dir().context("find the working folder")?;
    let mut script = b"cd ".to_vec();
    quote(folder.as_os_str(), &mut script);
    // A shell without job control has these two signals ignored in what runs beside it.
    script.extend_from_slice(b" || exit 125\nexec /usr/bin/env --default-signal=INT,QUIT -i");
    let mut variables: Vec<_> = environment.filter(|(name, _)| is_passed(name)).collect();
    variables.sort();
    for (name, value) in variables {
        script.push(b' ');
        let mut pair = name;
        pair.push("=");
        pair.push(value);
        quote(&pair, &mut script);
    }
    for word in command {
        script.push(b' ');
        quote(word, &mut script);
    }
    script.push(b'\n');
    Ok(script)
}

fn is_passed(name: &OsStr) -> bool {
    let Some(name) = name.to_str() else {
        return false;
    };
    // Credentials have no business in a machine whose initrd is a file.
    let is_secret = ["TOKEN", "SECRET", "PASSWORD"]
        .iter()
        .any(|part| name.contains(part));
    // To find the lines of one backtrace takes more than a minute there, and tests that panic on
    // purpose print several.
    let is_slow = name.ends_with("_BACKTRACE");
    let is_wanted = NAMES.contains(&name) || PREFIXES.iter().any(|prefix| name.starts_with(prefix));
    is_wanted && !is_secret && !is_slow
}

/// Appends `word` so that a shell takes it as it is.
fn quote(word: &OsStr, to: &mut Vec<u8>) {
    to.push(b'\'');
    for byte in word.as_bytes() {
        match byte {
            b'\'' => to.extend_from_slice(br"'\''"),
            byte => to.push(*byte),
        }
    }
    to.push(b'\'');
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pairs(pairs: &[(&str, &str)]) -> impl Iterator<Item = (OsString, OsString)> {
        let pairs: Vec<_> = pairs.iter().map(|(a, b)| (a.into(), b.into())).collect();
        pairs.into_iter()
    }

    #[test]
    fn a_shell_gets_every_word_and_variable_as_it_was() {
        let strange = "a  b'c\"$HOME`x`\\\n*é;&";
        let words: Vec<OsString> = [
            "sh",
            "-c",
            r#"printf '%s|' "$@" "$KILN_X""#,
            "sh",
            strange,
            "",
        ]
        .map(Into::into)
        .into();
        let script = command(
            &words,
            pairs(&[("KILN_X", strange), ("PATH", "/bin:/usr/bin")]),
        )
        .unwrap();
        let output = std::process::Command::new("sh")
            .arg("-c")
            .arg(OsStr::from_bytes(&script))
            .output()
            .unwrap();
        assert_eq!(output.stdout, format!("{strange}||{strange}|").into_bytes());
    }

    #[test]
    fn only_what_a_command_needs_is_passed() {
        let environment = pairs(&[
            ("PATH", "/bin"),
            ("CARGO_TARGET_DIR", "/t"),
            ("CARGO_REGISTRY_TOKEN", "hidden"),
            ("SSH_AUTH_SOCK", "/s"),
            ("KILN_TEST", "1"),
            ("RUST_BACKTRACE", "1"),
            ("RUST_LIB_BACKTRACE", "1"),
            ("RUST_LOG", "debug"),
        ]);
        let script = command(&["true".into()], environment).unwrap();
        let script = String::from_utf8(script).unwrap();
        let line = script.lines().last().unwrap();
        assert_eq!(
            line,
            "exec /usr/bin/env --default-signal=INT,QUIT -i 'CARGO_TARGET_DIR=/t' 'KILN_TEST=1' 'PATH=/bin' 'RUST_LOG=debug' 'true'"
        );
    }

    #[test]
    fn settings_are_shell_assignments() {
        let with = Settings {
            terminal: true,
            input: false,
            output: Some("/a b".into()),
        };
        assert_eq!(settings(&with), b"terminal=yes\ninput=no\noutput='/a b'\n");
        let without = Settings {
            terminal: false,
            input: true,
            output: None,
        };
        assert_eq!(settings(&without), b"terminal=no\ninput=yes\noutput=\n");
    }
}
