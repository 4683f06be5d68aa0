//! Bytes through the console, with nothing in between that changes them.
//!
//! ```text
//! take:COUNT:SEED[:echo]    prints GO, then reads COUNT bytes and looks whether they are those of SEED
//! give:COUNT:SEED           prints GO, then writes COUNT bytes of SEED
//! ```

use std::io::{self, Write};

use rustix::stdio::{stdin, stdout};
use rustix::termios::{LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr};

use crate::random::Random;

/// How long the next byte may take, in tenths of a second.
const PATIENCE: u8 = 200;
/// Bytes read and written at a time.
const CHUNK: usize = 4096;

/// One way through the console.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transfer {
    /// Into the guest.
    Take { count: usize, seed: u64, echo: bool },
    /// Out of the guest.
    Give { count: usize, seed: u64 },
}

impl Transfer {
    /// Reads what a line asks for; `None` where it is no transfer.
    pub fn parse(line: &str) -> Option<Self> {
        let parts: Vec<&str> = line.split(':').collect();
        let (way, count, seed) = (parts.first()?, parts.get(1)?.parse().ok()?, parts.get(2)?.parse().ok()?);
        match (*way, parts.get(3..)?) {
            ("take", []) => Some(Self::Take { count, seed, echo: false }),
            ("take", ["echo"]) => Some(Self::Take { count, seed, echo: true }),
            ("give", []) => Some(Self::Give { count, seed }),
            _ => None,
        }
    }

    /// Does it, on a console that is as it was afterwards.
    pub fn run(self) -> Result<(), String> {
        let before = tcgetattr(stdin()).map_err(|error| error.to_string())?;
        let mut raw = before.clone();
        raw.make_raw();
        raw.special_codes[SpecialCodeIndex::VMIN] = 0;
        raw.special_codes[SpecialCodeIndex::VTIME] = PATIENCE;
        if matches!(self, Self::Take { echo: true, .. }) {
            raw.local_modes.insert(LocalModes::ECHO);
            raw.local_modes.remove(LocalModes::ECHOCTL);
        }
        set(&raw)?;
        let result = self.run_raw();
        set(&before)?;
        result
    }

    fn run_raw(self) -> Result<(), String> {
        print("GO\n".as_bytes())?;
        match self {
            Self::Take { count, seed, .. } => take(count, seed),
            Self::Give { count, seed } => give(count, seed),
        }
    }
}

fn set(settings: &Termios) -> Result<(), String> {
    // What goes out before goes out as it was meant.
    tcsetattr(stdin(), OptionalActions::Drain, settings).map_err(|error| error.to_string())
}

fn print(bytes: &[u8]) -> Result<(), String> {
    let mut out = io::stdout().lock();
    out.write_all(bytes).and_then(|()| out.flush()).map_err(|error| error.to_string())
}

fn take(count: usize, seed: u64) -> Result<(), String> {
    let mut expected = bytes(seed);
    let mut buffer = [0; CHUNK];
    let mut taken = 0;
    while taken < count {
        let read = rustix::io::read(stdin(), &mut buffer).map_err(|error| error.to_string())?;
        if read == 0 {
            return Err(format!("{taken} of {count} bytes came"));
        }
        for (place, byte) in (taken..).zip(&buffer[..read]) {
            let right = expected.next();
            if right != Some(*byte) {
                return Err(format!("byte {place} is {byte} and not {right:?}"));
            }
        }
        taken += read;
    }
    Ok(())
}

fn give(count: usize, seed: u64) -> Result<(), String> {
    let all: Vec<u8> = bytes(seed).take(count).collect();
    let mut rest = all.as_slice();
    while !rest.is_empty() {
        let written = rustix::io::write(stdout(), &rest[..rest.len().min(CHUNK)]);
        rest = &rest[written.map_err(|error| error.to_string())?..];
    }
    Ok(())
}

/// The bytes of a seed.
fn bytes(seed: u64) -> impl Iterator<Item = u8> {
    let mut random = Random::new(seed);
    std::iter::from_fn(move || Some(random.next().to_le_bytes())).flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_are_read() {
        assert_eq!(Transfer::parse("take:5:7"), Some(Transfer::Take { count: 5, seed: 7, echo: false }));
        assert_eq!(Transfer::parse("take:5:7:echo"), Some(Transfer::Take { count: 5, seed: 7, echo: true }));
        assert_eq!(Transfer::parse("give:5:7"), Some(Transfer::Give { count: 5, seed: 7 }));
        for other in ["rest:1s", "take:5", "give:5:7:echo", "take:x:7"] {
            assert_eq!(Transfer::parse(other), None);
        }
    }
}
