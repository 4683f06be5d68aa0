//! The last output of a port, for whoever comes to look at it later. It holds nobody back: who is slow misses some.

use std::collections::VecDeque;

/// How much output is kept, in bytes.
pub const MOST_RECENT: usize = 64 << 10;

/// The last [`MOST_RECENT`] bytes of a port's output. A position counts the bytes since the port was made.
#[derive(Debug, Default)]
pub(super) struct Recent {
    bytes: VecDeque<u8>,
    /// The position behind the last byte.
    end: u64,
    /// Somebody waits for a byte at this position.
    awaited: Option<u64>,
}

/// What was read of a port's recent output.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RecentRead {
    /// How many bytes were gone before they were read.
    pub missed: u64,
    /// Where to read on.
    pub next: u64,
}

impl Recent {
    /// Takes the next byte. Returns whether somebody waited for it.
    pub(super) fn push(&mut self, byte: u8) -> bool {
        if self.bytes.len() == MOST_RECENT {
            self.bytes.pop_front();
        }
        self.bytes.push_back(byte);
        self.end = self.end.saturating_add(1);
        self.awaited.take_if(|position| *position < self.end).is_some()
    }

    /// Appends at most `most` bytes from `position` on to `into`.
    pub(super) fn read(&self, position: u64, most: usize, into: &mut Vec<u8>) -> RecentRead {
        let begin = self.end.saturating_sub(self.bytes.len() as u64);
        let first = position.clamp(begin, self.end);
        let skip = usize::try_from(first - begin).unwrap_or(usize::MAX);
        let before = into.len();
        into.extend(self.bytes.iter().skip(skip).take(most));
        let read = (into.len() - before) as u64;
        RecentRead { missed: first.saturating_sub(position), next: first + read }
    }

    /// Has [`push`](Self::push) say when there is a byte at `position`. Returns whether there is one already.
    pub(super) fn wait(&mut self, position: u64) -> bool {
        if position < self.end {
            return true;
        }
        self.awaited = Some(self.awaited.map_or(position, |awaited| awaited.min(position)));
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn who_comes_late_reads_the_last_of_it() {
        let mut recent = Recent::default();
        let count = MOST_RECENT as u64 + 10;
        (0..count).for_each(|position| _ = recent.push(position as u8));
        let mut bytes = Vec::new();
        let read = recent.read(0, usize::MAX, &mut bytes);
        assert_eq!(read, RecentRead { missed: 10, next: count });
        assert_eq!(bytes.len(), MOST_RECENT);
        assert_eq!(bytes.first(), Some(&10));
        assert_eq!(recent.read(u64::MAX, 1, &mut bytes), RecentRead { missed: 0, next: count });
    }

    proptest! {
        #[test]
        fn nothing_is_missed_or_read_twice_by_who_keeps_up(
            steps in prop::collection::vec((prop::collection::vec(any::<u8>(), 0..600), 1..700_usize), 1..200),
        ) {
            let (mut recent, mut said, mut heard, mut next) = (Recent::default(), Vec::new(), Vec::new(), 0);
            for (bytes, most) in steps {
                let waits = !recent.wait(next);
                prop_assert_eq!(waits, heard.len() == said.len());
                let told = bytes.iter().filter(|byte| recent.push(**byte)).count();
                prop_assert_eq!(told, usize::from(waits && !bytes.is_empty()));
                said.extend(bytes);
                let read = recent.read(next, most, &mut heard);
                let behind = said.len() as u64 - next;
                prop_assert_eq!(read.missed, behind.saturating_sub(MOST_RECENT as u64));
                if read.missed > 0 {
                    return Ok(());
                }
                next = read.next;
                prop_assert_eq!(next, heard.len() as u64);
                prop_assert_eq!(&heard[..], &said[..heard.len()]);
            }
        }
    }
}
