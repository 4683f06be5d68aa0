//! How often something may happen: a token bucket.

use std::time::Instant;

/// Nanoseconds in a second.
const SECOND: u128 = 1_000_000_000;

/// Fills with tokens at a steady rate up to a level; each event takes one.
#[derive(Clone, Copy, Debug)]
pub struct Bucket {
    rate: u32,
    most: u32,
    /// Tokens in billionths.
    level: u128,
    filled_at: Instant,
}

impl Bucket {
    /// A full bucket of `most` tokens that gets `rate` of them a second.
    pub fn new(rate: u32, most: u32, now: Instant) -> Self {
        Self { rate, most, level: u128::from(most) * SECOND, filled_at: now }
    }

    /// Takes a token, if there is one.
    pub fn take(&mut self, now: Instant) -> bool {
        let passed = now.saturating_duration_since(self.filled_at).as_nanos();
        self.filled_at = self.filled_at.max(now);
        let gained = passed.saturating_mul(u128::from(self.rate));
        self.level = self.level.saturating_add(gained).min(u128::from(self.most) * SECOND);
        match self.level.checked_sub(SECOND) {
            Some(left) => {
                self.level = left;
                true
            }
            None => false,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::time::Duration;

    proptest! {
        #[test]
        fn no_more_than_its_level_and_its_rate(
            rate in 1u32..50, most in 1u32..50, pauses in prop::collection::vec(0u64..200, 1..300),
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
}
