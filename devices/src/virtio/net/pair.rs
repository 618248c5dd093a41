//! What lives on an I/O thread: a pair of queues, and with the first one the control queue.

use std::io;
use std::sync::Arc;

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_virtio_device::{QueueError, QueueHandler, Turn};

use super::NetBackend;
use super::commands::Commands;
use super::counters::add;
use super::features::{self, GUEST_CSUM, MRG_RXBUF};
use super::receive::{ReceiveMode, Receiver, Wait};
use super::shared::{Shared, View};
use super::transmit::{drop_all, transmit};
use crate::rate_limit::Throttle;

/// Called with the reason when the network fails.
pub(super) type OnFailure = Box<dyn Fn(&str) + Send>;

/// What a queue is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive,
    Transmit,
    Control,
    /// The driver has enabled a queue that it did not agree on.
    None,
}

pub(super) struct PairHandler {
    /// Which pair it is.
    pair: u16,
    backend: Box<dyn NetBackend>,
    receiver: Receiver,
    shared: Arc<Shared>,
    /// Of the first pair only.
    pub(super) commands: Option<Commands>,
    pub(super) on_failure: Option<OnFailure>,
    features: u64,
    view: View,
    /// The generation that the view is of.
    seen: u32,
    /// Packets from the network are waited for.
    watched: bool,
    rx_throttle: Throttle,
    tx_throttle: Throttle,
    /// What the driver was told last of the network's being there.
    network_up: bool,
}

impl PairHandler {
    /// The token of what says that there is room for packets to be sent.
    const ROOM: u32 = Self::FIRST_TOKEN + 1;
    /// The tokens of the timers of limits.
    const RX_LIMIT: u32 = Self::FIRST_TOKEN + 2;
    const TX_LIMIT: u32 = Self::FIRST_TOKEN + 3;

    pub(super) fn new(
        pair: u16,
        backend: Box<dyn NetBackend>,
        shared: Arc<Shared>,
    ) -> Result<Self, kiln_memory::Error> {
        Ok(Self {
            pair,
            backend,
            receiver: Receiver::new()?,
            shared,
            commands: (pair == 0).then(Commands::default),
            on_failure: None,
            features: 0,
            view: View::unknown(),
            seen: 0,
            watched: false,
            rx_throttle: Throttle::new(Self::RX_LIMIT),
            tx_throttle: Throttle::new(Self::TX_LIMIT),
            network_up: true,
        })
    }

    /// The driver is about to use the device, and not this pair of queues.
    pub(super) fn rest(&mut self) {
        if self.backend.set_enabled(false).is_err() {
            add(&self.shared.counters.rx_errors, 1);
        }
    }

    fn role(&self, queue: u16) -> Role {
        let control = self.commands.as_ref().map(|commands| commands.queue);
        if control == Some(queue) {
            Role::Control
        } else if queue == 2 * self.pair {
            Role::Receive
        } else if queue == 2 * self.pair + 1 {
            Role::Transmit
        } else {
            Role::None
        }
    }

    /// Looks at what was changed, by the driver's commands or by the host, and follows it.
    fn look(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        let generation = self.shared.generation();
        if generation == self.seen {
            return Ok(());
        }
        // Read first: what changes meanwhile is seen the next time.
        self.seen = generation;
        let mut view = self.shared.view(self.pair, self.features);
        if view.enabled != self.view.enabled {
            if !view.enabled {
                self.wait(Wait::Buffers, registrar)?;
            }
            if self.backend.set_enabled(view.enabled).is_err() {
                add(&self.shared.counters.rx_errors, 1);
                view.enabled = false;
            }
        }
        if view.enabled && view.offloads != self.view.offloads {
            let offloads = features::guest_offloads(view.offloads);
            if self.backend.set_offloads(offloads).is_err() {
                add(&self.shared.counters.rx_errors, 1);
            }
        }
        self.view = view;
        Ok(())
    }

    /// Tells the driver when the network goes and comes.
    fn follow_network(&mut self) {
        let failure = self.backend.failure();
        if self.pair != 0 || self.network_up == failure.is_none() {
            return;
        }
        self.network_up = failure.is_none();
        match failure {
            Some(reason) => {
                tracing::warn!("the link is down: {reason}");
                if let Some(on_failure) = &self.on_failure {
                    on_failure(reason);
                }
            }
            None => tracing::info!("the link is up again"),
        }
        self.shared.set_network(self.network_up);
    }

    /// Waits for packets only while the driver has buffers for them: a network that is ready and
    /// not read would keep the thread busy.
    fn wait(&mut self, wait: Wait, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        let watch = wait == Wait::Packets;
        if watch != self.watched {
            let fd = self.backend.readiness();
            if watch {
                registrar.add(&fd, Self::FIRST_TOKEN, EventSet::IN)?;
            } else {
                registrar.remove(&fd)?;
            }
            self.watched = watch;
        }
        Ok(())
    }

    fn receive(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        while self.view.enabled {
            let view = (&self.view, self.seen);
            let backend = &mut *self.backend;
            let (shared, throttle) = (&self.shared, &mut self.rx_throttle);
            let may_go_on = || {
                let throttled = &shared.counters.rx_throttled;
                throttle.may_some(&shared.rate_limits.rx, throttled, registrar)
            };
            let receiver = &mut self.receiver;
            let wait = receiver.receive(backend, shared, view, turn, may_go_on)?;
            if wait != Wait::View {
                return Ok(self.wait(wait, registrar)?);
            }
            self.look(registrar)?;
        }
        Ok(())
    }
}

impl QueueHandler for PairHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.watched = false;
        self.rx_throttle.start();
        self.tx_throttle.start();
        self.features = features;
        self.receiver.start(ReceiveMode {
            mergeable: features & MRG_RXBUF != 0,
            flags: features & GUEST_CSUM != 0,
        });
        if let Some(fd) = self.backend.send_readiness() {
            registrar.add(&fd, Self::ROOM, EventSet::IN)?;
        }
        self.seen = self.shared.generation();
        self.view = self.shared.view(self.pair, features);
        self.backend.set_enabled(self.view.enabled)?;
        if !self.view.enabled {
            return Ok(());
        }
        let offloads = features::guest_offloads(self.view.offloads);
        self.backend.set_offloads(offloads)
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        self.look(registrar)?;
        match self.role(turn.index()) {
            Role::Receive => self.receive(turn, registrar)?,
            Role::Transmit if self.view.enabled && self.view.link_up => {
                let (shared, throttle) = (&self.shared, &mut self.tx_throttle);
                let may_go_on = || {
                    let throttled = &shared.counters.tx_throttled;
                    throttle.may_some(&shared.rate_limits.tx, throttled, registrar)
                };
                transmit(&mut *self.backend, shared, turn, may_go_on)?;
            }
            Role::Transmit => drop_all(&self.shared.counters, turn)?,
            Role::Control => {
                if let Some(commands) = &self.commands {
                    commands.process(&self.shared, self.features, &mut *self.backend, turn)?;
                }
            }
            Role::None => {}
        }
        self.follow_network();
        Ok(())
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        match event.token {
            Self::RX_LIMIT => self.rx_throttle.woken(),
            Self::TX_LIMIT => self.tx_throttle.woken(),
            _ => {}
        }
        if event.token == Self::ROOM {
            // Here, since the driver need not have enabled the queue.
            self.backend.flush();
        }
        let transmit = matches!(event.token, Self::ROOM | Self::TX_LIMIT);
        Some(2 * self.pair + u16::from(transmit))
    }
}
