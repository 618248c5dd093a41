//! Requests to a raw file that the kernel works on while the I/O thread goes on (io_uring).
//!
//! A [`Ring`] has a fixed number of slots, each with at most one operation under way and with the
//! request that it is for. The request stays in its slot until the kernel has said that it is done
//! with it: that holds also where the ring is dropped.

use std::fmt;
use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};

use io_uring::opcode::{Fallocate, Fsync, Readv, Writev};
use io_uring::types::{Fixed, FsyncFlags};
use io_uring::{IoUring, Probe};
use libc::iovec;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::RawFile;
use super::task::Task;
use crate::virtio::iovec::fill_pieces;

/// The most operations under way in a ring.
pub(super) const DEPTH: u16 = 128;
/// The pieces of memory that a slot keeps room for.
const KEPT_PIECES: usize = 64;
/// The one file of a ring.
const FILE: Fixed = Fixed(0);

/// What the kernel is to do with the file of a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Operation {
    /// Fill the slot's memory from this offset on.
    Read { offset: u64 },
    /// Write the slot's memory from this offset on.
    Write { offset: u64 },
    /// Make what was written last.
    Flush,
    /// Change how a part of the file is stored, without changing its length.
    Allocate { mode: i32, offset: u64, len: u64 },
}

/// An operation that has ended: in which slot, and how many bytes it transferred.
pub(super) struct Completion {
    pub(super) slot: u16,
    pub(super) result: io::Result<usize>,
}

/// An io_uring for one file, and the requests that are under way.
pub(super) struct Ring {
    uring: IoUring,
    event: EventFd,
    /// It is registered with the ring, and closed after it.
    _file: RawFile,
    slots: Box<[Slot]>,
    free: Vec<u16>,
    /// Operations that the kernel has and has not ended.
    under_way: usize,
}

struct Slot {
    task: Option<Task>,
    /// What the kernel reads while an operation is under way.
    pieces: Vec<iovec>,
    /// An operation of it was given to the ring, and has not ended.
    busy: bool,
}

// SAFETY: the pointers in `pieces` are to guest RAM, which belongs to no thread, and are used by the
// kernel alone.
unsafe impl Send for Slot {}

impl Ring {
    /// A ring for this file.
    ///
    /// # Errors
    ///
    /// What the system says, where it has no io_uring or not what is needed of it.
    pub(super) fn new(file: &RawFile) -> io::Result<Self> {
        let mut builder = IoUring::builder();
        let uring = builder
            .dontfork()
            .setup_coop_taskrun()
            .build(u32::from(DEPTH))
            // Before Linux 5.19 this is not known.
            .or_else(|_| IoUring::builder().dontfork().build(u32::from(DEPTH)))?;
        let mut probe = Probe::new();
        uring.submitter().register_probe(&mut probe)?;
        let needed = [Readv::CODE, Writev::CODE, Fsync::CODE, Fallocate::CODE];
        if !needed.into_iter().all(|code| probe.is_supported(code)) {
            return Err(io::ErrorKind::Unsupported.into());
        }
        let event = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
        uring.submitter().register_files(&[file.fd().as_raw_fd()])?;
        uring.submitter().register_eventfd(event.as_raw_fd())?;
        let slot = |_| Slot {
            task: None,
            pieces: Vec::new(),
            busy: false,
        };
        Ok(Self {
            uring,
            event,
            _file: file.clone(),
            slots: (0..DEPTH).map(slot).collect(),
            free: (0..DEPTH).rev().collect(),
            under_way: 0,
        })
    }

    /// Whether another request can be taken.
    pub(super) fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Whether an operation waits to be given to the kernel.
    pub(super) fn is_queued(&mut self) -> bool {
        !self.uring.submission().is_empty()
    }

    /// Whether no request is under way.
    pub(super) fn is_idle(&self) -> bool {
        self.free.len() == self.slots.len()
    }

    /// Takes a request, whose operations begin with [`start`](Self::start); gives it back where
    /// there is no room.
    #[allow(clippy::result_large_err, reason = "it is the task, given back")]
    pub(super) fn insert(&mut self, task: Task) -> Result<u16, Task> {
        let Some(index) = self.free.pop() else {
            return Err(task);
        };
        match self.slots.get_mut(usize::from(index)) {
            Some(slot) => {
                slot.task = Some(task);
                Ok(index)
            }
            None => Err(task),
        }
    }

    /// The request in a slot.
    pub(super) fn get_mut(&mut self, slot: u16) -> Option<&mut Task> {
        self.slots.get_mut(usize::from(slot))?.task.as_mut()
    }

    /// Takes a request out, none of whose operations is under way.
    pub(super) fn remove(&mut self, index: u16) -> Option<Task> {
        let slot = self.slots.get_mut(usize::from(index))?;
        if slot.busy {
            return None;
        }
        let task = slot.task.take()?;
        if slot.pieces.capacity() > KEPT_PIECES {
            slot.pieces = Vec::new();
        }
        self.free.push(index);
        Some(task)
    }

    /// Queues the next operation of the request in a slot.
    ///
    /// # Errors
    ///
    /// An error where the slot has no request, or has an operation under way.
    pub(super) fn start(&mut self, index: u16, operation: Operation) -> io::Result<()> {
        let slot = self.slots.get_mut(usize::from(index));
        let Some(slot) = slot.filter(|slot| !slot.busy) else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let Some(task) = slot.task.as_mut() else {
            return Err(io::ErrorKind::InvalidInput.into());
        };
        let pieces = &mut slot.pieces;
        if matches!(operation, Operation::Read { .. } | Operation::Write { .. }) {
            task.with_data(|data, done| fill_pieces(pieces, data, done));
        }
        let (at, count) = (pieces.as_ptr(), pieces.len() as u32);
        let entry = match operation {
            Operation::Read { offset } => Readv::new(FILE, at, count).offset(offset).build(),
            Operation::Write { offset } => Writev::new(FILE, at, count).offset(offset).build(),
            Operation::Flush => Fsync::new(FILE).flags(FsyncFlags::DATASYNC).build(),
            Operation::Allocate { mode, offset, len } => {
                Fallocate::new(FILE, len).offset(offset).mode(mode).build()
            }
        };
        let entry = entry.user_data(u64::from(index));
        // SAFETY: the file is registered; the pieces are in the slot, which is neither changed nor
        // freed while it is busy, and the memory that they say is kept by the task, which stays in
        // the slot as long.
        let pushed = unsafe { self.uring.submission().push(&entry) };
        // There is an entry for each slot.
        pushed.map_err(io::Error::other)?;
        slot.busy = true;
        self.under_way += 1;
        Ok(())
    }

    /// Gives the kernel what was queued, with one call.
    ///
    /// # Errors
    ///
    /// What the system says; what it did not take is still queued.
    pub(super) fn submit(&mut self) -> io::Result<()> {
        while !self.uring.submission().is_empty() {
            // Who looks at what has ended right now needs not be told of it.
            self.uring.completion().disable_eventfd();
            let submitted = self.uring.submit();
            self.uring.completion().enable_eventfd();
            match submitted {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// An operation that has ended, if there is one.
    pub(super) fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.uring.completion().next()?;
        let index = u16::try_from(entry.user_data()).unwrap_or(u16::MAX);
        let slot = self.slots.get_mut(usize::from(index))?;
        slot.busy = false;
        self.under_way -= 1;
        let result = usize::try_from(entry.result())
            .map_err(|_| io::Error::from_raw_os_error(-entry.result()));
        Some(Completion {
            slot: index,
            result,
        })
    }

    /// Waits until an operation has ended, if any is under way.
    ///
    /// # Errors
    ///
    /// What the system says.
    pub(super) fn wait(&mut self) -> io::Result<()> {
        while self.under_way > 0 && self.uring.completion().is_empty() {
            match self.uring.submit_and_wait(1) {
                Err(error) if error.kind() != io::ErrorKind::Interrupted => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }

    /// Waits for every operation, and drops the requests.
    pub(super) fn abandon(&mut self) {
        while self.under_way > 0 {
            if self.wait().is_err() {
                break;
            }
            while self.next_completion().is_some() {}
        }
        for (index, slot) in (0..).zip(&mut self.slots) {
            let Some(task) = slot.task.take() else {
                continue;
            };
            if slot.busy {
                // The system does not say what has become of it: its memory can't be given up.
                mem::forget(task);
                mem::forget(mem::take(&mut slot.pieces));
            } else {
                self.free.push(index);
            }
        }
    }
}

impl AsRawFd for Ring {
    /// What is readable when an operation has ended.
    fn as_raw_fd(&self) -> RawFd {
        self.event.as_raw_fd()
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        self.abandon();
        // A ring goes away some time after it was closed, and would keep the file open until then.
        let _ = self.uring.submitter().unregister_files();
    }
}

impl fmt::Debug for Ring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Ring")
            .field("under_way", &self.under_way)
            .finish_non_exhaustive()
    }
}
