//! Which process is at the other end of a Unix socket, by the kernel's word.
//!
//! Who made a socket listen (unix(7), `SO_PEERCRED`) need not be who answers on it: a service manager makes
//! sockets for its services, and others hand one to a VMM that they start. So what is asked is who wrote what
//! is read (`SO_PASSCRED`). Only before anything was read, the one that made the socket listen is all there is
//! to know.

use std::io;
use std::mem::{self, MaybeUninit};
use std::os::fd::AsRawFd;
use std::path::Path;
use std::pin::Pin;
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use rustix::net::sockopt::set_socket_passcred;
use tokio::io::{AsyncRead, AsyncWrite, Interest, ReadBuf};
use tokio::net::{UnixSocket, UnixStream};

/// Which process is at the other end of a socket.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum PeerProcess {
    /// Nobody was connected yet.
    #[default]
    NotMet,
    /// The one that made the socket listen. Nothing was heard yet that would tell who answers.
    Listener(u32),
    /// The one that answers.
    Writer(u32),
    /// One outside this one's PID namespace: its number is not known.
    Outside,
}

impl PeerProcess {
    /// Its number, if that is known.
    pub const fn pid(self) -> Option<u32> {
        match self {
            Self::Listener(pid) | Self::Writer(pid) => Some(pid),
            Self::NotMet | Self::Outside => None,
        }
    }

    fn numbered(pid: Option<u32>, known: fn(u32) -> Self) -> Self {
        match pid {
            Some(pid) => known(pid),
            None => Self::Outside,
        }
    }
}

/// What is known of the process at the other end of one connection; it may become more.
#[derive(Clone, Debug)]
pub struct Acquaintance {
    /// As of when it was made to listen.
    listener: PeerProcess,
    /// Who answered on the connection before, if the same process had made that socket listen.
    earlier: Option<PeerProcess>,
    writer: Arc<OnceLock<PeerProcess>>,
}

impl Acquaintance {
    /// Who it is, as far as is known by now.
    pub fn process(&self) -> PeerProcess {
        self.writer.get().copied().or(self.earlier).unwrap_or(self.listener)
    }

    /// Goes on from what the last connection told: one that says nothing on this one is still the same.
    #[must_use]
    pub fn after(mut self, last: Option<&Self>) -> Self {
        let same = last.filter(|last| last.listener == self.listener);
        self.earlier = same.and_then(|last| last.writer.get().copied().or(last.earlier));
        self
    }
}

/// A connection that notes who writes to it.
#[derive(Debug)]
pub struct PeerStream {
    stream: UnixStream,
    acquaintance: Acquaintance,
}

impl PeerStream {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// As connect(2).
    pub async fn connect(path: &Path) -> io::Result<Self> {
        let socket = UnixSocket::new_stream()?;
        // First: of what is sent before, the kernel notes no sender.
        set_socket_passcred(&socket, true)?;
        let stream = socket.connect(path).await?;
        let pid = stream.peer_cred()?.pid().and_then(positive);
        let listener = PeerProcess::numbered(pid, PeerProcess::Listener);
        let acquaintance = Acquaintance { listener, earlier: None, writer: Arc::default() };
        Ok(Self { stream, acquaintance })
    }

    /// The connection without the notes, whose reads and writes wait.
    ///
    /// # Errors
    /// As fcntl(2).
    pub fn into_std(self) -> io::Result<std::os::unix::net::UnixStream> {
        let stream = self.stream.into_std()?;
        stream.set_nonblocking(false)?;
        Ok(stream)
    }

    /// What is known of the other end, now and later.
    pub fn acquaintance(&self) -> &Acquaintance {
        &self.acquaintance
    }
}

impl AsyncRead for PeerStream {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let Self { stream, acquaintance } = self.get_mut();
        while acquaintance.writer.get().is_none() {
            ready!(stream.poll_read_ready(cx))?;
            match stream.try_io(Interest::READABLE, || peek_writer(stream)) {
                Ok(Some(writer)) => drop(acquaintance.writer.set(writer)),
                // It hung up.
                Ok(None) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
        Pin::new(stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for PeerStream {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(cx, bytes)
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        pieces: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(cx, pieces)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(cx)
    }
}

/// The kernel writes 0 for a process that has no number here.
fn positive(pid: libc::pid_t) -> Option<u32> {
    u32::try_from(pid).ok().filter(|pid| *pid != 0)
}

/// Space for one `SCM_CREDENTIALS`, and for nothing else: descriptors that a peer sends along find no place,
/// so that the kernel drops them.
const CREDENTIALS: usize = {
    // SAFETY: arithmetic alone.
    unsafe { libc::CMSG_SPACE(size_of::<libc::ucred>() as u32) as usize }
};

/// Control messages begin at the boundary of a word.
#[repr(C, align(8))]
struct Control([u8; CREDENTIALS]);

/// Who wrote what is to be read next, which stays to be read; `None` at the end of the stream.
///
/// Not by rustix, whose `UCred` has no place for the number 0.
fn peek_writer(stream: &UnixStream) -> io::Result<Option<PeerProcess>> {
    let mut byte = 0_u8;
    let mut piece = libc::iovec { iov_base: (&raw mut byte).cast(), iov_len: 1 };
    let mut control = Control([0; CREDENTIALS]);
    // SAFETY: all zeros is a valid msghdr, without buffers.
    let mut message: libc::msghdr = unsafe { MaybeUninit::zeroed().assume_init() };
    message.msg_iov = &raw mut piece;
    message.msg_iovlen = 1;
    message.msg_control = (&raw mut control).cast();
    message.msg_controllen = CREDENTIALS;
    // SAFETY: the message points to buffers of the lengths that it gives, which live as long as this function.
    let count = unsafe { libc::recvmsg(stream.as_raw_fd(), &raw mut message, libc::MSG_PEEK) };
    if count < 0 {
        return Err(io::Error::last_os_error());
    }
    if count == 0 {
        return Ok(None);
    }
    // SAFETY: the kernel has filled the message in.
    let header = unsafe { libc::CMSG_FIRSTHDR(&raw const message).as_ref() };
    let found = header.filter(|header| {
        (header.cmsg_level, header.cmsg_type) == (libc::SOL_SOCKET, libc::SCM_CREDENTIALS)
            && header.cmsg_len >= mem::size_of::<libc::cmsghdr>() + mem::size_of::<libc::ucred>()
    });
    let Some(header) = found else { return Ok(Some(PeerProcess::Outside)) };
    // SAFETY: its data has the length of a `ucred`, which may lie anywhere.
    let sender = unsafe { libc::CMSG_DATA(header).cast::<libc::ucred>().read_unaligned() };
    Ok(Some(PeerProcess::numbered(positive(sender.pid), PeerProcess::Writer)))
}

#[cfg(test)]
mod tests {
    use std::os::fd::OwnedFd;
    use std::process::{Child, Command, Stdio};

    use tokio::io::AsyncReadExt;
    use tokio::net::UnixListener;

    use super::*;

    /// Another process that answers on a socket that this one made.
    struct Activated(Child);

    impl Activated {
        fn answer(stream: UnixStream) -> Self {
            let stream = stream.into_std().unwrap();
            stream.set_nonblocking(false).unwrap();
            let mut command = Command::new("sh");
            command.args(["-c", "printf hello; sleep 600"]).stdin(Stdio::null());
            Self(command.stdout(OwnedFd::from(stream)).spawn().unwrap())
        }
    }

    impl Drop for Activated {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    #[tokio::test]
    async fn who_answers_counts_and_not_who_made_the_socket() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let own = PeerProcess::Listener(std::process::id());

        let mut stream = PeerStream::connect(&path).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let first = stream.acquaintance().clone();
        assert_eq!(first.process(), own);
        let activated = Activated::answer(accepted);
        let mut text = [0; 5];
        stream.read_exact(&mut text).await.unwrap();
        assert_eq!(&text, b"hello");
        let writer = PeerProcess::Writer(activated.0.id());
        assert_eq!(first.process(), writer);

        // It says nothing on the next connection: nobody else has come.
        let stream = PeerStream::connect(&path).await.unwrap();
        assert_eq!(stream.acquaintance().process(), own);
        let second = stream.acquaintance().clone().after(Some(&first));
        assert_eq!(second.process(), writer);
        assert_eq!(stream.acquaintance().clone().after(Some(&second)).process(), writer);
        let another = Acquaintance { listener: PeerProcess::Listener(1), ..first };
        assert_eq!(stream.acquaintance().clone().after(Some(&another)).process(), own);
    }

    #[tokio::test]
    async fn descriptors_that_a_peer_sends_along_are_dropped() {
        use std::io::IoSlice;

        use rustix::net::{SendAncillaryBuffer, SendAncillaryMessage, SendFlags, sendmsg};

        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        let mut stream = PeerStream::connect(&path).await.unwrap();
        let (accepted, _) = listener.accept().await.unwrap();
        let (read, write) = rustix::pipe::pipe().unwrap();
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        let sent = [std::os::fd::AsFd::as_fd(&write)];
        assert!(control.push(SendAncillaryMessage::ScmRights(&sent)));
        sendmsg(&accepted, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).unwrap();
        drop(write);
        let mut text = [0; 1];
        stream.read_exact(&mut text).await.unwrap();
        // Nobody holds the other end any more.
        let mut rest = [0; 1];
        assert_eq!(rustix::io::read(&read, &mut rest).unwrap(), 0);
        assert_eq!(stream.acquaintance().process(), PeerProcess::Writer(std::process::id()));
    }
}
