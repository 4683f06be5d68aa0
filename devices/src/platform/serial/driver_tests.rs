//! The port under a model of Linux's 8250 driver (`drivers/tty/serial/8250`, `serial_core.c`, 6.1 and 6.12):
//! nothing is lost, nothing is stuck, and no interrupt handler goes on without end.

mod driver;

use std::time::Duration;

use proptest::collection::vec;
use proptest::prelude::*;

use self::driver::{GuestAct, HostAct, World};
use super::uart::*;
use super::*;

fn bytes(count: usize) -> Vec<u8> {
    // Never 0, which is what an empty port reads as.
    (1..=251).cycle().take(count).collect()
}

#[test]
fn input_of_every_size_comes_in_whole() {
    for size in 1..=BACKLOG {
        let input = bytes(size);
        let mut world = World::new(&input, Vec::new());
        world.open();
        world.host(HostAct::Bring(usize::MAX));
        world.assert_whole(&input);
    }
}

#[test]
fn output_of_every_size_goes_out_whole() {
    for size in 1..=BACKLOG {
        let mut world = World::new(&[], Vec::new());
        world.open();
        world.write(&bytes(size));
        world.assert_whole(&[]);
        assert_eq!(world.read, bytes(size));
    }
}

/// What comes in goes out again, as at a terminal that people type at, and both are on their way at once.
#[test]
fn an_echo_of_any_size_comes_back_whole() {
    // Each remainder by what the port and the driver take at a time comes up.
    for size in (1..=BACKLOG).step_by(13) {
        let input = bytes(size);
        let script = [(HostAct::Bring(1 + size % 97), 4), (HostAct::Read(1 + size % 89), 4)];
        let mut world = World::new(&input, script.repeat(8));
        world.open();
        world.guest(GuestAct::Echo(true));
        world.host(HostAct::Bring(1 + size % 300));
        world.assert_whole(&input);
        assert_eq!(world.read, input);
    }
}

#[test]
fn input_that_comes_before_anybody_listens_is_there_when_somebody_does() {
    let input = bytes(2 * BACKLOG);
    let mut world = World::new(&input, Vec::new());
    world.host(HostAct::Bring(usize::MAX));
    world.open();
    world.close();
    world.host(HostAct::Bring(usize::MAX));
    world.open();
    world.assert_whole(&input);
}

/// Input that is always there keeps no handler, and leaves time for the rest of the guest.
#[test]
fn a_flood_of_input_leaves_a_third_of_the_time() {
    let input = bytes(50_000);
    let script = vec![(HostAct::Bring(16), 4); 400_000];
    let mut world = World::new(&input, script);
    world.open();
    let (begin, before) = (world.now, world.accesses);
    world.assert_whole(&input);
    let busy = Duration::from_micros(4 * (world.accesses - before) as u64);
    let whole = world.now - begin;
    assert!(busy * 10 <= whole * 7, "busy for {busy:?} of {whole:?}");
    assert!(whole < busy * 2, "idle for most of {whole:?}");
}

/// Other processors fill the driver's buffer as fast as it is emptied.
#[test]
fn a_flood_of_output_leaves_a_third_of_the_time() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.flood = bytes(50_000);
    world.write_flood();
    let (begin, before) = (world.now, world.accesses);
    world.assert_whole(&[]);
    assert_eq!(world.read, bytes(50_000));
    let busy = Duration::from_micros(4 * (world.accesses - before) as u64);
    let whole = world.now - begin;
    assert!(busy * 10 <= whole * 7, "busy for {busy:?} of {whole:?}");
    assert!(whole < busy * 2, "idle for most of {whole:?}");
}

/// A reader that is slow gets everything, and the kernel never waits for it.
#[test]
fn a_slow_reader_loses_nothing() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.has_printed(&bytes(900 << 10));
    world.flood = bytes(400 << 10);
    world.write_flood();
    let mut held = 0;
    while !world.flood.is_empty() {
        // Without a reader, until the guest is held back.
        while world.interrupt || world.wake.is_some_and(|wake| wake < world.now + PATIENCE / 2) {
            world.go_on(false);
        }
        let waiting = world.output.counts().waiting;
        assert!(waiting > MOST_WAITING as u64 / 2, "held back with only {waiting} bytes waiting");
        world.print(b"[1.000000] a line of the kernel\r\n");
        held += 1;
        for _ in 0..16 {
            world.host(HostAct::Read(usize::MAX));
        }
    }
    assert!(held > 4, "the reader was not slow");
    world.assert_whole(&[]);
}

/// The handler has found its reason, and then the buffer is full: another processor was faster.
#[test]
fn a_driver_that_finds_no_room_after_all_is_called_again() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    world.xmit.extend(b"waits");
    world.set_ier(world.ier | IER_TRANSMITTER);
    assert_eq!(world.port_in(IIR) & 0x0f, IIR_TRANSMITTER);
    world.has_printed(&bytes(1000 << 10));
    world.handle_pass();
    assert_eq!(world.xmit.len(), 5, "there is room");
    world.interrupt = false;
    world.assert_whole(&[]);
}

/// A reader who never reads stops a program for [`PATIENCE`], and no more.
#[test]
fn a_reader_who_is_gone_in_all_but_name_holds_nobody_for_ever() {
    let mut world = World::new(&[], Vec::new());
    world.open();
    let begin = world.now;
    world.has_printed(&bytes(900 << 10));
    world.flood = bytes(300 << 10);
    world.write_flood();
    while world.go_on(false) {}
    assert!(world.flood.is_empty() && world.xmit.is_empty(), "output is stuck");
    let whole = world.now - begin;
    assert!(whole > PATIENCE && whole < PATIENCE * 6, "{whole:?}");
    let counts = world.output.counts();
    assert!(counts.waiting <= MOST_WAITING as u64);
    assert_eq!(counts.lost + counts.waiting, world.sent.len() as u64);
}

fn host_act() -> impl Strategy<Value = (HostAct, u64)> {
    let act = prop_oneof![
        6 => Just(HostAct::Nothing),
        2 => (1_usize..600).prop_map(HostAct::Bring),
        1 => (1_usize..600).prop_map(HostAct::Read),
    ];
    (act, 1_u64..40)
}

fn guest_act() -> impl Strategy<Value = GuestAct> {
    prop_oneof![
        2 => vec(1_u8..=255, 1..600).prop_map(GuestAct::Write),
        1 => (1..=BACKLOG).prop_map(|size| GuestAct::Write(bytes(size))),
        1 => any::<bool>().prop_map(GuestAct::Echo),
        1 => vec(1_u8..=255, 1..80).prop_map(GuestAct::Print),
        1 => Just(GuestAct::Throttle),
        2 => Just(GuestAct::Unthrottle),
        1 => Just(GuestAct::Reopen),
        2 => (1_u64..3000).prop_map(GuestAct::Rest),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn nothing_is_lost_stuck_or_without_end(
        size in 0..=BACKLOG,
        before in 0_usize..300,
        acts in vec((guest_act(), 0_usize..4), 0..20),
        script in vec(host_act(), 0..4000),
    ) {
        let input = bytes(size);
        let mut world = World::new(&input, script);
        world.host(HostAct::Bring(before));
        world.open();
        for (act, steps) in acts {
            world.guest(act);
            for _ in 0..steps {
                world.go_on(true);
            }
        }
        world.assert_whole(&input);
    }
}
