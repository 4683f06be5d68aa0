//! A Unix socket at which programs of the host ask for a port of the guest, in the words of Firecracker
//! (docs/vsock.md there) and Cloud Hypervisor: `CONNECT PORT`, and the answer `OK PORT`, each in a line. What comes
//! after is the guest's program's.
//!
//! Who connects is of this user. It may still be slow or silent: those who have not asked are few, and have a time.

use std::io;
use std::mem;
use std::os::fd::{AsRawFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::events::Subscriber;
use devices::virtio::vsock::{Answers, Incoming};
use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use rustix::net::RecvFlags;
use vmm_sys_util::timerfd::TimerFd;

use crate::api_server::{BindError, CLIENT_COMES, LOOK_EVERY, Listening};

/// Those who have connected and not asked yet, at most. Who comes then takes the place of who waits longest.
const MOST_ASKING: usize = 16;

/// How long they may take.
const PATIENCE: Duration = Duration::from_secs(10);

/// How often to look whether somebody's time is over.
const LOOK_FOR_LATE_EVERY: Duration = Duration::from_secs(1);

/// Bytes of the longest line: the word, the longest port, and some room for spaces.
const MOST_LINE: usize = 32;

/// Clients that are accepted in one event.
const AT_ONCE: usize = 16;

/// The tokens of events; those of clients don't matter.
const LISTENER: u32 = 0;
const TIMER: u32 = 1;
const CLIENT: u32 = 2;

/// Why there is no such socket.
#[derive(Debug, thiserror::Error)]
pub enum VsockSocketError {
    /// It is somebody else's.
    #[error(
        "the socket for connections to the guest: {0} is taken by a living process: choose another --vsock-socket"
    )]
    InUse(PathBuf),
    /// It can't be made.
    #[error("the socket for connections to the guest: {0}")]
    Bind(BindError),
    /// The process has no descriptors left.
    #[error("the socket for connections to the guest: {0}")]
    Host(#[from] io::Error),
}

impl From<BindError> for VsockSocketError {
    fn from(error: BindError) -> Self {
        match error {
            BindError::InUse(path) => Self::InUse(path),
            error => Self::Bind(error),
        }
    }
}

/// The socket, and who is about to ask.
pub struct VsockSocket {
    listening: Listening,
    incoming: Arc<Incoming>,
    timer: TimerFd,
    rings_every: Duration,
    asking: Vec<Asking>,
}

/// Somebody who has connected.
struct Asking {
    stream: UnixStream,
    since: Instant,
}

/// What a line of theirs says.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Line {
    /// This port, in so many bytes with the end of the line.
    Port(u32, usize),
    /// Nothing yet.
    Unfinished,
    /// Nothing that is understood.
    Nonsense,
}

impl Line {
    fn parse(text: &[u8]) -> Self {
        let Some(end) = text.iter().position(|byte| *byte == b'\n') else {
            return if text.len() < MOST_LINE { Self::Unfinished } else { Self::Nonsense };
        };
        let line = str::from_utf8(text.get(..end).unwrap_or_default()).unwrap_or_default();
        let mut words = line.split_ascii_whitespace();
        let is_known = words.next().is_some_and(|word| word.eq_ignore_ascii_case("connect"));
        match (is_known, words.next().map(str::parse), words.next()) {
            (true, Some(Ok(port)), None) => Self::Port(port, end + 1),
            _ => Self::Nonsense,
        }
    }
}

impl VsockSocket {
    /// One at `path`, for this user alone. Who asks goes to `incoming`.
    ///
    /// # Errors
    /// [`VsockSocketError`].
    pub fn at(path: &Path, incoming: Arc<Incoming>) -> Result<Self, VsockSocketError> {
        let timer = TimerFd::new().map_err(io::Error::from)?;
        let listening = Listening::at(path)?;
        let mut socket = Self { listening, incoming, timer, rings_every: Duration::ZERO, asking: Vec::new() };
        socket.set_timer();
        Ok(socket)
    }

    fn accept(&mut self, ops: &mut EventOps) -> EventResult<()> {
        for _ in 0..AT_ONCE {
            let stream = match self.listening.next_client() {
                Ok(Some(stream)) => stream,
                Ok(None) => break,
                // Until the next look.
                Err(error) => {
                    tracing::warn!("a program can't be heard that wants a port of the guest: {error}");
                    break;
                }
            };
            if stream.set_nonblocking(true).is_err() {
                continue;
            }
            if self.asking.len() >= MOST_ASKING {
                let longest = self.asking.remove(0);
                ops.remove(Events::empty(&longest.stream))?;
            }
            // Once for all that has come: what is no whole line stays where it is.
            let set = EventSet::IN | EventSet::READ_HANG_UP | EventSet::EDGE_TRIGGERED;
            ops.add(Events::with_data(&stream, CLIENT, set))?;
            self.asking.push(Asking { stream, since: Instant::now() });
        }
        self.set_timer();
        Ok(())
    }

    /// Looks at what somebody has said.
    fn hear(&mut self, descriptor: RawFd, has_hung_up: bool, ops: &mut EventOps) -> EventResult<()> {
        let Some(place) = self.asking.iter().position(|asking| asking.stream.as_raw_fd() == descriptor)
        else {
            return Ok(());
        };
        let mut text = [0; MOST_LINE];
        let line = match self.asking.get(place).map(|asking| peek(&asking.stream, &mut text)) {
            Some(Ok(count)) if count > 0 => Line::parse(text.get(..count).unwrap_or_default()),
            Some(Err(error)) if error.kind() == io::ErrorKind::WouldBlock => Line::Unfinished,
            _ => Line::Nonsense,
        };
        if line == Line::Unfinished && !has_hung_up {
            return Ok(());
        }
        let Asking { stream, .. } = self.asking.remove(place);
        ops.remove(Events::empty(&stream))?;
        self.set_timer();
        if let Line::Port(port, length) = line {
            // What follows the line is for the guest.
            let taken = rustix::io::read(&stream, text.get_mut(..length).unwrap_or_default());
            let answers = Answers { accepted: b"OK ".to_vec(), names_port: true, refused: Vec::new() };
            if taken == Ok(length)
                && let Err(crowded) = self.incoming.connect(port, stream, answers)
            {
                tracing::warn!("{crowded}");
            }
        }
        Ok(())
    }

    /// Lets those go who have taken too long, and hears those who could not be heard before.
    fn look(&mut self, ops: &mut EventOps) -> EventResult<()> {
        // The timer has rung, so this does not wait.
        let _ = self.timer.wait();
        let now = Instant::now();
        let is_late = |asking: &Asking| now.saturating_duration_since(asking.since) >= PATIENCE;
        let (late, rest) = mem::take(&mut self.asking).into_iter().partition(is_late);
        self.asking = rest;
        for Asking { stream, .. } in late {
            ops.remove(Events::empty(&stream))?;
        }
        if let Some(before) = self.listening.look() {
            ops.remove(Events::empty(&before))?;
            ops.add(Events::with_data(self.listening.listener(), LISTENER, CLIENT_COMES))?;
        }
        self.accept(ops)
    }

    /// It rings more often while somebody is about to ask.
    fn set_timer(&mut self) {
        let every = if self.asking.is_empty() { LOOK_EVERY } else { LOOK_FOR_LATE_EVERY };
        if every == self.rings_every {
            return;
        }
        self.rings_every = every;
        if let Err(error) = self.timer.reset(every, Some(every)) {
            tracing::debug!("nobody looks whether programs take too long to ask for a port: {error}");
        }
    }
}

/// What has come, of which nothing is taken.
fn peek(stream: &UnixStream, text: &mut [u8]) -> io::Result<usize> {
    let (count, _) = rustix::net::recv(stream, text, RecvFlags::PEEK)?;
    Ok(count)
}

impl Subscriber for VsockSocket {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::with_data(self.listening.listener(), LISTENER, CLIENT_COMES))?;
        ops.add(Events::with_data(&self.timer, TIMER, EventSet::IN))
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) -> EventResult<()> {
        match events.data() {
            LISTENER => self.accept(ops),
            TIMER => self.look(ops),
            _ => {
                let ended = EventSet::READ_HANG_UP | EventSet::HANG_UP | EventSet::ERROR;
                self.hear(events.fd(), events.event_set().intersects(ended), ops)
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::sync::Mutex;

    use devices::events::EventLoop;
    use devices::virtio::vsock::Vsock;
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

    use super::*;

    /// A socket on an event loop, whose device has no driver.
    struct Served {
        events: EventLoop,
        path: PathBuf,
        socket: Arc<Mutex<VsockSocket>>,
        // What it asks for goes to it.
        _vsock: Vsock,
        _directory: tempfile::TempDir,
    }

    fn served() -> Served {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("vm.vsock");
        let vsock = Vsock::new(Box::new(|_| Err(io::ErrorKind::ConnectionRefused.into()))).unwrap();
        let socket = Arc::new(Mutex::new(VsockSocket::at(&path, vsock.incoming()).unwrap()));
        let mut events = EventLoop::new(64).unwrap();
        events.add(socket.clone()).unwrap();
        Served { events, path, socket, _vsock: vsock, _directory: directory }
    }

    impl Served {
        fn client(&self) -> UnixStream {
            let client = UnixStream::connect(&self.path).unwrap();
            client.set_nonblocking(true).unwrap();
            client
        }

        fn run(&mut self) {
            let mut events = 0;
            while self.events.run(0).unwrap() > 0 {
                events += 1;
                assert!(events < 1000, "it does not come to rest");
            }
        }

        fn asking(&self) -> usize {
            self.socket.lock().unwrap().asking.len()
        }
    }

    /// Also with words of it that nobody has read.
    fn has_been_let_go(mut client: &UnixStream) -> bool {
        match client.read(&mut [0]) {
            Ok(count) => count == 0,
            Err(error) => error.kind() == io::ErrorKind::ConnectionReset,
        }
    }

    #[test]
    fn lines_are_read_as_others_do() {
        assert_eq!(Line::parse(b"CONNECT 5000\nhello"), Line::Port(5000, 13));
        assert_eq!(Line::parse(b"connect  4294967295 \r\n"), Line::Port(u32::MAX, 22));
        for unfinished in [&b""[..], b"CONN", b"CONNECT 5000"] {
            assert_eq!(Line::parse(unfinished), Line::Unfinished);
        }
        for nonsense in [
            &b"\n"[..],
            b"CONNECT\n",
            b"CONNECT x\n",
            b"CONNECT -1\n",
            b"CONNECT 4294967296\n",
            b"CONNECT 1 2\n",
            b"GET / HTTP/1.1\n",
            b"CONNECT \xff\n",
            &[b' '; MOST_LINE],
        ] {
            assert_eq!(Line::parse(nonsense), Line::Nonsense, "{nonsense:?}");
        }
    }

    #[test]
    fn a_line_may_come_in_pieces_and_what_follows_it_stays() {
        let mut served = served();
        let client = served.client();
        for byte in b"CONNECT 22\n" {
            assert!(served.asking() <= 1);
            (&client).write_all(&[*byte]).unwrap();
            served.run();
        }
        assert_eq!(served.asking(), 0, "it has asked");
        let client = served.client();
        (&client).write_all(b"CONNECT 22\nSSH-2.0").unwrap();
        served.run();
        assert_eq!(served.asking(), 0);
    }

    #[test]
    fn who_asks_for_nothing_is_let_go() {
        let mut served = served();
        let wrong = served.client();
        (&wrong).write_all(b"HELLO\n").unwrap();
        let long = served.client();
        (&long).write_all(&[b'x'; 100]).unwrap();
        let half = served.client();
        (&half).write_all(b"CONNECT 2").unwrap();
        half.shutdown(std::net::Shutdown::Write).unwrap();
        served.run();
        assert_eq!(served.asking(), 0);
        for client in [wrong, half] {
            assert!(has_been_let_go(&client));
        }
    }

    #[test]
    fn those_who_only_wait_are_few_and_not_for_long() {
        let mut served = served();
        let first = served.client();
        served.run();
        let clients: Vec<_> = (0..3 * MOST_ASKING)
            .map(|_| {
                let client = served.client();
                served.run();
                client
            })
            .collect();
        assert_eq!(served.asking(), MOST_ASKING);
        assert!(has_been_let_go(&first));
        assert!(clients.last().is_some_and(|last| !has_been_let_go(last)));
        for asking in &mut served.socket.lock().unwrap().asking {
            asking.since = asking.since.checked_sub(PATIENCE).unwrap();
        }
        let begun = Instant::now();
        while served.asking() > 0 {
            served.events.run(100).unwrap();
            assert!(begun.elapsed() < PATIENCE);
        }
        assert!(clients.iter().all(has_been_let_go));
        assert_eq!(served.socket.lock().unwrap().rings_every, LOOK_EVERY, "seldom, with nobody to look at");
    }

    /// Names the process whose descriptors are few.
    const FEW_DESCRIPTORS: &str = "BALLAST_TEST_FEW_DESCRIPTORS";

    #[test]
    fn who_can_not_be_taken_on_yet_is_heard_later() {
        // A process of its own, as its limit is all its threads'.
        if std::env::var_os(FEW_DESCRIPTORS).is_none() {
            let name = "vsock_socket::tests::who_can_not_be_taken_on_yet_is_heard_later";
            let mut child = std::process::Command::new(std::env::current_exe().unwrap());
            let child = child.args(["--exact", name, "--nocapture"]).env(FEW_DESCRIPTORS, "1");
            return assert!(child.status().unwrap().success());
        }
        let mut served = served();
        let _client = served.client();
        let limits = getrlimit(Resource::Nofile);
        setrlimit(Resource::Nofile, Rlimit { current: Some(0), ..limits }).unwrap();
        served.run();
        assert_eq!(served.asking(), 0);
        setrlimit(Resource::Nofile, limits).unwrap();
        let second = Duration::from_secs(1);
        served.socket.lock().unwrap().timer.reset(second, None).unwrap();
        assert!(served.events.run(30_000).unwrap() > 0);
        assert_eq!(served.asking(), 1);
    }

    #[test]
    fn a_socket_that_somebody_removes_is_made_again() {
        let mut served = served();
        std::fs::remove_file(&served.path).unwrap();
        served.socket.lock().unwrap().timer.reset(Duration::from_millis(1), None).unwrap();
        assert!(served.events.run(30_000).unwrap() > 0);
        let _client = served.client();
        served.run();
        assert_eq!(served.asking(), 1);
    }

    #[test]
    fn a_living_socket_is_left_alone_and_a_dead_one_is_not() {
        let served = served();
        let again = VsockSocket::at(&served.path, served.socket.lock().unwrap().incoming.clone());
        let error = again.err().unwrap().to_string();
        assert!(error.contains("--vsock-socket"), "{error}");
    }
}
