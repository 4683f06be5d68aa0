//! Numbers that say how far they can be trusted.

use serde::{Deserialize, Serialize};

/// How far a figure can be trusted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Quality {
    /// A count: the same each time.
    Exact,
    /// Time on hardware that runs the code itself.
    RealTime,
    /// Time under an emulator: which is larger may hold, by how much does not.
    DirectionOnly,
    /// It could not be had here.
    NotAvailable,
}

impl Quality {
    /// The words for it in tables.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Exact => "exact",
            Self::RealTime => "real time",
            Self::DirectionOnly => "direction only",
            Self::NotAvailable => "not available",
        }
    }
}

/// The middle of some samples, and how far they lie apart.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The median.
    pub median: f64,
    /// The smallest sample.
    pub low: f64,
    /// The largest sample.
    pub high: f64,
    /// How many samples there were.
    pub samples: usize,
}

impl Spread {
    /// The spread of `samples`; nothing where there are none or one is not a number.
    pub fn of(samples: &[f64]) -> Option<Self> {
        let mut sorted = samples.to_vec();
        if sorted.iter().any(|s| !s.is_finite()) {
            return None;
        }
        sorted.sort_by(f64::total_cmp);
        let (low, high) = (*sorted.first()?, *sorted.last()?);
        let middle = sorted.len() / 2;
        let upper = *sorted.get(middle)?;
        let median = match sorted.get(middle.wrapping_sub(1)) {
            Some(lower) if sorted.len().is_multiple_of(2) => f64::midpoint(*lower, upper),
            _ => upper,
        };
        Some(Self { median, low, high, samples: sorted.len() })
    }

    /// Whether some value lies in both: then the data show no difference.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.low <= other.high && other.low <= self.high
    }
}

/// One number of a report.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Figure {
    /// How far it can be trusted.
    pub quality: Quality,
    /// The number; nothing where it is not available.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub value: Option<Spread>,
    /// Why it is not available, or only a direction.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub why: Option<String>,
}

impl Figure {
    /// A figure from its samples.
    pub fn new(quality: Quality, samples: &[f64]) -> Self {
        match Spread::of(samples) {
            Some(value) => Self { quality, value: Some(value), why: None },
            None => Self::not_available("no sample was taken"),
        }
    }

    /// A figure that could not be had, and why.
    pub fn not_available(why: impl Into<String>) -> Self {
        Self { quality: Quality::NotAvailable, value: None, why: Some(why.into()) }
    }

    /// The median, where there is one.
    pub fn median(&self) -> Option<f64> {
        self.value.map(|v| v.median)
    }
}

/// What two figures say about each other.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Comparison {
    /// Their samples overlap.
    NoDifference,
    /// The second is this many times the first.
    Times(f64),
    /// The first is zero and the second is not: no factor says that.
    FromZero,
    /// Times under an emulator: only which one is larger.
    Larger,
    /// Times under an emulator: only which one is smaller.
    Smaller,
    /// One of them is missing.
    NotAvailable,
}

/// Compares `second` with `first`; never gives a factor from emulated time.
pub fn compare(first: &Figure, second: &Figure) -> Comparison {
    let (Some(a), Some(b)) = (first.value, second.value) else {
        return Comparison::NotAvailable;
    };
    if a.overlaps(&b) {
        return Comparison::NoDifference;
    }
    if [first.quality, second.quality].contains(&Quality::DirectionOnly) {
        return if b.median > a.median { Comparison::Larger } else { Comparison::Smaller };
    }
    if a.median == 0.0 { Comparison::FromZero } else { Comparison::Times(b.median / a.median) }
}

/// A number in three significant digits or so: `0`, `2.006`, `13.4`, `1260`.
pub fn short(value: f64) -> String {
    let digits = match value.abs() {
        v if v == v.trunc() || v >= 1000.0 => 0,
        v if v >= 100.0 => 1,
        v if v >= 10.0 => 2,
        v if v >= 0.001 => 3,
        _ => 6,
    };
    format!("{value:.digits$}")
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn median_of_odd_even_none_and_nan() {
        assert_eq!(Spread::of(&[3.0, 1.0, 2.0]).map(|s| s.median), Some(2.0));
        assert_eq!(Spread::of(&[4.0, 1.0, 2.0, 3.0]).map(|s| s.median), Some(2.5));
        assert_eq!(Spread::of(&[7.0]).map(|s| (s.low, s.median, s.high)), Some((7.0, 7.0, 7.0)));
        assert_eq!(Spread::of(&[]), None);
        assert_eq!(Spread::of(&[1.0, f64::NAN]), None);
    }

    #[test]
    fn compares_only_what_can_be_compared() {
        let exact = |v: f64| Figure::new(Quality::Exact, &[v]);
        let emulated = |v: f64| Figure::new(Quality::DirectionOnly, &[v]);
        assert_eq!(compare(&exact(0.0), &exact(1.0)), Comparison::FromZero);
        assert_eq!(compare(&exact(2.0), &exact(1.0)), Comparison::Times(0.5));
        assert_eq!(compare(&exact(1.0), &exact(1.0)), Comparison::NoDifference);
        assert_eq!(compare(&emulated(1.0), &emulated(9.0)), Comparison::Larger);
        assert_eq!(compare(&exact(1.0), &Figure::not_available("x")), Comparison::NotAvailable);
        let wide = Figure::new(Quality::RealTime, &[1.0, 5.0]);
        let inside = Figure::new(Quality::RealTime, &[3.0, 9.0]);
        assert_eq!(compare(&wide, &inside), Comparison::NoDifference);
    }

    #[test]
    fn short_numbers() {
        for (value, text) in [(0.0, "0"), (1.0, "1"), (2.005859, "2.006"), (0.125, "0.125"), (1260.4, "1260")]
        {
            assert_eq!(short(value), text);
        }
    }

    proptest! {
        #[test]
        fn a_median_lies_between_its_ends(samples in proptest::collection::vec(-1e9..1e9f64, 1..40)) {
            let spread = Spread::of(&samples).expect("samples are numbers");
            prop_assert!(spread.low <= spread.median && spread.median <= spread.high);
            prop_assert!(spread.overlaps(&spread));
        }
    }
}
