//! x86_64 start state.

pub mod layout;
