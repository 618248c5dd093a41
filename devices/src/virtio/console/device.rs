//! The device: what it offers, its configuration, and its state.

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use kiln_virtio_device::{
    ActivateError, Activation, ActiveQueue, VirtioDevice, Worker, read_config_bytes,
};
use serde::{Deserialize, Serialize};
use virtio_bindings::virtio_ids::VIRTIO_ID_CONSOLE;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::control::Control;
use super::handler::{ConsoleHandler, first_token};
use super::port::HostEnd;
use super::size::Listener;
use super::{ConsoleSize, Port, PortState};
use crate::console::Console;

/// Feature bits (virtio 1.3, section 5.3.3).
const SIZE: u64 = 1 << 0;
pub(super) const MULTIPORT: u64 = 1 << 1;

/// The most ports, the console among them.
pub(super) const MAX_PORTS: usize = 16;
const QUEUE_SIZE: u16 = 64;
/// Two for each port, and two for control messages.
const MAX_QUEUES: usize = 2 * MAX_PORTS + 2;

/// The configuration (virtio 1.3, section 5.3.4): columns and rows, the number of ports, and a word
/// for emergencies that is not offered.
const CONFIG_BYTES: usize = 12;

/// Why a console device could not be made.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VirtioConsoleError {
    /// The name is not one that a port can have.
    #[error(
        "name a port of the console {name:?}: a name has 1 to {max} printable ASCII characters, none \
         of them a blank or a slash"
    )]
    Name {
        /// What was given.
        name: String,
        /// The most characters.
        max: usize,
    },
    /// Two ports have the same name.
    #[error("name a port of the console `{name}`: there is another port of that name")]
    Twice {
        /// The name.
        name: String,
    },
    /// There are too many ports.
    #[error("give the console port `{name}`: it has room for {max} ports")]
    Count {
        /// The first port that is too many.
        name: String,
        /// How many there can be.
        max: usize,
    },
    /// There is something where a port's socket was to be.
    #[error("listen on Unix socket `{}` for a port: there is something of that name", path.display())]
    PathExists {
        /// The path.
        path: PathBuf,
    },
    /// A port's socket cannot be made.
    #[error("listen on Unix socket `{}` for a port", path.display())]
    Listen {
        /// The path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A port's socket cannot be used.
    #[error("use the socket of port `{name}`")]
    Socket {
        /// The port.
        name: String,
        /// What the system said.
        source: io::Error,
    },
    /// There is no eventfd, or no timer.
    #[error("create an eventfd and timers for the console")]
    EventFd(#[source] io::Error),
    /// The state is that of a device with other ports.
    #[error("restore a console of {ports} ports: the state is that of one with {found}")]
    State {
        /// The ports of the device, the console among them.
        ports: usize,
        /// Those of the state.
        found: usize,
    },
}

/// The state of a [`VirtioConsole`], besides that of its transport: what the driver knows.
///
/// What is at the host's ends is not a part of it. They may be others when it is restored: the
/// driver is told of what has changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VirtioConsoleState {
    /// The driver has said that it works with ports.
    pub driver_ready: bool,
    /// The ports, with the console as the first.
    pub ports: Vec<PortState>,
    /// The size of the console: columns and rows.
    pub size: (u16, u16),
}

/// A virtio console device: a console, and named ports.
pub struct VirtioConsole {
    worker: Worker<ConsoleHandler>,
    size: ConsoleSize,
    wake: Arc<EventFd>,
    /// The console among them.
    ports: usize,
}

impl VirtioConsole {
    /// A device whose console leads to `console` and has this `size`, with these `ports` besides.
    ///
    /// # Errors
    ///
    /// [`VirtioConsoleError`] where the ports cannot be, or the system refuses something.
    pub fn new(
        console: Console,
        ports: Vec<Port>,
        size: ConsoleSize,
    ) -> Result<Self, VirtioConsoleError> {
        let control = Control {
            driver_ready: false,
            ports: vec![PortState::default(); ports.len() + 1],
        };
        Self::with_control(console, ports, size, control)
    }

    /// The device as it was when `state` was taken, with ports of the same names. The `size` becomes
    /// that of the state, unless it has one already.
    ///
    /// # Errors
    ///
    /// [`VirtioConsoleError::State`] where the state has another number of ports, and those of
    /// [`new`](Self::new).
    pub fn from_state(
        console: Console,
        ports: Vec<Port>,
        size: ConsoleSize,
        state: &VirtioConsoleState,
    ) -> Result<Self, VirtioConsoleError> {
        if state.ports.len() != ports.len() + 1 {
            return Err(VirtioConsoleError::State {
                ports: ports.len() + 1,
                found: state.ports.len(),
            });
        }
        if size.get() == (0, 0) {
            size.set(state.size.0, state.size.1);
        }
        let control = Control {
            driver_ready: state.driver_ready,
            ports: state.ports.clone(),
        };
        Self::with_control(console, ports, size, control)
    }

    fn with_control(
        console: Console,
        ports: Vec<Port>,
        size: ConsoleSize,
        control: Control,
    ) -> Result<Self, VirtioConsoleError> {
        check(&ports)?;
        let mut ends = vec![HostEnd::console(console, first_token(0))];
        for (index, port) in (1..).zip(ports) {
            ends.push(HostEnd::port(port, first_token(index))?);
        }
        let wake = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(VirtioConsoleError::EventFd)?;
        let wake = Arc::new(wake);
        let ports = ends.len();
        let handler = ConsoleHandler::new(ends, control, size.clone(), Arc::clone(&wake))
            .map_err(VirtioConsoleError::EventFd)?;
        Ok(Self {
            worker: Worker::new(handler),
            size,
            wake,
            ports,
        })
    }

    /// The state, for [`from_state`](Self::from_state); `None` while the device works on its queues.
    pub fn state(&mut self) -> Option<VirtioConsoleState> {
        let control = &self.worker.handler_mut()?.control;
        Some(VirtioConsoleState {
            driver_ready: control.driver_ready,
            ports: control.ports.clone(),
            size: self.size.get(),
        })
    }

    /// Changes how long the console may take nothing.
    #[cfg(test)]
    pub(super) fn set_patience(&mut self, patience: std::time::Duration) {
        self.worker.handler_mut().unwrap().patience = patience;
    }

    fn has_ports(&self) -> bool {
        self.ports > 1
    }
}

/// Checks names and number of the ports that are not the console.
fn check(ports: &[Port]) -> Result<(), VirtioConsoleError> {
    let mut names = BTreeSet::new();
    for (index, port) in (1..).zip(ports) {
        port.check()?;
        let name = port.name.clone();
        if index >= MAX_PORTS {
            return Err(VirtioConsoleError::Count {
                name,
                max: MAX_PORTS - 1,
            });
        }
        if !names.insert(&port.name) {
            return Err(VirtioConsoleError::Twice { name });
        }
    }
    Ok(())
}

impl VirtioDevice for VirtioConsole {
    fn device_type(&self) -> u32 {
        VIRTIO_ID_CONSOLE
    }

    /// A device that has nothing but its console is as simple as can be.
    fn features(&self) -> u64 {
        if self.has_ports() {
            SIZE | MULTIPORT
        } else {
            SIZE
        }
    }

    fn queue_max_sizes(&self) -> &[u16] {
        const SIZES: [u16; MAX_QUEUES] = [QUEUE_SIZE; MAX_QUEUES];
        let queues = if self.has_ports() {
            2 * self.ports + 2
        } else {
            2
        };
        &SIZES[..queues]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        let mut config = [0; CONFIG_BYTES];
        let (columns, rows) = self.size.get();
        config[0..2].copy_from_slice(&columns.to_le_bytes());
        config[2..4].copy_from_slice(&rows.to_le_bytes());
        if self.has_ports() {
            config[4..8].copy_from_slice(&(self.ports as u32).to_le_bytes());
        }
        read_config_bytes(&config, offset, data);
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        let listener = if activation.features & MULTIPORT != 0 {
            Listener::Handler(Arc::clone(&self.wake))
        } else {
            Listener::Driver(Arc::clone(&activation.interrupt))
        };
        if let Some(handler) = self.worker.handler_mut() {
            let queues = activation.queues.iter().filter(|queue| queue.index < 64);
            handler.set_active(queues.fold(0, |set, queue| set | 1 << queue.index));
        }
        self.worker.activate(activation)?;
        self.size.connect(listener);
        Ok(())
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        self.size.disconnect();
        self.worker.deactivate()
    }

    /// A driver that begins anew knows no ports, and has opened none.
    fn reset(&mut self) {
        if let Some(handler) = self.worker.handler_mut() {
            handler.control.reset();
            handler.set_active(0);
        }
    }
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole")
            .field("ports", &self.ports)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}
