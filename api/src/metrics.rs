//! Figures as Prometheus reads them: its text format, version 0.0.4.

use std::fmt::Write;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crate::units::Bytes;

/// The format's media type, which every version of Prometheus understands.
pub const CONTENT_TYPE: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What one sample says, in Prometheus's base units: bytes and seconds. A figure that is not known is no sample.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Value(Option<f64>);

impl From<f64> for Value {
    fn from(value: f64) -> Self {
        Self(Some(value))
    }
}

impl From<u64> for Value {
    fn from(count: u64) -> Self {
        Self(Some(count as f64))
    }
}

impl From<bool> for Value {
    fn from(holds: bool) -> Self {
        Self(Some(f64::from(u8::from(holds))))
    }
}

impl From<Bytes> for Value {
    fn from(bytes: Bytes) -> Self {
        Self::from(bytes.0)
    }
}

impl From<Duration> for Value {
    fn from(time: Duration) -> Self {
        Self(Some(time.as_secs_f64()))
    }
}

impl<T> From<Option<T>> for Value
where
    Self: From<T>,
{
    fn from(value: Option<T>) -> Self {
        value.map_or(Self(None), Self::from)
    }
}

/// How a figure moves.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Up and down.
    Gauge,
    /// Up only. Its name gets the ending `_total`.
    Counter,
}

/// A page of figures, in the making.
#[derive(Debug)]
pub struct Page {
    prefix: &'static str,
    common: String,
    text: String,
}

impl Page {
    /// An empty page, all of whose names begin with `prefix` and all of whose samples have the label `common`.
    pub fn new(prefix: &'static str, common: Option<(&str, &str)>) -> Self {
        let common = common.map(|(name, value)| label(name, value)).unwrap_or_default();
        Self { prefix, common, text: String::new() }
    }

    /// One figure.
    pub fn gauge(&mut self, name: &str, help: &str, value: impl Into<Value>) {
        self.family(Kind::Gauge, name, help, "", [("", value)]);
    }

    /// One count.
    pub fn counter(&mut self, name: &str, help: &str, value: impl Into<Value>) {
        self.family(Kind::Counter, name, help, "", [("", value)]);
    }

    /// The same figure of several things, which the label `by` tells apart.
    pub fn family<'a, V: Into<Value>>(
        &mut self,
        kind: Kind,
        name: &str,
        help: &str,
        by: &str,
        samples: impl IntoIterator<Item = (&'a str, V)>,
    ) {
        let (kind, ending) = match kind {
            Kind::Gauge => ("gauge", ""),
            Kind::Counter => ("counter", "_total"),
        };
        let name = format!("{}_{name}{ending}", self.prefix);
        let known = samples.into_iter().filter_map(|(which, value)| Some((which, value.into().0?)));
        let mut known = known.peekable();
        if known.peek().is_some() {
            self.head(&name, help, kind);
        }
        for (which, value) in known {
            let own = if by.is_empty() { String::new() } else { label(by, which) };
            self.sample(&name, &own, value);
        }
    }

    /// How long something took, each time.
    pub fn histogram(&mut self, name: &str, help: &str, histogram: &Histogram) {
        let name = format!("{}_{name}", self.prefix);
        self.head(&name, help, "histogram");
        let mut count = 0;
        let bounds = histogram.bounds.iter().map(f64::to_string).chain(["+Inf".to_owned()]);
        for (bound, bucket) in bounds.zip(&histogram.buckets) {
            count += bucket.load(Ordering::Relaxed);
            self.sample(&format!("{name}_bucket"), &label("le", &bound), count as f64);
        }
        let sum = Duration::from_nanos(histogram.sum_ns.load(Ordering::Relaxed));
        self.sample(&format!("{name}_sum"), "", sum.as_secs_f64());
        self.sample(&format!("{name}_count"), "", count as f64);
    }

    /// The whole page.
    pub fn finish(self) -> String {
        self.text
    }

    // Writing to a String does not fail.
    fn head(&mut self, name: &str, help: &str, kind: &str) {
        let help = help.replace('\\', r"\\").replace('\n', r"\n");
        let _ = write!(self.text, "# HELP {name} {help}\n# TYPE {name} {kind}\n");
    }

    fn sample(&mut self, name: &str, own: &str, value: f64) {
        let labels = [self.common.as_str(), own].into_iter().filter(|label| !label.is_empty());
        let labels = labels.collect::<Vec<_>>().join(",");
        let _ = match labels.as_str() {
            "" => writeln!(self.text, "{name} {value}"),
            labels => writeln!(self.text, "{name}{{{labels}}} {value}"),
        };
    }
}

fn label(name: &str, value: &str) -> String {
    let value = value.replace('\\', r"\\").replace('"', r#"\""#).replace('\n', r"\n");
    format!("{name}=\"{value}\"")
}

/// How long something takes, counted by classes of seconds. Whoever counts may share it.
#[derive(Debug)]
pub struct Histogram {
    bounds: &'static [f64],
    /// One for each bound, and one for what is longer.
    buckets: Vec<AtomicU64>,
    sum_ns: AtomicU64,
}

impl Histogram {
    /// An empty one, with the classes' upper bounds in seconds, in rising order.
    pub fn new(bounds: &'static [f64]) -> Self {
        let buckets = (0..=bounds.len()).map(|_| AtomicU64::new(0)).collect();
        Self { bounds, buckets, sum_ns: AtomicU64::new(0) }
    }

    /// Counts one time.
    pub fn observe(&self, time: Duration) {
        let class = self.bounds.partition_point(|bound| *bound < time.as_secs_f64());
        if let Some(bucket) = self.buckets.get(class) {
            bucket.fetch_add(1, Ordering::Relaxed);
        }
        let nanoseconds = u64::try_from(time.as_nanos()).unwrap_or(u64::MAX);
        self.sum_ns.fetch_add(nanoseconds, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_written_as_prometheus_reads_it() {
        let mut page = Page::new("x", Some(("vm", "a\"b\\c\nd")));
        page.gauge("memory_bytes", "What\nit is \\ has.", Bytes::gib(3));
        page.gauge("unknown", "Not there.", None::<u64>);
        page.counter("calls", "Calls.", 7);
        page.family(Kind::Gauge, "state", "States.", "state", [("on", true), ("off", false)]);
        page.gauge("age_seconds", "Age.", Some(Duration::from_millis(1500)));
        let common = r#"vm="a\"b\\c\nd""#;
        let expected = format!(
            "# HELP x_memory_bytes What\\nit is \\\\ has.\n# TYPE x_memory_bytes gauge\n\
             x_memory_bytes{{{common}}} 3221225472\n\
             # HELP x_calls_total Calls.\n# TYPE x_calls_total counter\nx_calls_total{{{common}}} 7\n\
             # HELP x_state States.\n# TYPE x_state gauge\n\
             x_state{{{common},state=\"on\"}} 1\nx_state{{{common},state=\"off\"}} 0\n\
             # HELP x_age_seconds Age.\n# TYPE x_age_seconds gauge\nx_age_seconds{{{common}}} 1.5\n"
        );
        assert_eq!(page.finish(), expected);
    }

    #[test]
    fn a_histogram_counts_what_is_not_longer_than_each_bound() {
        let histogram = Histogram::new(&[0.00001, 0.5, 1.0]);
        for ms in [0, 500, 501, 1000, 2000] {
            histogram.observe(Duration::from_millis(ms));
        }
        let mut page = Page::new("x", None);
        page.histogram("round_seconds", "A round.", &histogram);
        let expected = "# HELP x_round_seconds A round.\n# TYPE x_round_seconds histogram\n\
             x_round_seconds_bucket{le=\"0.00001\"} 1\nx_round_seconds_bucket{le=\"0.5\"} 2\n\
             x_round_seconds_bucket{le=\"1\"} 4\nx_round_seconds_bucket{le=\"+Inf\"} 5\n\
             x_round_seconds_sum 4.001\nx_round_seconds_count 5\n";
        assert_eq!(page.finish(), expected);
    }
}
