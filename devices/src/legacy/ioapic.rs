//! The I/O APIC (82093AA), for an interrupt controller whose other half is in the kernel.
//!
//! With KVM's split irqchip the local APICs are in the kernel and the I/O APIC is here. What an entry
//! of its redirection table says is a message (MSI), and the messages of all entries that are in use
//! go to an [`MsiRouter`] as the complete set of routes.
//!
//! A pin has one of two kinds of devices behind it. One with edges triggers an eventfd, and the
//! kernel sends the message that is routed for it: nothing comes through here. One with a level
//! says what it is ([`IoApic::set_level`]), and the message is sent from here, again after each end
//! of interrupt until the level is gone.

use std::fmt;
use std::ops::ControlFlow;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use kiln_device_api::{BusDevice, ExitRequest, MsiMessage};
use serde::{Deserialize, Serialize};

/// The pins of the I/O APIC, which are the global system interrupts 0 to 23.
pub const IOAPIC_PINS: u32 = 24;
const PINS: usize = IOAPIC_PINS as usize;

/// Selects the register that the window shows (82093AA datasheet, section 3.1).
const REGISTER_SELECT: u64 = 0x00;
const WINDOW: u64 = 0x10;
/// Ends the level-triggered interrupts of a vector (version 0x20, ICH datasheet).
const END_OF_INTERRUPT: u64 = 0x40;

const ID: u8 = 0x00;
const VERSION: u8 = 0x01;
const ARBITRATION: u8 = 0x02;
/// The first of two registers for each entry of the redirection table.
const REDIRECTION_TABLE: u8 = 0x10;

const ID_MASK: u32 = 0x0f00_0000;
/// With an end-of-interrupt register, and the number of the last pin.
const VERSION_VALUE: u32 = 0x20 | (IOAPIC_PINS - 1) << 16;

// An entry of the redirection table (82093AA datasheet, section 3.2.4).
const VECTOR: u64 = 0xff;
const DELIVERY_MODE: u64 = 0b111 << 8;
const DELIVERY_EXTINT: u64 = 0b111 << 8;
const DESTINATION_LOGICAL: u64 = 1 << 11;
const DELIVERY_STATUS: u64 = 1 << 12;
const REMOTE_IRR: u64 = 1 << 14;
const LEVEL: u64 = 1 << 15;
const MASKED: u64 = 1 << 16;
const RESERVED: u64 = 0x0001_ffff_fffe_0000;
const READ_ONLY: u64 = DELIVERY_STATUS | REMOTE_IRR | RESERVED;
/// Bits 8 to 14 of the destination, for guests that are told of them (`KVM_FEATURE_MSI_EXT_DEST_ID`).
const EXTENDED_DESTINATION_SHIFT: u32 = 49;
const EXTENDED_DESTINATION: u64 = 0x7f;
const DESTINATION_SHIFT: u32 = 56;

// A message (SDM volume 3, section 12.11).
const MSI_ADDRESS: u64 = 0xfee0_0000;
const MSI_DESTINATION_SHIFT: u32 = 12;
const MSI_DESTINATION_LOGICAL: u64 = 1 << 2;
/// KVM takes the destination's bits from 8 on in the same place of the address's upper half.
const MSI_EXTENDED_DESTINATION_SHIFT: u32 = 32 + 8;

/// The message that a global system interrupt is delivered as.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct MsiRoute {
    /// The global system interrupt, which is the I/O APIC's pin.
    pub gsi: u32,
    /// The message.
    pub message: MsiMessage,
}

/// Where the I/O APIC's messages go: in production to KVM, in tests to a recorder.
///
/// Calls come from vCPU threads and, for levels, from whoever sets them, one at a time and with the
/// I/O APIC's lock held.
pub trait MsiRouter: Send + Sync {
    /// Makes `routes` the complete set of routes of the I/O APIC's pins, in order of their
    /// interrupts; an interrupt without a route is not delivered. They are in effect when this
    /// returns (`KVM_SET_GSI_ROUTING`).
    ///
    /// Called only when the set has changed.
    fn set_routes(&self, routes: &[MsiRoute]);

    /// Sends a message now, which is one of the routes (`KVM_SIGNAL_MSI`). Returns whether a
    /// processor takes it.
    fn send(&self, message: MsiMessage) -> bool;
}

/// The state of an [`IoApic`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IoApicState {
    /// The ID register.
    pub id: u32,
    /// The register that is selected.
    pub select: u8,
    /// The redirection table; entries that are missing are masked.
    pub entries: Vec<u64>,
}

impl Default for IoApicState {
    fn default() -> Self {
        Self {
            id: 0,
            select: 0,
            entries: vec![MASKED; PINS],
        }
    }
}

struct Registers {
    id: u32,
    select: u8,
    entries: [u64; PINS],
    /// The pins whose level is asserted.
    asserted: [bool; PINS],
    /// What the router was told last.
    routes: Vec<MsiRoute>,
}

/// The I/O APIC, with 24 pins.
///
/// Registers are 32 bits wide; as in KVM's own, a narrower write is extended with zeros, and what a
/// wider access has beyond 32 bits is nothing.
pub struct IoApic {
    registers: Mutex<Registers>,
    used: [bool; PINS],
    router: Arc<dyn MsiRouter>,
}

impl IoApic {
    /// The I/O APIC after a reset: all entries masked, and no route.
    ///
    /// `used` are the pins that something is connected to, by an eventfd or by
    /// [`set_level`](Self::set_level). Setting routes can be slow (KVM waits for all vCPUs), and
    /// what a guest writes for other pins makes no difference, so it never causes a call of
    /// `router`.
    pub fn new(used: &[u32], router: Arc<dyn MsiRouter>) -> Self {
        Self::from_state(&IoApicState::default(), used, router)
    }

    /// The I/O APIC as it was when `state` was taken; its routes are set. The levels of its pins
    /// are their devices' to say again.
    pub fn from_state(state: &IoApicState, used: &[u32], router: Arc<dyn MsiRouter>) -> Self {
        let mut entries = [MASKED; PINS];
        for (to, from) in entries.iter_mut().zip(&state.entries) {
            *to = from & !(RESERVED | DELIVERY_STATUS);
            if *to & LEVEL == 0 {
                *to &= !REMOTE_IRR;
            }
        }
        let mut used_pins = [false; PINS];
        for pin in used {
            if let Some(used) = used_pins.get_mut(*pin as usize) {
                *used = true;
            }
        }
        let ioapic = Self {
            registers: Mutex::new(Registers {
                id: state.id & ID_MASK,
                select: state.select,
                entries,
                asserted: [false; PINS],
                routes: Vec::new(),
            }),
            used: used_pins,
            router,
        };
        ioapic.update_routes(&mut ioapic.lock());
        ioapic
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> IoApicState {
        let registers = self.lock();
        IoApicState {
            id: registers.id,
            select: registers.select,
            entries: registers.entries.to_vec(),
        }
    }

    /// Says whether the level-triggered interrupt `gsi` is asserted, whatever voltage that is.
    ///
    /// While it is, a level-triggered entry that is not masked is delivered, and again after each
    /// end of interrupt. An edge-triggered entry is delivered once, when it becomes asserted.
    pub fn set_level(&self, gsi: u32, asserted: bool) {
        let pin = gsi as usize;
        if self.used.get(pin) != Some(&true) {
            return;
        }
        let mut registers = self.lock();
        let before = std::mem::replace(&mut registers.asserted[pin], asserted);
        if registers.entries[pin] & LEVEL != 0 {
            self.deliver(&mut registers, pin);
        } else if asserted
            && !before
            && let Some(message) = message(registers.entries[pin])
        {
            self.router.send(message);
        }
    }

    /// The guest ended an interrupt with this vector at its local APIC (`KVM_EXIT_IOAPIC_EOI`):
    /// clears Remote IRR of the level-triggered entries with this vector, and delivers those that
    /// are still asserted again.
    pub fn end_of_interrupt(&self, vector: u8) {
        let mut registers = self.lock();
        let mut was_kept = false;
        for pin in 0..PINS {
            let entry = &mut registers.entries[pin];
            if *entry & LEVEL != 0 && *entry & VECTOR == u64::from(vector) {
                // What was masked in service had its route until here.
                was_kept |= *entry & (MASKED | REMOTE_IRR) == MASKED | REMOTE_IRR;
                *entry &= !REMOTE_IRR;
                self.deliver(&mut registers, pin);
            }
        }
        if was_kept {
            self.update_routes(&mut registers);
        }
    }

    /// Sends the message of a level-triggered entry if its pin is asserted, and it was not sent
    /// since the last end of interrupt. One that no processor took is tried again when the entry is
    /// written, or the level changes.
    fn deliver(&self, registers: &mut Registers, pin: usize) {
        let entry = registers.entries[pin];
        if !registers.asserted[pin] || entry & LEVEL == 0 || entry & REMOTE_IRR != 0 {
            return;
        }
        if let Some(message) = message(entry)
            && self.router.send(message)
        {
            registers.entries[pin] |= REMOTE_IRR;
        }
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells the router if what is routed has changed. Under the lock, so that it hears of the
    /// changes of several vCPUs in their order.
    fn update_routes(&self, registers: &mut Registers) {
        let routes = (0..)
            .zip(&registers.entries)
            .zip(self.used)
            .filter(|(_, used)| *used)
            .filter_map(|((gsi, entry), _)| {
                let message = route(*entry)?;
                Some(MsiRoute { gsi, message })
            });
        if routes.clone().ne(registers.routes.iter().copied()) {
            registers.routes = routes.collect();
            self.router.set_routes(&registers.routes);
        }
    }

    fn write_window(&self, value: u32) {
        let mut registers = self.lock();
        if registers.select == ID {
            registers.id = value & ID_MASK;
        }
        let Some((pin, high)) = table_place(registers.select) else {
            return;
        };
        let entry = &mut registers.entries[pin];
        let written = if high {
            *entry & 0xffff_ffff | u64::from(value) << 32
        } else {
            *entry & !0xffff_ffff | u64::from(value)
        };
        *entry = *entry & READ_ONLY | written & !READ_ONLY;
        if *entry & LEVEL == 0 {
            // An edge has no end that would clear it; guests end a level-triggered interrupt this
            // way where there is no register for it.
            *entry &= !REMOTE_IRR;
        }
        // The route first: by it KVM knows that it has to tell of the end of the interrupt.
        self.update_routes(&mut registers);
        self.deliver(&mut registers, pin);
    }

    fn read_window(&self) -> u32 {
        let registers = self.lock();
        match registers.select {
            ID | ARBITRATION => registers.id,
            VERSION => VERSION_VALUE,
            select => match table_place(select) {
                Some((pin, true)) => (registers.entries[pin] >> 32) as u32,
                Some((pin, false)) => registers.entries[pin] as u32,
                None => 0,
            },
        }
    }
}

/// The pin whose entry a register shows, and whether it shows the upper half.
fn table_place(select: u8) -> Option<(usize, bool)> {
    let index = select.checked_sub(REDIRECTION_TABLE)?;
    let pin = usize::from(index / 2);
    (pin < PINS).then_some((pin, index % 2 == 1))
}

/// The message that an entry is routed to. One that is masked while its interrupt is in service
/// keeps its route: by it KVM knows that it has to tell of the end. Nothing is sent by it, as what
/// is level-triggered is not sent by an irqfd.
fn route(entry: u64) -> Option<MsiMessage> {
    if entry & (LEVEL | REMOTE_IRR) == LEVEL | REMOTE_IRR {
        return compose(entry);
    }
    message(entry)
}

/// The message that an entry sends; none where it is masked.
fn message(entry: u64) -> Option<MsiMessage> {
    if entry & MASKED != 0 {
        return None;
    }
    compose(entry)
}

/// The message that an entry asks for; none where it asks for a vector from an 8259 interrupt
/// controller, which is not there.
fn compose(entry: u64) -> Option<MsiMessage> {
    if entry & DELIVERY_MODE == DELIVERY_EXTINT {
        return None;
    }
    let extended = (entry >> EXTENDED_DESTINATION_SHIFT) & EXTENDED_DESTINATION;
    let mut address = MSI_ADDRESS
        | (entry >> DESTINATION_SHIFT) << MSI_DESTINATION_SHIFT
        | extended << MSI_EXTENDED_DESTINATION_SHIFT;
    if entry & DESTINATION_LOGICAL != 0 {
        address |= MSI_DESTINATION_LOGICAL;
    }
    // Vector, delivery mode and trigger mode have the same places in an entry and in a message.
    let data = (entry & (VECTOR | DELIVERY_MODE | LEVEL)) as u32;
    Some(MsiMessage { address, data })
}

impl BusDevice for IoApic {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let value = match offset {
            REGISTER_SELECT => u32::from(self.lock().select),
            WINDOW => self.read_window(),
            _ => return,
        };
        data.fill(0);
        for (to, from) in data.iter_mut().zip(value.to_le_bytes()) {
            *to = from;
        }
    }

    fn write(&self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        let mut bytes = [0; 4];
        for (to, from) in bytes.iter_mut().zip(data) {
            *to = *from;
        }
        let value = u32::from_le_bytes(bytes);
        match offset {
            REGISTER_SELECT => self.lock().select = value as u8,
            WINDOW => self.write_window(value),
            END_OF_INTERRUPT => self.end_of_interrupt(value as u8),
            _ => {}
        }
        ControlFlow::Continue(())
    }
}

impl fmt::Debug for IoApic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("IoApic")
            .field("state", &self.state())
            .finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests;
