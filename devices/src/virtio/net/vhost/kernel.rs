//! The kernel's side: one open `/dev/vhost-net`, which carries one pair of queues.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;

use kiln_memory::GuestMemory;
use vhost::net::VhostNet;
use vhost::vhost_kern::VhostKernBackend;
use vhost::vhost_kern::net::Net as Instance;
use vhost::{Error, VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use virtio_bindings::virtio_config::VIRTIO_F_VERSION_1;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC};
use virtio_queue::{Queue, QueueT};
use vm_memory::{
    Address, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};
use vmm_sys_util::eventfd::EventFd;

use super::VhostError;
use crate::virtio::net::features::MRG_RXBUF;

/// The features that the kernel has to know, since drivers are offered them whatever is behind the
/// device. It is told of no others: what else a driver agreed on is the tap's, and the number of
/// one means something else to vhost (`VHOST_NET_F_VIRTIO_NET_HDR`).
const FEATURES: u64 = 1 << VIRTIO_F_VERSION_1
    | 1 << VIRTIO_RING_F_INDIRECT_DESC
    | 1 << VIRTIO_RING_F_EVENT_IDX
    | MRG_RXBUF;

/// An instance of vhost-net. The kernel's thread for it ends with it.
pub(super) struct Kernel {
    instance: Instance<Arc<GuestMemory>>,
    /// Where the rings are; nowhere before a device is active.
    memory: Arc<GuestMemory>,
}

impl Kernel {
    pub(super) fn open() -> Result<Self, VhostError> {
        let memory = Arc::new(GuestMemory::new());
        let instance = Instance::new(Arc::clone(&memory)).map_err(|error| match error {
            Error::VhostOpen(source) => VhostError::of_open(source),
            error => VhostError::request("open it")(error),
        })?;
        let kernel = Self { instance, memory };
        let known = kernel.get_features();
        let missing = FEATURES & !known.map_err(VhostError::request("read its features"))?;
        if missing != 0 {
            return Err(VhostError::Features { missing });
        }
        kernel
            .set_owner()
            .map_err(VhostError::request("become its owner"))?;
        Ok(kernel)
    }

    /// Tells of the guest's RAM, and of what the driver agreed on.
    pub(super) fn prepare(
        &mut self,
        memory: &Arc<GuestMemory>,
        features: u64,
    ) -> Result<(), VhostError> {
        self.set_features(features & FEATURES)
            .map_err(VhostError::request("set its features"))?;
        self.set_mem_table(&regions(memory))
            .map_err(VhostError::request("tell it of the guest's memory"))?;
        self.memory = Arc::clone(memory);
        Ok(())
    }

    /// Tells of a ring, 0 to receive and 1 to transmit, and of the eventfds by which it is worked
    /// on. The kernel does not work on it before it has a [backend](Self::connect).
    pub(super) fn set_ring(
        &self,
        ring: usize,
        queue: &Queue,
        events: &RingEvents<'_>,
    ) -> Result<(), VhostError> {
        self.set_vring_num(ring, queue.size())
            .and_then(|()| self.set_vring_base(ring, queue.next_avail()))
            .and_then(|()| self.set_vring_addr(ring, &addresses(queue)))
            .and_then(|()| self.set_vring_call(ring, events.call))
            .and_then(|()| self.set_vring_err(ring, events.error))
            .and_then(|()| self.set_vring_kick(ring, events.kick))
            .map_err(VhostError::request("tell it of a queue"))
    }

    /// Has the kernel carry packets between the ring and this tap from now on.
    pub(super) fn connect(&self, ring: usize, tap: BorrowedFd<'_>) -> Result<(), VhostError> {
        let tap = tap.try_clone_to_owned().map(File::from);
        let tap =
            tap.map_err(|error| VhostError::request("share the tap")(Error::IOError(error)))?;
        self.instance
            .set_backend(ring, Some(&tap))
            .map_err(VhostError::request("have it work on a queue"))
    }

    /// Has the kernel leave the ring alone; when this returns, it does.
    pub(super) fn disconnect(&self, ring: usize) -> Result<(), VhostError> {
        self.instance
            .set_backend(ring, None)
            .map_err(VhostError::request("have it leave a queue"))
    }

    /// How far the ring was followed: the index of the next entry to be taken.
    pub(super) fn position(&self, ring: usize) -> Result<u16, VhostError> {
        let position = self.get_vring_base(ring);
        // Of a split ring it is all, and has 16 bits.
        position
            .map(|position| position as u16)
            .map_err(VhostError::request("ask how far it followed a queue"))
    }

    /// Has it go on from there.
    pub(super) fn set_position(&self, ring: usize, position: u16) -> Result<(), VhostError> {
        self.set_vring_base(ring, position)
            .map_err(VhostError::request("tell it where a queue goes on"))
    }
}

impl AsRawFd for Kernel {
    fn as_raw_fd(&self) -> RawFd {
        self.instance.as_raw_fd()
    }
}

impl VhostKernBackend for Kernel {
    type AS = Arc<GuestMemory>;

    fn mem(&self) -> &Self::AS {
        &self.memory
    }

    /// The kernel takes addresses of this process and follows them wherever they lead.
    fn is_valid(&self, ring: &VringConfigData) -> bool {
        is_in_memory(&self.memory, ring)
    }
}

/// The eventfds of a ring.
pub(super) struct RingEvents<'a> {
    /// The driver writes it.
    pub(super) kick: &'a EventFd,
    /// The kernel writes it for the driver.
    pub(super) call: &'a EventFd,
    /// The kernel writes it when it cannot go on.
    pub(super) error: &'a EventFd,
}

fn addresses(queue: &Queue) -> VringConfigData {
    VringConfigData {
        queue_max_size: queue.max_size(),
        queue_size: queue.size(),
        flags: 0,
        desc_table_addr: queue.desc_table(),
        used_ring_addr: queue.used_ring(),
        avail_ring_addr: queue.avail_ring(),
        log_addr: None,
    }
}

/// Whether each part of the ring is in one piece of the guest's RAM (virtio 1.3, section 2.7): pieces
/// that follow each other for the guest need not do so for this process.
fn is_in_memory(memory: &GuestMemory, ring: &VringConfigData) -> bool {
    let size = usize::from(ring.queue_size);
    let parts = [
        (ring.desc_table_addr, 16 * size),
        (ring.avail_ring_addr, 6 + 2 * size),
        (ring.used_ring_addr, 6 + 8 * size),
    ];
    size.is_power_of_two()
        && parts
            .into_iter()
            .all(|(start, bytes)| memory.get_slice(GuestAddress(start), bytes).is_ok())
}

/// The guest's RAM as the kernel is told of it: where the guest finds it, and where this process has
/// it.
fn regions(memory: &GuestMemory) -> Vec<VhostUserMemoryRegionInfo> {
    let info = |region: &vm_memory::GuestRegionMmap<kiln_memory::DirtyBitmap>| {
        let host = region.get_host_address(MemoryRegionAddress(0)).ok()?;
        Some(VhostUserMemoryRegionInfo {
            guest_phys_addr: region.start_addr().raw_value(),
            memory_size: region.len(),
            userspace_addr: host as u64,
            ..VhostUserMemoryRegionInfo::default()
        })
    };
    memory.iter().filter_map(info).collect()
}

impl VhostError {
    fn of_open(source: io::Error) -> Self {
        match source.kind() {
            io::ErrorKind::NotFound => Self::Absent,
            io::ErrorKind::PermissionDenied => Self::NotAllowed,
            // The node is there, and the module is not.
            _ if source.raw_os_error() == Some(libc::ENODEV) => Self::Absent,
            _ if source.raw_os_error() == Some(libc::ENXIO) => Self::Absent,
            _ => Self::Open(source),
        }
    }

    fn request(what: &'static str) -> impl FnOnce(Error) -> Self {
        move |error| Self::Request {
            what,
            source: match error {
                Error::IoctlError(source) | Error::IOError(source) => source,
                other => io::Error::other(other),
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use kiln_memory::{MemoryOptions, allocate};

    use super::*;

    /// RAM with a hole, and two regions that follow each other.
    fn memory() -> GuestMemory {
        let ranges = [(0, 0x8000), (0x8000, 0x8000), (0x2_0000, 0x1000)];
        let ranges = ranges.map(|(start, len)| (GuestAddress(start), len));
        allocate(&ranges, &MemoryOptions::default()).unwrap()
    }

    fn ring(descriptors: u64, available: u64, used: u64) -> VringConfigData {
        VringConfigData {
            queue_max_size: 256,
            queue_size: 256,
            flags: 0,
            desc_table_addr: descriptors,
            avail_ring_addr: available,
            used_ring_addr: used,
            log_addr: None,
        }
    }

    #[test]
    fn a_ring_is_in_one_piece_of_ram_or_is_refused() {
        let memory = memory();
        let is_good = |descriptors, available, used| {
            is_in_memory(&memory, &ring(descriptors, available, used))
        };
        assert!(is_good(0x1000, 0x2000, 0x3000));
        // Each part up to the last byte of RAM.
        assert!(is_good(0x2_0000, 0x2000, 0x3000));
        assert!(is_good(0x1000, 0x2_1000 - (6 + 512), 0x3000));
        assert!(is_good(0x1000, 0x2000, 0x2_1000 - (6 + 2048)));
        // A byte beyond it.
        assert!(!is_good(0x2_0010, 0x2000, 0x3000));
        assert!(!is_good(0x1000, 0x2_1000 - (4 + 512), 0x3000));
        assert!(!is_good(0x1000, 0x2000, 0x2_1000 - (4 + 2048)));
        // In the hole, across it, nowhere, and round the end of the addresses.
        for bad in [0x1_8000, 0xfff0, 0xffff_ffff_0000_0000, u64::MAX - 15] {
            assert!(!is_good(bad, 0x2000, 0x3000), "{bad:#x}");
            assert!(!is_good(0x1000, bad, 0x3000), "{bad:#x}");
            assert!(!is_good(0x1000, 0x2000, bad), "{bad:#x}");
        }
        // Half in either of two regions.
        assert!(!is_good(0x7ff0, 0x2000, 0x3000));
        let empty = VringConfigData {
            queue_size: 0,
            ..ring(0x1000, 0x2000, 0x3000)
        };
        assert!(!is_in_memory(&memory, &empty));
        assert!(!is_in_memory(
            &GuestMemory::new(),
            &ring(0x1000, 0x2000, 0x3000)
        ));
    }

    #[test]
    fn the_kernel_is_told_of_all_ram_and_of_nothing_else() {
        let memory = memory();
        let regions = regions(&memory);
        let told: Vec<_> = regions
            .iter()
            .map(|region| (region.guest_phys_addr, region.memory_size))
            .collect();
        assert_eq!(told, [(0, 0x8000), (0x8000, 0x8000), (0x2_0000, 0x1000)]);
        for region in regions {
            let host = memory.get_host_address(GuestAddress(region.guest_phys_addr));
            assert_eq!(region.userspace_addr, host.unwrap() as u64);
        }
    }

    #[test]
    fn features_of_the_header_are_not_told_to_vhost() {
        // VHOST_NET_F_VIRTIO_NET_HDR has the kernel make up the header itself.
        assert_eq!(FEATURES & (1 << 27), 0);
        // VHOST_F_LOG_ALL has it write a log.
        assert_eq!(FEATURES & (1 << 26), 0);
    }

    #[test]
    fn what_cannot_be_opened_is_explained() {
        let error = |errno| VhostError::of_open(io::Error::from_raw_os_error(errno)).to_string();
        assert!(error(libc::ENOENT).contains("modprobe vhost_net"));
        assert!(error(libc::ENODEV).contains("modprobe vhost_net"));
        assert!(error(libc::EACCES).contains("not allowed"));
        assert_eq!(error(libc::EMFILE), "open /dev/vhost-net");
    }
}
