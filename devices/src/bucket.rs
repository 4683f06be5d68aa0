//! How much may happen in a time: token buckets.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

/// Nanoseconds in a second.
const SECOND: u128 = 1_000_000_000;

/// Fills with tokens at a steady rate up to a level. What happens takes some of them.
///
/// What needs more tokens than the bucket can hold takes them once it is full, and leaves it in debt: nothing
/// waits for ever, and over time no more happens than the rate allows.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: u64,
    most: u64,
    /// Tokens in billionths.
    level: i128,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket of `most` tokens that gets `rate` of them a second.
    pub fn new(rate: u64, most: u64, now: Instant) -> Self {
        Self { rate, most, level: billionths(most), filled_at: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        self.wait_for(1, now).is_zero() && {
            self.spend(1);
            true
        }
    }

    /// How long it takes until `tokens` can be spent; zero where they can be now.
    pub fn wait_for(&mut self, tokens: u64, now: Instant) -> Duration {
        let passed = now.saturating_duration_since(self.filled_at).as_nanos();
        self.filled_at = self.filled_at.max(now);
        let gained = passed.saturating_mul(u128::from(self.rate));
        let gained = i128::try_from(gained).unwrap_or(i128::MAX);
        self.level = self.level.saturating_add(gained).min(billionths(self.most));
        let missing = billionths(tokens.min(self.most)).saturating_sub(self.level);
        let Ok(missing @ 1..) = u128::try_from(missing) else { return Duration::ZERO };
        let nanoseconds = missing.div_ceil(u128::from(self.rate).max(1));
        Duration::from_nanos(u64::try_from(nanoseconds).unwrap_or(u64::MAX))
    }

    /// Spends tokens, whether they are there or not.
    pub fn spend(&mut self, tokens: u64) {
        self.level = self.level.saturating_sub(billionths(tokens));
    }
}

fn billionths(tokens: u64) -> i128 {
    // Less than 2^94.
    (u128::from(tokens) * SECOND) as i128
}

/// How much of one kind may happen.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rate {
    /// In each second, over time.
    pub per_second: u64,
    /// At once, after a silence.
    pub burst: u64,
}

/// What a device may do for its guest; `None` is no limit.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RateLimits {
    /// Requests of a disk, packets of a network card.
    pub operations: Option<Rate>,
    /// What is in them.
    pub bytes: Option<Rate>,
}

/// Holds a device to its limits.
#[derive(Clone, Copy, Debug)]
pub struct Limiter {
    operations: Option<Bucket>,
    bytes: Option<Bucket>,
}

impl Limiter {
    /// With full buckets.
    pub fn new(limits: RateLimits, now: Instant) -> Self {
        let bucket = |rate: Option<Rate>| rate.map(|rate| Bucket::new(rate.per_second, rate.burst, now));
        Self { operations: bucket(limits.operations), bytes: bucket(limits.bytes) }
    }

    /// How long to wait until one more operation may be begun, whatever it will be; zero where it may be now.
    pub fn wait(&mut self, now: Instant) -> Duration {
        let wait = |bucket: &mut Option<Bucket>| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait_for(1, now))
        };
        wait(&mut self.operations).max(wait(&mut self.bytes))
    }

    /// Counts one operation of so many bytes, which was begun after no [`wait`](Self::wait): the next ones wait for
    /// what was not there for it.
    pub fn spend(&mut self, bytes: u64) {
        for (bucket, tokens) in [(&mut self.operations, 1), (&mut self.bytes, bytes)] {
            if let Some(bucket) = bucket {
                bucket.spend(tokens);
            }
        }
    }

    /// Counts one operation of so many bytes, if it may be done now.
    ///
    /// # Errors
    /// How long to wait until it is worth asking again. Nothing was counted.
    pub fn pass(&mut self, bytes: u64, now: Instant) -> Result<(), Duration> {
        let wait = |bucket: &mut Option<Bucket>, tokens| {
            bucket.as_mut().map_or(Duration::ZERO, |bucket| bucket.wait_for(tokens, now))
        };
        let longest = wait(&mut self.operations, 1).max(wait(&mut self.bytes, bytes));
        if !longest.is_zero() {
            return Err(longest);
        }
        self.spend(bytes);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn no_more_than_its_level_and_its_rate(
            rate in 1u64..50, most in 1u64..50, pauses in prop::collection::vec(0u64..200, 1..300),
        ) {
            let start = Instant::now();
            let mut bucket = Bucket::new(rate, most, start);
            let mut now = start;
            let mut taken = 0;
            for pause in pauses {
                now += Duration::from_millis(pause);
                taken += u128::from(bucket.take(now));
                let most = u128::from(most) * SECOND + (now - start).as_nanos() * u128::from(rate);
                prop_assert!(taken * SECOND <= most);
            }
        }

        /// Requests of any size, each asked for again when the limiter said so, pass at the rate and never later.
        #[test]
        fn what_waits_as_long_as_it_is_told_passes(
            rate in 1u64..100_000, burst in 1u64..5_000, sizes in prop::collection::vec(0u64..20_000, 1..60),
        ) {
            let start = Instant::now();
            let bytes = Some(Rate { per_second: rate, burst });
            let mut limiter = Limiter::new(RateLimits { operations: None, bytes }, start);
            let mut now = start;
            let mut passed = 0u128;
            for size in sizes {
                if let Err(wait) = limiter.pass(size, now) {
                    now += wait;
                    prop_assert_eq!(limiter.pass(size, now), Ok(()));
                }
                // What is larger than the bucket is a debt that the next one waits for.
                let most = u128::from(burst) * SECOND + (now - start).as_nanos() * u128::from(rate);
                prop_assert!(passed * SECOND <= most, "{passed} {most}");
                passed += u128::from(size);
            }
        }
    }

    #[test]
    fn it_refills() {
        let start = Instant::now();
        let mut bucket = Bucket::new(2, 3, start);
        let taken = |bucket: &mut Bucket, now| (0..10).filter(|_| bucket.take(now)).count();
        assert_eq!(taken(&mut bucket, start), 3);
        assert_eq!(taken(&mut bucket, start + Duration::from_millis(500)), 1);
        assert_eq!(taken(&mut bucket, start + Duration::from_secs(3600)), 3);
        assert_eq!(taken(&mut bucket, start), 0, "a clock that goes back gives nothing");
    }

    #[test]
    fn the_tighter_limit_decides_and_nothing_is_counted_twice() {
        let start = Instant::now();
        let rate = |per_second, burst| Some(Rate { per_second, burst });
        let limits = RateLimits { operations: rate(10, 2), bytes: rate(1000, 1000) };
        let mut limiter = Limiter::new(limits, start);
        assert_eq!(limiter.pass(100, start), Ok(()));
        // Too many bytes: the operation is not counted either.
        assert_eq!(limiter.pass(1000, start), Err(Duration::from_millis(100)));
        assert_eq!(limiter.pass(100, start), Ok(()));
        assert_eq!(limiter.pass(100, start), Err(Duration::from_millis(100)));
        // More than the bucket holds passes when it is full.
        assert_eq!(limiter.pass(5000, start + Duration::from_millis(200)), Ok(()));
        assert_eq!(limiter.pass(1, start + Duration::from_millis(4200)), Err(Duration::from_millis(1)));
        assert_eq!(limiter.pass(1, start + Duration::from_millis(4201)), Ok(()));
    }
}
