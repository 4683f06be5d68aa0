//! A hostile guest against the network device.

use devices::testing::CARRIERS;
use devices::testing::hostile::{any_act, any_pci_act, chain_act};
use devices::testing::{Carrier, NEEDS_RESET, RUNNING};
use proptest::collection::vec;
use proptest::prelude::*;

use super::attack::{QUEUES, SIZE, hostile_room, step, take};
use super::room::assert_usable;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn anything_a_guest_does_ends_with_a_nic_that_works(
        carrier in prop::sample::select(CARRIERS.to_vec()),
        steps in vec(step(any_act(QUEUES, SIZE)), 1..64),
    ) {
        let (mut guest, mut peer) = hostile_room(carrier);
        for step in &steps {
            take(step, &mut guest, &mut peer);
        }
        assert_usable(&mut guest, &mut peer);
    }

    #[test]
    fn any_chains_leave_memory_outside_the_guest_alone(
        carrier in prop::sample::select(CARRIERS.to_vec()),
        refused in prop::sample::select(vec![0u64, 1 << 15, 1 << 28, 1 << 29]),
        steps in vec(step(chain_act(QUEUES, SIZE)), 1..128),
    ) {
        let (mut guest, mut peer) = hostile_room(carrier);
        guest.start(refused);
        for step in &steps {
            take(step, &mut guest, &mut peer);
            prop_assert_eq!(guest.status() & !NEEDS_RESET, RUNNING);
        }
        assert_usable(&mut guest, &mut peer);
    }

    #[test]
    fn anything_a_guest_does_to_pci_ends_with_a_nic_that_works(acts in vec(any_pci_act(QUEUES, SIZE), 1..64)) {
        let (mut guest, mut peer) = hostile_room(Carrier::Pci);
        for act in &acts {
            act.apply(&mut guest);
        }
        guest.transport().lock().unwrap().resume();
        assert_usable(&mut guest, &mut peer);
    }
}
