//! A request is the same request wherever it is cut into descriptors.

use kiln_virtio_device::testing::{Buffer, TransportKind, over_each_transport};

use crate::ram::{Ram, TABLE};
use crate::trial::{READABLE, Trial, WRITABLE};
use crate::victims::{self, Request};

over_each_transport!(a_request_can_be_cut_anywhere);

/// What came of a request.
#[derive(Debug, PartialEq, Eq)]
struct Outcome {
    used: u32,
    /// Empty where nothing of it was to be kept.
    written: Vec<u8>,
    effect: Vec<u8>,
}

/// Where a part is cut: the lengths of the pieces.
type Cuts = Vec<u32>;

/// Makes the request with its two parts in pieces that lie apart.
fn outcome(trial: &mut Trial<'_>, request: &Request, cuts: [&Cuts; 2], indirect: bool) -> Outcome {
    trial.restart(request.features);
    trial.victim.prepare(request);
    let mut buffers = Vec::new();
    let mut writable = Vec::new();
    let mut done = 0;
    for (at, len) in (0..).zip(cuts[0]) {
        // Each a byte away from the next, so that nobody reads on.
        let address = READABLE + done as u64 + at;
        let piece = &request.readable[done..done + *len as usize];
        trial.driver.fill(address, piece);
        buffers.push(Buffer::readable(address, *len));
        done += *len as usize;
    }
    let mut address = WRITABLE;
    for len in cuts[1] {
        buffers.push(Buffer::writable(address, *len));
        writable.push(address..address + u64::from(*len));
        address += u64::from(*len) + 1;
    }
    let driver = &mut trial.driver;
    let queue = &mut driver.queues[request.queue];
    let head = if indirect {
        queue.indirect(&driver.memory, TABLE, &buffers)
    } else {
        queue.chain(&driver.memory, &buffers)
    };
    queue.make_available(&driver.memory, head);
    let before = trial.ram.copy();
    trial.attack(|driver| driver.notify(request.queue as u32));
    let used = trial.driver.queues[request.queue].used(&trial.driver.memory);
    let (_, used) = used.unwrap_or_else(|| panic!("{}: not used", trial.what));
    // Nothing is written but what is the device's: not even the bytes between the pieces.
    let mut allowed = writable.clone();
    for queue in &trial.driver.queues {
        // Flags, index, elements, and the index to be notified behind.
        allowed.push(queue.used_ring..queue.used_ring + 6 + 8 * u64::from(queue.size));
    }
    allowed.extend(trial.victim.beside());
    trial.ram.check_only_written(&before, &allowed);
    let written = writable
        .iter()
        .flat_map(|piece| {
            trial
                .driver
                .bytes(piece.start, (piece.end - piece.start) as usize)
        })
        .collect();
    Outcome {
        used,
        written,
        effect: trial.victim.effect(),
    }
}

/// Every way to cut so many bytes once, and into single bytes at either end.
fn ways(len: u32) -> Vec<Cuts> {
    if len == 0 {
        return vec![Vec::new()];
    }
    let mut ways = vec![vec![len]];
    // Every byte of what is short; of what is long, those of a header, the last, and around a sector.
    let matters = |at: &u32| len <= 64 || *at <= 20 || len - at <= 20 || (511..514).contains(at);
    ways.extend((1..len).filter(matters).map(|at| vec![at, len - at]));
    let single = len.min(24);
    let mut first = vec![1; single as usize];
    let mut last = Vec::new();
    if len > single {
        first.push(len - single);
        last.push(len - single);
    }
    last.extend(vec![1; single as usize]);
    ways.push(first);
    ways.push(last);
    ways
}

fn a_request_can_be_cut_anywhere(kind: TransportKind) {
    let ram = Ram::new();
    for (device, mut victim) in victims::all() {
        let mut trial = Trial::new(kind, &mut *victim, &ram);
        for request in trial.victim.requests() {
            let whole: [Cuts; 2] = [request.readable.len() as u32, request.writable]
                .map(|len| if len == 0 { Vec::new() } else { vec![len] });
            trial.what = format!("{device}, {}", request.name);
            let expected = outcome(&mut trial, &request, [&whole[0], &whole[1]], false);
            for indirect in [false, true] {
                for cuts in ways(request.readable.len() as u32) {
                    trial.what = format!("{device}, {}, read in {cuts:?}", request.name);
                    let found = outcome(&mut trial, &request, [&cuts, &whole[1]], indirect);
                    assert_eq!(found, expected, "{}", trial.what);
                }
                for cuts in ways(request.writable) {
                    trial.what = format!("{device}, {}, written in {cuts:?}", request.name);
                    let found = outcome(&mut trial, &request, [&whole[0], &cuts], indirect);
                    assert_eq!(found, expected, "{}", trial.what);
                }
            }
        }
    }
}
