//! The daemon, three guests, and what is seen of them.

use std::fs::{self, File};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::client::Client;
use api::runtime;
use api::units::Bytes;
use lab::Kernel;

use crate::history::{Guest, GuestSample, History, Sample};
use crate::view::View;

/// Each guest starts with this, and keeps at least [`MIN`].
const STARTUP: Bytes = Bytes::mib(208);
const MIN: Bytes = Bytes::mib(160);
/// What a guest may have at most: the three together could want 1.5 GiB.
const MAX: Bytes = Bytes::mib(512);
/// What they may hold together.
const BUDGET: Bytes = Bytes::mib(880);

/// Memory moves from a to b to c: each rises while the one before falls.
const GUESTS: &[(&str, &str)] = &[
    ("a", "rest:25s,grow:280M:25s,hold:15s,release:10s,rest:75s"),
    ("b", "rest:60s,grow:280M:25s,hold:15s,release:10s,rest:40s"),
    ("c", "rest:95s,grow:280M:25s,hold:15s,release:10s,rest:5s"),
];

const BETWEEN_SAMPLES: Duration = Duration::from_millis(500);
/// How long one VM may take to answer on a busy emulated host.
const ANSWER: Duration = Duration::from_secs(5);
/// Ten times what the guests usually take.
const LIMIT: Duration = Duration::from_secs(1400);

/// Processes that end with this program, whatever happens.
struct Children(Vec<Child>);

impl Drop for Children {
    fn drop(&mut self) {
        for child in &mut self.0 {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// Runs it all and tells what was seen; logs lie in `out`.
pub fn run(out: &Path, terminal: bool) -> Result<History> {
    let mut daemon = Children(vec![start_daemon(out)?]);
    let mut vms = Children(Vec::new());
    for (name, load) in GUESTS {
        vms.0.push(start_guest(out, name, load)?);
    }
    let guests =
        GUESTS.iter().map(|(name, _)| Guest { name, min: MIN, max: MAX, exit: None, oom_kills: None });
    let mut history =
        History { budget: BUDGET, guests: guests.collect(), samples: Vec::new(), settled: None };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(watch(&mut history, &mut vms.0, &mut View::new(terminal)))?;
    for guest in &mut history.guests {
        guest.oom_kills = oom_kills(&out.join(format!("{}.console", guest.name)));
    }
    ensure!(daemon.0[0].try_wait()?.is_none(), "the balancer ended before its guests: see out/balancer.log");
    Ok(history)
}

fn start_daemon(out: &Path) -> Result<Child> {
    let log = out.join("balancer.log");
    Command::new(guests::ballast())
        .args(["balancer", "--interval", "1s", "--budget", &format!("{}M", BUDGET.0 >> 20)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).with_context(|| log.display().to_string())?)
        .spawn()
        .context("ballast balancer can't be started")
}

fn start_guest(out: &Path, name: &str, load: &str) -> Result<Child> {
    let images = Kernel::V6_1.guest_images()?;
    let size = |bytes: Bytes| format!("{}M", bytes.0 >> 20);
    let console = out.join(format!("{name}.console"));
    Command::new(guests::ballast())
        .args(["run", "--name", name, "--kernel"])
        .arg(&images.bzimage)
        .arg("--initrd")
        .arg(&images.initrd)
        .args(["--memory", &format!("{},min={},max={}", size(STARTUP), size(MIN), size(MAX))])
        .args(["--cmdline", &format!("console=ttyS0 panic=-1 quiet ballast.load={load}")])
        .args(["--console", &format!("file:{}", console.display())])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(out.join(format!("{name}.log")))?)
        .spawn()
        .with_context(|| format!("guest {name} can't be started"))
}

/// Takes samples until all guests have ended.
async fn watch(history: &mut History, vms: &mut [Child], view: &mut View) -> Result<()> {
    let start = Instant::now();
    let mut clients = Vec::new();
    for guest in &history.guests {
        clients.push(Client::new(runtime::socket(guest.name)?).with_timeout(ANSWER));
    }
    let mut inflated = vec![false; clients.len()];
    while history.guests.iter().any(|guest| guest.exit.is_none()) {
        ensure!(start.elapsed() < LIMIT, "gave up after {LIMIT:?} waiting for the guests to end");
        let mut guests = Vec::new();
        for client in &mut clients {
            guests.push(client.memory().await.ok().map(|memory| GuestSample::from(&memory)));
        }
        let sample = Sample { time: start.elapsed(), guests };
        for (settled, now) in inflated.iter_mut().zip(&sample.guests) {
            *settled |= now.is_some_and(|now| now.actual <= now.target);
        }
        if history.settled.is_none() && inflated.iter().all(|inflated| *inflated) {
            history.settled = Some(sample.time);
        }
        history.samples.push(sample);
        for (guest, vm) in history.guests.iter_mut().zip(vms.iter_mut()) {
            if let Some(status) = vm.try_wait()? {
                guest.exit = Some(status.code().unwrap_or(-1));
            }
        }
        view.show(history);
        tokio::time::sleep(BETWEEN_SAMPLES).await;
    }
    view.end();
    Ok(())
}

/// What a guest's init said when it ended.
fn oom_kills(console: &Path) -> Option<u64> {
    let text = fs::read(console).ok()?;
    let text = String::from_utf8_lossy(&text);
    text.split("SUMMARY oom_kills=").nth(1)?.split_whitespace().next()?.parse().ok()
}
