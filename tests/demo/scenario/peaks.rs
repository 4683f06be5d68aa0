//! Three guests whose demands rise and fall in turn.

use std::fs;
use std::path::Path;
use std::sync::atomic::AtomicBool;
use std::time::Duration;

use anyhow::Result;
use api::units::Bytes;
use lab::Kernel;

use super::{Children, end_daemon, size, start_daemon, start_guest, watch};
use crate::history::{Guest, History};
use crate::view::View;

/// Each guest starts with this, and keeps at least [`MIN`].
const STARTUP: Bytes = Bytes::mib(208);
const MIN: Bytes = Bytes::mib(160);
/// What a guest may have at most: the three together could want 1.5 GiB.
const MAX: Bytes = Bytes::mib(512);
/// What they may hold together.
const BUDGET: Bytes = Bytes::mib(880);
/// So much more than at its least each has once.
const GAIN: Bytes = Bytes::mib(100);

/// Memory moves from a to b to c: each rises while the one before falls.
const GUESTS: &[(&str, &str)] = &[
    ("a", "rest:25s,grow:280M:25s,hold:15s,release:10s,rest:75s"),
    ("b", "rest:60s,grow:280M:25s,hold:15s,release:10s,rest:40s"),
    ("c", "rest:95s,grow:280M:25s,hold:15s,release:10s,rest:5s"),
];

/// Ten times what the guests usually take.
const LIMIT: Duration = Duration::from_secs(1400);

/// Runs it all and tells what was seen; logs lie in `out`.
pub fn run(out: &Path, terminal: bool) -> Result<History> {
    let daemon = start_daemon(out, BUDGET)?;
    let images = Kernel::V6_1.guest_images()?;
    let mut vms = Children(Vec::new());
    for (name, load) in GUESTS {
        vms.0.push(start_guest(out, name, |command| {
            command.arg("--kernel").arg(&images.bzimage).arg("--initrd").arg(&images.initrd);
            command.args(["--memory", &format!("{},min={},max={}", size(STARTUP), size(MIN), size(MAX))]);
            command.args(["--cmdline", &format!("console=ttyS0 panic=-1 quiet ballast.load={load}")]);
        })?);
    }
    let guests = GUESTS.iter().map(|(name, _)| Guest {
        name,
        min: MIN,
        max: MAX,
        gain: GAIN,
        exit: None,
        oom_kills: None,
    });
    let mut history =
        History { budget: BUDGET, guests: guests.collect(), samples: Vec::new(), settled: None };
    watch(&mut history, &mut vms, &mut View::new(terminal), LIMIT, &AtomicBool::new(false))?;
    for guest in &mut history.guests {
        guest.oom_kills = oom_kills(&out.join(format!("{}.console", guest.name)));
    }
    end_daemon(daemon)?;
    Ok(history)
}

/// What a guest's init said when it ended.
fn oom_kills(console: &Path) -> Option<u64> {
    let text = fs::read(console).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.split("SUMMARY oom_kills=").nth(1)?.split_whitespace().next()?.parse().ok()
}
