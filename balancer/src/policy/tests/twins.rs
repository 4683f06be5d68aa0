//! Each guard, and its twin: the same host with the guard switched off, which fails.
//!
//! Those that need minutes of many guests to show are in the simulator's tests.

use super::*;

/// Two guests: one has more than its share and gives nothing up, the other is short, a third could pay.
fn with_a_stuck_guest(guards: Guards) -> World {
    let mut stuck = Guest::new(1, "900M,min=128M,max=1G", Bytes::mib(150));
    stuck.stuck = true;
    let payer = Guest::new(2, "700M,min=128M,max=1G", Bytes::mib(150));
    let short = Guest::new(3, "200M,min=128M,max=1G", Bytes::mib(500));
    World::with(Bytes::mib(1800), vec![stuck, payer, short], guards)
}

#[test]
fn a_stuck_guest_is_found_in_time_and_costs_the_others_nothing() {
    let mut world = with_a_stuck_guest(Guards::default());
    let mut found = None;
    for second in 0..60 {
        world.tick();
        if world.guests[0].vm.standing() == Standing::Stuck && found.is_none() {
            found = Some(second);
            assert_eq!(world.target(0), Bytes::mib(900), "a stuck guest's target is what it has");
        }
    }
    assert!(found.is_some_and(|second| second <= 8), "{found:?}");
    assert!(world.target(2) >= Bytes::mib(580), "{}", world.target(2));
    // It rests for a minute, then is asked again; each rest is twice as long.
    let mut asked = 0;
    for _ in 0..600 {
        world.guests[1].wants = Bytes::mib(650);
        let before = world.target(0);
        world.tick();
        asked += u32::from(world.target(0) < before);
    }
    assert!((1..=24).contains(&asked), "asked {asked} times in 10 minutes");
}

#[test]
fn a_guest_that_ends_a_little_above_each_target_is_not_stuck() {
    for mib in [3, 8, 16] {
        let mut world = with_a_stuck_guest(Guards::default());
        (world.guests[0].stuck, world.guests[0].keeps) = (false, Bytes::mib(mib));
        for second in 0..120 {
            world.tick();
            assert_eq!(world.guests[0].vm.standing(), Standing::Following, "{mib} MiB, second {second}");
        }
        assert!(world.target(0) < Bytes::mib(900), "it was asked");
        let charged = world.guests[0].vm.charge();
        assert_eq!(charged, world.target(0).saturating_add(Bytes::mib(mib)), "and is charged what it has");
    }
    let mut world = with_a_stuck_guest(Guards::default());
    (world.guests[0].stuck, world.guests[0].keeps) = (false, Bytes::mib(20));
    world.run(30);
    assert_eq!(world.guests[0].vm.standing(), Standing::Stuck);
}

#[test]
fn a_guest_that_unplugs_first_has_time_for_its_balloon_too() {
    let found = |plugs: bool| {
        let mut world = with_a_stuck_guest(Guards::default());
        world.guests[0].vm.observed.plugs = plugs;
        (0..60).find(|_| {
            world.tick();
            world.guests[0].vm.standing() == Standing::Stuck
        })
    };
    let (inflates, unplugs) = (found(false).unwrap(), found(true).unwrap());
    assert_eq!(unplugs - inflates, api::status::UNPLUG_PATIENCE.as_secs());
}

#[test]
fn without_the_stuck_guard_what_it_owes_is_waited_for() {
    let served = |guards: Guards| {
        let mut world = with_a_stuck_guest(guards);
        world.run(60);
        let stuck = &world.guests[0].vm.observed;
        stuck.actual.saturating_sub(stuck.target)
    };
    let without = Guards { stuck_are_left_alone: false, ..Guards::default() };
    assert_eq!(served(Guards::default()), Bytes::ZERO, "nobody counts on memory that does not come");
    assert!(served(without) > Bytes::mib(100), "the policy counts on what the stuck guest owes");
}

/// What a guest that is short has after a minute, beside one that owes gigabytes and gives up so little at a
/// time that it is not stuck, and one that could pay at once.
fn beside_a_crawler(guards: Guards) -> World {
    let mut crawler = Guest::new(1, "16G,min=128M,max=16G", Bytes::mib(150));
    crawler.speed = Bytes::mib(1);
    let payer = Guest::new(2, "2G,min=128M,max=2G", Bytes::mib(150));
    let short = Guest::new(3, "256M,min=128M,max=2G", Bytes::mib(1500));
    let mut world = World::with(Bytes::gib(16 + 2 + 1), vec![crawler, payer, short], guards);
    world.run(60);
    assert_ne!(world.guests[0].vm.standing(), Standing::Stuck);
    world
}

#[test]
fn nobody_waits_for_what_a_crawling_guest_owes() {
    let world = beside_a_crawler(Guards::default());
    assert!(world.target(2) >= Bytes::mib(1800), "{}", world.target(2));
    let without = beside_a_crawler(Guards { pace_counts: false, ..Guards::default() });
    assert!(without.target(2) < Bytes::mib(1500), "{}", without.target(2));
}

fn with_a_stale_guest(guards: Guards) -> World {
    let mut stale = Guest::new(1, "900M,min=128M,max=1G", Bytes::mib(150));
    stale.age = Duration::from_secs(30);
    let short = Guest::new(2, "200M,min=128M,max=1G", Bytes::mib(500));
    World::with(Bytes::mib(1150), vec![stale, short], guards)
}

/// The first guest's target when its reports stop and the other wants more, and a minute later.
fn targets_when_reports_stop(guards: Guards) -> (Bytes, Bytes) {
    let mut world = with_a_stale_guest(guards);
    world.guests[0].age = Duration::ZERO;
    world.guests[1].wants = Bytes::mib(150);
    world.run(10);
    world.guests[0].age = Duration::from_secs(30);
    world.guests[1].wants = Bytes::mib(900);
    let before = world.target(0);
    world.run(60);
    (before, world.target(0))
}

#[test]
fn a_guest_whose_report_is_stale_is_not_shrunk() {
    let mut world = with_a_stale_guest(Guards::default());
    world.run(120);
    assert_eq!(world.target(0), Bytes::mib(900));
    // Nor one whose reports stop later.
    let (before, after) = targets_when_reports_stop(Guards::default());
    assert_eq!(after, before);
}

#[test]
fn without_the_stale_guard_it_is_shrunk_on_old_news() {
    let guards = Guards { stale_are_held: false, ..Guards::default() };
    let (before, after) = targets_when_reports_stop(guards);
    assert!(after < before);
}

/// One guest falls, another rises at once; the first gives memory up slowly.
fn over_budget_seconds(guards: Guards) -> u32 {
    let mut slow = Guest::new(1, "900M,min=128M,max=1G", Bytes::mib(150));
    slow.speed = Bytes::mib(20);
    let short = Guest::new(2, "200M,min=128M,max=1G", Bytes::mib(600));
    let mut world = World::with(Bytes::mib(1150), vec![slow, short], guards);
    let mut over = 0;
    for _ in 0..60 {
        world.tick();
        over += u32::from(world.charged() > Bytes::mib(1150));
    }
    assert!(world.target(1) > Bytes::mib(600), "{}", world.target(1));
    over
}

#[test]
fn no_grant_precedes_its_payment() {
    assert_eq!(over_budget_seconds(Guards::default()), 0);
}

#[test]
fn without_payment_first_the_budget_is_overrun() {
    assert!(over_budget_seconds(Guards { payment_comes_first: false, ..Guards::default() }) > 0);
}

/// The least that a guest over its share keeps beyond its use while another is short for 8 s.
fn least_kept(guards: Guards) -> i128 {
    // Rest after a move would hide what this guard does.
    let guards = Guards { moves_rest: false, ..guards };
    let big = Guest::new(1, "900M,min=128M,max=1G,weight=1", Bytes::mib(850));
    let heavy = Guest::new(2, "128M,min=128M,max=1G,weight=1000", Bytes::mib(700));
    let mut world = World::with(Bytes::mib(1150), vec![big, heavy], guards);
    let mut least = i128::MAX;
    for _ in 0..8 {
        world.tick();
        least = least.min(i128::from(world.target(0).0) - i128::from(Bytes::mib(850).0));
    }
    least
}

#[test]
fn use_is_spared_short_of_an_emergency() {
    assert!(least_kept(Guards::default()) >= 0);
}

#[test]
fn without_sparing_use_a_guest_loses_what_it_uses() {
    assert!(least_kept(Guards { use_is_spared: false, ..Guards::default() }) < 0);
}

/// What a guest gets that comes to want its share after another took all that it did not want and lies on.
fn beside_a_liar(guards: Guards) -> (Bytes, Bytes) {
    let mut liar = Guest::new(1, "512M,min=128M,max=1G", Bytes::mib(100));
    liar.lies = true;
    let mut world = World::with(Bytes::gib(1), vec![liar, Guest::new(2, WIDE, Bytes::mib(150))], guards);
    world.run(60);
    world.guests[1].wants = Bytes::mib(400);
    world.run(120);
    assert!(world.charged() <= Bytes::gib(1));
    (world.guests[1].vm.entitlement(), world.target(1))
}

#[test]
fn a_liar_takes_no_more_than_its_share_from_who_needs_it() {
    let (share, target) = beside_a_liar(Guards::default());
    assert!(share >= Bytes::mib(470), "{share}");
    assert!(target.saturating_add(Bytes::mib(20)) >= share, "{target} of {share}");
}

#[test]
fn without_fair_shares_first_a_liar_takes_the_others_buffers() {
    let (share, _) = beside_a_liar(Guards { fair_comes_first: false, ..Guards::default() });
    assert!(share < Bytes::mib(470), "{share}");
}

/// For how many of 1000 seconds a guest is without half of its buffer, beside one that claims all there is
/// but for six seconds in two minutes.
fn seconds_without_a_buffer() -> u32 {
    let liar = Guest::new(1, "512M,min=128M,max=1G", Bytes::mib(100));
    let honest = Guest::new(2, WIDE, Bytes::mib(400));
    let mut world = World::new(Bytes::gib(1), vec![liar, honest]);
    let mut without = 0;
    for second in 0..1000 {
        world.guests[0].lies = second % 125 < 119;
        world.tick();
        without += u32::from(world.target(1) < Bytes::mib(440));
    }
    without
}

#[test]
fn a_moments_modesty_is_not_rewarded_with_another_loan() {
    let without = seconds_without_a_buffer();
    assert!(without < 400, "{without}");
}

/// How far over the budget two guests are that take all there is and then open their balloons by
/// a piece each, as Linux does where an allocation finds nothing else.
fn over_when_balloons_open(guards: Guards) -> Bytes {
    let guests = vec![Guest::new(1, WIDE, Bytes::mib(900)), Guest::new(2, WIDE, Bytes::mib(900))];
    let mut world = World::with(Bytes::mib(1000), guests, guards);
    world.run(30);
    for guest in &mut world.guests {
        guest.vm.observed.actual += guards::THERE;
    }
    world.round();
    world.balance.over
}

#[test]
fn what_guests_take_back_on_their_own_is_within_the_budget() {
    assert_eq!(over_when_balloons_open(Guards::default()), Bytes::ZERO);
    let without = Guards { slack_is_kept: false, ..Guards::default() };
    assert!(over_when_balloons_open(without) > Bytes::ZERO, "all that was free had been granted");
}

/// The lowest target of a guest whose use rises unseen, as its memory goes to another.
fn lowest_while_use_rises(guards: Guards) -> Bytes {
    let mut payer = Guest::new(1, "3G,min=256M,max=4G", Bytes::mib(1400));
    payer.speed = Bytes::mib(220);
    let short = Guest::new(2, "1G,min=256M,max=4G", Bytes::mib(800));
    let mut world = World::with(Bytes::mib(4200), vec![payer, short], guards);
    world.run(5);
    world.guests[1].wants = Bytes::mib(2800);
    let mut lowest = world.target(0);
    for _ in 0..10 {
        world.guests[0].wants += Bytes::mib(20);
        // What is read at a tick was counted a little before.
        world.guests[0].age = Duration::from_millis(500);
        world.tick();
        lowest = lowest.min(world.target(0));
    }
    lowest
}

#[test]
fn memory_in_doubt_is_not_taken() {
    let spared = lowest_while_use_rises(Guards::default());
    let taken = lowest_while_use_rises(Guards { uncertainty_is_spared: false, ..Guards::default() });
    assert!(taken < spared, "{taken} against {spared}");
}

/// How much a guest is given for a burst that is over before another has paid for it.
fn given_too_late(guards: Guards) -> Bytes {
    let mut payer = Guest::new(1, "3G,min=256M,max=4G", Bytes::mib(1000));
    payer.speed = Bytes::mib(100);
    let short = Guest::new(2, "1G,min=256M,max=4G", Bytes::mib(900));
    let mut world = World::with(Bytes::mib(4200), vec![payer, short], guards);
    world.run(10);
    world.guests[1].wants = Bytes::mib(2500);
    world.run(3);
    let had = world.target(1);
    world.guests[1].wants = Bytes::mib(900);
    world.run(5);
    world.target(1).saturating_sub(had)
}

#[test]
fn nothing_is_given_for_what_is_over() {
    assert_eq!(given_too_late(Guards::default()), Bytes::ZERO);
    assert!(given_too_late(Guards { news_counts: false, ..Guards::default() }) > Bytes::ZERO);
}
