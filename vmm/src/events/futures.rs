//! Events for async code: any executor, none of ours.

use std::pin::Pin;
use std::task::{Context, Poll};

use futures_core::Stream;

use super::{Events, VmEvent};

impl Stream for Events {
    type Item = VmEvent;

    fn poll_next(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Option<VmEvent>> {
        let mut state = self.subscriber.lock();
        match self.subscriber.take(&mut state) {
            None if !state.closed => {
                state.waker = Some(context.waker().clone());
                Poll::Pending
            }
            event => Poll::Ready(event),
        }
    }
}
