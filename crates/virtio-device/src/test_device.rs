//! A device for this crate's own tests: it copies what it reads to where it may write.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use kiln_io_thread::{EventSet, IoEvent, Registrar};
use vmm_sys_util::eventfd::EventFd;

use crate::{
    ActivateError, Activation, ActiveQueue, QueueError, QueueHandler, Turn, VirtioDevice,
    VirtioInterrupt, Worker,
};

/// What a test makes the device do, and learns of it.
#[derive(Default)]
pub(crate) struct Controls {
    pub(crate) refuse_features: AtomicBool,
    pub(crate) refuse_start: AtomicBool,
    pub(crate) panic: AtomicBool,
    pub(crate) calls: AtomicUsize,
    pub(crate) drained: AtomicUsize,
    /// Chains are put back instead of being answered, until `wake` is written.
    pub(crate) hold: AtomicBool,
    pub(crate) wake: Mutex<Option<Arc<EventFd>>>,
    pub(crate) interrupt: Mutex<Option<Arc<dyn VirtioInterrupt>>>,
    pub(crate) features: Mutex<u64>,
    /// The queues that the last `deactivate` gave: index, next available, next used.
    pub(crate) given_back: Mutex<Vec<u16>>,
}

pub(crate) struct Echo {
    controls: Arc<Controls>,
}

impl QueueHandler for Echo {
    fn process(
        &mut self,
        turn: &mut Turn<'_>,
        _registrar: &mut Registrar<'_, '_>,
    ) -> Result<(), QueueError> {
        self.controls.calls.fetch_add(1, Ordering::SeqCst);
        assert!(
            !self.controls.panic.load(Ordering::SeqCst),
            "as the test asked"
        );
        while let Some(mut chain) = turn.pop()? {
            if self.controls.hold.load(Ordering::SeqCst) {
                turn.put_back(chain);
                break;
            }
            let len = chain.readable.len().min(chain.writable.len()).min(4096);
            let mut data = vec![0; len];
            chain.readable.read(&mut data)?;
            chain.writable.write(&data)?;
            turn.complete(chain, len as u32)?;
        }
        Ok(())
    }

    fn start(&mut self, features: u64, registrar: &mut Registrar<'_, '_>) -> io::Result<()> {
        *self.controls.features.lock().unwrap() = features;
        if self.controls.refuse_start.load(Ordering::SeqCst) {
            return Err(io::Error::other("as the test asked"));
        }
        if let Some(wake) = &*self.controls.wake.lock().unwrap() {
            registrar.add(&**wake, Self::FIRST_TOKEN, EventSet::IN)?;
        }
        Ok(())
    }

    fn ready(&mut self, event: IoEvent) -> Option<u16> {
        assert_eq!(event.token, Self::FIRST_TOKEN);
        let wake = self.controls.wake.lock().unwrap().clone().unwrap();
        wake.read().unwrap();
        self.controls.hold.store(false, Ordering::SeqCst);
        Some(0)
    }

    fn drain(&mut self, _turn: &mut Turn<'_>) {
        self.controls.drained.fetch_add(1, Ordering::SeqCst);
    }
}

pub(crate) const FEATURE: u64 = 1 << 5;
pub(crate) const QUEUE_SIZES: [u16; 2] = [64, 16];

pub(crate) struct EchoDevice {
    worker: Worker<Echo>,
    controls: Arc<Controls>,
    config: [u8; 8],
}

impl EchoDevice {
    pub(crate) fn boxed() -> (Box<dyn VirtioDevice>, Arc<Controls>) {
        let controls = Arc::new(Controls::default());
        (Self::with(&controls), controls)
    }

    pub(crate) fn with(controls: &Arc<Controls>) -> Box<dyn VirtioDevice> {
        Box::new(Self {
            worker: Worker::new(Echo {
                controls: Arc::clone(controls),
            }),
            controls: Arc::clone(controls),
            config: *b"configur",
        })
    }
}

impl VirtioDevice for EchoDevice {
    fn device_type(&self) -> u32 {
        42
    }

    fn features(&self) -> u64 {
        // Bits 24 and 34 do not belong to a device type, and are not to be offered.
        FEATURE | 1 << 24 | 1 << 34 | 1 << 50
    }

    fn queue_max_sizes(&self) -> &[u16] {
        &QUEUE_SIZES
    }

    fn validate_features(&self, _acknowledged: u64) -> bool {
        !self.controls.refuse_features.load(Ordering::SeqCst)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, at) in data.iter_mut().zip(offset..) {
            if let Some(value) = self.config.get(at as usize) {
                *byte = *value;
            }
        }
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        for (byte, at) in data.iter().zip(offset..) {
            if let Some(value) = self.config.get_mut(at as usize) {
                *value = *byte;
            }
        }
    }

    fn activate(&mut self, activation: Activation) -> Result<(), ActivateError> {
        *self.controls.interrupt.lock().unwrap() = Some(Arc::clone(&activation.interrupt));
        self.worker.activate(activation)
    }

    fn deactivate(&mut self) -> Vec<ActiveQueue> {
        let queues = self.worker.deactivate();
        *self.controls.given_back.lock().unwrap() = queues.iter().map(|q| q.index).collect();
        queues
    }
}
