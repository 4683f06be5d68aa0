//! The report: claims against figures, for the terminal and as one HTML page.

pub mod html;
pub mod plot;

use std::path::{Path, PathBuf};

use crate::claims::{Claim, Material, Outcome, claims};
use crate::figure::{Comparison, compare};
use crate::lab::Findings;
use crate::run::{Run, SCHEMA, cell};

/// Why a file of figures can't be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// It can't be read.
    #[error("cannot read {0}: {1}")]
    Read(PathBuf, std::io::Error),
    /// It holds something else.
    #[error(
        "{0} is neither what `ballast slat run --output` nor what `ballast slat lab --output` writes: {1}"
    )]
    Format(PathBuf, serde_json::Error),
    /// It is of another version.
    #[error("{0} is of version {1}, this ballast reads version {SCHEMA}: measure again")]
    Version(PathBuf, u64),
    /// It has no single run in it.
    #[error("{0} is of the lab; compare takes what `ballast slat run --output` writes")]
    NotARun(PathBuf),
}

/// A file of figures.
#[derive(Clone, Debug, PartialEq)]
pub enum Input {
    /// Of the lab.
    Lab(Box<Findings>),
    /// Of one host.
    Run(Box<Run>),
}

impl Input {
    /// Reads a file.
    ///
    /// # Errors
    /// Where it can't be read or is something else.
    pub fn read(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::Read(path.into(), e))?;
        let format = |e| Error::Format(path.into(), e);
        let value: serde_json::Value = serde_json::from_str(&text).map_err(format)?;
        let lab = value.get("counted");
        // Told before anything else: another version has other fields.
        let version = lab.and_then(|pair| pair.get("on")).unwrap_or(&value).get("schema");
        match version.and_then(serde_json::Value::as_u64) {
            Some(other) if other != u64::from(SCHEMA) => return Err(Error::Version(path.into(), other)),
            _ => {}
        }
        match lab {
            Some(_) => serde_json::from_value(value).map(Self::Lab).map_err(format),
            None => serde_json::from_value(value).map(Self::Run).map_err(format),
        }
    }

    /// Reads a file that must hold one host's run.
    ///
    /// # Errors
    /// As [`Self::read`], and where it is of the lab.
    pub fn read_run(path: &Path) -> Result<Run, Error> {
        match Self::read(path)? {
            Self::Run(run) => Ok(*run),
            Self::Lab(_) => Err(Error::NotARun(path.into())),
        }
    }
}

/// The last of each kind in a list of files.
pub fn material(inputs: &[Input]) -> Material<'_> {
    let mut material = Material::default();
    for input in inputs {
        match input {
            Input::Lab(lab) => material.lab = Some(lab),
            Input::Run(run) => material.here = Some(run),
        }
    }
    material
}

/// The verdict in words.
pub fn verdict(claims: &[Claim]) -> String {
    let list = |outcome| {
        let ids: Vec<_> = claims.iter().filter(|c| c.outcome == outcome).map(|c| c.id).collect();
        (!ids.is_empty()).then(|| format!("{}: {}", Outcome::name(outcome), ids.join(", ")))
    };
    let order = [Outcome::Holds, Outcome::Partly, Outcome::Fails, Outcome::Model, Outcome::NotMeasured];
    let parts: Vec<_> = order.into_iter().filter_map(list).collect();
    let text = format!("{}.", parts.join("; "));
    let first = text.chars().next().map(|c| c.to_uppercase().to_string()).unwrap_or_default();
    first + text.get(1..).unwrap_or_default()
}

/// The claims for the terminal.
pub fn text(material: Material<'_>) -> String {
    let claims = claims(material);
    let mut text = String::new();
    for claim in &claims {
        text += &format!("{:<4} {} [{}]\n", claim.id, claim.claim, claim.outcome.name());
        if !claim.measured.is_empty() {
            text += &format!("     {}\n", claim.measured);
        }
        if claim.outcome != Outcome::Holds {
            text += &format!("     Needs: {}.\n", claim.needs);
        }
    }
    text + "\n" + &verdict(&claims) + "\n"
}

/// Rows that set two runs side by side: setup, exits of both, time of both, what the difference is.
pub fn side_by_side(first: &Run, second: &Run) -> Vec<[String; 6]> {
    let refused = first.refusal().or(second.refusal()).is_some();
    let row = |a: &crate::run::Measurement| {
        let b = second.find(&a.setup)?;
        let words = match compare(&a.time, &b.time) {
            Comparison::NotAvailable => String::new(),
            Comparison::NoDifference => "no difference".into(),
            _ if refused && a.setup.place != crate::payload::Place::Native => "no verdict".into(),
            Comparison::Times(n) if n > 1.0 => format!("{n:.2} times slower"),
            Comparison::Times(n) => format!("{:.2} times faster", 1.0 / n),
            Comparison::FromZero | Comparison::Larger => "slower".into(),
            Comparison::Smaller => "faster".into(),
        };
        Some([a.setup.describe(), cell(&a.exits), cell(&b.exits), cell(&a.time), cell(&b.time), words])
    };
    first.measurements.iter().filter_map(row).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_that_hold_something_else_are_named() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("x.json");
        assert!(matches!(Input::read(&path), Err(Error::Read(..))));
        for text in ["", "{}", "[1]", "{\"schema\": 3}", "{\"counted\": {\"on\": {\"schema\": 3}}}"] {
            std::fs::write(&path, text).expect("written");
            assert!(matches!(Input::read(&path), Err(Error::Format(..))), "{text}");
        }
        for text in ["{\"schema\": 1}", "{\"counted\": {\"on\": {\"schema\": 2}}}"] {
            std::fs::write(&path, text).expect("written");
            assert!(matches!(Input::read(&path), Err(Error::Version(..))), "{text}");
        }
    }

    #[test]
    fn every_claim_is_told() {
        let text = text(Material::default());
        for id in ["C1", "C2", "C3", "C4", "C5", "C6", "C7", "C8", "C9", "C10", "C11", "D1", "D2"] {
            assert!(text.contains(&format!("{id} ")), "{id}");
        }
        assert!(text.contains("not measured here: C1"));
    }
}
