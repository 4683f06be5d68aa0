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
//!    memory lies scattered. It does not take more at the same time as the guest unplugs:
//!    Linux takes the pages for it from the very blocks that are to go.
//!
//! Plugging takes a guest's time, and its kernel kills a process in less. So a [`cushion`] is plugged
//! beyond the target and lies in the balloon: it costs the host nothing, and a guest
//! that runs out of memory has it at once (deflate-on-OOM). It leaves the balloon while much is unplugged, and
//! comes back afterwards: its pages lie all over the blocks that are to go, and Linux moves each of them by
//! asking the balloon for another, some 5 MiB/s.
//!
//! A VM without pluggable memory has the balloon alone.
//!
//! What the guest's kernel does not manage is none of the memory that it is to have. What of its boot memory
//! that is counts as not there; what was plugged and is not on line can be unplugged, and no balloon takes it.

pub mod steering;

use std::time::Duration;

use api::status::UNPLUG_PATIENCE;
use api::units::Bytes;

/// Of a guest's target its cushion is this part,
const CUSHION_PART: u64 = 4;
/// at least so much: half a second of a program that fills memory at 64 MiB/s,
const CUSHION_LEAST: Bytes = Bytes::mib(32);
/// and at most so much: it is what a guest can have beyond the budget.
const CUSHION_MOST: Bytes = Bytes::mib(256);

/// Of a cushion so much is plugged before the balloon holds the rest: meanwhile the guest could use it.
const AHEAD: Bytes = Bytes::mib(16);

/// Less than this is unplugged around the cushion: moving that would be more work.
const AROUND: Bytes = Bytes::mib(16);

/// What to keep plugged beyond `target` for a guest that may have `max`. So much less is
/// plugged of it as the target lies below what the guest booted with: the balloon holds that anyway.
pub fn cushion(target: Bytes, max: Bytes) -> Bytes {
    cushion_of(target).min(max.saturating_sub(target))
}

fn cushion_of(target: Bytes) -> Bytes {
    Bytes(target.0 / CUSHION_PART).clamp(CUSHION_LEAST, CUSHION_MOST)
}

/// How a guest's memory stands, as far as it matters for what to do next.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Standing {
    /// What it booted with, as far as its kernel manages that.
    pub boot: Bytes,
    /// What memory is plugged in.
    pub block: Bytes,
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
    /// What its balloon holds, as its driver says.
    pub balloon: Bytes,
    /// What to keep plugged beyond the target. None for a guest whose balloon would not hold it.
    pub cushion: Bytes,
    /// What of the cushion has left the balloon for an unplugging and is still counted as there.
    pub let_go: Bytes,
}

/// What to ask of the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Steps {
    /// What it should have plugged, in whole blocks.
    pub requested: Bytes,
    /// What its balloon should hold.
    pub held: Bytes,
    /// What of the cushion is out of the balloon, and counts as there until it is again.
    pub let_go: Bytes,
    /// When to look again if nothing happens until then.
    pub look_again: Option<Duration>,
}

/// What to ask of a guest that shall have `target`, which lies at a whole block above the boot
/// memory, or below it.
pub fn steps(standing: Standing, target: Bytes) -> Steps {
    let Standing { boot, block, plugged, off_line, driver, waited, held, balloon, cushion, let_go } =
        standing;
    let beyond = |target: Bytes, more| whole_blocks(target.saturating_add(more).saturating_sub(boot), block);
    let whole = beyond(target, cushion);
    // A guest that has taken from its cushion does not get the rest of it in other pages.
    let allowed = beyond(target, balloon.saturating_add(AHEAD.max(block)));
    let requested = whole.min(allowed.max(plugged));
    let surplus = plugged.saturating_sub(requested);
    // With what is plugged now, the balloon must hold so much for the target to be met.
    let has = boot.saturating_add(plugged.saturating_sub(off_line));
    let needed = has.saturating_sub(target);
    let moves = driver && waited < UNPLUG_PATIENCE;
    if moves && lets_go(standing, has, target, surplus) {
        let let_go = let_go.max(held).min(needed);
        let look_again = Some(UNPLUG_PATIENCE.saturating_sub(waited));
        return Steps { requested, held: Bytes::ZERO, let_go, look_again };
    }
    let held = if surplus > Bytes::ZERO && moves { needed.min(held) } else { needed };
    let patience = UNPLUG_PATIENCE.saturating_mul(2);
    let let_go = if balloon < held && waited < patience { let_go.min(held) } else { Bytes::ZERO };
    let look_again = if held < needed {
        Some(UNPLUG_PATIENCE.saturating_sub(waited))
    } else {
        (let_go > Bytes::ZERO).then(|| patience.saturating_sub(waited))
    };
    Steps { requested, held, let_go, look_again }
}

/// Whether the cushion is out of the balloon, as `surplus` is to be unplugged or was a moment ago.
fn lets_go(standing: Standing, has: Bytes, target: Bytes, surplus: Bytes) -> bool {
    let Standing { held, cushion, let_go, .. } = standing;
    // One that is to have more than it has needs it from the cushion, and one that has none lets nothing go.
    if cushion == Bytes::ZERO || has.saturating_sub(let_go.max(held)) < target {
        return false;
    }
    // A balloon that holds more makes up for what could not be unplugged before, and can't now.
    let is_cushion = held <= cushion.max(cushion_of(has.saturating_sub(held)));
    let_go > Bytes::ZERO || (held > Bytes::ZERO && surplus >= AROUND && is_cushion)
}

fn whole_blocks(amount: Bytes, block: Bytes) -> Bytes {
    Bytes(amount.0.checked_div(block.0).unwrap_or(0).saturating_mul(block.0))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BOOT: Bytes = Bytes::mib(256);
    const BLOCK: Bytes = Bytes::mib(2);
    const MAX: Bytes = Bytes::gib(2);

    fn standing(plugged: u64) -> Standing {
        Standing {
            boot: BOOT,
            block: BLOCK,
            plugged: Bytes::mib(plugged),
            off_line: Bytes::ZERO,
            driver: true,
            waited: Duration::ZERO,
            held: Bytes::ZERO,
            balloon: Bytes::gib(1),
            cushion: Bytes::ZERO,
            let_go: Bytes::ZERO,
        }
    }

    #[test]
    fn growing_plugs() {
        let grown = steps(standing(0), Bytes::gib(1));
        let asked =
            Steps { requested: Bytes::mib(768), held: Bytes::ZERO, let_go: Bytes::ZERO, look_again: None };
        assert_eq!(grown, asked);
    }

    #[test]
    fn shrinking_unplugs_first_and_the_balloon_takes_what_is_left() {
        let target = Bytes::mib(200);
        let first = steps(standing(512), target);
        assert_eq!(
            first,
            Steps {
                requested: Bytes::ZERO,
                held: Bytes::ZERO,
                let_go: Bytes::ZERO,
                look_again: Some(UNPLUG_PATIENCE)
            }
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

    #[test]
    fn a_cushion_is_plugged_beyond_the_target_and_lies_in_the_balloon() {
        let cushion = Bytes::mib(64);
        let at = |plugged, held| Standing { cushion, held: Bytes::mib(held), ..standing(plugged) };
        let asked = |standing, target| {
            let Steps { requested, held, .. } = steps(standing, Bytes::mib(target));
            (requested.0 >> 20, held.0 >> 20)
        };
        // As it boots, and as it plugs.
        assert_eq!(asked(at(0, 0), 256), (64, 0));
        assert_eq!(asked(at(20, 0), 256), (64, 20));
        assert_eq!(asked(at(64, 20), 256), (64, 64));
        // More is wanted: what is there goes at once, and comes again by plugging.
        assert_eq!(asked(at(64, 64), 296), (104, 24));
        assert_eq!(asked(at(104, 24), 296), (104, 64));
        // Some unplugging leaves it alone, and the balloon takes no more meanwhile.
        assert_eq!(asked(at(78, 64), 256), (64, 64));
        // The balloon has to keep up,
        let slow = |plugged, balloon| Standing { balloon: Bytes::mib(balloon), ..at(plugged, plugged) };
        assert_eq!(asked(slow(0, 0), 256), (16, 0));
        assert_eq!(asked(slow(16, 10), 256), (26, 16));
        assert_eq!(asked(slow(26, 26), 256), (42, 26));
        // which it does not for a guest that has taken from it and is granted less than it took.
        assert_eq!(asked(slow(64, 24), 276), (64, 44));
        assert_eq!(asked(slow(64, 24), 296), (80, 24));
        // Below the boot memory, the balloon holds a part of it anyway.
        assert_eq!(asked(at(64, 64), 216), (24, 0));
        assert_eq!(asked(at(24, 64), 216), (24, 64));
        assert_eq!(asked(at(0, 64), 100), (0, 156));
    }

    #[test]
    fn a_cushion_is_out_of_the_way_of_an_unplugging() {
        let cushion = Bytes::mib(64);
        let at = |plugged, held, let_go| Standing {
            cushion,
            held: Bytes::mib(held),
            balloon: Bytes::mib(held),
            let_go: Bytes::mib(let_go),
            ..standing(plugged)
        };
        let asked = |standing, target| {
            let Steps { requested, held, let_go, .. } = steps(standing, Bytes::mib(target));
            (requested.0 >> 20, held.0 >> 20, let_go.0 >> 20)
        };
        let late = |standing| Standing { waited: UNPLUG_PATIENCE, ..standing };
        assert_eq!(asked(at(104, 64, 0), 256), (64, 0, 64));
        assert_eq!(asked(at(78, 0, 64), 256), (64, 0, 64));
        // It stays out a while, as more may have to go.
        assert_eq!(asked(at(64, 0, 64), 256), (64, 0, 64));
        assert_eq!(asked(late(at(64, 0, 64)), 256), (64, 64, 64));
        assert_eq!(asked(late(at(64, 64, 64)), 256), (64, 64, 0));
        // A guest that keeps it counts as having it in the end.
        let kept = Standing { balloon: Bytes::mib(8), waited: UNPLUG_PATIENCE * 2, ..at(64, 64, 64) };
        assert_eq!(asked(kept, 256), (64, 64, 0));
        // One that is to have more gets it from there.
        assert_eq!(asked(at(64, 0, 64), 280), (64, 40, 40));
        // The larger one of a larger target goes as well, but nothing that could not be unplugged.
        assert_eq!(asked(at(1024, 256, 0), 256), (64, 0, 256));
        assert_eq!(asked(at(104, 120, 0), 200), (8, 120, 0));
    }

    #[test]
    fn a_cushion_is_a_part_of_the_target_within_bounds() {
        let of = |target, max| cushion(Bytes::mib(target), Bytes::mib(max)).0 >> 20;
        assert_eq!((of(112, 384), of(256, 1024), of(4096, 8192)), (32, 64, 256));
        assert_eq!((of(370, 384), of(384, 384), of(400, 384)), (14, 0, 0));
    }

    proptest! {
        #[test]
        fn a_guest_that_does_as_it_is_asked_has_its_target(
            plugged in 0u64..600, target in 64u64..2000, driver: bool, waited in 0u64..4, held in 0u64..600,
            with_cushion: bool,
        ) {
            let target = Bytes::mib(if target > 256 { target & !1 } else { target });
            let cushion = if with_cushion { cushion(target, MAX) } else { Bytes::ZERO };
            let standing = Standing {
                driver,
                waited: Duration::from_secs(waited),
                held: Bytes::mib(held),
                cushion,
                ..standing(plugged & !1)
            };
            let Steps { requested, held, let_go, look_again } = steps(standing, target);
            prop_assert!(requested.0.is_multiple_of(BLOCK.0));
            // It has unplugged all that it was asked to, and rests.
            let settled = Standing { plugged: requested, waited: UNPLUG_PATIENCE, held, let_go, ..standing };
            let done = steps(settled, target);
            prop_assert_eq!(BOOT + requested - done.held, target);
            prop_assert_eq!((done.requested, done.look_again), (requested, None));
            // The balloon holds the cushion, as far as whole blocks go, and nothing else of what is plugged.
            prop_assert!(requested <= target.saturating_add(cushion).saturating_sub(BOOT));
            prop_assert!(done.held.saturating_add(BLOCK) > cushion);
            prop_assert!(done.held <= cushion.max(BOOT.saturating_sub(target)));
            // Nothing moves any more.
            prop_assert_eq!(steps(Standing { held: done.held, ..settled }, target), done);
            // It can't unplug: the balloon makes up for it in the end.
            let stuck = steps(Standing { waited: UNPLUG_PATIENCE, held, ..standing }, target);
            let has = BOOT + standing.plugged;
            prop_assert_eq!(has - stuck.held, target.min(has));
            // Before that the balloon never takes more than is too much.
            prop_assert!(has - held.max(let_go) >= target.min(has));
            prop_assert_eq!(look_again.is_some(), held != stuck.held);
        }

        /// However a guest plugs and unplugs, some blocks at a time, and whatever its balloon has got to: it is at
        /// rest after as many rounds as it has blocks to move.
        #[test]
        fn it_comes_to_rest(plugged in 0u64..600, target in 64u64..2000, held in 0u64..600, pace in 1u64..64) {
            let target = Bytes::mib(if target > 256 { target & !1 } else { target });
            let mut now = Standing {
                cushion: cushion(target, MAX), held: Bytes::mib(held), ..standing(plugged & !1)
            };
            let (mut seen, mut rounds) = (None, 0);
            while seen != Some(now) {
                seen = Some(now);
                let Steps { requested, held, let_go, .. } = steps(now, target);
                let most = Bytes(BLOCK.0 * pace);
                let near = |to: Bytes, now: Bytes| to.clamp(now.saturating_sub(most), now.saturating_add(most));
                let (plugged, balloon) = (near(requested, now.plugged), near(held, now.balloon));
                prop_assert!(plugged <= now.plugged || BOOT + plugged <= target + now.balloon + AHEAD);
                let waited = if seen == Some(Standing { plugged, held, balloon, let_go, ..now }) {
                    UNPLUG_PATIENCE
                } else {
                    now.waited
                };
                now = Standing { plugged, held, balloon, let_go, waited, ..now };
                rounds += 1;
                prop_assert!(rounds <= 4000);
            }
            prop_assert_eq!(BOOT + now.plugged - now.held, target);
        }
    }
}
