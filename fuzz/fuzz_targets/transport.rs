//! Any story of a hostile guest against the virtio transport and its queues.
#![no_main]

use devices::testing::hostile::{any_act, from_bytes};
use libfuzzer_sys::fuzz_target;
use proptest::collection::vec;

#[path = "../../devices/tests/attack/mod.rs"]
mod attack;

fuzz_target!(|bytes: &[u8]| {
    let Some(acts) = from_bytes(&vec(any_act(1, attack::SIZE), 1..64), bytes) else { return };
    let mut guest = attack::guest();
    for act in &acts {
        act.apply(&mut guest);
    }
    attack::assert_usable(&mut guest);
});
