//! Requests and answers as they stand in the queue (virtio 1.2, section 5.15.6).

use devices::virtio::queue::{Buffer, Chain};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};

use super::blocks::BlockState;

/// `struct virtio_mem_req`: type, padding to 8 bytes, then address, number of blocks, padding.
pub const REQUEST: usize = 24;
/// `struct virtio_mem_resp`: type, padding to 8 bytes, then a state.
pub const RESPONSE: usize = 10;

/// Blocks that a request is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Asked {
    /// Where the first one starts.
    pub address: GuestAddress,
    /// How many there are.
    pub blocks: u16,
}

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// To use these blocks (section 5.15.6.1).
    Plug(Asked),
    /// To use them no longer (section 5.15.6.2).
    Unplug(Asked),
    /// To use none at all any more (section 5.15.6.3).
    UnplugAll,
    /// What they are (section 5.15.6.4).
    State(Asked),
    /// Nothing that this device knows.
    Unknown,
}

/// What the device answers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Response {
    /// Done.
    Ack,
    /// What [`Request::State`] asked for.
    State(BlockState),
    /// Not allowed now: more than is requested of the guest.
    Nack,
    /// The host can't do it at the moment.
    Busy,
    /// The request makes no sense.
    Error,
}

impl Request {
    /// Reads the request of a chain; `None` where the chain can't be one, or has no room for an answer.
    pub fn read(memory: &GuestMemoryMmap, chain: &Chain) -> Option<Self> {
        let room: u64 = chain.writable().iter().map(|buffer| u64::from(buffer.len)).sum();
        let mut bytes = [0; REQUEST];
        if room < RESPONSE as u64 || chain.reader(memory).read(&mut bytes) < REQUEST {
            return None;
        }
        Some(Self::parse(&bytes))
    }

    fn parse(bytes: &[u8; REQUEST]) -> Self {
        let [t0, t1, _, _, _, _, _, _, a0, a1, a2, a3, a4, a5, a6, a7, n0, n1, ..] = *bytes;
        let asked = Asked {
            address: GuestAddress(u64::from_le_bytes([a0, a1, a2, a3, a4, a5, a6, a7])),
            blocks: u16::from_le_bytes([n0, n1]),
        };
        match u16::from_le_bytes([t0, t1]) {
            0 => Self::Plug(asked),
            1 => Self::Unplug(asked),
            2 => Self::UnplugAll,
            3 => Self::State(asked),
            _ => Self::Unknown,
        }
    }
}

impl Response {
    fn bytes(self) -> [u8; RESPONSE] {
        let kind: u16 = match self {
            Self::Ack | Self::State(_) => 0,
            Self::Nack => 1,
            Self::Busy => 2,
            Self::Error => 3,
        };
        let state: u16 = match self {
            Self::State(BlockState::Unplugged) => 1,
            Self::State(BlockState::Mixed) => 2,
            _ => 0,
        };
        let [k0, k1] = kind.to_le_bytes();
        let [s0, s1] = state.to_le_bytes();
        [k0, k1, 0, 0, 0, 0, 0, 0, s0, s1]
    }

    /// Writes the answer into the chain's first writable bytes; returns how many there were.
    pub fn write(self, memory: &GuestMemoryMmap, chain: &Chain) -> u32 {
        let bytes = self.bytes();
        let mut left = bytes.as_slice();
        for Buffer { address, len } in chain.writable() {
            let part = left.len().min(usize::try_from(*len).unwrap_or(usize::MAX));
            let (now, later) = left.split_at(part);
            if memory.write_slice(now, *address).is_err() {
                break;
            }
            left = later;
            if left.is_empty() {
                break;
            }
        }
        // At most RESPONSE.
        (bytes.len() - left.len()) as u32
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fields_stand_where_linux_puts_them() {
        let mut bytes = [0xee; REQUEST];
        bytes[..2].copy_from_slice(&1u16.to_le_bytes());
        bytes[8..16].copy_from_slice(&0x1_4000_0000u64.to_le_bytes());
        bytes[16..18].copy_from_slice(&64u16.to_le_bytes());
        let asked = Asked { address: GuestAddress(0x1_4000_0000), blocks: 64 };
        assert_eq!(Request::parse(&bytes), Request::Unplug(asked));
        assert_eq!(Response::Nack.bytes(), [1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(Response::State(BlockState::Mixed).bytes(), [0, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    }
}
