//! The socket device, with programs of the host on both sides of its sockets.

use std::io::Write as _;
use std::io::{self, Read as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;

use arbitrary::{Result, Unstructured};
use kiln_devices::virtio::vsock::Vsock;
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};
use tempfile::TempDir;

use crate::guest::{DATA, Subject, attack};

const CID: u32 = 3;
const HOST: u64 = 2;
/// The port that a program of the host listens on.
const PORT: u32 = 7;
const REQUEST: u16 = 1;
const RESPONSE: u16 = 2;
/// The most clients: each has a file descriptor.
const MOST: usize = 16;

/// Does to a socket device what the bytes say.
pub fn vsock(data: &[u8]) {
    let folder = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir());
    attack(
        data,
        Host {
            folder: folder.unwrap(),
            devices: 0,
            listener: None,
            streams: Vec::new(),
        },
    );
}

struct Host {
    folder: TempDir,
    devices: usize,
    listener: Option<UnixListener>,
    streams: Vec<UnixStream>,
}

impl Host {
    fn path(&self) -> PathBuf {
        self.folder.path().join(self.devices.to_string())
    }

    fn connect(&mut self, greeting: &[u8]) {
        if self.streams.len() == MOST {
            self.streams.remove(0);
        }
        if let Ok(mut stream) = UnixStream::connect(self.path()) {
            stream.set_nonblocking(true).unwrap();
            let _ = stream.write(greeting);
            self.streams.push(stream);
        }
    }

    fn accept(&mut self) {
        if let Some(listener) = &self.listener
            && let Ok((stream, _)) = listener.accept()
        {
            stream.set_nonblocking(true).unwrap();
            self.streams.truncate(MOST - 1);
            self.streams.push(stream);
        }
    }
}

impl Subject for Host {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        // The device before may still be there.
        self.devices += 1;
        let path = self.path();
        let device = Vsock::new(CID, &path).unwrap();
        let listener = UnixListener::bind(format!("{}_{PORT}", path.display())).unwrap();
        listener.set_nonblocking(true).unwrap();
        self.listener = Some(listener);
        Box::new(device)
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let index = usize::from(u.arbitrary::<u8>()?);
        match u.arbitrary::<u8>()? % 8 {
            0 | 1 => {
                let greeting = format!("CONNECT {}\n", u.arbitrary::<u8>()?);
                self.connect(greeting.as_bytes());
            }
            2 => {
                let len = usize::from(u.arbitrary::<u8>()? % 64).min(u.len());
                let greeting = u.bytes(len)?.to_vec();
                self.connect(&greeting);
            }
            3 => self.accept(),
            4 if !self.streams.is_empty() => {
                let index = index % self.streams.len();
                self.streams.remove(index);
            }
            5 => self.listener = None,
            what => {
                if let Some(index) = index.checked_rem(self.streams.len()) {
                    let stream = &mut self.streams[index];
                    let len = usize::from(u.arbitrary::<u16>()?) % 5000;
                    if what == 6 {
                        let _ = stream.write(&vec![b'a'; len]);
                    } else {
                        let _ = stream.read(&mut vec![0; len]);
                    }
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        // A program of the guest connects to one of the host.
        if self.listener.is_none() {
            let path = format!("{}_{PORT}", self.path().display());
            let _ = std::fs::remove_file(&path);
            let listener = UnixListener::bind(path).unwrap();
            listener.set_nonblocking(true).unwrap();
            self.listener = Some(listener);
        }
        let listener = self.listener.as_ref().unwrap();
        while listener.accept().is_ok() {}
        driver.fill(DATA, &packet(REQUEST));
        driver.request(1, &[Buffer::readable(DATA, 44)]);
        match listener.accept() {
            Ok(_) => {}
            Err(error) => panic!("{error}"),
        }
        // Requests of clients may be told first.
        for _ in 0..64 {
            driver.request(0, &[Buffer::writable(DATA, 4096)]);
            let bytes = driver.bytes(DATA, 44);
            if bytes[20..24] == 99_u32.to_le_bytes() && bytes[16..20] == PORT.to_le_bytes() {
                assert_eq!(bytes[30..32], RESPONSE.to_le_bytes());
                return;
            }
        }
        panic!("{}", io::Error::other("no answer comes"));
    }
}

/// A packet of the guest's port 99, with no data (virtio 1.3, section 5.10.6).
fn packet(operation: u16) -> Vec<u8> {
    let mut bytes = u64::from(CID).to_le_bytes().to_vec();
    bytes.extend(HOST.to_le_bytes());
    bytes.extend(99_u32.to_le_bytes());
    bytes.extend(PORT.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(1_u16.to_le_bytes());
    bytes.extend(operation.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes.extend(0x1_0000_u32.to_le_bytes());
    bytes.extend(0_u32.to_le_bytes());
    bytes
}
