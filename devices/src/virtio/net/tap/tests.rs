//! Tests on real taps, each on a thread with a network namespace of its own. They need root and
//! `/dev/net/tun`, and say so where they have not.

use std::sync::atomic::Ordering;

use kiln_virtio_device::testing::{Buffer, MockDriver, wait_until};

use std::fs::OpenOptions;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use libc::{c_int, c_short, c_uint, c_ulong};

use super::interface::{check, index as interface_index, request};
use super::*;
use crate::virtio::net::{MacAddress, Net, NetOptions};

const DATA: u64 = 0x20_0000;
const TX_DATA: u64 = 0x40_0000;
/// An Ethernet type for experiments (IEEE 802).
const EXPERIMENTAL: [u8; 2] = [0x88, 0xb5];

/// Runs `test` on a thread in a new network namespace; the process' own is left alone.
fn in_namespace(test: impl FnOnce() + Send + 'static) {
    let thread = std::thread::spawn(|| {
        // SAFETY: a plain system call; this thread has nothing of its old namespace in use.
        let result = check(unsafe { libc::unshare(libc::CLONE_NEWNET) });
        if let Err(error) = result.and_then(|()| File::open(TUN_PATH).map(drop)) {
            println!("skipped: needs root and {TUN_PATH}: {error}");
            return;
        }
        test();
    });
    if let Err(panic) = thread.join() {
        std::panic::resume_unwind(panic);
    }
}

/// Makes an interface of the tun device that stays.
fn make(name: &str, flags: c_int) {
    let file = OpenOptions::new()
        .read(true)
        .write(true)
        .open(TUN_PATH)
        .unwrap();
    let mut request = request(&CString::new(name).unwrap());
    request.ifr_ifru.ifru_flags = flags as c_short;
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as _, &request) }).unwrap();
    // SAFETY: the request takes its argument by value.
    check(unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETPERSIST as _, 1 as c_ulong) })
        .unwrap();
}

/// A packet socket that sees and sends what goes over an interface, which is brought up.
fn raw_socket(name: &str) -> File {
    let name = CString::new(name).unwrap();
    let protocol = u16::from_be_bytes(EXPERIMENTAL).to_be();
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_PACKET, libc::SOCK_RAW, c_int::from(protocol)) };
    check(fd).unwrap();
    // SAFETY: the descriptor is new, and belongs to nobody else.
    let socket = unsafe { OwnedFd::from_raw_fd(fd) };
    let mut request = request(&name);
    request.ifr_ifru.ifru_flags = libc::IFF_UP as c_short;
    // SAFETY: the request takes a pointer to an `ifreq`.
    check(unsafe { libc::ioctl(fd, libc::SIOCSIFFLAGS as _, &request) }).unwrap();
    // SAFETY: all bytes zero are a valid value of this plain C struct.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = protocol;
    address.sll_ifindex = interface_index(&name).unwrap() as c_int;
    let size = size_of_val(&address) as libc::socklen_t;
    // SAFETY: the pointer is to an address of the size that goes with it.
    check(unsafe { libc::bind(fd, (&raw const address).cast(), size) }).unwrap();
    let timeout = libc::timeval {
        tv_sec: 20,
        tv_usec: 0,
    };
    // SAFETY: the pointer is to a `timeval`, and the size is that.
    check(unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_RCVTIMEO,
            (&raw const timeout).cast(),
            size_of_val(&timeout) as libc::socklen_t,
        )
    })
    .unwrap();
    File::from(socket)
}

fn frame(len: usize, fill: u8) -> Vec<u8> {
    let mut frame = vec![0xff; 6];
    frame.extend([2, 0, 0, 0, 0, 9]);
    frame.extend(EXPERIMENTAL);
    frame.resize(len, fill);
    frame
}

fn message(name: &str) -> String {
    Tap::open(name).unwrap_err().to_string()
}

#[test]
fn a_name_that_no_interface_has_is_refused() {
    for name in ["", "a/b", "sixteen-bytes-xx", "a b", "tap%d", "a\0b"] {
        assert!(
            matches!(Tap::open(name), Err(TapError::Name { .. })),
            "{name}"
        );
    }
    let text = message("kiln-absent");
    assert!(text.contains("there is no such interface"), "{text}");
    assert!(
        text.contains("ip tuntap add kiln-absent mode tap"),
        "{text}"
    );
}

#[test]
fn what_is_no_tap_or_not_free_is_refused_and_nothing_is_created() {
    in_namespace(|| {
        assert!(message("tap0").contains("there is no such interface"));
        assert_eq!(interface_index(&CString::new("tap0").unwrap()), None);
        assert!(message("lo").contains("the interface is not a tap"));
        make("tun0", libc::IFF_TUN | libc::IFF_NO_PI);
        assert!(message("tun0").contains("the interface is not a tap"));
        make("tap0", libc::IFF_TAP | libc::IFF_NO_PI);
        let tap = Tap::open("tap0").unwrap();
        assert!(message("tap0").contains("it is in use"));
        assert_eq!(tap.mtu(), Some(1500));
        assert!(tap.offloads().checksum && tap.offloads().tso4 && tap.offloads().tso6);
        drop(tap);
        Tap::open("tap0").unwrap();
        make(
            "tap1",
            libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_MULTI_QUEUE,
        );
        Tap::open("tap1").unwrap();
    });
}

#[test]
fn frames_go_through_a_real_tap_both_ways() {
    in_namespace(|| {
        make("tap0", libc::IFF_TAP);
        let tap = Tap::open("tap0").unwrap();
        let host = raw_socket("tap0");
        let options = NetOptions {
            mac: Some(MacAddress::new([2, 0, 0, 0, 0, 1])),
            ..Default::default()
        };
        let net = Net::new(tap, options).unwrap();
        let counters = net.counters();
        let mut driver = MockDriver::new(Box::new(net));
        let offloads = driver.offered() & 0xff_ffff;
        assert_eq!(
            offloads & 0x1883,
            0x1883,
            "checksum and segmentation: {offloads:#x}"
        );
        for features in [0, offloads, offloads | MockDriver::EVENT_IDX] {
            driver.start(features, 64);
            for round in 0..20_u8 {
                from_guest(
                    &mut driver,
                    &host,
                    &frame(60 + usize::from(round) * 70, round),
                );
                to_guest(
                    &mut driver,
                    &host,
                    &frame(60 + usize::from(round) * 70, round),
                );
            }
        }
        assert_eq!(counters.tx_packets.load(Ordering::Relaxed), 60);
        assert_eq!(counters.tx_dropped.load(Ordering::Relaxed), 0);
    });
}

fn from_guest(driver: &mut MockDriver, mut host: &File, frame: &[u8]) {
    driver.fill(TX_DATA, &[0; 12]);
    driver.fill(TX_DATA + 12, frame);
    let len = 12 + frame.len() as u32;
    assert_eq!(driver.request(1, &[Buffer::readable(TX_DATA, len)]), 0);
    let mut seen = vec![0; 4096];
    let len = io::Read::read(&mut host, &mut seen).unwrap();
    assert_eq!(seen[..len], *frame);
}

fn to_guest(driver: &mut MockDriver, mut host: &File, frame: &[u8]) {
    io::Write::write_all(&mut host, frame).unwrap();
    // The host's own packets may come in between (it looks for routers and neighbours).
    loop {
        driver.queues[0].add(&driver.memory, &[Buffer::writable(DATA, 2048)]);
        driver.notify(0);
        let (_, len) = driver.queues[0].wait_used(&driver.memory);
        let packet = driver.bytes(DATA, len as usize);
        assert_eq!(packet[10..12], [1, 0]);
        if packet[24..26] == EXPERIMENTAL {
            assert_eq!(packet[12..], *frame);
            return;
        }
    }
}

#[test]
fn an_interface_that_disappears_does_not_keep_the_thread_busy() {
    in_namespace(|| {
        make("tap0", libc::IFF_TAP);
        let tap = Tap::open("tap0").unwrap();
        let host = raw_socket("tap0");
        let net = Net::new(tap, NetOptions::default()).unwrap();
        let counters = net.counters();
        let mut driver = MockDriver::new(Box::new(net));
        driver.start(0, 16);
        to_guest(&mut driver, &host, &frame(60, 1));
        // More than what the host itself may send takes.
        for _ in 0..8 {
            driver.queues[0].add(&driver.memory, &[Buffer::writable(DATA, 2048)]);
        }
        driver.notify(0);
        // Deleting the interface by netlink: RTM_DELLINK with its index.
        delete_link(interface_index(&CString::new("tap0").unwrap()).unwrap());
        assert_eq!(interface_index(&CString::new("tap0").unwrap()), None);
        wait_until("errors", || {
            counters.rx_errors.load(Ordering::Relaxed) >= 16
        });
        let errors = counters.rx_errors.load(Ordering::Relaxed);
        std::thread::sleep(std::time::Duration::from_millis(50));
        assert_eq!(counters.rx_errors.load(Ordering::Relaxed), errors);
        // Sending fails, and is answered.
        driver.fill(TX_DATA, &[0; 80]);
        assert_eq!(driver.request(1, &[Buffer::readable(TX_DATA, 80)]), 0);
        assert_eq!(counters.tx_dropped.load(Ordering::Relaxed), 1);
    });
}

fn delete_link(index: c_uint) {
    // SAFETY: a plain system call.
    let fd = unsafe { libc::socket(libc::AF_NETLINK, libc::SOCK_RAW, libc::NETLINK_ROUTE) };
    check(fd).unwrap();
    // SAFETY: the descriptor is new, and belongs to nobody else.
    let mut socket = File::from(unsafe { OwnedFd::from_raw_fd(fd) });
    let mut message = Vec::new();
    // `nlmsghdr`: length, type, flags (request, acknowledge), sequence, port.
    message.extend(32_u32.to_ne_bytes());
    message.extend(libc::RTM_DELLINK.to_ne_bytes());
    message.extend(5_u16.to_ne_bytes());
    message.extend([0; 8]);
    // `ifinfomsg`: family, padding, type, index, flags, change mask.
    message.extend([0; 4]);
    message.extend(index.to_ne_bytes());
    message.extend([0; 8]);
    io::Write::write_all(&mut socket, &message).unwrap();
    let mut answer = [0; 256];
    let len = io::Read::read(&mut socket, &mut answer).unwrap();
    // An `nlmsgerr` whose error is 0 acknowledges.
    assert!(
        len >= 20 && answer[16..20] == [0; 4],
        "{:?}",
        &answer[..len]
    );
}

/// The descriptor of a tap that somebody opens to hand it over.
fn opened(name: &str, flags: c_int) -> OwnedFd {
    let file = interface::open_device(TUN_PATH).unwrap();
    interface::attach(&file, &CString::new(name).unwrap(), flags).unwrap();
    OwnedFd::from(file)
}

#[test]
fn a_tap_that_was_opened_elsewhere_is_used_and_nothing_else_is() {
    in_namespace(|| {
        let flags = FLAGS | libc::IFF_MULTI_QUEUE;
        let tap = Tap::from_fds([opened("tap0", flags), opened("tap0", flags)]).unwrap();
        assert_eq!(tap.queue_pairs(), 2);
        let net = Net::new(tap, NetOptions::default()).unwrap();
        assert_eq!(net.queue_pairs(), 2);
        let three = NetOptions {
            queue_pairs: Some(3),
            ..NetOptions::default()
        };
        let tap = Tap::from_fds([opened("tap1", flags), opened("tap1", flags)]).unwrap();
        assert!(Net::new(tap, three).is_err());
        let refused = |fds: Vec<OwnedFd>| Tap::from_fds(fds).unwrap_err().to_string();
        assert!(refused(vec![]).contains("none was given"));
        let null = File::open("/dev/null").unwrap();
        assert!(refused(vec![null.into()]).contains("it is not open on a tap"));
        let loose = interface::open_device(TUN_PATH).unwrap();
        assert!(refused(vec![loose.into()]).contains("it is not open on a tap"));
        let plain = opened("tap2", libc::IFF_TAP | libc::IFF_NO_PI);
        assert!(refused(vec![plain]).contains("IFF_VNET_HDR"));
        let two = vec![opened("tap3", FLAGS), opened("tap4", FLAGS)];
        assert!(refused(two).contains("of the same interface"));
        // By its number: it stays open.
        let fd = opened("tap5", FLAGS);
        let tap = Tap::from_fd_numbers(&[fd.as_raw_fd()]).unwrap();
        drop(fd);
        assert!(interface_index(&CString::new("tap5").unwrap()).is_some());
        drop(tap);
        assert!(interface_index(&CString::new("tap5").unwrap()).is_none());
        let error = Tap::from_fd_numbers(&[12345]).unwrap_err();
        assert!(matches!(error, TapError::NoDescriptor { fd: 12345, .. }));
    });
}

#[test]
fn a_created_tap_is_up_and_goes_with_its_last_queue() {
    in_namespace(|| {
        let name = CString::new("kilnmade0").unwrap();
        let mut tap = Tap::create("kilnmade0", Some(9000)).unwrap();
        assert_eq!(tap.mtu(), Some(9000));
        let another = tap.add_queue_pair().unwrap();
        drop(tap);
        assert!(interface_index(&name).is_some());
        drop(another);
        assert_eq!(interface_index(&name), None);
        // One that is there is used.
        make("tap0", FLAGS);
        let mut tap = Tap::create("tap0", Some(9000)).unwrap();
        assert_eq!(tap.mtu(), Some(1500));
        let error = tap.add_queue_pair().err().unwrap();
        assert!(error.to_string().contains("it was created with one"));
        drop(tap);
        assert!(interface_index(&CString::new("tap0").unwrap()).is_some());
    });
}

#[test]
fn frames_go_through_the_queues_of_a_tap_that_the_guest_uses() {
    in_namespace(|| {
        let tap = Tap::create("tap0", None).unwrap();
        let host = raw_socket("tap0");
        let options = NetOptions {
            queue_pairs: Some(2),
            ..NetOptions::default()
        };
        let mut driver = MockDriver::new(Box::new(Net::new(tap, options).unwrap()));
        // The control queue, and several pairs.
        driver.start(1 << 17 | 1 << 22, 64);
        for pairs in [1, 2, 1, 2] {
            driver.fill(TX_DATA, &[4, 0, pairs, 0]);
            let command = [Buffer::readable(TX_DATA, 4), Buffer::writable(DATA, 1)];
            assert_eq!(driver.request(4, &command), 1);
            assert_eq!(driver.bytes(DATA, 1), [0]);
            for pair in 0..usize::from(pairs) {
                let sent = frame(200, pairs + pair as u8);
                driver.fill(TX_DATA, &[0; 12]);
                driver.fill(TX_DATA + 12, &sent);
                let buffers = [Buffer::readable(TX_DATA, 212)];
                assert_eq!(driver.request(2 * pair + 1, &buffers), 0);
                let mut seen = vec![0; 4096];
                let len = io::Read::read(&mut &host, &mut seen).unwrap();
                assert_eq!(seen[..len], sent);
            }
            if pairs == 1 {
                // There is one queue alone that it can come to.
                to_guest(&mut driver, &host, &frame(300, 9));
            }
        }
    });
}
