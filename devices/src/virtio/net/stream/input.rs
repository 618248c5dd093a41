//! From a stream of bytes to frames.

use super::{MAX_FRAME, PREFIX};

/// The bytes that are read at once, and kept: several frames, or one of the largest in two pieces.
const CAPACITY: usize = 160 << 10;

/// What the stream has for us next.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Next<'a> {
    /// A frame, whole.
    Frame(&'a [u8]),
    /// More is to be read first.
    Incomplete,
    /// The other end says that a frame of this length follows, which none can have.
    TooLong(u32),
}

/// What was read and is not a frame yet.
pub(super) struct Input {
    bytes: Box<[u8]>,
    /// What is kept: `bytes[start..end]`.
    start: usize,
    end: usize,
}

impl Input {
    pub(super) fn new() -> Self {
        Self {
            bytes: vec![0; CAPACITY].into(),
            start: 0,
            end: 0,
        }
    }

    /// Takes the next frame out of what was read.
    pub(super) fn next(&mut self) -> Next<'_> {
        let kept = self.bytes.get(self.start..self.end).unwrap_or_default();
        let Some((prefix, behind)) = kept.split_first_chunk::<PREFIX>() else {
            return Next::Incomplete;
        };
        let announced = u32::from_be_bytes(*prefix);
        let len = usize::try_from(announced).unwrap_or(usize::MAX);
        if len > MAX_FRAME {
            return Next::TooLong(announced);
        }
        match behind.get(..len) {
            Some(frame) => {
                self.start += PREFIX + len;
                Next::Frame(frame)
            }
            None => Next::Incomplete,
        }
    }

    /// Where to read to, once there is no whole frame any more: never empty then.
    pub(super) fn room(&mut self) -> &mut [u8] {
        if self.start == self.end {
            self.clear();
        } else if self.end > CAPACITY / 2 {
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.bytes[self.end..]
    }

    /// So many bytes were read to [`room`](Self::room).
    pub(super) fn filled(&mut self, count: usize) {
        self.end = (self.end + count).min(CAPACITY);
    }

    /// Forgets everything.
    pub(super) fn clear(&mut self) {
        (self.start, self.end) = (0, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn give(input: &mut Input, bytes: &[u8]) {
        let room = input.room();
        room[..bytes.len()].copy_from_slice(bytes);
        input.filled(bytes.len());
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        let mut bytes = (frame.len() as u32).to_be_bytes().to_vec();
        bytes.extend_from_slice(frame);
        bytes
    }

    #[test]
    fn frames_come_out_whole_wherever_the_stream_was_cut() {
        let frames: [&[u8]; 4] = [b"first", b"", b"x", b"the last one"];
        let stream: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        for cut in 0..=stream.len() {
            let mut input = Input::new();
            let mut found: Vec<Vec<u8>> = Vec::new();
            for part in [&stream[..cut], &stream[cut..]] {
                give(&mut input, part);
                while let Next::Frame(frame) = input.next() {
                    found.push(frame.to_vec());
                }
            }
            assert_eq!(found, frames, "cut at {cut}");
            assert_eq!(input.next(), Next::Incomplete);
        }
    }

    #[test]
    fn there_is_always_room_for_the_rest_of_the_largest_frame() {
        let mut input = Input::new();
        let largest = framed(&vec![7; MAX_FRAME]);
        let mut given = 0;
        let mut taken = 0;
        let mut at = 0;
        while taken < 20 {
            let room = input.room();
            assert!(!room.is_empty());
            // Whatever fits, but never where a frame ends.
            let count = room.len().min(10_007);
            for byte in &mut room[..count] {
                *byte = largest[at];
                at = (at + 1) % largest.len();
            }
            given += count;
            input.filled(count);
            while let Next::Frame(frame) = input.next() {
                assert!(*frame == largest[PREFIX..]);
                taken += 1;
            }
        }
        assert!(given >= taken * largest.len());
    }

    #[test]
    fn a_length_that_no_frame_has_is_told_before_anything_is_kept_for_it() {
        for len in [MAX_FRAME as u32 + 1, 1 << 31, u32::MAX] {
            let mut input = Input::new();
            give(&mut input, &len.to_be_bytes());
            assert_eq!(input.next(), Next::TooLong(len));
            assert_eq!(input.next(), Next::TooLong(len));
            input.clear();
            assert_eq!(input.next(), Next::Incomplete);
        }
    }
}
