//! Images of our own making, and whether an image is whole.

/// An empty image of a disk of `size` bytes.
pub(crate) fn empty_image(cluster_bits: u32, order: u32, size: u64) -> Vec<u8> {
    let cluster = 1_u64 << cluster_bits;
    let entries = size.div_ceil(cluster * cluster / 8);
    let clusters = 3 + (8 * entries).div_ceil(cluster);
    let mut image = vec![0; (clusters * cluster) as usize];
    let mut put = |at: u64, bytes: &[u8]| {
        image[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    };
    put(0, b"QFI\xfb");
    put(4, &3_u32.to_be_bytes());
    put(20, &cluster_bits.to_be_bytes());
    put(24, &size.to_be_bytes());
    put(36, &(entries as u32).to_be_bytes());
    put(40, &(3 * cluster).to_be_bytes());
    put(48, &cluster.to_be_bytes());
    put(56, &1_u32.to_be_bytes());
    put(96, &order.to_be_bytes());
    put(100, &104_u32.to_be_bytes());
    put(cluster, &(2 * cluster).to_be_bytes());
    for number in 0..clusters {
        let bytes = 1_u64 << order >> 3;
        put(2 * cluster + number * bytes + bytes - 1, &[1]);
    }
    image
}

/// What is wrong with an image without snapshots, if anything is. Clusters that are in use by
/// nothing are not.
pub(crate) fn problem(image: &[u8]) -> Option<String> {
    let bytes = |at: u64, len: u64| {
        let byte = |at| u64::from(image.get(at as usize).copied().unwrap_or(0));
        (at..at + len).fold(0_u64, |value, at| value << 8 | byte(at))
    };
    let (cluster_bits, order) = (bytes(20, 4), bytes(96, 4));
    let cluster = 1 << cluster_bits;
    let place = |entry: u64| entry & 0x00ff_ffff_ffff_fe00;
    let mut uses = std::collections::BTreeMap::<u64, (u64, bool)>::new();
    let mut used = |at: u64, copied: Option<bool>| {
        let entry = uses.entry(at >> cluster_bits).or_default();
        entry.0 += 1;
        entry.1 |= copied == Some(true);
    };
    used(0, None);
    let (table, table_clusters) = (bytes(48, 8), bytes(56, 4));
    for number in 0..table_clusters {
        used(table + number * cluster, None);
    }
    for index in 0..table_clusters * cluster / 8 {
        match place(bytes(table + 8 * index, 8)) {
            0 => {}
            block => used(block, None),
        }
    }
    let (entries, l1) = (bytes(36, 4), bytes(40, 8));
    for number in 0..(8 * entries).div_ceil(cluster) {
        used(l1 + number * cluster, None);
    }
    for index in 0..entries {
        let entry = bytes(l1 + 8 * index, 8);
        if place(entry) == 0 {
            continue;
        }
        used(place(entry), Some(entry >> 63 == 1));
        for index in 0..cluster / 8 {
            let entry = bytes(place(entry) + 8 * index, 8);
            if entry >> 62 & 1 == 1 {
                let bits = 62 - (cluster_bits - 8);
                let start = entry & ((1 << bits) - 1);
                let end = (start | 511) + ((entry & !(1 << 62)) >> bits) * 512;
                for number in start >> cluster_bits..=end >> cluster_bits {
                    used(number << cluster_bits, None);
                }
            } else if place(entry) != 0 {
                used(place(entry), Some(entry >> 63 == 1));
            }
        }
    }
    let per_block = cluster_bits + 3 - order;
    for (number, (count, copied)) in uses {
        let block = place(bytes(table + 8 * (number >> per_block), 8));
        let at = (number & ((1 << per_block) - 1)) << order >> 3;
        let refcount = match block {
            0 => 0,
            _ => bytes(block + at, 1 << order >> 3),
        };
        if refcount < count || copied && refcount != 1 {
            return Some(format!(
                "cluster {number}: {count} uses, refcount {refcount}"
            ));
        }
    }
    None
}
