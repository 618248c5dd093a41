//! How a guest reaches its virtio devices.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How a guest reaches a virtio device.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[cfg_attr(test, derive(schemars::JsonSchema))]
#[serde(rename_all = "lowercase")]
#[non_exhaustive]
pub enum Transport {
    /// PCI with MSI-X, which every kernel finds (virtio 1.3, section 4.1).
    #[default]
    Pci,
    /// Registers in memory and an interrupt of its own, found through ACPI (virtio 1.3, section
    /// 4.2).
    Mmio,
}

impl fmt::Display for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pci => "pci",
            Self::Mmio => "mmio",
        })
    }
}

/// Not one of the transports.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the transports are `pci` and `mmio`")]
pub struct UnknownTransport;

impl FromStr for Transport {
    type Err = UnknownTransport;

    /// Reads the name that the command line and a configuration have for it.
    ///
    /// ```
    /// use kiln_vmm::Transport;
    ///
    /// assert_eq!("mmio".parse(), Ok(Transport::Mmio));
    /// assert_eq!(Transport::default().to_string(), "pci");
    /// ```
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "pci" => Ok(Self::Pci),
            "mmio" => Ok(Self::Mmio),
            _ => Err(UnknownTransport),
        }
    }
}
