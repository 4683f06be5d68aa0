//! What a hostile guest does to the balloon, and what must hold whatever it does.
//! Shared by the property tests and the fuzz target.

use std::time::Duration;

use api::status::DriverState;
use api::units::{Bytes, PAGE_SIZE};
use balloon::device::{Config, Handle, MUST_TELL_HOST};
use devices::testing::hostile::Act;
use devices::testing::{BUFFERS, Guest, HIGH, RUNNING};
use proptest::prelude::*;
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_CONFIG;
use vm_memory::{Bytes as _, GuestAddress};

use crate::room::{MAP, config, guest};

/// Queues of the balloon.
pub const QUEUES: usize = 5;
/// The largest of them.
pub const SIZE: u16 = 128;

/// What the guest does, and the host meanwhile.
#[derive(Clone, Debug)]
pub enum Step {
    /// An act of the guest.
    Guest(Act),
    /// The host sets a target.
    Target(u64),
    /// Time passes.
    Wait,
}

/// One step, of a guest that does `act`s.
pub fn step(act: impl Strategy<Value = Act>) -> impl Strategy<Value = Step> {
    prop_oneof![
        20 => act.prop_map(Step::Guest),
        1 => any::<u64>().prop_map(|n| Step::Target(n % (2 * MAP.0))),
        1 => Just(Step::Wait),
    ]
}

/// Does one step, and checks what holds after any.
pub fn take(step: &Step, guest: &mut Guest, handle: &Handle) {
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

/// A balloon whose timer comes often.
pub fn hostile_room() -> (Guest, Handle) {
    guest(Config { statistics_interval: Duration::from_millis(1), ..config() })
}

/// Whatever was before: after a reset an honest driver gets its balloon.
pub fn assert_usable(guest: &mut Guest, handle: &Handle) {
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
