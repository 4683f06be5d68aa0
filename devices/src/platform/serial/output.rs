//! Output on its way from the port to whoever reads it.
//!
//! It waits in a bounded buffer, so that no vCPU ever waits for a reader. While there is a reader
//! who is slow, the guest's driver is held back before the buffer is full, and nothing is lost.
//! Where nobody reads, or the reader has taken nothing for [`PATIENCE`], the oldest output makes
//! room for the newest: it is counted, and a mark stands in the stream where it is missing.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use parking_lot::{Condvar, Mutex, MutexGuard};
use serde::{Deserialize, Serialize};

use super::recent::{Recent, RecentRead};

/// The most output that waits for a reader who is slow, in bytes.
pub const MOST_WAITING: usize = 1 << 20;
/// The most that waits while there is no reader, in bytes: enough for what a kernel says as it boots.
pub const MOST_UNREAD: usize = 64 << 10;
/// What of [`MOST_WAITING`] is kept for those who can't be held back: kernels print without interrupts.
const RESERVE: usize = 64 << 10;
/// A full buffer loses this part of itself at a time.
const PART_LOST: usize = 16;
/// How far a loss goes on so that it ends with a line, in bytes.
const LONGEST_LINE: usize = 1024;

/// Bytes handed to the reader at a time. A pipe that is ready takes so many without waiting.
pub const CHUNK: usize = 4096;
/// How long output without the end of a line waits for more.
pub const FLUSH_AFTER: Duration = Duration::from_millis(4);
/// How long a reader may take nothing until the guest is no longer held back for its sake.
pub const PATIENCE: Duration = Duration::from_secs(10);

/// Where output goes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Reader {
    /// Nowhere, as the user wishes.
    Unwanted,
    /// To a reader.
    Present,
    /// To a reader who may come.
    Awaited,
    /// To a file or device that refused it; to be tried again.
    Refuses { until: Instant },
    /// To a reader who has gone for good.
    Gone,
}

/// Whether the guest's driver is held back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Hold {
    No,
    Since(Instant),
    /// The reader has used up the patience with it.
    GivenUp,
}

/// What the thread waits for that brings output to the reader.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Wait {
    /// It does not wait.
    No,
    /// For a whole line, or its time.
    Line,
    /// For anything.
    Byte,
}

/// What has become of a port's output so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct OutputCounts {
    /// Bytes that the reader has taken.
    pub written: u64,
    /// Bytes that wait for it.
    pub waiting: u64,
    /// Bytes that nobody gets.
    pub lost: u64,
}

pub(super) struct Output {
    state: Mutex<State>,
    /// For the thread that brings output to the reader.
    more: Condvar,
    /// For whoever waits until all is gone.
    less: Condvar,
}

pub(super) struct State {
    bytes: VecDeque<u8>,
    recent: Recent,
    /// How much of the front is on its way to the reader.
    in_flight: usize,
    /// Bytes that are missing.
    gap: u64,
    /// How many bytes go before the gap, at least those that are on their way.
    gap_at: usize,
    /// What tells the reader of a gap; it goes before all else.
    mark: Vec<u8>,
    reader: Reader,
    hold: Hold,
    /// There is a whole line or chunk, or somebody waits for all of it.
    ripe: bool,
    /// When the oldest byte came that is not on its way.
    since: Option<Instant>,
    wait: Wait,
    /// Nothing more is to come.
    ended: bool,
    written: u64,
    lost: u64,
}

/// Who reads a port's output from the start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FirstReader {
    /// Nobody ever: output is dropped.
    Nobody,
    /// Somebody who is there.
    Present,
    /// Somebody who may come.
    Awaited,
}

impl Output {
    pub(super) fn new(reader: FirstReader) -> Self {
        let reader = match reader {
            FirstReader::Nobody => Reader::Unwanted,
            FirstReader::Present => Reader::Present,
            FirstReader::Awaited => Reader::Awaited,
        };
        let state = State {
            bytes: VecDeque::new(),
            recent: Recent::default(),
            in_flight: 0,
            gap: 0,
            gap_at: 0,
            mark: Vec::new(),
            reader,
            hold: Hold::No,
            ripe: false,
            since: None,
            wait: Wait::No,
            ended: false,
            written: 0,
            lost: 0,
        };
        Self { state: Mutex::new(state), more: Condvar::new(), less: Condvar::new() }
    }

    /// Takes a byte from the guest. It never waits, and always has room. Returns whether somebody waits for
    /// recent output.
    #[must_use]
    pub(super) fn put(&self, byte: u8, now: Instant) -> bool {
        let mut state = self.lock();
        let awaited = state.recent.push(byte);
        match state.reader {
            Reader::Unwanted => return awaited,
            Reader::Gone => {
                state.lost = state.lost.saturating_add(1);
                return awaited;
            }
            Reader::Present | Reader::Awaited | Reader::Refuses { .. } => {}
        }
        if state.bytes.len() >= state.most() {
            let part = state.most() / PART_LOST;
            state.lose(part);
        }
        state.bytes.push_back(byte);
        state.since.get_or_insert(now);
        let was_ripe = state.ripe;
        state.ripe |= byte == b'\n' || state.bytes.len() - state.in_flight >= CHUNK;
        let wakes = match state.wait {
            Wait::No => false,
            Wait::Line => state.ripe && !was_ripe,
            Wait::Byte => true,
        };
        if wakes {
            state.wait = Wait::No;
            drop(state);
            self.more.notify_one();
        }
        awaited
    }

    /// Appends at most `most` bytes of recent output from `position` on to `into`.
    pub(super) fn read_recent(&self, position: u64, most: usize, into: &mut Vec<u8>) -> RecentRead {
        self.lock().recent.read(position, most, into)
    }

    /// Has [`put`](Self::put) say when there is output at `position`. Returns whether there is some already.
    pub(super) fn await_recent(&self, position: u64) -> bool {
        self.lock().recent.wait(position)
    }

    /// Whether a driver that can be held back may go on at `now`.
    ///
    /// # Errors
    /// It may not; and when it may at the latest.
    pub(super) fn room(&self, now: Instant) -> Result<(), Instant> {
        let mut state = self.lock();
        if state.reader != Reader::Present || state.bytes.len() < MOST_WAITING - RESERVE {
            return Ok(());
        }
        match state.hold {
            Hold::No => {
                state.hold = Hold::Since(now);
                Err(now + PATIENCE)
            }
            Hold::Since(since) if now < since + PATIENCE => Err(since + PATIENCE),
            Hold::Since(_) => {
                state.hold = Hold::GivenUp;
                Ok(())
            }
            Hold::GivenUp => Ok(()),
        }
    }

    /// Fills `chunk` with what the reader is to get next, and waits until there is something. What
    /// becomes of it is told by [`written`](Self::written), [`not_written`](Self::not_written) or
    /// [`refused`](Self::refused). Returns false when nothing more will come.
    pub(super) fn next(&self, chunk: &mut Vec<u8>) -> bool {
        // More is likely to come soon after a write, and the driver need not wake anybody for it then.
        let awake_until = Instant::now() + FLUSH_AFTER;
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let (wait, until) = match state.step(now, awake_until) {
                Step::Give => {
                    state.give(chunk);
                    return true;
                }
                Step::End => return false,
                Step::Wait(wait, until) => (wait, until),
            };
            state.wait = wait;
            match until {
                None => self.more.wait(&mut state),
                Some(until) => {
                    let _ = self.more.wait_until(&mut state, until);
                }
            }
            state.wait = Wait::No;
        }
    }

    /// The reader has taken the first `count` bytes of the chunk. Returns whether a driver that was
    /// held back may go on.
    #[must_use]
    pub(super) fn written(&self, count: usize) -> bool {
        let mut state = self.lock();
        if state.in_flight == 0 {
            let count = count.min(state.mark.len());
            state.mark.drain(..count);
        } else {
            let count = count.min(state.in_flight);
            state.bytes.drain(..count);
            state.gap_at = state.gap_at.saturating_sub(count);
            state.written = state.written.saturating_add(count as u64);
            state.land();
        }
        if state.bytes.is_empty() && state.bytes.capacity() > MOST_UNREAD {
            // A flood is rare, and its memory is the host's.
            state.bytes = VecDeque::new();
        }
        if matches!(state.reader, Reader::Refuses { .. }) {
            state.reader = Reader::Present;
        }
        let resumes = state.let_go();
        drop(state);
        self.less.notify_all();
        resumes
    }

    /// The reader that the chunk was for is no longer there: it is for the next one.
    pub(super) fn not_written(&self) {
        self.lock().land();
    }

    /// A file or device refuses the chunk, and is not tried again before `until`. Returns as
    /// [`written`](Self::written).
    #[must_use]
    pub(super) fn refused(&self, until: Instant) -> bool {
        self.lock().land();
        self.turn_to(Reader::Refuses { until })
    }

    /// A reader is there.
    pub(super) fn reader_came(&self) {
        let _ = self.turn_to(Reader::Present);
    }

    /// The reader has left, and another one may come. Returns as [`written`](Self::written).
    #[must_use]
    pub(super) fn reader_left(&self) -> bool {
        self.turn_to(Reader::Awaited)
    }

    /// The reader has left with the chunk, and none will come. Returns as [`written`](Self::written).
    #[must_use]
    pub(super) fn reader_gone(&self) -> bool {
        self.lock().land();
        self.turn_to(Reader::Gone)
    }

    fn turn_to(&self, reader: Reader) -> bool {
        let mut state = self.lock();
        state.reader = reader;
        let most = if reader == Reader::Gone { 0 } else { state.most() };
        let excess = state.bytes.len().saturating_sub(most);
        if excess > 0 {
            state.lose(excess);
            state.bytes.shrink_to(most);
        }
        let resumes = state.let_go();
        drop(state);
        self.more.notify_all();
        self.less.notify_all();
        resumes
    }

    /// Nothing more is to come. Waits until a reader who is there has taken all, but no longer than
    /// `patience` while it takes nothing, and no longer than three times that.
    pub(super) fn finish(&self, patience: Duration) {
        let mut state = self.lock();
        state.ended = true;
        self.more.notify_all();
        let mut written = state.written;
        let mut deadline = Instant::now() + patience;
        let last = deadline + patience * 2;
        while state.reader == Reader::Present && !state.is_empty() {
            let now = Instant::now();
            if state.written != written {
                (written, deadline) = (state.written, last.min(now + patience));
            }
            if now >= deadline {
                return;
            }
            let _ = self.less.wait_until(&mut state, deadline);
        }
    }

    pub(super) fn counts(&self) -> OutputCounts {
        let state = self.lock();
        OutputCounts { written: state.written, waiting: state.bytes.len() as u64, lost: state.lost }
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock()
    }
}

/// What stands in the stream where `count` bytes are missing.
pub fn missing(count: u64) -> Vec<u8> {
    format!("\r\n[ballast: {count} bytes of console output are missing here]\r\n").into_bytes()
}

/// What the thread does next that brings output to the reader.
enum Step {
    Give,
    Wait(Wait, Option<Instant>),
    End,
}

impl State {
    /// Memory that waiting output has taken, in bytes.
    #[cfg(test)]
    pub(super) fn capacity(&self) -> usize {
        self.bytes.capacity()
    }

    /// The most that may wait.
    const fn most(&self) -> usize {
        match self.reader {
            Reader::Present => MOST_WAITING,
            _ => MOST_UNREAD,
        }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty() && self.gap == 0 && self.mark.is_empty()
    }

    fn step(&self, now: Instant, awake_until: Instant) -> Step {
        match self.reader {
            Reader::Unwanted | Reader::Gone => Step::End,
            Reader::Awaited | Reader::Refuses { .. } if self.ended => Step::End,
            Reader::Awaited => Step::Wait(Wait::No, None),
            Reader::Refuses { until } if now < until => Step::Wait(Wait::No, Some(until)),
            _ if self.ripe || self.gap > 0 || !self.mark.is_empty() => Step::Give,
            Reader::Present | Reader::Refuses { .. } => match self.since {
                Some(since) if !self.ended && now < since + FLUSH_AFTER => {
                    Step::Wait(Wait::Line, Some(since + FLUSH_AFTER))
                }
                Some(_) => Step::Give,
                None if self.ended => Step::End,
                None if now < awake_until => Step::Wait(Wait::Line, Some(awake_until)),
                None => Step::Wait(Wait::Byte, None),
            },
        }
    }

    pub(super) fn give(&mut self, chunk: &mut Vec<u8>) {
        chunk.clear();
        let mut most = CHUNK;
        if self.gap > 0 && self.gap_at > 0 {
            most = most.min(self.gap_at);
        } else if self.gap > 0 && self.mark.is_empty() {
            let gap = std::mem::take(&mut self.gap);
            self.mark = missing(gap);
        }
        if !self.mark.is_empty() {
            chunk.extend_from_slice(&self.mark);
            return;
        }
        chunk.extend(self.bytes.iter().take(most));
        self.in_flight = chunk.len();
        if self.in_flight == self.bytes.len() {
            self.ripe = false;
            self.since = None;
        }
    }

    /// Nothing is on its way any more; what was, and has not been taken, is to be given again.
    fn land(&mut self) {
        self.in_flight = 0;
        self.ripe |= !self.bytes.is_empty() && self.since.is_none();
    }

    /// Loses at least `count` of the oldest bytes, where some are missing already or behind those
    /// that are on their way.
    fn lose(&mut self, count: usize) {
        if self.gap == 0 {
            self.gap_at = self.in_flight;
        }
        let first = self.gap_at;
        let end = first.saturating_add(count).min(self.bytes.len());
        let rest = self.bytes.iter().skip(end).take(LONGEST_LINE);
        let end = end + rest.clone().position(|byte| *byte == b'\n').map_or(0, |position| position + 1);
        self.bytes.drain(first..end);
        let lost = end.saturating_sub(first) as u64;
        self.gap = self.gap.saturating_add(lost);
        self.lost = self.lost.saturating_add(lost);
        if self.bytes.len() == self.in_flight {
            self.ripe = false;
            self.since = None;
        }
    }

    /// Holds the driver back no longer. Returns whether it was.
    fn let_go(&mut self) -> bool {
        matches!(std::mem::replace(&mut self.hold, Hold::No), Hold::Since(_))
    }
}
