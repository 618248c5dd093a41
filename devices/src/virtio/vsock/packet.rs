//! Packets as they lie in buffers: the header of virtio 1.3, section 5.10.6.

/// The context id of the host (virtio 1.3, section 5.10.4).
pub(super) const HOST_CID: u64 = 2;
/// The bytes of a header.
pub(super) const HEADER_BYTES: usize = 44;
/// The one type of connection there is: a stream.
pub(super) const STREAM: u16 = 1;

/// What a packet is for (`VIRTIO_VSOCK_OP_…`).
pub(super) mod op {
    pub(in super::super) const REQUEST: u16 = 1;
    pub(in super::super) const RESPONSE: u16 = 2;
    pub(in super::super) const RST: u16 = 3;
    pub(in super::super) const SHUTDOWN: u16 = 4;
    pub(in super::super) const RW: u16 = 5;
    pub(in super::super) const CREDIT_UPDATE: u16 = 6;
    pub(in super::super) const CREDIT_REQUEST: u16 = 7;
}

/// Who sends a `SHUTDOWN` with this flag does not receive any more.
pub(super) const NO_RECEIVE: u32 = 1;
/// Who sends a `SHUTDOWN` with this flag does not send any more.
pub(super) const NO_SEND: u32 = 2;
/// Who sends a `SHUTDOWN` with these flags is done with the connection.
pub(super) const DONE: u32 = NO_RECEIVE | NO_SEND;

/// The header of a packet (`virtio_vsock_hdr`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Header {
    pub(super) src_cid: u64,
    pub(super) dst_cid: u64,
    pub(super) src_port: u32,
    pub(super) dst_port: u32,
    /// The bytes of data behind the header.
    pub(super) len: u32,
    /// The type of the connection.
    pub(super) kind: u16,
    pub(super) op: u16,
    pub(super) flags: u32,
    /// How many bytes the sender has room for in all.
    pub(super) buf_alloc: u32,
    /// How many of the bytes that the sender received have left that room.
    pub(super) fwd_cnt: u32,
}

impl Header {
    /// Reads a header. Every value is one that a guest can write.
    pub(super) fn parse(bytes: &[u8; HEADER_BYTES]) -> Self {
        let mut rest = &bytes[..];
        Self {
            src_cid: u64::from_le_bytes(take(&mut rest)),
            dst_cid: u64::from_le_bytes(take(&mut rest)),
            src_port: u32::from_le_bytes(take(&mut rest)),
            dst_port: u32::from_le_bytes(take(&mut rest)),
            len: u32::from_le_bytes(take(&mut rest)),
            kind: u16::from_le_bytes(take(&mut rest)),
            op: u16::from_le_bytes(take(&mut rest)),
            flags: u32::from_le_bytes(take(&mut rest)),
            buf_alloc: u32::from_le_bytes(take(&mut rest)),
            fwd_cnt: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header as it is written for the driver.
    pub(super) fn bytes(&self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        let mut rest = &mut bytes[..];
        put(&mut rest, self.src_cid.to_le_bytes());
        put(&mut rest, self.dst_cid.to_le_bytes());
        put(&mut rest, self.src_port.to_le_bytes());
        put(&mut rest, self.dst_port.to_le_bytes());
        put(&mut rest, self.len.to_le_bytes());
        put(&mut rest, self.kind.to_le_bytes());
        put(&mut rest, self.op.to_le_bytes());
        put(&mut rest, self.flags.to_le_bytes());
        put(&mut rest, self.buf_alloc.to_le_bytes());
        put(&mut rest, self.fwd_cnt.to_le_bytes());
        bytes
    }

    /// The packet that says to the sender of this one that there is no such connection; `None`
    /// where this one says so itself.
    pub(super) fn refusal(&self) -> Option<Self> {
        (self.op != op::RST).then_some(Self {
            src_cid: self.dst_cid,
            dst_cid: self.src_cid,
            src_port: self.dst_port,
            dst_port: self.src_port,
            kind: self.kind,
            op: op::RST,
            ..Self::default()
        })
    }
}

/// The next bytes; the callers take no more than there are.
fn take<const N: usize>(from: &mut &[u8]) -> [u8; N] {
    match from.split_first_chunk::<N>() {
        Some((bytes, rest)) => {
            *from = rest;
            *bytes
        }
        None => [0; N],
    }
}

fn put<const N: usize>(to: &mut &mut [u8], bytes: [u8; N]) {
    if let Some((place, rest)) = std::mem::take(to).split_first_chunk_mut::<N>() {
        *place = bytes;
        *to = rest;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADER: Header = Header {
        src_cid: 3,
        dst_cid: 2,
        src_port: 0x0403_0201,
        dst_port: 1024,
        len: 0x10,
        kind: STREAM,
        op: op::RW,
        flags: 3,
        buf_alloc: 0x0002_0000,
        fwd_cnt: 0xffff_fffe,
    };

    #[test]
    fn a_header_lies_in_memory_as_the_specification_says() {
        let bytes = HEADER.bytes();
        assert_eq!(bytes[..8], [3, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[8..16], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(bytes[16..24], [1, 2, 3, 4, 0, 4, 0, 0]);
        assert_eq!(bytes[24..32], [0x10, 0, 0, 0, 1, 0, 5, 0]);
        assert_eq!(bytes[32..40], [3, 0, 0, 0, 0, 0, 2, 0]);
        assert_eq!(bytes[40..], [0xfe, 0xff, 0xff, 0xff]);
        assert_eq!(Header::parse(&bytes), HEADER);
    }

    #[test]
    fn a_refusal_goes_back_to_where_the_packet_came_from_and_is_not_refused() {
        let refusal = HEADER.refusal().unwrap();
        assert_eq!((refusal.src_cid, refusal.dst_cid), (2, 3));
        assert_eq!(
            (refusal.src_port, refusal.dst_port),
            (HEADER.dst_port, HEADER.src_port)
        );
        assert_eq!((refusal.op, refusal.len, refusal.flags), (op::RST, 0, 0));
        assert_eq!(refusal.refusal(), None);
    }
}
