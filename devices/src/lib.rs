//! The devices of a virtual machine. None of them knows KVM.

pub mod acpi;
pub mod legacy;
pub mod virtio;

#[cfg(test)]
mod test_support;
