//! The bus as a guest sees it, without KVM.
#![allow(clippy::unwrap_used, reason = "a test stops where it can't go on")]

mod config_space;
mod fixture;
mod hostile;
mod moving_bar;
mod msix;
