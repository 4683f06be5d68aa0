//! How short of memory the host is, as a few named states.

use std::fmt;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use super::observation::{HostObservation, Pressure};

/// Hysteresis of each state: it is left only when the free part is this much
/// above where it was entered, in hundredths of the pool.
const LEAVE_ABOVE: u64 = 16;

/// The host's own pressure from which it is at least SOFT, HARD and EMERGENCY, in percent of time in which
/// some task waits for memory. The figures are ours: systemd-oomd kills at 60 % of `full`, which is far too
/// late to begin.
const PRESSED: [(f64, HostState); 3] =
    [(40.0, HostState::Emergency), (20.0, HostState::Hard), (10.0, HostState::Soft)];

/// A state that the host's pressure asked for is left when the pressure is below this part of
/// where it was entered.
const RELIEVED: f64 = 0.5;

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
    /// The state that follows this one when `free` of `pool` is free: the worse of what that asks for and
    /// what the host's own pressure asks for. The pressure asks for no more than [`HostState::Soft`] where a
    /// whole pool is available. Then some program waits at its own limit (memory.max and memory.high count
    /// too, Documentation/accounting/psi.rst), and what guests give would not help it.
    #[must_use]
    pub fn next(self, free: Bytes, pool: Bytes, host: &HostObservation) -> Self {
        let pressed = self.by_pressure(host.pressure);
        let is_ample = host.available.is_some_and(|available| available >= pool);
        self.by_pool(free, pool).max(if is_ample { pressed.min(Self::Soft) } else { pressed })
    }

    fn by_pressure(self, pressure: Option<Pressure>) -> Self {
        let percent = pressure.unwrap_or_default().as_percent();
        let asks = |(from, state): &(f64, Self)| {
            let from = if self >= *state { from * RELIEVED } else { *from };
            percent >= from
        };
        PRESSED.iter().find(|entry| asks(entry)).map_or(Self::Normal, |(_, state)| *state)
    }

    fn by_pool(self, free: Bytes, pool: Bytes) -> Self {
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

/// Whether the host itself waits for memory more than is normal.
pub fn is_pressed(pressure: Option<Pressure>) -> bool {
    HostState::Normal.by_pressure(pressure) > HostState::Normal
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
        from.next(Bytes::mib(percent), Bytes::mib(100), &HostObservation::default())
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
        assert_eq!(
            HostState::Normal.next(Bytes::ZERO, Bytes::ZERO, &HostObservation::default()),
            HostState::Emergency
        );
    }

    #[test]
    fn a_host_that_waits_itself_is_short_whatever_its_pool_says() {
        use HostState::{Emergency, Hard, Normal, Soft};
        let host = |percent: f64, available: Option<Bytes>| HostObservation {
            pressure: Some(Pressure::percent(percent)),
            available,
            ..HostObservation::default()
        };
        let next =
            |from: HostState, percent: f64| from.next(Bytes::mib(100), Bytes::mib(100), &host(percent, None));
        assert_eq!(next(Normal, 9.9), Normal);
        assert_eq!(next(Normal, 10.0), Soft);
        assert_eq!(next(Normal, 25.0), Hard);
        assert_eq!(next(Normal, 90.0), Emergency);
        assert_eq!(next(Emergency, 21.0), Emergency);
        assert_eq!(next(Emergency, 19.0), Hard);
        assert_eq!(next(Soft, 6.0), Soft);
        assert_eq!(next(Soft, 4.0), Normal);
        assert_eq!(Normal.next(Bytes::mib(20), Bytes::mib(100), &host(10.0, None)), Hard);
        // A program that waits at its own limit is no shortage of the host's.
        for (available, state) in [(99, Emergency), (100, Soft)] {
            let host = host(90.0, Some(Bytes::mib(available)));
            assert_eq!(Normal.next(Bytes::mib(100), Bytes::mib(100), &host), state);
            assert_eq!(Normal.next(Bytes::mib(0), Bytes::mib(100), &host), Emergency);
        }
    }
}
