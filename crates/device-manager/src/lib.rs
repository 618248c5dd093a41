//! Buses and allocation.
