//! The control messages of a device with ports (virtio 1.3, section 5.3.6.2), and what the driver
//! knows because of them.
//!
//! Messages to the driver are not kept until it has room for them: each is what the driver does not
//! know yet, made when there is room. So a driver that never makes any costs nothing.

use serde::{Deserialize, Serialize};

/// Events of control messages.
const DEVICE_READY: u16 = 0;
const PORT_ADD: u16 = 1;
const PORT_READY: u16 = 3;
const CONSOLE_PORT: u16 = 4;
const RESIZE: u16 = 5;
const PORT_OPEN: u16 = 6;
const PORT_NAME: u16 = 7;

/// The bytes of a message: port, event and value.
pub(super) const MESSAGE_BYTES: usize = 8;

/// What a driver knows of a port, and has said of it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PortState {
    /// The driver was told that there is the port.
    pub added: bool,
    /// The driver has taken the port on.
    pub ready: bool,
    /// The driver was told what the port is called, and whether it is a console.
    pub introduced: bool,
    /// The driver was told that the host's end is open.
    pub host_open: bool,
    /// The driver has said that the guest's end is open.
    pub guest_open: bool,
    /// The size that the driver was told of: columns and rows.
    pub size: (u16, u16),
    /// The bytes of the next of the guest's buffers that the host has taken.
    pub taken: u64,
}

impl PortState {
    /// What a driver that begins anew knows, or of a port that it does not take on.
    fn forget(&mut self) {
        *self = Self::default();
    }
}

/// The host's side of a port, as far as the driver is to know of it.
pub(super) struct Known<'a> {
    /// `None` for the console.
    pub(super) name: Option<&'a str>,
    pub(super) open: bool,
    pub(super) size: (u16, u16),
}

/// What a message of the driver was about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Said {
    /// There may be something to tell it.
    Ask,
    /// It has opened or closed its end of this port.
    Opened(usize),
    /// Nothing.
    Nothing,
}

/// What the driver knows and has said.
#[derive(Clone, Debug, Default)]
pub(super) struct Control {
    pub(super) driver_ready: bool,
    pub(super) ports: Vec<PortState>,
}

impl Control {
    /// The driver has reset the device.
    pub(super) fn reset(&mut self) {
        self.driver_ready = false;
        self.ports.iter_mut().for_each(PortState::forget);
    }

    /// Takes a message of the driver. What makes no sense, or comes in no order, is nothing.
    pub(super) fn take(&mut self, message: [u8; MESSAGE_BYTES]) -> Said {
        let [id @ .., e0, e1, v0, v1] = message;
        let (event, value) = (u16::from_le_bytes([e0, e1]), u16::from_le_bytes([v0, v1]));
        if event == DEVICE_READY {
            match value {
                1 => self.driver_ready = true,
                _ => self.reset(),
            }
            return Said::Ask;
        }
        let index = usize::try_from(u32::from_le_bytes(id)).unwrap_or(usize::MAX);
        let Some(port) = self.ports.get_mut(index) else {
            return Said::Nothing;
        };
        match event {
            // A driver that wakes up resets the device, and takes its ports on again without a
            // word of the device: Linux does so.
            PORT_READY if value == 1 => {
                (port.added, port.ready) = (true, true);
                self.driver_ready = true;
                Said::Ask
            }
            PORT_READY if port.added => {
                port.ready = false;
                Said::Ask
            }
            PORT_OPEN if port.ready => {
                port.guest_open = value != 0;
                Said::Opened(index)
            }
            _ => Said::Nothing,
        }
    }

    /// The next thing to tell the driver, as the bytes of a message; it is known as soon as the
    /// [`Told`] is given back.
    pub(super) fn next<'a>(
        &self,
        mut known: impl FnMut(usize) -> Known<'a>,
    ) -> Option<(Vec<u8>, Told)> {
        if !self.driver_ready {
            return None;
        }
        for (index, port) in self.ports.iter().enumerate() {
            if !port.added {
                return Some((message(index, PORT_ADD, 0), Told(index, What::Added)));
            }
            if !port.ready {
                continue;
            }
            let known = known(index);
            if !port.introduced {
                let bytes = match known.name {
                    None => message(index, CONSOLE_PORT, 1),
                    Some(name) => {
                        let mut bytes = message(index, PORT_NAME, 1);
                        bytes.extend(name.as_bytes());
                        bytes
                    }
                };
                return Some((bytes, Told(index, What::Introduced)));
            }
            if port.host_open != known.open {
                let bytes = message(index, PORT_OPEN, known.open.into());
                return Some((bytes, Told(index, What::Open(known.open))));
            }
            if known.name.is_none() && port.size != known.size {
                let (columns, rows) = known.size;
                let mut bytes = message(index, RESIZE, 0);
                // As the specification says. Linux read the rows first for years, and Debian's 6.1
                // and 6.12 of today do not any more.
                bytes.extend(columns.to_le_bytes());
                bytes.extend(rows.to_le_bytes());
                return Some((bytes, Told(index, What::Size(known.size))));
            }
        }
        None
    }

    /// The driver has the message.
    pub(super) fn told(&mut self, Told(index, what): Told) {
        let Some(port) = self.ports.get_mut(index) else {
            return;
        };
        match what {
            What::Added => port.added = true,
            What::Introduced => port.introduced = true,
            What::Open(open) => port.host_open = open,
            What::Size(size) => port.size = size,
        }
    }
}

/// What a message tells of a port.
#[derive(Debug)]
pub(super) struct Told(usize, What);

#[derive(Debug)]
enum What {
    Added,
    Introduced,
    Open(bool),
    Size((u16, u16)),
}

fn message(port: usize, event: u16, value: u16) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(MESSAGE_BYTES);
    bytes.extend((port as u32).to_le_bytes());
    bytes.extend(event.to_le_bytes());
    bytes.extend(value.to_le_bytes());
    bytes
}
