//! Where a description is wrong, and what is known there.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};

use super::nearest::nearest;

/// Why a description of a machine could not be read. The message is one line.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read configuration `{}`", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is not a regular one, or larger than any description is.
    #[error("read configuration `{}`: it must be a regular file of at most {max} bytes", path.display())]
    NotAConfiguration {
        /// The file.
        path: PathBuf,
        /// The most bytes that are read.
        max: u64,
    },
    /// The file's name does not say which format it has.
    #[error(
        "read configuration `{}`: its name must end in .toml or .json, which says how to read it",
        path.display()
    )]
    Extension {
        /// The file.
        path: PathBuf,
    },
    /// The text is not what it should be.
    #[error("read configuration{}{place}: {problem}", Named(path.as_deref()))]
    Invalid {
        /// The file, unless it was read from a text.
        path: Option<PathBuf>,
        /// Where in the text.
        place: Place,
        /// What is wrong there, and what would be right.
        problem: String,
    },
}

impl ConfigError {
    /// The same error, said of a file.
    pub(crate) fn in_file(self, file: &Path) -> Self {
        match self {
            Self::Invalid { place, problem, .. } => Self::Invalid {
                path: Some(file.to_owned()),
                place,
                problem,
            },
            other => other,
        }
    }
}

/// A place in a description.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Place {
    /// The line, counted from 1; 0 where it is not known.
    pub line: usize,
    /// The key, such as `disks[0].path`; empty where the text is not even TOML or JSON.
    pub key: String,
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.line > 0 {
            write!(f, ", line {}", self.line)?;
        }
        if !self.key.is_empty() {
            write!(f, ", key `{}`", self.key)?;
        }
        Ok(())
    }
}

/// A file's name in a message, or nothing.
struct Named<'a>(Option<&'a Path>);

impl fmt::Display for Named<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            Some(path) => write!(f, " `{}`", path.display()),
            None => Ok(()),
        }
    }
}

/// A message of serde's in our words: with the nearest known name where one is not known, and on
/// one line.
pub(crate) fn explain(message: &str) -> String {
    for (what, noun) in [("field", "key"), ("variant", "value")] {
        if let Some((name, known)) = unknown(message, what) {
            return one_line(&not_known(noun, name, &known));
        }
        let name = message
            .strip_prefix(&format!("missing {what} `"))
            .and_then(|rest| rest.strip_suffix('`'));
        if let Some(name) = name {
            return one_line(&format!("the {noun} `{name}` is missing"));
        }
    }
    match message.strip_suffix("expected u32") {
        Some(message) => one_line(&format!("{message}expected a whole number below 2^32")),
        None => one_line(message),
    }
}

/// The name that is not known and those that are, from ``unknown field `a`, expected `b` or `c` ``.
fn unknown<'a>(message: &'a str, what: &str) -> Option<(&'a str, Vec<&'a str>)> {
    let rest = message.strip_prefix(&format!("unknown {what} `"))?;
    // The name may hold anything, what follows it is ours.
    let (name, known) = rest.rsplit_once("`, expected ")?;
    Some((name, known.split('`').skip(1).step_by(2).collect()))
}

fn not_known(noun: &str, name: &str, known: &[&str]) -> String {
    match nearest(name, known) {
        Some(nearest) => format!(
            "unknown {noun} `{name}`: the nearest known one is `{nearest}` (of {})",
            known.join(", ")
        ),
        None => format!("unknown {noun} `{name}`"),
    }
}

/// Control characters are shown, so that a message stays on its line; line ends become `;`.
fn one_line(text: &str) -> String {
    let lines: Vec<&str> = text.trim().lines().map(str::trim).collect();
    let mut line = String::new();
    for c in lines.join("; ").chars() {
        if c.is_control() {
            line.extend(c.escape_default());
        } else {
            line.push(c);
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_of_one_two_and_many_known_names_is_understood() {
        for (known, listed) in [
            ("`alpha`", "alpha"),
            ("`alpha` or `beta`", "alpha, beta"),
            ("one of `alpha`, `beta`, `gamma`", "alpha, beta, gamma"),
        ] {
            assert_eq!(
                explain(&format!("unknown field `alhpa`, expected {known}")),
                format!("unknown key `alhpa`: the nearest known one is `alpha` (of {listed})")
            );
        }
        assert_eq!(explain("missing field `path`"), "the key `path` is missing");
    }

    #[test]
    fn a_name_cannot_forge_a_message() {
        let name = "a`, expected `b\nkiln: all is well\u{1b}[2J";
        let text = explain(&format!("unknown field `{name}`, expected `path`"));
        assert_eq!(text.lines().count(), 1);
        assert!(text.contains("the nearest known one is `path`"), "{text}");
        assert!(!text.contains('\u{1b}'), "{text}");
    }
}
