//! What is done with the queues, on the I/O thread.
//!
//! A chain that the host has taken a part of stays in its queue, and how much was taken is kept: so
//! a pause in the middle of it loses nothing, and a turn on a queue does a bounded part of it.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_memory::gather_into;
use kiln_virtio_device::{Chain, QueueError, QueueHandler, Turn};
use tracing::Span;
use vmm_sys_util::eventfd::EventFd;

use super::ConsoleSize;
use super::control::{Control, Known, MESSAGE_BYTES, Said};
use super::device::{MAX_PORTS, MULTIPORT};
use super::port::{CLIENT, Change, HANGUP, HostEnd, INPUT, OUTPUT, TOKENS};
use crate::console::{CHUNK, Read, Written, log_end};
use crate::rate_limit::Timer;

/// How long a console may take nothing before what the guest sends there is dropped.
pub const BLOCKED_PATIENCE: Duration = Duration::from_secs(10);
/// How long a listening socket is left alone that gave no client.
const RETRY: Duration = Duration::from_secs(1);
/// The bytes that a turn on a queue writes.
const TURN_BYTES: usize = 256 << 10;

const CONTROL_RECEIVE: u16 = 2;
const CONTROL_TRANSMIT: u16 = 3;

/// Tokens, behind those of the ports.
const FIRST_TOKEN: u32 = ConsoleHandler::FIRST_TOKEN;
const WAKE: u32 = FIRST_TOKEN + TOKENS * MAX_PORTS as u32;
const BLOCKED: u32 = WAKE + 1;
const LISTEN: u32 = WAKE + 2;

/// The first token of a port.
pub(super) const fn first_token(port: usize) -> u32 {
    FIRST_TOKEN + TOKENS * port as u32
}

/// What a queue is for (virtio 1.3, section 5.3.2).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Role {
    Receive(usize),
    Transmit(usize),
    ControlReceive,
    ControlTransmit,
}

impl Role {
    fn of(index: u16) -> Self {
        let port = match index {
            CONTROL_RECEIVE => return Self::ControlReceive,
            CONTROL_TRANSMIT => return Self::ControlTransmit,
            0 | 1 => 0,
            _ => usize::from(index / 2 - 1),
        };
        if index.is_multiple_of(2) {
            Self::Receive(port)
        } else {
            Self::Transmit(port)
        }
    }
}

fn receive_queue(port: usize) -> u16 {
    match port {
        0 => 0,
        _ => 2 * (port as u16 + 1),
    }
}

/// Whether the console takes what the guest sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Flow {
    Goes,
    /// It takes nothing since a while.
    Stands,
    /// It has taken nothing for too long.
    Dropped,
}

/// What lives on the I/O thread.
pub(super) struct ConsoleHandler {
    pub(super) ends: Vec<HostEnd>,
    pub(super) control: Control,
    size: ConsoleSize,
    multiport: bool,
    /// Written when [`pending`](Self::pending) has queues, and when the size has changed.
    wake: Arc<EventFd>,
    /// The queues to be processed, a bit each.
    pending: u64,
    /// The queues that are worked on, a bit each.
    active: u64,
    flow: Flow,
    pub(super) patience: Duration,
    blocked: Timer,
    listen: Timer,
    buffer: Box<[u8]>,
    warned: bool,
    span: Span,
}

impl ConsoleHandler {
    pub(super) fn new(
        ends: Vec<HostEnd>,
        control: Control,
        size: ConsoleSize,
        wake: Arc<EventFd>,
    ) -> io::Result<Self> {
        Ok(Self {
            ends,
            control,
            size,
            multiport: false,
            wake,
            pending: 0,
            active: 0,
            flow: Flow::Goes,
            patience: BLOCKED_PATIENCE,
            blocked: Timer::new()?,
            listen: Timer::new()?,
            buffer: vec![0; CHUNK].into(),
            warned: false,
            span: Span::none(),
        })
    }

    /// The work is to begin on these queues, a bit each. What was taken of a chain is forgotten with
    /// the queue that it was in.
    pub(super) fn set_active(&mut self, queues: u64) {
        self.active = queues;
        for (port, (state, end)) in (0..).zip(self.control.ports.iter_mut().zip(&mut self.ends)) {
            if queues & (1 << (receive_queue(port) + 1)) == 0 {
                state.taken = 0;
                end.drop_pending = false;
            }
        }
    }

    /// Has a queue processed soon.
    fn nudge(&mut self, queue: u16) {
        self.pending |= 1 << queue;
        let _ = self.wake.write(1);
    }

    /// Warns of what may happen again and again, once.
    fn warn(&mut self, message: &dyn Fn() -> String) {
        if !std::mem::replace(&mut self.warned, true) {
            let _in_span = self.span.enter();
            tracing::warn!("{}", message());
        }
    }

    /// Gives the guest what the host sends.
    fn receive(
        &mut self,
        port: usize,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        let (Some(end), Some(state)) = (self.ends.get_mut(port), self.control.ports.get(port))
        else {
            return Ok(());
        };
        if self.multiport && !state.guest_open {
            // A driver throws away what comes for a port that nobody has open.
            end.input.rest(registrar);
            end.input_ready = false;
            return Ok(());
        }
        while let Some(mut chain) = turn.pop()? {
            let len = chain.writable.len().min(CHUNK);
            if len == 0 {
                turn.complete(chain, 0)?;
                continue;
            }
            let ready = std::mem::take(&mut end.input_ready);
            match end.input.read(&mut self.buffer[..len], ready, registrar) {
                Read::Bytes(len) => {
                    chain.writable.write(&self.buffer[..len])?;
                    turn.complete(chain, len as u32)?;
                }
                Read::Later | Read::Closed => {
                    turn.put_back(chain);
                    return Ok(());
                }
                Read::Ended(error) => {
                    turn.put_back(chain);
                    if let Some(error) = error {
                        let _in_span = self.span.enter();
                        tracing::debug!("{} ends: {error}", end.what("input"));
                    }
                    self.nudge(CONTROL_RECEIVE);
                    return Ok(());
                }
            }
        }
        end.input.rest(registrar);
        end.input_ready = false;
        Ok(())
    }

    /// Takes the next chain, without what was taken of it before.
    fn pop<'m>(&mut self, port: usize, turn: &mut Turn<'m>) -> Result<Next<'m>, QueueError> {
        let Some(mut chain) = turn.pop()? else {
            return Ok(None);
        };
        let state = self.control.ports.get_mut(port);
        let taken = state.map_or(0, |state| std::mem::take(&mut state.taken));
        let taken = usize::try_from(taken).unwrap_or(usize::MAX);
        if taken > 0 && chain.readable.skip(taken).is_err() {
            // A driver that makes a chain shorter meanwhile has nothing more to say.
            chain.readable.clear();
        }
        Ok(Some((chain, taken)))
    }

    /// Puts back a chain of which `taken` bytes were taken.
    fn put_back<'m>(&mut self, port: usize, chain: Chain<'m>, taken: usize, turn: &mut Turn<'m>) {
        if let Some(state) = self.control.ports.get_mut(port) {
            state.taken = taken as u64;
        }
        turn.put_back(chain);
    }

    /// Gives the host what the guest sends.
    fn transmit(
        &mut self,
        port: usize,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        if port >= self.ends.len() {
            return Ok(());
        }
        if self.ends[port].output_ready {
            self.flows(port)?;
        }
        let mut left = TURN_BYTES;
        while let Some((mut chain, mut taken)) = self.pop(port, turn)? {
            loop {
                let end = &mut self.ends[port];
                let dropped = port == 0 && self.flow == Flow::Dropped;
                let len = chain.readable.len().min(end.output.chunk());
                if len == 0 || dropped {
                    break;
                }
                if left == 0 {
                    self.put_back(port, chain, taken, turn);
                    turn.give_way();
                    return Ok(());
                }
                let bytes = &mut self.buffer[..len];
                gather_into(bytes, chain.readable.slices().iter().copied());
                let last = len == chain.readable.len();
                let ready = std::mem::take(&mut end.output_ready);
                match end.output.write(bytes, last, ready, registrar) {
                    Written::Bytes(len) => {
                        chain.readable.skip(len)?;
                        taken += len;
                        left = left.saturating_sub(len);
                        self.flows(port)?;
                    }
                    Written::Later => {
                        self.put_back(port, chain, taken, turn);
                        return Ok(self.stands(port)?);
                    }
                    Written::Ended(error) => {
                        let what = end.what("output");
                        self.span.in_scope(|| log_end(&what, &error));
                        self.flows(port)?;
                        self.nudge(CONTROL_RECEIVE);
                        break;
                    }
                    Written::Closed => break,
                }
            }
            turn.complete(chain, 0)?;
        }
        if port != 0 || self.flow != Flow::Dropped {
            // Else its readiness is to say that it takes something again.
            self.ends[port].output.rest(registrar);
            self.ends[port].output_ready = false;
            // Nothing waits for it, so it does not hold anything up.
            self.flows(port)?;
        }
        if std::mem::take(&mut self.ends[port].drop_pending) {
            // The next client can come.
            self.nudge(CONTROL_RECEIVE);
        }
        Ok(())
    }

    /// The host has taken something.
    fn flows(&mut self, port: usize) -> io::Result<()> {
        if port == 0 && std::mem::replace(&mut self.flow, Flow::Goes) != Flow::Goes {
            self.blocked.clear()?;
        }
        Ok(())
    }

    /// The host takes nothing at the moment.
    fn stands(&mut self, port: usize) -> io::Result<()> {
        if port == 0 && self.flow == Flow::Goes {
            self.flow = Flow::Stands;
            self.blocked.set(self.patience)?;
        }
        Ok(())
    }

    /// Tells the driver what it does not know yet.
    fn control_receive(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        loop {
            self.look_after_ports(registrar)?;
            let (ends, size) = (&self.ends, self.size.get());
            let news = self.control.next(|index| Known {
                name: ends.get(index).and_then(|end| end.name.as_deref()),
                open: ends.get(index).is_some_and(HostEnd::is_open),
                size,
            });
            let Some((bytes, told)) = news else {
                return Ok(());
            };
            let Some(mut chain) = turn.pop()? else {
                return Ok(());
            };
            chain.writable.write(&bytes)?;
            turn.complete(chain, bytes.len() as u32)?;
            self.control.told(told);
        }
    }

    fn look_after_ports(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        for port in 0..self.ends.len() {
            // A client has the port only when the driver knows that the one before has gone.
            let driver_knows = !self.control.ports[port].host_open;
            let transmit = receive_queue(port) + 1;
            let end = &mut self.ends[port];
            let had_output = end.output.is_open();
            end.look_after_connection(registrar)?;
            if had_output && !end.output.is_open() && self.active & (1 << transmit) != 0 {
                // What waits for the one that has gone is not for the next.
                end.drop_pending = true;
                self.nudge(transmit);
            }
            let end = &mut self.ends[port];
            match end.look_after(driver_knows, registrar)? {
                Change::None => {}
                Change::Connected => self.nudge(receive_queue(port)),
                Change::Failed(error) => {
                    let what = end.what("socket");
                    self.warn(&|| format!("take a client of {what}: {error}"));
                    self.listen.set(RETRY)?;
                }
            }
        }
        Ok(())
    }

    /// Takes what the driver says.
    fn control_transmit(&mut self, turn: &mut Turn<'_>) -> Result<(), QueueError> {
        while let Some(mut chain) = turn.pop()? {
            let mut message = [0; MESSAGE_BYTES];
            // What is too short for a message is none.
            if chain.readable.read(&mut message).is_ok() {
                match self.control.take(message) {
                    Said::Ask => self.nudge(CONTROL_RECEIVE),
                    Said::Opened(port) => self.nudge(receive_queue(port)),
                    Said::Nothing => {}
                }
            }
            turn.complete(chain, 0)?;
        }
        Ok(())
    }
}

/// A chain, and how much of it was taken before.
type Next<'m> = Option<(Chain<'m>, usize)>;

impl QueueHandler for ConsoleHandler {
    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.multiport = features & MULTIPORT != 0;
        self.span = Span::current();
        self.flow = Flow::Goes;
        self.ends.iter_mut().for_each(HostEnd::start);
        for port in 0..self.ends.len() {
            if self.ends[port].drop_pending {
                self.nudge(receive_queue(port) + 1);
            }
        }
        registrar.add(&*self.wake, WAKE, EventSet::IN)?;
        for (timer, token) in [(&mut self.blocked, BLOCKED), (&mut self.listen, LISTEN)] {
            timer.clear()?;
            registrar.add(timer, token, EventSet::IN)?;
        }
        Ok(())
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        match Role::of(turn.index()) {
            Role::Receive(0) => self.receive(0, turn, registrar),
            Role::Transmit(0) => self.transmit(0, turn, registrar),
            _ if !self.multiport => Ok(()),
            Role::Receive(port) => self.receive(port, turn, registrar),
            Role::Transmit(port) => self.transmit(port, turn, registrar),
            Role::ControlReceive => self.control_receive(turn, registrar),
            Role::ControlTransmit => self.control_transmit(turn),
        }
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        match event.token {
            WAKE => {
                let _ = self.wake.read();
                let resized = self.control.ports.first().map(|port| port.size);
                if self.multiport && resized != Some(self.size.get()) {
                    self.pending |= 1 << CONTROL_RECEIVE;
                }
                let queue = self.pending.trailing_zeros();
                self.pending &= self.pending.wrapping_sub(1);
                if self.pending != 0 {
                    let _ = self.wake.write(1);
                }
                u16::try_from(queue).ok().filter(|queue| *queue < 64)
            }
            BLOCKED => {
                let _ = self.blocked.clear();
                if self.flow != Flow::Stands {
                    // It has taken something since the time was up.
                    return None;
                }
                self.flow = Flow::Dropped;
                self.warn(&|| {
                    "the console takes nothing: what the guest sends there is dropped".to_owned()
                });
                Some(receive_queue(0) + 1)
            }
            LISTEN => {
                let _ = self.listen.clear();
                Some(CONTROL_RECEIVE)
            }
            token => {
                let token = token.checked_sub(FIRST_TOKEN)?;
                let port = usize::try_from(token / TOKENS).ok()?;
                let end = self.ends.get_mut(port)?;
                match token % TOKENS {
                    INPUT => end.input_ready = true,
                    OUTPUT => end.output_ready = true,
                    HANGUP => end.hung_up(),
                    CLIENT => end.client_came(),
                    _ => return None,
                }
                Some(match token % TOKENS {
                    INPUT => receive_queue(port),
                    OUTPUT => receive_queue(port) + 1,
                    _ => CONTROL_RECEIVE,
                })
            }
        }
    }

    /// Gives the host what it takes at once of what the guest has sent last.
    fn drain(&mut self, turn: &mut Turn<'_>) {
        let Role::Transmit(port) = Role::of(turn.index()) else {
            return;
        };
        if port >= self.ends.len() || (port > 0 && !self.multiport) {
            return;
        }
        let mut left = TURN_BYTES;
        while let Ok(Some((mut chain, mut taken))) = self.pop(port, turn) {
            let output = &mut self.ends[port].output;
            while !chain.readable.is_empty() && output.is_open() {
                let len = chain.readable.len().min(output.chunk()).min(left);
                let bytes = &mut self.buffer[..len];
                gather_into(bytes, chain.readable.slices().iter().copied());
                let len = if len == 0 {
                    0
                } else {
                    output.write_at_once(bytes)
                };
                if len == 0 || chain.readable.skip(len).is_err() {
                    self.put_back(port, chain, taken, turn);
                    return;
                }
                taken += len;
                left -= len;
            }
            if turn.complete(chain, 0).is_err() {
                return;
            }
        }
    }
}
