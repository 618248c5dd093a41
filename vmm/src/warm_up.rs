//! What of a kernel is taken from the host once the guest runs.
//!
//! A kernel is mapped from its file, so that the guest's first instruction does not wait for tens of
//! megabytes. But Linux then changes most pages of its code, to fit it to the processor, and each of
//! them costs three faults of the guest: to be read, to be copied, and, as KVM forgot it, to be
//! found again. To have the host copy them all at once costs a tenth of that. It is done as soon as
//! the guest has left KVM for the first time: Linux has not changed its code then.

use std::sync::Arc;

use kiln_arch::Kernel;
use kiln_memory::{Error, GuestMemory, populate};
use kiln_vcpu_manager::AfterFirstExit;
use vm_memory::{Bytes, GuestAddress};

/// What fills the end of a code section: `int3`.
const FILLER: [u8; 16] = [0xcc; 16];
/// How much of it is looked at at a time.
const STEP: u64 = 1 << 16;
/// How much is taken at a time: half a millisecond's work.
const CHUNK: u64 = 1 << 21;
/// How much is taken in all. Debian's kernel has 19 MiB.
const LIMIT: u64 = 64 << 20;

/// What is to be done after the first exit of a guest with this kernel, if anything.
pub(crate) fn after_first_exit(
    memory: &Arc<GuestMemory>,
    kernel: &Kernel,
) -> Option<AfterFirstExit> {
    let parts = kernel.changing_parts();
    let memory = Arc::clone(memory);
    (!parts.is_empty()).then(|| {
        Arc::new(move |is_wanted: &dyn Fn() -> bool| {
            // The guest can do without.
            if let Err(error) = take(&memory, &parts, is_wanted) {
                tracing::debug!("{error}");
            }
        }) as _
    })
}

fn take(
    memory: &GuestMemory,
    parts: &[(GuestAddress, u64)],
    is_wanted: &dyn Fn() -> bool,
) -> Result<(), Error> {
    let mut left = LIMIT;
    for &(start, size) in parts {
        let size = without_filler(memory, start, size).min(left);
        left -= size;
        for done in (0..size).step_by(CHUNK as usize) {
            if is_wanted() {
                return Ok(());
            }
            let at = GuestAddress(start.0.saturating_add(done));
            populate(memory, at, CHUNK.min(size - done))?;
        }
    }
    Ok(())
}

/// The size of a part without the filler at its end, roughly: kernels are filled up to 2 MiB.
fn without_filler(memory: &GuestMemory, start: GuestAddress, mut size: u64) -> u64 {
    while let Some(less) = size.checked_sub(STEP) {
        let at = GuestAddress(start.0.saturating_add(less));
        let mut bytes = [0; FILLER.len()];
        if memory.read_slice(&mut bytes, at).is_err() || bytes != FILLER {
            break;
        }
        size = less;
    }
    size
}

#[cfg(test)]
mod tests {
    use std::cell::Cell;

    use kiln_memory::{MemoryOptions, allocate, resident};

    use super::*;

    #[test]
    fn the_filler_behind_code_is_left_out() {
        let start = GuestAddress(STEP);
        let memory = allocate(
            &[(GuestAddress(0), 8 * STEP as usize)],
            &MemoryOptions::default(),
        )
        .unwrap();
        assert_eq!(without_filler(&memory, start, 5 * STEP), 5 * STEP);
        let filler = vec![0xcc; 3 * STEP as usize];
        memory
            .write_slice(&filler, GuestAddress(3 * STEP + 0x100))
            .unwrap();
        // Up to the step in which there is something else.
        assert_eq!(without_filler(&memory, start, 5 * STEP), 3 * STEP);
        memory.write_slice(&filler, GuestAddress(0)).unwrap();
        assert_eq!(without_filler(&memory, start, STEP + 8), 8);
        assert_eq!(without_filler(&memory, start, 0), 0);
    }

    #[test]
    fn no_more_is_taken_once_the_vcpu_is_wanted() {
        let size = 3 * CHUNK;
        let regions = [(GuestAddress(0), size as usize)];
        let memory = allocate(&regions, &MemoryOptions::default()).unwrap();
        let asked = Cell::new(0);
        let is_wanted = || asked.replace(asked.get() + 1) == 1;
        let parts = [(GuestAddress(0), 0x1000), (GuestAddress(CHUNK), CHUNK)];
        take(&memory, &parts, &is_wanted).unwrap();
        let before = resident(&memory).unwrap().as_bytes();
        assert!((0x1000..=CHUNK).contains(&before), "{before}");
        take(&memory, &parts, &|| false).unwrap();
        let after = resident(&memory).unwrap().as_bytes();
        assert!(after >= CHUNK + 0x1000, "{after}");
    }
}
