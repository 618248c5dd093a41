//! Integration tests of Kiln, and what they share.
//!
//! | where | what lives there |
//! |---|---|
//! | [`guests`] | bare-metal guests of a few bytes, which run on any `/dev/kvm` |
//! | [`machines`] | machines with these guests, and what a process has because of them |
//! | [`stubborn`] | machines that are hard to stop |
//! | [`elf`] | ELF images around them |
//! | [`bytes`] | bytes for guests to carry |
//! | [`program`] | the `kiln` program as a process |
//! | [`linux`] | Debian's kernels as its guests |
//! | [`image`] | disk images, and whether they are whole |
//! | [`tap`] | tap interfaces for their networks |
//! | [`vsock`] | socket devices for them, and programs to talk to |
//! | [`terminal`] | the `kiln` program on a terminal |
//! | [`prometheus`] | a strict reader of Prometheus' text format |
//! | `tests/tiny_guests.rs` | the library with guests of a few bytes |
//! | `tests/events.rs` | what a handle tells while its machine lives |
//! | `tests/metrics.rs` | what a machine says that it has done |
//! | `tests/spans.rs` | which machine and device a message says it is about |
//! | `tests/failures.rs` | every step of building and starting a machine, failing |
//! | `benches/stop.rs` | how long a stop takes |
//! | `tests/command_line.rs` | the `kiln` program with guests of a few bytes, and with bad input |
//! | `tests/pci.rs` | PCI and its interrupts with guests of a few bytes |
//! | `tests/linux_transports.rs` | Linux guests and how they reach their virtio devices |
//! | `tests/linux.rs` | the `kiln` program with real Linux guests; needs KVM with hardware behind it |
//! | `tests/linux_block.rs` | Linux guests and their disks |
//! | `tests/linux_qcow2.rs` | Linux guests on qcow2 images |
//! | `tests/linux_crash.rs` | Linux guests whose machine is killed while they write |
//! | `tests/linux_console.rs` | Linux guests on a virtio console, with named ports and random numbers |
//! | `tests/linux_vsock.rs` | Linux guests that talk to programs of the host |
//! | `tests/linux_net_user.rs` | Linux guests on the host's own network, without privileges |
//! | `tests/linux_net.rs` | Linux guests and their networks |
//! | `tests/linux_net_vhost.rs` | the same where the host's kernel carries the packets |
//! | `tests/linux_balloon.rs` | Linux guests whose memory gets back to the host |
//! | `tests/linux_library.rs` | the library with several of them at once |

pub mod bytes;
pub mod elf;
pub mod guests;
pub mod image;
pub mod linux;
pub mod machines;
pub mod program;
pub mod prometheus;
#[path = "../../vmm/examples/guests/mod.rs"]
pub(crate) mod scripted;
pub mod stubborn;
pub mod tap;
pub mod terminal;
pub mod vsock;

/// The programs in the documentation compile.
#[cfg(doctest)]
mod documentation {
    #[doc = include_str!("../../README.md")]
    struct Readme;

    #[doc = include_str!("../../docs/embedding.md")]
    struct Embedding;

    #[doc = include_str!("../../docs/console.md")]
    struct Consoles;

    #[doc = include_str!("../../docs/net-user.md")]
    struct UserNetworks;

    #[doc = include_str!("../../docs/vsock.md")]
    struct Vsock;
}
