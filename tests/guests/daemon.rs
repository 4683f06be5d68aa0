//! `ballast balancer` over a host's guests.

use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use api::runtime;
use api::units::Bytes;
use balancer::daemon::State;
use balancer::daemon::client::Client;

use crate::lines::{Lines, Printed};
use crate::{ballast, block_on, wait_for};

/// How long one answer may take on an emulated host.
const ANSWER: Duration = Duration::from_secs(20);

/// `ballast balancer`, ended with SIGKILL: the one end that it can't prepare for.
pub struct Daemon {
    child: Child,
    said: Lines,
}

impl Daemon {
    /// Starts one that has `budget` for all guests together and looks twice a second.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn start(budget: Bytes) -> Self {
        Self::with(Printed::Yes, &["--interval", "500ms", "--budget", &format!("{}M", budget.0 >> 20)])
    }

    /// Starts one with these arguments.
    ///
    /// # Panics
    /// As [`Daemon::start`].
    pub fn with(printed: Printed, arguments: &[&str]) -> Self {
        let mut command = Command::new(ballast());
        // Its log is read below.
        command.arg("balancer").args(arguments).env("NO_COLOR", "1").stdin(Stdio::null());
        let mut child = command.stderr(Stdio::piped()).spawn().expect("the daemon starts");
        let said = Lines::default();
        said.follow(child.stderr.take().expect("it is piped"), "balancer! ", printed);
        Self { child, said }
    }

    /// What it says at the end of a round; `None` where it does not answer.
    pub fn state(&self) -> Option<State> {
        let directory = runtime::directory().expect("there is a runtime directory");
        block_on(Client::new(&directory, ANSWER).state()).ok()
    }

    /// Waits until it has looked at so many VMs so often.
    ///
    /// # Panics
    /// Where it does not.
    pub fn wait_for_rounds(&self, rounds: u64, vms: usize, usually: Duration) {
        wait_for("the daemon's first rounds", usually, || {
            let state = self.state()?;
            (state.rounds >= rounds && state.vms.len() == vms).then_some(())
        });
    }

    /// When it said that `vm` gets more, at each time from `since` on.
    pub fn grants(&self, vm: &str, since: Instant) -> Vec<Instant> {
        let name = format!(" {vm}: ");
        self.said.when(|at, line| at >= since && line.contains("rule=Grow") && line.contains(&name))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
