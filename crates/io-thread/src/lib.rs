//! A thread that runs the event handlers of devices, over [`event_manager`].
//!
//! An [`IoThread`] is one thread with one epoll loop. Anything with file descriptors to wait for -
//! a virtqueue's worker, a console's input - implements [`IoHandler`] and is *moved* onto the
//! thread with [`IoHandle::attach`]. What comes back is an [`Attached`]: it can run a closure on
//! the handler ([`Attached::call`]) and it gives the handler back ([`Attached::detach`]), after
//! which the thread does not touch it again. That one mechanism serves a device's reset, pause and
//! removal, and no handler needs a lock.
//!
//! A handler that panics is taken out of the loop and reported to the function given to
//! [`IoThread::spawn`]; the thread and its other handlers go on.
//!
//! | module | what lives there |
//! |---|---|
//! | `thread` | [`IoThread`], [`IoHandle`], [`Attached`] |
//! | `cpus` | [`CpuList`]: the CPUs that a thread may run on |
//! | `set` | [`IoThreadSet`]: the threads that share one device's work |
//! | `io_loop` | [`IoLoop`]: the same on a thread that the program has already |
//! | `pace` | whether a thread takes the processor from others when it is woken |
//! | `handler` | [`IoHandler`], [`IoEvent`], [`Registrar`]: what a handler implements and is given |
//!
//! # Example
//!
//! ```
//! use kiln_io_thread::{EventSet, IoEvent, IoHandler, IoThread, Registrar};
//! use std::io;
//! use std::sync::mpsc::{Sender, channel};
//! use vmm_sys_util::eventfd::EventFd;
//!
//! struct Counter {
//!     wake: EventFd,
//!     seen: Sender<u64>,
//! }
//!
//! impl IoHandler for Counter {
//!     fn start(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
//!         registrar.add(&self.wake, 0, EventSet::IN)
//!     }
//!     fn ready(&mut self, _event: IoEvent, _registrar: &mut Registrar<'_, '_>) {
//!         let _ = self.seen.send(self.wake.read().unwrap_or(0));
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! let thread = IoThread::spawn("io", |panic| eprintln!("{panic}"))?;
//! let wake = EventFd::new(0)?;
//! let (seen, receive) = channel();
//! let attached = thread.handle().attach(Counter { wake: wake.try_clone()?, seen })?;
//!
//! wake.write(3)?;
//! assert_eq!(receive.recv()?, 3);
//!
//! let counter: Counter = attached.detach()?; // the handler is ours again
//! # drop(counter);
//! # Ok(())
//! # }
//! ```
#![deny(missing_docs)]
#![deny(unsafe_code)]

mod cpus;
mod handler;
mod io_loop;
mod pace;
mod set;
mod thread;

pub use cpus::{CpuList, CpuListError};
pub use handler::{IoEvent, IoHandler, Registrar};
pub use io_loop::IoLoop;
pub use set::IoThreadSet;
pub use thread::{Attached, Error, HandlerPanic, IoHandle, IoThread};
pub use vmm_sys_util::epoll::EventSet;
