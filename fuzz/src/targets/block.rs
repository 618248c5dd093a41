//! The block device, over a disk in memory.

use std::io;
use std::sync::{Arc, Mutex};

use arbitrary::{Result, Unstructured};
use kiln_devices::virtio::block::{
    Block, BlockBackend, BlockControl, BlockOptions, BlockProperties,
};
use kiln_memory::{GuestSlice, gather, scatter};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};

use crate::guest::{DATA, Subject, attack};

const SECTORS: usize = 64;

/// Does to a block device what the bytes say.
pub fn block(data: &[u8]) {
    let platter = Arc::default();
    attack(
        data,
        Host {
            platter,
            control: None,
        },
    );
}

/// The host's side: what is on the disk, and the device's control.
struct Host {
    platter: Arc<Mutex<Platter>>,
    control: Option<BlockControl>,
}

struct Disk(Arc<Mutex<Platter>>);

struct Platter {
    bytes: Vec<u8>,
    /// The next operations fail.
    fails: u8,
    /// How large the disk is when it is looked at next.
    sectors: usize,
    /// How large it was when it was looked at last.
    seen: usize,
}

impl Default for Platter {
    fn default() -> Self {
        Self {
            bytes: vec![0; SECTORS * 512],
            fails: 0,
            sectors: SECTORS,
            seen: SECTORS,
        }
    }
}

impl Platter {
    fn check(&mut self) -> io::Result<()> {
        if self.fails > 0 {
            self.fails -= 1;
            return Err(io::Error::other("as the input says"));
        }
        Ok(())
    }
}

impl BlockBackend for Disk {
    fn size(&self) -> u64 {
        (self.0.lock().unwrap().seen * 512) as u64
    }

    fn refresh_size(&mut self) -> io::Result<u64> {
        let mut platter = self.0.lock().unwrap();
        platter.check()?;
        platter.seen = platter.sectors;
        Ok((platter.seen * 512) as u64)
    }

    fn properties(&self) -> BlockProperties {
        BlockProperties {
            discard: true,
            write_zeroes: true,
            ..BlockProperties::default()
        }
    }

    fn discard(&mut self, offset: u64, len: u64) -> io::Result<()> {
        self.write_zeroes(offset, len, true)
    }

    fn write_zeroes(&mut self, offset: u64, len: u64, _: bool) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.check()?;
        platter.bytes[offset as usize..][..len as usize].fill(0);
        Ok(())
    }

    fn read_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.check()?;
        let len: usize = buffers.iter().map(GuestSlice::len).sum();
        scatter(&platter.bytes[offset as usize..][..len], buffers);
        Ok(())
    }

    fn write_at(&mut self, offset: u64, buffers: &[GuestSlice<'_>]) -> io::Result<()> {
        let mut platter = self.0.lock().unwrap();
        platter.check()?;
        let bytes = gather(buffers);
        platter.bytes[offset as usize..][..bytes.len()].copy_from_slice(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.lock().unwrap().check()
    }
}

impl Subject for Host {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let options = BlockOptions {
            queues: Some(2),
            ..BlockOptions::default()
        };
        {
            let mut platter = self.platter.lock().unwrap();
            platter.seen = platter.sectors;
        }
        let block = Block::new(Disk(Arc::clone(&self.platter)), options).unwrap();
        self.control = Some(block.control());
        Box::new(block)
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let byte: u8 = u.arbitrary()?;
        if byte < 128 {
            self.platter.lock().unwrap().fails = byte % 4;
        } else if let Some(control) = &self.control {
            // Never less than what the last request uses.
            self.platter.lock().unwrap().sectors = SECTORS - usize::from(byte % 60);
            let _ = control.refresh_size();
        }
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        let platter = Arc::clone(&self.platter);
        platter.lock().unwrap().fails = 0;
        // Writes sector 1 (type 1), and reads it again (type 0).
        let header = |kind: u8| [kind, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0];
        let (status, out, back) = (DATA + 0x100, DATA + 0x200, DATA + 0x400);
        driver.fill(out, &[0x5a; 512]);
        for (kind, data) in [
            (1, Buffer::readable(out, 512)),
            (0, Buffer::writable(back, 512)),
        ] {
            driver.fill(status, &[0xff]);
            driver.fill(DATA, &header(kind));
            let buffers = [
                Buffer::readable(DATA, 16),
                data,
                Buffer::writable(status, 1),
            ];
            driver.request(0, &buffers);
            assert_eq!(driver.bytes(status, 1), [0]);
        }
        assert_eq!(driver.bytes(back, 512), [0x5a; 512]);
        assert_eq!(platter.lock().unwrap().bytes[512..1024], [0x5a; 512]);
    }
}
