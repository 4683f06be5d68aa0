//! The columns of the table: title, text, and order.

use std::cmp::Ordering;

use api::units::Bytes;

use super::snapshot::{Memory, Vm};
use crate::memory::host_rss;

/// What a column tells of a VM.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
pub enum Column {
    /// Its name
    Name,
    /// How it does
    #[value(name = "state")]
    Condition,
    /// What its guest uses
    Used,
    /// What its guest has
    Actual,
    /// What its guest is asked to have
    Target,
    /// The most that it may have
    Max,
    /// What the host holds for it
    Host,
    /// Its use with its buffer
    Wants,
    /// What it is entitled to
    MayHave,
    /// The least that it may have
    Min,
    /// Its share when memory is short
    Weight,
    /// How old its guest's report is
    Report,
    /// The share in huge pages of what the host holds
    Huge,
}

impl Column {
    /// All, those first that are shown first.
    pub const ALL: [Self; 13] = [
        Self::Name,
        Self::Condition,
        Self::Used,
        Self::Actual,
        Self::Target,
        Self::Max,
        Self::Host,
        Self::Wants,
        Self::MayHave,
        Self::Min,
        Self::Weight,
        Self::Report,
        Self::Huge,
    ];

    /// What stands above it.
    pub const fn title(self) -> &'static str {
        match self {
            Self::Name => "NAME",
            Self::Condition => "STATE",
            Self::Used => "USED",
            Self::Actual => "ACTUAL",
            Self::Target => "TARGET",
            Self::Max => "MAX",
            Self::Host => "HOST",
            Self::Wants => "WANTS",
            Self::MayHave => "MAY HAVE",
            Self::Min => "MIN",
            Self::Weight => "WEIGHT",
            Self::Report => "REPORT",
            Self::Huge => "HUGE",
        }
    }

    /// How wide it is, in cells.
    pub const fn width(self) -> usize {
        match self {
            Self::Name => 14,
            Self::Condition => 13,
            Self::Weight | Self::Report => 6,
            Self::Huge => 5,
            _ => 8,
        }
    }

    /// Whether its text begins at the left.
    pub const fn is_words(self) -> bool {
        matches!(self, Self::Name | Self::Condition)
    }

    /// What it says of `vm`.
    pub fn text(self, vm: &Vm) -> String {
        match (self, &vm.memory) {
            (Self::Name, _) => vm.name.clone(),
            (Self::Condition, _) => vm.condition.to_string(),
            (Self::Weight, Some(memory)) => memory.limits.weight().to_string(),
            (Self::Report, Some(Memory { report_age_ms: Some(age), .. })) => {
                format!("{:.1} s", *age as f64 / 1000.0)
            }
            (Self::Huge, Some(Memory { huge_percent: Some(percent), .. })) => format!("{percent}%"),
            (Self::Host, Some(memory)) => host_rss(memory.host_rss),
            (_, Some(memory)) => {
                self.amount(memory).map_or_else(|| "-".to_owned(), |amount| amount.to_string())
            }
            (_, None) => "-".to_owned(),
        }
    }

    fn amount(self, memory: &Memory) -> Option<Bytes> {
        match self {
            Self::Used => memory.used,
            Self::Actual => Some(memory.actual),
            Self::Target => Some(memory.target),
            Self::Max => Some(memory.limits.max()),
            Self::Min => Some(memory.limits.min()),
            Self::Host => memory.host_rss,
            Self::Wants => memory.demand,
            Self::MayHave => memory.entitlement,
            Self::Name | Self::Condition | Self::Weight | Self::Report | Self::Huge => None,
        }
    }

    /// The order of the table by this column: words by the alphabet with trouble before all
    /// else, numbers with the largest first; equals by their names.
    pub fn compare(self, a: &Vm, b: &Vm) -> Ordering {
        let number = |vm: &Vm| match self {
            Self::Weight => vm.memory.map(|memory| u64::from(memory.limits.weight())),
            Self::Report => vm.memory.and_then(|memory| memory.report_age_ms),
            Self::Huge => vm.memory.and_then(|memory| memory.huge_percent).map(u64::from),
            _ => vm.memory.and_then(|memory| self.amount(&memory)).map(|amount| amount.0),
        };
        let order = match self {
            Self::Name => Ordering::Equal,
            Self::Condition => b
                .condition
                .is_trouble()
                .cmp(&a.condition.is_trouble())
                .then_with(|| a.condition.to_string().cmp(&b.condition.to_string())),
            _ => number(b).cmp(&number(a)),
        };
        order.then_with(|| a.name.cmp(&b.name))
    }
}
