//! What the daemon logs of its settings.

use api::units::Bytes;
use tracing::{info, warn};

use super::Daemon;
use crate::daemon::config::LastResort;

impl Daemon {
    /// Logs the settings and what is odd about them.
    pub fn log_settings(&mut self) {
        let budget = self.budget.now(self.host, Bytes::ZERO);
        info!(
            "looking after the VMs in {}: budget {budget} of the host's {}, every {} ms",
            self.discovery.directory().display(),
            self.host.total,
            self.tick.as_millis()
        );
        if self.config.last_resort == LastResort::Pause {
            info!("as a last resort the VM of the least weight is paused, and resumed when there is room");
        }
        if budget > self.host.total {
            warn!("the budget of {budget} is more than the {} that this host has", self.host.total);
        }
        if budget == Bytes::ZERO {
            warn!("the host's reserve leaves nothing to VMs: every VM will be shrunk as far as it goes");
        }
        if let Some(group) = self.host.group
            && budget > group.limit
        {
            warn!("the budget of {budget} is more than the {} that the control group allows", group.limit);
        }
        if let Some(watchdog) = self.notify.watchdog()
            && watchdog < self.tick * 3
        {
            warn!(
                "the service manager's watchdog of {} s is too short for rounds every {} ms: \
                 set WatchdogSec to three intervals or more",
                watchdog.as_secs(),
                self.tick.as_millis()
            );
        }
    }
}
