//! Any story of a hostile guest against virtio-mem.
#![no_main]

use devices::testing::hostile::{any_act, from_bytes};
use libfuzzer_sys::fuzz_target;

#[path = "../../balloon/tests/yard/attack.rs"]
mod attack;
#[path = "../../balloon/tests/yard/mod.rs"]
#[expect(dead_code, reason = "shared with tests that restore devices")]
mod yard;

fuzz_target!(|bytes: &[u8]| {
    let steps = from_bytes(&attack::step(any_act(attack::QUEUES, attack::SIZE)), bytes);
    let mut yard = yard::Yard::new();
    for step in &steps {
        attack::take(step, &mut yard);
    }
    attack::assert_usable(&mut yard);
});
