//! What a panic said.

use std::any::Any;

/// What a panic of a device said, from the payload that
/// [`catch_unwind`](std::panic::catch_unwind) gives; `no message` where that is not text.
///
/// ```
/// let payload = std::panic::catch_unwind(|| panic!("queue {}", 7)).unwrap_err();
/// assert_eq!(kiln_device_api::panic_message(&*payload), "queue 7");
/// ```
pub fn panic_message(payload: &(dyn Any + Send)) -> String {
    payload
        .downcast_ref::<&str>()
        .map(|text| (*text).to_owned())
        .or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "no message".to_owned())
}
