use super::*;
use vm_memory::{Bytes, GuestAddress};

fn memory() -> GuestMemory {
    let regions = [(GuestAddress(0), 0x4000), (GuestAddress(0x4000), 0x4000)];
    let memory = kiln_memory::allocate(&regions, &kiln_memory::MemoryOptions::default()).unwrap();
    let bytes: Vec<u8> = (0..0x8000_u32)
        .map(|at| (at * 7 + (at >> 8)) as u8)
        .collect();
    memory.write_slice(&bytes, GuestAddress(0)).unwrap();
    memory
}

/// 24 bytes of RAM from 0x100 on, cut at `cut`.
fn cut_at(memory: &GuestMemory, cut: usize) -> GuestBuffers<'_> {
    let mut buffers = GuestBuffers::new();
    buffers.push(memory.get_slice(GuestAddress(0x100), cut).unwrap());
    let rest = GuestAddress(0x100 + cut as u64);
    buffers.push(memory.get_slice(rest, 24 - cut).unwrap());
    buffers
}

fn contents(buffers: &GuestBuffers<'_>) -> Vec<u8> {
    let mut all = vec![0; buffers.len()];
    let mut done = 0;
    for slice in buffers.slices() {
        assert!(!slice.is_empty());
        done += slice.copy_to(&mut all[done..]);
    }
    assert_eq!(done, all.len());
    all
}

#[test]
fn where_a_buffer_is_cut_makes_no_difference() {
    let memory = memory();
    let mut all = [0; 24];
    memory.read_slice(&mut all, GuestAddress(0x100)).unwrap();
    for cut in 0..=24 {
        for at in 0..=16 {
            let mut buffers = cut_at(&memory, cut);
            assert_eq!(contents(&buffers), all);
            buffers.skip(at).unwrap();
            let value: u64 = buffers.read_obj().unwrap();
            assert_eq!(value.to_ne_bytes(), all[at..at + 8]);
            assert_eq!(contents(&buffers), all[at + 8..]);
        }
        for at in 0..=24 {
            let mut front = cut_at(&memory, cut);
            front.skip(at / 2).unwrap();
            let back = front.split_off(at - at / 2).unwrap();
            assert_eq!(contents(&front), all[at / 2..at]);
            assert_eq!(contents(&back), all[at..]);
            assert_eq!(front.len() + back.len(), 24 - at / 2);
        }
    }
}

#[test]
fn what_is_written_lands_across_the_cut_and_nowhere_else() {
    for cut in 0..=24 {
        let memory = memory();
        let mut expected = [0; 32];
        memory
            .read_slice(&mut expected, GuestAddress(0x100))
            .unwrap();
        let mut buffers = cut_at(&memory, cut);
        buffers.skip(3).unwrap();
        buffers.write_obj(&0x1122_3344_5566_7788_u64).unwrap();
        buffers.write(&[0xaa; 13]).unwrap();
        assert!(buffers.is_empty());
        expected[3..11].copy_from_slice(&0x1122_3344_5566_7788_u64.to_ne_bytes());
        expected[11..24].fill(0xaa);
        let mut found = [0; 32];
        memory.read_slice(&mut found, GuestAddress(0x100)).unwrap();
        assert_eq!(found, expected);
    }
}

#[test]
fn asking_for_too_much_takes_nothing() {
    let memory = memory();
    let mut buffers = cut_at(&memory, 5);
    let short = ShortBuffer {
        wanted: 25,
        available: 24,
    };
    assert_eq!(buffers.read(&mut [0; 25]), Err(short));
    assert_eq!(buffers.write(&[0; 25]), Err(short));
    assert_eq!(buffers.skip(25), Err(short));
    assert_eq!(buffers.split_off(25).err(), Some(short));
    assert_eq!(buffers.len(), 24);
}
