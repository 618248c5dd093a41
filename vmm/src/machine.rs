//! The machine around the vCPUs: its buses, its devices, and the threads they work on.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kiln_device_api::panic_message;
use kiln_device_manager::Buses;
use kiln_devices::acpi::PowerButton;
use kiln_devices::legacy::serial::Serial;
use kiln_devices::virtio::balloon::BalloonControl;
use kiln_devices::virtio::block::BlockControl;
use kiln_devices::virtio::net::NetControl;
use kiln_memory::GuestMemory;
use kiln_virtio_device::VirtioTransport;
use tracing::Span;

use crate::events::EventSource;
use crate::io_threads::IoPool;
use crate::kvm::KvmVm;
use crate::metrics::MetricsSource;
use crate::{DeviceError, VfioDevice};

/// How long the end of a guest waits for a console that does not take the serial port's last
/// output.
pub(crate) const SERIAL_PATIENCE: Duration = Duration::from_secs(1);
/// The same where the machine was stopped, which is to be quick whatever the guest and its console
/// do.
pub(crate) const STOPPED_SERIAL_PATIENCE: Duration = Duration::from_millis(50);
/// How long a stop waits for everything to come to rest.
pub(crate) const STOP_PATIENCE: Duration = Duration::from_millis(80);

/// The machine around the vCPUs.
///
/// The order of the fields is the order of their end: devices before the threads they work on, and
/// all of them before the virtual machine and its memory.
pub(crate) struct Machine {
    /// What is logged about the machine is logged in it.
    pub(crate) span: Span,
    pub(crate) metrics: Arc<MetricsSource>,
    pub(crate) buses: Arc<Buses>,
    pub(crate) transports: Vec<Arc<dyn VirtioTransport>>,
    pub(crate) power_button: PowerButton,
    pub(crate) balloon: Option<BalloonControl>,
    pub(crate) disks: Vec<BlockControl>,
    pub(crate) nets: Vec<NetControl>,
    pub(crate) serial: Arc<Serial>,
    /// Dropping it joins the threads.
    pub(crate) io: IoPool,
    pub(crate) failure: Arc<DeviceFailure>,
    pub(crate) events: Arc<EventSource>,
    /// KVM's VFIO device, where somebody asked for it.
    pub(crate) vfio: Option<Arc<VfioDevice>>,
    pub(crate) vm: Arc<KvmVm>,
}

impl Machine {
    pub(crate) fn buses(&self) -> Arc<Buses> {
        Arc::clone(&self.buses)
    }

    pub(crate) fn memory(&self) -> &Arc<GuestMemory> {
        self.vm.memory()
    }

    pub(crate) fn failure(&self) -> Arc<DeviceFailure> {
        Arc::clone(&self.failure)
    }

    pub(crate) fn vfio(&mut self) -> Result<Arc<VfioDevice>, DeviceError> {
        let device = match self.vfio.take() {
            Some(device) => device,
            None => Arc::new(VfioDevice::create(self.vm.fd())?),
        };
        Ok(Arc::clone(self.vfio.insert(device)))
    }

    pub(crate) fn power_button(&self) -> PowerButton {
        self.power_button.clone()
    }

    /// No device works on a queue when this returns.
    pub(crate) fn pause_devices(&self) {
        self.each_device(|transport| transport.pause());
    }

    pub(crate) fn resume_devices(&self) {
        self.each_device(|transport| transport.resume());
    }

    /// Devices may be the embedder's own: a panic of one ends the machine, and does not reach the
    /// thread that this is called on.
    fn each_device(&self, f: impl Fn(&dyn VirtioTransport)) {
        for transport in &self.transports {
            if let Err(payload) = catch_unwind(AssertUnwindSafe(|| f(&**transport))) {
                let message = panic_message(&*payload);
                self.failure.report(format!("a device panicked: {message}"));
            }
        }
    }

    /// After the guest's end: takes the devices off their queues and writes out what the serial
    /// port still holds, for at most `patience`.
    pub(crate) fn stop_devices(&self, patience: Duration) {
        self.each_device(|transport| transport.reset());
        if !self.serial.close(patience) {
            tracing::warn!("the console did not take all of the serial port's output");
        }
    }
}

/// Told why a device failed.
type OnFailure = Box<dyn FnOnce(&str) + Send>;

/// Why a device failed on an I/O thread, and what to do about it.
#[derive(Default)]
pub(crate) struct DeviceFailure {
    message: OnceLock<String>,
    stop: Mutex<Option<OnFailure>>,
}

impl DeviceFailure {
    /// Says that a device failed. The first one counts.
    pub(crate) fn report(&self, message: String) {
        if self.message.set(message).is_ok() {
            self.call();
        }
    }

    /// Has `stop` called with the reason once a device has failed.
    pub(crate) fn on_failure(&self, stop: impl FnOnce(&str) + Send + 'static) {
        *self.stop.lock().unwrap_or_else(PoisonError::into_inner) = Some(Box::new(stop));
        if self.message.get().is_some() {
            self.call();
        }
    }

    pub(crate) fn message(&self) -> Option<&String> {
        self.message.get()
    }

    fn call(&self) {
        let stop = self
            .stop
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take();
        if let (Some(stop), Some(message)) = (stop, self.message.get()) {
            stop(message);
        }
    }
}
