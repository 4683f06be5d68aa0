//! Demand from files: our own recordings, and two published formats.
//!
//! | format | told by | what is read |
//! |---|---|---|
//! | own JSON | `.json` | [`Trace`] |
//! | own CSV | `.csv` that begins with [`OWN_HEADER`] | a line a second and VM; columns behind those are for other readers |
//! | Bitbrains GWA-T-12 | a directory, or `.csv` with `;` | one file a VM: `Timestamp [ms]` (in truth seconds in some files), `Memory capacity provisioned [KB]`, `Memory usage [KB]` |
//! | Google 2019 | `.jsonl`, InstanceUsage as BigQuery exports it | `start_time`, `end_time` (microseconds), `collection_id`, `instance_index`, `average_usage.memory`, `maximum_usage.memory`, `assigned_memory` |
//!
//! The published traces have a sample every five minutes. In between, demand is a line: they test the balance
//! over hours, not the reaction to a burst.
//!
//! Files are untrusted input: sizes are bounded, and errors name file and line.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use api::limits::Limits;
use api::units::Bytes;
use serde::Deserialize;

use super::trace::{Series, Trace};
use super::world::WARM_UP;

/// How the first line of a recording in CSV begins. Amounts are bytes; `used` is without caches; unknown
/// `cache` and `committed` are 0.
pub const OWN_HEADER: &str = "second,vm,min,max,used,cache,committed";

/// The largest file that is read.
pub const LARGEST_FILE: Bytes = Bytes::gib(1);

/// The most VMs in a trace.
pub const MOST_VMS: usize = 10_000;

/// The longest trace that is played, in seconds: a month.
pub const LONGEST: u64 = 31 * 86_400;

/// The most samples of all VMs together.
const MOST_SAMPLES: u64 = 200_000_000;

/// The largest number that anything in a trace may be: a pebibyte, or the year 37,000 in milliseconds.
const MOST: f64 = (1u64 << 50) as f64;

/// The machine that Google's 1.0 stands for. This is a guess, as it was not published.
const GOOGLE_MACHINE: Bytes = Bytes::gib(256);

/// Committed memory in percent of use, if a trace does not tell.
const COMMIT_PERCENT: u64 = 125;

/// The most that this may be.
const MOST_COMMITTED: u64 = 1000;

/// How much of a trace is wanted: published ones hold a month of thousands of VMs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Part {
    /// The first so many VMs, by name.
    pub vms: usize,
    /// The first so many seconds.
    pub seconds: u64,
}

impl Part {
    /// As much as can be played.
    pub const WHOLE: Self = Self { vms: MOST_VMS, seconds: LONGEST };
}

/// Why a trace can't be read.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// Not there, or not readable.
    #[error("can't read {path}: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
    },
    /// Too large.
    #[error("{path} is larger than {LARGEST_FILE}: cut it into parts")]
    TooLarge {
        /// Which file.
        path: PathBuf,
    },
    /// A line that makes no sense.
    #[error("{path}, line {line}: {what}")]
    Line {
        /// Which file.
        path: PathBuf,
        /// Which line, from 1.
        line: usize,
        /// What is wrong.
        what: String,
    },
    /// A file that makes no sense.
    #[error("{path}: {what}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
}

/// What was seen of one VM: size, least size, and (second, used, cache, committed).
#[derive(Default)]
struct Recording {
    max: Bytes,
    min: Option<Bytes>,
    samples: Vec<(u64, Bytes, Bytes, Bytes)>,
}

impl Recording {
    /// Drops later samples but one, towards which demand goes. False if the VM was not there yet.
    fn keep_until(&mut self, last: u64) -> bool {
        self.samples.sort_unstable();
        let before = self.samples.partition_point(|sample| sample.0 <= last);
        self.samples.truncate(before + 1);
        before > 0
    }
}

type Found = BTreeMap<String, Recording>;

/// Reads a part of a trace. The name and the first line tell the format.
///
/// # Errors
/// [`TraceError`] names the file, the line and what is wrong with it.
pub fn read(path: &Path, part: Part) -> Result<Trace, TraceError> {
    let mut found = Found::new();
    if path.is_dir() {
        let entries = fs::read_dir(path).map_err(|source| TraceError::Read { path: path.into(), source })?;
        let mut files: Vec<PathBuf> = entries.filter_map(|entry| Some(entry.ok()?.path())).collect();
        files.retain(|file| file.extension().is_some_and(|extension| extension == "csv"));
        files.sort();
        for file in files.iter().take(part.vms) {
            bitbrains(file, &text(file)?, &mut found)?;
        }
        return finish(path, found, part);
    }
    let content = text(path)?;
    let extension = path.extension().and_then(|extension| extension.to_str()).unwrap_or_default();
    match extension {
        "json" => return own_json(path, &content, part),
        "jsonl" => google(path, &content, &mut found)?,
        _ if content.starts_with(OWN_HEADER) => own_csv(path, &content, &mut found)?,
        _ if content.lines().next().is_some_and(|line| line.contains(';')) => {
            bitbrains(path, &content, &mut found)?
        }
        _ => {
            let what = format!(
                "no format that is known: a recording begins with `{OWN_HEADER}`, Bitbrains' files have columns \
                 separated by `;`, Google's end in .jsonl"
            );
            return Err(TraceError::Content { path: path.into(), what });
        }
    }
    finish(path, found, part)
}

fn text(path: &Path) -> Result<String, TraceError> {
    let read = |source| TraceError::Read { path: path.into(), source };
    if fs::metadata(path).map_err(read)?.len() > LARGEST_FILE.0 {
        return Err(TraceError::TooLarge { path: path.into() });
    }
    fs::read_to_string(path).map_err(read)
}

fn own_json(path: &Path, content: &str, part: Part) -> Result<Trace, TraceError> {
    let mut trace: Trace = serde_json::from_str(content).map_err(|error| TraceError::Content {
        path: path.into(),
        what: format!("not a recording: {error}"),
    })?;
    let samples: u64 = trace.vms.iter().map(|vm| vm.demand.len() as u64).sum();
    if trace.vms.is_empty() || trace.vms.len() > MOST_VMS || trace.seconds > LONGEST || samples > MOST_SAMPLES
    {
        let what = format!("{} VMs over {} s are none or too many", trace.vms.len(), trace.seconds);
        return Err(TraceError::Content { path: path.into(), what });
    }
    let is_too_much = |bytes: &Bytes| bytes.0 as f64 > MOST;
    if let Some(vm) = trace.vms.iter().find(|vm| vm.demand.iter().chain([&vm.cache]).any(is_too_much)) {
        return Err(TraceError::Content {
            path: path.into(),
            what: format!("{} uses more than any memory", vm.name),
        });
    }
    if let Some(vm) = trace.vms.iter().find(|vm| vm.commit_percent > MOST_COMMITTED) {
        let what = format!("commit_percent of {} is out of range: 0 to {MOST_COMMITTED}", vm.name);
        return Err(TraceError::Content { path: path.into(), what });
    }
    trace.vms.truncate(part.vms);
    trace.seconds = trace.seconds.min(part.seconds);
    Ok(trace)
}

fn number(path: &Path, line: usize, name: &str, text: &str) -> Result<f64, TraceError> {
    let value: Option<f64> = text.trim().parse().ok();
    value.filter(|value| (0.0..=MOST).contains(value)).ok_or_else(|| TraceError::Line {
        path: path.into(),
        line,
        what: format!("`{}` is not a number for {name}, or too large for it", text.trim()),
    })
}

fn own_csv(path: &Path, content: &str, found: &mut Found) -> Result<(), TraceError> {
    for (index, row) in content.lines().enumerate().skip(1).filter(|(_, row)| !row.trim().is_empty()) {
        let line = index + 1;
        let fields: Vec<&str> = row.split(',').collect();
        let [second, vm, min, max, used, cache, committed, ..] = fields[..] else {
            let what = format!("{} columns instead of those of `{OWN_HEADER}`", fields.len());
            return Err(TraceError::Line { path: path.into(), line, what });
        };
        let amount = |name, text| number(path, line, name, text).map(|value| Bytes(value as u64));
        let seen = found.entry(vm.trim().to_owned()).or_default();
        seen.min = Some(amount("min", min)?);
        seen.max = seen.max.max(amount("max", max)?);
        let second = number(path, line, "second", second)? as u64;
        seen.samples.push((
            second,
            amount("used", used)?,
            amount("cache", cache)?,
            amount("committed", committed)?,
        ));
    }
    Ok(())
}

fn bitbrains(path: &Path, content: &str, found: &mut Found) -> Result<(), TraceError> {
    let name = path.file_stem().and_then(|stem| stem.to_str()).unwrap_or("vm").to_owned();
    let mut rows = content.lines().enumerate();
    let header = rows.next().map(|(_, header)| header).unwrap_or_default();
    let columns: Vec<String> =
        header.split(';').map(|column| column.trim().trim_matches('"').to_ascii_lowercase()).collect();
    let column = |start: &str| columns.iter().position(|column| column.starts_with(start));
    let (Some(time), Some(size), Some(usage)) =
        (column("timestamp"), column("memory capacity provisioned"), column("memory usage"))
    else {
        let what =
            "no columns `Timestamp`, `Memory capacity provisioned [KB]` and `Memory usage [KB]`".to_owned();
        return Err(TraceError::Line { path: path.into(), line: 1, what });
    };
    let seen = found.entry(name).or_default();
    for (index, row) in rows.filter(|(_, row)| !row.trim().is_empty()) {
        let fields: Vec<&str> = row.split(';').collect();
        let field =
            |at: usize, name| number(path, index + 1, name, fields.get(at).copied().unwrap_or_default());
        let time = field(time, "Timestamp")?;
        // Seconds since 1970 lie below 1e11, milliseconds above.
        let second = if time > 1e11 { time / 1000.0 } else { time } as u64;
        let amount = |at, name| {
            let kib = field(at, name)?;
            let bytes = Some(kib * 1024.0).filter(|bytes| *bytes <= MOST);
            bytes.map(|bytes| Bytes(bytes as u64)).ok_or_else(|| TraceError::Line {
                path: path.into(),
                line: index + 1,
                what: format!("`{kib}` KB are too many for {name}"),
            })
        };
        seen.max = seen.max.max(amount(size, "Memory capacity provisioned")?);
        let used = amount(usage, "Memory usage")?;
        seen.samples.push((second, used, Bytes::ZERO, Bytes::ZERO));
    }
    Ok(())
}

/// A number, which BigQuery writes as text if it has 64 bits.
#[derive(Deserialize)]
#[serde(untagged)]
enum Number {
    Plain(f64),
    Text(String),
}

impl Number {
    fn value(&self) -> Option<f64> {
        match self {
            Self::Plain(value) => Some(*value),
            Self::Text(text) => text.parse().ok(),
        }
    }
}

#[derive(Deserialize)]
struct Usage {
    memory: Option<Number>,
}

#[derive(Deserialize)]
struct InstanceUsage {
    start_time: Number,
    end_time: Number,
    collection_id: Number,
    instance_index: Number,
    average_usage: Usage,
    maximum_usage: Option<Usage>,
    assigned_memory: Option<Number>,
}

fn google(path: &Path, content: &str, found: &mut Found) -> Result<(), TraceError> {
    for (index, row) in content.lines().enumerate().filter(|(_, row)| !row.trim().is_empty()) {
        let wrong = |what: String| TraceError::Line { path: path.into(), line: index + 1, what };
        let usage: InstanceUsage = serde_json::from_str(row).map_err(|error| wrong(error.to_string()))?;
        let part = |number: Option<&Number>| {
            number.and_then(Number::value).filter(|part| (0.0..=16.0).contains(part))
        };
        let amount = |part: f64| Bytes((part * GOOGLE_MACHINE.0 as f64) as u64);
        let whole = |number: &Number, name| {
            number.value().filter(|value| *value >= 0.0).ok_or_else(|| wrong(format!("no number in {name}")))
        };
        let name = format!(
            "{}-{}",
            whole(&usage.collection_id, "collection_id")?,
            whole(&usage.instance_index, "instance_index")?
        );
        let from = whole(&usage.start_time, "start_time")? / 1e6;
        let to = whole(&usage.end_time, "end_time")? / 1e6;
        let average = part(usage.average_usage.memory.as_ref())
            .ok_or_else(|| wrong("no average_usage.memory".into()))?;
        let most =
            part(usage.maximum_usage.as_ref().and_then(|most| most.memory.as_ref())).unwrap_or(average);
        let seen = found.entry(name).or_default();
        seen.max =
            seen.max.max(amount(part(usage.assigned_memory.as_ref()).unwrap_or(0.0))).max(amount(most));
        seen.samples.push((from as u64, amount(average), Bytes::ZERO, Bytes::ZERO));
        // The highest use of the window counts for its middle.
        seen.samples.push((((from + to) / 2.0) as u64, amount(most), Bytes::ZERO, Bytes::ZERO));
    }
    Ok(())
}

fn finish(path: &Path, mut found: Found, part: Part) -> Result<Trace, TraceError> {
    let content = |what: String| TraceError::Content { path: path.into(), what };
    found.retain(|_, seen| !seen.samples.is_empty());
    let times = || found.values().flat_map(|seen| seen.samples.iter().map(|sample| sample.0));
    let (Some(first), Some(last)) = (times().min(), times().max()) else {
        return Err(content("no samples in it".into()));
    };
    let seconds = (last - first).min(part.seconds).min(LONGEST);
    let last = first + seconds;
    found.retain(|_, seen| seen.keep_until(last));
    let vms = found.len().min(part.vms);
    if vms > MOST_VMS || seconds.saturating_mul(vms as u64) > MOST_SAMPLES {
        return Err(content(format!("{vms} VMs over {seconds} s are too many: play fewer, or less of it")));
    }
    let vms = found.into_iter().take(part.vms);
    let vms: Result<Vec<Series>, TraceError> = vms
        .map(|(name, seen)| {
            series(&name, seen, first, last).map_err(|what| content(format!("{name}: {what}")))
        })
        .collect();
    Ok(Trace { seconds, vms: vms? })
}

fn series(name: &str, seen: Recording, first: u64, last: u64) -> Result<Series, String> {
    let most_used = seen.samples.iter().map(|sample| sample.1).max().unwrap_or_default();
    let max = seen.max.max(most_used).max(Bytes::mib(256)).page_ceil();
    let min = seen.min.unwrap_or(Bytes(max.0 / 16)).page_ceil().clamp(api::limits::SMALLEST, max);
    let startup = Bytes(max.0 / 2).page_ceil().max(min);
    let limits = Limits::new(startup, min, max, 20, 100).map_err(|error| error.to_string())?;
    let (begins, ends) = (seen.samples[0].0, seen.samples[seen.samples.len() - 1].0);
    // Before a guest's agent came, what it had committed is not known.
    let told = || seen.samples.iter().filter(|sample| sample.3 > Bytes::ZERO);
    let used: u128 = told().map(|sample| u128::from(sample.1.0)).sum();
    let committed: u128 = told().map(|sample| u128::from(sample.3.0)).sum();
    let commit_percent = match committed {
        0 => COMMIT_PERCENT,
        committed => (committed * 100 / used.max(1)).clamp(50, u128::from(MOST_COMMITTED)) as u64,
    };
    let cache = seen.samples.iter().map(|sample| sample.2).max().filter(|cache| *cache > Bytes::ZERO);
    let mut demand = Vec::with_capacity((last - first + 1) as usize);
    let mut at = 0;
    for second in first..=last {
        while at + 1 < seen.samples.len() && seen.samples[at + 1].0 <= second {
            at += 1;
        }
        let (here, used) = (seen.samples[at].0, seen.samples[at].1);
        demand.push(match seen.samples.get(at + 1) {
            Some(next) if next.0 > here && second >= here => {
                let part = (second - here) as f64 / (next.0 - here) as f64;
                Bytes((used.0 as f64 + (next.1.0 as f64 - used.0 as f64) * part) as u64)
            }
            _ => used,
        });
    }
    Ok(Series {
        name: name.to_owned(),
        limits,
        // VMs that were there from the start may have their first sample a little later, and what happens
        // before the warm-up ends is not judged.
        starts: if begins - first < WARM_UP.as_secs() { 0 } else { begins - first },
        ends: (ends < last).then_some(ends - first),
        demand,
        commit_percent,
        cache: cache.unwrap_or(Bytes(max.0 / 8)),
    })
}

#[cfg(test)]
#[path = "recorded/tests.rs"]
mod tests;
