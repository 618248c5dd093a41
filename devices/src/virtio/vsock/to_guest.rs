//! Packets to the driver, made when it has buffers for them and not before.

use kiln_io_thread::Registrar;
use kiln_virtio_device::{Chain, QueueError, Turn};

use super::handler::{Handler, count};
use super::packet::{HEADER_BYTES, Header, op};
use super::stream::Step;

/// The most data in a packet.
const MAX_DATA: usize = 64 << 10;

/// What is to be sent next.
enum Next {
    /// A reset of what is no connection.
    Reset,
    /// A packet of the connection in this slot.
    Stream(usize, Step),
}

impl Handler {
    /// Works on the queue of packets to the driver.
    pub(super) fn work_on_receive_queue(
        &mut self,
        turn: &mut Turn<'_>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        self.starved = false;
        self.serve_host(registrar);
        while let Some(next) = self.next(registrar) {
            let Some(chain) = turn.pop()? else {
                self.starved = true;
                break;
            };
            if chain.writable.len() < HEADER_BYTES {
                // Of no use to anyone.
                count(&self.counters.rx_errors, 1);
                turn.complete(chain, 0)?;
                continue;
            }
            match next {
                Next::Reset => {
                    if let Some(header) = self.resets.pop_front() {
                        self.send(&header, chain, 0, turn)?;
                    }
                }
                Next::Stream(slot, Step::Data) => self.send_data(slot, chain, turn)?,
                Next::Stream(slot, _) => self.send_control(slot, chain, turn, registrar)?,
            }
        }
        Ok(())
    }

    /// Looks for a packet to send, and takes away connections that are at their end.
    fn next(&mut self, registrar: &mut Registrar<'_, '_>) -> Option<Next> {
        loop {
            if !self.resets.is_empty() {
                return Some(Next::Reset);
            }
            let slot = self.streams.first_ready()?;
            let step = self.streams.get_mut(slot).map(|stream| stream.step());
            match step {
                None | Some(Step::Wait) => self.streams.drop_first(),
                Some(step @ (Step::Control | Step::Data)) => {
                    return Some(Next::Stream(slot, step));
                }
                Some(Step::Reset) => {
                    self.streams.drop_first();
                    self.reset_stream(slot, registrar);
                }
                Some(Step::Vanish) => {
                    self.streams.drop_first();
                    self.remove_stream(slot, registrar);
                }
            }
        }
    }

    /// Ends a connection from our side.
    pub(super) fn reset_stream(&mut self, slot: usize, registrar: &mut Registrar<'_, '_>) {
        if let Some(stream) = self.streams.get_mut(slot)
            && stream.connection.is_known_to_guest()
        {
            let header = stream.connection.reset(self.guest_cid);
            self.resets.push_back(header);
        }
        self.remove_stream(slot, registrar);
    }

    fn send_control<'m>(
        &mut self,
        slot: usize,
        chain: Chain<'m>,
        turn: &mut Turn<'m>,
        registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        self.streams.rotate();
        let cid = self.guest_cid;
        let stream = self.streams.get_mut(slot);
        let header = stream.and_then(|stream| stream.connection.take_control(cid));
        let Some(header) = header else {
            turn.put_back(chain);
            return Ok(());
        };
        self.send(&header, chain, 0, turn)?;
        if header.op == op::SHUTDOWN
            && let Some(stream) = self.streams.get_mut(slot)
            && stream.connection.is_closed_by_host()
        {
            self.close_socket(slot, registrar);
        }
        Ok(())
    }

    fn send_data<'m>(
        &mut self,
        slot: usize,
        mut chain: Chain<'m>,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        self.streams.rotate();
        let Some(stream) = self.streams.get_mut(slot) else {
            turn.put_back(chain);
            return Ok(());
        };
        let mut body = chain.writable.split_off(HEADER_BYTES)?;
        if body.is_empty() {
            count(&self.counters.rx_errors, 1);
            return turn.complete(chain, 0);
        }
        let room = body.len().min(MAX_DATA);
        let len = room.min(stream.connection.credit() as usize);
        drop(body.split_off(len)?);
        let Some(count) = stream.read(body.slices()) else {
            turn.put_back(chain);
            return Ok(());
        };
        // At most `MAX_DATA`.
        let header = stream.connection.send(self.guest_cid, count as u32);
        self.send(&header, chain, count, turn)
    }

    /// Gives the driver a packet, whose data is in the buffers already.
    fn send<'m>(
        &mut self,
        header: &Header,
        mut chain: Chain<'m>,
        data: usize,
        turn: &mut Turn<'m>,
    ) -> Result<(), QueueError> {
        chain.writable.write(&header.bytes())?;
        count(&self.counters.rx_packets, 1);
        count(&self.counters.rx_bytes, data as u64);
        if header.op == op::RST {
            count(&self.counters.resets, 1);
        }
        // A header and at most `MAX_DATA`.
        turn.complete(chain, (HEADER_BYTES + data) as u32)
    }
}
