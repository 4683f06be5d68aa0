//! What a virtio device on PCI does otherwise than on memory-mapped registers.

use std::sync::{Arc, Mutex};

use devices::pci::MsiMessage;
use devices::testing::pci::{
    BAR, COMMAND, DEVICE_CONFIG, FUNCTION_MASK, ISR, MEMORY_AND_MASTER, MSIX_ENABLE, NOTIFY, PENDING,
    PciRegisters, TABLE, WINDOW,
};
use devices::testing::{BUFFERS, Carrier, Guest, GuestRam, NEEDS_RESET, RUNNING};
use devices::virtio::device::{Active, Progress, VirtioDevice};
use devices::virtio::pci::{BAR_SIZE, VirtioPci};
use devices::virtio::port::{Port, PortEvent};
use devices::virtio::rng::Rng;
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{VIRTIO_RING_F_EVENT_IDX, VRING_DESC_F_WRITE};

const NO_VECTOR: u16 = 0xffff;
const CONFIG_MSIX_VECTOR: u64 = 0x10;
const QUEUE_MSIX_VECTOR: u64 = 0x1a;

fn guest() -> Guest {
    Guest::on(Carrier::Pci, |_| Box::new(Rng::new()))
}

fn running() -> Guest {
    let mut guest = guest();
    guest.start(1 << VIRTIO_RING_F_EVENT_IDX);
    guest
}

/// Has the device answer one request.
fn send(guest: &mut Guest) {
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), [(0, 64)]);
}

fn word(guest: &Guest, offset: u64) -> u16 {
    let mut data = [0; 2];
    guest.raw_read(offset, &mut data);
    u16::from_le_bytes(data)
}

fn pending(guest: &Guest) -> u8 {
    let mut data = [0; 8];
    guest.raw_read(PENDING, &mut data);
    assert_eq!(data[1..], [0; 7]);
    data[0]
}

#[test]
fn begins_with_nothing_decoded_and_every_vector_masked() {
    let ram = GuestRam::new();
    let mut pci = PciRegisters::new(Box::new(Rng::new()), &ram);
    assert_eq!(pci.config_dword(0), 0x1044_1af4);
    assert_eq!(pci.config_dword(8), 0xff00_0001, "of no class, revision 1");
    assert_eq!(pci.config_dword(0x2c), 0x1044_1af4);
    assert_eq!(pci.config_word(COMMAND), 0);
    assert_eq!(pci.config_dword(0x3c), 0, "no interrupt pin");
    let msix = pci.capability(0x11, |_| true).unwrap();
    assert_eq!(pci.config_word(msix + 2), 1, "two vectors, disabled");
    assert_eq!(pci.config_dword(msix + 4), TABLE as u32);
    assert_eq!(pci.config_dword(msix + 8), PENDING as u32);
    let mut data = [0; 4];
    pci.read_memory(BAR, &mut data);
    assert_eq!(data, [0xff; 4]);
    pci.move_bar(BAR);
    for vector in 0..2 {
        pci.read_memory(BAR + TABLE + 16 * vector + 12, &mut data);
        assert_eq!(data, [1, 0, 0, 0]);
    }
    for register in [CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR] {
        pci.read_memory(BAR + register, &mut data[..2]);
        assert_eq!(data[..2], [0xff; 2]);
    }
}

#[test]
fn capabilities_lead_to_each_structure() {
    let mut guest = Guest::on(Carrier::Pci, |_| Box::new(port()));
    let pci = guest.pci().unwrap();
    // Its kind, where it is, how long it is, how long the capability is.
    let structures =
        [(1, 0, 56, 16), (2, NOTIFY, 4 * 4, 20), (3, ISR, 1, 16), (4, DEVICE_CONFIG, 0x1000, 16)];
    for (kind, offset, length, size) in structures {
        let at = pci.capability(9, |cfg_type| cfg_type == kind).unwrap();
        assert_eq!(pci.config_dword(at) >> 16, u32::from(kind) << 8 | size);
        assert_eq!(pci.config_dword(at + 4), 0, "BAR 0");
        assert_eq!((u64::from(pci.config_dword(at + 8)), pci.config_dword(at + 12)), (offset, length));
    }
    let notify = pci.capability(9, |cfg_type| cfg_type == 2).unwrap();
    assert_eq!(pci.config_dword(notify + 16), 4, "notify_off_multiplier");
    assert!(pci.capability(9, |cfg_type| cfg_type == 5).is_some());
    assert_eq!(word(&guest, 0x12), 4, "num_queues");
    for queue in 0..4 {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, queue);
        assert_eq!(word(&guest, 0x1e), queue as u16, "queue_notify_off");
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), u32::from(guest.size(queue as usize)));
    }
    guest.write(VIRTIO_MMIO_QUEUE_SEL, 4);
    assert_eq!((guest.read(VIRTIO_MMIO_QUEUE_NUM_MAX), word(&guest, QUEUE_MSIX_VECTOR)), (0, NO_VECTOR));
}

fn port() -> Port {
    Port::new("test", |_: PortEvent<'_>| {})
}

#[test]
fn fields_are_accessed_in_their_own_width() {
    let guest = running();
    for (offset, len) in [(0x14, 2), (0x14, 4), (0x16, 1), (0x12, 4), (0, 2), (4, 8), (0x20, 8), (0x38, 4)] {
        let mut data = vec![0xff; len];
        guest.raw_read(offset, &mut data);
        assert_eq!(data, vec![0; len], "{offset:#x}");
        guest.raw_write(offset, &vec![0; len]);
        assert_eq!(guest.status(), RUNNING);
    }
}

#[test]
fn features_and_addresses_read_back() {
    let mut guest = guest();
    guest.agree(0);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 1);
    assert_eq!(guest.read(VIRTIO_MMIO_DRIVER_FEATURES), 1);
    guest.write(VIRTIO_MMIO_DRIVER_FEATURES_SEL, 2);
    assert_eq!(guest.read(VIRTIO_MMIO_DRIVER_FEATURES), 0);
    guest.lay_out(0);
    let rings = guest.rings(0);
    assert_eq!(u64::from(guest.read(VIRTIO_MMIO_QUEUE_DESC_LOW)), rings.descriptors);
    guest.write(VIRTIO_MMIO_QUEUE_USED_HIGH, 7);
    assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_USED_HIGH), 7);
    assert_eq!(u64::from(guest.read(VIRTIO_MMIO_QUEUE_USED_LOW)), rings.used);
    // A size that is none makes the queue unavailable.
    for (written, read) in [(32, 32), (33, 0), (128, 0), (64, 64)] {
        guest.write(VIRTIO_MMIO_QUEUE_NUM, written);
        assert_eq!(guest.read(VIRTIO_MMIO_QUEUE_NUM), read);
    }
}

#[test]
fn a_vector_that_there_is_not_is_refused() {
    let guest = running();
    for offset in [CONFIG_MSIX_VECTOR, QUEUE_MSIX_VECTOR] {
        for (written, read) in [(1, 1), (2, NO_VECTOR), (0, 0), (0x7ff, NO_VECTOR), (NO_VECTOR, NO_VECTOR)] {
            guest.raw_write(offset, &u16::to_le_bytes(written));
            assert_eq!(word(&guest, offset), read);
        }
    }
}

#[test]
fn a_queue_and_the_configuration_each_have_their_vector() {
    let mut guest = running();
    send(&mut guest);
    assert_eq!(guest.pci().unwrap().host.delivered(), [0, 1]);
    guest.raw_write(QUEUE_MSIX_VECTOR, &NO_VECTOR.to_le_bytes());
    send(&mut guest);
    assert_eq!(guest.interrupts(), 0);
    guest.set_available(0, 1000);
    guest.notify(0);
    assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
    assert_eq!(guest.pci().unwrap().host.delivered(), [1, 0]);
    // All are unmapped by a reset.
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!((word(&guest, CONFIG_MSIX_VECTOR), word(&guest, QUEUE_MSIX_VECTOR)), (NO_VECTOR, NO_VECTOR));
}

#[test]
fn what_is_masked_is_pending_until_it_is_unmasked() {
    let message = MsiMessage { address: 0xfee0_1000, data: 0x41 };
    for by_vector in [true, false] {
        let mask = |pci: &PciRegisters, masked| match (by_vector, masked) {
            (true, _) => pci.set_vector(1, message, masked),
            (false, true) => pci.set_msix(MSIX_ENABLE | FUNCTION_MASK),
            (false, false) => pci.set_msix(MSIX_ENABLE),
        };
        let mut guest = running();
        mask(guest.pci().unwrap(), true);
        send(&mut guest);
        send(&mut guest);
        assert_eq!((guest.interrupts(), pending(&guest)), (0, 0b10));
        mask(guest.pci().unwrap(), false);
        assert_eq!(pending(&guest), 0, "what is delivered is not pending");
        assert_eq!(guest.pci().unwrap().host.delivered(), [0, 2]);
        mask(guest.pci().unwrap(), true);
        assert_eq!(pending(&guest), 0);
    }
}

#[test]
fn a_reset_forgets_what_is_pending() {
    let mut guest = running();
    guest.pci().unwrap().set_msix(MSIX_ENABLE | FUNCTION_MASK);
    send(&mut guest);
    assert_eq!(pending(&guest), 0b10);
    guest.write(VIRTIO_MMIO_STATUS, 0);
    assert_eq!(pending(&guest), 0);
}

#[test]
fn the_host_hears_of_a_vector_only_when_it_delivers_something_else() {
    let mut guest = running();
    let pci = guest.pci().unwrap();
    let message = |vector: u32| Some(MsiMessage { address: 0xfee0_0000, data: vector + 0x30 });
    assert_eq!(*pci.host.messages.lock().unwrap(), [message(0), message(1)]);
    // A message that changes while it can be sent is followed.
    pci.write_memory(BAR + TABLE + 8, &0x99_u32.to_le_bytes());
    pci.write_memory(BAR + TABLE, &0x1_fee0_2003_u64.to_le_bytes());
    let changed = MsiMessage { address: 0x1_fee0_2000, data: 0x99 };
    assert_eq!(*pci.host.messages.lock().unwrap(), [Some(changed), message(1)]);
    pci.set_msix(0);
    assert_eq!(*pci.host.messages.lock().unwrap(), [None, None]);
    pci.set_msix(MSIX_ENABLE);
    assert_eq!(*pci.host.messages.lock().unwrap(), [Some(changed), message(1)]);
}

#[test]
fn the_table_takes_dwords_and_qwords() {
    let mut guest = running();
    let pci = guest.pci().unwrap();
    let read = |pci: &PciRegisters, offset, len| {
        let mut data = vec![0x55; len];
        pci.read_memory(BAR + TABLE + offset, &mut data);
        data
    };
    // Of vector control only the mask bit can be written.
    pci.write_memory(BAR + TABLE + 8, &[0x78, 0x56, 0x34, 0x12, 0xfe, 0xff, 0xff, 0xff]);
    assert_eq!(read(pci, 8, 8), [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0]);
    assert_eq!(read(pci, 0, 4), 0xfee0_0000_u32.to_le_bytes());
    for (offset, len) in [(8, 1), (8, 2), (10, 2), (9, 4), (4, 8), (8, 3), (8, 16)] {
        pci.write_memory(BAR + TABLE + offset, &vec![0xff; len]);
        assert_eq!(read(pci, offset, len), vec![0; len], "{len} bytes at {offset}");
        assert_eq!(read(pci, 8, 8), [0x78, 0x56, 0x34, 0x12, 0, 0, 0, 0]);
    }
    // Past its end, where its page goes on.
    pci.write_memory(BAR + TABLE + 32, &[0xff; 8]);
    assert_eq!(read(pci, 32, 8), [0; 8]);
    pci.write_memory(BAR + PENDING, &[0xff; 8]);
    assert_eq!(pending(&guest), 0);
}

#[test]
fn a_vector_that_the_host_refuses_stays_pending() {
    let mut guest = running();
    let pci = guest.pci().unwrap();
    pci.set_msix(0);
    *pci.host.refuses.lock().unwrap() = true;
    pci.set_msix(MSIX_ENABLE);
    send(&mut guest);
    assert_eq!((guest.interrupts(), pending(&guest)), (0, 0b10));
    let pci = guest.pci().unwrap();
    *pci.host.refuses.lock().unwrap() = false;
    pci.set_msix(MSIX_ENABLE);
    assert_eq!(pci.host.delivered(), [0, 1]);
}

/// An old message must not be sent for a new one, to which it may mean another vector.
#[test]
fn a_new_message_that_the_host_refuses_takes_the_old_one_with_it() {
    let mut guest = running();
    let pci = guest.pci().unwrap();
    *pci.host.refuses.lock().unwrap() = true;
    pci.write_memory(BAR + TABLE + 16 + 8, &0x99_u32.to_le_bytes());
    assert_eq!(pci.host.messages.lock().unwrap()[1], None);
    send(&mut guest);
    assert_eq!(pending(&guest), 0b10);
}

#[test]
fn without_msix_the_isr_tells() {
    let mut guest = running();
    let isr = |guest: &Guest| guest.read(VIRTIO_MMIO_INTERRUPT_STATUS);
    let interrupt_status = |guest: &mut Guest| guest.pci().unwrap().config_word(6) & 8 != 0;
    send(&mut guest);
    assert_eq!(isr(&guest), 0, "a vector tells");
    guest.pci().unwrap().set_msix(0);
    send(&mut guest);
    guest.set_available(0, 1000);
    guest.notify(0);
    assert!(interrupt_status(&mut guest));
    guest.pci().unwrap().set_msix(MSIX_ENABLE);
    assert!(!interrupt_status(&mut guest));
    guest.pci().unwrap().set_msix(0);
    assert_eq!(isr(&guest), 0b11);
    assert_eq!(isr(&guest), 0, "it is read once");
    assert!(!interrupt_status(&mut guest));
}

#[test]
fn notifications_follow_the_bar() {
    let mut guest = Guest::on(Carrier::Pci, |_| Box::new(Counting::default()));
    let connected = |guest: &mut Guest| {
        let connected = guest.pci().unwrap().host.connected.lock().unwrap().clone();
        connected.into_keys().collect::<Vec<_>>()
    };
    // The second queue is the vCPU's own.
    assert_eq!(connected(&mut guest), [BAR + NOTIFY, BAR + NOTIFY + 8]);
    guest.pci().unwrap().move_bar(BAR + BAR_SIZE);
    assert_eq!(connected(&mut guest), [BAR + BAR_SIZE + NOTIFY, BAR + BAR_SIZE + NOTIFY + 8]);
    guest.pci().unwrap().move_bar(WINDOW.end);
    assert!(connected(&mut guest).is_empty());
    // A host that can't connect them leaves them to the function.
    *guest.pci().unwrap().host.refuses.lock().unwrap() = true;
    guest.pci().unwrap().move_bar(BAR);
    assert!(connected(&mut guest).is_empty());
    *guest.pci().unwrap().host.refuses.lock().unwrap() = false;
    guest.start(0);
    guest.run();
    for (queue, width) in [(0, 2), (1, 2), (2, 2), (2, 4), (1, 1)] {
        let before = counts(&guest);
        // The address says which queue, whatever is written there.
        guest.raw_write(NOTIFY + 4 * queue, &[0xff; 4][..width]);
        guest.run();
        let mut expected = before;
        expected[queue as usize] += 1;
        assert_eq!(counts(&guest), expected);
    }
    guest.raw_write(NOTIFY + 4 * 3, &[0, 0]);
    assert_eq!(guest.run(), 0, "there are three queues");
}

fn counts(guest: &Guest) -> [u8; 3] {
    let mut data = [0; 3];
    guest.raw_read(DEVICE_CONFIG, &mut data);
    data
}

/// Counts the events of its queues. The last one says that the configuration has changed, 256 times.
#[derive(Default)]
struct Counting {
    events: [u8; 3],
}

impl VirtioDevice for Counting {
    fn device_id(&self) -> u32 {
        63
    }

    fn features(&self) -> u64 {
        0
    }

    fn queue_sizes(&self) -> &[u16] {
        &[4; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        for (byte, value) in data.iter_mut().zip(self.events.iter().skip(offset as usize)) {
            *byte = *value;
        }
    }

    fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
    fn activate(&mut self, _active: &mut Active) {}
    fn reset(&mut self) {}

    fn queue_event(&mut self, index: usize, active: &mut Active) -> Progress {
        self.events[index] += 1;
        if index == 2 {
            (0..256).for_each(|_| active.config_interrupt.raise());
        }
        Progress::Done
    }

    fn is_served_by_vcpu(&self, index: usize) -> bool {
        index == 1
    }
}

/// The generation has 8 bits: counting every change would show 256 of them as none.
#[test]
fn a_driver_notices_any_number_of_changes() {
    let mut guest = Guest::on(Carrier::Pci, |_| Box::new(Counting::default()));
    guest.start(0);
    guest.run();
    let before = guest.read(VIRTIO_MMIO_CONFIG_GENERATION);
    assert_eq!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
    guest.notify(2);
    counts(&guest);
    assert_ne!(guest.read(VIRTIO_MMIO_CONFIG_GENERATION), before);
}

#[test]
fn configuration_space_is_a_window_to_the_bar() {
    let mut guest = running();
    let pci = guest.pci().unwrap();
    let at = pci.capability(9, |cfg_type| cfg_type == 5).unwrap();
    let open = |bar: u8, offset: u32, length: u32| {
        pci.write_config(at + 4, &[bar]);
        pci.write_config(at + 8, &offset.to_le_bytes());
        pci.write_config(at + 12, &length.to_le_bytes());
    };
    open(0, 0x14, 1);
    assert_eq!(pci.config_dword(at + 16) & 0xff, RUNNING);
    // Not this BAR, not a width, not aligned, not in the BAR: the data is what it was.
    for (bar, offset, length) in [
        (1, 0x14, 1),
        (6, 0x14, 1),
        (0, 0x14, 0),
        (0, 0x14, 3),
        (0, 0x15, 2),
        (0, 0x8000, 4),
        (0, u32::MAX, 1),
    ] {
        open(bar, offset, length);
        pci.write_config(at + 16, &[0; 4]);
        assert_eq!(pci.config_dword(at + 16), 0);
    }
    // Memory need not be decoded for it.
    pci.write_config(COMMAND, &[4]);
    open(0, 0x14, 1);
    assert_eq!(pci.config_dword(at + 16) & 0xff, RUNNING);
    pci.write_config(at + 16, &[0; 4]);
    assert_eq!(pci.config_dword(at + 16), 0, "the device is reset");
    // Its own registers apart, the capability can't be written.
    pci.write_config(at, &[0xff; 4]);
    assert_eq!(pci.config_dword(at) >> 16, 0x0514);
}

#[test]
fn a_device_that_is_no_bus_master_stands_still() {
    let mut guest = running();
    guest.pci().unwrap().write_config(COMMAND, &[0b010]);
    guest.describe(0, 0, BUFFERS, 64, VRING_DESC_F_WRITE, 0);
    guest.send(0, 0);
    assert_eq!(guest.used(0), []);
    // Nor does it go on because its owner lets it.
    guest.transport().lock().unwrap().drain();
    guest.transport().lock().unwrap().resume();
    guest.run();
    assert_eq!(guest.used(0), []);
    guest.pci().unwrap().write_config(COMMAND, &MEMORY_AND_MASTER.to_le_bytes());
    guest.run();
    assert_eq!(guest.used(0), [(0, 64)]);
}

#[test]
fn queues_and_vectors_have_a_bound() {
    struct Many(Vec<u16>);
    impl VirtioDevice for Many {
        fn device_id(&self) -> u32 {
            63
        }
        fn features(&self) -> u64 {
            0
        }
        fn queue_sizes(&self) -> &[u16] {
            &self.0
        }
        fn read_config(&self, _offset: u64, _data: &mut [u8]) {}
        fn write_config(&mut self, _offset: u64, _data: &[u8]) {}
        fn activate(&mut self, _active: &mut Active) {}
        fn reset(&mut self) {}
        fn queue_event(&mut self, _index: usize, _active: &mut Active) -> Progress {
            Progress::Done
        }
    }
    let ram = GuestRam::new();
    let host = PciRegisters::new(Box::new(Rng::new()), &ram).host;
    let many = |count| {
        VirtioPci::new(Box::new(Many(vec![2; count])), ram.memory.clone(), host.clone(), host.clone(), BAR)
    };
    assert!(many(256).is_ok());
    assert!(many(257).is_err());
    let device = Arc::new(Mutex::new(many(256).unwrap()));
    assert_eq!(device.lock().unwrap().notifiers().len(), 256);
}
