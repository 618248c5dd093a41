//! The bzImage format (Linux: Documentation/arch/x86/boot.rst).

use super::field::{u8_at, u16_at, u32_at, u64_at};
use super::{KernelProblem, Loaded};
use crate::Error;
use crate::file::ImageFile;
use crate::layout::{CMDLINE_MAX_SIZE, KERNEL_MIN_START, MMIO_HOLE_START};

/// Where the setup header begins, in the file and in `boot_params`.
pub(crate) const SETUP_HEADER_OFFSET: usize = 0x1f1;
/// Where the room for it in `boot_params` ends.
const SETUP_HEADER_LIMIT: usize = 0x290;
/// The header must reach behind `init_size`, the last field used here.
const SETUP_HEADER_MIN: usize = 0x264;

/// Fields of the header, as offsets in the file.
const SETUP_SECTS: usize = 0x1f1;
const SYSSIZE: usize = 0x1f4;
const BOOT_FLAG: usize = 0x1fe;
const JUMP_LENGTH: usize = 0x201;
const MAGIC: usize = 0x202;
const VERSION: usize = 0x206;
const LOADFLAGS: usize = 0x211;
const INITRD_ADDR_MAX: usize = 0x22c;
const XLOADFLAGS: usize = 0x236;
const CMDLINE_SIZE: usize = 0x238;
const PAYLOAD_LENGTH: usize = 0x24c;
const PREF_ADDRESS: usize = 0x258;
const INIT_SIZE: usize = 0x260;

const SECTOR: u64 = 512;
/// The unit of `syssize`.
const PARAGRAPH: u64 = 16;
/// Of `setup_sects`, where it says 0.
const DEFAULT_SETUP_SECTS: u64 = 4;
const MIN_VERSION: u16 = 0x020c;
const LOADED_HIGH: u8 = 1;
const XLF_KERNEL_64: u16 = 1;
/// Where the 64-bit entry is, behind the first byte that was loaded.
const ENTRY_64: u64 = 0x200;

/// What is known of a bzImage.
#[derive(Clone, Debug)]
pub(crate) struct BzImage {
    /// The setup header, of its own length.
    header: Vec<u8>,
    load_address: u64,
    /// The RAM that it needs to unpack itself, from `load_address`.
    init_size: u64,
    initrd_addr_max: u64,
    cmdline_size: usize,
}

impl BzImage {
    /// Looks at a file; `None` where it is no bzImage.
    pub(super) fn inspect(file: &ImageFile) -> Result<Option<Self>, Error> {
        let head = file.read(0, SETUP_HEADER_LIMIT)?;
        if head.get(MAGIC..MAGIC + 4) != Some(b"HdrS") || u16_at(&head, BOOT_FLAG) != 0xaa55 {
            return Ok(None);
        }
        let pe = pe_extent(file)?;
        match Self::from_head(&head, file.len(), pe) {
            Ok(bzimage) => Ok(Some(bzimage)),
            Err(problem) => Err(problem.of(file.name())),
        }
    }

    fn from_head(head: &[u8], len: u64, pe: u64) -> Result<Self, KernelProblem> {
        let [minor, major] = u16_at(head, VERSION).to_le_bytes();
        if u16_at(head, VERSION) < MIN_VERSION {
            return Err(KernelProblem::OldProtocol { major, minor });
        }
        let end = MAGIC + usize::from(u8_at(head, JUMP_LENGTH));
        if !(SETUP_HEADER_MIN..=SETUP_HEADER_LIMIT).contains(&end) {
            return Err(KernelProblem::BadBzImage(
                "its setup header is too short or too long",
            ));
        }
        if end > head.len() {
            return Err(KernelProblem::Truncated {
                has: len,
                needs: end as u64,
            });
        }
        if u8_at(head, LOADFLAGS) & LOADED_HIGH == 0 {
            return Err(KernelProblem::BadBzImage(
                "it is a zImage, to be loaded below 1 MiB",
            ));
        }
        if u16_at(head, XLOADFLAGS) & XLF_KERNEL_64 == 0 {
            return Err(KernelProblem::No64BitEntry);
        }
        let setup_sects = match u8_at(head, SETUP_SECTS) {
            0 => DEFAULT_SETUP_SECTS,
            sectors => u64::from(sectors),
        };
        let setup_size = (setup_sects + 1) * SECTOR;
        let system_size = u64::from(u32_at(head, SYSSIZE)) * PARAGRAPH;
        // Linux fills its last paragraph up. Programs that only borrow its format may not; they
        // have no payload to unpack.
        let slack = match u32_at(head, PAYLOAD_LENGTH) {
            0 => PARAGRAPH - 1,
            _ => 0,
        };
        let needs = (setup_size + system_size.saturating_sub(slack)).max(pe);
        if len < needs {
            return Err(KernelProblem::Truncated { has: len, needs });
        }
        let bzimage = Self {
            header: head[SETUP_HEADER_OFFSET..end].to_vec(),
            load_address: u64_at(head, PREF_ADDRESS),
            init_size: u64::from(u32_at(head, INIT_SIZE)),
            initrd_addr_max: u64::from(u32_at(head, INITRD_ADDR_MAX)),
            cmdline_size: u32_at(head, CMDLINE_SIZE) as usize,
        };
        bzimage.check(system_size, len - setup_size)?;
        Ok(bzimage)
    }

    /// Checks the numbers of the header against each other; `loaded` bytes will be loaded.
    fn check(&self, system_size: u64, loaded: u64) -> Result<(), KernelProblem> {
        if system_size <= ENTRY_64 {
            return Err(KernelProblem::BadBzImage(
                "it has no system behind its setup",
            ));
        }
        if loaded > self.init_size {
            return Err(KernelProblem::BadBzImage(
                "it asks for less memory than it fills",
            ));
        }
        let (start, end) = (
            self.load_address,
            self.load_address.saturating_add(self.init_size),
        );
        if start < KERNEL_MIN_START || end > MMIO_HOLE_START {
            return Err(KernelProblem::SegmentOutside { start, end });
        }
        Ok(())
    }

    /// The setup header, as in the file from [`SETUP_HEADER_OFFSET`].
    pub(crate) fn header(&self) -> &[u8] {
        &self.header
    }

    /// The highest address that a byte of the initrd may have.
    pub(crate) fn initrd_addr_max(&self) -> u64 {
        self.initrd_addr_max
    }

    pub(super) fn cmdline_size(&self) -> usize {
        self.cmdline_size.min(CMDLINE_MAX_SIZE as usize - 1)
    }

    pub(super) fn placement(&self) -> Loaded {
        let start = self.load_address;
        Loaded {
            entry: start + ENTRY_64,
            start,
            end: start + self.init_size,
        }
    }
}

/// How far a bzImage that is also an EFI program reaches: its sections, and the signature behind
/// them, which neither of the setup header's sizes counts. 0 where it is none.
///
/// Nothing of this is used to boot. It tells a file that lost its end from a whole one.
fn pe_extent(file: &ImageFile) -> Result<u64, Error> {
    /// From the PE signature: the COFF header, and the optional header behind it.
    const SECTION_COUNT: usize = 6;
    const OPTIONAL_SIZE: usize = 20;
    const OPTIONAL: usize = 24;
    const PE32_PLUS: u16 = 0x20b;
    /// In the optional header: the place and size of the table of certificates.
    const CERTIFICATES: usize = 144;
    const SECTION: usize = 40;
    /// More than any kernel's headers take.
    const MAX_HEADERS: usize = 0x1000;

    let dos = file.read(0, 0x40)?;
    if dos.get(..2) != Some(b"MZ") {
        return Ok(0);
    }
    let pe = file.read(u64::from(u32_at(&dos, 0x3c)), MAX_HEADERS)?;
    if pe.get(..4) != Some(b"PE\0\0") || u16_at(&pe, OPTIONAL) != PE32_PLUS {
        return Ok(0);
    }
    let mut extent = 0;
    let mut reaches = |offset: u32, size: u32| {
        extent = extent.max(if size == 0 {
            0
        } else {
            u64::from(offset) + u64::from(size)
        });
    };
    let optional_size = usize::from(u16_at(&pe, OPTIONAL_SIZE));
    if optional_size >= CERTIFICATES + 8 {
        let at = OPTIONAL + CERTIFICATES;
        reaches(u32_at(&pe, at), u32_at(&pe, at + 4));
    }
    for section in 0..usize::from(u16_at(&pe, SECTION_COUNT)).min(MAX_HEADERS / SECTION) {
        let at = OPTIONAL + optional_size + section * SECTION;
        reaches(u32_at(&pe, at + 20), u32_at(&pe, at + 16));
    }
    Ok(extent)
}
