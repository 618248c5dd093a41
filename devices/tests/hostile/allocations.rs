//! What the tests' own thread has allocated: devices without a thread do all of theirs on it.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

thread_local! {
    /// Bytes now, and the most there were. What another thread frees is missed, which no device
    /// of a test has.
    static LIVE: Cell<(isize, isize)> = const { Cell::new((0, 0)) };
}

struct Counting;

fn count(bytes: isize) {
    // A thread that ends frees after its counters are gone.
    let _ = LIVE.try_with(|cell| {
        let (live, most) = cell.get();
        let live = live + bytes;
        cell.set((live, most.max(live)));
    });
}

// SAFETY: everything is the system allocator's; counting allocates nothing.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        // SAFETY: as the caller promises.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        // SAFETY: as the caller promises.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// Runs `f`, and says how many bytes more there were at most than at its beginning.
pub(crate) fn peak(f: impl FnOnce()) -> usize {
    let before = LIVE.with(|cell| {
        let (live, _) = cell.get();
        cell.set((live, live));
        live
    });
    f();
    let (_, most) = LIVE.with(Cell::get);
    (most - before).max(0) as usize
}

#[test]
fn the_most_bytes_at_once_are_counted() {
    let most = peak(|| {
        drop(std::hint::black_box(vec![1_u8; 5000]));
        drop(std::hint::black_box(vec![1_u8; 3000]));
    });
    assert!((5000..8000).contains(&most), "{most}");
}
