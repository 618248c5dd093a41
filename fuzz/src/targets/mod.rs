//! The targets, one a file but for the two transports.

pub(crate) mod balloon;
pub(crate) mod block;
pub(crate) mod config;
pub(crate) mod console;
pub(crate) mod image;
pub(crate) mod kernel;
pub(crate) mod legacy;
pub(crate) mod net;
pub(crate) mod pci;
pub(crate) mod qcow2;
pub(crate) mod rng;
pub(crate) mod transport;
pub(crate) mod unpack;
pub(crate) mod vsock;
