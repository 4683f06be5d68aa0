//! What claims are held against.

use super::{Found, Outcome};
use crate::lab::{Findings, Vendor};
use crate::run::Run;

/// Everything a report is made of.
#[derive(Clone, Copy, Debug, Default)]
pub struct Material<'a> {
    /// A run on a host.
    pub here: Option<&'a Run>,
    /// SLAT on and off in the lab's AMD hosts.
    pub amd: Option<&'a Findings>,
    /// SLAT on and off in the lab's Intel hosts.
    pub intel: Option<&'a Findings>,
}

impl<'a> Material<'a> {
    /// What there is of the lab, with whose hosts they are.
    pub fn labs(self) -> impl Iterator<Item = (Vendor, &'a Findings)> {
        [(Vendor::Amd, self.amd), (Vendor::Intel, self.intel)]
            .into_iter()
            .filter_map(|(vendor, lab)| Some((vendor, lab?)))
    }

    /// What the lab found, by both vendors where both were there: a claim must hold on each.
    pub(super) fn of_lab(self, find: impl Fn(&Findings) -> Option<Found>) -> Option<Found> {
        let found: Vec<_> = self.labs().filter_map(|(vendor, lab)| Some((vendor, find(lab)?))).collect();
        let (_, (first, _)) = found.first()?;
        let told = found.iter().filter(|(_, (outcome, _))| *outcome != Outcome::NotMeasured);
        let mut outcomes = told.map(|(_, (outcome, _))| *outcome);
        let outcome = outcomes.next().map_or(*first, |first| {
            if outcomes.all(|other| other == first) { first } else { Outcome::Partly }
        });
        let texts: Vec<_> = found
            .iter()
            .map(|(vendor, (_, text))| format!("{} ({}): {text}", vendor.name(), slat_of(*vendor)))
            .collect();
        Some((outcome, texts.join(" ")))
    }
}

/// What a vendor calls it.
pub const fn slat_of(vendor: Vendor) -> &'static str {
    match vendor {
        Vendor::Amd => "NPT",
        Vendor::Intel => "EPT",
    }
}
