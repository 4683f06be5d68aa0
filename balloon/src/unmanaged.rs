//! What of a guest's memory its kernel does not manage, as its reports tell with time. Pure: no clock.
//!
//! Memory that was plugged is put on line a moment later, by the kernel itself or by a program. Only what
//! is not on line after [`ONLINE_PATIENCE`] counts as unmanaged.

use std::time::{Duration, Instant};

use api::guest_memory::Had;
use api::units::Bytes;

/// How long a guest may take to put plugged memory on line.
pub const ONLINE_PATIENCE: Duration = Duration::from_secs(5);

/// Changes below this are none: a driver's figures may lie some batches of pages apart.
const NOISE: Bytes = Bytes::mib(4);

/// What one driver's guest does not manage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Unmanaged {
    counted: Option<Counted>,
    /// Memory that was plugged did not come on line, and none has since.
    stays_off_line: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Counted {
    all: Bytes,
    /// What of that has nothing to do with what is plugged.
    fixed: Bytes,
    plugged: Bytes,
    /// When that last changed.
    since: Instant,
}

impl Unmanaged {
    /// What was counted elsewhere, of a driver that goes on.
    pub fn resumed(all: Bytes, off_line: Bytes, now: Instant) -> Option<Self> {
        let fixed = Bytes(all.0.checked_sub(off_line.0)?);
        let counted = Counted { all, fixed, plugged: Bytes::ZERO, since: now };
        Some(Self { counted: Some(counted), stays_off_line: false })
    }

    /// Takes in a report of a guest that has `plugged` beside what it booted with.
    pub fn report(&mut self, now: Instant, had: &Had, plugged: Bytes) {
        let seen = had.unmanaged;
        let Some(counted) = &mut self.counted else {
            // A guest that starts with plugged memory has not got it on line yet.
            let fixed = seen.saturating_sub(plugged);
            self.counted = Some(Counted { all: seen, fixed, plugged, since: now });
            return;
        };
        if counted.plugged != plugged {
            (counted.plugged, counted.since) = (plugged, now);
        }
        counted.fixed = counted.fixed.min(seen);
        let is_new = seen.0.abs_diff(counted.all.0) >= NOISE.0 || seen == Bytes::ZERO;
        let fell = seen < counted.all;
        if is_new && (fell || now.saturating_duration_since(counted.since) >= ONLINE_PATIENCE) {
            counted.all = seen;
        }
        if plugged > Bytes::ZERO {
            let off_line = counted.all.saturating_sub(counted.fixed);
            let all_on_line = seen.saturating_sub(counted.fixed) < NOISE;
            self.stays_off_line = off_line >= NOISE || self.stays_off_line && !all_on_line;
        }
    }

    /// All of it.
    pub fn all(&self) -> Bytes {
        self.counted.map_or(Bytes::ZERO, |counted| counted.all)
    }

    /// What of it was plugged and is not on line.
    pub fn off_line(&self) -> Bytes {
        self.counted.map_or(Bytes::ZERO, |counted| counted.all.saturating_sub(counted.fixed))
    }

    /// Whether more plugged memory would not come on line either: the last did not, and no other has.
    pub fn stays_off_line(&self) -> bool {
        self.stays_off_line
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MAP: Bytes = Bytes::gib(1);

    /// A guest that was given so many MiB, and of them manages so many.
    fn had(given: u64, managed: u64) -> Had {
        Had::of(MAP, Bytes::mib(given), Bytes::mib(managed))
    }

    #[test]
    fn a_limit_of_the_guests_own_counts_with_its_first_report() {
        let now = Instant::now();
        let mut unmanaged = Unmanaged::default();
        unmanaged.report(now, &had(1024, 219), Bytes::ZERO);
        assert!(unmanaged.all() > Bytes::mib(650), "{unmanaged:?}");
        assert_eq!((unmanaged.off_line(), unmanaged.stays_off_line()), (Bytes::ZERO, false));
        // Batches of pages on their way move nothing.
        let before = unmanaged;
        unmanaged.report(now, &had(1024, 221), Bytes::ZERO);
        assert_eq!(unmanaged.all(), before.all());
        // It puts memory off line by hand: that is no matter of patience.
        unmanaged.report(now + ONLINE_PATIENCE, &had(1024, 100), Bytes::ZERO);
        assert!(unmanaged.all() > before.all());
    }

    #[test]
    fn what_was_plugged_has_some_time_to_come_on_line() {
        let now = Instant::now();
        let after = |seconds| now + Duration::from_secs(seconds);
        let plugged = Bytes::mib(444);
        let mut unmanaged = Unmanaged::default();
        unmanaged.report(now, &had(256, 219), Bytes::ZERO);
        for seconds in [1, 5] {
            unmanaged.report(after(seconds), &had(700, 219), plugged);
            assert_eq!(unmanaged.all(), Bytes::ZERO, "{seconds} s");
        }
        let mut late = unmanaged;
        late.report(after(6), &had(700, 660), plugged);
        assert_eq!((late.all(), late.stays_off_line()), (Bytes::ZERO, false));
        unmanaged.report(after(6), &had(700, 219), plugged);
        assert!(unmanaged.off_line() > Bytes::mib(350), "{unmanaged:?}");
        assert!(unmanaged.stays_off_line());
        // It is unplugged again, and so nothing is off line; another block would be, for all that is known.
        unmanaged.report(after(7), &had(256, 219), Bytes::ZERO);
        assert_eq!((unmanaged.all(), unmanaged.stays_off_line()), (Bytes::ZERO, true));
        unmanaged.report(after(8), &had(300, 262), Bytes::mib(44));
        assert!(!unmanaged.stays_off_line(), "that one is on line");
    }

    #[test]
    fn a_guest_that_starts_with_plugged_memory_takes_it_on_line() {
        let now = Instant::now();
        let plugged = Bytes::mib(512);
        let mut unmanaged = Unmanaged::default();
        // crashkernel=160M of the 512 MiB that it booted with.
        unmanaged.report(now, &had(1024, 310), plugged);
        let off_line = unmanaged.off_line();
        assert!(off_line >= plugged, "{unmanaged:?}");
        unmanaged.report(now, &had(1024, 820), plugged);
        assert!(unmanaged.off_line() < NOISE && unmanaged.all() > Bytes::ZERO, "{unmanaged:?}");
    }
}
