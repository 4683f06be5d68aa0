//! Devices that are saved in one process and restored in another, and states that nobody saved.

use devices::pci::{ConfigState, VectorState};
use devices::state::{StateError, Version};
use devices::testing::pci::{BAR, FUNCTION_MASK, MSIX_ENABLE, NOTIFY};
use devices::testing::{BUFFERS, CARRIERS, Carrier, Guest, RUNNING};
use devices::virtio::pci::BAR_SIZE;
use devices::virtio::rng::Rng;
use devices::virtio::saved::{DriverState, PciState, QueueState, Stage, TransportState, VirtioState};
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::{Value, json};
use virtio_bindings::virtio_config::VIRTIO_CONFIG_S_FAILED;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_WRITE};

fn guest(carrier: Carrier) -> Guest {
    Guest::on(carrier, |_| Box::new(Rng::new()))
}

/// Through text, as a file or a socket would carry it.
fn carried(state: &VirtioState) -> VirtioState {
    serde_json::from_str(&serde_json::to_string(state).unwrap()).unwrap()
}

fn moved(guest: Guest) -> Guest {
    let state = carried(&guest.save().unwrap());
    let there = guest.restore(Box::new(Rng::new()), state.clone()).unwrap();
    assert_eq!(there.save().unwrap(), state, "nothing is lost on the way");
    there
}

#[test]
fn a_driver_does_not_notice_that_its_device_has_moved() {
    for mut guest in CARRIERS.map(guest) {
        // Without EVENT_IDX, so that every used buffer is worth an interrupt.
        guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
        for round in 0..200_u16 {
            guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
            // Offered before the move, with a notification that is lost on the way.
            guest.offer(0, 0);
            guest = moved(guest);
            guest.run();
            assert_eq!(guest.used(0), [(0, 64)], "in round {round}");
            assert!(guest.interrupts() > 0, "in round {round}");
            guest.write(VIRTIO_MMIO_INTERRUPT_ACK, 1);
            assert_eq!(guest.status(), RUNNING);
        }
    }
}

#[test]
fn an_interrupt_that_stood_is_raised_again() {
    let mut guest = guest(Carrier::Mmio);
    guest.start(0);
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    let guest = moved(guest);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 1);
    assert!(guest.interrupts() > 0);
}

#[test]
fn a_message_that_is_pending_behind_a_mask_stays_so() {
    let mut guest = guest(Carrier::Pci);
    guest.start(0);
    let pci = guest.pci().unwrap();
    pci.set_msix(MSIX_ENABLE | FUNCTION_MASK);
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    let mut guest = moved(guest);
    assert_eq!(guest.interrupts(), 0);
    let pci = guest.pci().unwrap();
    pci.set_msix(MSIX_ENABLE);
    assert_eq!(pci.host.delivered(), [0, 1], "of the queue, not of the configuration");
}

#[test]
fn a_device_that_its_driver_has_given_up_twice_can_be_moved() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        let failed = RUNNING | VIRTIO_CONFIG_S_FAILED;
        guest.write(VIRTIO_MMIO_STATUS, failed);
        guest.write(VIRTIO_MMIO_STATUS, failed);
        assert_eq!(moved(guest).status(), failed);
    }
}

#[test]
fn a_bar_is_where_the_guest_had_it() {
    let mut guest = guest(Carrier::Pci);
    guest.start(0);
    let elsewhere = BAR + 3 * BAR_SIZE;
    guest.pci().unwrap().move_bar(elsewhere);
    let mut guest = moved(guest);
    assert_eq!(guest.status(), RUNNING);
    let connected = guest.pci().unwrap().host.connected.lock().unwrap().clone();
    assert_eq!(connected.into_keys().collect::<Vec<_>>(), [elsewhere + NOTIFY]);
}

#[test]
fn a_driver_can_be_moved_at_every_step_of_its_way() {
    for carrier in CARRIERS {
        let mut guest = moved(guest(carrier));
        guest.write(VIRTIO_MMIO_STATUS, 1);
        guest = moved(guest);
        guest.write(VIRTIO_MMIO_STATUS, 3);
        guest = moved(guest);
        guest.agree(0);
        guest = moved(guest);
        guest.set_up(0);
        guest = moved(guest);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
        guest.write(VIRTIO_MMIO_STATUS, RUNNING);
        guest = moved(guest);
        // PCI has no way to take a queue back.
        if carrier == Carrier::Mmio {
            guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
            guest = moved(guest);
            assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
        }
        guest.write(VIRTIO_MMIO_STATUS, RUNNING | 0x80);
        guest = moved(guest);
        assert_eq!(guest.status(), RUNNING | 0x80);
        guest.start(0);
    }
}

#[test]
fn malformed_chains_stay_counted() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        // A buffer to read has no place in a request for entropy.
        guest.describe(0, 0, BUFFERS, 64, 0, 0);
        guest.send(0, 0);
        let state = guest.save().unwrap();
        assert_eq!(state.device["faults"], json!({"total": 1, "since_reset": 1}));
        moved(guest);
    }
}

/// A running device's state with one thing changed.
fn spoilt(carrier: Carrier, spoil: impl FnOnce(&mut VirtioState)) -> StateError {
    let mut guest = guest(carrier);
    guest.start(0);
    let mut state = guest.save().unwrap();
    spoil(&mut state);
    guest.restore(Box::new(Rng::new()), state).err().expect("it is refused")
}

type Spoil = fn(&mut VirtioState);

#[test]
fn what_no_device_can_have_come_to_is_refused_by_name() {
    let cases: [(Spoil, &str); 11] = [
        (|s| s.device_id = 5, "type 5"),
        (|s| s.driver.queues.clear(), "0 queues"),
        (|s| s.driver.queues[0].size = 3, "queue 0"),
        (|s| s.driver.queues[0].size = 1 << 20, "queue 0"),
        (|s| s.driver.queues[0].descriptors = 8, "queue 0"),
        (|s| s.driver.queues[0].used = 1 << 40, "queue 0"),
        (|s| s.driver.queues[0].used = s.driver.queues[0].descriptors, "queue 0"),
        (|s| s.driver.queues[0].next_available = s.driver.queues[0].next_used.wrapping_sub(1), "queue 0"),
        (|s| s.driver.driver_features |= 1, "features"),
        (|s| s.driver.driver_features = 0, "features"),
        (|s| s.driver.stage = Stage::Failed(16), "Status"),
    ];
    for carrier in CARRIERS {
        for (spoil, word) in cases {
            let sentence = spoilt(carrier, spoil).to_string();
            assert!(sentence.contains(word), "{word} is missing in {sentence}");
        }
    }
}

/// The same of PCI's registers.
fn pci_registers(state: &mut VirtioState) -> &mut PciState {
    match &mut state.transport {
        TransportState::Pci(pci) => pci,
        other => panic!("{other:?}"),
    }
}

#[test]
fn what_no_transport_can_have_come_to_is_refused_by_name() {
    let status = |status| TransportState::Mmio { interrupt_status: status };
    let cases: [(Spoil, &str); 5] = [
        (|s| pci_registers(s).config_vector = 2, "MSI-X vector"),
        (|s| pci_registers(s).queue_vectors = vec![], "0 queues"),
        (|s| pci_registers(s).msix.truncate(1), "MSI-X table"),
        (|s| pci_registers(s).isr = 4, "ISR status"),
        (
            |s| pci_registers(s).config = serde_json::from_value(json!(vec![0; 256])).unwrap(),
            "configuration space",
        ),
    ];
    for (spoil, word) in cases {
        let sentence = spoilt(Carrier::Pci, spoil).to_string();
        assert!(sentence.contains(word), "{word} is missing in {sentence}");
    }
    let sentence = spoilt(Carrier::Mmio, |s| s.transport = status(4)).to_string();
    assert!(sentence.contains("InterruptStatus"), "{sentence}");
    let sentence = spoilt(Carrier::Pci, |s| s.transport = status(0)).to_string();
    assert!(sentence.contains("on mmio, and this one is on PCI"), "{sentence}");
}

#[test]
fn another_version_is_refused_with_a_sentence() {
    let error =
        spoilt(Carrier::Mmio, |state| state.device = json!({"version": 2, "entropy": "more"})).to_string();
    assert!(error.contains("version 2") && error.contains("knows version 1"), "{error}");
    let error = spoilt(Carrier::Mmio, |state| state.device = Value::Null).to_string();
    assert!(error.contains("the entropy device can't be read"), "{error}");
    let mut state = serde_json::to_value(guest(Carrier::Mmio).save().unwrap()).unwrap();
    state["version"] = json!(7);
    let error = serde_json::from_value::<VirtioState>(state).unwrap_err().to_string();
    assert!(error.contains("version 7"), "{error}");
}

fn stage() -> impl Strategy<Value = Stage> {
    prop_oneof![
        1 => Just(Stage::Reset),
        1 => Just(Stage::Acknowledged),
        1 => Just(Stage::Driver),
        1 => Just(Stage::FeaturesAgreed),
        4 => Just(Stage::Running),
        1 => (0_u32..20).prop_map(Stage::Failed),
    ]
}

/// Where rings may stand, and where they mustn't.
fn place() -> impl Strategy<Value = u64> {
    prop_oneof![4 => (0_u64..0x4_0000).prop_map(|place| place & !15), 1 => any::<u64>()]
}

fn queue() -> impl Strategy<Value = QueueState> {
    let size = prop_oneof![4 => (0_u32..7).prop_map(|shift| 1 << shift), 1 => any::<u32>()];
    (size, place(), place(), place(), prop::bool::weighted(0.9), any::<u16>(), 0_u16..70).prop_map(
        |(size, descriptors, available, used, ready, next_used, ahead)| QueueState {
            size,
            descriptors,
            available,
            used,
            ready,
            next_available: next_used.wrapping_add(ahead),
            next_used,
        },
    )
}

fn driver() -> impl Strategy<Value = DriverState> {
    let selects = (any::<u32>(), 0_u32..3, 0_u32..3);
    let features = prop_oneof![9 => Just(0x1_3000_0000_u64), 1 => any::<u64>()];
    (stage(), selects, features, queue(), any::<u32>(), any::<bool>()).prop_map(
        |(stage, selects, driver_features, queue, generation, broken)| {
            let (queue_select, device_features_select, driver_features_select) = selects;
            DriverState {
                stage,
                broken,
                generation,
                queue_select,
                device_features_select,
                driver_features_select,
                driver_features,
                queues: vec![queue],
            }
        },
    )
}

/// PCI's registers, of which the guest has made something.
fn pci() -> impl Strategy<Value = TransportState> {
    let vector = || prop_oneof![4 => 0_u16..3, 1 => any::<u16>()];
    let entry = (any::<u64>(), any::<u32>(), any::<bool>(), any::<bool>());
    let config = prop_oneof![4 => vec(any::<u8>(), 0..1), 1 => vec(any::<u8>(), 0..4)];
    let bar = prop_oneof![Just(BAR), any::<u64>()];
    ((vec(entry, 2), config, bar, any::<u8>(), any::<bool>()), 0_u8..5, vector(), vector()).prop_map(
        |((table, spoilt, bar, command, enabled), isr, config_vector, queue_vector)| {
            let mut config = serde_json::to_value(fresh_config()).unwrap();
            for (place, byte) in (0..).zip(spoilt) {
                config[17 * place + 1] = json!(byte);
            }
            for (place, byte) in (0x10..).zip((bar & !0x7fff | 4).to_le_bytes()) {
                config[place] = json!(byte);
            }
            config[4] = json!(command & 0b0100_0110);
            config[0x43] = json!(u8::from(enabled) << 7);
            let entry = |(address, data, masked, pending)| VectorState { address, data, masked, pending };
            TransportState::Pci(PciState {
                config: serde_json::from_value(config).unwrap(),
                msix: table.into_iter().map(entry).collect(),
                isr,
                config_vector,
                queue_vectors: vec![queue_vector],
            })
        },
    )
}

fn fresh_config() -> ConfigState {
    let mut state = guest(Carrier::Pci).save().unwrap();
    pci_registers(&mut state).config.clone()
}

fn state() -> impl Strategy<Value = VirtioState> {
    let mmio = (0_u32..4).prop_map(|interrupt_status| TransportState::Mmio { interrupt_status });
    let transport = prop_oneof![mmio, pci()];
    (driver(), transport, any::<u64>(), any::<u32>()).prop_map(|(driver, transport, total, since)| {
        let device = json!({"version": 1, "faults": {"total": total, "since_reset": since}});
        VirtioState { version: Version, device_id: 4, driver, transport, device }
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    /// Whatever is restored, the device comes to rest, keeps to guest memory, and a driver that
    /// starts anew gets on with it.
    #[test]
    fn no_state_breaks_a_device(state in state(), ring: u8) {
        let guest = guest(match state.transport {
            TransportState::Mmio { .. } => Carrier::Mmio,
            TransportState::Pci(_) => Carrier::Pci,
        });
        let memory = guest.ram.memory.clone();
        vm_memory::Bytes::write_slice(&*memory, &[ring; 0x4_0000], vm_memory::GuestAddress(0)).unwrap();
        drop(memory);
        if let Ok(mut guest) = guest.restore(Box::new(Rng::new()), state) {
            guest.run();
            guest.notify(0);
            guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
            guest.notify(0);
            let again = carried(&guest.save().unwrap());
            let mut guest = guest.restore(Box::new(Rng::new()), again).expect("what was saved is restored");
            guest.ram.assert_canaries();
            guest.start(0);
            guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
            guest.send(0, 0);
            prop_assert_eq!(guest.used(0), [(0, 64)]);
        }
    }
}
