//! What lives on an I/O thread: the control queue, the host's wishes, and the interrupts of
//! transports that have to be told of each.

use std::io;
use std::sync::Arc;

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_memory::GuestMemory;
use kiln_virtio_device::{
    Activation, ActiveQueue, QueueError, QueueHandler, Turn, VirtioInterrupt,
};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::VhostError;
use super::pair::{Pair, Ring};
use crate::virtio::net::NetBackend;
use crate::virtio::net::commands::Commands;
use crate::virtio::net::shared::Shared;

pub(in crate::virtio::net) struct VhostHandler {
    pairs: Vec<Pair>,
    shared: Arc<Shared>,
    commands: Commands,
    features: u64,
    /// Written when the host changes something.
    wake: EventFd,
    /// While the device is active.
    driver: Option<Driver>,
}

/// The driver's side.
struct Driver {
    memory: Arc<GuestMemory>,
    interrupt: Arc<dyn VirtioInterrupt>,
    /// Queues that belong to no pair.
    others: Vec<ActiveQueue>,
    /// It is to reset the device, and nothing is done until then.
    has_failed: bool,
}

impl VhostHandler {
    const WAKE: u32 = Self::FIRST_TOKEN + 1;
    /// The first tokens of the queues' eventfds.
    const CALLS: u32 = Self::FIRST_TOKEN + 0x1_0000;
    const ERRORS: u32 = Self::FIRST_TOKEN + 0x2_0000;

    /// A handler of pairs of queues with these networks, each of which is another queue of a tap.
    pub(in crate::virtio::net) fn new(
        backends: impl IntoIterator<Item = Box<dyn NetBackend>>,
        shared: Arc<Shared>,
    ) -> Result<Self, VhostError> {
        let pairs = backends.into_iter().map(Pair::new);
        let pairs = pairs.collect::<Result<Vec<_>, _>>()?;
        let failed = |source| VhostError::Request {
            what: "make an eventfd",
            source,
        };
        let wake = EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK).map_err(failed)?;
        shared.wake_by(wake.try_clone().map_err(failed)?);
        Ok(Self {
            pairs,
            shared,
            commands: Commands::default(),
            features: 0,
            wake,
            driver: None,
        })
    }

    /// Takes the queues of an activation that the kernel works on: all but the control queue, which
    /// is left there.
    pub(in crate::virtio::net) fn take(
        &mut self,
        commands: Commands,
        activation: &mut Activation,
    ) -> io::Result<()> {
        let control = commands.queue;
        self.commands = commands;
        let mut driver = Driver {
            memory: Arc::clone(&activation.memory),
            interrupt: Arc::clone(&activation.interrupt),
            others: Vec::new(),
            has_failed: false,
        };
        let mut result = Ok(());
        for queue in std::mem::take(&mut activation.queues) {
            if queue.index == control {
                activation.queues.push(queue);
                continue;
            }
            match self.pairs.get_mut(usize::from(queue.index / 2)) {
                Some(pair) if queue.index < control => match Ring::new(queue, &*driver.interrupt) {
                    Ok(ring) => pair.put(ring),
                    Err((queue, error)) => {
                        driver.others.push(queue);
                        result = Err(error);
                    }
                },
                // The driver has enabled a queue that it did not agree on.
                _ => driver.others.push(queue),
            }
        }
        self.driver = Some(driver);
        result
    }

    /// Gives back what it took, and nobody works on it any more.
    pub(in crate::virtio::net) fn stop(&mut self) -> Vec<ActiveQueue> {
        let Some(mut driver) = self.driver.take() else {
            return Vec::new();
        };
        let mut queues = std::mem::take(&mut driver.others);
        for pair in &mut self.pairs {
            queues.extend(pair.stop(&driver.memory, &*driver.interrupt));
        }
        queues
    }

    /// Has every pair follow what the driver and the host have set.
    fn follow(&mut self) -> Result<(), VhostError> {
        let Some(driver) = self.driver.as_ref().filter(|driver| !driver.has_failed) else {
            return Ok(());
        };
        for (pair, index) in self.pairs.iter_mut().zip(0..) {
            let view = self.shared.view(index, self.features);
            pair.follow(&view, &driver.memory, &*driver.interrupt)?;
        }
        Ok(())
    }

    /// The same, where the driver has to begin anew if it can't be.
    fn follow_or_fail(&mut self) {
        if let Err(error) = self.follow() {
            self.fail(&error);
        }
    }

    fn fail(&mut self, reason: &dyn std::fmt::Display) {
        for pair in &mut self.pairs {
            // Where that fails nothing more can be done.
            let _ = pair.halt();
        }
        if let Some(driver) = &mut self.driver {
            driver.has_failed = true;
            driver.interrupt.needs_reset(reason);
        }
    }

    fn ring(&self, index: u32) -> Option<&Ring> {
        let mut rings = self.pairs.iter().flat_map(Pair::rings);
        rings.find(|ring| u32::from(ring.active.index) == index)
    }
}

impl QueueHandler for VhostHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.features = features;
        let Some(driver) = &self.driver else {
            return Ok(());
        };
        registrar.add(&self.wake, Self::WAKE, EventSet::IN)?;
        for ring in self.pairs.iter().flat_map(Pair::rings) {
            let index = u32::from(ring.active.index);
            registrar.add(&ring.error, Self::ERRORS + index, EventSet::IN)?;
            if ring.is_relayed {
                registrar.add(&ring.call, Self::CALLS + index, EventSet::IN)?;
            }
        }
        for pair in &mut self.pairs {
            pair.prepare(&driver.memory, features)
                .map_err(io::Error::other)?;
        }
        self.follow().map_err(io::Error::other)
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        let Some(first) = self.pairs.first_mut() else {
            return Ok(());
        };
        let backend = &mut *first.backend;
        self.commands
            .process(&self.shared, self.features, backend, turn)?;
        self.follow_or_fail();
        Ok(())
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        match event.token {
            Self::WAKE => {
                let _ = self.wake.read();
                self.follow_or_fail();
            }
            token if token >= Self::ERRORS => {
                let index = token - Self::ERRORS;
                if self
                    .ring(index)
                    .is_some_and(|ring| ring.error.read().is_ok())
                {
                    self.fail(&format_args!(
                        "queue {index}: the kernel cannot follow its rings or buffers"
                    ));
                }
            }
            token => {
                if let (Some(ring), Some(driver)) = (self.ring(token - Self::CALLS), &self.driver) {
                    ring.relay(&*driver.interrupt);
                }
            }
        }
        None
    }
}
