//! What a device tells about itself when it is put on the bus.

use std::fmt;
use std::sync::Arc;

use crate::config::ConfigSpace;
use crate::registers::CAPABILITY_MSIX;
use crate::{
    Bar, BarObserver, Capability, Error, ExtendedCapability, Identity, IntxPin, Msix, MsixPlacement,
};

/// A function of a PCI device while it is described: its identity, BARs, capabilities and
/// interrupts. [`PciBusBuilder::add`](crate::PciBusBuilder::add) takes it.
///
/// BARs and capabilities are laid out in the order in which they are added.
pub struct FunctionDescription {
    pub(crate) name: String,
    pub(crate) config: ConfigSpace,
    pub(crate) msix: Option<(Arc<Msix>, MsixPlacement)>,
    pub(crate) pin: Option<Arc<IntxPin>>,
    pub(crate) observer: Option<Arc<dyn BarObserver>>,
}

impl FunctionDescription {
    /// A function without BARs, capabilities and interrupts. The name is for errors and debugging,
    /// and need not be unique.
    pub fn new(name: impl Into<String>, identity: &Identity) -> Self {
        Self {
            name: name.into(),
            config: ConfigSpace::new(identity),
            msix: None,
            pin: None,
            observer: None,
        }
    }

    /// Adds a BAR, and returns its number: that of its register, or of the first of its two.
    ///
    /// # Errors
    ///
    /// [`Error::BarSize`] where no such BAR has that size, [`Error::TooManyBars`] where no
    /// registers are left.
    pub fn add_bar(&mut self, bar: Bar) -> Result<usize, Error> {
        self.config.add_bar(&self.name, bar)
    }

    /// Appends a capability, and returns its offset in the configuration space: a multiple of 4,
    /// from 0x40 on.
    ///
    /// # Errors
    ///
    /// [`Error::CapabilityRoom`] where it does not fit into the 256 bytes,
    /// [`Error::CapabilityMask`] where body and write mask differ in length.
    pub fn add_capability(&mut self, capability: &Capability) -> Result<u8, Error> {
        // Capabilities are below 0x100.
        let offset = self.config.add_capability(&self.name, capability)?;
        Ok(offset as u8)
    }

    /// Appends an extended capability, and returns its offset in the configuration space: a
    /// multiple of 4, from 0x100 on.
    ///
    /// # Errors
    ///
    /// [`Error::CapabilityRoom`] where it does not fit into the 4096 bytes.
    pub fn add_extended_capability(
        &mut self,
        capability: &ExtendedCapability,
    ) -> Result<u16, Error> {
        let offset = self
            .config
            .add_extended_capability(&self.name, capability)?;
        Ok(offset as u16)
    }

    /// Gives the function MSI-X, with table and pending bits in BARs that were added before, and
    /// returns the offset of its capability. The bus answers for these parts of the BARs itself.
    ///
    /// # Errors
    ///
    /// [`Error::SecondMsix`], [`Error::MsixPlacement`] where the structures can't be there, and
    /// [`Error::CapabilityRoom`].
    pub fn add_msix(&mut self, msix: Arc<Msix>, placement: MsixPlacement) -> Result<u8, Error> {
        if self.msix.is_some() {
            return Err(Error::SecondMsix {
                name: self.name.clone(),
            });
        }
        placement.check(&self.name, msix.vectors(), self.config.bars())?;
        let (body, mask) = placement.capability(msix.vectors());
        let capability = Capability::new(CAPABILITY_MSIX, body).writable(mask);
        let offset = self.config.add_capability(&self.name, &capability)?;
        self.config.set_msix_capability(offset);
        self.msix = Some((msix, placement));
        Ok(offset as u8)
    }

    /// Gives the function an INTx pin. Which of the four it is, and the line that it is wired to,
    /// follows from its place on the bus. Asking again gives the same pin.
    pub fn add_intx(&mut self) -> Arc<IntxPin> {
        let pin = self.pin.get_or_insert_with(|| Arc::new(IntxPin::new()));
        pin.clone()
    }

    /// Says who is to be told where the BARs are.
    pub fn set_bar_observer(&mut self, observer: Arc<dyn BarObserver>) {
        self.observer = Some(observer);
    }
}

impl fmt::Debug for FunctionDescription {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FunctionDescription")
            .field("name", &self.name)
            .field("bars", self.config.bars())
            .field("msix", &self.msix)
            .field("pin", &self.pin)
            .finish_non_exhaustive()
    }
}
