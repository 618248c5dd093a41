//! A thread that is there before there is a vCPU for it.

use std::fmt;
use std::io;
use std::sync::mpsc::{Receiver, RecvError, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle, yield_now};
use std::time::{Duration, Instant};

use crate::manager::STACK_SIZE;

type Work = Box<dyn FnOnce() + Send>;

/// How long it is worth to stay awake for what comes soon: to wake a processor that sleeps takes a
/// good part of that.
const SOON: Duration = Duration::from_micros(300);

/// Receives what another thread is about to send: stays awake for some hundred microseconds, in which
/// other threads have the processor if they want it, and sleeps then.
///
/// # Errors
///
/// As [`Receiver::recv`]: nobody can send any more.
pub fn recv_soon<T>(receiver: &Receiver<T>) -> Result<T, RecvError> {
    let since = Instant::now();
    while since.elapsed() < SOON {
        match receiver.try_recv() {
            Ok(value) => return Ok(value),
            Err(TryRecvError::Disconnected) => return Err(RecvError),
            Err(TryRecvError::Empty) => yield_now(),
        }
    }
    receiver.recv()
}

/// A thread that helps to make a machine, and becomes the thread of its first vCPU: started early,
/// it costs the start of the machine no time.
///
/// Dropping it ends the thread when it has done what it was given, and joins it.
///
/// ```
/// use kiln_vcpu_manager::SpareThread;
/// use std::sync::mpsc::channel;
///
/// let spare = SpareThread::start()?;
/// let (sender, receiver) = channel();
/// spare.run(move || drop(sender.send(6 * 7)));
/// assert_eq!(receiver.recv(), Ok(42));
/// # Ok::<(), Box<dyn std::error::Error>>(())
/// ```
pub struct SpareThread {
    work: Option<Sender<Work>>,
    join: Option<JoinHandle<()>>,
}

impl SpareThread {
    /// Starts the thread, named `spare`, with a stack of 256 KiB.
    ///
    /// # Errors
    ///
    /// What the system says where there is no thread to be had.
    pub fn start() -> io::Result<Self> {
        let (work, to_do): (Sender<Work>, Receiver<Work>) = channel();
        let join = Builder::new()
            .name("spare".to_owned())
            .stack_size(STACK_SIZE)
            .spawn(move || {
                while let Ok(work) = recv_soon(&to_do) {
                    work();
                }
            })?;
        Ok(Self {
            work: Some(work),
            join: Some(join),
        })
    }

    /// Gives the thread something to do, after what it was given before. A panic ends the thread,
    /// which then does nothing more.
    pub fn run(&self, work: impl FnOnce() + Send + 'static) {
        if let Some(sender) = &self.work {
            // What the thread would have sent back is missed by whoever waits for it.
            let _ = sender.send(Box::new(work));
        }
    }

    /// Lets the thread end after this, and gives what it is joined by; nothing where it has ended.
    pub(crate) fn finish_with(mut self, work: Work) -> Option<JoinHandle<()>> {
        self.work.take()?.send(work).ok()?;
        self.join.take()
    }
}

impl Drop for SpareThread {
    fn drop(&mut self) {
        drop(self.work.take());
        if let Some(join) = self.join.take() {
            // A panic was missed by whoever waited for what it did.
            let _ = join.join();
        }
    }
}

impl fmt::Debug for SpareThread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SpareThread").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::channel;

    use super::*;

    #[test]
    fn what_comes_is_received_however_late_it_is() {
        let (sender, receiver) = channel();
        sender.send(1).unwrap();
        assert_eq!(recv_soon(&receiver), Ok(1));
        let late = std::thread::spawn(move || {
            std::thread::sleep(20 * SOON);
            sender.send(2).unwrap();
        });
        assert_eq!(recv_soon(&receiver), Ok(2));
        late.join().unwrap();
        assert_eq!(recv_soon(&receiver), Err(RecvError));
    }

    #[test]
    fn work_is_done_in_its_order_and_the_last_of_it_ends_the_thread() {
        let (sender, receiver) = channel();
        let spare = SpareThread::start().unwrap();
        for number in 0..3 {
            let sender = sender.clone();
            spare.run(move || sender.send(number).unwrap());
        }
        let join = spare.finish_with(Box::new(move || sender.send(3).unwrap()));
        join.unwrap().join().unwrap();
        assert_eq!(receiver.iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    }

    #[test]
    fn a_thread_that_has_ended_is_not_waited_for() {
        let spare = SpareThread::start().unwrap();
        let (sender, receiver) = channel::<()>();
        spare.run(move || {
            let _sender = sender;
            panic!("on purpose");
        });
        assert!(receiver.recv().is_err());
        // It ends a moment after what it was given is dropped.
        while !spare.join.as_ref().unwrap().is_finished() {
            yield_now();
        }
        assert!(spare.finish_with(Box::new(|| ())).is_none());
    }
}
