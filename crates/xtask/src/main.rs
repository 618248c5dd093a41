//! Placeholder of this step.
fn main() {}
