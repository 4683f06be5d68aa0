//! Memory-mapped registers, in what PCI does otherwise.

use devices::testing::{BUFFERS, Guest, RUNNING};
use devices::virtio::rng::Rng;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_WRITE};

const VERSION_1: u64 = 1 << 32;

fn guest() -> Guest {
    Guest::new(|_| Box::new(Rng::new()))
}

#[test]
fn says_what_it_is() {
    let guest = guest();
    assert_eq!(guest.read(VIRTIO_MMIO_MAGIC_VALUE).to_le_bytes(), *b"virt");
    assert_eq!(guest.read(VIRTIO_MMIO_VERSION), 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DEVICE_ID), 4);
    assert_eq!(guest.offered(), VERSION_1 | 1 << 28 | 1 << 29);
    assert_eq!(guest.read(VIRTIO_MMIO_SHM_LEN_LOW), u32::MAX);
}

#[test]
fn odd_accesses_read_zero_and_write_nothing() {
    let mut guest = guest();
    guest.start(0);
    for (offset, len) in [(0, 1), (0, 8), (1, 4), (0x71, 4), (0xfff, 4), (u64::MAX - 1, 4), (u64::MAX, 8)] {
        let mut data = vec![0xff; len];
        guest.raw_read(offset, &mut data);
        assert_eq!(data, vec![0; len], "{offset:#x}");
        guest.raw_write(offset, &vec![0; len]);
        assert_eq!(guest.status(), RUNNING);
    }
}

#[test]
fn interrupts_tell_their_reason_until_acknowledged() {
    let mut guest = guest();
    guest.start(0);
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), [(0, 64)]);
    assert_eq!(guest.interrupts(), 1);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
    guest.write(VIRTIO_MMIO_INTERRUPT_ACK, u32::MAX);
    assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
}

/// Nobody need hear the acknowledgement of used buffers: it may come late, or not at all.
#[test]
fn buffers_used_before_an_acknowledgement_are_not_lost_with_it() {
    let mut guest = guest();
    guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
    for acknowledged in [true, false] {
        guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
        guest.send(0, 0);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        guest.send(0, 0);
        assert_eq!(guest.interrupts(), 2);
        if acknowledged {
            guest.write(VIRTIO_MMIO_INTERRUPT_ACK, VIRTIO_MMIO_INT_VRING);
        }
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), VIRTIO_MMIO_INT_VRING);
        assert_eq!(guest.read(VIRTIO_MMIO_INTERRUPT_STATUS), 0);
    }
}

#[test]
fn a_stopped_queue_is_left_alone() {
    let mut guest = guest();
    guest.start(0);
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 0);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), []);
    assert_eq!(guest.status(), RUNNING);
}

#[test]
fn a_queue_is_taken_back_before_it_runs() {
    let mut guest = guest();
    guest.agree(0);
    guest.set_up(0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 1);
    guest.write(VIRTIO_MMIO_QUEUE_READY, 0);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_READY), 0);
    guest.set_up(0);
    guest.write(VIRTIO_MMIO_STATUS, RUNNING);
    assert_eq!(guest.status(), RUNNING);
}
