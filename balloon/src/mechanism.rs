//! By which means a guest reaches its target. Pure: no clock, no device here;
//! [`steering`] does what it says.
//!
//! Memory that the guest frees goes back to the host by itself, where the
//! guest reports free pages. Beyond that:
//!
//! 1. **Growing** plugs memory up to the target and lets go of the balloon.
//! 2. **Shrinking** asks it to unplug: blocks of 2 MiB go whole, and the host
//!    need not trust that they stay gone.
//! 3. **The balloon** takes what is left: what lies below the boot memory, and
//!    what the guest could not unplug once it has made no progress for
//!    [`UNPLUG_PATIENCE`]. It works page by page, and can squeeze a guest whose free
//!    memory lies scattered. It does not work at the same time as unplugging:
//!    Linux takes the pages for it from the very blocks that are to go.
//!
//! A VM without pluggable memory has the balloon alone.
//!
//! What the guest's kernel does not manage is none of the memory that it is to have. What of its boot memory
//! that is counts as not there; what was plugged and is not on line can be unplugged, and no balloon takes it.

pub mod steering;

use std::time::Duration;

use api::status::UNPLUG_PATIENCE;
use api::units::Bytes;

/// How a guest's memory stands, as far as it matters for what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it booted with, as far as its kernel manages that.
    pub boot: Bytes,
    /// What it has plugged.
    pub plugged: Bytes,
    /// What of that is not on line.
    pub off_line: Bytes,
    /// Whether it has a driver that could unplug.
    pub driver: bool,
    /// How long ago it last plugged or unplugged, or was asked for something new.
    pub waited: Duration,
    /// What its balloon was last asked to hold.
    pub held: Bytes,
}

/// What to ask of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// What it should have plugged.
    pub requested: Bytes,
    /// What its balloon should hold.
    pub held: Bytes,
    /// When to look again if nothing happens until then.
    pub look_again: Option<Duration>,
}

/// What to ask of a guest that shall have `target`, which lies at a whole block above the boot
/// memory, or below it.
pub fn steps(standing: Standing, target: Bytes) -> Steps {
    let requested = target.saturating_sub(standing.boot);
    let surplus = standing.plugged.saturating_sub(requested);
    // With what is plugged now, the balloon must hold so much for the target to be met.
    let has = standing.boot.saturating_add(standing.plugged.saturating_sub(standing.off_line));
    let needed = has.saturating_sub(target);
    let unplugs = surplus > Bytes::ZERO && standing.driver && standing.waited < UNPLUG_PATIENCE;
    let held = if unplugs { needed.min(standing.held) } else { needed };
    let look_again = (held < needed).then(|| UNPLUG_PATIENCE.saturating_sub(standing.waited));
    Steps { requested, held, look_again }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOOT: Bytes = Bytes::mib(256);

    fn standing(plugged: u64) -> Standing {
        Standing {
            boot: BOOT,
            plugged: Bytes::mib(plugged),
            off_line: Bytes::ZERO,
            driver: true,
            waited: Duration::ZERO,
            held: Bytes::ZERO,
        }
    }

    #[test]
    fn growing_plugs() {
        let grown = steps(standing(0), Bytes::gib(1));
        assert_eq!(grown, Steps { requested: Bytes::mib(768), held: Bytes::ZERO, look_again: None });
    }

    #[test]
    fn shrinking_unplugs_first_and_the_balloon_takes_what_is_left() {
        let target = Bytes::mib(200);
        let first = steps(standing(512), target);
        assert_eq!(
            first,
            Steps { requested: Bytes::ZERO, held: Bytes::ZERO, look_again: Some(UNPLUG_PATIENCE) }
        );
        // All went: the rest lies below the boot memory.
        assert_eq!(steps(standing(0), target).held, Bytes::mib(56));
        // 100 MiB won't go.
        let second = steps(Standing { waited: UNPLUG_PATIENCE, ..standing(100) }, target);
        assert_eq!((second.held, second.look_again), (Bytes::mib(156), None));
        // One more block goes after all: the balloon gives back as much, and no more.
        let third = steps(Standing { held: second.held, ..standing(98) }, target);
        assert_eq!((third.held, third.look_again), (Bytes::mib(154), None));
        // A guest that may grow again gets the balloon's part first.
        let fourth = steps(Standing { held: third.held, ..standing(98) }, Bytes::mib(300));
        assert_eq!((fourth.requested, fourth.held), (Bytes::mib(44), Bytes::mib(54)));
    }

    #[test]
    fn what_is_not_on_line_is_unplugged_and_never_ballooned() {
        let off_line = Standing { off_line: Bytes::mib(400), ..standing(444) };
        let asked = steps(off_line, Bytes::mib(200));
        assert_eq!((asked.requested, asked.held), (Bytes::ZERO, Bytes::ZERO));
        // It can't be unplugged, and 300 MiB are all that the guest has.
        let stuck = steps(Standing { waited: UNPLUG_PATIENCE, ..off_line }, Bytes::mib(200));
        assert_eq!(stuck.held, Bytes::mib(100));
    }

    #[test]
    fn without_a_driver_nobody_waits() {
        let left = steps(Standing { driver: false, ..standing(64) }, BOOT);
        assert_eq!((left.held, left.look_again), (Bytes::mib(64), None));
    }

    proptest! {
        #[test]
        fn a_guest_that_does_as_it_is_asked_has_its_target(
            plugged in 0u64..600, target in 64u64..2000, driver: bool, waited in 0u64..4, held in 0u64..600,
        ) {
            let target = Bytes::mib(target);
            let standing = Standing {
                driver, waited: Duration::from_secs(waited), held: Bytes::mib(held), ..standing(plugged)
            };
            let Steps { requested, held, look_again } = steps(standing, target);
            // It has unplugged all that it was asked to.
            let settled = Standing { plugged: requested, waited: Duration::ZERO, held, ..standing };
            let done = steps(settled, target);
            prop_assert_eq!(BOOT + requested - done.held, target);
            prop_assert_eq!(done.look_again, None);
            // It can't unplug: the balloon makes up for it in the end.
            let stuck = steps(Standing { waited: UNPLUG_PATIENCE, held, ..standing }, target);
            prop_assert_eq!(BOOT + standing.plugged.max(requested) - stuck.held, target);
            // Before that the balloon never takes more than is too much.
            prop_assert!(BOOT + standing.plugged.max(requested) - held >= target);
            prop_assert_eq!(look_again.is_some(), held != stuck.held);
        }
    }
}
