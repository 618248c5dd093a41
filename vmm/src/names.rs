//! A machine's name, and what is made of it.

use tracing::Span;

use crate::BuildError;

/// The longest name, in characters.
const MAX_NAME: usize = 64;
/// The bytes of a thread's name that the system keeps.
const THREAD_NAME: usize = 15;

/// Refuses what is no name.
pub(crate) fn check(name: &str) -> Result<(), BuildError> {
    let length = name.chars().count();
    if length == 0 || length > MAX_NAME || name.chars().any(char::is_control) {
        let name = name.to_owned();
        return Err(BuildError::Name { name });
    }
    Ok(())
}

/// The span of a machine. It is seen wherever messages are, since a warning too is to say whose it
/// is: so its level is that of errors.
pub(crate) fn machine_span(name: Option<&str>) -> Span {
    tracing::error_span!("vm", name)
}

/// The span of a device in that of its machine, which is the current one.
pub(crate) fn device_span(name: &str) -> Span {
    tracing::error_span!("device", name)
}

/// What a machine's thread is called that does this: as much of the machine's name as leaves
/// room for `role`, and for `digits` behind it.
pub(crate) fn thread(name: Option<&str>, role: &str, digits: usize) -> String {
    let name = name.unwrap_or("kiln");
    let mut end = name.len().min(THREAD_NAME - 1 - role.len() - digits);
    while !name.is_char_boundary(end) {
        end -= 1;
    }
    format!("{}-{role}", &name[..end])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_has_1_to_64_characters_and_no_control_character() {
        for name in ["a", "web 1", "größe", &"é".repeat(64)] {
            assert!(check(name).is_ok(), "{name}");
        }
        for name in ["", "a\nb", "a\0", "\u{7f}", &"x".repeat(65)] {
            let error = check(name).unwrap_err().to_string();
            assert_eq!(error.lines().count(), 1, "{error}");
            assert!(error.contains("1 to 64 characters"), "{error}");
        }
    }

    #[test]
    fn a_thread_says_what_it_does_however_long_the_machines_name_is() {
        assert_eq!(thread(None, "io", 0), "kiln-io");
        assert_eq!(thread(None, "vcpu", 3), "kiln-vcpu");
        assert_eq!(thread(Some("web"), "vcpu", 3), "web-vcpu");
        assert_eq!(thread(Some("frontend-7"), "vcpu", 3), "fronten-vcpu");
        assert_eq!(thread(Some("frontend-of-7"), "io", 0), "frontend-of--io");
        assert_eq!(thread(Some("ééééé"), "vcpu", 3), "ééé-vcpu");
    }
}
