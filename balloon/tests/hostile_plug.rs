//! A hostile guest against virtio-mem: nothing panics, it never has more than
//! was requested, and after a reset the device works.

use devices::testing::hostile::{any_act, chain_act};
use devices::testing::{NEEDS_RESET, RUNNING};
use proptest::collection::vec;
use proptest::prelude::*;

#[path = "yard/attack.rs"]
mod attack;
#[expect(dead_code, reason = "shared with tests that restore devices")]
mod yard;
use attack::{QUEUES, SIZE, assert_usable, step, take};
use yard::Yard;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn anything_a_guest_does_ends_with_a_device_that_works(steps in vec(step(any_act(QUEUES, SIZE)), 1..96)) {
        let mut yard = Yard::new();
        for step in &steps {
            take(step, &mut yard);
        }
        assert_usable(&mut yard);
    }

    #[test]
    fn any_chains_plug_no_more_than_is_requested(steps in vec(step(chain_act(QUEUES, SIZE)), 1..96)) {
        let mut yard = Yard::new();
        yard.guest.start(0);
        for step in &steps {
            take(step, &mut yard);
            let status = yard.guest.status();
            prop_assert!(status == RUNNING || status == RUNNING | NEEDS_RESET);
        }
        assert_usable(&mut yard);
    }
}
