//! What is advised when nothing is left to move.

use proptest::prelude::*;

use super::*;

/// Two guests that can't go below what the host has for one and a half.
fn beyond_help(swap: Option<Bytes>) -> World {
    let heavy = Guest::new(1, "512M,min=512M,max=1G,weight=200", Bytes::mib(500));
    let light = Guest::new(2, "512M,min=512M,max=1G,weight=50", Bytes::mib(500));
    let mut world = World::new(Bytes::mib(768), vec![heavy, light]);
    world.host.swap = swap;
    world
}

/// The first advice in `ticks`, and at which tick it came.
fn advice(world: &mut World, ticks: u32) -> Option<(u32, u64, Rule)> {
    for tick in 0..ticks {
        world.tick();
        if let Some(decision) = world.decisions.iter().find(|decision| decision.reason.rule.keeps_target()) {
            assert_eq!(decision.reason.old, decision.reason.new, "advice changes no target");
            return Some((tick, decision.vm, decision.reason.rule));
        }
    }
    None
}

#[test]
fn where_nothing_is_left_to_move_the_host_swaps_from_the_lightest_or_pauses_it() {
    let (tick, vm, rule) = advice(&mut beyond_help(Some(Bytes::gib(1))), 120).unwrap();
    assert_eq!((vm, rule), (2, Rule::Swap));
    assert!(tick >= 55, "an emergency must last first: {tick}");
    for swap in [None, Some(Bytes::mib(100))] {
        let (_, vm, rule) = advice(&mut beyond_help(swap), 120).unwrap();
        assert_eq!((vm, rule), (2, Rule::Pause));
    }
}

#[test]
fn a_paused_vm_is_charged_what_it_holds_and_resumed_when_there_is_room() {
    let mut world = beyond_help(None);
    advice(&mut world, 120).unwrap();
    world.guests[1].vm.observed.vcpus = Vcpus::Paused(Pauser::Operator);
    world.guests[1].vm.observed.host_rss = Some(Bytes::mib(100));
    assert_eq!(advice(&mut world, 60), None, "the last one that runs is not paused, and there is no room");
    assert_eq!(world.guests[1].vm.standing(), Standing::Paused);
    assert_eq!(world.guests[1].vm.charge(), Bytes::mib(100));
    world.host.budget = Bytes::gib(2);
    let (_, vm, rule) = advice(&mut world, 60).unwrap();
    assert_eq!((vm, rule), (2, Rule::Resume));
}

#[test]
fn a_pause_long_after_the_advice_is_the_operators_own() {
    let mut world = beyond_help(None);
    advice(&mut world, 120).unwrap();
    let budget = std::mem::replace(&mut world.host.budget, Bytes::gib(4));
    world.run(60);
    world.host.budget = budget;
    world.guests[1].vm.observed.vcpus = Vcpus::Paused(Pauser::Operator);
    world.guests[1].vm.observed.host_rss = Some(Bytes::mib(100));
    let had = world.guests[1].vm.observed.actual;
    world.run(1);
    assert_eq!(world.guests[1].vm.standing(), Standing::Paused);
    assert_eq!(world.guests[1].vm.charge(), had);
}

#[test]
fn short_of_the_budget_nobody_is_paused() {
    let mut world = World::new(
        Bytes::mib(1100),
        vec![Guest::new(1, WIDE, Bytes::mib(1000)), Guest::new(2, WIDE, Bytes::mib(1000))],
    );
    assert_eq!(advice(&mut world, 300), None);
}

impl World {
    /// A tick, and what was decided about pauses is done, where a VM lets it.
    fn tick_and_pause(&mut self) -> Option<(u64, Rule)> {
        self.tick();
        let decided = self.decisions.iter().find(|decision| decision.reason.rule.keeps_target())?;
        let (vm, rule) = (decided.vm, decided.reason.rule);
        let observed = &mut self.guests.iter_mut().find(|guest| guest.vm.id == vm).unwrap().vm.observed;
        match (rule, observed.vcpus) {
            (Rule::Pause, Vcpus::Run) if observed.pausable => {
                observed.vcpus = Vcpus::Paused(Pauser::Balancer)
            }
            (Rule::Resume, Vcpus::Paused(Pauser::Balancer)) => observed.vcpus = Vcpus::Run,
            _ => {}
        }
        Some((vm, rule))
    }

    /// What was decided about pauses in so many ticks, and when.
    fn pauses(&mut self, ticks: u32) -> Vec<(u32, u64, Rule)> {
        (0..ticks).filter_map(|tick| self.tick_and_pause().map(|(vm, rule)| (tick, vm, rule))).collect()
    }
}

/// A guest that can be paused, of whose memory the host holds a part.
fn pausable(id: u64, limits: &str, wants: Bytes, held: Bytes) -> Guest {
    let mut guest = Guest::new(id, limits, wants);
    guest.vm.observed.pausable = true;
    guest.vm.observed.host_rss = Some(held);
    guest
}

const FIXED_FLOOR: &str = "512M,min=512M,max=1G";

#[test]
fn of_those_that_can_be_paused_the_lightest_is_and_no_other_where_that_helps() {
    let foreign = Guest::new(1, "512M,min=512M,max=1G,weight=1", Bytes::mib(500));
    let full = pausable(2, "512M,min=512M,max=1G,weight=2", Bytes::mib(500), Bytes::mib(512));
    let light = pausable(3, "512M,min=512M,max=1G,weight=3", Bytes::mib(500), Bytes::mib(100));
    let heavy = pausable(4, "512M,min=512M,max=1G,weight=4", Bytes::mib(500), Bytes::mib(100));
    let mut world = World::new(Bytes::mib(1700), vec![foreign, full, light, heavy]);
    let pauses = world.pauses(300);
    assert_eq!(pauses.iter().map(|(_, vm, rule)| (*vm, *rule)).collect::<Vec<_>>(), [(3, Rule::Pause)]);
    assert!(world.balance.charged <= Bytes::mib(1700));
    // It is resumed when there is room for what the others need and for all that it did not hold.
    world.host.budget = Bytes::mib(2300);
    assert_eq!(world.pauses(60), []);
    world.host.budget = Bytes::mib(2500);
    let pauses = world.pauses(60);
    assert_eq!(pauses.iter().map(|(_, vm, rule)| (*vm, *rule)).collect::<Vec<_>>(), [(3, Rule::Resume)]);
}

#[test]
fn one_that_keeps_what_it_was_asked_for_and_gives_a_little_at_a_time_is_paused_first() {
    let other = pausable(1, "512M,min=512M,max=1G,weight=1", Bytes::mib(500), Bytes::mib(100));
    let mut crawler = pausable(2, "1G,min=128M,max=4G,weight=100", Bytes::mib(150), Bytes::mib(200));
    // It opened its balloon, and fills it again by a little at a time.
    crawler.vm.observed.actual = Bytes::gib(4);
    crawler.speed = Bytes::mib(1);
    let paused = |guards: Guards| {
        let mut world = World::with(Bytes::gib(2), vec![other.clone(), crawler.clone()], guards);
        let pauses = world.pauses(300);
        pauses.first().map(|(tick, vm, rule)| (*tick < 120, *vm, *rule))
    };
    assert_eq!(paused(Guards::default()), Some((true, 2, Rule::Pause)));
    assert_eq!(paused(Guards { pace_counts: false, ..Guards::default() }), None);
}

#[test]
fn a_policy_that_has_just_begun_resumes_whom_another_paused_one_at_a_time_and_no_operators() {
    let mut guests: Vec<_> =
        (1..=4).map(|id| pausable(id, FIXED_FLOOR, Bytes::mib(500), Bytes::mib(100))).collect();
    for (index, by) in [(1, Pauser::Balancer), (2, Pauser::Operator), (3, Pauser::Balancer)] {
        guests[index].vm.observed.vcpus = Vcpus::Paused(by);
    }
    let mut world = World::new(Bytes::gib(4), guests);
    let pauses = world.pauses(120);
    assert_eq!(
        pauses.iter().map(|(_, vm, rule)| (*vm, *rule)).collect::<Vec<_>>(),
        [(2, Rule::Resume), (4, Rule::Resume)]
    );
    assert!(pauses[0].0 >= 9 && pauses[1].0 >= pauses[0].0 + 10, "{pauses:?}");
    let operators = &world.guests[2].vm;
    assert_eq!(
        (operators.standing(), operators.charge()),
        (Standing::Paused, Bytes::mib(512)),
        "it may run on at any moment"
    );
}

#[test]
fn a_pause_that_an_operator_took_over_is_the_operators() {
    let running = pausable(1, FIXED_FLOOR, Bytes::mib(500), Bytes::mib(100));
    let mut paused = pausable(2, FIXED_FLOOR, Bytes::mib(500), Bytes::mib(100));
    paused.vm.observed.vcpus = Vcpus::Paused(Pauser::Balancer);
    let mut world = World::new(Bytes::mib(700), vec![running, paused]);
    assert_eq!(world.pauses(30), []);
    assert_eq!(world.guests[1].vm.charge(), Bytes::mib(100));
    world.guests[1].vm.observed.vcpus = Vcpus::Paused(Pauser::Operator);
    world.host.budget = Bytes::gib(4);
    assert_eq!(world.pauses(60), []);
    assert_eq!(world.guests[1].vm.charge(), Bytes::mib(512));
}

#[test]
fn room_is_made_for_one_that_is_laid_down_from_what_others_do_not_need() {
    let idle = Guest::new(1, "1G,min=128M,max=1G", Bytes::mib(200));
    let mut paused = pausable(2, FIXED_FLOOR, Bytes::mib(500), Bytes::mib(100));
    paused.vm.observed.vcpus = Vcpus::Paused(Pauser::Balancer);
    let mut world = World::new(Bytes::mib(1200), vec![idle, paused]);
    let pauses = world.pauses(300);
    assert_eq!(pauses.iter().map(|(_, vm, rule)| (*vm, *rule)).collect::<Vec<_>>(), [(2, Rule::Resume)]);
    assert!(world.target(0) >= Bytes::mib(240), "no more than it can spare is taken: {}", world.target(0));
    assert!(world.balance.charged <= Bytes::mib(1200));
}

#[test]
fn room_that_is_kept_for_a_start_is_no_vm_that_runs() {
    let mut world = World::new(
        Bytes::mib(768),
        vec![
            pausable(1, FIXED_FLOOR, Bytes::mib(500), Bytes::mib(100)),
            Guest::new(2, FIXED_FLOOR, Bytes::mib(500)),
        ],
    );
    world.guests[1].vm.observed.vcpus = Vcpus::NotYet;
    assert_eq!(world.pauses(120), []);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    /// Whatever budgets come and go, and whoever else pauses and resumes.
    #[test]
    fn the_last_one_always_runs_and_operators_have_their_way(
        vms in prop::collection::vec((1u64..1000, 0u64..512, any::<bool>()), 1..6),
        budgets in prop::collection::vec(200u64..4000, 1..5),
        operator in prop::collection::vec((0usize..6, any::<bool>()), 5),
    ) {
        let guests: Vec<_> = vms.iter().enumerate().map(|(id, (weight, held, can))| {
            let limits = format!("512M,min=512M,max=1G,weight={weight}");
            let mut guest = pausable(id as u64, &limits, Bytes::mib(500), Bytes::mib(*held));
            guest.vm.observed.pausable = *can;
            guest
        }).collect();
        let mut world = World::new(Bytes::gib(4), guests);
        let mut last = 0;
        let mut now = 0;
        for (budget, (whom, pauses)) in budgets.iter().zip(operator) {
            world.host.budget = Bytes::mib(*budget);
            if let Some(guest) = world.guests.get_mut(whom) {
                guest.vm.observed.vcpus = if pauses { Vcpus::Paused(Pauser::Operator) } else { Vcpus::Run };
            }
            for _ in 0..150 {
                now += 1;
                let before: Vec<_> = world.guests.iter().map(|guest| guest.vm.observed.vcpus).collect();
                let Some((vm, rule)) = world.tick_and_pause() else { continue };
                prop_assert!(now >= last + 10, "{now} is too soon after {last}");
                last = now;
                let (before, after) = (before[vm as usize], world.guests[vm as usize].vm.observed.vcpus);
                if before == Vcpus::Paused(Pauser::Operator) {
                    prop_assert_eq!(after, before);
                }
                if rule == Rule::Pause {
                    let runs = world.guests.iter().any(|guest| guest.vm.observed.vcpus == Vcpus::Run);
                    prop_assert!(runs, "the last one was paused");
                }
            }
        }
    }
}
