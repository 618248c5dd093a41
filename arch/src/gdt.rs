//! The global descriptor table that the boot vCPU starts with.
//!
//! The selectors are those of the Linux boot protocol: `__BOOT_CS` is 0x10 and `__BOOT_DS` is 0x18.
//! A descriptor in memory and the segment register loaded from it come from one [`Segment`], so
//! they cannot disagree.

use kvm_bindings::kvm_segment;

/// Selector of the code segment (`__BOOT_CS`).
pub(crate) const CODE_SELECTOR: u16 = 0x10;
/// Selector of the data segment (`__BOOT_DS`).
pub(crate) const DATA_SELECTOR: u16 = 0x18;
/// Selector of the task state segment.
pub(crate) const TASK_SELECTOR: u16 = 0x20;
/// The bytes of the table: five descriptors, and the upper half that the last has in long mode.
pub(crate) const SIZE: u64 = 6 * 8;

/// Segment types (Intel SDM volume 3, sections 3.4.5.1 and 3.5), already accessed or busy.
const TYPE_CODE: u8 = 0xb;
const TYPE_DATA: u8 = 0x3;
const TYPE_BUSY_TSS: u8 = 0xb;

/// What the boot vCPU's code segment is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Mode {
    /// 32-bit protected mode.
    Protected,
    /// 64-bit mode.
    Long,
}

/// A segment, as a descriptor and as a register.
#[derive(Clone, Copy)]
pub(crate) struct Segment {
    selector: u16,
    limit: u32,
    kind: u8,
    /// Code or data, and not a system segment.
    memory: bool,
    /// Its code is 64-bit code.
    long: bool,
    /// Its code or stack is 32-bit.
    big: bool,
}

impl Segment {
    pub(crate) const fn code(mode: Mode) -> Self {
        let long = matches!(mode, Mode::Long);
        let limit = u32::MAX;
        Self {
            selector: CODE_SELECTOR,
            limit,
            kind: TYPE_CODE,
            memory: true,
            long,
            big: !long,
        }
    }

    pub(crate) const fn data() -> Self {
        let (selector, limit) = (DATA_SELECTOR, u32::MAX);
        Self {
            selector,
            limit,
            kind: TYPE_DATA,
            memory: true,
            long: false,
            big: true,
        }
    }

    /// A task state segment at address 0, of the smallest size that there is. Nothing uses it, but
    /// the task register must hold one on Intel processors, and PVH asks for it.
    pub(crate) const fn task() -> Self {
        let (selector, limit) = (TASK_SELECTOR, 0x67);
        Self {
            selector,
            limit,
            kind: TYPE_BUSY_TSS,
            memory: false,
            long: false,
            big: false,
        }
    }

    /// Limits above a megabyte are counted in pages.
    const fn granular(self) -> bool {
        self.limit > 0xf_ffff
    }

    /// The descriptor in the table (Intel SDM volume 3, section 3.4.5).
    pub(crate) const fn descriptor(self) -> u64 {
        let limit = (if self.granular() {
            self.limit >> 12
        } else {
            self.limit
        }) as u64;
        let access = self.kind as u64 | (self.memory as u64) << 4 | 1 << 7;
        let flags =
            (self.long as u64) << 1 | (self.big as u64) << 2 | (self.granular() as u64) << 3;
        limit & 0xffff | access << 40 | (limit >> 16) << 48 | flags << 52
    }

    /// The register loaded from it.
    pub(crate) fn register(self) -> kvm_segment {
        kvm_segment {
            base: 0,
            limit: self.limit,
            selector: self.selector,
            type_: self.kind,
            present: 1,
            dpl: 0,
            db: u8::from(self.big),
            s: u8::from(self.memory),
            l: u8::from(self.long),
            g: u8::from(self.granular()),
            avl: 0,
            unusable: 0,
            padding: 0,
        }
    }
}

/// The table's bytes.
pub(crate) fn table(mode: Mode) -> [u8; SIZE as usize] {
    let mut bytes = [0; SIZE as usize];
    for segment in [Segment::code(mode), Segment::data(), Segment::task()] {
        let at = usize::from(segment.selector);
        bytes[at..at + 8].copy_from_slice(&segment.descriptor().to_le_bytes());
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn descriptors_are_the_flat_ones_of_the_boot_protocols() {
        assert_eq!(
            Segment::code(Mode::Long).descriptor(),
            0x00af_9b00_0000_ffff
        );
        assert_eq!(
            Segment::code(Mode::Protected).descriptor(),
            0x00cf_9b00_0000_ffff
        );
        assert_eq!(Segment::data().descriptor(), 0x00cf_9300_0000_ffff);
        assert_eq!(Segment::task().descriptor(), 0x0000_8b00_0000_0067);
    }

    #[test]
    fn each_descriptor_lies_where_its_selector_points() {
        let table = table(Mode::Long);
        assert_eq!(table[..16], [0; 16]);
        for segment in [Segment::code(Mode::Long), Segment::data(), Segment::task()] {
            let at = usize::from(segment.register().selector);
            assert_eq!(table[at..at + 8], segment.descriptor().to_le_bytes());
        }
        assert_eq!(table[0x28..], [0; 8]);
    }

    #[test]
    fn a_register_has_its_whole_limit() {
        let code = Segment::code(Mode::Protected).register();
        assert_eq!((code.limit, code.g, code.db, code.l), (u32::MAX, 1, 1, 0));
        let task = Segment::task().register();
        assert_eq!((task.limit, task.g, task.s, task.type_), (0x67, 0, 0, 0xb));
    }
}
