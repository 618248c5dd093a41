use super::*;

fn leaf(function: u32, index: u32, registers: [u32; 4]) -> kvm_cpuid_entry2 {
    let [eax, ebx, ecx, edx] = registers;
    let flags = u32::from(matches!(function, 4 | 7 | 0xb | 0xd | 0x1f | AMD_CACHES));
    kvm_cpuid_entry2 {
        function,
        index,
        flags,
        eax,
        ebx,
        ecx,
        edx,
        ..Default::default()
    }
}

fn vendor_leaf(max: u32, name: &[u8; 12]) -> kvm_cpuid_entry2 {
    let word = |at: usize| u32::from_le_bytes(name[at..at + 4].try_into().unwrap());
    leaf(0, 0, [max, word(0), word(8), word(4)])
}

/// Features with OSXSAVE and SSE4 set, and a count and an id of the host's in EBX.
const HOST_ECX: u32 = 1 << 27 | 1 << 19 | 1 << 20;

fn common(max: u32, name: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
    vec![
        vendor_leaf(max, name),
        leaf(1, 0, [0x000a_0f10, 0x3720_0800, HOST_ECX, 0x178b_fbff]),
        leaf(7, 0, [1, 0x219c_91a9, 0x40_069c, 0x10]),
        leaf(
            0x4000_0000,
            0,
            [0x4000_0001, 0x4b4d_564b, 0x564b_4d56, 0x4d],
        ),
        leaf(0x4000_0001, 0, [0x0100_7efb, 0, 0, 1]),
        leaf(0x8000_0000, 0, [0x8000_0022, 0, 0, 0]),
        leaf(0x8000_0001, 0, [0, 0, 0x121, 0x2c10_0800]),
    ]
}

fn intel() -> CpuId {
    let mut entries = common(0x20, b"GenuineIntel");
    entries.extend([
        // L1 data and instruction, L2, L3; of a host with 32 cores.
        leaf(4, 0, [0xfc00_4121, 0x2c0_003f, 63, 0]),
        leaf(4, 1, [0xfc00_4122, 0x1c0_003f, 63, 0]),
        leaf(4, 2, [0xfc00_4143, 0x4c0_003f, 1023, 0]),
        leaf(4, 3, [0xfc0f_c163, 0x2c0_003f, 45055, 4]),
        leaf(4, 4, [0; 4]),
        leaf(0xb, 0, [1, 2, 0x100, 0x37]),
        leaf(0xb, 1, [6, 64, 0x201, 0x37]),
        leaf(0xb, 2, [0, 0, 2, 0x37]),
        leaf(0x1f, 0, [1, 2, 0x100, 0x37]),
        leaf(0x8000_0008, 0, [0x302e, 0, 0, 0]),
    ]);
    CpuId::from_entries(&entries).unwrap()
}

fn amd() -> CpuId {
    let mut entries = common(0x10, b"AuthenticAMD");
    entries[6].ecx |= TOPOLOGY_EXTENSIONS;
    entries.extend([
        leaf(0x8000_0008, 0, [0x3030, 0x111ef657, 0x707f, 0]),
        leaf(AMD_CACHES, 0, [0x4121, 0x1c0_003f, 63, 0]),
        leaf(AMD_CACHES, 3, [0x3_c163, 0x3c0_003f, 32767, 1]),
        leaf(AMD_TOPOLOGY, 0, [0x37, 0x11b, 0, 0]),
        leaf(AMD_TOPOLOGY_V2, 0, [1, 2, 0x100, 0x37]),
    ]);
    CpuId::from_entries(&entries).unwrap()
}

fn get(table: &CpuId, function: u32, index: u32) -> kvm_cpuid_entry2 {
    let found = |entry: &&kvm_cpuid_entry2| entry.function == function && entry.index == index;
    *table.as_slice().iter().find(found).unwrap()
}

fn table(supported: &CpuId, vcpus: u32, index: u32) -> CpuId {
    for_vcpu(supported, &Topology::new(vcpus).unwrap(), index).unwrap()
}

#[test]
fn leaf_1_has_the_vcpus_id_and_count_and_the_hosts_features() {
    for supported in [intel(), amd()] {
        for (vcpus, index, count, htt) in [(1, 0, 1, false), (2, 1, 2, true), (4, 3, 4, true)] {
            let leaf = get(&table(&supported, vcpus, index), 1, 0);
            assert_eq!(leaf.ebx, index << 24 | count << 16 | 0x800, "{vcpus} vCPUs");
            assert_eq!(leaf.edx & HTT != 0, htt);
            assert_eq!(leaf.edx & !HTT, 0x178b_fbff & !HTT);
            assert_eq!(leaf.ecx, HOST_ECX | X2APIC | TSC_DEADLINE | HYPERVISOR);
        }
    }
}

#[test]
fn what_does_not_speak_of_cores_is_passed_through() {
    for supported in [intel(), amd()] {
        let table = table(&supported, 4, 2);
        for function in [7, 0x4000_0000, 0x4000_0001, 0x8000_0000] {
            assert_eq!(get(&table, function, 0), get(&supported, function, 0));
        }
    }
}

#[test]
fn intel_caches_are_private_to_a_core_up_to_the_second_level() {
    let table = table(&intel(), 4, 0);
    for index in 0..3 {
        assert_eq!(get(&table, 4, index).eax >> 14 & 0xfff, 0);
    }
    let third = get(&table, 4, 3);
    assert_eq!(third.eax, 3 << 26 | 3 << 14 | 0x163);
    assert_eq!((third.ebx, third.ecx, third.edx), (0x2c0_003f, 45055, 4));
    assert_eq!(get(&table, 4, 4), leaf(4, 4, [0; 4]));
}

#[test]
fn threads_of_a_core_share_its_caches() {
    let topology = Topology::with_levels(1, 2, 2).unwrap();
    let table = for_vcpu(&intel(), &topology, 3).unwrap();
    assert_eq!(get(&table, 4, 0).eax >> 14, 1 << 12 | 1);
    assert_eq!(get(&table, 4, 3).eax >> 14, 1 << 12 | 3);
    assert_eq!(get(&table, 0xb, 0).eax, 1);
    assert_eq!(get(&table, 0xb, 0).ebx, 2);
}

#[test]
fn the_topology_leaves_describe_the_guest() {
    let table = table(&intel(), 6, 5);
    for function in [0xb, 0x1f] {
        let levels = [[0, 1, 0x100, 5], [3, 6, 0x201, 5], [0, 0, 2, 5]];
        for (index, level) in (0..).zip(levels) {
            assert_eq!(get(&table, function, index), leaf(function, index, level));
        }
    }
    let count = |function| {
        table
            .as_slice()
            .iter()
            .filter(|e| e.function == function)
            .count()
    };
    assert_eq!((count(0xb), count(0x1f)), (3, 3));
}

#[test]
fn leaf_1f_is_only_there_where_the_host_reaches_so_far() {
    let table = table(&amd(), 2, 1);
    assert!(table.as_slice().iter().all(|entry| entry.function != 0x1f));
    assert_eq!(get(&table, 0xb, 1), leaf(0xb, 1, [1, 2, 0x201, 1]));
    assert_eq!(get(&table, 0, 0).eax, 0x10);
}

#[test]
fn amd_leaves_describe_the_guest() {
    let two = table(&amd(), 6, 5);
    assert_eq!(get(&two, 0x8000_0008, 0).ecx, 3 << 12 | 5);
    assert_eq!(get(&two, 0x8000_0008, 0).eax, 0x3030);
    assert_eq!(
        get(&two, AMD_TOPOLOGY, 0),
        leaf(AMD_TOPOLOGY, 0, [5, 5, 0, 0])
    );
    assert_eq!(get(&two, AMD_CACHES, 0).eax, 0x121);
    assert_eq!(get(&two, AMD_CACHES, 3).eax, 7 << 14 | 0x163);
    assert_eq!(get(&two, 0x8000_0001, 0).ecx & CMP_LEGACY, CMP_LEGACY);
    assert!(
        two.as_slice()
            .iter()
            .all(|entry| entry.function != AMD_TOPOLOGY_V2)
    );
    assert_eq!(
        get(&table(&amd(), 1, 0), 0x8000_0001, 0).ecx & CMP_LEGACY,
        0
    );
}

#[test]
fn intel_has_no_core_count_in_the_address_leaf() {
    let table = table(&intel(), 4, 0);
    assert_eq!(get(&table, 0x8000_0008, 0), get(&intel(), 0x8000_0008, 0));
    assert_eq!(get(&table, 0x8000_0001, 0), get(&intel(), 0x8000_0001, 0));
}

#[test]
fn ids_above_254_are_whole_in_the_x2apic_leaves() {
    for supported in [intel(), amd()] {
        let table = table(&supported, 1024, 1000);
        assert_eq!(get(&table, 0xb, 0).edx, 1000);
        assert_eq!(get(&table, 0xb, 1).eax, 10);
        assert_eq!(get(&table, 0xb, 1).ebx, 1024);
        assert_eq!(get(&table, 1, 0).ebx >> 16, (1000 & 0xff) << 8 | 255);
    }
    assert_eq!(get(&table(&amd(), 1024, 1000), AMD_TOPOLOGY, 0).eax, 1000);
    assert_eq!(
        get(&table(&amd(), 1024, 1000), 0x8000_0008, 0).ecx,
        10 << 12 | 255
    );
    assert_eq!(
        get(&table(&intel(), 1024, 1000), 4, 3).eax,
        0x3f << 26 | 0x3ff << 14 | 0x163
    );
}

#[test]
fn an_unknown_vendor_and_an_old_one_still_get_their_ids() {
    let entries = common(0x5, b"  Shanghai  ");
    let supported = CpuId::from_entries(&entries).unwrap();
    let table = table(&supported, 2, 1);
    assert_eq!(get(&table, 0, 0).eax, 0xb);
    assert_eq!(get(&table, 0xb, 0).edx, 1);
    assert_eq!(get(&table, 1, 0).ebx >> 24, 1);
    let nothing = for_vcpu(&CpuId::new(0).unwrap(), &Topology::new(1).unwrap(), 0).unwrap();
    assert_eq!(nothing.as_slice().len(), 3);
}

#[test]
fn a_table_without_room_is_an_error() {
    let full = vec![leaf(7, 0, [0; 4]); 256];
    let supported = CpuId::from_entries(&full).unwrap();
    let error = for_vcpu(&supported, &Topology::new(1).unwrap(), 0).unwrap_err();
    assert!(matches!(error, Error::Cpuid { leaves: 259 }));
}

#[test]
fn the_address_size_comes_from_the_host() {
    assert_eq!(physical_address_bits(&intel()), 46);
    assert_eq!(physical_address_bits(&amd()), 48);
    assert_eq!(physical_address_bits(&CpuId::new(0).unwrap()), 36);
}
