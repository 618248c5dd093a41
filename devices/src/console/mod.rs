//! Consoles: what may be at the host's end of a serial port or of a virtio console, and how it is
//! read and written without a wait.
//!
//! | module | what lives there |
//! |---|---|
//! | `ends` | [`Console`], [`ConsoleInput`], [`ConsoleOutput`]: what may be there |
//! | `pump` | reads and writes of these on an I/O thread |

mod ends;
mod pump;

pub(crate) use ends::CHUNK;
pub use ends::{Captured, Console, ConsoleInput, ConsoleOutput};
pub(crate) use pump::{InputPump, OutputPump, Read, Written, log_end};
