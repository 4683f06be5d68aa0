//! The process that looks through a disk: it can read and write one socket, and nothing else (`protocol`).

use std::cell::RefCell;
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::rc::Rc;
use std::time::Duration;

use super::SearchError;
use super::protocol::{LARGEST_PIECE, Message};
use super::search::Search;
use super::source::Source;
use crate::confinement::{self, Limits};

/// How long it may take. A second is usual, and half a minute on an emulated processor.
pub const TIME_LIMIT: Duration = Duration::from_secs(120);

/// What it may have of address space: the program itself, and what a file system's tables take.
const MEMORY: u64 = 256 << 20;

/// Bytes that are read at once where fewer are asked for: tables are read in small pieces that lie together.
const WINDOW: u64 = 64 << 10;

/// What the program does: confines itself, looks through the disk of as many bytes that is served on standard input,
/// sends what it found to standard output, and gives its exit code. It has one thread, and has read nothing before.
pub fn run(size: u64) -> u8 {
    match look(size) {
        Ok(()) => 0,
        Err(error) => {
            // Its exit code tells enough where nobody reads.
            let _ = writeln!(io::stderr(), "{error}");
            1
        }
    }
}

fn look(size: u64) -> Result<(), SearchError> {
    // What it writes goes to a socket and a pipe: no file needs room.
    let limits = Limits { memory: MEMORY, output: 0, seconds: TIME_LIMIT.as_secs() };
    confinement::confine(limits).map_err(|error| SearchError::Unconfined(error.to_string()))?;
    let search = Search::on(Rc::new(Served { size, window: RefCell::default() }))?;
    let plan = serde_json::to_vec(&search.plan).map_err(|error| SearchError::BadEnd(error.to_string()))?;
    say(Message::Plan(plan.len()), &plan)?;
    search.kernel(&mut |piece| send(piece, Message::Kernel))?;
    search.initrd(&mut |piece| send(piece, Message::Initrd))?;
    say(Message::Done, &[])
}

fn send(bytes: &[u8], message: impl Fn(usize) -> Message) -> Result<(), SearchError> {
    bytes.chunks(LARGEST_PIECE).try_for_each(|piece| say(message(piece.len()), piece))
}

fn say(message: Message, bytes: &[u8]) -> Result<(), SearchError> {
    write_all(&message.head()).and_then(|()| write_all(bytes)).map_err(SearchError::Read)
}

fn write_all(mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        match rustix::io::write(io::stdout().as_fd(), bytes)? {
            0 => return Err(io::ErrorKind::WriteZero.into()),
            count => bytes = bytes.get(count..).unwrap_or_default(),
        }
    }
    Ok(())
}

fn read_exact(bytes: &mut [u8]) -> io::Result<()> {
    let mut filled = 0;
    while let Some(room) = bytes.get_mut(filled..).filter(|room| !room.is_empty()) {
        match rustix::io::read(io::stdin().as_fd(), room)? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            count => filled += count,
        }
    }
    Ok(())
}

/// The disk, as the process that opened it serves it.
struct Served {
    size: u64,
    window: RefCell<Window>,
}

/// What was read last.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    fn get(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let from = usize::try_from(offset.checked_sub(self.start)?).ok()?;
        self.bytes.get(from..)?.get(..len)
    }
}

impl Source for Served {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, offset: u64, bytes: &mut [u8]) -> io::Result<()> {
        let mut window = self.window.borrow_mut();
        let mut offset = offset;
        for piece in bytes.chunks_mut(LARGEST_PIECE) {
            if window.get(offset, piece.len()).is_none() {
                let end = offset.checked_add(piece.len() as u64).filter(|end| *end <= self.size);
                let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
                let start = offset - offset % WINDOW;
                let end = end.max(start.saturating_add(WINDOW)).min(self.size);
                // A piece and what is before it in its window.
                for start in [start, offset] {
                    let len = usize::try_from(end.saturating_sub(start)).unwrap_or(usize::MAX);
                    if len <= LARGEST_PIECE {
                        *window = Window { start, bytes: vec![0; len] };
                        write_all(&Message::Read { offset: start, len }.head())?;
                        read_exact(&mut window.bytes)?;
                        break;
                    }
                }
            }
            let there = window.get(offset, piece.len()).ok_or(io::ErrorKind::UnexpectedEof)?;
            piece.copy_from_slice(there);
            offset = offset.saturating_add(piece.len() as u64);
        }
        Ok(())
    }
}
