//! From frames to a stream of bytes.

use std::io;
use std::os::fd::BorrowedFd;

use kiln_memory::{GuestSlice, gather_into};

use super::PREFIX;
use crate::virtio::iovec::{behind, send_behind};
use crate::virtio::net::device::HEADER_BYTES;

/// Frames up to this length are copied and sent together: a system call costs more than the copy.
const SMALL: usize = 4096;
/// How much of them is sent together.
const BATCH: usize = 64 << 10;

/// What is still to be sent: small frames together, and the rest of a frame of which a part was
/// sent, before anything else. That is no more than a batch and one of the largest frames.
#[derive(Default)]
pub(super) struct Output {
    bytes: Vec<u8>,
    /// How many of them were sent.
    sent: usize,
}

impl Output {
    /// Sends the frame of a packet, or keeps it to be sent with others.
    ///
    /// # Errors
    ///
    /// What the system says; `WouldBlock` where nothing of the frame was taken.
    pub(super) fn send(
        &mut self,
        socket: BorrowedFd<'_>,
        packet: &[GuestSlice<'_>],
    ) -> io::Result<()> {
        let len: usize = packet.iter().map(|slice| slice.len()).sum();
        let frame = len.saturating_sub(HEADER_BYTES);
        let announced = u32::try_from(frame).map_err(|_| io::ErrorKind::InvalidInput)?;
        let before = self.bytes.len();
        self.bytes.extend_from_slice(&announced.to_be_bytes());
        if frame <= SMALL && before - self.sent + PREFIX + frame <= BATCH {
            self.keep(packet, 0, frame);
            return Ok(());
        }
        let head = self.bytes.get(self.sent..).unwrap_or_default();
        let head_bytes = head.len();
        let result = send_behind(socket, head, packet, HEADER_BYTES);
        let count = *result.as_ref().unwrap_or(&0);
        self.sent += count.min(head_bytes);
        if self.sent <= before {
            // Nothing of this frame: it can wait where it is.
            self.bytes.truncate(before);
            self.forget_sent();
            return result.and(Err(io::ErrorKind::WouldBlock.into()));
        }
        let of_frame = count.saturating_sub(head_bytes);
        self.keep(packet, of_frame, frame);
        self.forget_sent();
        Ok(())
    }

    /// Sends what is kept, as far as the socket takes it now.
    ///
    /// # Errors
    ///
    /// What the system says; `WouldBlock` where something is left.
    pub(super) fn flush(&mut self, socket: BorrowedFd<'_>) -> io::Result<()> {
        while !self.is_empty() {
            let head = self.bytes.get(self.sent..).unwrap_or_default();
            self.sent += send_behind(socket, head, &[], 0)?;
            self.forget_sent();
        }
        Ok(())
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        self.bytes.clear();
        self.sent = 0;
    }

    /// Keeps a frame from its byte `from` on.
    fn keep(&mut self, packet: &[GuestSlice<'_>], from: usize, frame: usize) {
        let start = self.bytes.len();
        self.bytes.resize(start + frame - from.min(frame), 0);
        gather_into(
            &mut self.bytes[start..],
            behind(packet, HEADER_BYTES + from),
        );
    }

    fn forget_sent(&mut self) {
        if self.sent >= self.bytes.len() {
            self.clear();
        } else if self.sent > BATCH {
            self.bytes.drain(..self.sent);
            self.sent = 0;
        }
    }
}
