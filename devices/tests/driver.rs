//! What every transport does alike, as an honest driver and a confused one see it.

use devices::testing::{BUFFERS, CARRIERS, Carrier, Guest, HIGH, NEEDS_RESET, RUNNING};
use devices::virtio::rng::Rng;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

fn guest(carrier: Carrier) -> Guest {
    Guest::on(carrier, |_| Box::new(Rng::new()))
}

fn guests() -> [Guest; 2] {
    CARRIERS.map(guest)
}

#[test]
fn a_driver_without_version_1_gets_no_features_ok() {
    for guest in guests() {
        for status in [1, 3, 11] {
            guest.write(VIRTIO_MMIO_STATUS, status);
        }
        assert_eq!(guest.status(), 3);
    }
}

#[test]
fn a_feature_that_was_not_offered_is_refused() {
    for guest in guests() {
        guest.write(VIRTIO_MMIO_STATUS, 3);
        for (select, features) in [(1, 1), (0, 1 << 3)] {
            guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, select);
            guest.write(VIRTIO_MMIO_DRIVER_FEATURES, features);
        }
        guest.write(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(guest.status(), 3);
        guest.write(VIRTIO_MMIO_DRIVER_FEATURES, 0);
        guest.write(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(guest.status(), 11);
    }
}

#[test]
fn status_bits_are_never_skipped_nor_cleared_one_by_one() {
    for mut guest in guests() {
        guest.write(VIRTIO_MMIO_STATUS, 4);
        assert_eq!(guest.status(), 0);
        guest.write(VIRTIO_MMIO_STATUS, 7);
        assert_eq!(guest.status(), 3);
        guest.start(0);
        guest.write(VIRTIO_MMIO_STATUS, 11);
        assert_eq!(guest.status(), RUNNING);
        guest.write(VIRTIO_MMIO_STATUS, 0x80 | RUNNING);
        assert_eq!(guest.status(), 0x80 | RUNNING);
        guest.start(0);
    }
}

#[test]
fn a_queue_that_is_not_in_memory_breaks_the_device_until_reset() {
    for carrier in CARRIERS {
        type Spoil = fn(&Guest);
        let spoils: [Spoil; 6] = [
            |guest| guest.write(VIRTIO_MMIO_QUEUE_NUM, 3),
            |guest| guest.write(VIRTIO_MMIO_QUEUE_NUM, 1 << 15),
            |guest| guest.write(VIRTIO_MMIO_QUEUE_DESC_LOW, 8),
            |guest| guest.write(VIRTIO_MMIO_QUEUE_DESC_HIGH, 0xffff_ffff),
            |guest| guest.write(VIRTIO_MMIO_QUEUE_USED_LOW, (1 << 20) - 4),
            |guest| guest.write(VIRTIO_MMIO_QUEUE_AVAIL_LOW, 0),
        ];
        for (number, spoil) in spoils.into_iter().enumerate() {
            let mut guest = guest(carrier);
            guest.agree(0);
            guest.lay_out(0);
            spoil(&guest);
            guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
            assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0, "spoil {number}");
            guest.write(VIRTIO_MMIO_STATUS, RUNNING);
            assert_eq!(guest.status(), 11 | NEEDS_RESET, "spoil {number}");
            guest.start(0);
        }
    }
}

#[test]
fn event_idx_holds_interrupts_back_as_the_driver_asks() {
    for carrier in CARRIERS {
        for (refused, expected) in [(0, 1), (1 << VIRTIO_RING_F_EVENT_IDX, 4)] {
            let mut guest = guest(carrier);
            guest.start(refused);
            // used_event stands behind the available ring: interrupt after the fourth buffer.
            let used_event = guest.rings(0).available + 4 + 2 * u64::from(guest.size(0));
            guest.ram.memory.write_obj(3u16.to_le(), GuestAddress(used_event)).unwrap();
            let mut interrupts = 0;
            for head in 0..4 {
                guest.describe(0, head, HIGH, 16, VRING_DESC_F_WRITE, 0);
                guest.send(0, head);
                interrupts += guest.interrupts();
            }
            assert_eq!(guest.used(0).len(), 4);
            assert_eq!(interrupts, expected, "refused {refused:#x}");
        }
    }
}

#[test]
fn buffers_from_before_driver_ok_are_served() {
    for mut guest in guests() {
        guest.agree(0);
        guest.set_up(0);
        guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
        guest.send(0, 0);
        assert_eq!(guest.used(0), []);
        guest.write(VIRTIO_MMIO_STATUS, RUNNING);
        guest.run();
        assert_eq!(guest.used(0), [(0, 64)]);
    }
}

#[test]
fn an_available_index_past_the_ring_needs_a_reset_and_says_so() {
    for mut guest in guests() {
        guest.start(0);
        let beyond = guest.size(0) + 1;
        guest.set_available(0, beyond);
        guest.notify(0);
        assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_CONFIG);
        assert_eq!(guest.interrupts(), 1);
        // Nothing more happens until the driver resets.
        guest.notify(0);
        assert_eq!(guest.interrupts(), 0);
        guest.start(0);
        guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
        guest.send(0, 0);
        assert_eq!(guest.used(0), [(0, 64)]);
    }
}

/// What the device asks of the driver's notifications, once it is quiet.
#[test]
fn an_idle_device_asks_for_the_next_notification() {
    for mut guest in guests() {
        // Events wrap around the ring, whose size is 64.
        guest.start(0);
        guest.describe(0, 0, BUFFERS, 16, VRING_DESC_F_WRITE, 0);
        let used = guest.rings(0).used;
        let avail_event = GuestAddress(used + 4 + 8 * u64::from(guest.size(0)));
        for sent in 1..200u16 {
            guest.send(0, 0);
            let asked: u16 = guest.ram.memory.read_obj(avail_event).unwrap();
            assert_eq!(u16::from_le(asked), sent);
        }
        assert_eq!(guest.used(0).last(), Some(&(0, 16)));

        guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
        guest.describe(0, 0, BUFFERS, 16, VRING_DESC_F_WRITE, 0);
        for _ in 0..3 {
            guest.send(0, 0);
            let flags: u16 = guest.ram.memory.read_obj(GuestAddress(used)).unwrap();
            assert_eq!(flags, 0, "notifications stay off");
        }
    }
}

/// Far more than the ring holds, with many in flight, as busy drivers do.
#[test]
fn rings_wrap_around() {
    for mut guest in guests() {
        guest.start(0);
        let size = guest.size(0);
        for head in 0..size {
            guest.describe(0, head, BUFFERS + 64 * u64::from(head), 64, VRING_DESC_F_WRITE, 0);
        }
        for round in 0..u16::MAX / size + 3 {
            for head in 0..size {
                guest.offer(0, head);
            }
            guest.notify(0);
            let expected: Vec<_> = (0..u32::from(size)).map(|head| (head, 64)).collect();
            assert_eq!(guest.used(0), expected, "round {round}");
        }
        assert_eq!(guest.status(), RUNNING);
    }
}
