//! vCPU threads: in and out of the guest, pause, stop, and how a machine ends.
//!
//! A [`VcpuManager`] is given the vCPUs of one machine, set up by the caller, and runs each on a
//! thread of its own. What the guest accesses is answered by a
//! [`VcpuBus`](kiln_device_api::VcpuBus). The end of the machine is a value, a [`MachineEnd`]: the
//! first one wins, and stops all other vCPUs. Any number of managers live side by side in a
//! process.
//!
//! | module | what lives there |
//! |---|---|
//! | `manager` | [`VcpuManager`]: start, pause, resume, stop, wait |
//! | `spare` | [`SpareThread`]: a thread that is there before its vCPU |
//! | `options` | [`VcpuOptions`], [`EndHooks`] |
//! | `end` | [`MachineEnd`], [`Crash`], [`CrashCause`]: how a machine ends |
//! | `counters` | [`ExitCounts`] |
//! | `signal` | [`KickSignal`], and the signal mask of vCPU threads |
//! | `error` | [`Error`]: what the host may refuse |
//! | `shared` | the state that threads and manager share, and the hand-shake between them |
//! | `vcpu` | a vCPU's thread: each exit, and what follows from it |
//! | `run_page` | `struct kvm_run`, the page shared with KVM |
//! | `instruction` | the instruction at which a machine crashed |
//!
//! # What holds
//!
//! - **A paused vCPU is whole.** After an exit for a port or for MMIO, KVM completes the
//!   instruction only at the next KVM_RUN. So a vCPU parks when KVM_RUN has returned EINTR, and at
//!   no other time: then nothing is half done, and its registers, with memory and devices, are the
//!   machine's state.
//! - **No kick is lost.** A kick sets `immediate_exit` in the run page, then sends
//!   [the signal](KickSignal). It finds the vCPU in the guest, or on its way there; the module
//!   `shared` says why no gap is left.
//! - **No kick goes astray.** A thread takes itself out of its slot before it ends, under the lock
//!   that is held while a signal is sent.
//! - **An exit costs what the device costs.** Between two exits nothing is allocated, locked or
//!   logged; the counters are plain stores.
//! - **A device that panics ends its own machine**, as long as panics unwind.
//! - **Signals stay the embedder's.** vCPU threads block all of them but the kick and those of
//!   their own faults.
//!
//! A device that does not return from an access holds up pause and stop; nothing else does.
//!
//! # Example
//!
//! A guest that writes two bytes to a port, and halts for good:
//!
//! ```
//! use std::ops::ControlFlow;
//! use std::sync::{Arc, Mutex};
//!
//! use kiln_device_api::{ExitRequest, VcpuBus};
//! use kiln_vcpu_manager::{CrashCause, EndHooks, MachineEnd, VcpuManager, VcpuOptions};
//! use kvm_bindings::kvm_userspace_memory_region;
//! use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryMmap};
//!
//! #[derive(Default)]
//! struct Printer(Mutex<Vec<u8>>);
//!
//! impl VcpuBus for Printer {
//!     fn pio_read(&self, _port: u16, _data: &mut [u8]) {}
//!     fn pio_write(&self, _port: u16, data: &[u8]) -> ControlFlow<ExitRequest> {
//!         self.0.lock().unwrap().extend_from_slice(data);
//!         ControlFlow::Continue(())
//!     }
//!     fn mmio_read(&self, _address: u64, _data: &mut [u8]) {}
//!     fn mmio_write(&self, _address: u64, _data: &[u8]) -> ControlFlow<ExitRequest> {
//!         ControlFlow::Continue(())
//!     }
//! }
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let Ok(_) = kvm_ioctls::Kvm::new() else { return Ok(println!("skipped: no /dev/kvm")) };
//! let vm = kvm_ioctls::Kvm::new()?.create_vm()?;
//! let memory = GuestMemoryMmap::<()>::from_ranges(&[(GuestAddress(0), 0x1000)])?;
//! memory.write_slice(
//!     &[0xb0, b'h', 0xee, 0xb0, b'i', 0xee, 0xf4], // mov $'h', %al; out %al, %dx; ...; hlt
//!     GuestAddress(0),
//! )?;
//! let region = kvm_userspace_memory_region {
//!     memory_size: 0x1000,
//!     userspace_addr: memory.get_host_address(GuestAddress(0))? as u64,
//!     ..Default::default()
//! };
//! // SAFETY: `memory` outlives the manager, which is dropped first.
//! unsafe { vm.set_user_memory_region(region)? };
//!
//! let vcpu = vm.create_vcpu(0)?;
//! let mut sregs = vcpu.get_sregs()?;
//! (sregs.cs.base, sregs.cs.selector) = (0, 0);
//! vcpu.set_sregs(&sregs)?;
//! let mut regs = vcpu.get_regs()?;
//! (regs.rip, regs.rdx) = (0, 0x3f8);
//! vcpu.set_regs(&regs)?;
//!
//! let bus = Arc::new(Printer::default());
//! let manager = VcpuManager::start(
//!     vec![vcpu],
//!     Arc::clone(&bus) as Arc<dyn VcpuBus>,
//!     VcpuOptions::default(),
//!     EndHooks::default(),
//! )?;
//! // Without an interrupt controller nothing could wake it.
//! let MachineEnd::Crash(crash) = manager.wait() else { unreachable!() };
//! assert_eq!(crash.cause, CrashCause::Halted);
//! assert_eq!(*bus.0.lock().unwrap(), b"hi");
//! # Ok(())
//! # }
//! ```
#![cfg(target_arch = "x86_64")]
#![deny(missing_docs)]

mod counters;
mod end;
mod error;
mod instruction;
mod manager;
mod options;
mod run_page;
mod shared;
mod signal;
mod spare;
mod vcpu;

pub use counters::ExitCounts;
pub use end::{Crash, CrashCause, InstructionBytes, MachineEnd};
pub use error::Error;
pub use manager::VcpuManager;
pub use options::{AfterFirstExit, EndHook, EndHooks, ReadMemory, VcpuOptions};
pub use signal::KickSignal;
pub use spare::{SpareThread, recv_soon};
