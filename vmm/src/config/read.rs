//! From a text or a file to a value.

use std::fs::{self, File};
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde::Deserializer;

use super::error::{Place, explain};
use super::{ConfigError, VmConfig, table};

/// No description of a machine is as long; a file that is does not fill the memory.
const MAX_BYTES: u64 = 1 << 20;

impl VmConfig {
    /// Reads a description in TOML. Its relative paths stay as they are.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`], with the line and the key.
    pub fn from_toml(text: &str) -> Result<Self, ConfigError> {
        let fail = |error: &toml::de::Error, key: String| {
            // The span is in bytes, and none of a file without any.
            let before = error.span().and_then(|span| text.get(..span.start));
            invalid(before.map_or(0, line_after), key, error.message())
        };
        let document = match toml::Deserializer::parse(text) {
            Ok(document) => document,
            Err(error) => return Err(fail(&error, String::new())),
        };
        read_with_path(document).map_err(|error| fail(error.inner(), key_of(&error)))
    }

    /// Reads a description in JSON. Its relative paths stay as they are.
    ///
    /// # Errors
    ///
    /// [`ConfigError::Invalid`], with the line and the key.
    pub fn from_json(text: &str) -> Result<Self, ConfigError> {
        let fail = |error: &serde_json::Error, key: String| {
            let (line, column) = (error.line(), error.column());
            let message = error.to_string();
            let message = message.trim_end_matches(&format!(" at line {line} column {column}"));
            invalid(line, key, message)
        };
        let mut json = serde_json::Deserializer::from_str(text);
        let config =
            read_with_path(&mut json).map_err(|error| fail(error.inner(), key_of(&error)))?;
        json.end().map_err(|error| fail(&error, String::new()))?;
        Ok(config)
    }

    /// Reads a file in TOML or JSON, as its extension says. Its relative paths are taken from the
    /// folder that it lies in.
    ///
    /// # Errors
    ///
    /// Where the file cannot be read, has another extension, or is no description of a machine.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, ConfigError> {
        let path = path.as_ref();
        let parse = match path.extension().and_then(|extension| extension.to_str()) {
            Some("toml") => Self::from_toml,
            Some("json") => Self::from_json,
            _ => return Err(ConfigError::Extension { path: path.into() }),
        };
        let text = read(path)?;
        let config = parse(&text).map_err(|error| error.in_file(path))?;
        Ok(config.relative_to(path.parent().unwrap_or(Path::new(""))))
    }
}

fn read_with_path<'de, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<VmConfig, serde_path_to_error::Error<D::Error>> {
    let mut track = serde_path_to_error::Track::new();
    table::one(serde_path_to_error::Deserializer::new(
        deserializer,
        &mut track,
    ))
    .map_err(|error| serde_path_to_error::Error::new(track.path(), error))
}

fn invalid(line: usize, key: String, message: &str) -> ConfigError {
    ConfigError::Invalid {
        path: None,
        place: Place { line, key },
        problem: explain(message),
    }
}

/// The number of the line that the character after this text is on.
fn line_after(text: &str) -> usize {
    text.bytes().filter(|byte| *byte == b'\n').count() + 1
}

/// The key that was read when it went wrong; empty for the description as a whole.
fn key_of<E>(error: &serde_path_to_error::Error<E>) -> String {
    match error.path().to_string() {
        whole if whole == "." => String::new(),
        key => key.escape_debug().to_string(),
    }
}

fn read(path: &Path) -> Result<String, ConfigError> {
    let fail = |source: io::Error| ConfigError::Read {
        path: PathBuf::from(path),
        source,
    };
    let refuse = || ConfigError::NotAConfiguration {
        path: PathBuf::from(path),
        max: MAX_BYTES,
    };
    // To open a pipe would wait for its other end: look first.
    if !fs::metadata(path).map_err(fail)?.is_file() {
        return Err(refuse());
    }
    let mut text = String::new();
    let file = File::open(path).map_err(fail)?;
    // One byte more than there may be, to notice that there is more.
    file.take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > MAX_BYTES {
        return Err(refuse());
    }
    Ok(text)
}
