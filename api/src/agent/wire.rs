//! How an agent's words travel: frames of a few bytes on a port that keeps their order.
//!
//! ```text
//! frame   0xba 0x11 KIND COUNT  entry...     COUNT entries, at most 32
//! entry   TAG (2 bytes) VALUE (8 bytes)      little-endian, as in the balloon's statistics
//! ```
//! Only the agent speaks. A frame says all that is to be known of it, so that
//! either side can be started anew at any moment. A tag or kind that the reader
//! does not know is passed over: that is how both grow.

use super::{AgentFigures, Version};
use crate::units::Bytes;

/// Entries of one frame.
pub const MOST_ENTRIES: usize = 32;

/// Bytes of the largest frame.
pub const LARGEST_FRAME: usize = HEAD + MOST_ENTRIES * ENTRY;

const MAGIC: [u8; 2] = [0xba, 0x11];
const HEAD: usize = 4;
const ENTRY: usize = 10;
/// The tag of the agent's version: 16 bits for each part.
const VERSION: u16 = 0;

/// Why a frame was sent.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It was time to.
    Figures,
    /// The guest waits for memory.
    Distress,
}

impl Kind {
    const fn to_byte(self) -> u8 {
        match self {
            Self::Figures => 1,
            Self::Distress => 2,
        }
    }

    const fn from_byte(byte: u8) -> Option<Self> {
        match byte {
            1 => Some(Self::Figures),
            2 => Some(Self::Distress),
            _ => None,
        }
    }
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// Why it was sent.
    pub kind: Kind,
    /// The agent's version, where it says so.
    pub version: Option<Version>,
    /// The figures that it brings.
    pub figures: AgentFigures,
}

impl AgentFigures {
    /// Each figure with its tag.
    fn tagged(&mut self) -> [(u16, Figure<'_>); 13] {
        [
            (1, Figure::Bytes(&mut self.available)),
            (2, Figure::Bytes(&mut self.total)),
            (3, Figure::Bytes(&mut self.committed)),
            (4, Figure::Count(&mut self.stall_us)),
            (5, Figure::Count(&mut self.full_stall_us)),
            (6, Figure::Bytes(&mut self.refaults)),
            (7, Figure::Bytes(&mut self.swap_in)),
            (8, Figure::Bytes(&mut self.swap_out)),
            (9, Figure::Bytes(&mut self.swap_free)),
            (10, Figure::Count(&mut self.allocation_stalls)),
            (11, Figure::Count(&mut self.oom_kills)),
            (12, Figure::Count(&mut self.cgroup_stall_us)),
            (13, Figure::Count(&mut self.cgroup_limited)),
        ]
    }

    /// Takes over every figure that `newer` has.
    pub fn update(&mut self, mut newer: Self) {
        for ((_, mut old), (_, new)) in self.tagged().into_iter().zip(newer.tagged()) {
            if let Some(value) = new.get() {
                old.set(value);
            }
        }
    }
}

enum Figure<'a> {
    Bytes(&'a mut Option<Bytes>),
    Count(&'a mut Option<u64>),
}

impl Figure<'_> {
    fn get(&self) -> Option<u64> {
        match self {
            Self::Bytes(bytes) => bytes.map(|bytes| bytes.0),
            Self::Count(count) => **count,
        }
    }

    fn set(&mut self, value: u64) {
        match self {
            Self::Bytes(bytes) => **bytes = Some(Bytes(value)),
            Self::Count(count) => **count = Some(value),
        }
    }
}

/// A frame as it is written; no memory is allocated for it, as there may be none.
pub struct Encoded {
    bytes: [u8; LARGEST_FRAME],
    length: usize,
}

impl Encoded {
    /// The bytes to write, at once.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }

    fn push(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        if let Some(place) = self.bytes.get_mut(self.length..end) {
            place.copy_from_slice(bytes);
            self.length = end;
        }
    }

    fn push_entry(&mut self, tag: u16, value: u64) {
        self.push(&tag.to_le_bytes());
        self.push(&value.to_le_bytes());
        if let Some(count) = self.bytes.get_mut(3) {
            *count += 1;
        }
    }
}

impl Frame {
    /// The frame as it travels.
    pub fn encode(&self) -> Encoded {
        let mut encoded = Encoded { bytes: [0; LARGEST_FRAME], length: 0 };
        encoded.push(&[MAGIC[0], MAGIC[1], self.kind.to_byte(), 0]);
        if let Some(Version { major, minor, patch }) = self.version {
            let parts = [major, minor, patch].into_iter().fold(0, |all, part| all << 16 | u64::from(part));
            encoded.push_entry(VERSION, parts);
        }
        let mut figures = self.figures;
        for (tag, figure) in figures.tagged() {
            if let Some(value) = figure.get() {
                encoded.push_entry(tag, value);
            }
        }
        encoded
    }

    fn set(&mut self, tag: u16, value: u64) {
        if tag == VERSION {
            let part = |shift: u32| (value >> shift) as u16;
            self.version = Some(Version { major: part(32), minor: part(16), patch: part(0) });
        } else if let Some((_, mut figure)) = self.figures.tagged().into_iter().find(|(own, _)| *own == tag) {
            figure.set(value);
        }
    }
}

/// Puts frames together from pieces that may end anywhere and hold anything.
#[derive(Clone, Debug)]
pub struct Decoder {
    held: [u8; LARGEST_FRAME],
    length: usize,
    /// Whether the last byte belonged to no frame.
    lost: bool,
    malformed: u64,
}

impl Default for Decoder {
    fn default() -> Self {
        Self { held: [0; LARGEST_FRAME], length: 0, lost: false, malformed: 0 }
    }
}

impl Decoder {
    /// How often bytes came that were no part of a frame; a run of them counts once.
    pub const fn malformed(&self) -> u64 {
        self.malformed
    }

    /// Forgets what it holds of a frame: the sender has begun anew.
    pub fn restart(&mut self) {
        self.length = 0;
        self.lost = false;
    }

    /// Takes in a piece, and hands over each frame that is whole with it.
    pub fn feed(&mut self, piece: &[u8], mut frame: impl FnMut(Frame)) {
        for &byte in piece {
            if let Some(whole) = self.push(byte) {
                frame(whole);
            }
        }
    }

    fn push(&mut self, byte: u8) -> Option<Frame> {
        let fits = match self.length {
            place @ (0 | 1) => MAGIC.get(place) == Some(&byte),
            2 => true,
            3 => usize::from(byte) <= MOST_ENTRIES,
            _ => true,
        };
        if !fits {
            if !std::mem::replace(&mut self.lost, true) {
                self.malformed = self.malformed.saturating_add(1);
            }
            // It may be where the next frame begins.
            self.length = 0;
            if MAGIC.first() != Some(&byte) {
                return None;
            }
        }
        *self.held.get_mut(self.length)? = byte;
        self.length += 1;
        let [_, _, kind, count] = *self.held.first_chunk::<HEAD>()?;
        if self.length < HEAD || self.length < HEAD + usize::from(count) * ENTRY {
            return None;
        }
        let entries = self.held.get(HEAD..self.length).unwrap_or_default();
        let frame = Kind::from_byte(kind).map(|kind| {
            let mut frame = Frame { kind, version: None, figures: AgentFigures::default() };
            for entry in entries.chunks_exact(ENTRY) {
                if let Some((tag, value)) = entry.split_first_chunk::<2>()
                    && let Ok(value) = <[u8; 8]>::try_from(value)
                {
                    frame.set(u16::from_le_bytes(*tag), u64::from_le_bytes(value));
                }
            }
            frame
        });
        self.restart();
        frame
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn any_frame() -> impl Strategy<Value = Frame> {
        let version = prop::option::of(any::<(u16, u16, u16)>());
        (any::<bool>(), version, vec(prop::option::of(any::<u64>()), 13)).prop_map(
            |(distress, version, values)| {
                let mut figures = AgentFigures::default();
                for ((_, mut figure), value) in figures.tagged().into_iter().zip(values) {
                    if let Some(value) = value {
                        figure.set(value);
                    }
                }
                let kind = if distress { Kind::Distress } else { Kind::Figures };
                let version = version.map(|(major, minor, patch)| Version { major, minor, patch });
                Frame { kind, version, figures }
            },
        )
    }

    fn decode(pieces: &[&[u8]]) -> (Vec<Frame>, u64) {
        let mut decoder = Decoder::default();
        let mut frames = Vec::new();
        for piece in pieces {
            decoder.feed(piece, |frame| frames.push(frame));
        }
        (frames, decoder.malformed())
    }

    #[test]
    fn distress_takes_a_few_bytes() {
        let figures =
            AgentFigures { available: Some(Bytes(1)), stall_us: Some(2), ..AgentFigures::default() };
        let frame = Frame { kind: Kind::Distress, version: None, figures };
        assert_eq!(frame.encode().as_bytes().len(), 24);
        let [tags @ .., _] = AgentFigures::default().tagged().map(|(tag, _)| tag);
        assert!(tags.is_sorted() && !tags.contains(&VERSION), "each tag has one meaning");
    }

    #[test]
    fn unknown_tags_and_kinds_are_passed_over() {
        let mut bytes = vec![0xba, 0x11, 2, 2];
        for (tag, value) in [(9999u16, 7u64), (1, 4096)] {
            bytes.extend(tag.to_le_bytes());
            bytes.extend(value.to_le_bytes());
        }
        let (frames, malformed) = decode(&[&[0xba, 0x11, 77, 0], &bytes]);
        let figures = AgentFigures { available: Some(Bytes(4096)), ..AgentFigures::default() };
        assert_eq!(frames, [Frame { kind: Kind::Distress, version: None, figures }]);
        assert_eq!(malformed, 0);
    }

    #[test]
    fn a_frame_after_nonsense_is_found() {
        let frame = Frame { kind: Kind::Distress, version: None, figures: AgentFigures::default() };
        let bytes = frame.encode();
        let (frames, malformed) =
            decode(&[b"login: \xba", bytes.as_bytes(), &[0xba, 0x11, 1, 33], bytes.as_bytes()]);
        assert_eq!((frames, malformed), (vec![frame, frame], 2));
    }

    proptest! {
        #[test]
        fn what_is_sent_arrives_in_whatever_pieces(frames in vec(any_frame(), 0..5), cut in 1usize..64) {
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| frame.encode().as_bytes().to_vec()).collect();
            let pieces: Vec<&[u8]> = bytes.chunks(cut).collect();
            prop_assert_eq!(decode(&pieces), (frames, 0));
        }

        #[test]
        fn anything_may_come(noise in vec(any::<u8>(), 0..2000), frame in any_frame()) {
            let mut decoder = Decoder::default();
            decoder.feed(&noise, |_| ());
            decoder.restart();
            let mut last = None;
            decoder.feed(frame.encode().as_bytes(), |frame| last = Some(frame));
            prop_assert_eq!(last, Some(frame));
        }

        #[test]
        fn newer_figures_replace_older_ones(older in any_frame(), newer in any_frame()) {
            let mut figures = older.figures;
            figures.update(newer.figures);
            prop_assert_eq!(figures.available, newer.figures.available.or(older.figures.available));
            prop_assert_eq!(figures.cgroup_limited, newer.figures.cgroup_limited.or(older.figures.cgroup_limited));
        }
    }
}
