//! The network device, over a cable whose other end is the bytes.

use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixDatagram;

use arbitrary::{Result, Unstructured};
use kiln_devices::virtio::net::{MacAddress, Net, NetBackend, NetControl, NetOptions, Offloads};
use kiln_memory::{GuestSlice, gather, scatter};
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};

use crate::guest::{DATA, Subject, attack};

const HEADER: usize = 12;
/// What a datagram socket takes at once.
const LARGEST: usize = 0x1_1000;

/// Does to a network device what the bytes say.
pub fn net(data: &[u8]) {
    attack(data, Network::default());
}

#[derive(Default)]
struct Network {
    /// The other end of the cable.
    peer: Option<UnixDatagram>,
    /// The device's end once more, to take off what it has not received.
    cable: Option<UnixDatagram>,
    control: Option<NetControl>,
}

struct Cable(UnixDatagram);

impl NetBackend for Cable {
    fn readiness(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }

    fn offloads(&self) -> Offloads {
        Offloads {
            checksum: true,
            tso4: true,
            tso6: true,
            ecn: true,
            ufo: true,
            uso: true,
        }
    }

    fn set_offloads(&mut self, _: Offloads) -> io::Result<()> {
        Ok(())
    }

    fn add_queue_pair(&mut self) -> io::Result<Box<dyn NetBackend>> {
        Ok(Box::new(Cable(self.0.try_clone()?)))
    }

    fn send(&mut self, packet: &[GuestSlice<'_>]) -> io::Result<()> {
        self.0.send(&gather(packet)).map(drop)
    }

    fn receive(&mut self, buffers: &[GuestSlice<'_>]) -> io::Result<usize> {
        let mut bytes = vec![0; LARGEST];
        let len = self.0.recv(&mut bytes)?;
        scatter(&bytes[..len], buffers);
        Ok(len)
    }

    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }
}

impl Subject for Network {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let (cable, peer) = UnixDatagram::pair().unwrap();
        for socket in [&cable, &peer] {
            socket.set_nonblocking(true).unwrap();
        }
        self.peer = Some(peer);
        self.cable = Some(cable.try_clone().unwrap());
        let options = NetOptions {
            mac: Some(MacAddress::new([2, 1, 2, 3, 4, 5])),
            queue_pairs: Some(2),
            ..NetOptions::default()
        };
        let net = Net::new(Cable(cable), options).unwrap();
        self.control = Some(net.control());
        Box::new(net)
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some(peer) = &self.peer else {
            return Ok(());
        };
        let len = match u.arbitrary::<u8>()? {
            0 => {
                while peer.recv(&mut [0; 1]).is_ok() {}
                return Ok(());
            }
            255 => {
                let up = u.arbitrary()?;
                self.control.iter().for_each(|control| control.set_link(up));
                return Ok(());
            }
            byte @ 1..200 => usize::from(byte),
            byte => usize::from(byte - 199) * 1237,
        };
        // Nobody may have read for long.
        let _ = peer.send(&vec![u.arbitrary()?; len]);
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        self.control
            .iter()
            .for_each(|control| control.set_link(true));
        driver.settle(8);
        let (peer, cable) = (self.peer.as_ref().unwrap(), self.cable.as_ref().unwrap());
        for end in [peer, cable] {
            while end.recv(&mut [0; 1]).is_ok() {}
        }
        driver.fill(DATA, &[0; HEADER]);
        driver.fill(DATA + HEADER as u64, b"a frame of the guest");
        driver.request(1, &[Buffer::readable(DATA, HEADER as u32 + 20)]);
        let mut bytes = [0; 100];
        let len = peer.recv(&mut bytes).unwrap();
        assert_eq!(&bytes[HEADER..len], b"a frame of the guest");
        // What was on the way before may come first.
        for _ in 0..400 {
            let _ = peer.send(&bytes[..len]);
            driver.fill(DATA, &[0; 100]);
            let got = driver.request(
                0,
                &[
                    Buffer::writable(DATA, 0x4000),
                    Buffer::writable(DATA + 0x4000, 0xc100),
                ],
            );
            if driver.bytes(DATA + HEADER as u64, 20) == b"a frame of the guest" {
                assert_eq!(got as usize, len);
                return;
            }
        }
        panic!("the frame of the network does not come");
    }
}
