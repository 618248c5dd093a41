//! `cargo xtask api`: the public interface of every published crate, as a file in `docs/api`.
//!
//! The files are committed, so a change of an interface is seen where it is reviewed; `cargo xtask
//! test` fails while they do not agree with the sources.
//!
//! The listing is made from the sources alone, by `syn`. The JSON that rustdoc writes knows more,
//! but its form changes with almost every release of Rust, and a library that reads it understands
//! one form: the check would hold on one release, and be skipped on all others that Kiln builds
//! with. It takes a build of all dependencies besides, with `RUSTC_BOOTSTRAP`. Reading the sources
//! takes a tenth of a second and gives the same with every compiler.
//!
//! What is listed: every item that users can name, with its signature, fields, variants and trait
//! items, all names in full; `pub use` of other crates' items; implementations of traits, derived
//! ones too; attributes that callers feel; and the features that something depends on. What the
//! sources do not say is not: auto traits such as `Send`, and what a macro of another crate makes of
//! the attributes that it reads. The values of constants and the bodies of provided methods are no
//! part of the interface.
//!
//! | module | what lives there |
//! |---|---|
//! | `source` | the modules of a crate, read from its files |
//! | `names` | what a path in the source means |
//! | `surface` | which items users can reach, and by which paths |
//! | `list`, `signature`, `print` | the lines |
//! | `difference` | what changed |

mod difference;
mod list;
mod names;
mod print;
mod signature;
mod source;
mod surface;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use clap::Args;
use serde_json::Value;

use crate::{cargo, paths, process};

/// The folder of the listings, in the workspace.
const FOLDER: &str = "docs/api";

/// What `cargo xtask api` is asked to do.
#[derive(Clone, Copy, Debug, Default, Args)]
pub struct ApiArgs {
    /// Accept the interfaces as they are now.
    #[arg(long)]
    bless: bool,
}

/// Compares the public interfaces of the published crates with the listings, or writes these.
///
/// # Errors
///
/// When they differ, and when the sources cannot be read.
pub fn run(args: ApiArgs) -> Result<()> {
    let listings = listings()?;
    let folder = paths::workspace().join(FOLDER);
    if args.bless {
        return bless(&folder, &listings);
    }
    let changes = changes(&folder, &listings)?;
    print!("{}", changes.concat());
    ensure!(
        changes.is_empty(),
        "the public interface is not as {FOLDER} says; if that is meant, accept it with \
         `cargo xtask api --bless`, and tell users in CHANGELOG.md"
    );
    println!("xtask: {} interfaces are as {FOLDER} says", listings.len());
    Ok(())
}

/// Returns what each file of the listings has to say, by its name.
fn listings() -> Result<BTreeMap<String, String>> {
    let metadata = process::output(&mut cargo::command(&[
        "metadata",
        "--no-deps",
        "--format-version",
        "1",
    ]))?;
    let mut listings = BTreeMap::new();
    for (name, root) in published(&metadata)? {
        let listing = listing(&name, &root).with_context(|| format!("list {name}"))?;
        listings.insert(format!("{name}.txt"), listing);
    }
    Ok(listings)
}

/// Returns the libraries among the packages that are published, with the files of their roots.
fn published(metadata: &str) -> Result<Vec<(String, PathBuf)>> {
    let metadata: Value = serde_json::from_str(metadata).context("read cargo's metadata")?;
    let mut libraries = Vec::new();
    for package in metadata["packages"].as_array().into_iter().flatten() {
        let is_private = package["publish"].as_array().is_some_and(Vec::is_empty);
        for target in package["targets"].as_array().into_iter().flatten() {
            let mut kinds = target["kind"].as_array().into_iter().flatten();
            if let (false, true, Some(name), Some(root)) = (
                is_private,
                kinds.any(|kind| kind == "lib"),
                package["name"].as_str(),
                target["src_path"].as_str(),
            ) {
                libraries.push((name.to_owned(), PathBuf::from(root)));
            }
        }
    }
    ensure!(
        !libraries.is_empty(),
        "no package of the workspace is published"
    );
    Ok(libraries)
}

fn listing(name: &str, root: &Path) -> Result<String> {
    let source = source::Crate::read(&name.replace('-', "_"), root)?;
    let lines = list::listing(&source)?;
    Ok(format!(
        "# The public interface of {name}: made by `cargo xtask api --bless`, see CONTRIBUTING.md.\n\
         {lines}"
    ))
}

/// Returns the texts that tell how the files in `folder` differ from what they have to say.
fn changes(folder: &Path, listings: &BTreeMap<String, String>) -> Result<Vec<String>> {
    let mut changes = Vec::new();
    let mut tell = |name: &str, old: &str, new: &str| {
        let lines = difference::difference(old, new);
        if old != new {
            changes.push(format!(
                "--- {FOLDER}/{name}\n+++ the sources\n{}\n",
                lines.join("\n")
            ));
        }
    };
    for (name, new) in listings {
        let file = folder.join(name);
        let old = match fs::read_to_string(&file) {
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => String::new(),
            read => read.with_context(|| format!("read {}", file.display()))?,
        };
        tell(name, &old, new);
    }
    for file in stale(folder, listings)? {
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        let old = fs::read_to_string(&file).with_context(|| format!("read {}", file.display()))?;
        tell(&name, &old, "");
    }
    Ok(changes)
}

/// Returns the listings in `folder` of crates that there are no more.
fn stale(folder: &Path, listings: &BTreeMap<String, String>) -> Result<Vec<PathBuf>> {
    let mut stale = Vec::new();
    if !folder.is_dir() {
        return Ok(stale);
    }
    let entries = folder.read_dir();
    for entry in entries.with_context(|| format!("list {}", folder.display()))? {
        let file = entry?.path();
        let name = file.file_name().unwrap_or_default().to_string_lossy();
        if file.extension().is_some_and(|it| it == "txt") && !listings.contains_key(&*name) {
            stale.push(file);
        }
    }
    stale.sort();
    Ok(stale)
}

/// Writes the listings that changed, and takes away those of crates that there are no more.
fn bless(folder: &Path, listings: &BTreeMap<String, String>) -> Result<()> {
    fs::create_dir_all(folder).with_context(|| format!("make {}", folder.display()))?;
    for (name, listing) in listings {
        let file = folder.join(name);
        if fs::read(&file).ok().as_deref() != Some(listing.as_bytes()) {
            fs::write(&file, listing).with_context(|| format!("write {}", file.display()))?;
            println!("xtask: wrote {FOLDER}/{name}");
        }
    }
    for file in stale(folder, listings)? {
        fs::remove_file(&file).with_context(|| format!("remove {}", file.display()))?;
        println!("xtask: removed {}", file.display());
    }
    Ok(())
}
