//! Any story of a hostile guest against the virtio transport and its queues.
#![no_main]

use devices::testing::Carrier;
use devices::testing::hostile::{any_act, from_bytes};
use libfuzzer_sys::fuzz_target;

#[path = "../../devices/tests/attack/mod.rs"]
mod attack;

fuzz_target!(|bytes: &[u8]| {
    let acts = from_bytes(&any_act(1, attack::SIZE), bytes);
    let mut guest = attack::guest(Carrier::Mmio);
    for act in &acts {
        act.apply(&mut guest);
    }
    attack::assert_usable(&mut guest);
});
