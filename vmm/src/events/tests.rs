use std::thread;

use vmm_sys_util::poll::PollContext;

use super::*;

#[test]
fn who_listens_from_the_start_hears_everything_in_order() {
    let source = EventSource::default();
    let events = source.subscribe().unwrap();
    source.send(&VmEvent::Started);
    source.send(&VmEvent::Paused);
    source.end(&VmExit::Stopped);
    let all: Vec<_> = events.collect();
    assert_eq!(
        all,
        [
            VmEvent::Started,
            VmEvent::Paused,
            VmEvent::Ended(VmExit::Stopped)
        ]
    );
}

#[test]
fn who_comes_after_the_end_hears_of_the_end() {
    let source = EventSource::default();
    source.send(&VmEvent::Started);
    source.end(&VmExit::Reset);
    let events = source.subscribe().unwrap();
    assert_eq!(events.recv(), Some(VmEvent::Ended(VmExit::Reset)));
    assert_eq!(events.recv(), None);
    assert!(events.is_over());
}

#[test]
fn a_source_that_is_dropped_ends_its_streams() {
    let source = EventSource::default();
    let events = source.subscribe().unwrap();
    let waiting = thread::spawn(move || events.recv());
    drop(source);
    assert_eq!(waiting.join().unwrap(), None);
}

#[test]
fn a_listener_that_takes_nothing_holds_a_bounded_number_and_is_told() {
    let source = EventSource::default();
    let events = source.subscribe().unwrap();
    for _ in 0..CAPACITY + 10 {
        source.send(&VmEvent::Paused);
    }
    assert_eq!(events.try_recv(), Some(VmEvent::Missed(10)));
    let mut left = 0;
    while events.try_recv().is_some() {
        left += 1;
    }
    assert_eq!(left, CAPACITY);
    assert!(!events.is_over());
}

fn is_readable(events: &Events) -> bool {
    let context = PollContext::new().unwrap();
    context.add(events, 7_u64).unwrap();
    let ready = context.wait_timeout(Duration::ZERO).unwrap();
    ready.iter_readable().count() == 1
}

#[test]
fn the_descriptor_is_readable_while_there_is_something_to_take() {
    let source = EventSource::default();
    let events = source.subscribe().unwrap();
    assert!(!is_readable(&events));
    source.send(&VmEvent::Started);
    source.send(&VmEvent::Paused);
    assert!(is_readable(&events));
    assert!(events.try_recv().is_some());
    assert!(is_readable(&events));
    assert!(events.try_recv().is_some());
    assert!(!is_readable(&events));
    source.end(&VmExit::Stopped);
    assert!(is_readable(&events));
    assert!(events.try_recv().is_some());
    assert!(is_readable(&events), "a stream that is over stays readable");
    assert_eq!(events.try_recv(), None);
}

#[test]
fn a_wait_that_is_limited_ends() {
    let source = EventSource::default();
    let events = source.subscribe().unwrap();
    assert_eq!(events.recv_timeout(Duration::from_millis(5)), None);
    assert!(!events.is_over());
    source.send(&VmEvent::Resumed);
    assert_eq!(
        events.recv_timeout(Duration::from_secs(60)),
        Some(VmEvent::Resumed)
    );
}

#[test]
fn those_who_have_gone_are_forgotten() {
    let source = EventSource::default();
    for _ in 0..1000 {
        drop(source.subscribe().unwrap());
    }
    assert_eq!(source.lock().subscribers.len(), 1);
}

#[cfg(feature = "futures")]
mod with_futures {
    use std::pin::Pin;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::task::{Context, Poll, Wake, Waker};

    use futures_core::Stream;

    use super::*;

    struct Count(AtomicUsize);

    impl Wake for Count {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::SeqCst);
        }
    }

    #[test]
    fn a_stream_wakes_its_task_and_ends() {
        let source = EventSource::default();
        let mut events = source.subscribe().unwrap();
        let count = Arc::new(Count(AtomicUsize::new(0)));
        let waker = Waker::from(Arc::clone(&count));
        let mut poll = || Pin::new(&mut events).poll_next(&mut Context::from_waker(&waker));
        assert_eq!(poll(), Poll::Pending);
        source.send(&VmEvent::Started);
        assert_eq!(count.0.load(Ordering::SeqCst), 1);
        assert_eq!(poll(), Poll::Ready(Some(VmEvent::Started)));
        assert_eq!(poll(), Poll::Pending);
        source.end(&VmExit::Stopped);
        assert_eq!(count.0.load(Ordering::SeqCst), 2);
        assert_eq!(poll(), Poll::Ready(Some(VmEvent::Ended(VmExit::Stopped))));
        assert_eq!(poll(), Poll::Ready(None));
    }
}
