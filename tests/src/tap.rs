//! Tap interfaces for guests' networks; making them takes root.
#![allow(clippy::unwrap_used)]

use std::process::Command;

/// A tap interface in the network namespace of the tests, removed when dropped.
#[derive(Debug)]
pub struct Tap(&'static str);

impl Tap {
    /// Makes the interface, with an address of the host's such as `192.168.101.1/24`.
    #[must_use]
    pub fn new(name: &'static str, address: &str) -> Self {
        ip(&format!("tuntap add {name} mode tap vnet_hdr"));
        ip(&format!("address add {address} dev {name}"));
        ip(&format!("link set {name} up"));
        Self(name)
    }
}

impl Drop for Tap {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["link", "delete", self.0]).status();
    }
}

fn ip(words: &str) {
    let status = Command::new("ip").args(words.split(' ')).status().unwrap();
    assert!(status.success(), "ip {words}");
}
