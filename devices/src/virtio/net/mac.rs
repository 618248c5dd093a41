//! Ethernet addresses.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// An Ethernet (MAC) address, as text six pairs of hexadecimal digits with colons between them.
///
/// ```
/// use kiln_devices::virtio::net::MacAddress;
///
/// let mac: MacAddress = "06:00:AC:10:00:02".parse()?;
/// assert_eq!(mac.to_string(), "06:00:ac:10:00:02");
/// assert_eq!(mac.bytes()[0], 6);
/// # Ok::<(), kiln_devices::virtio::net::ParseMacAddressError>(())
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MacAddress([u8; 6]);

/// A text that is no [`MacAddress`].
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("read `{text}` as a MAC address: it is not like 06:00:00:00:00:01")]
pub struct ParseMacAddressError {
    /// The text.
    pub text: String,
}

impl MacAddress {
    /// The address of these bytes, the first of them the first on the wire.
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// A random address of those that anybody may use (unicast, locally administered).
    ///
    /// # Errors
    ///
    /// What the system says where it has no random numbers.
    pub fn random() -> io::Result<Self> {
        let mut bytes = [0; 6];
        File::open("/dev/urandom")?.read_exact(&mut bytes)?;
        bytes[0] = (bytes[0] & !0b01) | 0b10;
        Ok(Self(bytes))
    }

    /// The bytes of the address.
    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }

    /// Whether one interface alone can have this address: it is not a group's, and not zero.
    pub fn is_unicast(self) -> bool {
        !self.is_group() && self.0 != [0; 6]
    }

    /// Whether it is that of several interfaces.
    pub(super) fn is_group(self) -> bool {
        self.0[0] & 1 != 0
    }

    /// Whether it is that of all interfaces.
    pub(super) fn is_broadcast(self) -> bool {
        self.0 == [0xff; 6]
    }
}

impl fmt::Display for MacAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl FromStr for MacAddress {
    type Err = ParseMacAddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let error = || ParseMacAddressError {
            text: text.to_owned(),
        };
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(error)?;
            // `from_str_radix` would take a sign.
            if part.len() != 2 || !part.bytes().all(|digit| digit.is_ascii_hexdigit()) {
                return Err(error());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| error())?;
        }
        match parts.next() {
            None => Ok(Self(bytes)),
            Some(_) => Err(error()),
        }
    }
}

impl TryFrom<String> for MacAddress {
    type Error = ParseMacAddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<MacAddress> for String {
    fn from(mac: MacAddress) -> Self {
        mac.to_string()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_an_address_is_read_as_one() {
        for text in ["06:00:00:00:00:01", "ff:fF:00:9a:Bc:de"] {
            let mac: MacAddress = text.parse().unwrap();
            assert_eq!(mac.to_string(), text.to_lowercase());
            let stored = serde_json::to_string(&mac).unwrap();
            assert_eq!(serde_json::from_str::<MacAddress>(&stored).unwrap(), mac);
        }
        for text in [
            "",
            "06:00:00:00:00",
            "06:00:00:00:00:01:02",
            "06:00:00:00:00:01:",
            "6:0:0:0:0:1",
            "06-00-00-00-00-01",
            "+6:00:00:00:00:01",
            "0g:00:00:00:00:01",
            "06:00:00:00:00:001",
            " 06:00:00:00:00:01",
        ] {
            let error = text.parse::<MacAddress>().unwrap_err();
            assert!(error.to_string().contains(&format!("`{text}`")));
        }
    }

    #[test]
    fn a_random_address_is_one_that_anybody_may_use() {
        let some: Vec<_> = (0..32).map(|_| MacAddress::random().unwrap()).collect();
        assert!(
            some.iter()
                .all(|mac| mac.is_unicast() && mac.bytes()[0] & 2 != 0)
        );
        assert!(some.iter().any(|mac| *mac != some[0]));
        assert!(!MacAddress::new([1, 0, 0, 0, 0, 0]).is_unicast());
        assert!(!MacAddress::new([0; 6]).is_unicast());
    }
}
