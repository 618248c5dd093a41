//! The threads that share one device's work.

use std::sync::Arc;

use crate::IoHandle;

/// The threads that the queues of one device are worked on: one for all of them, or several.
///
/// ```
/// use kiln_io_thread::{IoThread, IoThreadSet};
///
/// let shared = IoThread::spawn("io", |_| ())?;
/// let own = IoThread::spawn("io1", |_| ())?;
/// let set = IoThreadSet::from(shared.handle().clone());
/// assert_eq!(set.len(), 1);
/// let set = IoThreadSet::new(shared.handle().clone(), [own.handle().clone()]);
/// // Three queues: the first and the third share a thread.
/// assert_eq!(set.get(set.thread_of(0)), shared.handle());
/// assert_eq!(set.get(set.thread_of(1)), own.handle());
/// assert_eq!(set.get(set.thread_of(2)), shared.handle());
/// # Ok::<(), kiln_io_thread::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct IoThreadSet {
    first: IoHandle,
    others: Arc<[IoHandle]>,
}

impl IoThreadSet {
    /// These threads, in this order.
    pub fn new(first: IoHandle, others: impl IntoIterator<Item = IoHandle>) -> Self {
        Self {
            first,
            others: others.into_iter().collect(),
        }
    }

    /// How many threads there are: at least one.
    #[allow(clippy::len_without_is_empty)]
    pub fn len(&self) -> usize {
        self.others.len() + 1
    }

    /// Which of the threads works on the queue with this index in its device: they take turns.
    pub fn thread_of(&self, queue: u16) -> usize {
        usize::from(queue) % self.len()
    }

    /// The thread with this number, counted from 0; the first where there are not as many.
    pub fn get(&self, thread: usize) -> &IoHandle {
        let other = thread.checked_sub(1);
        other
            .and_then(|index| self.others.get(index))
            .unwrap_or(&self.first)
    }
}

impl From<IoHandle> for IoThreadSet {
    fn from(handle: IoHandle) -> Self {
        Self::new(handle, [])
    }
}
