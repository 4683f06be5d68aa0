//! What a disk may hold after a stop at any moment.

use std::collections::BTreeMap;

use super::{Chance, SECTOR, SECTORS};

/// What a sector of a new disk holds.
pub fn at_first(sector: u64) -> [u8; SECTOR] {
    filled(u64::MAX, sector)
}

/// What request `number` writes into a sector.
pub fn filled(number: u64, sector: u64) -> [u8; SECTOR] {
    let mut bytes = [0; SECTOR];
    for (index, place) in bytes.chunks_exact_mut(16).enumerate() {
        place[..8].copy_from_slice(&number.to_le_bytes());
        place[8..].copy_from_slice(&(sector << 8 | index as u64).to_le_bytes());
    }
    bytes
}

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ask {
    Write { sector: u64, sectors: u64 },
    Zero { sector: u64, sectors: u64, unmap: bool },
    Discard { sector: u64, sectors: u64 },
    Flush,
}

impl Ask {
    /// One at random. Places come from a few dozens of neighbourhoods, so that much is written twice.
    pub fn at_random(chance: &mut Chance) -> Self {
        let area = chance.below(48) * (SECTORS / 48);
        let sector = area + chance.below(96);
        let sectors = match chance.below(4) {
            0 => 1,
            1 => 8,
            2 => 1 + chance.below(16),
            _ => 1 + chance.below(64),
        };
        match chance.below(16) {
            0..=9 => Self::Write { sector, sectors },
            10 => Self::Zero { sector, sectors, unmap: false },
            11 => Self::Zero { sector, sectors, unmap: true },
            // Long enough that clusters of 64 KiB go.
            12 => Self::Zero { sector: area, sectors: 320, unmap: true },
            13 => Self::Discard { sector: area & !127, sectors: 256 },
            _ => Self::Flush,
        }
    }

    pub fn range(&self) -> std::ops::Range<u64> {
        match *self {
            Self::Write { sector, sectors }
            | Self::Zero { sector, sectors, .. }
            | Self::Discard { sector, sectors } => sector..sector + sectors,
            Self::Flush => 0..0,
        }
    }
}

/// The requests of a seed, by their numbers: a pure function, so that another process knows them.
pub fn requests(seed: u64) -> impl Iterator<Item = Ask> {
    let mut chance = Chance(seed);
    std::iter::from_fn(move || Some(Ask::at_random(&mut chance)))
}

/// What happened to a request, in its order.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event {
    Asked(u64),
    Answered(u64),
}

/// What was asked for and answered until a stop.
pub struct History {
    /// Requests, with the moments at which they were asked for and answered.
    requests: BTreeMap<u64, (Ask, u64, Option<u64>)>,
}

impl History {
    /// `events` of the requests of a seed.
    pub fn new(seed: u64, events: impl Iterator<Item = Event>) -> Self {
        let mut asks = requests(seed);
        let mut requests: BTreeMap<u64, (Ask, u64, Option<u64>)> = BTreeMap::new();
        for (moment, event) in (0..).zip(events) {
            match event {
                Event::Asked(number) => {
                    requests.insert(number, (asks.next().unwrap(), moment, None));
                }
                Event::Answered(number) => requests.get_mut(&number).unwrap().2 = Some(moment),
            }
        }
        Self { requests }
    }

    /// Checks what was found on the disk after the stop; returns how many flushes were answered before.
    pub fn check(&self, found: &[u8]) -> usize {
        assert_eq!(found.len(), SECTORS as usize * SECTOR);
        let flushes: Vec<u64> = self
            .requests
            .values()
            .filter(|(ask, _, answered)| *ask == Ask::Flush && answered.is_some())
            .map(|(_, asked, _)| *asked)
            .collect();
        // Requests that are about the same sectors follow each other.
        let mut about: Vec<Vec<u64>> = vec![Vec::new(); SECTORS as usize];
        for (number, (ask, ..)) in &self.requests {
            for sector in ask.range() {
                about[sector as usize].push(*number);
            }
        }
        let last_flush = flushes.iter().max();
        for (sector, bytes) in (0..).zip(found.as_chunks::<SECTOR>().0) {
            let numbers = &about[sector as usize];
            let is_flushed = |number: &&u64| {
                let answered = self.requests[number].2;
                answered.zip(last_flush).is_some_and(|(answered, flush)| answered < *flush)
            };
            let flushed = numbers.iter().rev().find(is_flushed);
            let possible = numbers.iter().filter(|number| flushed.is_none_or(|flushed| *number >= flushed));
            let mut is_possible = flushed.is_none() && *bytes == at_first(sector);
            for number in possible {
                is_possible |= match self.requests[number].0 {
                    Ask::Write { .. } => *bytes == filled(*number, sector),
                    Ask::Zero { .. } => *bytes == [0; SECTOR],
                    Ask::Discard { .. } => true,
                    Ask::Flush => false,
                };
            }
            assert!(
                is_possible,
                "sector {sector} begins with {:x?}; about it: {:?}; flushed: {flushed:?}",
                &bytes[..16],
                numbers.iter().map(|number| (number, &self.requests[number])).collect::<Vec<_>>()
            );
        }
        flushes.len()
    }
}
