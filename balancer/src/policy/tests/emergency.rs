//! What is advised when nothing is left to move.

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
        if let Some(decision) = world.decisions.iter().find(|decision| decision.reason.rule.is_advice()) {
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
    world.guests[1].vm.said.paused = true;
    world.guests[1].vm.said.host_rss = Bytes::mib(100);
    assert_eq!(advice(&mut world, 60), None, "the last one that runs is not paused, and there is no room");
    assert_eq!(world.guests[1].vm.standing(), Standing::Paused);
    assert_eq!(world.guests[1].vm.charge(), Bytes::mib(100));
    world.host.budget = Bytes::gib(2);
    let (_, vm, rule) = advice(&mut world, 60).unwrap();
    assert_eq!((vm, rule), (2, Rule::Resume));
}

#[test]
fn short_of_the_budget_nobody_is_paused() {
    let mut world = World::new(
        Bytes::mib(1100),
        vec![Guest::new(1, WIDE, Bytes::mib(1000)), Guest::new(2, WIDE, Bytes::mib(1000))],
    );
    assert_eq!(advice(&mut world, 300), None);
}
