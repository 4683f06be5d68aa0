//! Packets of the socket device (virtio 1.2, section 5.10.6).

/// Bytes of `struct virtio_vsock_hdr`.
pub const HEADER: usize = 44;

/// The host's context identifier (section 5.10.4).
pub const HOST_CID: u64 = 2;

/// `VIRTIO_VSOCK_TYPE_STREAM`.
const STREAM: u16 = 1;

/// Flags of [`Operation::Shutdown`]: the sender receives no more.
pub const NO_MORE_RECEIVED: u32 = 1;
/// The sender sends no more.
pub const NO_MORE_SENT: u32 = 2;

/// What a packet is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asks for a connection.
    Request,
    /// Grants it.
    Response,
    /// Ends it, or refuses it.
    Reset,
    /// The sender is about to end it, one way or both.
    Shutdown,
    /// Carries data.
    Data,
    /// Tells how much the sender has room for.
    CreditUpdate,
    /// Asks for that.
    CreditRequest,
}

impl Operation {
    const ALL: [Self; 7] = [
        Self::Request,
        Self::Response,
        Self::Reset,
        Self::Shutdown,
        Self::Data,
        Self::CreditUpdate,
        Self::CreditRequest,
    ];

    fn from_number(number: u16) -> Option<Self> {
        Self::ALL.get(usize::from(number.checked_sub(1)?)).copied()
    }

    const fn number(self) -> u16 {
        self as u16 + 1
    }
}

/// One end of a connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Address {
    /// Whose.
    pub cid: u64,
    /// Which of its ports.
    pub port: u32,
}

/// A packet but for its data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Its sender.
    pub from: Address,
    /// Its receiver.
    pub to: Address,
    /// Bytes of data behind the header.
    pub length: u32,
    /// What it is for; `None` for what this device does not know, and for other than streams.
    pub operation: Option<Operation>,
    /// Whether it is an end of something, and must not be answered by one.
    pub flags: u32,
    /// How many bytes the sender keeps for this connection.
    pub buffer: u32,
    /// How many bytes of this connection its program has taken, modulo 2^32.
    pub forwarded: u32,
}

impl Packet {
    /// A packet without data.
    pub const fn new(from: Address, to: Address, operation: Operation) -> Self {
        Self { from, to, length: 0, operation: Some(operation), flags: 0, buffer: 0, forwarded: 0 }
    }

    /// Reads a header. Any bytes are one.
    pub fn decode(bytes: &[u8; HEADER]) -> Self {
        let mut rest = bytes.as_slice();
        let from_cid = u64::from_le_bytes(take(&mut rest));
        let to_cid = u64::from_le_bytes(take(&mut rest));
        let from_port = u32::from_le_bytes(take(&mut rest));
        let to_port = u32::from_le_bytes(take(&mut rest));
        let length = u32::from_le_bytes(take(&mut rest));
        let kind = u16::from_le_bytes(take(&mut rest));
        let operation = Operation::from_number(u16::from_le_bytes(take(&mut rest)));
        Self {
            from: Address { cid: from_cid, port: from_port },
            to: Address { cid: to_cid, port: to_port },
            length,
            operation: operation.filter(|operation| kind == STREAM || *operation == Operation::Reset),
            flags: u32::from_le_bytes(take(&mut rest)),
            buffer: u32::from_le_bytes(take(&mut rest)),
            forwarded: u32::from_le_bytes(take(&mut rest)),
        }
    }

    /// The header as it goes to the driver.
    pub fn encode(&self) -> [u8; HEADER] {
        let mut bytes = [0; HEADER];
        let mut rest = bytes.as_mut_slice();
        put(&mut rest, &self.from.cid.to_le_bytes());
        put(&mut rest, &self.to.cid.to_le_bytes());
        put(&mut rest, &self.from.port.to_le_bytes());
        put(&mut rest, &self.to.port.to_le_bytes());
        put(&mut rest, &self.length.to_le_bytes());
        put(&mut rest, &STREAM.to_le_bytes());
        put(&mut rest, &self.operation.map_or(0, Operation::number).to_le_bytes());
        put(&mut rest, &self.flags.to_le_bytes());
        put(&mut rest, &self.buffer.to_le_bytes());
        put(&mut rest, &self.forwarded.to_le_bytes());
        bytes
    }
}

fn take<const N: usize>(rest: &mut &[u8]) -> [u8; N] {
    rest.split_off(..N).and_then(|part| part.try_into().ok()).unwrap_or([0; N])
}

fn put(rest: &mut &mut [u8], part: &[u8]) {
    if let Some(place) = rest.split_off_mut(..part.len()) {
        place.copy_from_slice(part);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_header_stands_as_the_specification_has_it() {
        let packet = Packet {
            length: 0x0d0c_0b0a,
            flags: 2,
            buffer: 0x1_0000,
            forwarded: 7,
            ..Packet::new(
                Address { cid: HOST_CID, port: 1024 },
                Address { cid: 3, port: 22 },
                Operation::Shutdown,
            )
        };
        let bytes = packet.encode();
        assert_eq!(bytes[..8], [2, 0, 0, 0, 0, 0, 0, 0], "src_cid");
        assert_eq!(bytes[8..16], [3, 0, 0, 0, 0, 0, 0, 0], "dst_cid");
        assert_eq!(bytes[16..24], [0, 4, 0, 0, 22, 0, 0, 0], "src_port, dst_port");
        assert_eq!(bytes[24..32], [0x0a, 0x0b, 0x0c, 0x0d, 1, 0, 4, 0], "len, type, op");
        assert_eq!(bytes[32..], [2, 0, 0, 0, 0, 0, 1, 0, 7, 0, 0, 0], "flags, buf_alloc, fwd_cnt");
    }

    proptest! {
        #[test]
        fn any_header_is_read(bytes in any::<[u8; HEADER]>()) {
            let packet = Packet::decode(&bytes);
            if packet.operation.is_some() {
                let again = packet.encode();
                // The type may differ, of a reset.
                prop_assert_eq!(&again[..28], &bytes[..28]);
                prop_assert_eq!(&again[30..], &bytes[30..]);
            }
        }
    }
}
