//! Whether a VM keeps the target that the balancer set.
//!
//! Somebody else may set it too: an operator by hand, a program that balances as well. Two that set one target
//! in turn move the guest to and fro, and fill the log. So each time that it was set anew the next order waits
//! twice as long. Meanwhile the VM is charged what it may hold by the target that it has: whoever sets that
//! takes nothing from the others but what the VM's limits allow.

use std::time::Duration;

use api::units::Bytes;
use tracing::{info, warn};

use super::log_limiter::LogLimiter;
use crate::policy::DEADBAND;

/// How long an order waits when the target was set anew for the second time; for the first it does not wait.
const FIRST_WAIT: Duration = Duration::from_secs(2);

/// The longest wait, and how long a target must stay until the next change is the first again.
const LONGEST_WAIT: Duration = Duration::from_secs(64);

/// VMMs round targets in steps of their own: so much, or [`DEADBAND`], is the same target.
const ROUNDING_PERCENT: u64 = 1;

/// What is known of one VM's target.
#[derive(Debug, Default)]
pub struct TargetWatch {
    /// What the VM took last.
    ordered: Option<Bytes>,
    /// When it was last found set anew.
    changed: Option<Duration>,
    /// How long the next order waits if it is set anew once more.
    wait: Duration,
    /// The next order waits until then.
    until: Duration,
    log: LogLimiter,
}

impl TargetWatch {
    /// The VM took a target.
    pub fn took(&mut self, target: Bytes) {
        self.ordered = Some(target);
    }

    /// Whoever changed its limits may have changed its target.
    pub fn forget(&mut self) {
        self.ordered = None;
    }

    /// The VM said what its target is.
    pub fn look(&mut self, now: Duration, name: &str, target: Bytes) {
        let Some(ordered) = self.ordered else { return };
        let rounding = DEADBAND.max(ordered.percent(ROUNDING_PERCENT));
        if Bytes(ordered.0.abs_diff(target.0)) <= rounding {
            let calm = self.changed.is_some_and(|then| now.saturating_sub(then) >= LONGEST_WAIT * 2);
            if calm {
                (self.changed, self.wait) = (None, Duration::ZERO);
                if self.log.end() {
                    info!(vm = name, "{name} keeps its target again");
                }
            }
            return;
        }
        self.ordered = None;
        self.changed = Some(now);
        self.until = now + self.wait;
        if self.log.is_due(now, "target") {
            warn!(
                vm = name,
                "the target of {name} was {ordered}, as the balancer set it, and is {target} now: somebody else sets \
                 it too, or its VMM does not keep it; while that goes on, the balancer sets it ever more seldom"
            );
        }
        self.wait = (self.wait * 2).clamp(FIRST_WAIT, LONGEST_WAIT);
    }

    /// Whether it may be given another target now.
    pub fn may_order(&self, now: Duration) -> bool {
        now >= self.until
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_target_that_is_set_anew_each_second_is_ordered_ever_more_seldom() {
        let mut watch = TargetWatch::default();
        let (ours, theirs) = (Bytes::mib(400), Bytes::mib(256));
        let mut orders = Vec::new();
        for second in 0..200 {
            let now = Duration::from_secs(second);
            watch.look(now, "web", theirs);
            if watch.may_order(now) {
                watch.took(ours);
                orders.push(second);
            }
        }
        // Each second after an order it is found set anew.
        assert_eq!(orders, [0, 1, 4, 9, 18, 35, 68, 133, 198]);
        // It stays for a while: the next change is the first.
        watch.took(ours);
        for second in [200, 400] {
            watch.look(Duration::from_secs(second), "web", ours);
        }
        let now = Duration::from_secs(401);
        watch.look(now, "web", theirs);
        assert!(watch.may_order(now));
    }

    #[test]
    fn what_a_vmm_rounds_and_what_other_limits_change_is_nobodys_doing() {
        let mut watch = TargetWatch::default();
        let now = Duration::from_secs(1);
        for target in [Bytes::mib(390), Bytes::mib(416)] {
            watch.took(Bytes::mib(400));
            watch.look(now, "web", target);
            assert_eq!(watch.changed, None);
        }
        watch.forget();
        watch.look(now, "web", Bytes::mib(256));
        assert_eq!(watch.changed, None);
    }
}
