//! Any story of a hostile guest against a device on PCI: configuration space, BAR moves, MSI-X.
#![no_main]

use devices::testing::Carrier;
use devices::testing::hostile::{any_pci_act, from_bytes};
use libfuzzer_sys::fuzz_target;

#[path = "../../devices/tests/attack/mod.rs"]
mod attack;

fuzz_target!(|bytes: &[u8]| {
    let acts = from_bytes(&any_pci_act(1, attack::SIZE), bytes);
    let mut guest = attack::guest(Carrier::Pci);
    for act in &acts {
        act.apply(&mut guest);
    }
    guest.transport().lock().unwrap().resume();
    attack::assert_usable(&mut guest);
});
