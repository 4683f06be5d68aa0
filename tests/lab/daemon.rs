//! `ballast balancer` over a host's guests.

use std::process::{Child, Command, Stdio};

use api::units::Bytes;

use crate::artifacts::ballast;

/// `ballast balancer`, ended with SIGKILL: the one end that it can't prepare for.
pub struct Daemon(Child);

impl Daemon {
    /// Starts one that has `budget` for all guests together and looks twice a second.
    ///
    /// # Panics
    /// Where it can't be started.
    pub fn start(budget: Bytes) -> Self {
        let budget = format!("{}M", budget.0 >> 20);
        let child = Command::new(ballast())
            .args(["balancer", "--interval", "500ms", "--budget", &budget])
            .stdin(Stdio::null())
            .spawn();
        Self(child.expect("the daemon starts"))
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        self.0.kill().expect("the daemon still runs");
        self.0.wait().expect("the daemon can be waited for");
    }
}
