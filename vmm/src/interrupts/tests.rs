use kiln_memory::{MemoryOptions, allocate};

use super::*;
use crate::kvm::set_up_irqchip;

/// Vectors of a virtual machine without vCPUs; none where there is no KVM.
fn routes() -> Option<Arc<InterruptRoutes>> {
    let host = crate::Host::open()
        .map_err(|error| eprintln!("skipped: {error}"))
        .ok()?;
    let regions = layout::ram_regions(2 << 20);
    let memory = Arc::new(allocate(&regions, &MemoryOptions::default()).unwrap());
    let fd = Arc::new(host.create_vm().unwrap());
    set_up_irqchip(&fd).unwrap();
    let vm = Arc::new(KvmVm::new(fd, memory).unwrap());
    Some(InterruptRoutes::new(vm))
}

const fn message(data: u32) -> MsiMessage {
    MsiMessage {
        address: 0xfee0_0000,
        data,
    }
}

/// Whether what is written to the vector's eventfd is gone at once: KVM took it.
fn is_taken(vectors: &MsixVectors, vector: u16) -> bool {
    vectors.notifier(vector).unwrap().write(1).unwrap();
    !vectors.take(vector)
}

#[test]
fn only_an_open_vector_is_taken_by_kvm_and_nothing_is_lost_meanwhile() {
    let Some(routes) = routes() else {
        return;
    };
    let vectors = routes.vectors("device", 2).unwrap();
    assert!(!is_taken(&vectors, 0), "closed");
    vectors.connect(0, message(0x40));
    assert!(is_taken(&vectors, 0));
    assert!(!is_taken(&vectors, 1), "another one");
    vectors.connect(0, message(0x41));
    assert!(is_taken(&vectors, 0), "open with another message");
    vectors.disconnect(0);
    vectors.disconnect(0);
    vectors.signal(0, message(0x41));
    assert!(vectors.take(0));
    assert!(!vectors.take(0), "taken once");
    vectors.connect(0, message(0x41));
    assert!(is_taken(&vectors, 0));
    // There are no others.
    vectors.connect(2, message(0x40));
    vectors.disconnect(2);
    vectors.signal(2, message(0x40));
    assert!(!vectors.take(2) && vectors.notifier(2).is_none());
    assert!(!routes.complained.load(Ordering::Relaxed));
}

#[test]
fn a_message_can_be_any_nonsense() {
    let Some(routes) = routes() else {
        return;
    };
    let vectors = routes.vectors("device", 2).unwrap();
    for (address, data) in [(u64::MAX, u32::MAX), (0, 0), (0x1234_5678_0000, 7 << 8)] {
        vectors.connect(0, MsiMessage { address, data });
        vectors.signal(0, MsiMessage { address, data });
        vectors.connect(1, message(0x40));
        assert!(is_taken(&vectors, 1));
        vectors.disconnect(1);
        vectors.disconnect(0);
    }
}

#[test]
fn pins_and_vectors_share_one_table() {
    let Some(routes) = routes() else {
        return;
    };
    let line = routes.vm.interrupt_line(5).unwrap();
    let pins = [MsiRoute {
        gsi: 5,
        message: message(0x30),
    }];
    let vectors = routes.vectors("device", 1).unwrap();
    vectors.connect(0, message(0x40));
    routes.set_routes(&pins);
    assert_eq!(routes.lock().vectors, [Some(message(0x40))]);
    vectors.connect(0, message(0x41));
    assert_eq!(routes.lock().pins, pins);
    line.write(1).unwrap();
    assert!(line.read().is_err());
    assert!(is_taken(&vectors, 0));
    routes.set_routes(&[]);
    assert_eq!(routes.lock().vectors, [Some(message(0x41))]);
    assert!(!routes.send(message(0x30)), "there is no processor");
    assert!(!routes.complained.load(Ordering::Relaxed));
}

#[test]
fn more_vectors_than_kvm_has_routes_are_refused() {
    let Some(routes) = routes() else {
        return;
    };
    let limit = routes.vm.interrupt_routes();
    let rest = u16::try_from(limit - 24).unwrap();
    let first = routes.vectors("first", 3).unwrap();
    let second = routes.vectors("second", 2).unwrap();
    assert_eq!((first.first, second.first), (24, 27));
    let error = routes.vectors("large", rest).err().unwrap();
    assert_eq!(
        error.to_string(),
        format!(
            "give `large` {rest} interrupt vectors: KVM on this host has routes for {} more",
            rest - 5
        )
    );
    assert_eq!(routes.lock().vectors.len(), 5);
}
