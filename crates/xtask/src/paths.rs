//! Where things are in the work tree.

use std::path::{Path, PathBuf};

/// Returns the folder of the workspace.
pub fn workspace() -> PathBuf {
    // What cargo says when it runs us comes first: two work trees that share a target folder share
    // our program too.
    let now = std::env::var_os("CARGO_MANIFEST_DIR");
    let built = Path::new(env!("CARGO_MANIFEST_DIR"));
    now.as_deref()
        .and_then(|package| workspace_of(Path::new(package)))
        .or_else(|| workspace_of(built))
        .unwrap_or_else(|| built.to_owned())
}

/// Returns the folder with the lock file that `package` is in.
fn workspace_of(package: &Path) -> Option<PathBuf> {
    let mut folders = package.ancestors();
    folders
        .find(|folder| folder.join("Cargo.lock").is_file())
        .map(Path::to_owned)
}

/// Returns cargo's target folder: `CARGO_TARGET_DIR`, or `target` in the workspace.
pub fn target() -> PathBuf {
    match std::env::var_os("CARGO_TARGET_DIR") {
        Some(folder) if !folder.is_empty() => {
            let folder = PathBuf::from(folder);
            std::path::absolute(&folder).unwrap_or(folder)
        }
        _ => workspace().join("target"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_workspace_is_the_folder_with_the_lock_file() {
        assert!(workspace().join("crates/xtask/Cargo.toml").is_file());
        let folder = tempfile::tempdir().unwrap();
        let package = folder.path().join("a/b");
        std::fs::create_dir_all(&package).unwrap();
        assert_eq!(workspace_of(&package), None);
        std::fs::write(folder.path().join("Cargo.lock"), "").unwrap();
        assert_eq!(workspace_of(&package).as_deref(), Some(folder.path()));
    }
}
