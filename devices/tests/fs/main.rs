//! The file system device in front of backends that are honest, and of others.

use std::fs::File;
use std::os::fd::FromRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use devices::testing::{CARRIERS, Carrier, Guest, HIGH, LOW, NEEDS_RESET, REGION, RUNNING};
use devices::virtio::fs::{Fs, MOST_TAG, QUEUES};
use devices::virtio::vhost_user::{BackendError, FrontEnd, SharedMemory, SharedRegion};
use virtio_bindings::virtio_mmio::VIRTIO_MMIO_QUEUE_NOTIFY;
use vm_memory::GuestAddress;

mod backend;
use backend::{
    Backend, GET_FEATURES, GET_PROTOCOL_FEATURES, GET_VRING_BASE, Lie, SET_MEM_TABLE, SET_VRING_ADDR,
    SET_VRING_BASE, SET_VRING_ENABLE, SET_VRING_KICK, STOPPED_AT,
};

/// What an answer may take; a test gives all of them together ten times as long.
const PATIENCE: Duration = Duration::from_millis(400);

fn memory() -> SharedMemory {
    // SAFETY: the name is a C string, and the descriptor is new.
    let file = unsafe { File::from_raw_fd(libc::memfd_create(c"test".as_ptr(), libc::MFD_CLOEXEC)) };
    file.set_len(2 * REGION as u64).unwrap();
    let region = |guest, offset| SharedRegion { guest: GuestAddress(guest), size: REGION as u64, offset };
    SharedMemory { file, regions: vec![region(LOW, 0), region(HIGH, REGION as u64)] }
}

fn front_end(socket: UnixStream) -> Result<FrontEnd, BackendError> {
    FrontEnd::new(socket, &memory(), QUEUES, PATIENCE)
}

/// A guest with a shared directory.
struct Shared {
    guest: Guest,
    serves: Arc<AtomicBool>,
    lost: Arc<AtomicU32>,
}

fn shared(carrier: Carrier, socket: UnixStream) -> Shared {
    let front_end = front_end(socket).unwrap();
    let lost = Arc::<AtomicU32>::default();
    let loses = Arc::clone(&lost);
    let on_lost = Box::new(move |reason: &str| {
        assert!(!reason.is_empty());
        loses.fetch_add(1, Ordering::Relaxed);
    });
    let fs = Fs::new("home", front_end, on_lost).unwrap();
    let serves = fs.serves();
    Shared { guest: Guest::on(carrier, |_| Box::new(fs)), serves, lost }
}

impl Shared {
    fn assert_lost(&self) {
        assert!(!self.serves.load(Ordering::Relaxed));
        assert_eq!(self.lost.load(Ordering::Relaxed), 1);
    }

    /// Waits for events until the backend counts as lost.
    fn wait_until_lost(&mut self) {
        let begun = Instant::now();
        while self.serves.load(Ordering::Relaxed) {
            self.guest.wait(10);
            assert!(begun.elapsed() < 10 * PATIENCE);
        }
        self.assert_lost();
    }
}

#[test]
fn a_backend_learns_where_memory_and_queues_are() {
    for carrier in CARRIERS {
        let (backend, socket) = Backend::start(0, Lie::Nothing);
        let mut shared = shared(carrier, socket);
        let mut tag = [0; MOST_TAG];
        let config = if carrier == Carrier::Pci { 0x2000 } else { 0x100 };
        for (place, byte) in tag.iter_mut().enumerate() {
            shared.guest.raw_read(config + place as u64, std::slice::from_mut(byte));
        }
        assert_eq!(&tag[..5], b"home\0");
        shared.guest.start(0);
        shared.guest.run();
        let seen = backend.seen.lock().unwrap();
        let table = &seen.all(SET_MEM_TABLE)[0];
        let words: Vec<u64> =
            table[8..].chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        let size = REGION as u64;
        assert_eq!(words, [LOW, size, LOW, 0, HIGH, size, HIGH, size], "no address of this process");
        let rings = shared.guest.rings(1);
        let address = &seen.all(SET_VRING_ADDR)[1];
        let words: Vec<u64> =
            address.chunks(8).map(|word| u64::from_le_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [1, rings.descriptors, rings.used, rings.available, 0]);
        assert_eq!(seen.all(SET_VRING_ENABLE).len(), QUEUES);
    }
}

#[test]
fn signals_go_both_ways() {
    for carrier in CARRIERS {
        let (backend, socket) = Backend::start(0, Lie::Nothing);
        let mut shared = shared(carrier, socket);
        shared.guest.start(0);
        shared.guest.run();
        assert_eq!(shared.guest.interrupts(), 0);
        backend.call(1);
        assert!(shared.guest.wait(1000));
        assert_eq!(shared.guest.interrupts(), 1);
        shared.guest.notify(1);
        let seen = backend.seen.lock().unwrap();
        for (_, kick) in seen.files.iter().filter(|(kind, _)| *kind == SET_VRING_KICK) {
            let mut count = [0; 8];
            std::io::Read::read_exact(&mut { kick }, &mut count).unwrap();
            assert_eq!(u64::from_ne_bytes(count), 1);
        }
    }
}

/// While the VM is paused nobody is at its memory, and no signal is lost.
#[test]
fn a_queue_goes_on_where_it_stopped() {
    for carrier in CARRIERS {
        let (backend, socket) = Backend::start(0, Lie::Nothing);
        let mut shared = shared(carrier, socket);
        shared.guest.start(0);
        shared.guest.run();
        shared.guest.transport().lock().unwrap().drain();
        let stops = backend.seen.lock().unwrap().all(GET_VRING_BASE).len();
        assert_eq!(stops, QUEUES);
        shared.guest.write(VIRTIO_MMIO_QUEUE_NOTIFY, 1);
        backend.call(1);
        shared.guest.run();
        assert_eq!(shared.guest.interrupts(), 0);
        let started = backend.seen.lock().unwrap().all(SET_VRING_ENABLE).len();
        assert_eq!(started, QUEUES, "it stands still");
        shared.guest.transport().lock().unwrap().resume();
        shared.guest.run();
        assert_eq!(shared.guest.interrupts(), 1);
        let seen = backend.seen.lock().unwrap();
        let bases: Vec<u32> = seen
            .all(SET_VRING_BASE)
            .iter()
            .map(|base| u32::from_le_bytes(base[4..8].try_into().unwrap()))
            .collect();
        assert_eq!(bases, [0, 0, STOPPED_AT, STOPPED_AT]);
        drop(seen);
        // A driver that starts anew starts from nothing.
        shared.guest.start(0);
        shared.guest.run();
        let seen = backend.seen.lock().unwrap();
        assert_eq!(seen.all(GET_VRING_BASE).len(), 2 * QUEUES);
        assert_eq!(seen.all(SET_VRING_BASE)[4][4..8], [0; 4]);
        assert!(shared.serves.load(Ordering::Relaxed));
    }
}

#[test]
fn a_backend_that_dies_or_speaks_unasked_is_told_of_once() {
    for carrier in CARRIERS {
        for speaks in [false, true] {
            let (mut backend, socket) = Backend::start(0, Lie::Nothing);
            let mut shared = shared(carrier, socket);
            shared.guest.start(0);
            shared.guest.run();
            if speaks {
                backend.speak();
            } else {
                backend.end();
            }
            shared.wait_until_lost();
            assert_eq!(shared.guest.run(), 0, "it is watched no more");
            assert_eq!(shared.guest.status(), RUNNING);
            shared.guest.notify(1);
            assert_eq!(shared.guest.status(), RUNNING | NEEDS_RESET);
            // All else goes on, however often.
            for _ in 0..3 {
                shared.guest.transport().lock().unwrap().drain();
                shared.guest.transport().lock().unwrap().resume();
                shared.guest.start(0);
                shared.guest.run();
            }
            shared.assert_lost();
        }
    }
}

const LIES: [Lie; 12] = [
    Lie::Silence,
    Lie::Death,
    Lie::HalfAnAnswer,
    Lie::OneByteAtATime,
    Lie::AnotherRequest,
    Lie::Size(0),
    Lie::Size(7),
    Lie::Size(9),
    Lie::Size(4096),
    Lie::Size(u32::MAX),
    Lie::Flood,
    Lie::Refusal,
];

#[test]
fn a_backend_that_lies_at_the_start_is_refused_in_time() {
    for at in [GET_FEATURES, GET_PROTOCOL_FEATURES, SET_MEM_TABLE] {
        for lie in LIES {
            let begun = Instant::now();
            let (_backend, socket) = Backend::start(at, lie);
            let made = front_end(socket);
            assert!(begun.elapsed() < 10 * PATIENCE, "{at} {lie:?}: {:?}", begun.elapsed());
            if lie.is_no_answer() {
                assert!(made.is_err(), "{at} {lie:?}");
            }
        }
    }
    let (_backend, socket) = Backend::start(GET_FEATURES, Lie::Value(0));
    assert!(matches!(front_end(socket), Err(BackendError::Lacks(_))));
    let (_backend, socket) = Backend::start(GET_FEATURES, Lie::Value(1 << 30 | 1 << 32));
    let error = front_end(socket).err().unwrap().to_string();
    assert!(error.contains("indirect descriptors"), "{error}");
    // All features that there may be: those that are not known are not used.
    let (_backend, socket) = Backend::start(GET_PROTOCOL_FEATURES, Lie::Value(u64::MAX));
    assert!(front_end(socket).is_ok());
}

#[test]
fn a_backend_that_lies_later_is_lost_in_time_and_the_guest_goes_on() {
    for at in [SET_VRING_ADDR, SET_VRING_ENABLE, GET_VRING_BASE] {
        for lie in LIES {
            let begun = Instant::now();
            let (_backend, socket) = Backend::start(at, lie);
            let mut shared = shared(Carrier::Pci, socket);
            shared.guest.start(0);
            shared.guest.transport().lock().unwrap().drain();
            shared.guest.transport().lock().unwrap().resume();
            assert!(begun.elapsed() < 10 * PATIENCE, "{at} {lie:?}: {:?}", begun.elapsed());
            // What is behind an answer is seen later.
            if lie.is_no_answer() || lie == Lie::Flood {
                shared.wait_until_lost();
            }
            shared.guest.start(0);
            shared.guest.run();
        }
    }
    // The largest index, and more than one.
    let (_backend, socket) = Backend::start(GET_VRING_BASE, Lie::Value(u64::MAX));
    let mut shared = shared(Carrier::Mmio, socket);
    shared.guest.start(0);
    shared.guest.transport().lock().unwrap().drain();
    shared.guest.transport().lock().unwrap().resume();
    shared.guest.run();
}

/// The end of the device is the end of the connection, on which its backend ends.
#[test]
fn a_backend_is_let_go_with_its_device() {
    let (mut backend, socket) = Backend::start(0, Lie::Nothing);
    let front_end = front_end(socket).unwrap();
    let fs = Fs::new("home", front_end, Box::new(|_| ())).unwrap();
    drop(fs);
    backend.wait_for_its_end();
}
