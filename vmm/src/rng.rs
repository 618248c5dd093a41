//! The entropy device of the machine.

use std::fmt;
use std::io::Read;

use kiln_devices::rate_limit::RateLimit;
use kiln_devices::virtio::rng::{Rng as RngDevice, RngOptions};

use crate::{BuildError, Transport};

/// An entropy device (virtio-rng), by which the guest has random numbers of the host's.
#[derive(Default)]
pub struct Rng {
    /// Where it is not the host's kernel.
    reader: Option<Box<dyn Read + Send>>,
    options: RngOptions,
    pub(crate) transport: Option<Transport>,
}

impl Rng {
    /// A device with the random numbers of the host's kernel.
    pub fn new() -> Self {
        Self::default()
    }

    /// A device with random numbers of your own. The reader is called on the I/O thread and must
    /// not block; where it has nothing, it is tried again a second later.
    pub fn from_reader(reader: impl Read + Send + 'static) -> Self {
        Self {
            reader: Some(Box::new(reader)),
            ..Self::default()
        }
    }

    /// How many bytes the guest can have; any number by default.
    #[must_use]
    pub fn rate_limit(mut self, limit: RateLimit) -> Self {
        self.options.rate_limit = Some(limit);
        self
    }

    /// How the guest reaches it, where that differs from the rest of the machine
    /// ([`VmBuilder::transport`](crate::VmBuilder::transport)).
    #[must_use]
    pub fn transport(mut self, transport: Transport) -> Self {
        self.transport = Some(transport);
        self
    }

    pub(crate) fn into_device(self) -> Result<RngDevice, BuildError> {
        Ok(match self.reader {
            Some(reader) => RngDevice::from_reader(reader, self.options)?,
            None => RngDevice::new(self.options)?,
        })
    }
}

impl fmt::Debug for Rng {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rng")
            .field("options", &self.options)
            .finish_non_exhaustive()
    }
}
