//! A guest's RAM, for the tests of qcow2 images in `src` and in here.

use std::io;

use kiln_memory::{GuestMemory, GuestSlice, MemoryOptions, allocate};
use vm_memory::{GuestAddress, GuestMemoryBackend};

use super::{BlockBackend, Qcow2File};

/// A guest's RAM, from which disks are read and written in pieces of odd sizes.
pub(super) struct Ram(GuestMemory);

const RAM: usize = 8 << 20;

impl Ram {
    pub(super) fn new() -> Self {
        let regions = [(GuestAddress(0), RAM)];
        Self(allocate(&regions, &MemoryOptions::default()).unwrap())
    }

    pub(super) fn pieces(&self, len: usize) -> Vec<GuestSlice<'_>> {
        let mut pieces = Vec::new();
        let mut at = 0;
        while at < len {
            let now = (1 + at * 7 % 9973).min(len - at);
            pieces.push(self.0.get_slice(GuestAddress(at as u64), now).unwrap());
            at += now;
        }
        pieces
    }

    pub(super) fn read(
        &self,
        disk: &mut Qcow2File,
        offset: u64,
        len: usize,
    ) -> io::Result<Vec<u8>> {
        // What is not filled is seen.
        kiln_memory::scatter(&vec![0xee; len], self.pieces(len));
        disk.read_at(offset, &self.pieces(len))?;
        Ok(kiln_memory::gather(&self.pieces(len)))
    }

    pub(super) fn write(&self, disk: &mut Qcow2File, offset: u64, bytes: &[u8]) -> io::Result<()> {
        kiln_memory::scatter(bytes, self.pieces(bytes.len()));
        disk.write_at(offset, &self.pieces(bytes.len()))
    }

    /// All of the disk.
    pub(super) fn contents(&self, disk: &mut Qcow2File) -> Vec<u8> {
        let mut bytes = Vec::new();
        while (bytes.len() as u64) < disk.size() {
            let left = disk.size() - bytes.len() as u64;
            let now = left.min(RAM as u64) as usize;
            bytes.extend(self.read(disk, bytes.len() as u64, now).unwrap());
        }
        bytes
    }
}
