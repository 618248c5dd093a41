//! The balloon.

use arbitrary::{Result, Unstructured};
use kiln_devices::virtio::balloon::{Balloon, BalloonControl, BalloonOptions};
use kiln_memory::MemorySize;
use kiln_virtio_device::VirtioDevice;
use kiln_virtio_device::testing::{Buffer, MockDriver};

use crate::guest::{DATA, Subject, attack};

const SIZE: MemorySize = MemorySize::mib(1);

/// Does to a balloon what the bytes say.
pub fn balloon(data: &[u8]) {
    attack(data, Host(None));
}

struct Host(Option<BalloonControl>);

impl Subject for Host {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        let options = BalloonOptions {
            free_page_reporting: true,
            ..BalloonOptions::default()
        };
        let balloon = Balloon::new(SIZE, options).unwrap();
        self.0 = Some(balloon.control());
        Box::new(balloon)
    }

    fn host(&mut self, u: &mut Unstructured<'_>) -> Result<()> {
        let Some(control) = &self.0 else {
            return Ok(());
        };
        if u.arbitrary()? {
            control.request_statistics();
        } else {
            let _ = control.set_target(MemorySize::bytes(u.arbitrary::<u16>()?.into()));
        }
        Ok(())
    }

    fn check(&mut self, driver: &mut MockDriver) {
        let page = DATA + 0x2000;
        driver.fill(page - 1, &[1; 0x1002]);
        driver.fill(DATA, &((page / 4096) as u32).to_le_bytes());
        driver.request(0, &[Buffer::readable(DATA, 4)]);
        // This page, and nothing around it.
        let bytes = driver.bytes(page - 1, 0x1002);
        assert_eq!((bytes[0], bytes[0x1001]), (1, 1));
        assert!(bytes[1..0x1001].iter().all(|byte| *byte == 0));
    }
}
