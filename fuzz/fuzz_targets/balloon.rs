//! Any story of a hostile guest against the balloon.
#![no_main]

use devices::testing::hostile::{any_act, from_bytes};
use libfuzzer_sys::fuzz_target;

#[path = "../../balloon/tests/room/attack.rs"]
mod attack;
#[path = "../../balloon/tests/room/mod.rs"]
mod room;

fuzz_target!(|bytes: &[u8]| {
    let steps = from_bytes(&attack::step(any_act(attack::QUEUES, attack::SIZE)), bytes);
    let (mut guest, handle) = attack::hostile_room();
    for step in &steps {
        attack::take(step, &mut guest, &handle);
    }
    attack::assert_usable(&mut guest, &handle);
});
