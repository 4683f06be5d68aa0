//! Why vCPUs left the guest, by the tracepoint `kvm:kvm_exit` and a histogram that the kernel keeps
//! of it (Documentation/trace/histogram.rst). KVM's own statistics have no reasons. Takes root, and
//! costs some instructions an exit: times of a traced run are not told.

use std::collections::BTreeMap;
use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::path::PathBuf;

use crate::figure::short;

const HISTOGRAM: &str = "hist:keys=exit_reason";

fn event(file: &str) -> io::Result<PathBuf> {
    let roots = ["/sys/kernel/tracing", "/sys/kernel/debug/tracing"];
    let found = roots.iter().map(|r| PathBuf::from(r).join("events/kvm/kvm_exit").join(file));
    found.into_iter().find(|p| fs::metadata(p).is_ok()).ok_or_else(|| {
        io::Error::other(
            "there is no tracepoint kvm:kvm_exit in tracefs (it takes root, a tracefs mounted on \
             /sys/kernel/tracing and a loaded KVM module)",
        )
    })
}

fn trigger(text: &str) -> io::Result<()> {
    // Appending: truncating the file would take away other users' triggers.
    OpenOptions::new().append(true).open(event("trigger")?)?.write_all(text.as_bytes())
}

/// Exits are traced while this lives.
#[derive(Debug)]
pub struct Trace(());

impl Trace {
    /// Starts it, from zero.
    ///
    /// # Errors
    /// Without root, tracefs or KVM; and where somebody else traces the same.
    pub fn start() -> io::Result<Self> {
        trigger(HISTOGRAM).map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => {
                io::Error::other("this kernel keeps no histograms of tracepoints (CONFIG_HIST_TRIGGERS)")
            }
            Some(libc::EEXIST) => io::Error::other("somebody else traces kvm:kvm_exit in the same way"),
            _ => error,
        })?;
        Ok(Self(()))
    }
}

impl Drop for Trace {
    fn drop(&mut self) {
        // Where it can't be taken away it costs a little until the module goes.
        let _ = trigger(&format!("!{HISTOGRAM}"));
    }
}

/// All exits of the host since tracing began, by reason.
///
/// # Errors
/// Without root or tracefs.
pub fn read() -> io::Result<BTreeMap<String, u64>> {
    let svm = fs::exists("/sys/module/kvm_amd").unwrap_or(false);
    Ok(parse(&fs::read_to_string(event("hist")?)?, svm))
}

/// Lines such as `{ exit_reason:        114 } hitcount:          1`.
fn parse(text: &str, svm: bool) -> BTreeMap<String, u64> {
    let entries = text.lines().filter_map(|line| {
        let (key, count) = line.trim().strip_prefix("{ exit_reason:")?.split_once("} hitcount:")?;
        Some((key.trim().parse().ok()?, count.split_whitespace().next()?.parse::<u64>().ok()?))
    });
    let mut counts: BTreeMap<String, u64> = BTreeMap::new();
    for (code, count) in entries {
        *counts.entry(if svm { of_svm(code) } else { of_vmx(code) }).or_default() += count;
    }
    counts
}

/// Reasons with how often each, the most frequent first; no more than five.
pub fn list(reasons: &BTreeMap<String, f64>) -> String {
    let mut reasons: Vec<_> = reasons.iter().collect();
    reasons.sort_by(|a, b| b.1.total_cmp(a.1).then(a.0.cmp(b.0)));
    let words: Vec<_> =
        reasons.iter().take(5).map(|(reason, each)| format!("{reason} {}", short(**each))).collect();
    if words.is_empty() { "none".to_owned() } else { words.join(", ") }
}

/// AMD APM volume 2, appendix C.
fn of_svm(code: u32) -> String {
    match code {
        0x00..=0x0f => format!("read of CR{code}"),
        0x10..=0x1f => format!("write of CR{}", code - 0x10),
        0x4e => "page fault".into(),
        0x40..=0x5f => format!("exception {}", code - 0x40),
        0x60 => "interrupt".into(),
        0x64 => "interrupt window".into(),
        0x72 => "CPUID".into(),
        0x78 => "HLT".into(),
        0x79 => "INVLPG".into(),
        0x7b => "port".into(),
        0x7c => "MSR".into(),
        0x400 => "nested page fault".into(),
        _ => format!("{code:#x}"),
    }
}

/// SDM volume 3, appendix C.
fn of_vmx(code: u32) -> String {
    match code & 0xffff {
        0 => "exception or page fault".into(),
        1 => "interrupt".into(),
        7 => "interrupt window".into(),
        10 => "CPUID".into(),
        12 => "HLT".into(),
        14 => "INVLPG".into(),
        28 => "control register".into(),
        30 => "port".into(),
        31 | 32 => "MSR".into(),
        48 => "EPT violation".into(),
        49 => "EPT misconfiguration".into(),
        52 => "preemption timer".into(),
        other => format!("{other:#x}"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn histograms_are_read_by_processor() {
        let text = "# event histogram\n#\n# trigger info: hist:keys=exit_reason:vals=hitcount [active]\n#\n\n\
                    { exit_reason:        114 } hitcount:          1\n{ exit_reason:         78 } hitcount:      41\n\
                    { exit_reason: x } hitcount: 1\n\nTotals:\n    Hits: 42\n";
        let svm = parse(text, true);
        assert_eq!(svm.get("CPUID"), Some(&1));
        assert_eq!(svm.get("page fault"), Some(&41));
        assert_eq!(svm.len(), 2);
        assert_eq!(parse("{ exit_reason: 48 } hitcount: 7", false).get("EPT violation"), Some(&7));
    }

    #[test]
    fn tracing_works_or_says_what_it_takes() {
        match Trace::start() {
            Ok(_trace) => assert!(read().is_ok()),
            Err(error) => assert!(!error.to_string().is_empty()),
        }
    }
}
