//! What the demos have in common: the daemon, guests that end with this program, and samples of their memory.

pub mod disks;
pub mod peaks;

use std::fs::File;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use api::client::Client;
use api::runtime;
use api::units::Bytes;

use crate::history::{GuestSample, History, Sample};
use crate::view::View;

const BETWEEN_SAMPLES: Duration = Duration::from_millis(500);
/// How long one VM may take to answer on a busy emulated host.
const ANSWER: Duration = Duration::from_secs(5);

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

/// A size as options have it.
fn size(bytes: Bytes) -> String {
    format!("{}M", bytes.0 >> 20)
}

/// A balancer with this budget, whose log lies in `out`.
fn start_daemon(out: &Path, budget: Bytes) -> Result<Children> {
    let log = out.join("balancer.log");
    let daemon = Command::new(guests::ballast())
        .args(["balancer", "--interval", "1s", "--budget", &size(budget)])
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(&log).with_context(|| log.display().to_string())?)
        .spawn()
        .context("ballast balancer can't be started")?;
    Ok(Children(vec![daemon]))
}

/// A guest with what `options` name besides its name, console and log, which lies in `out`.
fn start_guest(out: &Path, name: &str, options: impl FnOnce(&mut Command)) -> Result<Child> {
    let mut command = Command::new(guests::ballast());
    let console = out.join(format!("{name}.console"));
    command.args(["run", "--name", name, "--console", &format!("file:{}", console.display())]);
    options(&mut command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create(out.join(format!("{name}.log")))?)
        .spawn()
        .with_context(|| format!("guest {name} can't be started"))
}

/// Takes samples until all guests have ended, or something has failed.
///
/// # Errors
/// One has failed, or they have not ended after `limit`.
fn watch(
    history: &mut History,
    vms: &mut Children,
    view: &mut View,
    limit: Duration,
    has_failed: &AtomicBool,
) -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let start = Instant::now();
        let mut clients = Vec::new();
        for guest in &history.guests {
            clients.push(Client::new(runtime::socket(guest.name)?).with_timeout(ANSWER));
        }
        let mut inflated = vec![false; clients.len()];
        while history.guests.iter().any(|guest| guest.exit.is_none()) && !has_failed.load(Ordering::Relaxed) {
            ensure!(start.elapsed() < limit, "gave up after {limit:?} waiting for the guests to end");
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
            for (guest, vm) in history.guests.iter_mut().zip(vms.0.iter_mut()) {
                if let Some(status) = vm.try_wait()? {
                    ensure!(status.success(), "guest {} ended with {status}: see out/{0}.log", guest.name);
                    guest.exit = status.code();
                }
            }
            view.show(history);
            tokio::time::sleep(BETWEEN_SAMPLES).await;
        }
        view.end();
        Ok(())
    })
}

/// The balancer has lived as long as its guests.
fn end_daemon(mut daemon: Children) -> Result<()> {
    for process in &mut daemon.0 {
        ensure!(process.try_wait()?.is_none(), "the balancer ended before its guests: see out/balancer.log");
    }
    Ok(())
}
