//! What of a bus has to be saved.

use serde::{Deserialize, Serialize};

use crate::config::ConfigState;
use crate::{MsixState, PciAddress};

/// A bus, saved: everything that the guest can have changed.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct PciBusState {
    /// The functions, the host bridge first.
    pub functions: Vec<FunctionState>,
}

/// What the bus keeps of a function, saved. The device behind it has a state of its own.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionState {
    /// Where the function is.
    pub address: PciAddress,
    /// Its registers, with the BARs among them.
    pub config: ConfigState,
    /// Its MSI-X vectors, where it has any.
    pub msix: Option<MsixState>,
    /// Whether it asserts its INTx pin.
    pub intx_asserted: bool,
}
