//! What a hostile guest may do to a device: acts for property tests, mostly
//! nearly right, as those get furthest, and some of them noise.

mod pci;

use proptest::collection::vec;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use virtio_bindings::virtio_mmio::*;
use virtio_bindings::virtio_ring::{
    VIRTIO_RING_F_EVENT_IDX, VIRTIO_RING_F_INDIRECT_DESC, VRING_DESC_F_INDIRECT, VRING_DESC_F_NEXT,
    VRING_DESC_F_WRITE,
};
use vm_memory::{Bytes, GuestAddress};

use super::{BUFFERS, Guest, HIGH, QUEUE_STRIDE, QUEUES, REGION, RUNNING};
pub use pci::{PciAct, any_pci_act};

/// Steps of the longest story.
const MOST_STEPS: usize = 256;

/// Where hostile guests keep their indirect tables.
const TABLES: u64 = BUFFERS + 0x4_0000;

/// A story for fuzzers: four bytes are the dice that draw one step of it. So the steps of the
/// property tests are those that a fuzzer combines, and leaving bytes out or adding some leaves
/// the other steps as they are.
pub fn from_bytes<T: std::fmt::Debug>(step: &impl Strategy<Value = T>, bytes: &[u8]) -> Vec<T> {
    let mut steps = Vec::new();
    for number in bytes.chunks_exact(4).take(MOST_STEPS) {
        let mut seed = [0; 32];
        seed[..4].copy_from_slice(number);
        let dice = TestRng::from_seed(RngAlgorithm::ChaCha, &seed);
        let mut runner = TestRunner::new_with_rng(Config::default(), dice);
        steps.extend(step.new_tree(&mut runner).map(|tree| tree.current()));
    }
    steps
}

/// One thing a guest does.
#[derive(Clone, Debug)]
pub enum Act {
    /// Writes anything anywhere in the window.
    Write {
        /// From the window's start.
        offset: u64,
        /// What.
        data: Vec<u8>,
    },
    /// Reads anything anywhere in the window.
    Read {
        /// From the window's start.
        offset: u64,
        /// How many bytes.
        len: usize,
    },
    /// Sets the device up as an honest driver does.
    Start {
        /// Features left out.
        refused: u64,
    },
    /// Sets the device up with rings at odd places.
    StartOddly {
        /// Size and the addresses of the three parts, for each queue.
        queues: Vec<(u32, [u64; 3])>,
    },
    /// Fills in a descriptor: in the table of a queue or, with no queue, in an indirect table.
    Describe {
        /// In whose table.
        queue: Option<usize>,
        /// Where in the table.
        place: u16,
        /// Its buffer.
        address: u64,
        /// Its buffer's length.
        len: u32,
        /// NEXT, WRITE, INDIRECT and more.
        flags: u16,
        /// The descriptor after it.
        next: u16,
    },
    /// Makes a chain available and notifies the device.
    Send {
        /// On which queue.
        queue: usize,
        /// Its first descriptor.
        head: u16,
    },
    /// Moves the available index by so much and notifies the device.
    Skip {
        /// On which queue.
        queue: usize,
        /// How far.
        by: u16,
    },
    /// Writes bytes into the rings.
    Scribble {
        /// Where.
        address: u64,
        /// What.
        bytes: Vec<u8>,
    },
}

impl Act {
    /// Does it, and lets the device work until it is quiet.
    pub fn apply(&self, guest: &mut Guest) {
        match self {
            Self::Write { offset, data } => guest.raw_write(*offset, data),
            Self::Read { offset, len } => guest.raw_read(*offset, &mut vec![0; *len]),
            Self::Start { refused } => guest.start(*refused),
            Self::StartOddly { queues } => start_oddly(guest, queues),
            Self::Describe { queue, place, address, len, flags, next } => {
                let table = queue.map_or(TABLES, |queue| guest.rings(queue).descriptors);
                let place = table + 16 * u64::from(*place);
                guest.describe_at(place, *address, *len, u32::from(*flags), *next);
            }
            Self::Send { queue, head } => guest.send(*queue, *head),
            Self::Skip { queue, by } => {
                let index = guest.available[*queue].wrapping_add(*by);
                guest.set_available(*queue, index);
                guest.notify(*queue);
            }
            Self::Scribble { address, bytes } => {
                guest.ram.memory.write_slice(bytes, GuestAddress(*address)).unwrap();
            }
        }
        guest.run();
    }
}

fn start_oddly(guest: &mut Guest, queues: &[(u32, [u64; 3])]) {
    guest.agree(0);
    let parts = [VIRTIO_MMIO_QUEUE_DESC_LOW, VIRTIO_MMIO_QUEUE_AVAIL_LOW, VIRTIO_MMIO_QUEUE_USED_LOW];
    for (index, (size, addresses)) in queues.iter().enumerate() {
        guest.write(VIRTIO_MMIO_QUEUE_SEL, index as u32);
        guest.write(VIRTIO_MMIO_QUEUE_NUM, *size);
        for (register, address) in parts.into_iter().zip(addresses) {
            guest.write(register, *address as u32);
            guest.write(register + 4, (address >> 32) as u32);
        }
        guest.write(VIRTIO_MMIO_QUEUE_READY, 1);
    }
    guest.write(VIRTIO_MMIO_STATUS, RUNNING);
}

/// Anything a guest may do to a device with `queues` queues of at most `size` descriptors.
pub fn any_act(queues: usize, size: u16) -> impl Strategy<Value = Act> {
    let widths = prop_oneof![8 => Just(4usize), 1 => 0usize..10];
    prop_oneof![
        2 => (register(), widths.clone(), register_value()).prop_map(|(offset, width, value)| {
            let mut data = value.to_le_bytes().to_vec();
            data.resize(width, 0xff);
            Act::Write { offset, data }
        }),
        1 => (register(), widths).prop_map(|(offset, len)| Act::Read { offset, len }),
        1 => prop::sample::select(vec![0, 1 << VIRTIO_RING_F_EVENT_IDX, 1 << VIRTIO_RING_F_INDIRECT_DESC])
            .prop_map(|refused| Act::Start { refused }),
        1 => vec((queue_size(), [ring(), ring(), ring()]), queues)
            .prop_map(|queues| Act::StartOddly { queues }),
        12 => chain_act(queues, size),
    ]
}

/// What a guest may do with the queues alone, as it does once it has set the device up.
pub fn chain_act(queues: usize, size: u16) -> impl Strategy<Value = Act> {
    let place = prop_oneof![8 => 0..size.min(8), 1 => 0..size, 1 => any::<u16>().prop_map(|n| n % 4096)];
    prop_oneof![
        8 => (prop::option::weighted(0.8, 0..queues), place.clone(), address(), len(), flags(), place.clone())
            .prop_map(|(queue, place, address, len, flags, next)| {
                Act::Describe { queue, place, address, len, flags, next }
            }),
        8 => (0..queues, prop_oneof![9 => place, 1 => any::<u16>()])
            .prop_map(|(queue, head)| Act::Send { queue, head }),
        1 => (0..queues, prop_oneof![3 => 0..=size, 1 => any::<u16>()])
            .prop_map(|(queue, by)| Act::Skip { queue, by }),
        1 => (QUEUES..QUEUES + QUEUE_STRIDE * queues as u64, vec(any::<u8>(), 1..64))
            .prop_map(|(address, bytes)| Act::Scribble { address, bytes }),
    ]
}

/// Registers, the configuration space, and what lies between and beyond.
fn register() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (0u64..0x44).prop_map(|n| 4 * n),
        2 => 0x100u64..0x110,
        1 => 0u64..0x1000,
        1 => any::<u64>(),
    ]
}

fn register_value() -> impl Strategy<Value = u32> {
    let status = prop::sample::select(vec![0, 1, 3, 7, 11, 15, 0x4f, 0x8f, 0xff]);
    prop_oneof![3 => status, 2 => 0u32..256, 1 => any::<u32>()]
}

fn queue_size() -> impl Strategy<Value = u32> {
    prop_oneof![6 => (0u32..8).prop_map(|shift| 1 << shift), 1 => any::<u32>()]
}

/// Places for a ring: mostly aligned and inside, sometimes on top of each other.
fn ring() -> impl Strategy<Value = u64> {
    prop_oneof![
        8 => (1u64..REGION as u64 / 0x1000 - 1).prop_map(|page| page * 0x1000),
        2 => (1u64..64).prop_map(|n| QUEUES + n * 16),
        2 => (0u64..REGION as u64 / 0x1000).prop_map(|page| HIGH + page * 0x1000),
        1 => address(),
    ]
}

/// Addresses of buffers: mostly inside, else at an edge, in the hole, in the rings or nowhere.
fn address() -> impl Strategy<Value = u64> {
    let region = REGION as u64;
    prop_oneof![
        8 => BUFFERS..region,
        4 => HIGH..HIGH + region,
        4 => Just(TABLES),
        2 => QUEUES..BUFFERS,
        1 => prop::sample::select(vec![0, region - 1, region, HIGH - 1, HIGH + region - 1, HIGH + region, u64::MAX]),
        1 => any::<u64>(),
    ]
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![
        6 => (1u32..2048).prop_map(|n| 4 * n),
        2 => (1u32..64).prop_map(|n| 16 * n),
        2 => 1u32..8192,
        1 => prop::sample::select(vec![0, 1, REGION as u32, REGION as u32 + 1, 1 << 31, u32::MAX]),
        1 => any::<u32>(),
    ]
}

fn flags() -> impl Strategy<Value = u16> {
    let (next, write, indirect) =
        (VRING_DESC_F_NEXT as u16, VRING_DESC_F_WRITE as u16, VRING_DESC_F_INDIRECT as u16);
    prop_oneof![
        4 => Just(0),
        4 => Just(write),
        4 => Just(next),
        4 => Just(next | write),
        3 => Just(indirect),
        1 => any::<u16>(),
    ]
}
