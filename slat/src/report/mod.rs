//! The report: claims against figures, for the terminal and as one HTML page.

pub mod html;
pub mod plot;

use std::path::{Path, PathBuf};

use serde::Serialize;

use crate::claims::{Claim, Material, Outcome, claims};
use crate::figure::{Comparison, Figure, compare};
use crate::host::Fingerprint;
use crate::lab::{Findings, Vendor};
use crate::payload::{Place, Setup};
use crate::probe::Verdict;
use crate::run::{Clock, Measurement, Run, SCHEMA, cell};

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

/// The last of each kind in a list of files: of a host, and of the lab's by each vendor.
pub fn material(inputs: &[Input]) -> Material<'_> {
    let mut material = Material::default();
    for input in inputs {
        match input {
            Input::Lab(lab) => match lab.vendor() {
                Vendor::Amd => material.amd = Some(lab),
                Vendor::Intel => material.intel = Some(lab),
            },
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

/// What a reader must know before believing any of it: parts that are missing, and counts that differ.
pub fn cautions(material: Material<'_>) -> Vec<String> {
    let mut all = Vec::new();
    for (vendor, lab) in material.labs() {
        let mut found: Vec<String> = lab.difference.iter().cloned().chain(lab.mixed()).collect();
        found.extend(lab.interrupted.then(|| "the lab was stopped before its end".into()));
        found.extend(lab.failures().map(|why| format!("missing from the lab: {why}")));
        all.extend(found.into_iter().map(|what| format!("{}: {what}", vendor.name())));
    }
    if let Some(here) = material.here {
        all.extend(here.interrupted.then(|| "the run on this host was stopped before its end".into()));
        all.extend(here.linux_failure.iter().map(|why| format!("missing from the run: {why}")));
    }
    all
}

/// Everything that the terminal is told, for programs.
#[derive(Debug, Serialize)]
pub struct Told {
    /// What must be known before believing any of it.
    pub cautions: Vec<String>,
    /// In one sentence.
    pub verdict: String,
    /// Each claim.
    pub claims: Vec<Claim>,
}

/// The claims for programs.
pub fn told(material: Material<'_>) -> Told {
    let claims = claims(material);
    Told { cautions: cautions(material), verdict: verdict(&claims), claims }
}

/// The claims for the terminal.
pub fn text(material: Material<'_>) -> String {
    let claims = claims(material);
    let mut text: String = cautions(material).iter().map(|caution| format!("Beware: {caution}\n")).collect();
    if !text.is_empty() {
        text.push('\n');
    }
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

/// One of two runs.
#[derive(Clone, Copy, Debug, Serialize)]
pub struct Side<'a> {
    /// The host.
    pub host: &'a Fingerprint,
    /// How a guest behaves on it.
    pub slat: Verdict,
    /// What its clock counts.
    pub clock: Clock,
    /// Why its times give no verdict.
    pub refusal: Option<&'static str>,
    /// Whether it was stopped before its end.
    pub interrupted: bool,
}

impl<'a> Side<'a> {
    fn of(run: &'a Run) -> Self {
        Self {
            host: &run.fingerprint,
            slat: run.probe.verdict,
            clock: run.clock,
            refusal: run.refusal(),
            interrupted: run.interrupted,
        }
    }
}

/// A setup that both runs have.
#[derive(Clone, Debug, Serialize)]
pub struct Row<'a> {
    /// In words.
    pub payload: String,
    /// The setup.
    pub setup: &'a Setup,
    /// Exits an operation in the first and the second.
    pub exits: [&'a Figure; 2],
    /// Time of an operation in the first and the second.
    pub time: [&'a Figure; 2],
    /// What the second's time is to the first's, in words; empty where one is missing.
    pub second_is: String,
}

impl Row<'_> {
    /// Cells of a table: payload, exits of both, time of both, what the difference is.
    pub fn cells(&self) -> [String; 6] {
        let ([a, b], [c, d]) = (self.exits, self.time);
        [self.payload.clone(), cell(a), cell(b), cell(c), cell(d), self.second_is.clone()]
    }
}

/// Two runs beside each other.
#[derive(Clone, Debug, Serialize)]
pub struct SideBySide<'a> {
    /// The first.
    pub first: Side<'a>,
    /// The second.
    pub second: Side<'a>,
    /// What both measured.
    pub rows: Vec<Row<'a>>,
}

impl SideBySide<'_> {
    /// Cells of a table.
    pub fn cells(&self) -> Vec<[String; 6]> {
        self.rows.iter().map(Row::cells).collect()
    }
}

/// Sets two runs side by side.
pub fn side_by_side<'a>(first: &'a Run, second: &'a Run) -> SideBySide<'a> {
    let refused = first.refusal().or(second.refusal()).is_some();
    let row = |a: &'a Measurement| {
        let b = second.find(&a.setup)?;
        let words = words(a, b, refused);
        Some(Row {
            payload: a.setup.describe(),
            setup: &a.setup,
            exits: [&a.exits, &b.exits],
            time: [&a.time, &b.time],
            second_is: words,
        })
    };
    let rows = first.measurements.iter().filter_map(row).collect();
    SideBySide { first: Side::of(first), second: Side::of(second), rows }
}

/// What the second's time is to the first's; empty where one is missing.
fn words(a: &Measurement, b: &Measurement, refused: bool) -> String {
    match compare(&a.time, &b.time) {
        Comparison::NotAvailable => String::new(),
        Comparison::NoDifference => "no difference".into(),
        _ if refused && a.setup.place != Place::Native => "no verdict".into(),
        Comparison::Times(n) if n > 1.0 => format!("{n:.2} times slower"),
        Comparison::Times(n) => format!("{:.2} times faster", 1.0 / n),
        Comparison::FromZero | Comparison::Larger => "slower".into(),
        Comparison::Smaller => "faster".into(),
    }
}

/// What one of several hosts measured of a setup.
#[derive(Clone, Debug, Serialize)]
pub struct Of<'a> {
    /// Whose: its place in [`Hosts::hosts`].
    pub host: usize,
    /// Exits an operation.
    pub exits: &'a Figure,
    /// Time of an operation.
    pub time: &'a Figure,
    /// What its time is to the first host's, in words; empty where one is missing.
    pub is: String,
}

/// A setup that several hosts have.
#[derive(Clone, Debug, Serialize)]
pub struct Shared<'a> {
    /// In words.
    pub payload: String,
    /// The setup.
    pub setup: &'a Setup,
    /// What each has, in their order.
    pub of: Vec<Of<'a>>,
}

/// Any number of hosts beside each other.
#[derive(Clone, Debug, Serialize)]
pub struct Hosts<'a> {
    /// Them.
    pub hosts: Vec<Side<'a>>,
    /// What the first and at least one other measured.
    pub rows: Vec<Shared<'a>>,
}

impl Hosts<'_> {
    /// Cells of a table, a line for each host's figure: payload, host counted from 1, exits, time, what it is.
    pub fn cells(&self) -> Vec<[String; 5]> {
        let line = |row: &Shared, of: &Of| {
            let payload = if of.host == 0 { row.payload.clone() } else { String::new() };
            [payload, (of.host + 1).to_string(), cell(of.exits), cell(of.time), of.is.clone()]
        };
        self.rows.iter().flat_map(|row| row.of.iter().map(move |of| line(row, of))).collect()
    }
}

/// Sets any number of runs beside the first.
pub fn hosts<'a>(runs: &'a [Run]) -> Hosts<'a> {
    let row = |first: &'a Run, a: &'a Measurement| {
        let each = runs.iter().enumerate().filter_map(|(host, run)| {
            let b = run.find(&a.setup)?;
            let refused = first.refusal().or(run.refusal()).is_some();
            let is = if host == 0 { String::new() } else { words(a, b, refused) };
            Some(Of { host, exits: &b.exits, time: &b.time, is })
        });
        let of: Vec<_> = each.collect();
        (of.len() > 1).then(|| Shared { payload: a.setup.describe(), setup: &a.setup, of })
    };
    let first = runs.first();
    let rows =
        first.into_iter().flat_map(|first| first.measurements.iter().filter_map(move |a| row(first, a)));
    Hosts { hosts: runs.iter().map(Side::of).collect(), rows: rows.collect() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::lab::Pair;
    use crate::payload::Payload;
    use crate::run::Plan;
    use std::sync::atomic::AtomicBool;
    use std::time::Duration;

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
        assert!(!text.contains("Beware"), "{text}");
    }

    fn run_of(setups: Vec<Setup>) -> Run {
        let limit = Duration::from_secs(1);
        let plan = Plan { setups, passes: 1, rounds: 1, limit, clock: Clock::Instructions, reasons: false };
        let mut run = crate::run::run(&plan, &AtomicBool::new(true), |_, _| {});
        run.interrupted = false;
        run
    }

    #[test]
    fn what_is_missing_or_differs_is_said_before_the_claims() {
        let run = run_of(Vec::new());
        let mut lab = Findings::of(Pair { on: run.clone(), off: run.clone() });
        let of = |lab: &Findings| text(Material { amd: Some(lab), ..Material::default() });
        assert!(!of(&lab).contains("Beware"), "{}", of(&lab));
        lab.difference = Some("two runs differ".into());
        lab.interrupted = true;
        lab.missing.push("density: it stood still".into());
        lab.counted.off.linux_failure = Some("the guest died".into());
        lab.counted.off.fingerprint.kernel = "0.1".into();
        let here = Run { interrupted: true, ..run };
        let material = Material { here: Some(&here), amd: Some(&lab), intel: None };
        let (text, told) = (text(material), told(material));
        let claims = text.find("C1 ").expect("the claims");
        for word in ["two runs differ", "stopped before its end", "stood still", "guest died", "Linux 0.1"] {
            assert!(text.find(word).is_some_and(|at| at < claims), "{word}: {text}");
            assert!(told.cautions.iter().any(|caution| caution.contains(word)), "{told:?}");
        }
        assert_eq!(told.cautions.len(), 6, "{told:?}");
    }

    #[test]
    fn two_runs_side_by_side_say_whose_they_are() {
        let setup = Setup::usual(Payload::Chase).at(Place::Ring3);
        let (first, second) = (run_of(vec![setup.clone()]), run_of(vec![setup]));
        let sides = serde_json::to_value(side_by_side(&first, &second)).expect("JSON");
        assert_eq!(sides["first"]["host"]["kernel"], first.fingerprint.kernel);
        assert!(sides["second"]["refusal"].is_string(), "{sides:#}");
        assert_eq!(sides["rows"][0]["setup"]["payload"], "chase");
        assert_eq!(sides["rows"][0]["time"][1]["quality"], "not-available");
    }

    #[test]
    fn any_number_of_hosts_stand_beside_the_first() {
        let [one, other] = [Payload::Chase, Payload::WarmTouch].map(|p| Setup::usual(p).at(Place::Ring3));
        let both = run_of(vec![one.clone(), other.clone()]);
        let runs = [both.clone(), run_of(vec![other.clone()]), both];
        let beside = hosts(&runs);
        assert_eq!(beside.hosts.len(), 3);
        let of = |setup: &Setup| {
            let row = beside.rows.iter().find(|row| row.setup == setup).expect("two have it");
            row.of.iter().map(|of| of.host).collect::<Vec<_>>()
        };
        assert_eq!((of(&one), of(&other)), (vec![0, 2], vec![0, 1, 2]));
        let cells = beside.cells();
        assert_eq!(cells.iter().map(|line| line[1].as_str()).collect::<Vec<_>>(), ["1", "3", "1", "2", "3"]);
        assert!(hosts(&runs[..1]).rows.is_empty(), "there is nothing beside it");
    }
}
