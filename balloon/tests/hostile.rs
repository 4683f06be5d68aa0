//! A hostile guest against the balloon: nothing panics, nothing beside guest
//! RAM is touched, and after a reset the balloon works.

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE};
use devices::testing::hostile::{any_act, chain_act};
use devices::testing::{BUFFERS, HIGH, NEEDS_RESET, RUNNING};
use proptest::collection::vec;
use proptest::prelude::*;
use vm_memory::{Bytes as _, GuestAddress};

#[path = "room/attack.rs"]
mod attack;
mod room;
use attack::{QUEUES, SIZE, assert_usable, hostile_room, step, take};

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn anything_a_guest_does_ends_with_a_balloon_that_works(steps in vec(step(any_act(QUEUES, SIZE)), 1..96)) {
        let (mut guest, handle) = hostile_room();
        for step in &steps {
            take(step, &mut guest, &handle);
        }
        assert_usable(&mut guest, &handle);
    }

    #[test]
    fn any_chains_leave_memory_outside_the_guest_alone(steps in vec(step(chain_act(QUEUES, SIZE)), 1..96)) {
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
