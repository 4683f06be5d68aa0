//! Any story of a hostile guest against the network device, while frames come and go.
#![no_main]

use devices::testing::Carrier;
use devices::testing::hostile::{any_act, from_bytes};
use libfuzzer_sys::fuzz_target;

#[path = "../../devices/tests/net/attack.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod attack;
#[path = "../../devices/tests/net/room.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod room;

fuzz_target!(|bytes: &[u8]| {
    let steps = from_bytes(&attack::step(any_act(attack::QUEUES, attack::SIZE)), bytes);
    let (mut guest, mut peer) = attack::hostile_room(Carrier::Mmio);
    for step in &steps {
        attack::take(step, &mut guest, &mut peer);
    }
    room::assert_usable(&mut guest, &mut peer);
});
