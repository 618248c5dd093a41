//! What the CPUID instruction tells each vCPU.
//!
//! The features are the host's, as KVM reports them (`KVM_GET_SUPPORTED_CPUID`), and so are KVM's
//! own leaves from 0x40000000. What is changed is what differs from vCPU to vCPU, and what speaks
//! of the host's own cores: ids, counts and the sharing of caches.

mod topology;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

pub use topology::{MAX_VCPUS, Topology};

use crate::Error;

/// Leaves (Intel SDM volume 2A, CPUID; AMD APM volume 3, appendix E).
const VENDOR: u32 = 0;
const FEATURES: u32 = 1;
const CACHES: u32 = 4;
const TOPOLOGY: u32 = 0xb;
const TOPOLOGY_V2: u32 = 0x1f;
const EXTENDED_FEATURES: u32 = 0x8000_0001;
const ADDRESS_SIZES: u32 = 0x8000_0008;
const AMD_CACHES: u32 = 0x8000_001d;
const AMD_TOPOLOGY: u32 = 0x8000_001e;
const AMD_TOPOLOGY_V2: u32 = 0x8000_0026;

/// Leaf 1, ECX.
const X2APIC: u32 = 1 << 21;
const TSC_DEADLINE: u32 = 1 << 24;
const HYPERVISOR: u32 = 1 << 31;
/// Leaf 1, EDX: the count of logical processors in EBX is valid.
const HTT: u32 = 1 << 28;
/// Leaf 0x80000001, ECX: the same, as AMD has it; and that leaf 0x8000001e exists.
const CMP_LEGACY: u32 = 1 << 1;
const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;

/// What a processor addresses whose CPUID does not say.
const DEFAULT_ADDRESS_BITS: u8 = 36;

/// The makers of processors whose leaves differ.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Vendor {
    /// AMD, and Hygon which follows it.
    Amd,
    Other,
}

/// The CPUID table of vCPU number `index`, from what KVM says it supports.
///
/// The vCPU's id in KVM must be [`Topology::apic_id`], and its local APIC must be KVM's own (the
/// TSC deadline timer is one of its features).
///
/// # Errors
///
/// [`Error::Cpuid`] where the table has more leaves than KVM takes.
///
/// ```
/// use kiln_arch::cpuid::{self, Topology};
/// use kvm_bindings::{CpuId, kvm_cpuid_entry2};
///
/// let features = kvm_cpuid_entry2 { function: 1, ..Default::default() };
/// let supported = CpuId::from_entries(&[features]).map_err(|e| format!("{e:?}"))?;
/// let table = cpuid::for_vcpu(&supported, &Topology::new(2)?, 1)?;
/// let leaf = table.as_slice().iter().find(|entry| entry.function == 1).ok_or("leaf 1")?;
/// assert_eq!(leaf.ebx >> 24, 1); // its APIC id
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub fn for_vcpu(supported: &CpuId, topology: &Topology, index: u32) -> Result<CpuId, Error> {
    let vendor = vendor(supported.as_slice());
    let mut entries: Vec<_> = supported
        .as_slice()
        .iter()
        // These are written anew below, or speak of the host's own cores.
        .filter(|entry| !matches!(entry.function, TOPOLOGY | TOPOLOGY_V2 | AMD_TOPOLOGY_V2))
        .copied()
        .collect();
    let has_topology_extensions = entries
        .iter()
        .any(|entry| entry.function == EXTENDED_FEATURES && entry.ecx & TOPOLOGY_EXTENSIONS != 0);
    if has_topology_extensions && !entries.iter().any(|entry| entry.function == AMD_TOPOLOGY) {
        entries.push(kvm_cpuid_entry2 {
            function: AMD_TOPOLOGY,
            ..Default::default()
        });
    }
    let mut highest = 0;
    for entry in &mut entries {
        if entry.function == VENDOR {
            // Processors that have no such leaf are older than any that can run guests well, and
            // reading it there gives zeros.
            entry.eax = entry.eax.max(TOPOLOGY);
            highest = entry.eax;
        }
        adapt(entry, vendor, topology, index);
    }
    entries.extend(topology_leaf(TOPOLOGY, topology, index));
    if highest >= TOPOLOGY_V2 {
        entries.extend(topology_leaf(TOPOLOGY_V2, topology, index));
    }
    let leaves = entries.len();
    CpuId::from_entries(&entries).map_err(|_| Error::Cpuid { leaves })
}

/// The bits of a guest physical address that a vCPU has: RAM must end below two to this power.
pub fn physical_address_bits(supported: &CpuId) -> u8 {
    let leaf = supported
        .as_slice()
        .iter()
        .find(|entry| entry.function == ADDRESS_SIZES);
    match leaf.map(|entry| entry.eax as u8) {
        None | Some(0) => DEFAULT_ADDRESS_BITS,
        Some(bits) => bits,
    }
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let Some(leaf) = entries.iter().find(|entry| entry.function == VENDOR) else {
        return Vendor::Other;
    };
    let name = [leaf.ebx, leaf.edx, leaf.ecx]
        .map(u32::to_le_bytes)
        .concat();
    match name.as_slice() {
        b"AuthenticAMD" | b"HygonGenuine" => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// Changes one leaf to what is right for this vCPU.
fn adapt(entry: &mut kvm_cpuid_entry2, vendor: Vendor, topology: &Topology, index: u32) {
    let apic_id = topology.apic_id(index);
    let logical = topology.threads_per_socket();
    match entry.function {
        FEATURES => {
            let count = 1_u32
                .checked_shl(topology.socket_shift())
                .unwrap_or(u32::MAX)
                .min(255);
            // On AMD the count is exact, on others it is that of the ids reserved.
            let count = if vendor == Vendor::Amd {
                logical.min(255)
            } else {
                count
            };
            entry.ebx = entry.ebx & 0xffff | count << 16 | (apic_id & 0xff) << 24;
            entry.ecx |= X2APIC | TSC_DEADLINE | HYPERVISOR;
            set(&mut entry.edx, HTT, logical > 1);
        }
        CACHES | AMD_CACHES => share_cache(entry, topology),
        EXTENDED_FEATURES if vendor == Vendor::Amd => {
            set(&mut entry.ecx, CMP_LEGACY, logical > 1);
        }
        ADDRESS_SIZES if vendor == Vendor::Amd => {
            let count = (logical - 1).min(0xff);
            entry.ecx = entry.ecx & !0xf0ff | count | topology.socket_shift().min(0xf) << 12;
        }
        AMD_TOPOLOGY => {
            entry.eax = apic_id;
            entry.ebx = topology.core(index) & 0xff | ((topology.threads() - 1) & 0xff) << 8;
            // One node a socket.
            entry.ecx = topology.socket(index) & 0xff;
            entry.edx = 0;
        }
        _ => {}
    }
}

/// Says which vCPUs share a cache: a core's threads the first two levels, a socket the third.
fn share_cache(entry: &mut kvm_cpuid_entry2, topology: &Topology) {
    let (kind, level) = (entry.eax & 0x1f, entry.eax >> 5 & 0x7);
    if kind == 0 {
        return;
    }
    let shift = if level >= 3 {
        topology.socket_shift()
    } else {
        topology.core_shift()
    };
    let sharing = ((1 << shift) - 1_u32).min(0xfff);
    entry.eax = entry.eax & !(0xfff << 14) | sharing << 14;
    if entry.function == CACHES {
        let cores = ((1 << (topology.socket_shift() - topology.core_shift())) - 1_u32).min(0x3f);
        entry.eax = entry.eax & !(0x3f << 26) | cores << 26;
    }
}

/// Leaf 0xb or 0x1f: the levels of the topology, each as a sub-leaf.
fn topology_leaf(function: u32, topology: &Topology, index: u32) -> [kvm_cpuid_entry2; 3] {
    const THREADS: u32 = 1 << 8;
    const CORES: u32 = 2 << 8;
    let levels = [
        (topology.core_shift(), topology.threads(), THREADS),
        (
            topology.socket_shift(),
            topology.threads_per_socket(),
            CORES,
        ),
        (0, 0, 0),
    ];
    let mut number = 0;
    levels.map(|(shift, count, kind)| {
        let entry = kvm_cpuid_entry2 {
            function,
            index: number,
            flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax: shift,
            ebx: count,
            ecx: kind | number,
            edx: topology.apic_id(index),
            ..Default::default()
        };
        number += 1;
        entry
    })
}

fn set(register: &mut u32, bit: u32, on: bool) {
    *register = if on {
        *register | bit
    } else {
        *register & !bit
    };
}

#[cfg(test)]
mod tests;
