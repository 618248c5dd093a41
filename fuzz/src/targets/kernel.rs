//! Kernel files: bzImages and ELF images, from the look at the file to guest memory.

use std::fs::File;
use std::io::Write as _;

use kiln_arch::boot::prepare;
use kiln_arch::layout::ram_regions;
use kiln_arch::{BootProtocol, Kernel};
use kiln_memory::{MemoryOptions, allocate};
use rustix::fs::{MemfdFlags, memfd_create};

const RAM: u64 = 24 << 20;

/// Loads these bytes as a kernel, whatever they are, in each way that the file allows.
pub fn kernel(data: &[u8]) {
    let mut file = File::from(memfd_create("kernel", MemfdFlags::CLOEXEC).unwrap());
    file.write_all(data).unwrap();
    let Ok(kernel) = Kernel::from_file(file, "fuzz") else {
        return;
    };
    load(&kernel);
    load(&kernel.clone().read());
    for protocol in [BootProtocol::Linux64, BootProtocol::Pvh] {
        if let Ok(kernel) = kernel.clone().with_protocol(protocol) {
            load(&kernel);
        }
    }
    // What would be unpacked is small here; sizes that lie are the business of another target.
    if let Ok(kernel) = kernel.unpacked(None) {
        load(&kernel);
    }
}

fn load(kernel: &Kernel) {
    let memory = allocate(&ram_regions(RAM), &MemoryOptions::default()).unwrap();
    if let Ok(entry) = prepare(&memory, kernel, None, "console=ttyS0", None) {
        assert!(entry.address < RAM);
    }
}
