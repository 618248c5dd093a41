//! How guest RAM is backed by the host.

use serde::{Deserialize, Serialize};

/// How guest RAM is backed by the host.
///
/// ```
/// use kiln_memory::{Backing, MemoryOptions};
///
/// let options = MemoryOptions { backing: Backing::Memfd, ..Default::default() };
/// assert!(!options.prefault);
/// ```
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct MemoryOptions {
    /// What is behind the mappings.
    pub backing: Backing,
    /// The size of the host's pages.
    pub huge_pages: HugePages,
    /// Take all memory from the host at once, instead of page by page when the guest first
    /// touches it: a slower start, and no faults later.
    pub prefault: bool,
    /// Note which pages the VMM itself writes (KVM notes what the guest writes). Off, the bitmap
    /// of every region is `None`.
    pub dirty_log: bool,
}

/// What is behind the mappings of guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Backing {
    /// Private anonymous memory, reachable from this process alone.
    #[default]
    Anonymous,
    /// One memfd for all regions: its pages can be shared with another process (vhost-user), or
    /// outlive the mapping. It is sealed, so nobody can shrink it under the guest.
    Memfd,
}

/// The size of the host's pages behind guest RAM.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum HugePages {
    /// What the host does by default.
    #[default]
    None,
    /// Ask for transparent huge pages: the host uses them where it can. Regions are then aligned
    /// to 2 MiB in the host's address space where the host allows it.
    Transparent,
    /// Pages of 2 MiB from the host's reserved pool. They are reserved at once, so that a guest
    /// never dies because the pool ran out.
    Size2M,
    /// Pages of 1 GiB from the host's reserved pool, reserved at once.
    Size1G,
}
