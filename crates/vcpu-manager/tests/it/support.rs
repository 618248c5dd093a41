//! Guests of a few bytes of real-mode code, and a bus that remembers what they did.

use std::ops::ControlFlow;
use std::ptr::null_mut;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use kiln_device_api::{ExitRequest, VcpuBus};
use kiln_vcpu_manager::{EndHooks, Error, MachineEnd, ReadMemory, VcpuManager, VcpuOptions};
use kvm_bindings::{kvm_regs, kvm_userspace_memory_region};
use kvm_ioctls::{Kvm, VcpuFd, VmFd};

/// The guest's memory is 64 KiB from address 0: all that 16-bit code reaches without segments.
pub(crate) const MEMORY: usize = 0x1_0000;
/// Where the code starts, with a code segment base of 0.
pub(crate) const CODE: usize = 0x1000;
/// A place for data, well behind the code.
pub(crate) const DATA: usize = 0x8000;
/// Beyond memory: what the guest finds at offset 0 of segment 0x2000.
pub(crate) const MMIO: u64 = 0x2_0000;

// None of these ports is one of the interrupt controllers in the kernel (0x20, 0x21, 0xa0, 0xa1),
// which would answer before anything comes out of the guest.

/// Writes there are remembered.
pub(crate) const RECORD: u16 = 0x10;
/// Reads there give 0x11, 0x22, 0x33, 0x44, as far as the width goes.
pub(crate) const PATTERN: u16 = 0x30;
/// Reads there give 0, 1, 2, ...
pub(crate) const TICKET: u16 = 0x31;
/// 1, 2, 3, ... is to be written there; anything else ends the machine with [`ExitRequest::Reset`].
pub(crate) const SEQUENCE: u16 = 0x32;
/// Bytes written there are counted, and so is what happens at [`COUNTED_MMIO`].
pub(crate) const COUNTED: u16 = 0x33;
/// Reads and writes there are counted.
pub(crate) const COUNTED_MMIO: u64 = MMIO + 0x100;
/// A write there powers the machine off.
pub(crate) const OFF: u16 = 0xf4;
/// A write there panics.
pub(crate) const PANIC: u16 = 0xdd;

/// `mov $OFF, %dx; out %al, %dx`.
pub(crate) const POWER_OFF: [u8; 4] = [0xba, 0xf4, 0x00, 0xee];

/// Long enough for any host; nothing here waits that long unless it is broken.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// `/dev/kvm`, or a line that says why the test is skipped.
pub(crate) fn kvm() -> Option<Kvm> {
    Kvm::new()
        .inspect_err(|error| println!("skipped: /dev/kvm: {error}"))
        .ok()
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Access {
    Out(u16, Vec<u8>),
    In(u16, usize),
    MmioWrite(u64, Vec<u8>),
    MmioRead(u64, usize),
}

#[derive(Default)]
pub(crate) struct Recorder {
    accesses: Mutex<Vec<Access>>,
    tickets: AtomicU32,
    sequence: AtomicU32,
    bytes: AtomicU32,
    mmio_reads: AtomicU32,
    mmio_writes: AtomicU32,
    ended_interrupts: Mutex<Vec<u8>>,
}

impl Recorder {
    pub(crate) fn accesses(&self) -> Vec<Access> {
        self.accesses.lock().unwrap().clone()
    }

    /// How many tickets were drawn.
    pub(crate) fn tickets(&self) -> u32 {
        self.tickets.load(Ordering::SeqCst)
    }

    /// The last number of the sequence.
    pub(crate) fn sequence(&self) -> u32 {
        self.sequence.load(Ordering::SeqCst)
    }

    /// How many bytes went to [`COUNTED`].
    pub(crate) fn bytes(&self) -> u32 {
        self.bytes.load(Ordering::SeqCst)
    }

    /// How many reads and writes there were of [`COUNTED_MMIO`].
    pub(crate) fn counted_mmio(&self) -> (u32, u32) {
        (
            self.mmio_reads.load(Ordering::SeqCst),
            self.mmio_writes.load(Ordering::SeqCst),
        )
    }

    /// The vectors of the level-triggered interrupts that the guest ended.
    pub(crate) fn ended_interrupts(&self) -> Vec<u8> {
        self.ended_interrupts.lock().unwrap().clone()
    }

    fn push(&self, access: Access) {
        self.accesses.lock().unwrap().push(access);
    }
}

impl VcpuBus for Recorder {
    fn pio_read(&self, port: u16, data: &mut [u8]) {
        match port {
            TICKET => {
                let ticket = self.tickets.fetch_add(1, Ordering::SeqCst).to_le_bytes();
                data.copy_from_slice(&ticket[..data.len()]);
            }
            PATTERN => {
                self.push(Access::In(port, data.len()));
                data.copy_from_slice(&[0x11, 0x22, 0x33, 0x44][..data.len()]);
            }
            _ => self.push(Access::In(port, data.len())),
        }
    }

    fn pio_write(&self, port: u16, data: &[u8]) -> ControlFlow<ExitRequest> {
        match port {
            OFF => return ControlFlow::Break(ExitRequest::Shutdown),
            PANIC => panic!("the device at {port:#x} is broken"),
            SEQUENCE => {
                let next = u32::from_le_bytes(data.try_into().unwrap());
                if self.sequence.swap(next, Ordering::SeqCst) + 1 != next {
                    return ControlFlow::Break(ExitRequest::Reset);
                }
            }
            COUNTED => {
                self.bytes
                    .fetch_add(u32::try_from(data.len()).unwrap(), Ordering::SeqCst);
            }
            _ => self.push(Access::Out(port, data.to_vec())),
        }
        ControlFlow::Continue(())
    }

    fn mmio_read(&self, address: u64, data: &mut [u8]) {
        if address == COUNTED_MMIO {
            self.mmio_reads.fetch_add(1, Ordering::SeqCst);
            return;
        }
        self.push(Access::MmioRead(address, data.len()));
        // The upper half of the segment is left alone, as an empty bus does.
        if address < MMIO + 0x8000 {
            for (byte, value) in data.iter_mut().zip(0xa0..) {
                *byte = value;
            }
        }
    }

    fn mmio_write(&self, address: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        if address == COUNTED_MMIO {
            self.mmio_writes.fetch_add(1, Ordering::SeqCst);
        } else {
            self.push(Access::MmioWrite(address, data.to_vec()));
        }
        ControlFlow::Continue(())
    }

    fn end_of_interrupt(&self, vector: u8) {
        self.ended_interrupts.lock().unwrap().push(vector);
    }
}

pub(crate) struct Memory(*mut u8);

// SAFETY: it is a mapping of the process; all access is volatile, through raw pointers.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Memory {
    fn new() -> Self {
        // SAFETY: a new anonymous mapping touches nothing that exists.
        let base = unsafe {
            libc::mmap(
                null_mut(),
                MEMORY,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        assert_ne!(base, libc::MAP_FAILED);
        Self(base.cast())
    }

    pub(crate) fn read<const N: usize>(&self, address: usize) -> [u8; N] {
        assert!(address + N <= MEMORY);
        // SAFETY: in the mapping, as asserted.
        std::array::from_fn(|at| unsafe { self.0.add(address + at).read_volatile() })
    }

    pub(crate) fn write(&self, address: usize, bytes: &[u8]) {
        assert!(address + bytes.len() <= MEMORY);
        for (at, byte) in bytes.iter().enumerate() {
            // SAFETY: in the mapping, as asserted.
            unsafe { self.0.add(address + at).write_volatile(*byte) };
        }
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // SAFETY: made by `new` with this length; the machine that used it is gone, or can't
        // reach it any more.
        unsafe { libc::munmap(self.0.cast(), MEMORY) };
    }
}

/// A machine that is not started yet.
pub(crate) struct Guest {
    pub(crate) vm: VmFd,
    pub(crate) vcpus: Vec<VcpuFd>,
    pub(crate) memory: Arc<Memory>,
    pub(crate) bus: Arc<Recorder>,
    pub(crate) options: VcpuOptions,
}

impl Guest {
    /// One vCPU, with or without an interrupt controller in the kernel.
    pub(crate) fn new(kvm: &Kvm, code: &[u8], irqchip: bool) -> Self {
        Self::with_vcpus(kvm, code, irqchip, 1)
    }

    pub(crate) fn with_vcpus(kvm: &Kvm, code: &[u8], irqchip: bool, count: u64) -> Self {
        Self::with_irqchip(kvm, code, count, |vm| {
            if irqchip {
                vm.create_irq_chip().unwrap();
            }
        })
    }

    pub(crate) fn with_irqchip(
        kvm: &Kvm,
        code: &[u8],
        count: u64,
        irqchip: impl FnOnce(&VmFd),
    ) -> Self {
        let vm = kvm.create_vm().unwrap();
        let memory = Arc::new(Memory::new());
        let region = kvm_userspace_memory_region {
            memory_size: MEMORY as u64,
            userspace_addr: memory.0 as u64,
            ..Default::default()
        };
        // SAFETY: `Started` and `Guest` keep the mapping for as long as the machine can run.
        unsafe { vm.set_user_memory_region(region) }.unwrap();
        irqchip(&vm);
        memory.write(CODE, code);
        let vcpus = (0..count)
            .map(|id| {
                let vcpu = vm.create_vcpu(id).unwrap();
                let mut sregs = vcpu.get_sregs().unwrap();
                sregs.cs.base = 0;
                sregs.cs.selector = 0;
                vcpu.set_sregs(&sregs).unwrap();
                let regs = kvm_regs {
                    rip: CODE as u64,
                    rsp: 0x7000,
                    rflags: 2,
                    ..Default::default()
                };
                vcpu.set_regs(&regs).unwrap();
                vcpu
            })
            .collect();
        let options = VcpuOptions::default();
        Self {
            vm,
            vcpus,
            memory,
            bus: Arc::default(),
            options,
        }
    }

    /// Sets registers of the first vCPU.
    pub(crate) fn regs(self, set: impl FnOnce(&mut kvm_regs)) -> Self {
        let mut regs = self.vcpus[0].get_regs().unwrap();
        set(&mut regs);
        self.vcpus[0].set_regs(&regs).unwrap();
        self
    }

    pub(crate) fn data(self, bytes: &[u8]) -> Self {
        self.memory.write(DATA, bytes);
        self
    }

    pub(crate) fn read_memory(&self) -> ReadMemory {
        let memory = Arc::clone(&self.memory);
        Arc::new(move |address, to: &mut [u8]| {
            let Ok(address) = usize::try_from(address) else {
                return false;
            };
            if address.checked_add(to.len()).is_none_or(|end| end > MEMORY) {
                return false;
            }
            to.iter_mut()
                .zip(address..)
                .for_each(|(byte, at)| *byte = memory.read::<1>(at)[0]);
            true
        })
    }

    pub(crate) fn paused(mut self) -> Self {
        self.options.start_paused = true;
        self
    }

    pub(crate) fn start(self) -> Started {
        self.try_start(|_| {}).unwrap()
    }

    pub(crate) fn try_start(
        self,
        on_end: impl FnOnce(&MachineEnd) + Send + 'static,
    ) -> Result<Started, Error> {
        let Self {
            vm,
            vcpus,
            memory,
            bus,
            options,
        } = self;
        let manager = VcpuManager::start(
            vcpus,
            Arc::clone(&bus) as Arc<dyn VcpuBus>,
            options,
            EndHooks {
                on_end: Box::new(on_end),
                ..EndHooks::default()
            },
        )?;
        Ok(Started {
            manager,
            bus,
            vm,
            memory,
        })
    }
}

/// A started machine. Its fields are dropped in this order: vCPUs before memory.
pub(crate) struct Started {
    pub(crate) manager: VcpuManager,
    pub(crate) bus: Arc<Recorder>,
    pub(crate) vm: VmFd,
    pub(crate) memory: Arc<Memory>,
}

impl Started {
    /// Waits for the end, but not for ever.
    pub(crate) fn end(&self) -> MachineEnd {
        self.manager
            .wait_timeout(PATIENCE)
            .expect("the machine did not end")
    }

    pub(crate) fn regs(&self) -> kvm_regs {
        self.manager
            .with_vcpu(0, |fd| fd.get_regs().unwrap())
            .unwrap()
    }
}

/// The machine's end where the guest powered it off.
pub(crate) fn powered_off() -> MachineEnd {
    MachineEnd::Requested {
        vcpu: 0,
        request: ExitRequest::Shutdown,
    }
}

/// Waits until this holds.
pub(crate) fn eventually(what: &str, holds: impl Fn() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "it never came to this: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}
