//! The memory balloon of the machine.

use kiln_devices::virtio::balloon::{Balloon as BalloonDevice, BalloonOptions};
use kiln_memory::{HugePages, MemoryOptions, MemorySize};

use crate::{BuildError, Transport};

/// A memory balloon, by which the guest's RAM gets back to the host.
///
/// By default nothing is in it at first, the guest reports pages that are free, and these are given
/// back to the host until the guest uses them again. For the rest there is
/// [`VmHandle::balloon`](crate::VmHandle::balloon): how much is to be in the balloon, how much
/// there is, and what the guest says of its memory.
///
/// ```
/// use kiln_vmm::{Balloon, MemorySize, VmBuilder};
///
/// let builder = VmBuilder::new()
///     .memory(MemorySize::gib(1))
///     .balloon(Balloon::new().target(MemorySize::mib(256)));
/// ```
///
/// Both kinds of memory ([`Backing`](crate::Backing)) are really freed. Memory from a reserved pool
/// of huge pages cannot be, so a machine with such has no balloon; transparent huge pages can.
/// Memory that is taken at once (`prefault`) is only given back where the host asks for it by a
/// target: free pages are not to be reported then.
#[derive(Clone, Debug, Default)]
#[must_use = "a balloon does nothing until a builder has it"]
pub struct Balloon {
    options: BalloonOptions,
    pub(crate) transport: Option<Transport>,
}

impl Balloon {
    /// An empty balloon, with free page reporting.
    pub fn new() -> Self {
        Self::default()
    }

    /// How much of the guest's RAM is to be in the balloon at first: a multiple of 4 KiB, and not
    /// more than the guest has. The guest gets there some time after its driver has started.
    pub fn target(mut self, size: MemorySize) -> Self {
        self.options.target = size;
        self
    }

    /// Whether the guest may take RAM out of the balloon where it would have to kill a process
    /// otherwise; yes by default.
    pub fn deflate_on_oom(mut self, allowed: bool) -> Self {
        self.options.deflate_on_oom = allowed;
        self
    }

    /// Whether the guest is asked to report free pages, which are given back to the host until they
    /// are used again; yes by default.
    pub fn free_page_reporting(mut self, asked: bool) -> Self {
        self.options.free_page_reporting = asked;
        self
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    /// Checks it against the memory that it is for.
    pub(crate) fn check(&self, memory: &MemoryOptions) -> Result<(), BuildError> {
        if matches!(memory.huge_pages, HugePages::Size2M | HugePages::Size1G) {
            return Err(BuildError::BalloonMemory {
                reason: "it is of reserved huge pages, which stay with the machine; choose \
                         transparent ones, or none",
            });
        }
        if memory.prefault && self.options.free_page_reporting {
            return Err(BuildError::BalloonMemory {
                reason: "all of it is to be taken at once (prefault), and given back when it is \
                         free; turn off one of prefault and free page reporting",
            });
        }
        Ok(())
    }

    pub(crate) fn into_device(self, memory: MemorySize) -> Result<BalloonDevice, BuildError> {
        Ok(BalloonDevice::new(memory, self.options)?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_that_is_to_stay_with_the_machine_is_refused_a_balloon() {
        let with = |huge_pages, prefault| MemoryOptions {
            huge_pages,
            prefault,
            ..MemoryOptions::default()
        };
        let refused = |balloon: Balloon, memory| match balloon.check(&memory) {
            Ok(()) => String::new(),
            Err(error) => error.to_string(),
        };
        let quiet = || Balloon::new().free_page_reporting(false);
        for balloon in [Balloon::new(), quiet()] {
            for huge_pages in [HugePages::Size2M, HugePages::Size1G] {
                let error = refused(balloon.clone(), with(huge_pages, false));
                assert!(error.contains("reserved huge pages"), "{error}");
            }
            for huge_pages in [HugePages::None, HugePages::Transparent] {
                assert_eq!(refused(balloon.clone(), with(huge_pages, false)), "");
            }
        }
        let error = refused(Balloon::new(), with(HugePages::None, true));
        assert!(error.contains("turn off one of prefault"), "{error}");
        assert_eq!(refused(quiet(), with(HugePages::None, true)), "");
    }
}
