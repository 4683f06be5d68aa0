//! A hostile guest against the transport and the entropy device.

use devices::testing::hostile::{Act, any_act, any_pci_act, chain_act};
use devices::testing::{BUFFERS, CARRIERS, Carrier, Guest, NEEDS_RESET, RUNNING};
use devices::virtio::queue::MOST_MALFORMED;
use devices::virtio::rng::MOST_BYTES;
use proptest::collection::vec;
use proptest::prelude::*;
use virtio_bindings::virtio_ring::{VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};

mod attack;
use attack::{SIZE, assert_usable, guest};

fn carrier() -> impl Strategy<Value = Carrier> {
    prop::sample::select(CARRIERS.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(512))]

    #[test]
    fn anything_a_guest_does_ends_with_a_device_that_works(
        carrier in carrier(),
        acts in vec(any_act(1, SIZE), 1..64),
    ) {
        let mut guest = guest(carrier);
        for act in &acts {
            act.apply(&mut guest);
        }
        assert_usable(&mut guest);
    }

    #[test]
    fn anything_a_guest_does_to_pci_ends_with_a_device_that_works(acts in vec(any_pci_act(1, SIZE), 1..96)) {
        let mut guest = guest(Carrier::Pci);
        for act in &acts {
            act.apply(&mut guest);
        }
        guest.transport().lock().unwrap().resume();
        assert_usable(&mut guest);
        prop_assert!(guest.interrupts() > 0);
    }

    #[test]
    fn any_chains_leave_memory_outside_the_guest_alone(
        carrier in carrier(),
        acts in vec(chain_act(1, SIZE), 1..128),
    ) {
        let mut guest = guest(carrier);
        guest.start(0);
        for act in &acts {
            act.apply(&mut guest);
            prop_assert_eq!(guest.status() & !NEEDS_RESET, RUNNING);
        }
        assert_usable(&mut guest);
    }

    #[test]
    fn a_whole_table_of_noise_is_answered_or_needs_a_reset(
        carrier in carrier(),
        table in vec((any::<u64>(), any::<u32>(), 0u32..8, 0u16..SIZE), SIZE as usize),
        heads in vec(0u16..SIZE, 1..SIZE as usize),
    ) {
        let mut guest = guest(carrier);
        guest.start(0);
        for (place, (address, len, flags, next)) in table.iter().enumerate() {
            guest.describe(0, place as u16, *address, *len, *flags, *next);
        }
        for head in &heads {
            guest.offer(0, *head);
        }
        guest.notify(0);
        let used: Vec<u16> = guest.used(0).into_iter().map(|(head, _)| head as u16).collect();
        prop_assert_eq!(used, heads);
        assert_usable(&mut guest);
    }
}

/// Sends the chain at descriptor 0 and expects it back with nothing in it.
fn assert_malformed(describe: impl Fn(&Guest)) {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        describe(&guest);
        guest.send(0, 0);
        assert_eq!(guest.used(0), [(0, 0)]);
        assert_eq!(guest.status(), RUNNING);
        assert_usable(&mut guest);
    }
}

const WRITE: u32 = VRING_DESC_F_WRITE;
const NEXT: u32 = VRING_DESC_F_NEXT;
const INDIRECT: u32 = VRING_DESC_F_INDIRECT;

#[test]
fn malformed_chains_come_back_empty() {
    // A loop of one, and of two.
    assert_malformed(|guest| guest.describe(0, 0, BUFFERS, 16, WRITE | NEXT, 0));
    assert_malformed(|guest| {
        guest.describe(0, 0, BUFFERS, 16, WRITE | NEXT, 1);
        guest.describe(0, 1, BUFFERS, 16, WRITE | NEXT, 0);
    });
    // A next outside the table.
    assert_malformed(|guest| guest.describe(0, 0, BUFFERS, 16, WRITE | NEXT, SIZE));
    // Nothing; outside memory; across its end.
    assert_malformed(|guest| guest.describe(0, 0, BUFFERS, 0, WRITE, 0));
    assert_malformed(|guest| guest.describe(0, 0, u64::MAX - 8, 16, WRITE, 0));
    assert_malformed(|guest| guest.describe(0, 0, (1 << 20) - 8, 16, WRITE, 0));
    // The wrong direction, and the wrong order.
    assert_malformed(|guest| guest.describe(0, 0, BUFFERS, 16, 0, 0));
    assert_malformed(|guest| {
        guest.describe(0, 0, BUFFERS, 16, WRITE | NEXT, 1);
        guest.describe(0, 1, BUFFERS, 16, 0, 0);
    });
    // A good buffer in front of a bad one is not written either.
    assert_malformed(|guest| {
        guest.describe(0, 0, BUFFERS, 16, WRITE | NEXT, 1);
        guest.describe(0, 1, 1 << 40, 16, WRITE, 0);
    });
    // Indirect tables: of an odd length, outside memory, in a table, with more entries than the queue.
    assert_malformed(|guest| guest.describe(0, 0, BUFFERS, 17, INDIRECT, 0));
    assert_malformed(|guest| guest.describe(0, 0, 1 << 40, 16, INDIRECT, 0));
    assert_malformed(|guest| {
        guest.describe(0, 0, BUFFERS, 16, INDIRECT, 0);
        guest.describe_at(BUFFERS, BUFFERS, 16, INDIRECT, 0);
    });
    assert_malformed(|guest| {
        let entries = SIZE + 1;
        guest.describe(0, 0, BUFFERS, 16 * u32::from(entries), INDIRECT, 0);
        for place in 0..entries {
            let flags = if place + 1 < entries { WRITE | NEXT } else { WRITE };
            guest.describe_at(BUFFERS + 16 * u64::from(place), BUFFERS + 0x1000, 1, flags, place + 1);
        }
    });
}

#[test]
fn indirect_tables_are_honoured() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(0, 0, BUFFERS, 32, INDIRECT, 0);
        guest.describe_at(BUFFERS, BUFFERS + 0x1000, 10, WRITE | NEXT, 1);
        guest.describe_at(BUFFERS + 16, BUFFERS + 0x2000, 20, WRITE, 0);
        guest.send(0, 0);
        assert_eq!(guest.used(0), [(0, 30)]);
    }
}

#[test]
fn a_request_gets_a_bounded_answer() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(0, 0, BUFFERS, 0x4_0000, WRITE, 0);
        guest.send(0, 0);
        assert_eq!(guest.used(0), [(0, MOST_BYTES as u32)]);
    }
}

#[test]
fn too_many_malformed_chains_need_a_reset() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(0, 0, BUFFERS, 0, WRITE, 0);
        for _ in 0..MOST_MALFORMED {
            guest.send(0, 0);
            assert_eq!(guest.status(), RUNNING);
        }
        guest.send(0, 0);
        assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
        assert_usable(&mut guest);
        // A driver that starts anew starts with nothing against it.
        guest.describe(0, 0, BUFFERS, 0, WRITE, 0);
        for _ in 0..MOST_MALFORMED {
            guest.send(0, 0);
            assert_eq!(guest.status(), RUNNING);
        }
    }
}

#[test]
fn rings_that_would_feed_themselves_are_refused() {
    for carrier in CARRIERS {
        for (used, available) in [(0x2_0000, 0x2_0000), (0x2_0000, 0x2_0080), (0x2_0000, 0x1_ffc0)] {
            let mut guest = guest(carrier);
            Act::StartOddly { queues: vec![(64, [0x1_0000, available, used])] }.apply(&mut guest);
            assert_eq!(guest.status(), 11 | NEEDS_RESET);
            assert_usable(&mut guest);
        }
    }
}

#[test]
fn a_full_queue_of_large_requests_is_served_over_several_events() {
    for mut guest in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(0, 0, BUFFERS, MOST_BYTES as u32, WRITE, 0);
        for _ in 0..SIZE {
            guest.offer(0, 0);
        }
        guest.write(virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY, 0);
        assert!(guest.run() > 8, "one event did it all");
        assert_eq!(guest.used(0).len(), usize::from(SIZE));
    }
}
