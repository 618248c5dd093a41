//! What lives on the I/O thread: the listening socket, its clients, and the connections.
//!
//! Sockets are waited for edge-triggered: an event only notes what a socket may be ready for, and
//! it is looked at again when that is of use. So a socket that is ready, and whose data the driver
//! has no room for, does not keep the thread busy.

use std::collections::VecDeque;
use std::io;
use std::mem;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use kiln_virtio_device::{QueueError, QueueHandler, Turn};
use rustix::process::{Resource, getrlimit};
use rustix::rand::{GetRandomFlags, getrandom};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};
use vmm_sys_util::timerfd::TimerFd;

use super::VsockCounters;
use super::connection::{Connection, Ports};
use super::host::{Client, Greeting, HostSocket};
use super::packet::Header;
use super::stream::{Socket, Step, Stream};
use super::table::Table;

/// The most connections.
pub(super) const MAX_CONNECTIONS: usize = 1024;
/// As many connections as there are in a process with few file descriptors.
const MIN_CONNECTIONS: u64 = 16;
/// The file descriptors that connections leave to clients and to the rest of the process.
const RESERVE: u64 = 128;
/// The most clients that have not said where to; others wait until they are accepted.
pub(super) const MAX_CLIENTS: usize = 64;
/// How many resets of what was no connection may wait for a driver that gives no buffers; then its
/// packets wait too.
pub(super) const MAX_RESETS: usize = 1024;

pub(super) const RECEIVE: u16 = 0;
pub(super) const TRANSMIT: u16 = 1;

/// Ports of the host for connections that it asks for: those below are for programs that listen.
const FIRST_PORT: u32 = 1 << 30;
const LAST_PORT: u32 = (1 << 31) - 1;

/// How many times clients are accepted, each time as many as there is room for, before others get
/// their turn.
const ROUNDS: usize = 4;
/// How often a program is tried again that has too many connections waiting.
pub(super) const RETRY: Duration = Duration::from_millis(10);
/// How many connections are tried again each time: a guest may have many of them wait.
const DIALS: usize = 32;
/// How often it is looked for what has taken too long.
const TICK: Duration = Duration::from_millis(250);

const LISTENER: u32 = Handler::FIRST_TOKEN;
const TIMER: u32 = LISTENER + 1;
const WAKE_RECEIVE: u32 = LISTENER + 2;
const WAKE_TRANSMIT: u32 = LISTENER + 3;
const CLIENTS: u32 = LISTENER + 0x1000;
const STREAMS: u32 = LISTENER + 0x10000;

/// How long the other side may take.
#[derive(Clone, Copy, Debug)]
pub(super) struct Patience {
    /// For the `CONNECT` line of a client, the answer of a guest, and a program to accept.
    pub(super) handshake: Duration,
    /// For a guest to reset a connection that the host has closed.
    pub(super) close: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self {
            handshake: Duration::from_secs(10),
            close: Duration::from_secs(8),
        }
    }
}

/// The device's half on the I/O thread.
pub(super) struct Handler {
    pub(super) guest_cid: u64,
    pub(super) counters: Arc<VsockCounters>,
    pub(super) patience: Patience,
    pub(super) host: HostSocket,
    clients: Vec<Option<Client>>,
    pub(super) streams: Table<Stream>,
    /// The most connections that the process has file descriptors for.
    limit: usize,
    /// Resets of what is no connection.
    pub(super) resets: VecDeque<Header>,
    /// The driver has no buffers for packets to it: it will tell of new ones.
    pub(super) starved: bool,
    /// Packets of the driver wait until some of `resets` are gone.
    pub(super) stalled: bool,
    timer: TimerFd,
    timer_due: Option<Instant>,
    ticked: bool,
    wake_receive: EventFd,
    wake_transmit: EventFd,
    /// Somebody may want to connect.
    acceptable: bool,
    /// A client may be readable.
    look_at_clients: bool,
    next_port: u32,
    /// The slot from which on connections are tried again.
    next_dial: usize,
    /// When the work on the queues has ended, while there is none.
    stopped: Option<Instant>,
}

impl Handler {
    pub(super) fn new(
        guest_cid: u64,
        host: HostSocket,
        counters: Arc<VsockCounters>,
        patience: Patience,
    ) -> io::Result<Self> {
        let limit = connection_limit(getrlimit(Resource::Nofile).current);
        Ok(Self {
            guest_cid,
            counters,
            patience,
            host,
            clients: Vec::new(),
            streams: Table::new(limit),
            limit,
            resets: VecDeque::new(),
            starved: false,
            stalled: false,
            timer: TimerFd::new()?,
            timer_due: None,
            ticked: false,
            wake_receive: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            wake_transmit: EventFd::new(EFD_CLOEXEC | EFD_NONBLOCK)?,
            acceptable: true,
            look_at_clients: false,
            next_port: random_port()?,
            next_dial: 0,
            stopped: None,
        })
    }

    /// The work on the queues has ended, and the clocks of connections stand still.
    pub(super) fn stop(&mut self) {
        self.stopped.get_or_insert_with(Instant::now);
    }

    /// Lets the clocks go on: a guest that was paused could not answer.
    fn postpone_deadlines(&mut self) {
        let Some(pause) = self.stopped.take().map(|stopped| stopped.elapsed()) else {
            return;
        };
        for client in self.clients.iter_mut().flatten() {
            client.deadline += pause;
        }
        for slot in self.streams.occupied() {
            let stream = self.streams.get_mut(slot);
            if let Some(deadline) = stream.and_then(|stream| stream.deadline.as_mut()) {
                *deadline += pause;
            }
        }
    }

    /// Forgets all connections, whose sockets are not waited for any more.
    pub(super) fn clear(&mut self) {
        self.clients.clear();
        self.streams = Table::new(self.limit);
        self.resets.clear();
        self.count_open();
    }

    /// Takes all connections away: the device has failed, and nobody is served any more.
    fn close_all(&mut self, registrar: &mut Registrar<'_, '_>) {
        registrar.remove_all();
        self.clear();
    }

    fn count_open(&self) {
        let open = self.streams.len() as u64;
        self.counters.open.store(open, Ordering::Relaxed);
    }

    /// Adds a connection and waits for its socket. `None` where there is no room.
    pub(super) fn add_stream(
        &mut self,
        stream: Stream,
        registrar: &mut Registrar<'_, '_>,
    ) -> Option<usize> {
        let (ports, fd) = (stream.connection.ports(), stream.fd());
        let slot = self.streams.insert(ports, stream)?;
        if let Some(fd) = fd
            && watch(registrar, &fd, STREAMS, slot).is_err()
        {
            self.streams.remove(slot);
            return None;
        }
        self.streams.mark_ready(slot);
        self.count_open();
        self.run_timer(TICK);
        Some(slot)
    }

    /// Takes a connection away, and its socket with it.
    pub(super) fn remove_stream(&mut self, slot: usize, registrar: &mut Registrar<'_, '_>) {
        if let Some(stream) = self.streams.remove(slot) {
            unwatch(registrar, stream.fd());
            if !stream.connection.is_open() {
                count(&self.counters.refused, 1);
            }
        }
        self.count_open();
    }

    /// Closes the socket of a connection that the host is done with.
    pub(super) fn close_socket(&mut self, slot: usize, registrar: &mut Registrar<'_, '_>) {
        let deadline = Instant::now() + self.patience.close;
        if let Some(stream) = self.streams.get_mut(slot) {
            unwatch(registrar, stream.fd());
            stream.socket = Socket::Closed;
            stream.deadline = Some(deadline);
            self.run_timer(TICK);
        }
    }

    /// The program that a connection waited for has it.
    pub(super) fn connected(&mut self, slot: usize, registrar: &mut Registrar<'_, '_>) {
        let Some(stream) = self.streams.get_mut(slot) else {
            return;
        };
        if let Socket::Dialing(dial) = mem::replace(&mut stream.socket, Socket::Closed) {
            stream.socket = Socket::Connected(dial.into_socket());
            stream.deadline = None;
            stream.connection.accept();
            stream.guest_is_done();
            if let Some(fd) = stream.fd()
                && watch(registrar, &fd, STREAMS, slot).is_err()
            {
                stream.fail();
            }
            count(&self.counters.from_guest, 1);
        }
        self.streams.mark_ready(slot);
    }

    /// Sees to what is not the driver's business: new clients, their lines, and the time.
    pub(super) fn serve_host(&mut self, registrar: &mut Registrar<'_, '_>) {
        if mem::take(&mut self.ticked) {
            self.tick(registrar);
        }
        for _ in 0..ROUNDS {
            self.accept(registrar);
            if !mem::take(&mut self.look_at_clients) {
                break;
            }
            self.greet(registrar);
        }
        if self.acceptable {
            // There are more than can be served now.
            self.run_timer(RETRY);
        }
    }

    fn accept(&mut self, registrar: &mut Registrar<'_, '_>) {
        while self.acceptable {
            let free = self.clients.iter().position(Option::is_none);
            if free.is_none() && self.clients.len() >= MAX_CLIENTS {
                return;
            }
            match self.host.accept() {
                Ok(socket) => {
                    let client = Client::new(socket, Instant::now() + self.patience.handshake);
                    let place = free.unwrap_or(self.clients.len());
                    if watch(registrar, &client.socket, CLIENTS, place).is_err() {
                        continue;
                    }
                    match self.clients.get_mut(place) {
                        Some(entry) => *entry = Some(client),
                        None => self.clients.push(Some(client)),
                    }
                    self.look_at_clients = true;
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::WouldBlock => self.acceptable = false,
                    io::ErrorKind::Interrupted | io::ErrorKind::ConnectionAborted => continue,
                    // No file descriptors, most likely: later.
                    _ => break,
                },
            }
        }
        if !self.clients.is_empty() {
            self.run_timer(TICK);
        }
    }

    /// Reads the lines of clients.
    fn greet(&mut self, registrar: &mut Registrar<'_, '_>) {
        for place in 0..self.clients.len() {
            let Some(client) = self.clients[place].as_mut().filter(|c| c.readable) else {
                continue;
            };
            let greeting = client.read_line();
            if greeting == Greeting::Waiting {
                continue;
            }
            let Some(client) = self.clients[place].take() else {
                continue;
            };
            let _ = registrar.remove(&client.socket);
            match greeting {
                Greeting::Connect(port) => self.request(port, client, registrar),
                _ => count(&self.counters.refused, 1),
            }
        }
    }

    /// Asks the guest for a connection. A client that cannot have one is closed.
    fn request(&mut self, guest: u32, client: Client, registrar: &mut Registrar<'_, '_>) {
        let Some(host) = self.free_port(guest) else {
            count(&self.counters.refused, 1);
            return;
        };
        let connection = Connection::request(Ports { host, guest });
        let deadline = Instant::now() + self.patience.handshake;
        let stream = Stream::new(connection, Socket::Connected(client.socket), Some(deadline));
        if self.add_stream(stream, registrar).is_none() {
            count(&self.counters.refused, 1);
        }
    }

    /// A port of the host that has no connection with this port of the guest. Ports are not used
    /// again soon: a guest may hold on to a connection for longer than we do.
    fn free_port(&mut self, guest: u32) -> Option<u32> {
        if self.streams.is_full() {
            return None;
        }
        // Fewer connections than ports: one of the first is free.
        for _ in 0..=MAX_CONNECTIONS {
            let host = self.next_port;
            self.next_port = if host >= LAST_PORT {
                FIRST_PORT
            } else {
                host + 1
            };
            if self.streams.find(Ports { host, guest }).is_none() {
                return Some(host);
            }
        }
        None
    }

    /// Looks for what has taken too long, and tries again what could not be done before.
    fn tick(&mut self, registrar: &mut Registrar<'_, '_>) {
        self.timer_due = None;
        let now = Instant::now();
        for client in &mut self.clients {
            if let Some(late) = client.take_if(|client| client.deadline <= now) {
                let _ = registrar.remove(&late.socket);
                count(&self.counters.refused, 1);
            }
        }
        while self.clients.pop_if(|client| client.is_none()).is_some() {}
        let mut waiting = !self.clients.is_empty();
        let mut soon = false;
        let mut dials = 0;
        let mut slots = self.streams.occupied();
        let first = slots.partition_point(|slot| *slot < self.next_dial);
        slots.rotate_left(first);
        for slot in slots {
            let Some(stream) = self.streams.get_mut(slot) else {
                continue;
            };
            let late = stream.deadline.is_some_and(|deadline| deadline <= now);
            let dialed = match &stream.socket {
                Socket::Dialing(dial) if dials < DIALS => {
                    dials += 1;
                    self.next_dial = slot + 1;
                    Some(dial.connect())
                }
                // It is for another time, if there is one.
                Socket::Dialing(_) => Some(Err(io::ErrorKind::WouldBlock.into())),
                Socket::Connected(_) | Socket::Closed => None,
            };
            match dialed {
                Some(Ok(())) => self.connected(slot, registrar),
                Some(Err(error)) if late || error.kind() != io::ErrorKind::WouldBlock => {
                    stream.fail();
                    self.streams.mark_ready(slot);
                }
                Some(Err(_)) => soon = true,
                None if late => {
                    stream.fail();
                    self.streams.mark_ready(slot);
                }
                None => waiting |= stream.deadline.is_some(),
            }
        }
        if soon {
            self.run_timer(RETRY);
        } else if waiting {
            self.run_timer(TICK);
        }
    }

    /// Has a [`tick`](Self::tick) after this time, if there is none before.
    pub(super) fn run_timer(&mut self, time: Duration) {
        let due = Instant::now() + time;
        if self.timer_due.is_none_or(|before| due < before) {
            let set = self.timer.reset(time, None);
            self.timer_due = set.is_ok().then_some(due);
        }
    }

    /// Has the packets to the driver looked at, as soon as it has room.
    fn wake_receive(&self) {
        let work = !self.resets.is_empty() || self.streams.first_ready().is_some();
        if work && !self.starved {
            let _ = self.wake_receive.write(1);
        }
    }

    fn register(&mut self, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        let edge = EventSet::IN | EventSet::EDGE_TRIGGERED;
        registrar.add(&self.host, LISTENER, edge)?;
        registrar.add(&self.timer, TIMER, edge)?;
        registrar.add(&self.wake_receive, WAKE_RECEIVE, edge)?;
        registrar.add(&self.wake_transmit, WAKE_TRANSMIT, edge)?;
        // Those that a pause has left.
        for (place, client) in self.clients.iter().enumerate() {
            if let Some(client) = client {
                watch(registrar, &client.socket, CLIENTS, place)?;
            }
        }
        for slot in self.streams.occupied() {
            if let Some(fd) = self.streams.get_mut(slot).and_then(|stream| stream.fd()) {
                watch(registrar, &fd, STREAMS, slot)?;
            }
        }
        Ok(())
    }
}

impl QueueHandler for Handler {
    fn start(&mut self, _features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        self.starved = false;
        self.stalled = false;
        self.acceptable = true;
        self.look_at_clients = true;
        self.timer_due = None;
        self.postpone_deadlines();
        self.register(registrar)?;
        self.run_timer(RETRY);
        Ok(())
    }

    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        let done = match turn.index() {
            RECEIVE => self.work_on_receive_queue(turn, registrar),
            TRANSMIT => self.work_on_transmit_queue(turn, registrar),
            // No event has a reason to be sent.
            _ => Ok(()),
        };
        match turn.index() {
            _ if done.is_err() => self.close_all(registrar),
            RECEIVE if self.stalled && self.resets.len() < MAX_RESETS / 2 => {
                self.stalled = false;
                let _ = self.wake_transmit.write(1);
            }
            TRANSMIT => self.wake_receive(),
            _ => {}
        }
        done
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        match event.token {
            LISTENER => self.acceptable = true,
            TIMER => self.ticked = true,
            WAKE_RECEIVE => drop(self.wake_receive.read()),
            WAKE_TRANSMIT => {
                let _ = self.wake_transmit.read();
                return Some(TRANSMIT);
            }
            STREAMS.. => {
                let slot = (event.token - STREAMS) as usize;
                if let Some(stream) = self.streams.get_mut(slot) {
                    stream.event(event.set);
                    if stream.step() == Step::Wait {
                        return None;
                    }
                    self.streams.mark_ready(slot);
                }
            }
            CLIENTS.. => {
                let place = (event.token - CLIENTS) as usize;
                if let Some(Some(client)) = self.clients.get_mut(place) {
                    client.readable = true;
                    self.look_at_clients = true;
                }
            }
            _ => return None,
        }
        Some(RECEIVE)
    }
}

/// How many connections there may be where a process may have so many file descriptors.
pub(super) fn connection_limit(descriptors: Option<u64>) -> usize {
    let room = descriptors.map_or(u64::MAX, |most| most.saturating_sub(RESERVE));
    room.clamp(MIN_CONNECTIONS, MAX_CONNECTIONS as u64) as usize
}

/// A port of the host to begin with: the guest of a restored machine may still know connections of
/// the device before.
fn random_port() -> io::Result<u32> {
    let mut bytes = [0; 4];
    getrandom(&mut bytes, GetRandomFlags::empty())?;
    Ok(FIRST_PORT + u32::from_ne_bytes(bytes) % (LAST_PORT - FIRST_PORT + 1))
}

/// Waits for everything that can happen to a socket.
fn watch(
    registrar: &mut Registrar<'_, '_>,
    fd: &impl AsRawFd,
    tokens: u32,
    place: usize,
) -> io::Result<()> {
    let set = EventSet::IN | EventSet::OUT | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
    // There are no more places than tokens.
    registrar.add(fd, tokens + place as u32, set)
}

fn unwatch(registrar: &mut Registrar<'_, '_>, fd: Option<impl AsRawFd>) {
    if let Some(fd) = fd {
        let _ = registrar.remove(&fd);
    }
}

pub(super) fn count(counter: &AtomicU64, by: u64) {
    counter.fetch_add(by, Ordering::Relaxed);
}
