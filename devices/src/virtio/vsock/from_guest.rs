//! Packets from the driver.

use std::io;
use std::time::Instant;

use kiln_io_thread::Registrar;
use kiln_virtio_device::{GuestBuffers, QueueError, Turn};

use super::connection::{Connection, Ports, Received, Violation};
use super::handler::{Handler, MAX_RESETS, RETRY, count};
use super::packet::{DONE, HEADER_BYTES, HOST_CID, Header, NO_SEND, STREAM, op};
use super::stream::{Socket, Step, Stream};

impl Handler {
    /// Works on the queue of packets from the driver.
    pub(super) fn work_on_transmit_queue(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        loop {
            // A packet may be answered by a reset, for which there has to be a place.
            if self.resets.len() >= MAX_RESETS {
                self.stalled = true;
                return Ok(());
            }
            let Some(mut chain) = turn.pop()? else {
                return Ok(());
            };
            self.packet(&mut chain.readable, registrar);
            turn.complete(chain, 0)?;
        }
    }

    fn packet(&mut self, data: &mut GuestBuffers<'_>, registrar: &mut Registrar<'_, '_>) {
        let mut bytes = [0; HEADER_BYTES];
        if data.read(&mut bytes).is_err() {
            count(&self.counters.tx_dropped, 1);
            return;
        }
        let header = Header::parse(&bytes);
        if header.src_cid != self.guest_cid {
            // It would be another guest's, and is not answered.
            count(&self.counters.tx_dropped, 1);
            return;
        }
        count(&self.counters.tx_packets, 1);
        if header.dst_cid != HOST_CID || header.kind != STREAM {
            self.refuse(&header);
            return;
        }
        let ports = Ports {
            host: header.dst_port,
            guest: header.src_port,
        };
        match self.streams.find(ports) {
            Some(slot) => self.deliver(slot, &header, data, registrar),
            None if header.op == op::REQUEST => self.offer(&header, registrar),
            None => self.refuse(&header),
        }
    }

    /// Answers that there is no such connection.
    fn refuse(&mut self, header: &Header) {
        self.resets.extend(header.refusal());
    }

    /// A packet of a connection that there is.
    fn deliver(
        &mut self,
        slot: usize,
        header: &Header,
        data: &mut GuestBuffers<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) {
        let Some(stream) = self.streams.get_mut(slot) else {
            return;
        };
        let len = header.len as usize;
        let received = if header.op == op::RW && len > data.len() {
            Err(Violation)
        } else {
            stream.connection.receive(header)
        };
        match received {
            Ok(Received::Counts | Received::Dropped) => {}
            Ok(Received::Opened) => {
                stream.opened();
                count(&self.counters.from_host, 1);
            }
            Ok(Received::Data) => {
                // What is behind the packet is nobody's.
                drop(data.split_off(len));
                stream.write(std::mem::take(data));
                count(&self.counters.tx_bytes, len as u64);
            }
            Ok(Received::Shutdown) => {
                stream.guest_is_done();
                if stream.connection.guest_done() == DONE {
                    // The answer to a guest that is done with the connection.
                    self.refuse(header);
                    self.part(slot, registrar);
                    return;
                }
            }
            Ok(Received::Reset) => {
                self.part(slot, registrar);
                return;
            }
            Err(Violation) => {
                self.refuse(header);
                self.remove_stream(slot, registrar);
                return;
            }
        }
        if stream.step() != Step::Wait {
            self.streams.mark_ready(slot);
        }
    }

    /// The guest is done with a connection, and may use its ports again. What it sent before it
    /// said that it sends no more goes on its way.
    fn part(&mut self, slot: usize, registrar: &mut Registrar<'_, '_>) {
        let Some(stream) = self.streams.get_mut(slot) else {
            return;
        };
        let has_finished = stream.connection.guest_done() & NO_SEND != 0;
        if has_finished && stream.drain() {
            self.streams.detach(slot);
        } else {
            self.remove_stream(slot, registrar);
        }
    }

    /// The guest wants to be connected with a program of the host.
    fn offer(&mut self, header: &Header, registrar: &mut Registrar<'_, '_>) {
        if self.streams.is_full() {
            count(&self.counters.refused, 1);
            self.refuse(header);
            return;
        }
        let dialed = self.host.dial(header.dst_port).and_then(|dial| {
            let connected = dial.connect();
            match connected {
                Err(error) if error.kind() != io::ErrorKind::WouldBlock => Err(error),
                connected => Ok((dial, connected.is_ok())),
            }
        });
        let Ok((dial, connected)) = dialed else {
            count(&self.counters.refused, 1);
            self.refuse(header);
            return;
        };
        let connection = Connection::offered(header);
        let deadline = Instant::now() + self.patience.handshake;
        let stream = Stream::new(connection, Socket::Dialing(dial), Some(deadline));
        match self.add_stream(stream, registrar) {
            Some(slot) if connected => self.connected(slot, registrar),
            Some(_) => self.run_timer(RETRY),
            None => self.refuse(header),
        }
    }
}
