//! The port between a program in the guest and the host: with a driver that does as Linux does, and with hostile ones.

use std::sync::{Arc, Mutex};

use devices::state::{StateError, Version};
use devices::testing::hostile::{any_act, chain_act};
use devices::testing::{BUFFERS, CARRIERS, Carrier, Guest, NEEDS_RESET, RUNNING};
use devices::virtio::port::{Handshake, MOST_BYTES, MULTIPORT, Port, PortEvent, PortState};
use devices::virtio::queue::MOST_MALFORMED;
use devices::virtio::saved::VirtioState;
use proptest::collection::vec;
use proptest::prelude::*;
use serde_json::json;
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

const NAME: &str = "org.ballast.test";
const FROM_GUEST: usize = 1;
const CONTROL_TO_GUEST: usize = 2;
const CONTROL_FROM_GUEST: usize = 3;
const QUEUE_SIZE: u16 = 16;

const DEVICE_READY: u16 = 0;
const PORT_READY: u16 = 3;
const PORT_OPEN: u16 = 6;

#[derive(Clone, Debug, PartialEq, Eq)]
enum Heard {
    Opened,
    Closed,
    Data(Vec<u8>),
}

/// A port, heard by `ears`.
fn port(ears: Arc<Mutex<Vec<Heard>>>) -> Port {
    Port::new(NAME, move |event| {
        ears.lock().unwrap().push(match event {
            PortEvent::Opened => Heard::Opened,
            PortEvent::Closed => Heard::Closed,
            PortEvent::Data(data) => Heard::Data(data.to_vec()),
        });
    })
}

/// A guest with a port, and what was heard on it.
fn guest(carrier: Carrier) -> (Guest, Arc<Mutex<Vec<Heard>>>) {
    let heard = Arc::new(Mutex::new(Vec::new()));
    let port = port(heard.clone());
    (Guest::on(carrier, |_| Box::new(port)), heard)
}

fn carrier() -> impl Strategy<Value = Carrier> {
    prop::sample::select(CARRIERS.to_vec())
}

/// Moves the guest to a new device: what it hears of goes to the same ears.
fn moved(guest: Guest, heard: &Arc<Mutex<Vec<Heard>>>, state: VirtioState) -> Result<Guest, StateError> {
    guest.restore(Box::new(port(heard.clone())), state)
}

fn data(heard: &Mutex<Vec<Heard>>) -> Vec<u8> {
    let parts = std::mem::take(&mut *heard.lock().unwrap());
    parts.into_iter().flat_map(|part| if let Heard::Data(data) = part { data } else { Vec::new() }).collect()
}

/// Sends one control message, as Linux's driver does.
fn control(guest: &mut Guest, event: u16, value: u16) {
    let mut message = [0; 8];
    message[4..6].copy_from_slice(&event.to_le_bytes());
    message[6..].copy_from_slice(&value.to_le_bytes());
    let place = BUFFERS + 0x1_0000;
    guest.ram.memory.write_slice(&message, GuestAddress(place)).unwrap();
    guest.describe(CONTROL_FROM_GUEST, 0, place, 8, 0, 0);
    guest.send(CONTROL_FROM_GUEST, 0);
    assert_eq!(guest.used(CONTROL_FROM_GUEST), [(0, 0)]);
}

/// Leaves a buffer of a page for a control message to the guest.
fn room(guest: &mut Guest, place: u16) {
    guest.describe(CONTROL_TO_GUEST, place, BUFFERS + 4096 * u64::from(place), 4096, VRING_DESC_F_WRITE, 0);
    guest.send(CONTROL_TO_GUEST, place);
}

/// Control messages to the guest since the last call.
fn told(guest: &mut Guest) -> Vec<Vec<u8>> {
    let used = guest.used(CONTROL_TO_GUEST);
    used.iter()
        .map(|(place, length)| {
            let mut message = vec![0; *length as usize];
            let address = GuestAddress(BUFFERS + 4096 * u64::from(*place));
            guest.ram.memory.read_slice(&mut message, address).unwrap();
            message
        })
        .collect()
}

fn send(guest: &mut Guest, bytes: &[u8]) {
    let place = BUFFERS + 0x2_0000;
    guest.ram.memory.write_slice(bytes, GuestAddress(place)).unwrap();
    guest.describe(FROM_GUEST, 0, place, bytes.len() as u32, 0, 0);
    guest.send(FROM_GUEST, 0);
    assert_eq!(guest.used(FROM_GUEST), [(0, 0)]);
}

/// Brings the port up as Linux does: `virtcons_probe`, `add_port`, then `open(2)`.
fn open(guest: &mut Guest) {
    guest.start(0);
    for place in 0..3 {
        room(guest, place);
    }
    control(guest, DEVICE_READY, 1);
    assert_eq!(told(guest), [vec![0, 0, 0, 0, 1, 0, 1, 0]], "a port is added");
    control(guest, PORT_READY, 1);
    let name = [&[0, 0, 0, 0, 7, 0, 1, 0], NAME.as_bytes()].concat();
    assert_eq!(told(guest), [name, vec![0, 0, 0, 0, 6, 0, 1, 0]], "its name, and that the host is there");
    control(guest, PORT_OPEN, 1);
}

#[test]
fn a_program_is_heard_once_it_has_opened_the_port() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        assert_eq!(guest.read(0x104), 1, "one port");
        open(&mut guest);
        send(&mut guest, b"hello");
        send(&mut guest, b", host");
        control(&mut guest, PORT_OPEN, 0);
        send(&mut guest, b"not heard");
        let expected =
            [Heard::Opened, Heard::Data(b"hello".into()), Heard::Data(b", host".into()), Heard::Closed];
        assert_eq!(*heard.lock().unwrap(), expected);
    }
}

#[test]
fn messages_wait_for_room() {
    for (mut guest, _) in CARRIERS.map(guest) {
        guest.start(0);
        control(&mut guest, DEVICE_READY, 1);
        assert!(told(&mut guest).is_empty());
        room(&mut guest, 0);
        assert_eq!(told(&mut guest).len(), 1, "the port is added");
        control(&mut guest, PORT_READY, 1);
        room(&mut guest, 0);
        room(&mut guest, 1);
        assert_eq!(told(&mut guest).len(), 2, "named and open");
        room(&mut guest, 2);
        assert!(told(&mut guest).is_empty(), "there is nothing more to say");
    }
}

#[test]
fn a_reset_closes_the_port_and_a_driver_that_comes_anew_finds_it() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        open(&mut guest);
        guest.reset();
        open(&mut guest);
        assert_eq!(*heard.lock().unwrap(), [Heard::Opened, Heard::Closed, Heard::Opened]);
    }
}

#[test]
fn a_driver_without_ports_is_not_heard() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        guest.start(1 << MULTIPORT);
        send(&mut guest, b"console output");
        assert!(heard.lock().unwrap().is_empty());
        assert_eq!(guest.status(), RUNNING);
    }
}

#[test]
fn a_large_buffer_is_heard_in_part() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        open(&mut guest);
        guest.describe(FROM_GUEST, 0, BUFFERS, 0x4_0000, 0, 0);
        guest.send(FROM_GUEST, 0);
        assert_eq!(data(&heard).len(), MOST_BYTES);
    }
}

#[test]
fn room_that_is_too_small_or_not_writable_is_malformed() {
    for (mut guest, _) in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(CONTROL_TO_GUEST, 0, BUFFERS, 7, VRING_DESC_F_WRITE, 0);
        guest.describe(CONTROL_TO_GUEST, 1, BUFFERS, 64, 0, 0);
        guest.offer(CONTROL_TO_GUEST, 0);
        guest.offer(CONTROL_TO_GUEST, 1);
        control(&mut guest, DEVICE_READY, 1);
        assert_eq!(guest.used(CONTROL_TO_GUEST), [(0, 0), (1, 0)]);
        room(&mut guest, 2);
        assert_eq!(told(&mut guest).len(), 1, "the message was not lost");
    }
}

#[test]
fn too_many_malformed_chains_need_a_reset() {
    for (mut guest, _) in CARRIERS.map(guest) {
        guest.start(0);
        guest.describe(CONTROL_FROM_GUEST, 0, BUFFERS, 4, 0, 0);
        for _ in 0..MOST_MALFORMED {
            guest.send(CONTROL_FROM_GUEST, 0);
            assert_eq!(guest.status(), RUNNING);
        }
        guest.send(CONTROL_FROM_GUEST, 0);
        assert_eq!(guest.status(), RUNNING | NEEDS_RESET);
        guest.describe(FROM_GUEST, 0, BUFFERS, 8, VRING_DESC_F_NEXT, 0);
        open(&mut guest);
    }
}

/// The guest's state, through text, as a file or a socket would carry it.
fn saved(guest: &Guest) -> VirtioState {
    serde_json::from_str(&serde_json::to_string(&guest.save().unwrap()).unwrap()).unwrap()
}

#[test]
fn a_program_is_heard_after_a_move_as_before() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        open(&mut guest);
        send(&mut guest, b"here");
        let state = saved(&guest);
        let mut guest = moved(guest, &heard, state.clone()).unwrap();
        assert_eq!(saved(&guest), state, "nothing is lost on the way");
        send(&mut guest, b"and there");
        let before = [Heard::Opened, Heard::Data(b"here".into())];
        let after = [Heard::Opened, Heard::Data(b"and there".into())];
        assert_eq!(*heard.lock().unwrap(), [before, after].concat(), "the new host hears that it is open");
        assert_usable(&mut guest, &heard);
    }
}

#[test]
fn what_the_driver_is_to_be_told_is_told_after_the_move() {
    for (mut guest, heard) in CARRIERS.map(guest) {
        guest.start(0);
        control(&mut guest, DEVICE_READY, 1);
        let state = saved(&guest);
        let mut guest = moved(guest, &heard, state).unwrap();
        room(&mut guest, 0);
        assert_eq!(told(&mut guest), [vec![0, 0, 0, 0, 1, 0, 1, 0]], "a port is added");
    }
}

#[test]
fn a_port_that_is_open_without_a_driver_is_refused() {
    for carrier in CARRIERS {
        for spoilt in [json!({"open": true}), json!({"handshake": "complete"}), json!({"version": 9})] {
            let (guest, heard) = guest(carrier);
            let mut state = saved(&guest);
            for (field, value) in spoilt.as_object().unwrap() {
                state.device[field] = value.clone();
            }
            let error = moved(guest, &heard, state).err().expect("it is refused").to_string();
            assert!(error.contains("the port to the guest"), "{error}");
            assert!(heard.lock().unwrap().is_empty());
        }
    }
}

fn handshake() -> impl Strategy<Value = Handshake> {
    use Handshake::*;
    prop_oneof![Just(None), Just(Adding), Just(Added), Just(Naming), Just(Opening), Just(Complete)]
}

/// Whatever was before: after a reset an honest driver's program is heard.
fn assert_usable(guest: &mut Guest, heard: &Mutex<Vec<Heard>>) {
    guest.ram.assert_canaries();
    guest.reset();
    data(heard);
    open(guest);
    send(guest, b"still here");
    assert_eq!(data(heard), b"still here");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    /// Whatever is restored, the driver gets no more than the messages that are left.
    #[test]
    fn no_state_breaks_a_port(carrier in carrier(), handshake in handshake(), open: bool, total: u64, since: u32) {
        let (mut guest, heard) = guest(carrier);
        guest.start(0);
        (0..3).for_each(|place| room(&mut guest, place));
        let mut state = saved(&guest);
        let faults = serde_json::from_value(json!({"total": total, "since_reset": since})).unwrap();
        state.device = serde_json::to_value(PortState { version: Version, handshake, open, faults }).unwrap();
        let mut guest = moved(guest, &heard, state).unwrap();
        guest.run();
        prop_assert!(told(&mut guest).len() <= 2);
        prop_assert_eq!(!heard.lock().unwrap().is_empty(), open);
        assert_usable(&mut guest, &heard);
    }

    #[test]
    fn anything_a_guest_does_ends_with_a_device_that_works(
        carrier in carrier(),
        acts in vec(any_act(4, QUEUE_SIZE), 1..64),
    ) {
        let (mut guest, heard) = guest(carrier);
        for act in &acts {
            act.apply(&mut guest);
        }
        assert_usable(&mut guest, &heard);
    }

    #[test]
    fn any_chains_leave_memory_outside_the_guest_alone(
        carrier in carrier(),
        acts in vec(chain_act(4, QUEUE_SIZE), 1..128),
    ) {
        let (mut guest, heard) = guest(carrier);
        guest.start(0);
        for act in &acts {
            act.apply(&mut guest);
            prop_assert_eq!(guest.status() & !NEEDS_RESET, RUNNING);
        }
        assert_usable(&mut guest, &heard);
    }

    #[test]
    fn any_control_message_leaves_a_device_that_works(
        carrier in carrier(),
        messages in vec((0u16..12, 0u16..3, any::<bool>()), 1..64),
    ) {
        let (mut guest, heard) = guest(carrier);
        guest.start(0);
        let mut rooms = 0;
        for (event, value, make_room) in messages {
            if make_room && rooms < 4 {
                room(&mut guest, 0);
                rooms += 1;
            }
            control(&mut guest, event, value);
            rooms -= told(&mut guest).len();
            prop_assert_eq!(guest.status(), RUNNING);
        }
        assert_usable(&mut guest, &heard);
    }
}
