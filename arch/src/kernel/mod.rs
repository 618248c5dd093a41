//! Kernel files: what they are, whether they are whole, and how they are started.
//!
//! A file is looked at, not believed: whether it is a bzImage or an ELF image is seen from its
//! content, and everything that can be known to be wrong without guest memory is found by
//! [`Kernel::open`]. A bzImage is loaded by linux-loader, which is given only what was checked
//! here; an ELF image is mapped, which linux-loader cannot.

mod bzimage;
mod elf;
mod field;
mod problem;
mod sections;

use std::fs::File;
use std::path::Path;

use kiln_kernel_cache::{KernelCache, UnpackError};
use kiln_memory::GuestMemory;
use linux_loader::loader::bzimage::BzImage as BzImageLoader;
use linux_loader::loader::{KernelLoader, KernelLoaderResult};
use vm_memory::{Bytes, GuestAddress};

pub(crate) use bzimage::{BzImage, SETUP_HEADER_OFFSET};
pub use problem::KernelProblem;

use crate::Error;
use crate::file::ImageFile;
use crate::layout::KERNEL_MIN_START;

/// How a kernel is entered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum BootProtocol {
    /// The 64-bit entry of the Linux boot protocol: long mode, RSI points to `boot_params`.
    Linux64,
    /// The PVH entry (`XEN_ELFNOTE_PHYS32_ENTRY`): 32-bit protected mode without paging, EBX
    /// points to `hvm_start_info`.
    Pvh,
}

/// What a kernel file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum KernelFormat {
    /// A bzImage: what distributions install as `vmlinuz`.
    BzImage,
    /// A 64-bit ELF image, such as `vmlinux`.
    Elf,
    /// Bare 64-bit code, with no header at all.
    Code,
}

/// The command line that an ELF kernel takes: Linux has 2048 bytes for it, with the final NUL.
const ELF_CMDLINE_SIZE: usize = 2047;

/// A kernel that was looked at and found whole.
///
/// It can be loaded into any number of machines; clones share the open file.
///
/// Whole pages of an ELF image are mapped into the guest's RAM and not read, so that loading takes
/// no time, and machines share the host's copy. The file must therefore not be changed in place as
/// long as a machine lives: the guest may see the change, and the process gets SIGBUS where the file
/// is cut short. Replacing it by renaming another, as package managers do, is safe.
/// [`read`](Self::read) is for files that are not so.
///
/// ```no_run
/// use kiln_arch::{BootProtocol, Kernel};
///
/// let kernel = Kernel::open("vmlinux")?.with_protocol(BootProtocol::Linux64)?;
/// println!("{} is a {:?}", kernel.name(), kernel.format());
/// # Ok::<(), kiln_arch::Error>(())
/// ```
#[derive(Clone, Debug)]
pub struct Kernel {
    image: Image,
    protocol: BootProtocol,
    may_map: bool,
}

#[derive(Clone, Debug)]
enum Image {
    Compressed(ImageFile, BzImage),
    /// An ELF image, with the bzImage that it was unpacked from, if it was.
    Elf(ImageFile, elf::Elf, Option<BzImage>),
    Code(Vec<u8>),
}

/// Where a loaded kernel is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Loaded {
    /// Where it is entered.
    pub(crate) entry: u64,
    /// The RAM that it needs for itself at its start, from its first byte.
    pub(crate) start: u64,
    /// The byte behind it.
    pub(crate) end: u64,
}

impl Kernel {
    /// Opens and inspects a kernel file.
    ///
    /// The boot protocol is then the one that is sure to work: PVH for an ELF image that has a PVH
    /// entry, since what its ELF entry expects is not written in the file; the 64-bit Linux entry
    /// for all others. [`with_protocol`](Self::with_protocol) chooses another.
    ///
    /// A file that lost its end is refused, wherever it was cut. What lies behind the end of an
    /// ELF image is not looked at: a vmlinux unpacked from a bzImage has relocations there, which
    /// only the bzImage's own code uses.
    ///
    /// # Errors
    ///
    /// [`Error::File`], [`Error::NotAFile`] or [`Error::Empty`] where it cannot be read, and
    /// [`Error::Kernel`] where it is not a whole kernel for this machine.
    pub fn open(path: impl AsRef<Path>) -> Result<Self, Error> {
        Self::inspect(ImageFile::open("kernel", path.as_ref())?)
    }

    /// Inspects a kernel in an open file, named `name` in messages. See [`open`](Self::open).
    ///
    /// The position of the file is moved when the kernel is loaded.
    ///
    /// # Errors
    ///
    /// As for [`open`](Self::open).
    pub fn from_file(file: File, name: impl Into<String>) -> Result<Self, Error> {
        Self::inspect(ImageFile::new("kernel", file, name.into())?)
    }

    /// Bare 64-bit code: it is loaded at [`KERNEL_MIN_START`] and entered at its first byte, with
    /// the registers and the memory of the 64-bit Linux entry. Good for tests and tiny guests.
    ///
    /// # Errors
    ///
    /// [`Error::Empty`] where there is none.
    pub fn from_code(code: &[u8]) -> Result<Self, Error> {
        if code.is_empty() {
            return Err(Error::Empty {
                kind: "kernel",
                name: CODE_NAME.to_owned(),
            });
        }
        Ok(Self {
            image: Image::Code(code.to_vec()),
            protocol: BootProtocol::Linux64,
            may_map: false,
        })
    }

    fn inspect(file: ImageFile) -> Result<Self, Error> {
        if let Some(elf) = elf::Elf::inspect(&file)? {
            let protocol = elf.default_protocol();
            return Ok(Self {
                image: Image::Elf(file, elf, None),
                protocol,
                may_map: true,
            });
        }
        if let Some(bzimage) = BzImage::inspect(&file)? {
            let protocol = BootProtocol::Linux64;
            return Ok(Self {
                image: Image::Compressed(file, bzimage),
                protocol,
                may_map: false,
            });
        }
        Err(KernelProblem::NotAKernel.of(file.name()))
    }

    /// Unpacks the kernel in a bzImage here, so that the guest does not: what is started is then the
    /// ELF image in it, with what the bzImage says of itself. It is found in the cache if one is
    /// given and has it, or put there; else it is in memory, which clones share. Other kernels stay
    /// as they are.
    ///
    /// The bzImage's own code, which then does not run, would also have moved the kernel to a random
    /// address (KASLR).
    ///
    /// # Errors
    ///
    /// [`Error::Unpack`] where it cannot be unpacked, and [`Error::Kernel`] where what comes out is
    /// not a kernel for this machine. Such a bzImage may still start when the guest unpacks it.
    pub fn unpacked(self, cache: Option<&KernelCache>) -> Result<Self, Error> {
        let Image::Compressed(file, bzimage) = self.image else {
            return Ok(self);
        };
        let name = file.name().to_owned();
        let unpack = |file: &mut File| match cache {
            Some(cache) => cache.vmlinux(file).map(|vmlinux| vmlinux.file),
            None => kiln_kernel_cache::unpack_into_memory(file),
        };
        let fail = |source: UnpackError| Error::Unpack {
            name: name.clone(),
            source,
        };
        let vmlinux = file.unchanged(unpack)?.map_err(fail)?;
        let vmlinux = ImageFile::new("kernel", vmlinux, name.clone())?;
        let elf = elf::Elf::inspect(&vmlinux)?;
        let elf = elf.ok_or_else(|| fail(UnpackError::NotElf))?;
        elf.entry(self.protocol)
            .map_err(|problem| problem.of(&name))?;
        Ok(Self {
            image: Image::Elf(vmlinux, elf, Some(bzimage)),
            protocol: self.protocol,
            may_map: true,
        })
    }

    /// Has the file read when it is loaded, and not mapped. It can then be changed once the machines
    /// are built.
    #[must_use]
    pub fn read(mut self) -> Self {
        self.may_map = false;
        self
    }

    /// Chooses the boot protocol.
    ///
    /// # Errors
    ///
    /// [`Error::Kernel`] where the kernel has no such entry. Only an ELF image can have a PVH entry.
    /// Whether that in a bzImage has one is seen when it is [`unpacked`](Self::unpacked); one that
    /// is not is refused when a machine is built.
    pub fn with_protocol(mut self, protocol: BootProtocol) -> Result<Self, Error> {
        let fail = |problem: KernelProblem| problem.of(self.name());
        match (&self.image, protocol) {
            (Image::Elf(_, elf, _), _) => {
                elf.entry(protocol).map_err(fail)?;
            }
            (Image::Code(_), BootProtocol::Pvh) => return Err(fail(KernelProblem::NoPvhEntry)),
            _ => {}
        }
        self.protocol = protocol;
        Ok(self)
    }

    /// Its name, for messages.
    pub fn name(&self) -> &str {
        match &self.image {
            Image::Compressed(file, _) | Image::Elf(file, ..) => file.name(),
            Image::Code(_) => CODE_NAME,
        }
    }

    /// What the file is.
    pub fn format(&self) -> KernelFormat {
        match &self.image {
            Image::Compressed(..) => KernelFormat::BzImage,
            Image::Elf(..) => KernelFormat::Elf,
            Image::Code(_) => KernelFormat::Code,
        }
    }

    /// How it will be entered.
    pub fn protocol(&self) -> BootProtocol {
        self.protocol
    }

    /// What of the guest's memory the kernel will surely change when it starts, of what is mapped
    /// from its file: guest physical address and size in bytes of each part. Each page of it costs
    /// the guest three faults, unless it is [taken](kiln_memory::populate) before.
    pub fn changing_parts(&self) -> Vec<(GuestAddress, u64)> {
        match &self.image {
            Image::Elf(_, elf, _) if self.may_map => {
                let ranges = elf.changing().iter();
                ranges
                    .map(|range| (GuestAddress(range.start), range.end - range.start))
                    .collect()
            }
            _ => Vec::new(),
        }
    }

    /// The setup header and what follows from it, of a bzImage or of what was unpacked from one.
    pub(crate) fn bzimage(&self) -> Option<&BzImage> {
        match &self.image {
            Image::Compressed(_, bzimage) | Image::Elf(_, _, Some(bzimage)) => Some(bzimage),
            _ => None,
        }
    }

    /// The most bytes that its command line may have, without the final NUL.
    pub(crate) fn cmdline_size(&self) -> usize {
        self.bzimage()
            .map_or(ELF_CMDLINE_SIZE, BzImage::cmdline_size)
    }

    /// Where it will be, if RAM from address 0 ends at `ram_end`.
    pub(crate) fn placement(&self, ram_end: u64) -> Result<Loaded, Error> {
        let fail = |problem: KernelProblem| problem.of(self.name());
        let loaded = match &self.image {
            Image::Compressed(_, bzimage) => match self.protocol {
                BootProtocol::Linux64 => bzimage.placement(),
                BootProtocol::Pvh => return Err(fail(KernelProblem::NoPvhEntry)),
            },
            Image::Elf(_, elf, _) => {
                let entry = elf.entry(self.protocol).map_err(fail)?;
                let (start, end) = elf.extent();
                Loaded { entry, start, end }
            }
            Image::Code(code) => {
                let (start, size) = (KERNEL_MIN_START, code.len() as u64);
                Loaded {
                    entry: start,
                    start,
                    end: start.saturating_add(size),
                }
            }
        };
        if loaded.end > ram_end {
            return Err(fail(KernelProblem::OutsideRam {
                end: loaded.end,
                ram_end,
            }));
        }
        Ok(loaded)
    }

    /// Loads it to where [`placement`](Self::placement) said. Guest memory must be all zeros there.
    pub(crate) fn load(&self, memory: &GuestMemory, placed: &Loaded) -> Result<(), Error> {
        match &self.image {
            Image::Elf(file, elf, _) => elf.load(memory, file, self.may_map),
            Image::Compressed(file, _) => self.loaded(file.rewound(|file| {
                BzImageLoader::load(memory, Some(GuestAddress(placed.start)), file, None)
            })?),
            Image::Code(code) => memory
                .write_slice(code, GuestAddress(placed.start))
                .map_err(|source| Error::Write {
                    what: "the code",
                    address: placed.start,
                    source,
                }),
        }
    }

    fn loaded(
        &self,
        result: linux_loader::loader::Result<KernelLoaderResult>,
    ) -> Result<(), Error> {
        match result {
            Ok(_) => Ok(()),
            Err(source) => Err(Error::Load {
                name: self.name().to_owned(),
                source,
            }),
        }
    }
}

const CODE_NAME: &str = "bare code";

#[cfg(test)]
pub(crate) mod tests;
