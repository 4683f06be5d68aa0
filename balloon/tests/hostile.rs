//! A hostile guest against the balloon: nothing panics, nothing beside guest
//! RAM is touched, and after a reset the balloon works.

use std::time::Duration;

use balloon::device::{Config, Handle, MUST_TELL_HOST};
use balloon::status::DriverState;
use balloon::units::{Bytes, PAGE_SIZE};
use devices::testing::hostile::{Act, any_act, chain_act};
use devices::testing::{BUFFERS, Guest, HIGH, NEEDS_RESET, RUNNING};
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

mod room;
use room::{MAP, config, guest};

const QUEUES: usize = 5;
const SIZE: u16 = 128;

/// What the guest does, and the host meanwhile.
#[derive(Clone, Debug)]
enum Step {
    Guest(Act),
    Target(u64),
    Wait,
}

fn steps(act: impl Strategy<Value = Act>) -> impl Strategy<Value = Vec<Step>> {
    let step = prop_oneof![
        20 => act.prop_map(Step::Guest),
        1 => any::<u64>().prop_map(|n| Step::Target(n % (2 * MAP.0))),
        1 => Just(Step::Wait),
    ];
    vec(step, 1..96)
}

fn take(step: &Step, guest: &mut Guest, handle: &Handle) {
    match step {
        Step::Guest(act) => act.apply(guest),
        Step::Target(target) => drop(handle.set_target(Bytes(*target))),
        // The statistics timer, if anything.
        Step::Wait => drop(guest.wait(2)),
    }
    guest.run();
    assert!(handle.actual() <= MAP);
    assert!(handle.target() > Bytes::ZERO && handle.target() <= MAP);
    assert_eq!(handle.counters().discard_failures, 0);
}

fn hostile_room() -> (Guest, Handle) {
    guest(Config { statistics_interval: Duration::from_millis(1), ..config() })
}

fn assert_usable(guest: &mut Guest, handle: &Handle) {
    guest.ram.assert_canaries();
    // So that the page goes at once.
    guest.start(1 << MUST_TELL_HOST);
    assert_eq!(handle.actual(), MAP);
    assert_eq!(handle.driver(), DriverState::Active);
    let wanted = u64::from(guest.read(VIRTIO_MMIO_CONFIG));
    assert_eq!(wanted, MAP.saturating_sub(handle.target()).pages().0);
    guest.ram.memory.write_obj(7u8, GuestAddress(HIGH)).unwrap();
    let pfn = u32::try_from(HIGH / PAGE_SIZE).unwrap();
    guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS)).unwrap();
    guest.describe(0, 0, BUFFERS, 4, 0, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), [(0, 0)]);
    assert!(!guest.ram.resident(HIGH));
    assert_eq!(guest.status(), RUNNING);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn anything_a_guest_does_ends_with_a_balloon_that_works(steps in steps(any_act(QUEUES, SIZE))) {
        let (mut guest, handle) = hostile_room();
        for step in &steps {
            take(step, &mut guest, &handle);
        }
        assert_usable(&mut guest, &handle);
    }

    #[test]
    fn any_chains_leave_memory_outside_the_guest_alone(steps in steps(chain_act(QUEUES, SIZE))) {
        let (mut guest, handle) = hostile_room();
        guest.start(0);
        for step in &steps {
            take(step, &mut guest, &handle);
            let broken = guest.status() == RUNNING | NEEDS_RESET;
            prop_assert!(broken || guest.status() == RUNNING);
            prop_assert_eq!(broken, handle.driver() == DriverState::Broken);
        }
        assert_usable(&mut guest, &handle);
    }

    #[test]
    fn any_page_numbers_drop_guest_pages_only(pfns in vec(any_pfn(), 1..2000), queue in 0usize..2) {
        let (mut guest, handle) = hostile_room();
        guest.start(0);
        for (place, pfn) in pfns.iter().enumerate() {
            guest.ram.memory.write_obj(pfn.to_le(), GuestAddress(BUFFERS + 4 * place as u64)).unwrap();
        }
        guest.describe(queue, 0, BUFFERS, 4 * pfns.len() as u32, 0, 0);
        guest.send(queue, 0);
        let counters = handle.counters();
        if counters.malformed == 0 {
            let moved = if queue == 0 { counters.inflated } else { counters.deflated };
            prop_assert!(moved <= Bytes(pfns.len() as u64 * PAGE_SIZE));
        }
        assert_usable(&mut guest, &handle);
    }
}

/// Mostly pages of the upper region (the lower holds the rings), its edges, and noise.
fn any_pfn() -> impl Strategy<Value = u32> {
    let first = u32::try_from(HIGH / PAGE_SIZE).unwrap();
    prop_oneof![8 => first - 4..first + 260, 1 => any::<u32>(), 1 => 0u32..512]
}
