//! Chains, tables and rings that no driver makes, one after the other, in every queue.

use kiln_virtio_device::testing::{
    Buffer, MockDriver, RawDescriptor, TransportKind, over_each_transport, register,
};

use crate::ram::{DATA, HIGH_END, LOW_END, Ram, TABLE};
use crate::trial::{SIZE, Trial};
use crate::victims;

over_each_transport!(
    broken_chains_stop_the_device_and_no_more,
    odd_chains_are_served_or_refused,
    rings_where_there_is_no_ram_stop_the_device,
    rings_that_lie_over_each_other_harm_only_the_guest,
    an_index_that_jumps_stops_the_device,
);

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;

/// A descriptor: address, length, flags, next.
type Raw = (u64, u32, u16, u16);

/// What a driver puts into the descriptor table of the queue, and into [`TABLE`], before it makes
/// the first descriptor available.
#[derive(Default)]
struct Chain {
    name: &'static str,
    direct: Vec<Raw>,
    indirect: Vec<Raw>,
    head: u16,
}

fn direct(name: &'static str, descriptors: &[Raw]) -> Chain {
    Chain {
        name,
        direct: descriptors.to_vec(),
        ..Chain::default()
    }
}

fn indirect(name: &'static str, first: Raw, table: Vec<Raw>) -> Chain {
    Chain {
        name,
        direct: vec![first],
        indirect: table,
        head: 0,
    }
}

/// Chains that are broken whatever a device makes of its buffers.
fn broken() -> Vec<Chain> {
    let all = 16 * u32::from(SIZE);
    let long = |count: u16| (0..count).map(|at| (DATA, 1, NEXT, at + 1)).collect();
    let bytes = 0xffff_ffff;
    let mut chains = vec![
        direct("a loop of one", &[(DATA, 4, NEXT, 0)]),
        direct("a loop of two", &[(DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0)]),
        direct("a writable loop", &[(DATA, 4, NEXT | WRITE, 0)]),
        direct(
            "a loop into its middle",
            &[(DATA, 4, NEXT, 1), (DATA, 4, NEXT, 1)],
        ),
        direct("a next beyond the table", &[(DATA, 4, NEXT, SIZE)]),
        direct("a next far beyond the table", &[(DATA, 4, NEXT, 0xffff)]),
        direct("no byte", &[(DATA, 0, 0, 0)]),
        direct("no writable byte", &[(DATA, 0, WRITE, 0)]),
        direct(
            "a writable buffer before a readable one",
            &[(DATA, 4, NEXT | WRITE, 1), (DATA, 4, 0, 0)],
        ),
        direct("4 GiB from 0 on", &[(0, bytes, 0, 0)]),
        direct("4 GiB from 0 on, writable", &[(0, bytes, WRITE, 0)]),
        direct(
            "more than 4 GiB in all",
            &[(0, bytes, NEXT, 1), (0, bytes, 0, 0)],
        ),
        direct(
            "a buffer across the end of low RAM",
            &[(LOW_END - 1, 2, WRITE, 0)],
        ),
        direct(
            "a buffer behind the end of low RAM",
            &[(LOW_END, 1, WRITE, 0)],
        ),
        direct(
            "a buffer in the hole",
            &[(LOW_END + 0x10_0000, 16, WRITE, 0)],
        ),
        direct(
            "a buffer over the hole",
            &[(
                LOW_END - 1,
                (MockDriver::HIGH - LOW_END) as u32 + 2,
                WRITE,
                0,
            )],
        ),
        direct(
            "a buffer before high RAM",
            &[(MockDriver::HIGH - 1, 2, 0, 0)],
        ),
        direct("a buffer across the end of RAM", &[(HIGH_END - 1, 2, 0, 0)]),
        direct("a buffer at the end of RAM", &[(HIGH_END, 1, 0, 0)]),
        direct(
            "a buffer at the end of addresses",
            &[(u64::MAX, 1, WRITE, 0)],
        ),
        direct(
            "a buffer over the end of addresses",
            &[(u64::MAX - 1, 16, WRITE, 0)],
        ),
        direct(
            "a good buffer and a bad one",
            &[(DATA, 4, NEXT, 1), (HIGH_END, 1, WRITE, 0)],
        ),
        indirect("an empty table", (TABLE, 0, INDIRECT, 0), vec![]),
        indirect(
            "a table that is no multiple of 16",
            (TABLE, 17, INDIRECT, 0),
            vec![(DATA, 4, 0, 0)],
        ),
        indirect(
            "less than a descriptor",
            (TABLE, 15, INDIRECT, 0),
            vec![(DATA, 4, 0, 0)],
        ),
        indirect(
            "a table of 4 GiB",
            (TABLE, bytes, INDIRECT, 0),
            vec![(DATA, 4, 0, 0)],
        ),
        indirect(
            "a table with a next beyond it",
            (TABLE, 16, INDIRECT, 0),
            vec![(DATA, 4, NEXT, 1)],
        ),
        indirect(
            "a table that is a loop",
            (TABLE, 32, INDIRECT, 0),
            vec![(DATA, 4, NEXT, 1), (DATA, 4, NEXT, 0)],
        ),
        indirect(
            "a table in a table",
            (TABLE, 32, INDIRECT, 0),
            vec![(TABLE + 16, 16, INDIRECT, 0), (DATA, 4, 0, 0)],
        ),
        indirect(
            "a table that points to itself",
            (TABLE, 16, INDIRECT, 0),
            vec![(TABLE, 16, INDIRECT, 0)],
        ),
        indirect(
            "a table in a table behind a buffer",
            (TABLE, 32, INDIRECT, 0),
            vec![(DATA, 4, NEXT, 1), (TABLE, 16, INDIRECT, 0)],
        ),
        indirect(
            "a table in the hole",
            (LOW_END + 0x1000, 16, INDIRECT, 0),
            vec![],
        ),
        indirect(
            "a table across the end of RAM",
            (HIGH_END - 16, 32, INDIRECT, 0),
            vec![],
        ),
        indirect(
            "a table at the end of addresses",
            (u64::MAX - 15, 16, INDIRECT, 0),
            vec![],
        ),
        indirect(
            "a longer chain than any device takes",
            (TABLE, 16 * 1100, INDIRECT, 0),
            long(1099),
        ),
        indirect("a table of zeros", (TABLE, all, INDIRECT, 0), vec![]),
    ];
    for head in [SIZE, SIZE + 1, 0x7fff, 0xffff] {
        chains.push(Chain {
            name: "a head beyond the table",
            head,
            ..Chain::default()
        });
    }
    chains
}

/// Chains that are well-formed, and mostly not what a device wants.
fn odd() -> Vec<Chain> {
    let many = |flags: u16| {
        let last = SIZE - 1;
        (0..SIZE)
            .map(|at| {
                (
                    DATA,
                    1,
                    if at < last { flags | NEXT } else { flags },
                    at + 1,
                )
            })
            .collect::<Vec<Raw>>()
    };
    let rings = MockDriver::QUEUES;
    vec![
        direct("one readable byte", &[(DATA, 1, 0, 0)]),
        direct("one writable byte", &[(DATA, 1, WRITE, 0)]),
        direct(
            "one byte of each",
            &[(DATA, 1, NEXT, 1), (DATA + 1, 1, WRITE, 0)],
        ),
        direct("all of low RAM, readable", &[(0, LOW_END as u32, 0, 0)]),
        direct("all of low RAM, writable", &[(0, LOW_END as u32, WRITE, 0)]),
        direct(
            "the last bytes of RAM",
            &[(HIGH_END - 16, 16, NEXT, 1), (LOW_END - 16, 16, WRITE, 0)],
        ),
        direct(
            "an empty buffer in front",
            &[(u64::MAX, 0, NEXT, 1), (DATA, 16, 0, 0)],
        ),
        direct(
            "an empty buffer in between",
            &[
                (DATA, 4, NEXT, 1),
                (LOW_END, 0, NEXT, 2),
                (DATA, 4, WRITE, 0),
            ],
        ),
        direct("flags that mean nothing", &[(DATA, 16, 0xfff8, 0)]),
        direct(
            "the same buffer for both",
            &[(DATA, 600, NEXT, 1), (DATA, 600, WRITE, 0)],
        ),
        direct(
            "the rings as a buffer",
            &[(rings, 0x1000, NEXT, 1), (rings, 0x1000, WRITE, 0)],
        ),
        direct("the rings, written", &[(rings, 0x8000, WRITE, 0)]),
        direct("as many descriptors as the queue has", &many(0)),
        direct(
            "as many writable descriptors as the queue has",
            &many(WRITE),
        ),
        indirect(
            "a table over the rings",
            (rings, 16 * 8, INDIRECT, 0),
            vec![],
        ),
        indirect(
            "a writable table",
            (TABLE, 32, INDIRECT | WRITE, 0),
            vec![(DATA, 16, NEXT, 1), (DATA, 600, WRITE, 0)],
        ),
        indirect(
            "a table and a next",
            (TABLE, 32, INDIRECT | NEXT, 1),
            vec![(DATA, 16, NEXT, 1), (DATA, 600, WRITE, 0)],
        ),
        indirect(
            "a table of a single byte",
            (TABLE, 16, INDIRECT, 0),
            vec![(DATA, 1, WRITE, 0)],
        ),
        indirect(
            "a table with the longest chain",
            (TABLE, 16 * 1024, INDIRECT, 0),
            (0..1024)
                .map(|at| (DATA, 1, if at < 1023 { NEXT } else { 0 }, at + 1))
                .collect(),
        ),
        indirect(
            "RAM many times",
            (TABLE, 16 * 32, INDIRECT, 0),
            (0..32)
                .map(|at| (0, 0x1_0000, if at < 31 { NEXT } else { 0 }, at + 1))
                .collect(),
        ),
    ]
}

fn make(driver: &mut MockDriver, queue: usize, chain: &Chain) {
    let raw = |(address, len, flags, next): Raw| RawDescriptor {
        address,
        len,
        flags,
        next,
    };
    for (index, descriptor) in (0..).zip(&chain.direct) {
        driver.queues[queue].write_descriptor(&driver.memory, index, raw(*descriptor));
    }
    for (index, (address, len, flags, next)) in (0..).zip(&chain.indirect) {
        let mut bytes = address.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        driver.fill(TABLE + 16 * index, &bytes);
    }
    driver.queues[queue].make_available(&driver.memory, chain.head);
    driver.notify(queue as u32);
}

/// Tries each of these chains in each queue of each device.
fn each(
    kind: TransportKind,
    chains: &[Chain],
    mut check: impl FnMut(&mut Trial<'_>, usize, &Chain),
) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        trial.restart(0);
        for queue in 0..trial.driver.queues.len() {
            for chain in chains {
                trial.what = format!("{device}, queue {queue}, {}", chain.name);
                trial.restart(trial.features_for(queue));
                // Something for the device to put there.
                for request in trial.victim.requests() {
                    trial.victim.prepare(&request);
                }
                trial.attack(|driver| make(driver, queue, chain));
                check(&mut trial, queue, chain);
            }
            trial.recover();
        }
    }
}

fn broken_chains_stop_the_device_and_no_more(kind: TransportKind) {
    each(kind, &broken(), |trial, queue, _| {
        if trial.victim.eager().contains(&queue) {
            trial.assert_needs_reset();
        }
        // It does nothing more, whatever the driver says.
        let used = trial.driver.queues[queue].used_index(&trial.driver.memory);
        assert_eq!(used, 0, "{}", trial.what);
        trial.attack(|driver| {
            driver.queues[queue].add(&driver.memory, &[Buffer::writable(DATA, 600)]);
            driver.notify(queue as u32);
        });
    });
}

fn odd_chains_are_served_or_refused(kind: TransportKind) {
    each(kind, &odd(), |_, _, _| ());
}

fn rings_where_there_is_no_ram_stop_the_device(kind: TransportKind) {
    let ram = Ram::new();
    let good = [
        MockDriver::QUEUES,
        MockDriver::QUEUES + 0x1000,
        MockDriver::QUEUES + 0x2000,
    ];
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        for place in [
            LOW_END,
            LOW_END - 16,
            LOW_END + 0x1000,
            MockDriver::HIGH - 16,
            HIGH_END - 16,
            HIGH_END,
            1 << 40,
            u64::MAX - 15,
            u64::MAX,
            MockDriver::QUEUES + 1,
        ] {
            for area in 0..3 {
                trial.what = format!("{device}, area {area} at {place:#x}");
                trial.ram.clear();
                let mut areas = good;
                areas[area] = place;
                trial.attack(|driver| {
                    assert!(driver.negotiate(0));
                    Trial::place_rings(driver, 0, 64, areas);
                    driver.write(register::STATUS, 0xf);
                    driver.notify(0);
                });
                // Of an odd address the rings take what is aligned, or nothing.
                if place != MockDriver::QUEUES + 1 || area == 0 {
                    trial.assert_needs_reset();
                }
            }
        }
        trial.recover();
    }
}

fn rings_that_lie_over_each_other_harm_only_the_guest(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        let base = MockDriver::QUEUES;
        for (name, areas) in [
            ("all in one place", [base, base, base]),
            ("the rings in the table", [base, base + 64, base + 128]),
            (
                "the used ring over the available one",
                [base, base + 0x1000, base + 0x1000],
            ),
            (
                "in the last bytes of RAM",
                [HIGH_END - 0x1000, HIGH_END - 0x400, HIGH_END - 0x300],
            ),
        ] {
            trial.what = format!("{device}, {name}");
            trial.ram.clear();
            for index in [1_u16, 2, 16, 64] {
                trial.attack(|driver| {
                    assert!(driver.negotiate(0));
                    for queue in 0..2 {
                        Trial::place_rings(driver, queue, 16, areas);
                    }
                    driver.write(register::STATUS, 0xf);
                    // An available index, or whatever lies there.
                    driver.fill(areas[1] + 2, &index.to_le_bytes());
                    driver.notify(0);
                    driver.notify(1);
                });
            }
        }
        trial.recover();
    }
}

fn an_index_that_jumps_stops_the_device(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        for queue in trial.victim.eager() {
            for jump in [SIZE + 1, 0x7fff, 0x8000, 0xffff] {
                trial.what = format!("{device}, queue {queue}, by {jump:#x}");
                trial.restart(trial.features_for(queue));
                trial.attack(|driver| {
                    driver.queues[queue].set_avail_index(&driver.memory, jump);
                    driver.notify(queue as u32);
                });
                trial.assert_needs_reset();
            }
        }
        trial.recover();
    }
}
