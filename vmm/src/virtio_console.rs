//! The virtio console of the machine.

use std::fmt;

use kiln_devices::virtio::console::VirtioConsole as ConsoleDevice;

use crate::{BuildError, Console, ConsolePort, ConsoleSize, Transport};

/// A virtio console: `/dev/hvc0` in a Linux guest, and named ports, `/dev/virtio-ports/NAME` there.
///
/// A kernel whose driver is a module has the console once that is loaded, and shows nothing of what
/// it said before.
pub struct VirtioConsole {
    console: Console,
    ports: Vec<ConsolePort>,
    size: ConsoleSize,
    pub(crate) transport: Option<Transport>,
}

impl VirtioConsole {
    /// A console that leads to `console`, as the [serial port](crate::VmBuilder::serial) may.
    pub fn new(console: Console) -> Self {
        Self {
            console,
            ports: Vec::new(),
            size: ConsoleSize::default(),
            transport: None,
        }
    }

    /// Where the console leads, in place of what was said before.
    #[must_use]
    pub fn console(mut self, console: Console) -> Self {
        self.console = console;
        self
    }

    /// Adds a port: 15 at most, each with a name of its own.
    #[must_use]
    pub fn port(mut self, port: ConsolePort) -> Self {
        self.ports.push(port);
        self
    }

    /// The console's size, by which it can be changed while the machine runs. It is not known at
    /// first.
    pub fn size(&self) -> ConsoleSize {
        self.size.clone()
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    #[must_use]
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    pub(crate) fn into_device(self) -> Result<ConsoleDevice, BuildError> {
        Ok(ConsoleDevice::new(self.console, self.ports, self.size)?)
    }
}

impl fmt::Debug for VirtioConsole {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VirtioConsole")
            .field("console", &self.console)
            .field("ports", &self.ports)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}
