//! What the process that looks through a disk and the one that opened it say to each other, over one socket.
//!
//! The former asks for bytes of the disk, and gets them. In the end it says what it found ([`Plan`](super::search::Plan),
//! as JSON), sends the files, and says that it is done. Each message is a head and what it tells the length of.

use std::io;

/// Bytes of the disk in one answer, and of a file in one message, at most.
pub const LARGEST_PIECE: usize = 1 << 20;

/// Bytes of a plan at most.
pub const LARGEST_PLAN: usize = 64 << 10;

/// Bytes of a head.
pub const HEAD: usize = 13;

/// What the process that looks says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Message {
    /// It wants as many bytes from `offset` on.
    Read {
        /// Where on the disk.
        offset: u64,
        /// Bytes.
        len: usize,
    },
    /// As many bytes of a plan follow.
    Plan(usize),
    /// As many bytes of the kernel follow.
    Kernel(usize),
    /// As many bytes of the initramfs follow.
    Initrd(usize),
    /// That was all.
    Done,
}

impl Message {
    /// Its head.
    pub fn head(self) -> [u8; HEAD] {
        let (kind, len, offset) = match self {
            Self::Read { offset, len } => (1, len, offset),
            Self::Plan(len) => (2, len, 0),
            Self::Kernel(len) => (3, len, 0),
            Self::Initrd(len) => (4, len, 0),
            Self::Done => (5, 0, 0),
        };
        let mut head = [0; HEAD];
        // No message is longer than LARGEST_PIECE.
        let fields = [&[kind][..], &(len as u32).to_le_bytes(), &offset.to_le_bytes()];
        for (byte, value) in head.iter_mut().zip(fields.concat()) {
            *byte = value;
        }
        head
    }

    /// Reads a head, which anybody may have written.
    ///
    /// # Errors
    /// `InvalidData` for an unknown kind, and for more bytes than one message has.
    pub fn parse(head: &[u8; HEAD]) -> io::Result<Self> {
        let [kind, l0, l1, l2, l3, offset @ ..] = *head;
        let len = u32::from_le_bytes([l0, l1, l2, l3]) as usize;
        let limit = if kind == 2 { LARGEST_PLAN } else { LARGEST_PIECE };
        match kind {
            _ if len > limit => Err(io::Error::new(io::ErrorKind::InvalidData, "it sends too much at once")),
            1 => Ok(Self::Read { offset: u64::from_le_bytes(offset), len }),
            2 => Ok(Self::Plan(len)),
            3 => Ok(Self::Kernel(len)),
            4 => Ok(Self::Initrd(len)),
            5 => Ok(Self::Done),
            _ => Err(io::Error::new(io::ErrorKind::InvalidData, "it says what nobody understands")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_message_is_understood() {
        for message in [
            Message::Read { offset: u64::MAX, len: LARGEST_PIECE },
            Message::Plan(7),
            Message::Kernel(1),
            Message::Initrd(0),
            Message::Done,
        ] {
            assert_eq!(Message::parse(&message.head()).expect("it is one"), message);
        }
        assert!(Message::parse(&Message::Plan(LARGEST_PLAN + 1).head()).is_err());
    }

    proptest! {
        #[test]
        fn no_head_asks_for_more_than_a_piece(head: [u8; HEAD]) {
            match Message::parse(&head) {
                Ok(Message::Read { len, .. } | Message::Plan(len) | Message::Kernel(len) | Message::Initrd(len)) => {
                    prop_assert!(len <= LARGEST_PIECE);
                }
                Ok(Message::Done) | Err(_) => {}
            }
        }
    }
}
