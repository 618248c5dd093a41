//! The bus: the functions on it, and how the guest gets to their registers and BARs.
//!
//! Locks, in the order in which they are taken: the configuration lock, which one configuration
//! access at a time has, and in it either the routes (for writing, for a moment) or what a function
//! keeps for itself (MSI-X vectors, INTx pin). An access to a BAR takes the routes for reading, for
//! the length of a look-up, and holds nothing while the device works on it. So a BAR can move while
//! it is accessed, and even from within an access to it.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};

use kiln_device_api::ExitRequest;

use crate::builder::intx_pin;
use crate::config::ConfigSpace;
use crate::registers::{BAR_COUNT, CONVENTIONAL_SIZE, EXTENDED_SIZE, STATUS, STATUS_INTERRUPT};
use crate::routes::{Decoded, Places, Routes, Target};
use crate::window::Window;
use crate::{
    AddressSpace, BarObserver, CapabilityAccess, Error, FunctionState, INTX_LINES, IntxPin, Msix,
    MsixPlacement, PciAddress, PciBusState, PciFunction, PciWindow, intx_line,
};

#[cfg(test)]
mod tests;

/// No function is at an address. A bus has 249 functions at most.
pub(crate) const NO_FUNCTION: u8 = 0xff;
/// Configuration accesses come in aligned double words, or parts of one.
const DWORD: usize = 4;

/// A function, as far as it doesn't change.
pub(crate) struct Function {
    pub(crate) address: PciAddress,
    pub(crate) name: String,
    pub(crate) device: Arc<dyn PciFunction>,
    pub(crate) msix: Option<(Arc<Msix>, MsixPlacement)>,
    pub(crate) pin: Option<Arc<IntxPin>>,
    pub(crate) observer: Option<Arc<dyn BarObserver>>,
}

/// What configuration accesses change, in the order of the functions.
struct Configuration {
    spaces: Vec<ConfigSpace>,
    /// Where the BARs answer: what the observers were told last.
    places: Vec<Places>,
}

/// A PCI bus: bus 0 with a host bridge and devices, made by a
/// [`PciBusBuilder`](crate::PciBusBuilder).
///
/// The guest reaches it through [`Ecam`](crate::Ecam), [`ConfigPorts`](crate::ConfigPorts) and the
/// [windows](Self::windows).
pub struct PciBus {
    functions: Vec<Function>,
    by_address: [u8; 256],
    windows: Vec<Window>,
    gsis: Option<[u32; INTX_LINES]>,
    routes: RwLock<Routes>,
    configuration: Mutex<Configuration>,
    reset_state: PciBusState,
}

/// A function on a bus, for descriptions of the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FunctionInfo<'a> {
    /// Where it is.
    pub address: PciAddress,
    /// Its name.
    pub name: &'a str,
    /// Its INTx pin (0 for `INTA#`) and the global system interrupt that this is wired to.
    pub intx: Option<(u8, u32)>,
}

/// The registers of a capability at one moment.
struct Snapshot {
    start: usize,
    len: usize,
    registers: [u8; CONVENTIONAL_SIZE],
}

impl Snapshot {
    fn of(space: &ConfigSpace, offset: usize) -> Option<Self> {
        let (place, now) = space.hooked_capability(offset)?;
        let mut registers = [0; CONVENTIONAL_SIZE];
        registers.get_mut(..place.len)?.copy_from_slice(now);
        Some(Self {
            start: place.start,
            len: place.len,
            registers,
        })
    }

    fn access(&self, offset: usize) -> CapabilityAccess<'_> {
        CapabilityAccess {
            // Capabilities are below 0x100.
            capability: self.start as u8,
            offset: offset - self.start,
            registers: &self.registers[..self.len],
        }
    }
}

impl PciBus {
    pub(crate) fn new(
        functions: Vec<Function>,
        spaces: Vec<ConfigSpace>,
        by_address: [u8; 256],
        windows: Vec<Window>,
        gsis: Option<[u32; INTX_LINES]>,
    ) -> Self {
        let reset_state = functions
            .iter()
            .zip(&spaces)
            .map(|(function, space)| FunctionState {
                address: function.address,
                config: space.state(),
                msix: function.msix.as_ref().map(|(msix, _)| msix.reset_state()),
                intx_asserted: false,
            });
        Self {
            reset_state: PciBusState {
                functions: reset_state.collect(),
            },
            configuration: Mutex::new(Configuration {
                places: vec![Places::default(); functions.len()],
                spaces,
            }),
            functions,
            by_address,
            windows,
            gsis,
            routes: RwLock::new(Routes::default()),
        }
    }

    /// The functions, the host bridge first, then in the order in which they were added.
    pub fn functions(&self) -> impl Iterator<Item = FunctionInfo<'_>> {
        self.functions.iter().map(|function| {
            let pin = intx_pin(function.address);
            let gsi = self.intx_gsi(function.address.slot(), pin);
            FunctionInfo {
                address: function.address,
                name: &function.name,
                intx: function.pin.as_ref().and(gsi).map(|gsi| (pin, gsi)),
            }
        })
    }

    /// The global system interrupt that a pin (0 for `INTA#` to 3 for `INTD#`) of the device in a
    /// slot is wired to: what `_PRT` says. `None` where the bus has no interrupt lines.
    pub fn intx_gsi(&self, slot: u8, pin: u8) -> Option<u32> {
        self.gsis.map(|gsis| gsis[intx_line(slot, pin)])
    }

    /// The windows of the bus, to be placed on the machine's buses.
    pub fn windows(self: &Arc<Self>) -> Vec<PciWindow> {
        let windows = self.windows.iter();
        windows.map(|window| PciWindow::new(self, window)).collect()
    }

    /// Reads `data.len()` bytes at `offset` into the configuration space of a function.
    ///
    /// `data` comes filled with `0xff`, which is what is read where no function is, and beyond the
    /// 4096 bytes of configuration space. An access that crosses the borders of double words is
    /// taken as several, from the lowest address on.
    pub fn config_read(&self, address: PciAddress, offset: u16, data: &mut [u8]) {
        let Some(index) = self.index_of(address) else {
            return;
        };
        let mut at = usize::from(offset);
        let mut rest = data;
        while !rest.is_empty() && at < EXTENDED_SIZE {
            let len = rest.len().min(DWORD - at % DWORD);
            let (part, behind) = rest.split_at_mut(len);
            self.read_part(index, at, part);
            at += len;
            rest = behind;
        }
    }

    /// Writes `data` at `offset` into the configuration space of a function: the twin of
    /// [`config_read`](Self::config_read). What can't be written is dropped.
    pub fn config_write(
        &self,
        address: PciAddress,
        offset: u16,
        data: &[u8],
    ) -> ControlFlow<ExitRequest> {
        let Some(index) = self.index_of(address) else {
            return ControlFlow::Continue(());
        };
        let mut at = usize::from(offset);
        let mut rest = data;
        while !rest.is_empty() && at < EXTENDED_SIZE {
            let len = rest.len().min(DWORD - at % DWORD);
            let (part, behind) = rest.split_at(len);
            self.write_part(index, at, part)?;
            at += len;
            rest = behind;
        }
        ControlFlow::Continue(())
    }

    fn index_of(&self, address: PciAddress) -> Option<usize> {
        let index = self.by_address[address.devfn()];
        (index != NO_FUNCTION).then_some(usize::from(index))
    }

    /// A read within a double word.
    fn read_part(&self, index: usize, offset: usize, data: &mut [u8]) {
        let function = &self.functions[index];
        let snapshot = {
            let configuration = self.lock();
            let space = &configuration.spaces[index];
            space.read(offset, data);
            Snapshot::of(space, offset)
        };
        if let Some(pin) = &function.pin
            && pin.is_asserted()
            && let Some(status) = STATUS.checked_sub(offset).and_then(|at| data.get_mut(at))
        {
            *status |= STATUS_INTERRUPT as u8;
        }
        if let Some(snapshot) = snapshot {
            let access = snapshot.access(offset);
            function.device.config_read(&access, data);
        }
    }

    /// A write within a double word.
    fn write_part(&self, index: usize, offset: usize, data: &[u8]) -> ControlFlow<ExitRequest> {
        let function = &self.functions[index];
        let snapshot = {
            let mut configuration = self.lock();
            let space = &mut configuration.spaces[index];
            let summary = |space: &ConfigSpace| {
                (space.decoded(), space.msix_control(), space.intx_disabled())
            };
            let (decoded_before, control_before, disabled_before) = summary(space);
            space.write(offset, data);
            let (decoded, control, disabled) = summary(space);
            let snapshot = Snapshot::of(space, offset);
            if disabled != disabled_before
                && let Some(pin) = &function.pin
            {
                pin.set_disabled(disabled);
            }
            if control != control_before
                && let Some((msix, _)) = &function.msix
            {
                msix.set_control(control);
            }
            if decoded != decoded_before {
                self.reroute(&mut configuration);
            }
            snapshot
        };
        match snapshot {
            Some(snapshot) => {
                let access = snapshot.access(offset);
                function.device.config_write(&access, data)
            }
            None => ControlFlow::Continue(()),
        }
    }

    /// Makes the routes that go with the registers, then tells the observers what has changed.
    ///
    /// The routes come first: what is written to the new place before its observer is told is
    /// taken by the device itself.
    fn reroute(&self, configuration: &mut Configuration) {
        let decoded = configuration.spaces.iter().enumerate();
        let decoded = decoded.flat_map(|(function, space)| {
            let bars = space.bars().iter().zip(space.decoded()).enumerate();
            bars.filter_map(move |(number, (bar, first))| {
                let bar = bar.as_ref()?;
                Some(Decoded {
                    function,
                    bar: number,
                    space: bar.space(),
                    first: first?,
                    size: bar.size(),
                })
            })
        });
        let routes = Routes::new(&self.windows, decoded);
        let places = routes.places(self.functions.len());
        *self.routes.write().unwrap_or_else(PoisonError::into_inner) = routes;

        let before = std::mem::replace(&mut configuration.places, places);
        let changes = before
            .iter()
            .zip(&configuration.places)
            .zip(&self.functions);
        for ((before, now), function) in changes {
            let Some(observer) = &function.observer else {
                continue;
            };
            for number in 0..BAR_COUNT {
                if before[number] != now[number] {
                    observer.bar_moved(number, now[number]);
                }
            }
        }
    }

    fn find(&self, space: AddressSpace, address: u64, len: usize) -> Option<(&Function, Target)> {
        let target = {
            let routes = self.routes.read().unwrap_or_else(PoisonError::into_inner);
            routes.find(space, address, len)?
        };
        Some((self.functions.get(target.function)?, target))
    }

    /// A read at an address in a window. Where no BAR has all of it, `data` stays as it is.
    pub(crate) fn bar_read(&self, space: AddressSpace, address: u64, data: &mut [u8]) {
        let Some((function, target)) = self.find(space, address, data.len()) else {
            return;
        };
        let answered = function.msix.as_ref().is_some_and(|(msix, placement)| {
            msix.bar_read(placement, target.bar, target.offset, data)
        });
        if !answered {
            function.device.bar_read(target.bar, target.offset, data);
        }
    }

    /// A write at an address in a window.
    pub(crate) fn bar_write(
        &self,
        space: AddressSpace,
        address: u64,
        data: &[u8],
    ) -> ControlFlow<ExitRequest> {
        let Some((function, target)) = self.find(space, address, data.len()) else {
            return ControlFlow::Continue(());
        };
        let taken = function.msix.as_ref().is_some_and(|(msix, placement)| {
            msix.bar_write(placement, target.bar, target.offset, data)
        });
        if taken {
            return ControlFlow::Continue(());
        }
        function.device.bar_write(target.bar, target.offset, data)
    }

    /// Notes errors in the status register of a function, where they stay until the guest writes
    /// ones to them. Of `errors`, bits 8 and 11 to 15 count (PCI 3.0, section 6.2.3).
    pub fn set_status_errors(&self, address: PciAddress, errors: u16) {
        if let Some(index) = self.index_of(address) {
            self.lock().spaces[index].set_status_errors(errors);
        }
    }

    /// Resets every function, and brings the bus back to how it was built.
    pub fn reset(&self) {
        for function in &self.functions {
            function.device.reset();
        }
        self.apply(&self.reset_state);
    }

    /// Everything that the guest can have changed.
    pub fn state(&self) -> PciBusState {
        let configuration = self.lock();
        let functions = self.functions.iter().zip(&configuration.spaces);
        let functions = functions.map(|(function, space)| FunctionState {
            address: function.address,
            config: space.state(),
            msix: function.msix.as_ref().map(|(msix, _)| msix.state()),
            intx_asserted: function.pin.as_ref().is_some_and(|pin| pin.is_asserted()),
        });
        PciBusState {
            functions: functions.collect(),
        }
    }

    /// Takes over a state of a bus that was built like this one. No vCPU runs meanwhile.
    ///
    /// # Errors
    ///
    /// [`Error::StateFunctions`] and [`Error::StateMismatch`] where it is not a state of this bus;
    /// nothing has changed then.
    pub fn restore(&self, state: &PciBusState) -> Result<(), Error> {
        if state.functions.len() != self.functions.len() {
            return Err(Error::StateFunctions {
                expected: self.functions.len(),
                found: state.functions.len(),
            });
        }
        let configuration = self.lock();
        let all = self
            .functions
            .iter()
            .zip(&state.functions)
            .zip(&configuration.spaces);
        for ((function, saved), space) in all {
            function
                .check(saved)
                .and_then(|()| space.check(&saved.config))
                .map_err(|reason| Error::StateMismatch {
                    address: function.address,
                    name: function.name.clone(),
                    reason,
                })?;
        }
        drop(configuration);
        self.apply(state);
        Ok(())
    }

    /// Takes over a state that is one of this bus.
    fn apply(&self, state: &PciBusState) {
        let mut configuration = self.lock();
        let all = self
            .functions
            .iter()
            .zip(&state.functions)
            .zip(&mut configuration.spaces);
        for ((function, saved), space) in all {
            space.restore(&saved.config);
            if let (Some((msix, _)), Some(saved)) = (&function.msix, &saved.msix) {
                msix.restore(saved, space.msix_control());
            }
            if let Some(pin) = &function.pin {
                pin.set_disabled(space.intx_disabled());
                pin.set(saved.intx_asserted);
            }
        }
        self.reroute(&mut configuration);
    }

    /// A thread that panicked with the lock held leaves plain registers behind it.
    fn lock(&self) -> MutexGuard<'_, Configuration> {
        self.configuration
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

impl Function {
    /// Whether a saved state has the parts of this function.
    fn check(&self, saved: &FunctionState) -> Result<(), String> {
        if saved.address != self.address {
            return Err(format!("the state has it at {}", saved.address));
        }
        let vectors = self
            .msix
            .as_ref()
            .map_or(0, |(msix, _)| msix.vectors().into());
        let saved_vectors = saved.msix.as_ref().map_or(0, |msix| msix.vectors.len());
        if vectors != saved_vectors {
            return Err(format!(
                "the state has {saved_vectors} MSI-X vectors instead of {vectors}"
            ));
        }
        if saved.intx_asserted && self.pin.is_none() {
            return Err("the state asserts an INTx pin that it does not have".to_owned());
        }
        Ok(())
    }
}

impl fmt::Debug for PciBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let functions = self.functions.iter();
        f.debug_map()
            .entries(functions.map(|function| (function.address.to_string(), &function.name)))
            .finish()
    }
}
