//! Why a target was chosen: a record for each decision, and its one line.

use std::fmt;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::host_state::HostState;

/// What made a decision.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Rule {
    /// It wants more, is entitled to it, and memory is free.
    Grow,
    /// Another VM is short of what it is entitled to, and this one has more than that.
    Pay,
    /// The host's pool is to be filled again.
    Refill,
    /// The target lay outside the limits.
    Limits,
    /// The guest did not give up what it was asked for: leave it what it has for a while.
    Stuck,
    /// Advice: VMs hold more than there is and none can give more: the host should swap from this one.
    Swap,
    /// As [`Rule::Swap`], where the host has no swap for it: pause this VM. Carried out where the
    /// daemon is told to and can; advice elsewhere.
    Pause,
    /// There is room again for this VM, which was paused for [`Rule::Pause`]. Carried out for a pause of
    /// the balancer's own; advice elsewhere.
    Resume,
}

impl Rule {
    /// Whether it leaves the target as it is: it advises, or asks for something else.
    pub fn keeps_target(self) -> bool {
        matches!(self, Self::Swap | Self::Pause | Self::Resume)
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Grow => "it needs more and memory is free",
            Self::Pay => "another VM is short of its share",
            Self::Refill => "the host's pool is refilled",
            Self::Limits => "its limits ask for it",
            Self::Swap => {
                "VMs hold more than the host has for them and none can give more: swap from this one"
            }
            Self::Pause => "VMs hold more than the host has for them and none can give more: pause this one",
            Self::Resume => "there is room again: resume it",
            Self::Stuck => "the guest gives nothing up, so it keeps what it has for a while",
        })
    }
}

/// Every number that a decision was made of. Its `Display` is one line.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reason {
    /// What the guest uses, as far as it ever said.
    pub used: Option<Bytes>,
    /// Its use with its buffer, within its limits.
    pub demand: Bytes,
    /// What it may have of the host now.
    pub entitlement: Bytes,
    /// How short the host is.
    pub state: HostState,
    /// What decided.
    pub rule: Rule,
    /// The target before.
    pub old: Bytes,
    /// The target from now on.
    pub new: Bytes,
}

impl fmt::Display for Reason {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let direction = match self.new.cmp(&self.old) {
            std::cmp::Ordering::Greater => "grow",
            std::cmp::Ordering::Less => "shrink",
            std::cmp::Ordering::Equal => "keep",
        };
        write!(f, "{direction} {} -> {}, {}: ", self.old, self.new, self.rule)?;
        match self.used {
            Some(used) => write!(f, "uses {used}")?,
            None => f.write_str("never said what it uses")?,
        }
        write!(f, ", wants {}, may have {}; host {}", self.demand, self.entitlement, self.state)
    }
}

/// A new target for one VM, and why.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Decision {
    /// Which VM, as the caller numbered it.
    pub vm: u64,
    /// Why. The new target is in it.
    #[serde(flatten)]
    pub reason: Reason,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_reads_as_a_line() {
        let reason = Reason {
            used: Some(Bytes::mib(280)),
            demand: Bytes::mib(336),
            entitlement: Bytes::mib(336),
            state: HostState::Soft,
            rule: Rule::Grow,
            old: Bytes::mib(256),
            new: Bytes::mib(336),
        };
        assert_eq!(
            reason.to_string(),
            "grow 256 MiB -> 336 MiB, it needs more and memory is free: \
             uses 280 MiB, wants 336 MiB, may have 336 MiB; host soft"
        );
    }
}
