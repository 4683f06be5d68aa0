//! A guest with a balloon, for the tests.

use std::time::Duration;

use api::units::Bytes;
use balloon::device::{Balloon, Config, Handle};
use balloon::discard::{Backing, Discard, Region};
use devices::testing::{Guest, GuestRam, HIGH, LOW, REGION};
use vm_memory::GuestAddress;

/// All RAM of the test guest.
pub const MAP: Bytes = Bytes(2 * REGION as u64);

/// What most tests need: a target of half the map, every feature, and a timer that never comes.
pub fn config() -> Config {
    Config {
        map: MAP,
        target: Bytes(MAP.0 / 2),
        deflate_on_oom: true,
        reporting: true,
        statistics_interval: Duration::from_secs(3600),
        refills: false,
    }
}

/// A balloon over the test guest's RAM.
pub fn device(ram: &GuestRam, config: Config) -> (Balloon, Handle) {
    let region = |guest| Region {
        guest: GuestAddress(guest),
        host: ram.host(guest),
        len: Bytes(REGION as u64),
        backing: Backing::Anonymous,
        collapses: None,
    };
    // SAFETY: the test guest's RAM, which goes after the device.
    let discard = unsafe { Discard::new(vec![region(LOW), region(HIGH)]) };
    Balloon::new(config, discard).unwrap()
}

/// A guest whose RAM a balloon works on.
pub fn guest(config: Config) -> (Guest, Handle) {
    let mut handle = None;
    let guest = Guest::new(|ram| {
        let (device, its_handle) = device(ram, config);
        handle = Some(its_handle);
        Box::new(device)
    });
    (guest, handle.unwrap())
}
