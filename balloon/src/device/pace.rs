//! How the balloon moves to where the host wants it. Pure: no clock, no device.
//!
//! What a guest has free it can give at once; how much that is, it is asked
//! whenever it matters. What it must first make free (caches to drop, pages to
//! swap out) is asked for in steps, so that one large request doesn't stop
//! everything in the guest. A request that the guest can't
//! meet ends: Linux's driver tries again five times a second for as long as the
//! device asks for more than it has ("Out of puff!"), and takes pages from a
//! guest that has just got them back to stay alive. So what was reached becomes
//! what is asked for, until the host asks anew, or the guest says that it has much free.

use serde::{Deserialize, Serialize};

use api::units::{Bytes, Pages};

/// Of the guest's free memory so much is asked for at once, in percent: the
/// report is a moment old, and the guest goes on living.
const FREE_PERCENT: u64 = 80;
/// The smallest step.
const LEAST_STEP: Bytes = Bytes::mib(64);
/// A step is at least this part of the guest's memory map.
const STEPS_IN_MAP: u64 = 64;
/// A guest that gave nothing, and says that it has so many steps free, had no time: starved of
/// processor, not of memory.
const STEPS_OF_A_STARVED: u64 = 4;
/// Ticks without a page until a guest counts as unable. With ten ticks a
/// second the driver has tried and failed several times by then.
const PATIENCE: u32 = 15;

/// What the guest is asked for on the way to a target.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pace {
    /// What the balloon shall hold in the end.
    wanted: Pages,
    /// What the driver is told to hold now.
    asked: Pages,
    /// What it holds, as it says.
    reached: Pages,
    step: Pages,
    /// The least that the driver was told since it last inflated: down to there it deflates because it was told so.
    lowest: Pages,
    state: State,
}

/// How far a balloon is on its way, as data.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaceState {
    /// What it shall hold in the end.
    pub wanted: Pages,
    /// What the driver is asked for now.
    pub asked: Pages,
    /// What it holds, as the driver says.
    pub reached: Pages,
    /// Whether the guest could not give more.
    pub settled: bool,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// There, or on the way.
    Moving {
        /// Ticks in which nothing came.
        idle: u32,
        /// What was there at the last tick.
        before: Pages,
    },
    /// The guest gave nothing more.
    Settled,
    /// It took pages back to live on.
    TookBack,
    /// It did, and gives some of them up again.
    Refilling {
        /// Ticks in which nothing came.
        idle: u32,
        /// What was there at the last tick.
        before: Pages,
    },
}

impl Pace {
    /// For a guest with memory of `map`, of which `wanted` shall be in the balloon.
    pub fn new(map: Bytes, wanted: Pages) -> Self {
        let step = LEAST_STEP.pages().max(Pages(map.pages().0 / STEPS_IN_MAP));
        let start = State::Moving { idle: 0, before: Pages(0) };
        let mut pace =
            Self { wanted, asked: Pages(0), reached: Pages(0), step, lowest: Pages(0), state: start };
        pace.restart();
        pace
    }

    /// What to go on from elsewhere.
    pub fn saved(&self) -> PaceState {
        PaceState {
            wanted: self.wanted,
            asked: self.asked,
            reached: self.reached,
            settled: self.is_settled() || self.has_taken_back(),
        }
    }

    /// Goes on from `saved`, for a guest with memory of `map`. The driver's time to show that it
    /// gets on begins anew.
    pub fn resumed(map: Bytes, saved: PaceState) -> Self {
        let PaceState { wanted, asked, reached, settled } = saved;
        // Which of the two is not saved: one that took pages back must not be asked.
        let state = if settled { State::TookBack } else { State::Moving { idle: 0, before: reached } };
        Self { wanted, asked, reached, lowest: asked, state, ..Self::new(map, wanted) }
    }

    /// The driver starts anew, with an empty balloon.
    pub fn restart(&mut self) {
        (self.reached, self.lowest) = (Pages(0), Pages(0));
        self.aim(self.wanted, Bytes::ZERO);
    }

    /// The host wants the balloon to hold `wanted`. The guest has said that it has `free`.
    /// A release goes at once, whatever was asked for before.
    pub fn aim(&mut self, wanted: Pages, free: Bytes) {
        self.wanted = wanted;
        self.state = State::Moving { idle: 0, before: self.reached };
        let step = self.step.max(free.percent(FREE_PERCENT).pages());
        self.ask(wanted.min(Pages(self.reached.0.saturating_add(step.0))));
    }

    /// As [`aim`](Self::aim), where nobody asks the guest for less than before: one that took pages back keeps
    /// them.
    pub fn adjust(&mut self, wanted: Pages, free: Bytes) {
        if self.has_taken_back() && wanted >= self.reached {
            self.wanted = wanted;
            self.ask(self.asked.min(wanted));
        } else {
            self.aim(wanted, free);
        }
    }

    /// The guest that took pages back can spare so much of them again, and is asked for that alone.
    pub fn refill(&mut self, spare: Bytes) {
        let most = Pages(self.reached.0.saturating_add(spare.pages().0));
        if self.state == State::TookBack && most > self.reached {
            self.ask(self.wanted.min(most));
            self.state = State::Refilling { idle: 0, before: self.reached };
        }
    }

    fn ask(&mut self, asked: Pages) {
        self.asked = asked;
        self.lowest = self.lowest.min(asked);
    }

    /// The guest has just said that it has `free`. Less than a step of it is left to the ticks:
    /// a guest that always keeps a little free would be asked for it as fast as it could.
    pub fn heard(&mut self, free: Bytes) {
        let spare = free.percent(FREE_PERCENT).pages();
        match self.state {
            State::Moving { .. } if spare >= self.step => {
                let at_once = self.reached.0.saturating_add(spare.0);
                self.ask(self.wanted.min(self.asked.max(Pages(at_once))));
            }
            State::Settled if spare.0 / STEPS_OF_A_STARVED >= self.step.0 => self.aim(self.wanted, free),
            _ => {}
        }
    }

    /// Whether what the guest has free decides what it is asked for next: more is wanted than it
    /// was asked for, and that is in the balloon.
    pub fn waits_for_news(&self) -> bool {
        !self.is_settled() && self.asked < self.wanted && self.reached >= self.asked
    }

    /// The driver says that the balloon holds `reached`; returns whether it took pages back although it was
    /// told to hold them, which one does whose guest can't spare them (deflate-on-OOM).
    pub fn arrived(&mut self, reached: Pages) -> bool {
        let took_back = reached < self.reached && reached < self.lowest;
        if reached > self.reached {
            self.lowest = self.asked;
        }
        self.reached = reached;
        if took_back {
            self.settle(State::TookBack);
        } else if reached >= self.asked && matches!(self.state, State::Refilling { .. }) {
            self.state = if reached >= self.wanted {
                State::Moving { idle: 0, before: reached }
            } else {
                State::TookBack
            };
        }
        took_back
    }

    /// A tenth of a second has passed.
    pub fn tick(&mut self) {
        match self.state {
            State::Moving { .. } if self.reached >= self.asked => {
                let next = Pages(self.reached.0.saturating_add(self.step.0));
                self.ask(self.wanted.min(next));
                self.state = State::Moving { idle: 0, before: self.reached };
            }
            State::Moving { idle, before } => {
                let idle = self.idle(idle, before);
                self.state = State::Moving { idle, before: self.reached };
                if idle >= PATIENCE {
                    self.settle(State::Settled);
                }
            }
            State::Refilling { idle, before } => {
                let idle = self.idle(idle, before);
                self.state = State::Refilling { idle, before: self.reached };
                if idle >= PATIENCE {
                    self.settle(State::TookBack);
                }
            }
            State::Settled | State::TookBack => {}
        }
    }

    /// Ticks without a page after one more.
    fn idle(&self, idle: u32, before: Pages) -> u32 {
        if self.reached == before { idle.saturating_add(1) } else { 0 }
    }

    /// What the balloon shall hold in the end.
    pub fn wanted(&self) -> Pages {
        self.wanted
    }

    /// What the driver is to be told: num_pages (virtio 1.2, section 5.5.4).
    pub fn asked(&self) -> Pages {
        self.asked
    }

    /// What the driver has said last.
    pub fn reached(&self) -> Pages {
        self.reached
    }

    /// The guest took pages back to live on, and has some of them still.
    pub fn has_taken_back(&self) -> bool {
        matches!(self.state, State::TookBack | State::Refilling { .. })
    }

    /// The guest could not give what was wanted, and is no longer asked for it.
    pub fn is_settled(&self) -> bool {
        matches!(self.state, State::Settled | State::TookBack)
    }

    /// Whether a tick can change anything.
    pub fn is_moving(&self) -> bool {
        !self.is_settled() && self.reached < self.wanted
    }

    fn settle(&mut self, state: State) {
        (self.asked, self.lowest) = (self.reached, self.reached);
        self.state = state;
    }
}

#[cfg(test)]
mod tests {
    use proptest::collection::vec;
    use proptest::prelude::*;

    use super::*;

    const MAP: Bytes = Bytes::gib(1);

    fn mib(amount: u64) -> Pages {
        Bytes::mib(amount).pages()
    }

    #[test]
    fn what_is_free_goes_at_once_and_the_rest_in_steps() {
        let mut pace = Pace::new(MAP, Pages(0));
        pace.aim(mib(600), Bytes::mib(500));
        assert_eq!(pace.asked(), mib(400));
        pace.tick();
        assert_eq!(pace.asked(), mib(400), "the guest isn't there yet");
        assert!(!pace.waits_for_news());
        pace.arrived(mib(400));
        assert!(pace.waits_for_news());
        assert_eq!(pace.asked(), mib(400), "a step takes a tick");
        pace.tick();
        assert_eq!(pace.asked(), mib(464));
        pace.heard(Bytes::mib(50));
        assert_eq!(pace.asked(), mib(464), "less than a step is no news");
        pace.heard(Bytes::mib(100));
        assert_eq!(pace.asked(), mib(480));
        for _ in 0..2 {
            pace.arrived(pace.asked());
            pace.tick();
        }
        assert_eq!((pace.asked(), pace.is_moving()), (mib(600), true));
        pace.arrived(mib(600));
        assert!(!pace.is_moving() && !pace.is_settled());
    }

    #[test]
    fn a_large_guest_takes_large_steps() {
        let pace = Pace::new(Bytes::gib(64), Bytes::gib(60).pages());
        assert_eq!(pace.asked(), Bytes::gib(1).pages());
    }

    #[test]
    fn a_release_goes_at_once() {
        let mut pace = Pace::new(MAP, Pages(0));
        pace.aim(mib(600), Bytes::mib(900));
        pace.arrived(mib(300));
        pace.aim(mib(10), Bytes::ZERO);
        assert_eq!((pace.asked(), pace.is_moving()), (mib(10), false));
        // On its way down it isn't mistaken for one that can't.
        pace.arrived(mib(200));
        pace.arrived(mib(10));
        assert!(!pace.is_settled());
    }

    #[test]
    fn what_can_not_be_met_settles_and_a_new_request_tries_anew() {
        let mut pace = Pace::new(MAP, mib(600));
        pace.arrived(mib(50));
        let ticks = (0..100).take_while(|_| {
            pace.tick();
            pace.is_moving()
        });
        assert_eq!(ticks.count(), PATIENCE as usize);
        assert_eq!((pace.asked(), pace.is_settled()), (mib(50), true));
        pace.aim(mib(600), Bytes::ZERO);
        assert_eq!((pace.asked(), pace.is_settled()), (mib(114), false));
    }

    #[test]
    fn a_guest_that_had_no_time_is_asked_again_when_it_has_much_free() {
        let mut pace = Pace::new(MAP, mib(600));
        pace.arrived(mib(50));
        for _ in 0..=PATIENCE {
            pace.tick();
        }
        pace.heard(Bytes::mib(300));
        assert_eq!((pace.asked(), pace.is_settled()), (mib(50), true), "that little may be what it lives on");
        pace.heard(Bytes::mib(400));
        assert_eq!((pace.asked(), pace.is_settled()), (mib(370), false));
    }

    #[test]
    fn a_guest_that_takes_pages_back_to_live_is_left_alone() {
        let mut pace = Pace::new(MAP, mib(60));
        pace.arrived(mib(60));
        pace.arrived(mib(59));
        assert_eq!((pace.asked(), pace.is_settled()), (mib(59), true));
        pace.arrived(mib(40));
        assert_eq!(pace.asked(), mib(40));
        pace.heard(Bytes::gib(1));
        pace.tick();
        assert_eq!(pace.asked(), mib(40), "until the host asks anew");
    }

    #[test]
    fn who_deflates_as_it_was_told_takes_nothing_back() {
        let mut pace = Pace::new(MAP, mib(60));
        pace.arrived(mib(60));
        pace.aim(mib(20), Bytes::ZERO);
        // More is asked for while the driver is on its way down.
        pace.adjust(mib(40), Bytes::ZERO);
        assert!(!pace.arrived(mib(30)) && !pace.arrived(mib(20)));
        assert_eq!((pace.asked(), pace.has_taken_back()), (mib(40), false));
        assert!(!pace.arrived(mib(30)) && !pace.arrived(mib(40)));
        assert!(pace.arrived(mib(39)), "nobody told it so");
    }

    #[test]
    fn what_was_taken_back_stays_while_what_is_plugged_moves() {
        let mut pace = Pace::new(MAP, mib(60));
        pace.arrived(mib(60));
        assert!(pace.arrived(mib(50)));
        pace.adjust(mib(62), Bytes::gib(1));
        assert_eq!((pace.asked(), pace.wanted()), (mib(50), mib(62)));
        pace.adjust(mib(40), Bytes::ZERO);
        assert_eq!(
            (pace.asked(), pace.has_taken_back()),
            (mib(40), false),
            "its target was raised beyond that"
        );
    }

    #[test]
    fn what_a_guest_can_spare_again_is_asked_for_and_no_more() {
        let mut pace = Pace::new(MAP, mib(60));
        pace.arrived(mib(60));
        pace.arrived(mib(40));
        pace.refill(Bytes::mib(8));
        assert_eq!((pace.asked(), pace.is_moving()), (mib(48), true));
        pace.arrived(mib(48));
        pace.tick();
        assert_eq!((pace.asked(), pace.is_moving(), pace.has_taken_back()), (mib(48), false, true));
        pace.refill(Bytes::gib(1));
        assert_eq!(pace.asked(), mib(60));
        for _ in 0..=PATIENCE {
            pace.tick();
        }
        assert_eq!((pace.asked(), pace.is_moving()), (mib(48), false), "it could not spare them after all");
        pace.refill(Bytes::gib(1));
        pace.arrived(mib(60));
        assert!(!pace.has_taken_back() && !pace.is_settled());
    }

    proptest! {
        /// Whatever a guest says and does, it is never asked for more than is wanted, never for
        /// what is far from what it has, and every request comes to an end.
        #[test]
        fn every_request_ends(steps in vec((0u8..6, 0u64..1 << 19, 0u64..2 << 30), 0..60), wanted in 0u64..1 << 18) {
            let mut pace = Pace::new(MAP, Pages(0));
            let mut goal = Pages(0);
            for (what, pages, free) in steps {
                match what {
                    0 => { goal = Pages(pages % (1 << 18)); pace.aim(goal, Bytes(free)); }
                    1 => pace.heard(Bytes(free)),
                    2 => { pace.arrived(Pages(pages)); }
                    3 => { goal = Pages(pages % (1 << 18)); pace.adjust(goal, Bytes(free)); }
                    4 => pace.refill(Bytes(free)),
                    _ => pace.tick(),
                }
                prop_assert!(pace.asked() <= goal || pace.is_settled());
                prop_assert!(!pace.is_settled() || pace.asked() <= pace.reached());
            }
            pace.aim(Pages(wanted), Bytes::ZERO);
            for _ in 0..10 * PATIENCE * STEPS_IN_MAP as u32 {
                pace.tick();
            }
            prop_assert!(!pace.is_moving());
        }
    }
}
