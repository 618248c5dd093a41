//! The CMOS real-time clock (MC146818) and its RAM.

use std::fmt;
use std::ops::ControlFlow;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kiln_device_api::{BusDeviceMut, ExitRequest};
use serde::{Deserialize, Serialize};

/// Index port (0x70).
const INDEX: u64 = 0;
/// Data port (0x71).
const DATA: u64 = 1;
/// The bits of the index; the one above disables NMIs, which nobody raises.
const INDEX_MASK: u8 = 0x7f;

const SECONDS: u8 = 0x00;
const MINUTES: u8 = 0x02;
const HOURS: u8 = 0x04;
const DAY_OF_WEEK: u8 = 0x06;
const DAY_OF_MONTH: u8 = 0x07;
const MONTH: u8 = 0x08;
const YEAR: u8 = 0x09;
const STATUS_A: u8 = 0x0a;
const STATUS_B: u8 = 0x0b;
const STATUS_C: u8 = 0x0c;
const STATUS_D: u8 = 0x0d;
/// Not the chip's, but where a PC keeps it (the FADT's `CENTURY` says so).
const CENTURY: u8 = 0x32;

/// Status A: an update is in progress.
const A_UPDATE_IN_PROGRESS: u8 = 1 << 7;
/// Status A: the oscillator runs, at the usual divider and rate.
const A_DEFAULT: u8 = 0x26;
/// Status B: hours count to 24, not to 12 twice.
const B_24_HOURS: u8 = 1 << 1;
/// Status B: values are binary, not BCD.
const B_BINARY: u8 = 1 << 2;
/// Hours of the second half of the day carry this bit where they count to 12.
const PM: u8 = 1 << 7;
/// Status D: RAM and time are valid.
const D_VALID: u8 = 1 << 7;

const RAM_SIZE: usize = 128;

/// How long the registers stay on the moment at which status A was last read. A guest reads status
/// A, sees that no update is in progress, and then takes the registers one by one for one moment;
/// on hardware that moment lasts 244 microseconds, here also where its vCPU was interrupted.
const LATCH: Duration = Duration::from_millis(100);

/// The state of an [`Rtc`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RtcState {
    /// The register that the index port selects.
    pub index: u8,
    /// All 128 bytes, with status A and B; those of time and date have no meaning.
    pub ram: Vec<u8>,
}

impl Default for RtcState {
    fn default() -> Self {
        let mut ram = vec![0; RAM_SIZE];
        ram[STATUS_A as usize] = A_DEFAULT;
        ram[STATUS_B as usize] = B_24_HOURS;
        Self { index: 0, ram }
    }
}

/// The CMOS RTC's two ports: index (0x70) and data (0x71).
///
/// It tells the host's time in UTC, in BCD and 24 hours unless the guest chooses otherwise in
/// status B. Writes to time and date are ignored: the host keeps its clock, and a machine does not
/// outlive a reset, after which a guest would look at it again. The alarm registers are plain RAM,
/// and there is no interrupt.
pub struct Rtc {
    index: u8,
    ram: [u8; RAM_SIZE],
    clock: Box<dyn Fn() -> SystemTime + Send>,
    latched: Option<SystemTime>,
}

impl Rtc {
    /// A clock that tells the host's time.
    pub fn new() -> Self {
        Self::from_state(&RtcState::default(), SystemTime::now)
    }

    /// The device as it was when `state` was taken, with the time that `clock` tells: of this
    /// moment, not of that one. RAM that the state lacks is zero.
    pub fn from_state(state: &RtcState, clock: impl Fn() -> SystemTime + Send + 'static) -> Self {
        let mut ram = [0; RAM_SIZE];
        for (to, from) in ram.iter_mut().zip(&state.ram) {
            *to = *from;
        }
        Self {
            index: state.index & INDEX_MASK,
            ram,
            clock: Box::new(clock),
            latched: None,
        }
    }

    /// The state, for [`from_state`](Self::from_state).
    pub fn state(&self) -> RtcState {
        RtcState {
            index: self.index,
            ram: self.ram.to_vec(),
        }
    }

    fn read_register(&mut self) -> u8 {
        match self.index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY_OF_MONTH | MONTH | YEAR | CENTURY => {
                self.time_register()
            }
            STATUS_A => {
                self.latched = Some((self.clock)());
                self.status(STATUS_A) & !A_UPDATE_IN_PROGRESS
            }
            // No interrupt is ever pending.
            STATUS_C => 0,
            STATUS_D => D_VALID,
            index => self.ram[usize::from(index & INDEX_MASK)],
        }
    }

    fn write_register(&mut self, value: u8) {
        match self.index {
            SECONDS | MINUTES | HOURS | DAY_OF_WEEK | DAY_OF_MONTH | MONTH | YEAR | CENTURY
            | STATUS_C | STATUS_D => {}
            index => self.ram[usize::from(index & INDEX_MASK)] = value,
        }
    }

    fn status(&self, index: u8) -> u8 {
        self.ram[usize::from(index & INDEX_MASK)]
    }

    fn time_register(&self) -> u8 {
        let now = (self.clock)();
        let moment = self
            .latched
            .filter(|latched| now.duration_since(*latched).is_ok_and(|age| age < LATCH))
            .unwrap_or(now);
        let date = Date::new(moment);
        let status = self.status(STATUS_B);
        let encode = |value: u8| {
            if status & B_BINARY != 0 {
                value
            } else {
                ((value / 10) << 4) | (value % 10)
            }
        };
        match self.index {
            SECONDS => encode(date.second),
            MINUTES => encode(date.minute),
            HOURS if status & B_24_HOURS != 0 => encode(date.hour),
            HOURS => {
                let hour = encode((date.hour + 11) % 12 + 1);
                hour | if date.hour >= 12 { PM } else { 0 }
            }
            DAY_OF_WEEK => encode(date.day_of_week),
            DAY_OF_MONTH => encode(date.day),
            MONTH => encode(date.month),
            YEAR => encode((date.year % 100) as u8),
            _ => encode((date.year / 100) as u8),
        }
    }
}

impl Default for Rtc {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for Rtc {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Rtc")
            .field("index", &self.index)
            .finish_non_exhaustive()
    }
}

impl BusDeviceMut for Rtc {
    fn read(&mut self, offset: u64, data: &mut [u8]) {
        for (register, byte) in (offset..).zip(data) {
            // The index can't be read back.
            if register == DATA {
                *byte = self.read_register();
            }
        }
    }

    fn write(&mut self, offset: u64, data: &[u8]) -> ControlFlow<ExitRequest> {
        for (register, byte) in (offset..).zip(data) {
            match register {
                INDEX => self.index = byte & INDEX_MASK,
                DATA => self.write_register(*byte),
                _ => {}
            }
        }
        ControlFlow::Continue(())
    }
}

/// A moment in UTC, in the Gregorian calendar.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Date {
    year: u16,
    /// 1 is January.
    month: u8,
    day: u8,
    /// 1 is Sunday.
    day_of_week: u8,
    hour: u8,
    minute: u8,
    second: u8,
}

const DAY: u64 = 24 * 60 * 60;
/// 400 years have always the same number of days.
const DAYS_OF_400_YEARS: u64 = 146_097;
/// The end of what two BCD digits of century and two of year can say, 31 December 9999.
const LAST_SECOND: u64 = 253_402_300_799;

impl Date {
    /// The date of `moment`; the nearest one that the registers can tell where they can't tell it.
    fn new(moment: SystemTime) -> Self {
        let since_epoch = moment.duration_since(UNIX_EPOCH).unwrap_or_default();
        let seconds = since_epoch.as_secs().min(LAST_SECOND);
        let (days, second_of_day) = (seconds / DAY, seconds % DAY);
        // Years are counted from a 1 March in a year that 400 divides: a leap day is then the last
        // of its year. 1 January 1970 is this many days after 1 March 1600.
        let days_since_1600 = days + 135_080;
        let (cycle, mut day) = (
            days_since_1600 / DAYS_OF_400_YEARS,
            days_since_1600 % DAYS_OF_400_YEARS,
        );
        // The last day of a cycle, and the last of four years, would begin one more.
        let century = (day / 36_524).min(3);
        day -= century * 36_524;
        let four_years = day / 1461;
        day -= four_years * 1461;
        let year_of_four = (day / 365).min(3);
        day -= year_of_four * 365;
        let mut year = 1600 + cycle * 400 + century * 100 + four_years * 4 + year_of_four;
        // March to July and August to December have the same five lengths, 153 days in all.
        let month_from_march = (day * 5 + 2) / 153;
        day -= (month_from_march * 153 + 2) / 5;
        let month = (month_from_march + 2) % 12 + 1;
        if month <= 2 {
            year += 1;
        }
        Self {
            year: year as u16,
            month: month as u8,
            day: day as u8 + 1,
            // The epoch was a Thursday.
            day_of_week: ((days + 4) % 7) as u8 + 1,
            hour: (second_of_day / 3600) as u8,
            minute: (second_of_day / 60 % 60) as u8,
            second: (second_of_day % 60) as u8,
        }
    }
}

#[cfg(test)]
mod tests;
