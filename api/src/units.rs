//! Amounts of memory, with their unit in the type.

use std::fmt;
use std::iter::Sum;
use std::ops::{Add, AddAssign, Sub, SubAssign};
use std::str::FromStr;

use serde::de::{Deserializer, Error};
use serde::{Deserialize, Serialize};

/// log2 of the size in which virtio-balloon counts, whatever the guest's or
/// the host's page size is (virtio 1.2, section 5.5.6: `VIRTIO_BALLOON_PFN_SHIFT`).
pub const PAGE_SHIFT: u32 = 12;

/// Bytes in one of virtio-balloon's pages.
pub const PAGE_SIZE: u64 = 1 << PAGE_SHIFT;

const KIB: u64 = 1 << 10;
const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// An amount of memory in bytes; in JSON a plain number of bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Bytes(#[serde(deserialize_with = "whole")] pub u64);

impl Bytes {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// `n` KiB.
    pub const fn kib(n: u64) -> Self {
        Self(n * KIB)
    }

    /// `n` MiB.
    pub const fn mib(n: u64) -> Self {
        Self(n * MIB)
    }

    /// `n` GiB.
    pub const fn gib(n: u64) -> Self {
        Self(n * GIB)
    }

    /// The difference, or nothing where `other` is larger.
    pub const fn saturating_sub(self, other: Self) -> Self {
        Self(self.0.saturating_sub(other.0))
    }

    /// The sum, or the largest amount where it would not fit.
    pub const fn saturating_add(self, other: Self) -> Self {
        Self(self.0.saturating_add(other.0))
    }

    /// `percent` hundredths of this amount, rounded down; saturates.
    pub const fn percent(self, percent: u64) -> Self {
        let part = self.0 as u128 * percent as u128 / 100;
        Self(if part > u64::MAX as u128 { u64::MAX } else { part as u64 })
    }

    /// Whole virtio-balloon pages that fit in this amount.
    pub const fn pages(self) -> Pages {
        Pages(self.0 >> PAGE_SHIFT)
    }

    /// The largest whole number of virtio-balloon pages not above this amount.
    pub const fn page_floor(self) -> Self {
        Self(self.0 & !(PAGE_SIZE - 1))
    }

    /// The smallest whole number of virtio-balloon pages not below this amount, or the largest amount
    /// there is where that would be more.
    pub const fn page_ceil(self) -> Self {
        Self(self.0.div_ceil(PAGE_SIZE).saturating_mul(PAGE_SIZE))
    }
}

/// An amount of memory in virtio-balloon's pages of 4 KiB.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Pages(pub u64);

impl Pages {
    /// The same amount in bytes; saturates.
    pub const fn bytes(self) -> Bytes {
        Bytes(self.0.saturating_mul(PAGE_SIZE))
    }
}

/// Reads a whole number, however it is written: to JSON's schemas 1.0 is one as well.
///
/// # Errors
/// For anything else, and what `T` can't hold.
pub fn whole<'de, D: Deserializer<'de>, T: TryFrom<u64>>(input: D) -> Result<T, D::Error> {
    Number::deserialize(input)?.whole()
}

/// As [`whole`], where there may be none.
///
/// # Errors
/// As [`whole`].
pub fn optional_whole<'de, D: Deserializer<'de>, T: TryFrom<u64>>(input: D) -> Result<Option<T>, D::Error> {
    Option::<Number>::deserialize(input)?.map(Number::whole).transpose()
}

#[derive(Deserialize)]
#[serde(untagged, expecting = "expected a whole number")]
enum Number {
    Whole(u64),
    Float(f64),
}

impl Number {
    fn whole<T: TryFrom<u64>, E: Error>(self) -> Result<T, E> {
        let number = match self {
            Self::Whole(number) => Some(number),
            // 2^64 is exact in an f64; at and above it the cast would saturate silently.
            Self::Float(number) => {
                let fits = number.fract() == 0.0 && (0.0..u64::MAX as f64).contains(&number);
                fits.then_some(number as u64)
            }
        };
        let held = number.and_then(|number| T::try_from(number).ok());
        held.ok_or_else(|| E::custom(format!("expected a whole number of {} bits", 8 * size_of::<T>())))
    }
}

impl Add for Bytes {
    type Output = Self;
    fn add(self, other: Self) -> Self {
        Self(self.0 + other.0)
    }
}

impl AddAssign for Bytes {
    fn add_assign(&mut self, other: Self) {
        *self = *self + other;
    }
}

impl Sub for Bytes {
    type Output = Self;
    fn sub(self, other: Self) -> Self {
        Self(self.0 - other.0)
    }
}

impl SubAssign for Bytes {
    fn sub_assign(&mut self, other: Self) {
        *self = *self - other;
    }
}

impl Sum for Bytes {
    fn sum<I: Iterator<Item = Self>>(amounts: I) -> Self {
        amounts.fold(Self::ZERO, Self::saturating_add)
    }
}

/// Three significant digits in the largest binary unit: `256 MiB`, `1.25 GiB`.
impl fmt::Display for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (size, unit) = match self.0 {
            n if n >= TIB => (TIB, "TiB"),
            n if n >= GIB => (GIB, "GiB"),
            n if n >= MIB => (MIB, "MiB"),
            n if n >= KIB => (KIB, "KiB"),
            _ => (1, "B"),
        };
        let text = if self.0.is_multiple_of(size) {
            format!("{} {unit}", self.0 / size)
        } else {
            let value = self.0 as f64 / size as f64;
            let digits = if value < 10.0 { 2 } else { usize::from(value < 100.0) };
            format!("{value:.digits$} {unit}")
        };
        f.pad(&text)
    }
}

/// Why a text is not an amount of memory.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ParseBytesError {
    /// It has no number in front.
    #[error("`{0}` is not a size: write a number and a unit, such as 512M or 1.5GiB")]
    NotANumber(String),
    /// It has a unit that means nothing here.
    #[error("`{unit}` in `{text}` is not a unit: use K, M, G or T (binary: 1K is 1024 bytes)")]
    UnknownUnit {
        /// The whole text.
        text: String,
        /// The part behind the number.
        unit: String,
    },
    /// It is more than 64 bits can count.
    #[error("`{0}` is larger than any memory")]
    TooLarge(String),
}

/// Reads `512M`, `512MiB`, `1.5G`, `4096`; units are binary, case is ignored.
impl FromStr for Bytes {
    type Err = ParseBytesError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let trimmed = text.trim();
        let digits = trimmed.find(|c: char| !(c.is_ascii_digit() || c == '.')).unwrap_or(trimmed.len());
        let (number, unit) = trimmed.split_at(digits);
        let not_a_number = || ParseBytesError::NotANumber(text.to_owned());
        let size = match unit.trim().to_ascii_lowercase().as_str() {
            _ if number.is_empty() => return Err(not_a_number()),
            "" | "b" => 1,
            "k" | "kib" => KIB,
            "m" | "mib" => MIB,
            "g" | "gib" => GIB,
            "t" | "tib" => TIB,
            other => {
                return Err(ParseBytesError::UnknownUnit { text: text.to_owned(), unit: other.to_owned() });
            }
        };
        let too_large = || ParseBytesError::TooLarge(text.to_owned());
        if number.contains('.') {
            let value: f64 = number.parse().map_err(|_| not_a_number())?;
            let bytes = value * size as f64;
            // 2^64 is exact in an f64; at and above it the cast would saturate silently.
            if bytes >= u64::MAX as f64 {
                return Err(too_large());
            }
            return Ok(Self(bytes as u64));
        }
        let value: u64 = number.parse().map_err(|_| too_large())?;
        value.checked_mul(size).map(Self).ok_or_else(too_large)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn reads_and_prints_binary_units() {
        for (text, bytes) in [
            ("4096", Bytes(4096)),
            ("256M", Bytes::mib(256)),
            ("256 MiB", Bytes::mib(256)),
            ("1.5g", Bytes::mib(1536)),
            ("0", Bytes::ZERO),
        ] {
            assert_eq!(text.parse::<Bytes>(), Ok(bytes), "{text}");
        }
        assert_eq!(Bytes::mib(256).to_string(), "256 MiB");
        assert_eq!(Bytes::mib(1280).to_string(), "1.25 GiB");
        assert_eq!(Bytes::kib(300).to_string(), "300 KiB");
        assert_eq!(Bytes(7).to_string(), "7 B");
    }

    #[test]
    fn says_what_is_wrong_with_a_size() {
        for text in ["", "M", "-1M", "1..5M", "10X", "99999999T", "1e3"] {
            let error = text.parse::<Bytes>().expect_err(text).to_string();
            assert!(!error.is_empty());
        }
    }

    #[test]
    fn a_whole_number_is_read_however_it_is_written() {
        for (json, number) in
            [("7", 7), ("7.0", 7), ("7e2", 700), ("-0", 0), ("18446744073709551615", u64::MAX)]
        {
            assert_eq!(serde_json::from_str::<Bytes>(json).unwrap(), Bytes(number), "{json}");
        }
        for json in ["7.5", "-1", "-1.0", "18446744073709551616", "1e300", "\"7\"", "null", "true", "[7]"] {
            assert!(serde_json::from_str::<Bytes>(json).is_err(), "{json}");
        }
        let byte = |json| whole::<_, u8>(&mut serde_json::Deserializer::from_str(json));
        assert_eq!((byte("255.0").unwrap(), byte("256").is_err()), (255, true));
        let optional = |json| optional_whole::<_, u8>(&mut serde_json::Deserializer::from_str(json));
        assert_eq!((optional("null").unwrap(), optional("1").unwrap()), (None, Some(1)));
    }

    proptest! {
        #[test]
        fn whole_units_survive_print_and_read(n in 0u64..(1 << 20), shift in prop::sample::select(vec![0u32, 10, 20, 30])) {
            let bytes = Bytes(n << shift);
            let close = bytes.to_string().parse::<Bytes>().unwrap();
            prop_assert!(close.0.abs_diff(bytes.0) as f64 <= bytes.0 as f64 / 100.0);
        }

        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<Bytes>();
        }
    }
}
