//! What an operator may set of the policy, and the guards that tests switch off.

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How the policy is set up. In a file, times are seconds and a key that is none of
/// these is an error.
///
/// ```toml
/// pool_percent = 3     # of the budget: what guests in need are served from at once
/// rest_seconds = 120   # who was moved one way is not moved back for so long, short of need
/// ```
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// The time between two decisions.
    #[serde(skip)]
    pub tick: Duration,
    /// Which guards are on.
    #[serde(skip)]
    pub guards: Guards,
    /// See [`EMERGENCY_DWELL`](super::guards::EMERGENCY_DWELL); another only in tests.
    #[serde(skip)]
    pub emergency_dwell: Duration,
    /// See [`PATIENCE`](super::last_resort::PATIENCE); another only in tests.
    #[serde(skip)]
    pub patience: Duration,
    /// See [`DEFAULT_POOL_PERCENT`].
    pub pool_percent: u64,
    /// See [`DEFAULT_REST`].
    #[serde(rename = "rest_seconds", with = "seconds")]
    pub rest: Duration,
}

/// The part of the budget, in percent, that is kept for what can't wait: a guest in need is served from it
/// before others have paid.
pub const DEFAULT_POOL_PERCENT: u64 = 3;

/// The largest pool that makes sense, in percent of the budget.
pub const MOST_POOL_PERCENT: u64 = 50;

/// How long a guest that was moved one way is not moved back while its use is steady:
/// 88 % of published bursts end within it, so whoever paid for one is not asked twice.
pub const DEFAULT_REST: Duration = Duration::from_secs(120);

/// The longest rest that makes sense.
pub const LONGEST_REST: Duration = Duration::from_secs(3600);

impl Default for Settings {
    fn default() -> Self {
        Self {
            tick: Duration::from_secs(1),
            guards: Guards::default(),
            emergency_dwell: super::guards::EMERGENCY_DWELL,
            patience: super::last_resort::PATIENCE,
            pool_percent: DEFAULT_POOL_PERCENT,
            rest: DEFAULT_REST,
        }
    }
}

/// Why settings make no sense.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SettingsError {
    /// A pool of nothing makes every state of the host an emergency.
    #[error("pool_percent = {0} is out of range: 1 to {MOST_POOL_PERCENT}")]
    Pool(u64),
    /// A rest of hours pins guests to what they have.
    #[error("rest_seconds = {} is out of range: 0 to {}", .0.as_secs(), LONGEST_REST.as_secs())]
    Rest(Duration),
}

impl Settings {
    /// Whether these settings make sense.
    ///
    /// # Errors
    /// [`SettingsError`] names the first that doesn't, and what is allowed.
    pub fn validate(&self) -> Result<(), SettingsError> {
        if !(1..=MOST_POOL_PERCENT).contains(&self.pool_percent) {
            return Err(SettingsError::Pool(self.pool_percent));
        }
        if self.rest > LONGEST_REST {
            return Err(SettingsError::Rest(self.rest));
        }
        Ok(())
    }
}

/// Which guards are on. All are, except in the tests that show what each is for
/// and in a simulator that measures what each is worth.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Guards {
    /// A guest whose report is stale is not shrunk.
    pub stale_are_held: bool,
    /// Grants come from memory that is free already, never from what is about to be.
    pub payment_comes_first: bool,
    /// A guest that does not follow is left alone for a while.
    pub stuck_are_left_alone: bool,
    /// Demand does not follow small falls.
    pub peaks_are_held: bool,
    /// Guests keep what they use, short of an emergency.
    pub use_is_spared: bool,
    /// A guest that was just moved one way is not moved back while its use is steady,
    /// short of need.
    pub moves_rest: bool,
    /// A guest that waits for memory is given more than its use tells.
    pub distress_counts: bool,
    /// Rising use is followed ahead of what was reported.
    pub rises_are_forecast: bool,
    /// What others need beyond their fair share never comes before a guest's need within its own.
    pub fair_comes_first: bool,
    /// Memory is given for what the newest report tells, not for what was used a moment ago.
    pub news_counts: bool,
    /// What guests may take back on their own is kept from all grants.
    pub slack_is_kept: bool,
    /// Memory is not taken while nobody can tell whether the guest uses it.
    pub uncertainty_is_spared: bool,
    /// What a guest owes is counted on only as far as its pace brings it.
    pub pace_counts: bool,
}

impl Default for Guards {
    fn default() -> Self {
        Self {
            stale_are_held: true,
            payment_comes_first: true,
            stuck_are_left_alone: true,
            peaks_are_held: true,
            use_is_spared: true,
            moves_rest: true,
            distress_counts: true,
            rises_are_forecast: true,
            fair_comes_first: true,
            news_counts: true,
            slack_is_kept: true,
            uncertainty_is_spared: true,
            pace_counts: true,
        }
    }
}

/// A time as a whole number of seconds.
mod seconds {
    use std::time::Duration;

    use serde::{Deserialize, Deserializer, Serializer};

    pub fn serialize<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_u64(time.as_secs())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
        u64::deserialize(from).map(Duration::from_secs)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_read_and_checked() {
        let settings: Settings = toml::from_str("pool_percent = 5\nrest_seconds = 60").unwrap();
        assert_eq!((settings.pool_percent, settings.rest), (5, Duration::from_secs(60)));
        assert_eq!(settings.guards, Guards::default());
        assert_eq!(settings.validate(), Ok(()));
        assert_eq!(toml::from_str::<Settings>("").unwrap(), Settings::default());
        assert!(toml::from_str::<Settings>("pool = 5").is_err());
        for wrong in ["pool_percent = 0", "pool_percent = 51", "rest_seconds = 3601"] {
            let error = toml::from_str::<Settings>(wrong).unwrap().validate().unwrap_err();
            assert!(error.to_string().starts_with(wrong), "{error}");
        }
        let text = toml::to_string(&settings).unwrap();
        assert_eq!(toml::from_str::<Settings>(&text).unwrap(), settings);
    }
}
