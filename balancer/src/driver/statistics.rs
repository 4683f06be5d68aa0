//! A guest's statistics in another VMM's names.

use std::collections::BTreeMap;
use std::time::{Duration, Instant, SystemTime};

use api::report::Report;
use api::status::AgedReport;
use serde_json::Value;

/// What QEMU shows for a statistic that the guest has not sent.
const NOT_SENT: u64 = u64::MAX;

/// A VMM's names of the statistics in the order of their tags (virtio 1.2, section 5.5.6.4), with spaces between.
pub type Names = &'static str;

/// The statistics with these names. A missing one was not sent; other names are ignored.
///
/// # Errors
/// The name of a statistic that is no number.
pub fn read(names: Names, values: &BTreeMap<String, Value>) -> Result<Report, String> {
    let mut report = Report::default();
    for (tag, name) in (0..).zip(names.split_whitespace()) {
        let Some(value) = values.get(name) else { continue };
        let value = value.as_u64().ok_or_else(|| format!("{name} is {value}, which is no count"))?;
        if value != NOT_SENT {
            report.set(tag, value);
        }
    }
    Ok(report)
}

/// Tells how old a report is. A report counts from the moment when it was first seen to differ from the one
/// before.
///
/// A VMM's own time counts only for the first report, as clocks jump.
#[derive(Debug, Default)]
pub struct Age {
    seen: Option<(u64, Instant)>,
}

impl Age {
    /// The age of a report with this `mark` (its time, or a digest of its content). The first report that is
    /// seen is `old` already.
    pub fn of(&mut self, now: Instant, mark: u64, old: Duration) -> Duration {
        let since = match self.seen {
            Some((last, since)) if last == mark => since,
            Some(_) => now,
            None => now.checked_sub(old).unwrap_or(now),
        };
        self.seen = Some((mark, since));
        now.saturating_duration_since(since)
    }

    /// The same for a report that came at this time since 1970, by the VMM's word.
    pub fn of_report_at(&mut self, since_1970: Duration, mark: u64) -> Duration {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
        self.of(Instant::now(), mark, now.saturating_sub(since_1970))
    }

    /// The next report is the first one again.
    pub fn forget(&mut self) {
        self.seen = None;
    }
}

/// A report in ballast's words.
pub fn aged(age: Duration, statistics: Report) -> AgedReport {
    let age_ms = u64::try_from(age.as_millis()).unwrap_or(u64::MAX);
    AgedReport { age_ms, had: None, managed: None, statistics }
}

#[cfg(test)]
mod tests {
    use api::units::Bytes;
    use serde_json::json;

    use super::*;

    const NAMES: Names =
        "swap-in swap-out major minor free total available caches h f oom stalls as ds ar dr";

    fn values(value: Value) -> BTreeMap<String, Value> {
        serde_json::from_value(value).unwrap()
    }

    #[test]
    fn what_was_not_sent_is_unknown_and_not_huge() {
        let report = read(
            NAMES,
            &values(json!({"free": 5, "available": 18446744073709551615u64, "stalls": 3, "new-one": "x"})),
        )
        .unwrap();
        assert_eq!(report.free, Some(Bytes(5)));
        assert_eq!(report.available, None);
        assert_eq!(report.allocation_stalls, Some(3));
    }

    #[test]
    fn no_number_is_named() {
        for wrong in [json!("5"), json!(-1), json!(1.5), json!(null), json!([1])] {
            let error = read(NAMES, &values(json!({ "free": wrong }))).unwrap_err();
            assert!(error.contains("free"), "{error}");
        }
    }

    #[test]
    fn a_report_ages_until_another_comes() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let mut age = Age::default();
        assert_eq!(age.of(at(0), 1, Duration::from_secs(2)), Duration::from_secs(2));
        assert_eq!(age.of(at(5), 1, Duration::ZERO), Duration::from_secs(7));
        assert_eq!(age.of(at(6), 2, Duration::from_secs(9)), Duration::ZERO);
        assert_eq!(age.of(at(9), 2, Duration::ZERO), Duration::from_secs(3));
    }
}
