//! Console devices (virtio 1.3, section 5.3): a console of the guest (`/dev/hvc0` in Linux), and
//! named ports (`/dev/virtio-ports/NAME`), which are streams between a program of the guest and
//! one of the host.
//!
//! The console leads to a [`Console`](crate::console::Console), as a serial port does. A [`Port`]
//! leads there too, or to a Unix socket: one that is connected, or one that listens and takes a
//! client at a time. A driver that knows no ports (`VIRTIO_CONSOLE_F_MULTIPORT`) has the console
//! alone.
//!
//! **Slow hosts.** Nothing is kept: what the guest sends stays in its own buffers until the host has
//! taken it, and what the host sends is read when the guest has room for it, and a port of the guest
//! is open. So neither side can make this process grow, nothing is lost on the way, and nobody's
//! wait holds others up. The console is special in one way: Linux waits for it without doing
//! anything else, in a loop with interrupts off, as if it were a register. Where a console has taken
//! nothing for [ten seconds](BLOCKED_PATIENCE), what the guest sends is therefore dropped until it
//! takes something again.
//!
//! **Connections.** A guest's program sees a port's host end come and go: while there is none it
//! reads an end of file, and cannot write. What it has written and the host has not read when it
//! goes is gone with it.
//!
//! **Size.** The console has the size that its [`ConsoleSize`] is given, whenever that is.
//!
//! | module | what lives there |
//! |---|---|
//! | `device` | [`VirtioConsole`]: features, configuration, state |
//! | `size` | [`ConsoleSize`] |
//! | `port` | [`Port`], and the host's end of one at work |
//! | `control` | the control messages, and what the driver knows |
//! | `handler` | what is done with the queues |
//!
//! # Example
//!
//! A console whose output is kept, and a driver that knows no ports:
//!
//! ```
//! use kiln_devices::console::{Console, ConsoleInput, ConsoleOutput};
//! use kiln_devices::virtio::console::{ConsoleSize, VirtioConsole};
//! use kiln_virtio_device::testing::{Buffer, MockDriver};
//!
//! let (output, captured) = ConsoleOutput::capture(1024);
//! let console = Console::new(ConsoleInput::bytes("typed"), output);
//! let device = VirtioConsole::new(console, Vec::new(), ConsoleSize::new(80, 25))?;
//! let mut driver = MockDriver::new(Box::new(device));
//! driver.start(0, 16);
//!
//! driver.fill(0x1000, b"hello");
//! driver.request(1, &[Buffer::readable(0x1000, 5)]);
//! assert_eq!(captured.text(), "hello");
//! assert_eq!(driver.request(0, &[Buffer::writable(0x2000, 64)]), 5);
//! assert_eq!(driver.bytes(0x2000, 5), b"typed");
//! # Ok::<(), kiln_devices::virtio::console::VirtioConsoleError>(())
//! ```

mod control;
mod device;
mod handler;
mod port;
mod size;
#[cfg(test)]
mod tests;

pub use control::PortState;
pub use device::{VirtioConsole, VirtioConsoleError, VirtioConsoleState};
pub use handler::BLOCKED_PATIENCE;
pub use port::Port;
pub use size::ConsoleSize;
