//! Last resorts (swap, pause, resume) as far as one VM is concerned: what is remembered and logged.

use std::time::Duration;

use api::status::Pauser;
use tracing::{info, warn};

use super::log_limiter::LogLimiter;
use crate::driver::Kind;
use crate::policy::Vm;
use crate::policy::reason::{Reason, Rule};

/// How long a VM that refused a pause is not asked again; others are asked at once.
const AFTER_REFUSAL: Duration = Duration::from_secs(60);

#[derive(Debug, Default)]
pub struct LastResortState {
    advice_log: LogLimiter,
    paused_log: LogLimiter,
    /// Since when the balancer's pause of it lasts.
    since: Option<Duration>,
    refused: Option<Duration>,
}

impl LastResortState {
    /// It refused to be paused.
    pub fn refused(&mut self, now: Duration) {
        self.refused = Some(now);
    }

    /// Whether its last refusal is long enough ago.
    pub fn may_pause(&self, now: Duration) -> bool {
        self.refused.is_none_or(|then| now.saturating_sub(then) >= AFTER_REFUSAL)
    }

    /// Logs what the operator should do: at once, then less and less often while the advice stands.
    pub fn advise(&mut self, now: Duration, vm: &str, vmm: Kind, reason: &Reason) {
        let Some((kind, what)) = (match reason.rule {
            Rule::Swap => Some(("swap", "swap from")),
            Rule::Pause => Some(("pause", "pause")),
            Rule::Resume => Some(("resume", "resume")),
            Rule::Grow | Rule::Pay | Rule::Refill | Rule::Limits | Rule::Stuck => None,
        }) else {
            return;
        };
        if self.advice_log.is_due(now, kind) {
            let why_not = match reason.rule {
                Rule::Pause if !vmm.knows_who_paused() => {
                    "; its VMM can't tell the balancer's pauses from yours"
                }
                Rule::Pause if !self.may_pause(now) => "; it refused when the balancer tried",
                Rule::Pause => "; with last_resort = \"pause\" the balancer would",
                _ => "",
            };
            warn!(vm, rule = kind, "ADVICE: {what} {vm}{why_not}: {reason}");
        }
    }

    /// The emergency is over: advice in the next one is logged at once.
    pub fn calm(&mut self) {
        self.advice_log = LogLimiter::default();
    }

    /// Logs that it is paused, from time to time, and what it waits for.
    pub fn remind(&mut self, now: Duration, name: &str, vm: &Vm) {
        if vm.observed.vcpus.paused_by() != Some(Pauser::Balancer) {
            // A VM that does not answer may still be paused.
            if vm.answers
                && let (Some(since), true) = (self.since.take(), self.paused_log.end())
            {
                let lay = now.saturating_sub(since).as_secs();
                info!(vm = name, "{name} is no longer paused by the balancer, after {lay} s");
            }
            return;
        }
        let since = *self.since.get_or_insert(now);
        if self.paused_log.is_due(now, "paused") {
            let needs = vm.untouched();
            let paused_log = match now.saturating_sub(since).as_secs() {
                0 => String::new(),
                seconds => format!(" for {seconds} s by now"),
            };
            warn!(
                vm = name,
                "{name} is PAUSED by the balancer{paused_log}, as memory has run out: it runs on when the \
                 others can spare {needs}, or at once by `ballast resume {name}`"
            );
        }
    }
}
