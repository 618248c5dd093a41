//! KVM's VFIO device: the one kind of device fd that a machine without devices in the kernel has.

use std::fmt;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};

use kvm_bindings::{
    KVM_DEV_VFIO_FILE, KVM_DEV_VFIO_FILE_ADD, KVM_DEV_VFIO_FILE_DEL, kvm_create_device,
    kvm_device_attr, kvm_device_type_KVM_DEV_TYPE_VFIO,
};
use kvm_ioctls::{DeviceFd, VmFd};

use crate::DeviceError;

/// KVM's VFIO device of a machine (KVM API documentation, "VFIO virtual device"): by it KVM learns
/// which devices of the host the machine uses, and arranges caching and interrupts accordingly.
///
/// [`Vm::vfio`](crate::Vm::vfio) makes it. The device fd is closed when the last owner lets go: the
/// machine, or who else holds the `Arc`.
pub struct VfioDevice {
    fd: DeviceFd,
}

impl VfioDevice {
    pub(crate) fn create(vm: &VmFd) -> Result<Self, DeviceError> {
        let mut request = kvm_create_device {
            type_: kvm_device_type_KVM_DEV_TYPE_VFIO,
            fd: 0,
            flags: 0,
        };
        let fd = vm
            .create_device(&mut request)
            .map_err(|error| DeviceError::Create {
                kind: "VFIO",
                source: error.into(),
            })?;
        Ok(Self { fd })
    }

    /// Tells KVM that the machine uses a VFIO group or device of the host, given by its file
    /// (`/dev/vfio/GROUP`, or a VFIO device's own). KVM keeps a reference to it.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Attribute`] where KVM refuses: the file is not VFIO's, or known already.
    pub fn add_file(&self, file: impl AsFd) -> Result<(), DeviceError> {
        self.set("KVM_DEV_VFIO_FILE_ADD", KVM_DEV_VFIO_FILE_ADD, file.as_fd())
    }

    /// Takes back what [`add_file`](Self::add_file) said.
    ///
    /// # Errors
    ///
    /// [`DeviceError::Attribute`] where KVM does not know the file.
    pub fn remove_file(&self, file: impl AsFd) -> Result<(), DeviceError> {
        self.set("KVM_DEV_VFIO_FILE_DEL", KVM_DEV_VFIO_FILE_DEL, file.as_fd())
    }

    /// The device fd, for attributes that Kiln has no word for.
    pub fn fd(&self) -> &DeviceFd {
        &self.fd
    }

    fn set(&self, name: &'static str, attr: u32, file: BorrowedFd<'_>) -> Result<(), DeviceError> {
        let number = file.as_raw_fd();
        let attribute = kvm_device_attr {
            flags: 0,
            group: KVM_DEV_VFIO_FILE,
            attr: attr.into(),
            addr: (&raw const number) as u64,
        };
        self.fd
            .set_device_attr(&attribute)
            .map_err(|error| DeviceError::Attribute {
                name,
                source: error.into(),
            })
    }
}

impl fmt::Debug for VfioDevice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VfioDevice")
            .field("fd", &self.fd.as_raw_fd())
            .finish()
    }
}
