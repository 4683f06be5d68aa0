//! What an administrator sets for one VM, in the words of Hyper-V's Dynamic Memory.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::units::{Bytes, PAGE_SIZE, ParseBytesError, whole};

/// The smallest memory a VM may be given; stock kernels don't boot in less.
pub const SMALLEST: Bytes = Bytes::mib(64);

/// Spare memory on top of the guest's use where nobody says otherwise (Hyper-V's default).
pub const DEFAULT_BUFFER_PERCENT: u32 = 20;

/// The share of a VM where nobody says otherwise.
pub const DEFAULT_WEIGHT: u32 = 100;

/// The memory settings of one VM.
///
/// Always valid: made by [`Limits::new`] or by reading a text or JSON, which check.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Unchecked", into = "Unchecked")]
pub struct Limits {
    startup: Bytes,
    min: Bytes,
    max: Bytes,
    buffer_percent: u32,
    weight: u32,
}

/// The same fields as they arrive, before anyone looked at them.
#[derive(Clone, Copy, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Unchecked {
    startup: Bytes,
    min: Bytes,
    max: Bytes,
    #[serde(default = "default_buffer", deserialize_with = "whole")]
    buffer_percent: u32,
    #[serde(default = "default_weight", deserialize_with = "whole")]
    weight: u32,
}

const fn default_buffer() -> u32 {
    DEFAULT_BUFFER_PERCENT
}

const fn default_weight() -> u32 {
    DEFAULT_WEIGHT
}

/// Why settings can't be a VM's limits.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum LimitsError {
    /// min <= startup <= max does not hold.
    #[error("min {min} <= startup {startup} <= max {max} must hold")]
    Order {
        /// As given.
        min: Bytes,
        /// As given.
        startup: Bytes,
        /// As given.
        max: Bytes,
    },
    /// Less than any kernel boots in.
    #[error("{0} is less than the {SMALLEST} a kernel needs")]
    TooSmall(Bytes),
    /// Not a whole number of 4 KiB pages.
    #[error("{} bytes ({name}) is not a multiple of 4 KiB", .bytes.0)]
    Unaligned {
        /// Which setting.
        name: &'static str,
        /// As given.
        bytes: Bytes,
    },
    /// Out of 0 to 1000.
    #[error("buffer={0}% is out of range: 0% to 1000%")]
    Buffer(u32),
    /// Out of 1 to 10,000.
    #[error("weight={0} is out of range: 1 to 10000 (100 is usual)")]
    Weight(u32),
    /// A number that is none.
    #[error("`{value}` is not a number for {name}")]
    NotANumber {
        /// Which setting.
        name: &'static str,
        /// As given.
        value: String,
    },
    /// A size that is none.
    #[error(transparent)]
    Size(#[from] ParseBytesError),
    /// A setting that does not exist.
    #[error("`{0}` is not a memory setting: use SIZE[,min=SIZE][,max=SIZE][,buffer=PERCENT%][,weight=N]")]
    Unknown(String),
    /// The same setting twice.
    #[error("{0} is given twice")]
    Twice(String),
}

impl Limits {
    /// Checked limits of a VM that starts with `startup`.
    ///
    /// # Errors
    /// [`LimitsError`] says which rule the settings break.
    pub fn new(
        startup: Bytes,
        min: Bytes,
        max: Bytes,
        buffer_percent: u32,
        weight: u32,
    ) -> Result<Self, LimitsError> {
        if !(min <= startup && startup <= max) {
            return Err(LimitsError::Order { min, startup, max });
        }
        if min < SMALLEST {
            return Err(LimitsError::TooSmall(min));
        }
        for (name, bytes) in [("startup", startup), ("min", min), ("max", max)] {
            if !bytes.0.is_multiple_of(PAGE_SIZE) {
                return Err(LimitsError::Unaligned { name, bytes });
            }
        }
        if buffer_percent > 1000 {
            return Err(LimitsError::Buffer(buffer_percent));
        }
        if !(1..=10_000).contains(&weight) {
            return Err(LimitsError::Weight(weight));
        }
        Ok(Self { startup, min, max, buffer_percent, weight })
    }

    /// A VM whose memory nobody moves.
    ///
    /// # Errors
    /// As [`Limits::new`].
    pub fn fixed(size: Bytes) -> Result<Self, LimitsError> {
        Self::new(size, size, size, DEFAULT_BUFFER_PERCENT, DEFAULT_WEIGHT)
    }

    /// What the guest has when it starts.
    pub const fn startup(&self) -> Bytes {
        self.startup
    }

    /// What it is never shrunk below.
    pub const fn min(&self) -> Bytes {
        self.min
    }

    /// What it is never grown above: the size of its memory map.
    pub const fn max(&self) -> Bytes {
        self.max
    }

    /// Spare memory kept on top of what the guest uses, in percent of that use.
    pub const fn buffer_percent(&self) -> u32 {
        self.buffer_percent
    }

    /// This VM's share when memory is short, relative to the others'.
    pub const fn weight(&self) -> u32 {
        self.weight
    }

    /// Whether a balancer may move this VM's memory.
    pub fn is_dynamic(&self) -> bool {
        self.min != self.max
    }

    /// `bytes`, moved into `min..=max` and to a whole page.
    pub fn clamp(&self, bytes: Bytes) -> Bytes {
        bytes.page_floor().clamp(self.min, self.max)
    }

    /// The same limits for a VM that starts with all that it may have.
    #[must_use]
    pub const fn starting_full(self) -> Self {
        Self { startup: self.max, ..self }
    }

    /// The same limits for a guest that can have no more than `ceiling` at the moment; min stays.
    pub fn capped(self, ceiling: Bytes) -> Self {
        let max = self.max.min(ceiling.page_floor()).max(self.min);
        Self { max, startup: self.startup.min(max), ..self }
    }
}

impl Limits {
    /// The same limits for a guest that can't do with less than `floor`; max stays.
    pub fn raised(self, floor: Bytes) -> Self {
        let min = self.min.max(floor.page_ceil()).min(self.max);
        Self { min, startup: self.startup.max(min), ..self }
    }
}

impl TryFrom<Unchecked> for Limits {
    type Error = LimitsError;
    fn try_from(raw: Unchecked) -> Result<Self, LimitsError> {
        Self::new(raw.startup, raw.min, raw.max, raw.buffer_percent, raw.weight)
    }
}

impl From<Limits> for Unchecked {
    fn from(limits: Limits) -> Self {
        let Limits { startup, min, max, buffer_percent, weight } = limits;
        Self { startup, min, max, buffer_percent, weight }
    }
}

/// Reads what `--memory` takes: `256M,min=128M,max=1G,buffer=20%,weight=100`.
///
/// A size alone is static memory; a missing `min` or `max` is the startup size.
impl FromStr for Limits {
    type Err = LimitsError;

    fn from_str(text: &str) -> Result<Self, LimitsError> {
        let wanted: Wanted = text.parse()?;
        wanted.with_max(wanted.max.unwrap_or(wanted.startup))
    }
}

/// Settings as somebody wrote them for a VM whose size somebody else knows.
///
/// Reads the same text as [`Limits`] does, but a missing `max` is left open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Wanted {
    startup: Bytes,
    min: Option<Bytes>,
    max: Option<Bytes>,
    buffer_percent: Option<u32>,
    weight: Option<u32>,
}

impl Wanted {
    /// A VM whose memory nobody moves.
    pub const fn fixed(size: Bytes) -> Self {
        Self { startup: size, min: Some(size), max: Some(size), buffer_percent: None, weight: None }
    }

    /// The limits of a VM that `has` this much memory at most: a missing `max` is that, a missing
    /// `min` is the startup size, and nothing is larger than what the VM has.
    pub fn of_vm(&self, has: Bytes) -> Limits {
        let has = has.page_floor().max(SMALLEST);
        let max = self.max.unwrap_or(has).min(has);
        let min = self.min.unwrap_or(self.startup).max(SMALLEST).min(max);
        Limits {
            startup: self.startup.clamp(min, max),
            min,
            max,
            buffer_percent: self.buffer_percent.unwrap_or(DEFAULT_BUFFER_PERCENT),
            weight: self.weight.unwrap_or(DEFAULT_WEIGHT),
        }
    }

    fn with_max(&self, max: Bytes) -> Result<Limits, LimitsError> {
        Limits::new(
            self.startup,
            self.min.unwrap_or(self.startup),
            max,
            self.buffer_percent.unwrap_or(DEFAULT_BUFFER_PERCENT),
            self.weight.unwrap_or(DEFAULT_WEIGHT),
        )
    }
}

impl From<Limits> for Wanted {
    fn from(limits: Limits) -> Self {
        Self {
            startup: limits.startup,
            min: Some(limits.min),
            max: Some(limits.max),
            buffer_percent: Some(limits.buffer_percent),
            weight: Some(limits.weight),
        }
    }
}

impl FromStr for Wanted {
    type Err = LimitsError;

    fn from_str(text: &str) -> Result<Self, LimitsError> {
        let mut parts = text.split(',');
        let startup = size(parts.next().unwrap_or_default())?;
        let mut wanted = Self { startup, min: None, max: None, buffer_percent: None, weight: None };
        for part in parts {
            let (key, value) = part.split_once('=').ok_or_else(|| LimitsError::Unknown(part.to_owned()))?;
            let percent = value.strip_suffix('%').unwrap_or(value);
            let twice = match key {
                "min" => wanted.min.replace(size(value)?).is_some(),
                "max" => wanted.max.replace(size(value)?).is_some(),
                "buffer" => wanted.buffer_percent.replace(number("buffer", percent)?).is_some(),
                "weight" => wanted.weight.replace(number("weight", value)?).is_some(),
                _ => return Err(LimitsError::Unknown(key.to_owned())),
            };
            if twice {
                return Err(LimitsError::Twice(key.to_owned()));
            }
        }
        // What would be wrong for every VM is refused here, where it was written.
        wanted.with_max(wanted.max.unwrap_or(wanted.startup))?;
        Ok(wanted)
    }
}

/// A size in whole pages: people write 1.1G.
fn size(text: &str) -> Result<Bytes, ParseBytesError> {
    Ok(text.parse::<Bytes>()?.page_floor())
}

fn number(name: &'static str, value: &str) -> Result<u32, LimitsError> {
    value.parse().map_err(|_| LimitsError::NotANumber { name, value: value.to_owned() })
}

/// As [`FromStr`] reads it, sizes in whole KiB.
impl fmt::Display for Limits {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let size = |b: Bytes| format!("{}K", b.0 / 1024);
        write!(
            f,
            "{},min={},max={},buffer={}%,weight={}",
            size(self.startup),
            size(self.min),
            size(self.max),
            self.buffer_percent,
            self.weight
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_size_alone_is_static() {
        let limits: Limits = "256M".parse().unwrap();
        assert!(!limits.is_dynamic());
        assert_eq!(limits.max(), Bytes::mib(256));
    }

    #[test]
    fn sizes_are_rounded_down_to_pages() {
        let limits: Limits = "1.1G,min=0.3G,max=1.7G".parse().unwrap();
        assert_eq!(limits.startup(), Bytes(1_181_114_368));
        for size in [limits.startup(), limits.min(), limits.max()] {
            assert!(size.0.is_multiple_of(PAGE_SIZE), "{size}");
        }
        assert_eq!("100000001".parse::<Limits>().unwrap().max(), Bytes(99_999_744));
        assert_eq!(limits.to_string().parse::<Limits>().unwrap(), limits);
    }

    #[test]
    fn all_settings_are_read_and_printed() {
        let limits: Limits = "256M,min=128M,max=1G,buffer=30%,weight=250".parse().unwrap();
        assert_eq!(limits, Limits::new(Bytes::mib(256), Bytes::mib(128), Bytes::gib(1), 30, 250).unwrap());
        assert_eq!(limits.to_string().parse::<Limits>().unwrap(), limits);
        let json = serde_json::to_string(&limits).unwrap();
        assert_eq!(serde_json::from_str::<Limits>(&json).unwrap(), limits);
    }

    #[test]
    fn settings_for_somebody_elses_vm_fit_into_what_it_has() {
        let of_vm = |text: &str, has| text.parse::<Wanted>().unwrap().of_vm(has);
        let limits = of_vm("1G,min=256M,weight=50", Bytes::gib(2));
        assert_eq!(
            (limits.min(), limits.startup(), limits.max()),
            (Bytes::mib(256), Bytes::gib(1), Bytes::gib(2))
        );
        assert_eq!(limits.weight(), 50);
        let limits = of_vm("1G,min=256M,max=4G", Bytes(Bytes::mib(128).0 + 5));
        assert_eq!(
            (limits.min(), limits.startup(), limits.max()),
            (Bytes::mib(128), Bytes::mib(128), Bytes::mib(128))
        );
        // Too small for any kernel we know, and still a VM that somebody runs.
        assert_eq!(of_vm("1G", Bytes::mib(8)).max(), SMALLEST);
        for wrong in ["1G,min=2G", "1G,max=512M", "1G,min=1M", "1G,buffer=x", "x"] {
            assert!(wrong.parse::<Wanted>().is_err(), "{wrong}");
        }
        // What was taken is a valid set of limits, whatever the VM has.
        for has in [0, 1, 100, 300, 1000, 5000].map(Bytes::mib) {
            let limits = of_vm("1G,min=256M,max=2G", has);
            assert_eq!(limits.to_string().parse::<Limits>().unwrap(), limits);
        }
    }

    #[test]
    fn settings_that_contradict_are_refused_with_a_reason() {
        for text in [
            "256M,min=512M",
            "256M,max=128M",
            "32M",
            "256M,weight=0",
            "256M,buffer=x",
            "256M,min=128M,min=64M",
            "256M,maxx=1G",
            "256M,max",
        ] {
            assert!(text.parse::<Limits>().is_err(), "{text}");
        }
        assert!(serde_json::from_str::<Limits>(r#"{"startup":1,"min":2,"max":3}"#).is_err());
    }

    #[test]
    fn a_cap_keeps_the_limits_valid() {
        let limits: Limits = "256M,min=128M,max=1G".parse().unwrap();
        for (ceiling, startup, max) in [(2048, 256, 1024), (300, 256, 300), (200, 200, 200), (0, 128, 128)] {
            let capped = limits.capped(Bytes::mib(ceiling));
            assert_eq!((capped.startup(), capped.max()), (Bytes::mib(startup), Bytes::mib(max)));
            assert_eq!(capped.min(), Bytes::mib(128));
        }
    }
}
