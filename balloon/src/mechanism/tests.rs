use proptest::collection::vec;
use proptest::prelude::*;

use super::cushioned::{PIECE, REST};
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
        max: MAX,
        cushion: None,
        phase: Phase::CALM,
    }
}

/// One with a cushion of 64 MiB whose balloon holds what it was asked to.
fn cushioned(plugged: u64, held: u64) -> Standing {
    let held = Bytes::mib(held);
    Standing { cushion: Some(Bytes::mib(64)), held, balloon: held, ..standing(plugged) }
}

/// What it is asked for, in MiB: to have plugged, to hold in the balloon; and what counts as there.
fn asked(standing: Standing, target: u64) -> (u64, u64, u64) {
    let Steps { requested, held, phase, .. } = steps(standing, Bytes::mib(target));
    (requested.0 >> 20, held.0 >> 20, phase.let_go().0 >> 20)
}

#[test]
fn growing_plugs() {
    let grown = steps(standing(0), Bytes::gib(1));
    let asked = Steps { requested: Bytes::mib(768), held: Bytes::ZERO, phase: Phase::CALM, look_again: None };
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
            phase: Phase::CALM,
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
    let left = Standing { driver: false, waited: REST, ..cushioned(600, 600) };
    assert_eq!(asked(left, 256), (600, 600, 0), "one that comes finds what is there");
}

#[test]
fn a_cushion_is_plugged_beyond_the_target_and_lies_in_the_balloon() {
    // As it boots, and as it plugs.
    let at = |plugged, held| Standing { balloon: Bytes::gib(1), ..cushioned(plugged, held) };
    assert_eq!(asked(at(0, 0), 256), (64, 0, 0));
    assert_eq!(asked(at(20, 0), 256), (64, 20, 0));
    assert_eq!(asked(at(64, 20), 256), (64, 64, 0));
    // More is wanted: what is there goes at once, and comes again by plugging.
    assert_eq!(asked(at(64, 64), 296), (104, 24, 0));
    assert_eq!(asked(at(104, 24), 296), (104, 64, 0));
    // The balloon has to keep up,
    let slow = |plugged, balloon| Standing { balloon: Bytes::mib(balloon), ..at(plugged, plugged) };
    assert_eq!(asked(slow(0, 0), 256), (16, 0, 0));
    assert_eq!(asked(slow(16, 10), 256), (26, 16, 0));
    assert_eq!(asked(slow(26, 26), 256), (42, 26, 0));
    // which it does not for a guest that has taken from it and is granted less than it took.
    assert_eq!(asked(slow(64, 24), 276), (64, 44, 0));
    assert_eq!(asked(slow(64, 24), 296), (80, 24, 0));
    // Below the boot memory, the balloon holds a part of it anyway.
    assert_eq!(asked(at(0, 0), 216), (24, 40, 0));
    assert_eq!(asked(at(0, 64), 100), (0, 156, 0));
}

#[test]
fn what_falls_little_by_little_goes_to_the_balloon_and_is_unplugged_in_one_piece() {
    let rested = |standing| Standing { waited: REST, ..standing };
    // Less than a piece stays, however long.
    assert_eq!(asked(cushioned(160, 64), 256), (160, 160, 0));
    assert_eq!(asked(rested(cushioned(160, 160)), 256), (160, 160, 0));
    // A piece waits until nothing is asked of the guest any more.
    let piece = steps(cushioned(192, 160), BOOT);
    assert_eq!(
        (piece.requested, piece.held, piece.look_again),
        (Bytes::mib(192), Bytes::mib(192), Some(REST))
    );
    assert_eq!(asked(rested(cushioned(192, 192)), 256), (192, 0, 192), "its balloon lets go first");
    // One that has taken some of it, or could not give it, has nothing to unplug.
    let taken = Standing { balloon: Bytes::mib(100), ..rested(cushioned(192, 192)) };
    assert_eq!(asked(taken, 256), (192, 192, 0));
    // So much falls at once that the balloon would have more work with it.
    assert_eq!(asked(cushioned(600, 64), 256), (600, 0, 64));
    assert_eq!(asked(cushioned(600, 0), 256), (64, 0, 0));
    assert_eq!(asked(cushioned(600, 500), 256), (600, 600, 0));
    // It may have less than it has.
    assert_eq!(asked(Standing { max: Bytes::mib(400), ..cushioned(160, 64) }, 256), (160, 0, 64));
}

#[test]
fn a_cushion_is_out_of_the_way_of_an_unplugging() {
    let at = |plugged, let_go| Standing {
        phase: Phase::Unplugging { let_go: Bytes::mib(let_go) },
        ..cushioned(plugged, 0)
    };
    let late = |standing| Standing { waited: UNPLUG_PATIENCE, ..standing };
    let lets_go = Standing { balloon: Bytes::mib(100), waited: UNPLUG_PATIENCE, ..at(192, 192) };
    assert_eq!(asked(lets_go, 256), (192, 0, 192));
    assert_eq!(asked(Standing { waited: cushioned::EMPTY_PATIENCE, ..lets_go }, 256), (192, 192, 0));
    assert_eq!(asked(at(192, 192), 256), (64, 0, 192));
    // It counts as having its target all the while, and a larger one at once.
    assert_eq!(asked(at(100, 192), 256), (64, 0, 100));
    assert_eq!(asked(at(100, 192), 280), (88, 0, 76));
    // Then the balloon fills again, and counts as full until it is.
    assert_eq!(asked(at(64, 66), 256), (64, 64, 64));
    let fills = |balloon| Standing {
        balloon: Bytes::mib(balloon),
        phase: Phase::Refilling { let_go: Bytes::mib(64), stuck: Bytes::ZERO },
        ..cushioned(64, 64)
    };
    assert_eq!(asked(fills(20), 256), (64, 64, 64));
    assert_eq!(asked(fills(64), 256), (64, 64, 0));
    // A guest that keeps it counts as having it in the end.
    assert_eq!(asked(Standing { waited: cushioned::REFILL_PATIENCE, ..fills(20) }, 256), (64, 64, 0));
    // What can't be unplugged goes to the balloon, and is not tried again until a piece more is there.
    let stuck = steps(late(at(192, 192)), BOOT);
    assert_eq!((stuck.requested, stuck.held), (Bytes::mib(192), Bytes::mib(192)));
    let after = |plugged, held| Standing {
        phase: Phase::Held { stuck: Bytes::mib(128) },
        waited: REST,
        ..cushioned(plugged, held)
    };
    assert_eq!(asked(after(192, 192), 256), (192, 192, 0));
    assert_eq!(asked(after(318, 318), 256), (318, 318, 0));
    assert_eq!(asked(after(320, 320), 256), (320, 0, 320));
    // It grows until it has use for that.
    let Steps { phase, .. } = steps(after(192, 192), Bytes::mib(300));
    assert_eq!(phase, Phase::Held { stuck: Bytes::mib(84) });
}

#[test]
fn a_cushion_is_as_large_as_the_target_within_bounds() {
    let of = |target, max| cushion(Bytes::mib(target), Bytes::mib(max)).0 >> 20;
    assert_eq!((of(40, 384), of(112, 384), of(256, 1024), of(4096, 8192)), (64, 112, 256, 256));
    assert_eq!((of(370, 384), of(384, 384), of(400, 384)), (14, 0, 0));
}

/// A whole number of blocks above the boot memory.
fn target_of(mib: u64) -> Bytes {
    Bytes::mib(if mib > 256 { mib & !1 } else { mib })
}

/// A guest that moves at most `pace` at a time and does what it is asked.
fn moved(now: Standing, steps: Steps, pace: Bytes) -> Standing {
    let near = |to: Bytes, now: Bytes| to.clamp(now.saturating_sub(pace), now.saturating_add(pace));
    let Steps { requested, held, phase, .. } = steps;
    let (plugged, balloon) = (near(requested, now.plugged), near(held, now.balloon));
    // Little time passes while somebody moves.
    let has_let_go = balloon == Bytes::ZERO && balloon != now.balloon;
    let waited = match () {
        () if plugged != now.plugged || has_let_go => Duration::ZERO,
        () if balloon != now.balloon => now.waited + Duration::from_millis(10),
        () => now.waited + Duration::from_secs(1),
    };
    Standing { plugged, held, balloon, phase, waited: waited.min(Duration::from_secs(60)), ..now }
}

/// Where it comes to rest; none of the rounds until then asks for anything that the target does not allow.
fn at_rest(from: Standing, target: Bytes, pace: Bytes) -> Result<Standing, TestCaseError> {
    let mut now = Standing { waited: Duration::ZERO, ..from };
    for _ in 0..6000 {
        let asked = steps(now, target);
        prop_assert!(asked.requested.0.is_multiple_of(BLOCK.0));
        let next = moved(now, asked, pace);
        prop_assert!(next.plugged <= now.plugged || BOOT + next.plugged <= target + now.balloon + AHEAD);
        // What is taken from it by the balloon, and what counts as taken, is what it has too much.
        let has = now.boot + now.plugged;
        prop_assert!(has - asked.held.max(asked.phase.let_go()) >= target.min(has));
        if next.waited == Duration::from_secs(60) && next == now {
            return Ok(now);
        }
        now = next;
    }
    Err(TestCaseError::fail("it never comes to rest"))
}

proptest! {
    #[test]
    fn without_a_cushion_a_guest_that_does_as_it_is_asked_has_its_target(
        plugged in 0u64..600, target in 64u64..2000, driver: bool, waited in 0u64..4, held in 0u64..600,
    ) {
        let target = target_of(target);
        let standing = Standing {
            driver, waited: Duration::from_secs(waited), held: Bytes::mib(held), ..standing(plugged & !1)
        };
        let Steps { requested, held, look_again, .. } = steps(standing, target);
        prop_assert!(requested.0.is_multiple_of(BLOCK.0));
        // It has unplugged all that it was asked to.
        let settled = Standing { plugged: requested, waited: UNPLUG_PATIENCE, held, ..standing };
        let done = steps(settled, target);
        prop_assert_eq!(BOOT + requested - done.held, target);
        prop_assert_eq!((done.requested, done.look_again), (requested, None));
        prop_assert_eq!(steps(Standing { held: done.held, ..settled }, target), done);
        // It can't unplug: the balloon makes up for it in the end.
        let stuck = steps(Standing { waited: UNPLUG_PATIENCE, held, ..standing }, target);
        let has = BOOT + standing.plugged;
        prop_assert_eq!(has - stuck.held, target.min(has));
        // Before that the balloon never takes more than is too much.
        prop_assert!(has - held >= target.min(has));
        prop_assert_eq!(look_again.is_some(), held != stuck.held);
    }

    /// However a guest plugs and unplugs, some blocks at a time, and whatever its balloon has got to: it has its
    /// target in the end, its cushion is in the balloon, and less than a piece beside it.
    #[test]
    fn it_comes_to_rest(
        plugged in 0u64..600, target in 64u64..2000, held in 0u64..600, pace in 1u64..64, cushions: bool,
        phase in 0u64..3, let_go in 0u64..600,
    ) {
        let target = target_of(target);
        let cushion = cushions.then(|| cushion(target, MAX));
        let (let_go, stuck) = (Bytes::mib(let_go), Bytes::ZERO);
        let phase = match phase {
            _ if !cushions => Phase::CALM,
            0 => Phase::CALM,
            1 => Phase::Unplugging { let_go },
            _ => Phase::Refilling { let_go, stuck },
        };
        let from = Standing { cushion, phase, held: Bytes::mib(held), ..standing(plugged & !1) };
        let end = at_rest(from, target, Bytes(BLOCK.0 * pace))?;
        prop_assert_eq!(BOOT + end.plugged - end.held, target);
        prop_assert_eq!(end.phase, Phase::CALM);
        let cushion = cushion.unwrap_or_default();
        prop_assert!(end.held + BLOCK > cushion, "{end:?}");
        prop_assert!(end.held < (cushion + PIECE).max(BOOT.saturating_sub(target) + PIECE), "{end:?}");
    }

    /// Targets to and fro, each before the guest has rested: it unplugs only where that is less work than moving the
    /// same by the balloon, and its balloon follows each of them.
    #[test]
    fn a_restless_target_moves_the_balloon_alone(targets in vec(128u64..1024, 1..40), pace in 1u64..200) {
        let mut now = at_rest(
            Standing { cushion: Some(cushion(BOOT, MAX)), ..standing(0) }, BOOT, Bytes::mib(64)
        )?;
        for target in targets {
            let target = target_of(target);
            let before = now;
            now = Standing { waited: Duration::ZERO, cushion: Some(cushion(target, MAX)), ..now };
            for _ in 0..REST.as_secs() - 1 {
                let asked = steps(now, target);
                let has = BOOT + now.plugged;
                if !matches!(asked.phase, Phase::Unplugging { .. }) {
                    prop_assert_eq!(asked.held, has.saturating_sub(target));
                } else if !matches!(now.phase, Phase::Unplugging { .. }) {
                    let cushion = now.cushion.unwrap_or_default();
                    let surplus = has.saturating_sub(target).saturating_sub(cushion);
                    prop_assert!(surplus + BLOCK >= before.held + cushion, "{before:?} to {target}");
                }
                now = moved(now, asked, Bytes::mib(pace));
            }
        }
    }

    /// A guest whose blocks don't go has its target by the balloon, and is not asked for ever.
    #[test]
    fn what_does_not_go_is_left_alone(plugged in 0u64..1000, target in 64u64..400, held in 0u64..600) {
        let target = target_of(target);
        let cushion = Some(cushion(target, MAX));
        let mut now = Standing { cushion, held: Bytes::mib(held), ..standing(plugged & !1) };
        let mut asked_for = 0;
        for _ in 0..600 {
            let asked = steps(now, target);
            asked_for += u32::from(asked.requested < now.plugged && now.phase.let_go() == Bytes::ZERO);
            let next = moved(now, asked, Bytes::mib(64));
            let plugged = next.plugged.max(now.plugged);
            let waited = if plugged == now.plugged { now.waited + Duration::from_secs(1) } else { Duration::ZERO };
            now = Standing { plugged, waited, ..next };
        }
        prop_assert_eq!((BOOT + now.plugged).saturating_sub(now.held), target);
        prop_assert_eq!(now.held, now.balloon);
        prop_assert!(asked_for <= UNPLUG_PATIENCE.as_secs() as u32 + 1, "{asked_for} times");
    }
}
