//! The daemon, and the moments at which it said what it did.

use std::io::{BufRead, BufReader, Read};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use api::runtime;
use balancer::daemon::State;
use balancer::daemon::client::Client;
use lab::{ballast, wait_for};

/// `ballast balancer` at its default interval; ends with this.
pub struct Daemon {
    child: Child,
    said: Arc<Mutex<Vec<(Instant, String)>>>,
    guests: usize,
}

impl Daemon {
    /// Starts it.
    pub fn start(budget: &str, guests: &[&str]) -> Result<Self> {
        let mut child = Command::new(ballast())
            .args(["balancer", "--budget", budget])
            // Its log is read below.
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .context("the daemon can't be started")?;
        let said = Arc::default();
        follow(child.stderr.take().context("it is piped")?, Arc::clone(&said));
        Ok(Self { child, said, guests: guests.len() })
    }

    /// Waits until it has looked at all guests so often.
    pub fn wait_for_rounds(&self, rounds: u64, usually: Duration) {
        wait_for("the daemon's first rounds", usually, || {
            let state = ask(usually)?;
            (state.rounds >= rounds && state.vms.len() == self.guests).then_some(())
        });
    }

    /// How often it has looked at its guests.
    pub fn rounds(&self, usually: Duration) -> u64 {
        wait_for("the daemon's count of rounds", usually, || Some(ask(usually)?.rounds))
    }

    /// When it said that `vm` gets more, at each time from `since` on.
    pub fn grants(&self, vm: &str, since: Instant) -> Vec<Instant> {
        let said = self.said.lock().unwrap_or_else(PoisonError::into_inner);
        let grant = |line: &str| line.contains("rule=Grow") && line.contains(&format!(" {vm}: "));
        said.iter().filter(|(at, line)| *at >= since && grant(line)).map(|(at, _)| *at).collect()
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ask(patience: Duration) -> Option<State> {
    let directory = runtime::directory().expect("there is a runtime directory");
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.expect("a runtime can be made");
    runtime.block_on(Client::new(&directory, patience).state()).ok()
}

fn follow(source: impl Read + Send + 'static, said: Arc<Mutex<Vec<(Instant, String)>>>) {
    thread::spawn(move || {
        for line in BufReader::new(source).lines().map_while(Result::ok) {
            said.lock().unwrap_or_else(PoisonError::into_inner).push((Instant::now(), line));
        }
    });
}
