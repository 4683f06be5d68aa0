//! A peer at the other end of a stream socket that sends and takes Ethernet frames, each behind its length in
//! four bytes, the highest first: the way of QEMU's `-netdev stream`, which passt and others speak.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use vm_memory::GuestMemoryMmap;

use super::{HEADER, MOST_FRAME};
use crate::virtio::queue::{Chain, IoVectors};

/// Bytes before each frame.
const LENGTH: usize = 4;

/// Room for what has come and is not in the guest yet: at least a frame of any length.
const ROOM: usize = 128 << 10;

/// The socket, and what is on its way through it.
pub struct Stream {
    socket: OwnedFd,
    /// Bytes that have come; those from `start` to `end` are still of use.
    came: Box<[u8]>,
    start: usize,
    end: usize,
    /// The rest of a frame of which the socket took a part; the bytes before `gone` went since.
    rest: Vec<u8>,
    gone: usize,
}

/// The peer sends what is no frame, or has gone.
#[derive(Debug, thiserror::Error)]
pub enum Lost {
    /// A length that no frame has. Where the next one begins is not known.
    #[error("it sent a frame of {0} bytes")]
    Length(u32),
    /// It closed the socket.
    #[error("it closed the connection")]
    Closed,
    /// The socket.
    #[error(transparent)]
    Socket(#[from] io::Error),
}

impl Stream {
    /// Frames go through `socket`, which is connected.
    ///
    /// # Errors
    /// It can't be made not to wait.
    pub fn new(socket: OwnedFd) -> io::Result<Self> {
        // SAFETY: sets flags of an open file.
        let set = unsafe {
            let flags = libc::fcntl(socket.as_raw_fd(), libc::F_GETFL);
            libc::fcntl(socket.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK)
        };
        if set < 0 {
            return Err(io::Error::last_os_error());
        }
        let came = vec![0; ROOM].into_boxed_slice();
        Ok(Self { socket, came, start: 0, end: 0, rest: Vec::new(), gone: 0 })
    }

    /// Takes in what has come, as far as there is room. Returns whether there was anything.
    ///
    /// # Errors
    /// [`Lost::Closed`] and [`Lost::Socket`].
    pub fn fill(&mut self) -> Result<bool, Lost> {
        self.came.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end.saturating_sub(self.start));
        let room = self.came.get_mut(self.end..).unwrap_or_default();
        if room.is_empty() {
            return Ok(false);
        }
        // SAFETY: the kernel writes into a slice of ours.
        let read = unsafe { libc::read(self.socket.as_raw_fd(), room.as_mut_ptr().cast(), room.len()) };
        match usize::try_from(read) {
            Ok(0) => Err(Lost::Closed),
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(_) => match io::Error::last_os_error() {
                error if waits(&error) => Ok(false),
                error => Err(error.into()),
            },
        }
    }

    /// The next frame, if the whole of it has come.
    ///
    /// # Errors
    /// [`Lost::Length`].
    pub fn frame(&self) -> Result<Option<&[u8]>, Lost> {
        let came = self.came.get(self.start..self.end).unwrap_or_default();
        let Some((length, rest)) = came.split_first_chunk::<LENGTH>() else { return Ok(None) };
        let length = u32::from_be_bytes(*length);
        match usize::try_from(length) {
            Ok(len @ 1..=MOST_FRAME) => Ok(rest.get(..len)),
            _ => Err(Lost::Length(length)),
        }
    }

    /// Goes past the frame of `len` bytes that [`frame`](Self::frame) gave.
    pub fn taken(&mut self, len: usize) {
        self.start = self.end.min(self.start + LENGTH + len);
    }

    /// Sends the frame of `len` bytes that lies behind the header in `chain`, and so in `vectors`. What the socket
    /// does not take of it at once is copied, to be sent by [`flush`](Self::flush).
    ///
    /// # Errors
    /// [`io::ErrorKind::WouldBlock`] where nothing of it went, or something of an earlier one still has to.
    /// Another where nothing of it went.
    pub fn send(
        &mut self,
        memory: &GuestMemoryMmap,
        chain: &Chain,
        vectors: &mut IoVectors,
        len: usize,
    ) -> io::Result<()> {
        if self.is_behind() {
            return Err(io::ErrorKind::WouldBlock.into());
        }
        let prefix = u32::try_from(len).unwrap_or(u32::MAX).to_be_bytes();
        let went = vectors.write_message(self.socket.as_fd(), &prefix)?;
        if went < LENGTH + len {
            self.rest.extend_from_slice(prefix.get(went..).unwrap_or_default());
            let (from, start) = (went.saturating_sub(LENGTH), self.rest.len());
            // The other end counts on so many bytes, whatever becomes of guest memory.
            self.rest.resize(start + len.saturating_sub(from), 0);
            let mut reader = chain.reader(memory);
            reader.skip(HEADER + from);
            reader.read(self.rest.get_mut(start..).unwrap_or_default());
        }
        Ok(())
    }

    /// Sends the rest of a frame. Returns whether all of it has gone.
    ///
    /// # Errors
    /// The connection is lost.
    pub fn flush(&mut self) -> io::Result<bool> {
        while let Some(rest) = self.rest.get(self.gone..).filter(|rest| !rest.is_empty()) {
            // SAFETY: the kernel reads a slice of ours.
            let wrote = unsafe { libc::write(self.socket.as_raw_fd(), rest.as_ptr().cast(), rest.len()) };
            match usize::try_from(wrote) {
                Ok(count) => self.gone += count,
                Err(_) => match io::Error::last_os_error() {
                    error if error.kind() == io::ErrorKind::Interrupted => {}
                    error if waits(&error) => return Ok(false),
                    error => return Err(error),
                },
            }
        }
        self.rest.clear();
        self.gone = 0;
        Ok(true)
    }

    /// Whether a part of a frame still has to go.
    pub fn is_behind(&self) -> bool {
        !self.rest.is_empty()
    }
}

impl AsFd for Stream {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Whether it is only not possible now.
fn waits(error: &io::Error) -> bool {
    matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted)
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use proptest::prelude::*;

    use super::*;

    fn pair() -> (Stream, UnixStream) {
        let (ours, peer) = UnixStream::pair().unwrap();
        (Stream::new(ours.into()).unwrap(), peer)
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]

        #[test]
        fn frames_come_whole_however_the_stream_is_cut(
            frames in prop::collection::vec(prop::collection::vec(any::<u8>(), 1..3000), 1..40),
            cuts in prop::collection::vec(1usize..5000, 1..20),
        ) {
            let (mut stream, mut peer) = pair();
            let bytes: Vec<u8> = frames.iter().flat_map(|frame| {
                [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
            }).collect();
            let (mut came, mut rest) = (Vec::new(), &bytes[..]);
            for cut in cuts.iter().cycle() {
                let (piece, more) = rest.split_at((*cut).min(rest.len()));
                peer.write_all(piece).unwrap();
                rest = more;
                prop_assert!(stream.fill().unwrap());
                while let Some(frame) = stream.frame().unwrap().map(<[u8]>::to_vec) {
                    stream.taken(frame.len());
                    came.push(frame);
                }
                if rest.is_empty() {
                    break;
                }
            }
            prop_assert_eq!(came, frames);
            drop(peer);
            prop_assert!(matches!(stream.fill(), Err(Lost::Closed)));
        }
    }

    #[test]
    fn a_length_that_no_frame_has_is_the_end() {
        for length in [0, MOST_FRAME as u32 + 1, u32::MAX] {
            let (mut stream, mut peer) = pair();
            peer.write_all(&length.to_be_bytes()).unwrap();
            assert!(stream.fill().unwrap());
            assert!(matches!(stream.frame(), Err(Lost::Length(found)) if found == length));
        }
        let (mut stream, mut peer) = pair();
        let frame = vec![7; MOST_FRAME];
        let sent = frame.clone();
        std::thread::spawn(move || {
            peer.write_all(&(MOST_FRAME as u32).to_be_bytes()).unwrap();
            peer.write_all(&sent).unwrap();
            let _ = peer.read(&mut [0]);
        });
        while stream.frame().unwrap().is_none() {
            stream.fill().unwrap();
        }
        assert_eq!(stream.frame().unwrap(), Some(&frame[..]));
    }
}
