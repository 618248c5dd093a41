//! The vCPU threads on a real `/dev/kvm`, with guests of a few bytes of real-mode code.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    reason = "a test stops where it can't go on"
)]

mod control;
mod ends;
mod exits;
mod signals;
mod smp;
mod support;
