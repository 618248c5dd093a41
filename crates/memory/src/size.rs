//! How much RAM, as people write it.

use std::fmt;
use std::str::FromStr;

use serde::de::{self, Deserializer, Visitor};
use serde::{Deserialize, Serialize, Serializer};
use thiserror::Error;

/// An amount of memory in bytes.
///
/// As text it is a whole number with a suffix: `K`, `M`, `G` or `T`, each 1024 times the one
/// before, in either case and optionally followed by `B` or `iB` (`512M`, `5GiB`, `65536k`). A `B`
/// alone means bytes (`4096B`). **A number without a suffix is in MiB**, as on the command lines
/// of other virtual machine monitors: `512` is `512M`.
///
/// Serde writes it as such a text and reads a text or a number (again in MiB).
///
/// ```
/// use kiln_memory::MemorySize;
///
/// assert_eq!("1G".parse::<MemorySize>()?, MemorySize::mib(1024));
/// assert_eq!("512".parse::<MemorySize>()?, MemorySize::mib(512));
/// assert_eq!(MemorySize::mib(1536).to_string(), "1536M");
/// # Ok::<(), kiln_memory::ParseMemorySizeError>(())
/// ```
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemorySize(u64);

/// The suffixes and the power of two that each stands for, largest first.
const UNITS: [(char, u32); 4] = [('T', 40), ('G', 30), ('M', 20), ('K', 10)];

impl MemorySize {
    /// `n` bytes.
    pub const fn bytes(n: u64) -> Self {
        Self(n)
    }

    /// `n` MiB; an amount that 64 bits cannot hold becomes the largest that they can.
    pub const fn mib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 20))
    }

    /// `n` GiB; an amount that 64 bits cannot hold becomes the largest that they can.
    pub const fn gib(n: u64) -> Self {
        Self(n.saturating_mul(1 << 30))
    }

    /// The amount in bytes.
    pub const fn as_bytes(self) -> u64 {
        self.0
    }
}

impl fmt::Display for MemorySize {
    /// The shortest whole number with a suffix that is exact, such as `512M`; `0M` for nothing.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let text = match UNITS
            .iter()
            .find(|(_, shift)| self.0.is_multiple_of(1 << shift))
        {
            _ if self.0 == 0 => "0M".to_owned(),
            Some((suffix, shift)) => format!("{}{suffix}", self.0 >> shift),
            None => format!("{}B", self.0),
        };
        f.pad(&text)
    }
}

/// Why a text is not an amount of memory.
#[derive(Clone, Debug, Error, PartialEq, Eq)]
#[non_exhaustive]
pub enum ParseMemorySizeError {
    /// It is not a whole number with one of the suffixes.
    #[error("memory size `{0}` is not a whole number with an optional K, M, G or T, such as 512M")]
    Malformed(String),
    /// It does not fit in 64 bits.
    #[error("memory size `{0}` is more than 64 bits can count")]
    TooLarge(String),
}

impl FromStr for MemorySize {
    type Err = ParseMemorySizeError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let digits = trimmed.len()
            - trimmed
                .trim_start_matches(|c: char| c.is_ascii_digit())
                .len();
        let (number, suffix) = trimmed.split_at(digits);
        if number.is_empty() {
            return Err(ParseMemorySizeError::Malformed(text.to_owned()));
        }
        let shift = shift_of(&suffix.to_ascii_uppercase())
            .ok_or_else(|| ParseMemorySizeError::Malformed(text.to_owned()))?;
        number
            .parse::<u64>()
            .ok()
            .and_then(|number| number.checked_mul(1 << shift))
            .map(Self)
            .ok_or_else(|| ParseMemorySizeError::TooLarge(text.to_owned()))
    }
}

/// The power of two that an upper-case suffix stands for.
fn shift_of(suffix: &str) -> Option<u32> {
    match suffix {
        "" => return Some(20),
        "B" => return Some(0),
        _ => {}
    }
    let (unit, rest) = suffix.split_at_checked(1)?;
    let (_, shift) = UNITS.iter().find(|(name, _)| unit.starts_with(*name))?;
    matches!(rest, "" | "B" | "IB").then_some(*shift)
}

impl Serialize for MemorySize {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MemorySize {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(SizeVisitor)
    }
}

struct SizeVisitor;

impl Visitor<'_> for SizeVisitor {
    type Value = MemorySize;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an amount of memory such as \"512M\", or a number of MiB")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<MemorySize, E> {
        text.parse().map_err(E::custom)
    }

    fn visit_u64<E: de::Error>(self, mib: u64) -> Result<MemorySize, E> {
        mib.checked_mul(1 << 20)
            .map(MemorySize)
            .ok_or_else(|| E::custom(ParseMemorySizeError::TooLarge(mib.to_string())))
    }

    fn visit_i64<E: de::Error>(self, mib: i64) -> Result<MemorySize, E> {
        match u64::try_from(mib) {
            Ok(mib) => self.visit_u64(mib),
            Err(_) => Err(E::custom(ParseMemorySizeError::Malformed(mib.to_string()))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<u64, ParseMemorySizeError> {
        text.parse().map(MemorySize::as_bytes)
    }

    #[test]
    fn every_suffix_is_understood_in_either_case() {
        for (text, bytes) in [
            ("512M", 512 << 20),
            ("512m", 512 << 20),
            ("512MiB", 512 << 20),
            ("512MB", 512 << 20),
            ("5G", 5 << 30),
            ("65536K", 64 << 20),
            ("2TiB", 2 << 40),
            ("4096B", 4096),
            (" 1G ", 1 << 30),
            ("0", 0),
        ] {
            assert_eq!(parse(text), Ok(bytes), "{text}");
        }
    }

    #[test]
    fn a_plain_number_is_in_mib() {
        assert_eq!(parse("256"), Ok(256 << 20));
    }

    #[test]
    fn what_is_no_size_is_refused() {
        for text in [
            "", "M", "-1M", "1.5G", "12Q", "1 G", "0x10M", "1GG", "1iB", "1é", "+5M",
        ] {
            let refused = Err(ParseMemorySizeError::Malformed(text.to_owned()));
            assert_eq!(parse(text), refused, "{text}");
        }
    }

    #[test]
    fn more_than_64_bits_is_refused_and_not_wrapped() {
        for text in [
            "16777216T",
            "18446744073709551616B",
            "99999999999999999999999",
        ] {
            assert_eq!(
                parse(text),
                Err(ParseMemorySizeError::TooLarge(text.to_owned())),
                "{text}"
            );
        }
        assert_eq!(MemorySize::gib(u64::MAX).as_bytes(), u64::MAX);
    }

    #[test]
    fn the_text_of_a_size_reads_back_as_that_size() {
        for bytes in [
            0,
            1,
            4096,
            1 << 20,
            3 << 29,
            5 << 30,
            1 << 40,
            (1 << 40) + 1,
            u64::MAX,
        ] {
            let size = MemorySize::bytes(bytes);
            assert_eq!(size.to_string().parse(), Ok(size));
        }
        assert_eq!(MemorySize::gib(5).to_string(), "5G");
        assert_eq!(format!("{:>6}", MemorySize::mib(512)), "  512M");
    }

    #[test]
    fn serde_takes_a_text_or_a_number_of_mib() {
        let from = |json: &str| serde_json::from_str::<MemorySize>(json);
        assert_eq!(from("\"5G\"").unwrap(), MemorySize::gib(5));
        assert_eq!(from("512").unwrap(), MemorySize::mib(512));
        assert_eq!(
            serde_json::to_string(&MemorySize::mib(512)).unwrap(),
            "\"512M\""
        );
        assert!(
            from("-1")
                .unwrap_err()
                .to_string()
                .contains("memory size `-1`")
        );
        assert!(from("1.5").is_err());
        assert!(from("18446744073709551615").is_err());
    }
}
