//! Who gets what, and what a VM is charged for.

use super::*;

#[test]
fn a_guest_in_need_grows_within_a_tick_or_two() {
    let mut world = World::new(Bytes::gib(2), vec![Guest::new(1, WIDE, Bytes::mib(250))]);
    world.run(2);
    assert!(world.target(0) >= Bytes::mib(290), "{}", world.target(0));
}

/// A guest that took so much out of its balloon a moment ago.
fn takes_back(guest: &mut Guest, amount: Bytes) {
    (guest.stuck, guest.speed) = (true, Bytes::ZERO);
    let observed = &mut guest.vm.observed;
    observed.actual = observed.target.saturating_add(amount);
    (observed.taken, observed.ran_out) = (amount, true);
    observed.guest = Some(GuestMemory { age: Duration::from_millis(3), ..GuestMemory::default() });
}

#[test]
fn who_took_pages_back_rather_than_run_out_of_memory_is_granted_them_and_more_at_once() {
    let mut world = World::new(Bytes::gib(2), vec![Guest::new(1, WIDE, Bytes::mib(100))]);
    world.run(5);
    let before = world.target(0);
    world.now += Duration::from_millis(300);
    takes_back(&mut world.guests[0], Bytes::mib(8));
    world.round();
    // All that it has is in use, and it waits.
    let has = before + Bytes::mib(8);
    assert!(world.target(0) >= has.percent(125), "{} of {has}", world.target(0));
}

#[test]
fn who_keeps_what_it_took_is_charged_for_it_and_is_not_stuck() {
    let mut world = World::new(Bytes::mib(276), vec![Guest::new(1, WIDE, Bytes::mib(270))]);
    world.run(3);
    let target = world.target(0);
    takes_back(&mut world.guests[0], Bytes::mib(20));
    for _ in 0..30 {
        // Nothing new comes from it.
        world.now += Duration::from_secs(1);
        world.round();
        let guest = &world.guests[0];
        assert_eq!((guest.vm.standing(), world.target(0)), (Standing::Following, target));
        assert_eq!(guest.vm.charge(), target + Bytes::mib(20));
    }
}

#[test]
fn a_guest_gets_the_last_of_its_max_though_that_is_less_than_is_worth_a_move_elsewhere() {
    let mut guest = Guest::new(1, "256M,min=128M,max=1G,buffer=80%", Bytes::mib(960));
    (guest.vm.observed.target, guest.vm.observed.actual) = (Bytes::mib(1010), Bytes::mib(1010));
    let mut world = World::new(Bytes::gib(2), vec![guest]);
    world.run(5);
    assert_eq!(world.target(0), Bytes::gib(1));
}

#[test]
fn memory_moves_to_who_needs_it_and_back_within_seconds() {
    let mut world = World::new(
        Bytes::mib(1200),
        vec![
            Guest::new(1, WIDE, Bytes::mib(150)),
            Guest::new(2, WIDE, Bytes::mib(150)),
            Guest::new(3, WIDE, Bytes::mib(150)),
        ],
    );
    world.run(10);
    for peak in [0, 1, 2, 0] {
        for (index, guest) in world.guests.iter_mut().enumerate() {
            guest.wants = Bytes::mib(if index == peak { 500 } else { 150 });
        }
        for second in 0.. {
            world.tick();
            assert!(world.charged() <= Bytes::mib(1200));
            if world.target(peak) >= Bytes::mib(590) {
                break;
            }
            assert!(second < 15, "guest {peak} has {} after {second} s", world.target(peak));
        }
        world.run(20);
    }
}

#[test]
fn nobody_is_shrunk_where_nobody_is_short() {
    let mut world = World::new(
        Bytes::gib(8),
        vec![Guest::new(1, WIDE, Bytes::mib(800)), Guest::new(2, WIDE, Bytes::mib(100))],
    );
    world.run(30);
    let high = world.target(0);
    world.guests[0].wants = Bytes::mib(100);
    world.run(300);
    assert_eq!(world.target(0), high);
}

#[test]
fn the_pool_is_refilled_without_hurry() {
    let mut world = World::new(
        Bytes::mib(1000),
        vec![
            Guest::new(1, "640M,min=128M,max=1G", Bytes::mib(100)),
            Guest::new(2, "340M,min=128M,max=1G", Bytes::mib(280)),
        ],
    );
    // 20 of 30 MiB are free: NORMAL is left at 64 %, so one step of 16 MiB and no more.
    world.run(100);
    assert!(world.balance.free >= Bytes::mib(29), "{:?}", world.balance);
    assert!(world.target(0) >= Bytes::mib(600), "{}", world.target(0));
}

#[test]
fn static_and_driverless_vms_are_charged_their_full_size_and_left_alone() {
    let mut fixed = Guest::new(1, "512M", Bytes::mib(100));
    fixed.vm.observed.actual = Bytes::mib(512);
    let mut driverless = Guest::new(2, WIDE, Bytes::mib(100));
    driverless.vm.observed.driver = DriverState::Absent;
    let mut world = World::new(Bytes::gib(4), vec![fixed, driverless]);
    world.run(5);
    assert_eq!(world.balance.charged, Bytes::mib(512 + 1024));
    assert_eq!(world.guests[1].vm.standing(), Standing::NoDriver);
    assert_eq!((world.target(0), world.target(1)), (Bytes::mib(512), Bytes::mib(256)));
}

#[test]
fn a_booting_guest_is_charged_what_it_holds_until_its_balloon_is_there() {
    let mut booting = Guest::new(1, WIDE, Bytes::mib(100));
    booting.vm.uptime = Duration::from_secs(3);
    booting.vm.observed.driver = DriverState::Absent;
    booting.vm.observed.actual = Bytes::gib(1);
    booting.stuck = true;
    let mut world = World::new(Bytes::gib(4), vec![booting]);
    world.run(20);
    assert_eq!(world.guests[0].vm.standing(), Standing::Booting);
    assert_eq!(world.balance.charged, Bytes::mib(256));
    world.guests[0].vm.observed.host_rss = Some(Bytes::mib(700));
    world.run(1);
    assert_eq!(world.balance.charged, Bytes::mib(700));
    world.guests[0].vm.observed.driver = DriverState::Active;
    world.guests[0].stuck = false;
    world.guests[0].vm.observed.host_rss = Some(Bytes::mib(200));
    world.run(3);
    assert_eq!(world.guests[0].vm.standing(), Standing::Following);
    world.guests[0].vm.observed.driver = DriverState::Absent;
    world.guests[0].vm.uptime = guards::BOOT;
    world.run(1);
    assert_eq!(world.guests[0].vm.standing(), Standing::Leaving);
    assert_eq!(world.balance.charged, Bytes::mib(256));
    world.run(guards::LEAVING.as_secs() as u32);
    assert_eq!(world.guests[0].vm.standing(), Standing::NoDriver);
    assert_eq!(world.balance.charged, Bytes::gib(1));
    // Whoever comes and goes is believed once.
    world.guests[0].vm.observed.driver = DriverState::Active;
    world.run(3);
    world.guests[0].vm.observed.driver = DriverState::Absent;
    world.run(1);
    assert_eq!(world.guests[0].vm.standing(), Standing::NoDriver);
}

#[test]
fn a_young_guest_that_has_followed_is_charged_all_that_it_has_not_given_up_yet() {
    // As a balancer that was started anew finds it: 24 MiB of its last shrink are still to come.
    let meet = |followed| {
        let mut young = Guest::new(1, WIDE, Bytes::mib(100));
        young.vm.uptime = Duration::from_secs(3);
        young.vm.observed.followed = followed;
        (young.vm.observed.target, young.vm.observed.actual) = (Bytes::mib(423), Bytes::mib(447));
        young.vm.observed.host_rss = Some(Bytes::mib(300));
        young.stuck = true;
        let mut world = World::new(Bytes::gib(4), vec![young]);
        world.run(1);
        (world.guests[0].vm.standing(), world.balance.charged)
    };
    assert_eq!(meet(Some(true)), (Standing::Following, Bytes::mib(447)));
    // Without the VMM's word, and on its first way, it has not touched what it gives up.
    assert_eq!(meet(Some(false)), (Standing::Booting, Bytes::mib(423)));
    assert_eq!(meet(None), (Standing::Booting, Bytes::mib(423)));
}

#[test]
fn a_vm_that_stops_answering_keeps_its_charge_and_gets_no_target() {
    let mut world = World::new(
        Bytes::mib(1000),
        vec![Guest::new(1, WIDE, Bytes::mib(100)), Guest::new(2, WIDE, Bytes::mib(900))],
    );
    world.guests[0].vm.observed.actual = Bytes::mib(400);
    world.guests[0].vm.observed.target = Bytes::mib(400);
    world.guests[0].vm.answers = false;
    world.run(60);
    assert_eq!(world.target(0), Bytes::mib(400));
    assert_eq!(world.guests[0].vm.standing(), Standing::NotAnswering);
    assert!(world.charged() <= Bytes::mib(1000));
    assert!(world.target(1) > Bytes::mib(500));
}

#[test]
fn what_was_given_for_a_burst_that_was_over_goes_to_who_needs_it_at_once() {
    let limits = "1G,min=256M,max=4G";
    let guests = vec![Guest::new(1, limits, Bytes::mib(800)), Guest::new(2, limits, Bytes::mib(800))];
    let mut world = World::new(Bytes::gib(4), guests);
    world.run(10);
    world.guests[0].wants = Bytes::mib(1800);
    world.run(3);
    let given = world.target(0);
    assert!(given > Bytes::mib(1200), "{given}");
    // It was over at the moment of the last grant.
    world.guests[0].wants = Bytes::mib(800);
    world.guests[1].wants = Bytes::mib(2700);
    world.run(10);
    assert!(world.target(0) < given && world.target(1) >= Bytes::mib(2800), "{}", world.target(1));
}

#[test]
fn a_rise_that_finds_no_room_to_show_is_served_when_it_has_waited_for_some_seconds() {
    let limits = "4G,min=1G,max=8G";
    let guests = vec![Guest::new(1, limits, Bytes::mib(4800)), Guest::new(2, limits, Bytes::mib(4000))];
    let mut world = World::new(Bytes::gib(10), guests);
    world.run(60);
    world.guests[1].wants = Bytes::mib(6500);
    world.run(4);
    let left = world.target(0);
    assert!(left >= Bytes::mib(4900) && left < Bytes::mib(4960), "{left}: what it uses, and hardly more");
    world.guests[0].wants = Bytes::mib(5600);
    world.guests[1].wants = Bytes::mib(3000);
    world.run(15);
    assert!(world.target(0) >= Bytes::mib(5600), "{} for all of the minute after", world.target(0));
}

#[test]
fn who_really_uses_more_than_its_share_borrows_buffers_and_who_only_says_so_for_a_while() {
    let run = |touches: bool| {
        let limits = "2G,min=256M,max=8G";
        let guests = vec![Guest::new(1, limits, Bytes::mib(2900)), Guest::new(2, limits, Bytes::mib(4000))];
        let mut world = World::new(Bytes::gib(8), guests);
        world.run(60);
        world.guests[1].wants = Bytes::mib(7000);
        let mut buffer = Vec::new();
        for second in 0..500 {
            let observed = &mut world.guests[1].vm.observed;
            let touched = if touches { observed.actual.min(Bytes::mib(7000)) } else { Bytes::mib(1000) };
            observed.host_rss = Some(touched);
            world.tick();
            if [110, 499].contains(&second) {
                buffer.push(world.target(0).saturating_sub(Bytes::mib(2900)).0 >> 20);
            }
        }
        buffer
    };
    let (lent, bare) = (run(true), 128);
    assert!(lent.iter().all(|buffer| (bare..bare + 16).contains(buffer)), "{lent:?}");
    let told = run(false);
    assert!((bare..bare + 16).contains(&told[0]) && told[1] >= 560, "{told:?}");
}
