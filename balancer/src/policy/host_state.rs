//! How short of memory the host is, as a few named states.

use std::fmt;

use balloon::units::Bytes;
use serde::{Deserialize, Serialize};

/// Hysteresis of each state: it is left only when the free part is this much
/// above where it was entered, in hundredths of the pool.
const LEAVE_ABOVE: u64 = 16;

/// How much of the pool is free.
///
/// The pool is memory that nobody is entitled to, so that a guest in need can be
/// served before others have paid. The entries are ESXi's fractions of its
/// minimum free memory: below 64 % SOFT, below 32 % HARD, below 16 % EMERGENCY.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum HostState {
    /// The pool is nearly full: take memory back without hurry.
    #[default]
    Normal,
    /// Take memory back as fast as guests give it.
    Soft,
    /// Take also the headroom that guests are left otherwise.
    Hard,
    /// Take even what guests use, down to what they are entitled to.
    Emergency,
}

impl HostState {
    /// The state that follows this one when `free` of `pool` is free.
    #[must_use]
    pub fn next(self, free: Bytes, pool: Bytes) -> Self {
        let part = u128::from(free.0) * 100;
        let whole = u128::from(pool.0.max(1));
        let below = |percent: u64| part < whole * u128::from(percent);
        let entered = if below(16) {
            Self::Emergency
        } else if below(32) {
            Self::Hard
        } else if below(64) {
            Self::Soft
        } else {
            Self::Normal
        };
        // Down at once; up one state only when clearly above where it was entered.
        let mut state = self;
        while state > entered {
            let (entry, easier) = match state {
                Self::Emergency => (16, Self::Hard),
                Self::Hard => (32, Self::Soft),
                Self::Soft | Self::Normal => (64, Self::Normal),
            };
            if below(entry + LEAVE_ABOVE) {
                return state;
            }
            state = easier;
        }
        entered
    }
}

impl fmt::Display for HostState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Normal => "normal",
            Self::Soft => "soft",
            Self::Hard => "hard",
            Self::Emergency => "emergency",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn walk(from: HostState, percent: u64) -> HostState {
        from.next(Bytes::mib(percent), Bytes::mib(100))
    }

    #[test]
    fn states_are_entered_at_their_fractions_and_left_above() {
        use HostState::{Emergency, Hard, Normal, Soft};
        assert_eq!(walk(Normal, 64), Normal);
        assert_eq!(walk(Normal, 63), Soft);
        assert_eq!(walk(Normal, 31), Hard);
        assert_eq!(walk(Normal, 0), Emergency);
        assert_eq!(walk(Emergency, 20), Emergency);
        assert_eq!(walk(Emergency, 32), Hard);
        assert_eq!(walk(Hard, 47), Hard);
        assert_eq!(walk(Hard, 48), Soft);
        assert_eq!(walk(Soft, 79), Soft);
        assert_eq!(walk(Soft, 80), Normal);
        assert_eq!(walk(Emergency, 100), Normal);
    }

    #[test]
    fn a_host_without_a_pool_is_no_division_by_zero() {
        assert_eq!(HostState::Normal.next(Bytes::ZERO, Bytes::ZERO), HostState::Emergency);
    }
}
