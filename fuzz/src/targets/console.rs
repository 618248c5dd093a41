//! The console, with two more ports.

use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;

use arbitrary::{Result, Unstructured};
use kiln_devices::console::{Console, ConsoleInput, ConsoleOutput};
use kiln_devices::virtio::console::{ConsoleSize, Port, VirtioConsole};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};

use crate::guest::{DATA, Subject, attack};

/// Does to a console what the bytes say.
pub fn console(data: &[u8]) {
    let size = ConsoleSize::new(80, 25);
    attack(
        data,
        Host {
            size,
            ends: Vec::new(),
        },
    );
}

/// The host's ends of the console and of a port.
struct Host {
    size: ConsoleSize,
    ends: Vec<UnixStream>,
}

fn pair() -> (UnixStream, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    ours.set_nonblocking(true).unwrap();
    (ours, theirs)
}

/// Reads all that there is, so that there is room again.
fn empty(end: &mut UnixStream) -> Vec<u8> {
    let mut all = Vec::new();
    let _ = end.read_to_end(&mut all);
    all
}

impl Subject for Host {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (console, theirs) = pair();
        let (port, socket) = pair();
        self.ends = vec![console, port];
        let output = ConsoleOutput::fd(theirs.try_clone().unwrap().into());
        let line = Console::new(ConsoleInput::fd(theirs.into()), output);
        let ports = vec![
            Port::socket("org.kiln.socket", socket),
            Port::new(
                "org.kiln.bytes",
                Console::new(ConsoleInput::bytes("x"), ConsoleOutput::null()),
            ),
        ];
        Box::new(VirtioConsole::new(line, ports, self.size.clone()).unwrap())
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        match u.arbitrary::<u8>()? % 4 {
            0 => self.size.set(u.arbitrary()?, u.arbitrary()?),
            1 if self.ends.len() > 1 => drop(self.ends.pop()),
            what => {
                let index = usize::from(u.arbitrary::<u8>()?) % self.ends.len();
                let end = &mut self.ends[index];
                if what == 2 {
                    empty(end);
                } else {
                    let len = usize::from(u.arbitrary::<u16>()?) % 9000;
                    let _ = end.write(&vec![b'a'; len]);
                }
            }
        }
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        let end = &mut self.ends[0];
        empty(end);
        driver.fill(DATA, b"from the guest");
        driver.request(1, &[Buffer::readable(DATA, 14)]);
        assert!(empty(end).ends_with(b"from the guest"));
        // What came before is to be read, first.
        assert_eq!(end.write(b"~").unwrap(), 1);
        for _ in 0..10_000 {
            let len = driver.request(0, &[Buffer::writable(DATA, 0x4000)]);
            assert!((1..=0x4000).contains(&len));
            if driver.bytes(DATA + u64::from(len) - 1, 1) == b"~" {
                return;
            }
        }
        panic!("what the host sends does not come");
    }
}
