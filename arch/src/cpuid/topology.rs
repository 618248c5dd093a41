//! How the vCPUs are arranged in sockets, cores and threads, and their APIC ids.

use crate::Error;

/// The most vCPUs of one machine: what the tables and CPUID leaves here can describe.
pub const MAX_VCPUS: u32 = 1024;

/// How the vCPUs are arranged. vCPUs are numbered thread by thread, core by core, socket by socket.
///
/// ```
/// use kiln_arch::cpuid::Topology;
///
/// // By default: one socket, as many cores as vCPUs, one thread each.
/// let flat = Topology::new(4)?;
/// assert_eq!(flat.apic_ids(), [0, 1, 2, 3]);
///
/// // APIC ids keep a whole number of bits for each level, so there can be gaps.
/// let sockets = Topology::with_levels(2, 3, 1)?;
/// assert_eq!(sockets.apic_ids(), [0, 1, 2, 4, 5, 6]);
/// # Ok::<(), kiln_arch::Error>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Topology {
    sockets: u32,
    cores: u32,
    threads: u32,
}

impl Topology {
    /// One socket with `vcpus` cores of one thread each.
    ///
    /// # Errors
    ///
    /// [`Error::Vcpus`] where the number is 0 or more than [`MAX_VCPUS`].
    pub fn new(vcpus: u32) -> Result<Self, Error> {
        Self::with_levels(1, vcpus, 1)
    }

    /// `sockets` with `cores` each, of `threads` each.
    ///
    /// # Errors
    ///
    /// [`Error::Vcpus`] where their product is 0 or more than [`MAX_VCPUS`].
    pub fn with_levels(sockets: u32, cores: u32, threads: u32) -> Result<Self, Error> {
        let count = u64::from(sockets) * u64::from(cores);
        let count = count.saturating_mul(u64::from(threads));
        if count == 0 || count > u64::from(MAX_VCPUS) {
            return Err(Error::Vcpus {
                count,
                limit: MAX_VCPUS,
            });
        }
        Ok(Self {
            sockets,
            cores,
            threads,
        })
    }

    /// The number of vCPUs.
    pub const fn vcpus(&self) -> u32 {
        self.sockets * self.cores * self.threads
    }

    /// The APIC id of vCPU number `index`. KVM wants it as the id of the vCPU, too.
    pub const fn apic_id(&self, index: u32) -> u32 {
        let (core, thread) = (index / self.threads, index % self.threads);
        let (socket, core) = (core / self.cores, core % self.cores);
        socket << self.socket_shift() | core << self.core_shift() | thread
    }

    /// The APIC ids of all vCPUs, in their order.
    pub fn apic_ids(&self) -> Vec<u32> {
        (0..self.vcpus()).map(|index| self.apic_id(index)).collect()
    }

    /// The threads of one core.
    pub(crate) const fn threads(&self) -> u32 {
        self.threads
    }

    /// The threads of one socket.
    pub(crate) const fn threads_per_socket(&self) -> u32 {
        self.cores * self.threads
    }

    /// The core of its socket that a vCPU is a thread of.
    pub(crate) const fn core(&self, index: u32) -> u32 {
        index / self.threads % self.cores
    }

    /// The socket that a vCPU is in.
    pub(crate) const fn socket(&self, index: u32) -> u32 {
        index / self.threads_per_socket()
    }

    /// The bits of an APIC id that number the threads of a core.
    pub(crate) const fn core_shift(&self) -> u32 {
        bits_for(self.threads)
    }

    /// The bits of an APIC id that number the threads of a socket.
    pub(crate) const fn socket_shift(&self) -> u32 {
        self.core_shift() + bits_for(self.cores)
    }
}

/// The bits that number `count` things.
const fn bits_for(count: u32) -> u32 {
    u32::BITS - count.saturating_sub(1).leading_zeros()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_flat_topology_numbers_its_vcpus_without_gaps() {
        for vcpus in [1, 2, 3, 255, 256, 1024] {
            let topology = Topology::new(vcpus).unwrap();
            assert_eq!(topology.vcpus(), vcpus);
            assert_eq!(topology.apic_ids(), (0..vcpus).collect::<Vec<_>>());
        }
    }

    #[test]
    fn levels_take_whole_bits_of_the_apic_id() {
        let topology = Topology::with_levels(2, 3, 2).unwrap();
        assert_eq!(
            topology.apic_ids(),
            [0, 1, 2, 3, 4, 5, 8, 9, 10, 11, 12, 13]
        );
        assert_eq!((topology.core_shift(), topology.socket_shift()), (1, 3));
        assert_eq!((topology.core(9), topology.socket(9)), (1, 1));
    }

    #[test]
    fn no_vcpus_and_too_many_are_refused() {
        assert!(Topology::new(0).is_err());
        assert!(Topology::new(MAX_VCPUS + 1).is_err());
        assert!(Topology::with_levels(u32::MAX, u32::MAX, u32::MAX).is_err());
        assert!(Topology::with_levels(0, 1, 1).is_err());
    }
}
