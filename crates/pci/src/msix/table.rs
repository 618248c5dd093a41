//! The table of vectors, and when which of them is open.

use kiln_device_api::MsiMessage;
use serde::{Deserialize, Serialize};

use super::MsixSink;
use crate::registers::{MSIX_CONTROL_ENABLE, MSIX_CONTROL_FUNCTION_MASK};

/// The double words of a table entry.
const ENTRY_WORDS: usize = 4;
const ADDRESS_LOW: usize = 0;
const ADDRESS_HIGH: usize = 1;
const DATA: usize = 2;
const VECTOR_CONTROL: usize = 3;
/// The mask bit of the vector control word; the others are reserved, and stay zero.
const MASKED: u32 = 1;
/// The bits of each word that can be written: messages go to multiples of four.
const WRITABLE: [u32; ENTRY_WORDS] = [0xffff_fffc, 0xffff_ffff, 0xffff_ffff, MASKED];

/// The MSI-X table and the pending bits of a function, saved. Whether MSI-X is enabled is in the
/// [`ConfigState`](crate::ConfigState).
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct MsixState {
    /// The vectors, in the order of their numbers.
    pub vectors: Vec<VectorState>,
}

impl MsixState {
    pub(crate) fn reset(vectors: u16) -> Self {
        let vector = VectorState {
            address: 0,
            data: 0,
            masked: true,
            pending: false,
        };
        Self {
            vectors: vec![vector; vectors.into()],
        }
    }
}

/// An MSI-X vector, saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VectorState {
    /// The address of its message.
    pub address: u64,
    /// The data of its message.
    pub data: u32,
    /// Whether the guest masked it.
    pub masked: bool,
    /// Whether it has an event to tell when it opens.
    pub pending: bool,
}

struct Vector {
    words: [u32; ENTRY_WORDS],
    pending: bool,
    /// The message that the sink has been told to send: the vector is open.
    open: Option<MsiMessage>,
}

impl Vector {
    fn message(&self) -> MsiMessage {
        MsiMessage {
            address: u64::from(self.words[ADDRESS_HIGH]) << 32 | u64::from(self.words[ADDRESS_LOW]),
            data: self.words[DATA],
        }
    }

    fn masked(&self) -> bool {
        self.words[VECTOR_CONTROL] & MASKED != 0
    }

    /// Moves into the pending bit what the sink has kept since the vector was closed.
    fn collect(&mut self, sink: &dyn MsixSink, number: u16) {
        if self.open.is_none() {
            // Taken even where the bit is set, so that the sink does not signal it again.
            self.pending |= sink.take(number);
        }
    }

    /// Tells the sink what has become of the vector.
    fn update(&mut self, sink: &dyn MsixSink, number: u16, function_open: bool) {
        let open = (function_open && !self.masked()).then(|| self.message());
        if open == self.open {
            return;
        }
        self.collect(sink, number);
        self.open = open;
        let Some(message) = open else {
            sink.disconnect(number);
            return;
        };
        sink.connect(number, message);
        if std::mem::take(&mut self.pending) {
            sink.signal(number, message);
        }
    }
}

pub(super) struct Table {
    vectors: Vec<Vector>,
    enabled: bool,
    function_masked: bool,
}

impl Table {
    pub(super) fn new(vectors: u16) -> Self {
        let vector = || Vector {
            words: [0, 0, 0, MASKED],
            pending: false,
            open: None,
        };
        Self {
            vectors: (0..vectors).map(|_| vector()).collect(),
            enabled: false,
            function_masked: false,
        }
    }

    pub(super) fn enabled(&self) -> bool {
        self.enabled
    }

    fn open(&self) -> bool {
        self.enabled && !self.function_masked
    }

    fn numbered(&mut self) -> impl Iterator<Item = (u16, &mut Vector)> {
        (0..).zip(self.vectors.iter_mut())
    }

    pub(super) fn trigger(&mut self, sink: &dyn MsixSink, number: u16) -> bool {
        let enabled = self.enabled;
        match self.vectors.get_mut(usize::from(number)) {
            Some(vector) if enabled => {
                match vector.open {
                    Some(message) => sink.signal(number, message),
                    None => vector.pending = true,
                }
                true
            }
            _ => false,
        }
    }

    pub(super) fn set_control(&mut self, sink: &dyn MsixSink, control: u16) {
        self.enabled = control & MSIX_CONTROL_ENABLE != 0;
        self.function_masked = control & MSIX_CONTROL_FUNCTION_MASK != 0;
        let open = self.open();
        for (number, vector) in self.numbered() {
            vector.update(sink, number, open);
        }
    }

    /// Any access reads what is there; what is beyond the table stays as it is.
    pub(super) fn read(&self, offset: u64, data: &mut [u8]) {
        for (position, byte) in (offset..).zip(data) {
            let (entry, word, shift) = place(position);
            if let Some(vector) = self.vectors.get(entry) {
                *byte = (vector.words[word] >> shift) as u8;
            }
        }
    }

    /// Takes whole, aligned double words, or two at once. What other accesses do is undefined (PCI
    /// 3.0, section 6.8.2.1): here they do nothing.
    pub(super) fn write(&mut self, sink: &dyn MsixSink, offset: u64, data: &[u8]) {
        if !matches!(data.len(), 4 | 8) || !offset.is_multiple_of(data.len() as u64) {
            return;
        }
        let function_open = self.open();
        let (entry, first, _) = place(offset);
        let Ok(number) = u16::try_from(entry) else {
            return;
        };
        let Some(vector) = self.vectors.get_mut(entry) else {
            return;
        };
        // Both words of a wide access are in one entry, and the sink is told of both at once.
        for (word, bytes) in (first..ENTRY_WORDS).zip(data.chunks_exact(4)) {
            if let Ok(bytes) = bytes.try_into() {
                vector.words[word] = u32::from_le_bytes(bytes) & WRITABLE[word];
            }
        }
        vector.update(sink, number, function_open);
    }

    pub(super) fn read_pending(&mut self, sink: &dyn MsixSink, offset: u64, data: &mut [u8]) {
        for (position, byte) in (offset..).zip(data) {
            // Bits beyond the last vector are reserved, and zero.
            *byte = 0;
            for bit in 0..8u8 {
                let number = position.saturating_mul(8).saturating_add(bit.into());
                let Ok(number) = u16::try_from(number) else {
                    continue;
                };
                if let Some(vector) = self.vectors.get_mut(usize::from(number)) {
                    vector.collect(sink, number);
                    *byte |= u8::from(vector.pending) << bit;
                }
            }
        }
    }

    pub(super) fn state(&mut self, sink: &dyn MsixSink) -> MsixState {
        let vectors = self.numbered().map(|(number, vector)| {
            vector.collect(sink, number);
            let message = vector.message();
            VectorState {
                address: message.address,
                data: message.data,
                masked: vector.masked(),
                pending: vector.pending,
            }
        });
        MsixState {
            vectors: vectors.collect(),
        }
    }

    /// Takes over the vectors, and closes all of them until the control register is set.
    pub(super) fn restore(&mut self, sink: &dyn MsixSink, state: &MsixState) {
        self.enabled = false;
        for ((number, vector), saved) in self.numbered().zip(&state.vectors) {
            vector.update(sink, number, false);
            vector.collect(sink, number);
            let words = [
                saved.address as u32,
                (saved.address >> 32) as u32,
                saved.data,
                u32::from(saved.masked),
            ];
            for ((word, value), mask) in vector.words.iter_mut().zip(words).zip(WRITABLE) {
                *word = value & mask;
            }
            vector.pending = saved.pending;
        }
    }
}

/// The entry, the word in it, and the bit in that, of a byte of the table.
fn place(position: u64) -> (usize, usize, u32) {
    let entry = usize::try_from(position / 16).unwrap_or(usize::MAX);
    (
        entry,
        (position % 16 / 4) as usize,
        (position % 4) as u32 * 8,
    )
}
