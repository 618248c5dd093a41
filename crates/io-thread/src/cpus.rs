//! Lists of CPUs, as people write them, and the CPUs that the host has online.

use std::fmt;
use std::fs;
use std::io;
use std::str::FromStr;

use rustix::thread::{CpuSet, sched_setaffinity};
use serde::de::{self, Deserializer};
use serde::{Deserialize, Serialize, Serializer};

/// Where Linux lists the CPUs that are online.
const ONLINE: &str = "/sys/devices/system/cpu/online";

/// A list of the host's CPUs, such as `0-3,5`: numbers, and ranges of numbers, with commas between
/// them. It is not empty. Serde has it as such a text.
///
/// ```
/// use kiln_io_thread::CpuList;
///
/// let cpus: CpuList = "5,0-2,1".parse()?;
/// assert_eq!(cpus.iter().collect::<Vec<_>>(), [0, 1, 2, 5]);
/// assert_eq!(cpus.to_string(), "0-2,5");
/// assert!("3-1".parse::<CpuList>().is_err());
/// # Ok::<(), kiln_io_thread::CpuListError>(())
/// ```
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct CpuList {
    /// In rising order, each once; below [`CpuList::LIMIT`].
    cpus: Vec<u16>,
}

/// Why a text is not a list of CPUs.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CpuListError {
    /// It is not numbers and ranges with commas between them.
    #[error("`{0}` is not a list of CPUs, such as 0-3,5")]
    Malformed(String),
    /// A CPU's number is too large.
    #[error("CPU {0}: the numbers of CPUs are below {limit}", limit = CpuList::LIMIT)]
    TooLarge(u64),
}

impl CpuList {
    /// CPUs are numbered below this: as many as a set of the C library has room for.
    pub const LIMIT: usize = CpuSet::MAX_CPU;

    /// The CPUs that the host has online.
    ///
    /// # Errors
    ///
    /// Where the system does not say, or says something else than a list.
    pub fn online() -> io::Result<Self> {
        let text = fs::read_to_string(ONLINE)?;
        text.trim_end().parse().map_err(io::Error::other)
    }

    /// The CPUs, in rising order.
    pub fn iter(&self) -> impl Iterator<Item = u32> + '_ {
        self.cpus.iter().map(|cpu| u32::from(*cpu))
    }

    /// The CPUs of this list that the other one does not have; `None` where it has all of them.
    pub fn without(&self, other: &Self) -> Option<Self> {
        let known = |cpu: &u16| other.cpus.binary_search(cpu).is_ok();
        let cpus: Vec<u16> = self.cpus.iter().copied().filter(|c| !known(c)).collect();
        (!cpus.is_empty()).then_some(Self { cpus })
    }

    /// Lets the thread that this is called on run on these CPUs alone; threads that it starts later
    /// begin with the same. Linux leaves CPUs that are not online out without a word.
    ///
    /// # Errors
    ///
    /// What the system says, as where none of them is online or the process may use none of them.
    pub fn pin_this_thread(&self) -> io::Result<()> {
        let mut set = CpuSet::new();
        for cpu in &self.cpus {
            set.set(usize::from(*cpu));
        }
        Ok(sched_setaffinity(None, &set)?)
    }
}

impl FromStr for CpuList {
    type Err = CpuListError;

    fn from_str(text: &str) -> Result<Self, CpuListError> {
        let malformed = || CpuListError::Malformed(text.to_owned());
        let number = |digits: &str| -> Result<u16, CpuListError> {
            if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
                return Err(malformed());
            }
            let number = digits.parse::<u64>().unwrap_or(u64::MAX);
            match u16::try_from(number) {
                Ok(cpu) if usize::from(cpu) < Self::LIMIT => Ok(cpu),
                _ => Err(CpuListError::TooLarge(number)),
            }
        };
        let mut cpus = Vec::new();
        for piece in text.split(',') {
            match piece.split_once('-') {
                None => cpus.push(number(piece)?),
                Some((first, last)) => {
                    let (first, last) = (number(first)?, number(last)?);
                    if first > last {
                        return Err(malformed());
                    }
                    cpus.extend(first..=last);
                }
            }
        }
        cpus.sort_unstable();
        cpus.dedup();
        Ok(Self { cpus })
    }
}

impl fmt::Display for CpuList {
    /// The shortest list, such as `0-2,5`.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let runs = self.cpus.chunk_by(|one, next| one + 1 == *next);
        for (index, run) in runs.enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match run {
                [first, .., last] => write!(f, "{comma}{first}-{last}")?,
                run => run.iter().try_for_each(|cpu| write!(f, "{comma}{cpu}"))?,
            }
        }
        Ok(())
    }
}

impl fmt::Debug for CpuList {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "CpuList({self})")
    }
}

impl Serialize for CpuList {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for CpuList {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_list_is_written_as_it_can_be_read() {
        for (text, written) in [
            ("0", "0"),
            ("0-3,5", "0-3,5"),
            ("3,2,1", "1-3"),
            ("1-1", "1"),
            ("7,1023", "7,1023"),
            ("0-2,1-4", "0-4"),
        ] {
            let cpus: CpuList = text.parse().unwrap();
            assert_eq!(cpus.to_string(), written);
            assert_eq!(written.parse(), Ok(cpus));
        }
    }

    #[test]
    fn what_is_no_list_is_refused() {
        for text in ["", ",", "1,", "-1", "1-", "a", "3-1", "+1", " 1", "1-2-3"] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert_eq!(error, CpuListError::Malformed(text.to_owned()));
        }
        for text in ["1024", "0-65536", "99999999999999999999999"] {
            let error = text.parse::<CpuList>().unwrap_err();
            assert!(matches!(error, CpuListError::TooLarge(_)), "{error}");
        }
    }

    #[test]
    fn what_another_list_has_not_is_left() {
        let list = |text: &str| text.parse::<CpuList>().unwrap();
        assert_eq!(list("0-5").without(&list("1-3")), Some(list("0,4-5")));
        assert_eq!(list("1,2").without(&list("0-3")), None);
    }

    #[test]
    fn the_host_has_a_cpu_online_that_a_thread_can_be_kept_on() {
        let online = CpuList::online().unwrap();
        std::thread::spawn(move || {
            let known = rustix::thread::sched_getaffinity(None).unwrap();
            let usable = online.iter().find(|cpu| known.is_set(*cpu as usize));
            let one: CpuList = usable.unwrap().to_string().parse().unwrap();
            one.pin_this_thread().unwrap();
            let now = rustix::thread::sched_getaffinity(None).unwrap();
            assert_eq!(now.count(), 1);
            assert!(now.is_set(one.iter().next().unwrap() as usize));
        })
        .join()
        .unwrap();
    }
}
