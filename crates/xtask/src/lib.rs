//! The developer commands of Kiln, as a library that the integration tests use too.
//!
//! - [`assets`]: Debian's kernels, an initrd for each, and a root disk, made once and kept;
//! - [`tools`]: the disk of programs that guests measure and check with;
//! - [`initrd`]: extending an initrd with the script that a guest runs;
//! - [`nested`]: a Linux with a real `/dev/kvm` on any host, that runs any of the host's programs;
//! - [`host`]: what this machine's own KVM can do, and [`place`]: running guests where they run;
//! - [`mod@bench`]: Kiln measured beside others;
//! - [`boot`] and [`mod@test`]: the two commands for users; [`cargo`]: what they build with;
//! - [`fuzz`]: the fuzz targets, built and run;
//! - [`api`]: the public interfaces of the published crates, listed and compared;
//! - [`packages`]: the Debian packages that all this takes, installed when missing;
//! - [`process`], [`paths`], [`cpio`], [`bzimage`], [`modules`]: the small things below.
//!
//! Nothing here links with the machine monitor: the commands drive the `kiln` program.
//!
//! ```
//! let mut archive = kiln_xtask::cpio::Archive::new();
//! archive.file("test.sh", 0o755, b"poweroff -f\n");
//! assert_eq!(archive.finish().len() % 512, 0);
//! ```

#![forbid(unsafe_code)]

pub mod api;
pub mod assets;
pub mod bench;
pub mod boot;
pub mod bzimage;
pub mod cargo;
pub mod cpio;
pub mod fuzz;
pub mod host;
pub mod initrd;
mod integration;
pub mod modules;
pub mod nested;
pub mod packages;
pub mod paths;
pub mod place;
pub mod process;
mod root;
pub mod test;
pub mod tools;
