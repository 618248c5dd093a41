//! Drivers that mean harm, against every device over every transport.
//!
//! What must hold whatever they do: nothing panics, a device comes to rest after a bounded number of
//! turns, takes a bounded amount of memory, writes nothing beside the guest's RAM and nothing of RAM
//! but what it was given, says `DEVICE_NEEDS_RESET` or answers with an error, and works after a
//! reset.
//!
//! | module | what lives there |
//! |---|---|
//! | `malformed` | chains, tables and rings that no driver makes, one after the other |
//! | `splits` | requests cut into descriptors at every byte |
//! | `registers` | accesses to registers, configuration, interrupts, BARs |
//! | `storms` | all of this at random, while the device works, on its own thread or on the test's |
//! | `victims` | the devices, and what an ordinary driver asks of them |
//! | `trial` | a device under attack, and what must hold |
//! | `ram` | guest RAM between guard pages |
//! | `allocations` | how much memory a device takes |

#![allow(clippy::unwrap_used, clippy::expect_used)]

mod allocations;
mod malformed;
mod ram;
mod registers;
mod splits;
mod storms;
mod trial;
mod victims;
