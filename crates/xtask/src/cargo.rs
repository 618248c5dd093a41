//! Running cargo.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::Value;

use crate::{paths, process};

/// The target that programs for release, and those that are fuzzed, are built for.
pub(crate) const TARGET: &str = "x86_64-unknown-linux-gnu";

/// Returns a command that runs cargo in the workspace.
pub fn command(arguments: &[&str]) -> Command {
    // Cargo names itself to what it runs.
    let program = std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = process::tied(program);
    command.args(arguments).current_dir(paths::workspace());
    command
}

/// Builds the `kiln` program as users get it, and returns its path.
///
/// # Errors
///
/// When it cannot be built.
pub fn build_kiln() -> Result<PathBuf> {
    Ok(build_static("kiln")?.join("kiln"))
}

/// Builds the programs of a package for release, linked statically and to a fixed address, and
/// returns the folder that they are in.
///
/// A dynamic program spends a third of a millisecond in the dynamic linker, which is a quarter of
/// what KVM takes to start a guest.
///
/// # Errors
///
/// When they cannot be built.
pub fn build_static(package: &str) -> Result<PathBuf> {
    let arguments = [
        "build",
        "--quiet",
        "--release",
        "--target",
        TARGET,
        "--package",
        package,
    ];
    // With a target named, the flags are not for what the build itself runs.
    process::run(command(&arguments).env(
        "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_RUSTFLAGS",
        "-C target-feature=+crt-static -C relocation-model=static",
    ))?;
    Ok(paths::target().join(TARGET).join("release"))
}

/// Builds the integration tests of the workspace's `tests` crate and returns the programs.
///
/// # Errors
///
/// When they cannot be built.
pub fn build_integration_tests() -> Result<Vec<PathBuf>> {
    let messages = process::output(&mut command(&[
        "test",
        "--quiet",
        "--package",
        "kiln-tests",
        "--no-run",
        "--message-format=json-render-diagnostics",
    ]))?;
    let tests = integration_tests(&messages)?;
    ensure!(!tests.is_empty(), "kiln-tests has no integration tests");
    Ok(tests)
}

/// Returns the programs of integration tests among what cargo has built, by its messages in JSON,
/// one a line.
fn integration_tests(messages: &str) -> Result<Vec<PathBuf>> {
    let mut tests = Vec::new();
    for line in messages.lines().filter(|line| line.starts_with('{')) {
        let message: Value = serde_json::from_str(line).context("read cargo's messages")?;
        let is_integration_test = message["profile"]["test"] == true
            && message["target"]["kind"]
                .as_array()
                .is_some_and(|kinds| kinds.contains(&"test".into()));
        if let (true, Some(program)) = (is_integration_test, message["executable"].as_str()) {
            tests.push(PathBuf::from(program));
        }
    }
    tests.sort();
    Ok(tests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_programs_of_integration_tests_are_taken() {
        let messages = r#"{"reason":"compiler-artifact","target":{"kind":["lib"]},"profile":{"test":true},"executable":"/t/unit"}
{"reason":"compiler-artifact","target":{"kind":["test"]},"profile":{"test":true},"executable":"/t/linux-1"}
something else
{"reason":"compiler-artifact","target":{"kind":["test"]},"profile":{"test":true},"executable":"/t/a-1"}
{"reason":"compiler-artifact","target":{"kind":["bin"]},"profile":{"test":false},"executable":"/t/kiln"}
{"reason":"build-finished","success":true}
"#;
        let tests = integration_tests(messages).unwrap();
        assert_eq!(
            tests,
            [PathBuf::from("/t/a-1"), PathBuf::from("/t/linux-1")]
        );
        assert!(integration_tests("{broken").is_err());
    }
}
