//! The guest's first serial port on a terminal, pipes, a file or a socket.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use devices::platform::serial::{Port, Serial};
use devices::sandbox::{Call, SandboxNeeds};
use event_manager::{EventOps, EventSet, Events, MutEventSubscriber};
use rustix::net::SocketAddrUnix;
use vmm_sys_util::eventfd::EventFd;

use crate::api_server::{SocketFile, bind_privately};
use crate::config;
use crate::exit::Exit;
use crate::sandbox::directory_of;
use crate::terminal::RawTerminal;
use crate::vcpu_set::VcpuSet;

/// Bytes of input read at a time.
const CHUNK: usize = 1024;

/// Why there is no console.
#[derive(Debug, thiserror::Error)]
pub enum ConsoleError {
    /// The file can't be made.
    #[error("can't write the console to {}: {source}", path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// The socket can't be made.
    #[error("can't listen for the console at {}: {source} (if it is left from an earlier run, remove it)", path.display())]
    Socket {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Standard input or output can't be used.
    #[error("can't use standard input and output for the console: {0}")]
    Stdio(io::Error),
}

/// The serial port and what its line ends at.
pub struct Console {
    // Goes before the listener, which is with the input.
    _socket: Option<SocketFile>,
    /// The port, for the bus.
    pub port: Arc<Port>,
    /// Whoever brings input, for the event loop.
    pub input: Option<Arc<Mutex<Input>>>,
    /// Given back to the user when this goes.
    _terminal: Option<RawTerminal>,
}

impl Console {
    /// Opens what `config` names. `irq` is the port's interrupt line.
    ///
    /// # Errors
    /// [`ConsoleError`] names the file.
    pub fn open(
        config: &config::Console,
        irq: EventFd,
        vcpu_set: &Arc<VcpuSet>,
    ) -> Result<Self, ConsoleError> {
        let client = Arc::new(Mutex::new(None));
        let mut socket = None;
        let mut terminal = None;
        let (output, source): (Box<dyn Write + Send>, _) = match config {
            config::Console::Stdio => {
                terminal = RawTerminal::enter().map_err(ConsoleError::Stdio)?;
                let output = duplicate(&io::stdout()).map_err(ConsoleError::Stdio)?;
                let input = duplicate(&io::stdin()).map_err(ConsoleError::Stdio)?;
                let typed = terminal.is_some();
                (Box::new(output), Some(Source::Stdin { input, escape: Escape::Plain, typed }))
            }
            config::Console::File(path) => {
                let file =
                    File::create(path).map_err(|source| ConsoleError::File { path: path.clone(), source })?;
                (Box::new(file), None)
            }
            config::Console::Socket(path) => {
                let listener =
                    listen(path).map_err(|source| ConsoleError::Socket { path: path.clone(), source })?;
                let file = SocketFile::of(path);
                socket = Some(file.map_err(|source| ConsoleError::Socket { path: path.clone(), source })?);
                (Box::new(ClientOutput(Arc::clone(&client))), Some(Source::Socket { listener, client }))
            }
            config::Console::None => (Box::new(io::sink()), None),
        };
        let port = Arc::new(Port::new(Serial::new(irq, output).map_err(ConsoleError::Stdio)?));
        let input = source.map(|source| {
            let port = Arc::clone(&port);
            Arc::new(Mutex::new(Input {
                source,
                port,
                vcpu_set: Arc::clone(vcpu_set),
                left: Vec::new(),
                muted: false,
            }))
        });
        Ok(Self { port, input, _terminal: terminal, _socket: socket })
    }
}

/// What a console needs of the sandbox: a terminal's settings are undone, and a socket removed, at the end.
pub(crate) fn sandbox_needs(config: &config::Console) -> SandboxNeeds {
    const TERMINAL: [Call; 5] = [
        Call::ioctl(libc::TCGETS),
        Call::ioctl(libc::TCSETS),
        Call::ioctl(libc::TCSETSW),
        Call::ioctl(libc::TCSETSF),
        Call::ioctl(libc::TIOCGWINSZ),
    ];
    match config {
        config::Console::Stdio => SandboxNeeds::calls(&TERMINAL),
        config::Console::Socket(path) => {
            SandboxNeeds { remove: vec![directory_of(path)], ..SandboxNeeds::default() }
        }
        config::Console::File(_) | config::Console::None => SandboxNeeds::default(),
    }
}

fn duplicate(stream: &impl AsFd) -> io::Result<File> {
    Ok(File::from(stream.as_fd().try_clone_to_owned()?))
}

/// For this user alone: whoever connects types on the guest's console.
fn listen(path: &Path) -> io::Result<UnixListener> {
    let socket = bind_privately(&SocketAddrUnix::new(path)?)?;
    rustix::net::listen(&socket, 1)?;
    Ok(UnixListener::from(socket))
}

type Client = Arc<Mutex<Option<UnixStream>>>;

fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Output to whoever is connected; while nobody is, or the client does not read, it is lost.
struct ClientOutput(Client);

impl Write for ClientOutput {
    fn write(&mut self, data: &[u8]) -> io::Result<usize> {
        match lock(&self.0).as_mut() {
            Some(stream) => stream.write(data),
            None => Ok(data.len()),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Source {
    Stdin {
        input: File,
        escape: Escape,
        /// A person types it.
        typed: bool,
    },
    Socket {
        listener: UnixListener,
        client: Client,
    },
}

/// Brings input to the port, as far as the guest takes it. It never waits for a vCPU whose output
/// nobody reads: the same thread hears the signals that end the VM.
pub struct Input {
    source: Source,
    port: Arc<Port>,
    vcpu_set: Arc<VcpuSet>,
    /// Input that the port had no room for; at most one chunk.
    left: Vec<u8>,
    /// The source is not watched until there is room again.
    muted: bool,
}

impl Input {
    fn source_fd(&self) -> Option<i32> {
        match &self.source {
            Source::Stdin { input, .. } => Some(input.as_raw_fd()),
            Source::Socket { client, .. } => lock(client).as_ref().map(AsRawFd::as_raw_fd),
        }
    }

    fn watch(&mut self, ops: &mut EventOps) {
        let Some(fd) = self.source_fd() else { return };
        if let Err(error) = ops.add(Events::new_raw(fd, EventSet::IN)) {
            // A regular file or /dev/null can't be watched: it never makes anyone wait,
            // and the guest gets no input from it.
            tracing::debug!("the console has no input: {error}");
        }
    }

    fn unwatch(&mut self, ops: &mut EventOps) {
        if let Some(fd) = self.source_fd() {
            let _ = ops.remove(Events::empty_raw(fd));
        }
    }

    /// The source has something, or has ended.
    fn read(&mut self, ops: &mut EventOps) {
        let mut chunk = [0; CHUNK];
        let result = match &mut self.source {
            Source::Stdin { input, .. } => input.read(&mut chunk),
            Source::Socket { client, .. } => match lock(client).as_mut() {
                Some(stream) => stream.read(&mut chunk),
                None => return,
            },
        };
        match result {
            Ok(count @ 1..) => {
                let bytes = chunk.get(..count).unwrap_or_default();
                self.left = match &mut self.source {
                    Source::Stdin { escape, .. } => escape.filter(bytes, &self.vcpu_set),
                    Source::Socket { .. } => bytes.to_vec(),
                };
                self.deliver(ops);
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {}
            // The end of the input, or of a client.
            Ok(_) | Err(_) => {
                self.unwatch(ops);
                if let Source::Socket { client, .. } = &self.source {
                    *lock(client) = None;
                }
            }
        }
    }

    /// Hands over what is left; stops watching while the port has no room. Keys that it has no room for
    /// are lost, as a port overruns: the next ones may be those that end a VM whose guest hangs.
    fn deliver(&mut self, ops: &mut EventOps) {
        let taken = self.port.enqueue(&self.left);
        self.left.drain(..taken.min(self.left.len()));
        if matches!(self.source, Source::Stdin { typed: true, .. }) {
            self.left.clear();
            return;
        }
        match (self.left.is_empty(), self.muted) {
            (true, true) => {
                self.muted = false;
                self.watch(ops);
            }
            (false, false) => {
                self.muted = true;
                self.unwatch(ops);
            }
            _ => {}
        }
    }

    /// Takes a client, or turns it away while there is one. One that has gone, and whose input the guest does
    /// not read, keeps nobody away.
    fn accept(&mut self, ops: &mut EventOps) {
        let Source::Socket { listener, client } = &self.source else { return };
        let Ok((stream, _)) = listener.accept() else { return };
        {
            let mut client = lock(client);
            if client.as_ref().is_some_and(|client| !has_gone(client))
                || stream.set_nonblocking(true).is_err()
            {
                return;
            }
            if let Some(gone) = client.replace(stream)
                && !self.muted
            {
                let _ = ops.remove(Events::empty(&gone));
            }
        }
        if !self.muted {
            self.watch(ops);
        }
    }
}

impl MutEventSubscriber for Input {
    fn init(&mut self, ops: &mut EventOps) {
        let room = Events::new(self.port.room_event(), EventSet::IN);
        if let Err(error) = ops.add(room) {
            tracing::warn!("the console's input can't be held back: {error}");
        }
        match &self.source {
            Source::Socket { listener, .. } => {
                if let Err(error) = ops.add(Events::new(listener, EventSet::IN)) {
                    tracing::warn!("the console's socket can't be watched: {error}");
                }
            }
            Source::Stdin { .. } => self.watch(ops),
        }
    }

    fn process(&mut self, events: Events, ops: &mut EventOps) {
        let fd = events.fd();
        let room = self.port.room_event();
        let is_room = room.as_raw_fd() == fd;
        let is_listener =
            matches!(&self.source, Source::Socket { listener, .. } if listener.as_raw_fd() == fd);
        if is_room {
            let _ = room.read();
            self.deliver(ops);
        } else if is_listener {
            self.accept(ops);
        } else {
            self.read(ops);
        }
    }
}

/// Whether the other end of `client` is closed.
fn has_gone(client: &UnixStream) -> bool {
    let mut end = libc::pollfd { fd: client.as_raw_fd(), events: 0, revents: 0 };
    // SAFETY: one whole `pollfd`, as the call is told; with no time to wait it returns at once.
    let found = unsafe { libc::poll(&mut end, 1, 0) };
    found == 1 && end.revents & libc::POLLHUP != 0
}

/// Ctrl-A, which starts a command to ballast instead of the guest.
const CTRL_A: u8 = 0x01;

/// Where standard input stands between the guest and ballast.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Escape {
    Plain,
    AfterCtrlA,
}

impl Escape {
    /// What of `input` goes to the guest: Ctrl-A x ends the VM, Ctrl-A Ctrl-A is one Ctrl-A,
    /// anything else after Ctrl-A is dropped with it.
    fn filter(&mut self, input: &[u8], vcpu_set: &VcpuSet) -> Vec<u8> {
        let mut through = Vec::with_capacity(input.len());
        for &byte in input {
            *self = match (*self, byte) {
                (Self::Plain, CTRL_A) => Self::AfterCtrlA,
                (Self::Plain, byte) => {
                    through.push(byte);
                    Self::Plain
                }
                (Self::AfterCtrlA, b'x' | b'X') => {
                    vcpu_set.end(Exit::ConsoleQuit);
                    Self::Plain
                }
                (Self::AfterCtrlA, CTRL_A) => {
                    through.push(CTRL_A);
                    Self::Plain
                }
                (Self::AfterCtrlA, _) => Self::Plain,
            };
        }
        through
    }
}

#[cfg(test)]
mod tests {
    use std::io::{PipeReader, PipeWriter};
    use std::os::fd::OwnedFd;
    use std::sync::mpsc;
    use std::thread;
    use std::time::Duration;

    use vm_device::DevicePio;
    use vm_device::bus::PioAddress;
    use vmm_sys_util::eventfd::EFD_NONBLOCK;

    use super::*;
    use crate::events::EventLoop;

    #[test]
    fn ctrl_a_is_for_ballast() {
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let mut escape = Escape::Plain;
        assert_eq!(escape.filter(b"a\x01\x01b\x01c", &vcpu_set), b"a\x01b");
        assert_eq!(escape.filter(b"d\x01", &vcpu_set), b"d");
        assert!(!vcpu_set.has_ended());
        assert_eq!(escape.filter(b"x", &vcpu_set), b"");
        assert_eq!(vcpu_set.wait_for_end(), Exit::ConsoleQuit);
    }

    /// Longer than anything here takes.
    const LONG: Duration = Duration::from_secs(60);

    /// A pipe into which nothing more goes, and where it could be read.
    fn full_pipe() -> (PipeReader, PipeWriter) {
        let (reader, writer) = io::pipe().expect("a pipe");
        rustix::io::ioctl_fionbio(&writer, true).expect("a flag of a pipe");
        while (&writer).write_all(&[0; 512]).is_ok() {}
        rustix::io::ioctl_fionbio(&writer, false).expect("a flag of a pipe");
        (reader, writer)
    }

    /// Tells when output begins.
    struct Telling(PipeWriter, mpsc::Sender<()>);

    impl Write for Telling {
        fn write(&mut self, data: &[u8]) -> io::Result<usize> {
            let _ = self.1.send(());
            self.0.write(data)
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn output_that_nobody_reads_keeps_no_key_from_ending_the_vm() {
        let irq = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let (unread, output) = full_pipe();
        let (writes, writing) = mpsc::channel();
        let serial = Serial::new(irq, Box::new(Telling(output, writes))).expect("a port");
        let port = Arc::new(Port::new(serial));
        let (input, mut keys) = io::pipe().expect("a pipe");
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let source =
            Source::Stdin { input: File::from(OwnedFd::from(input)), escape: Escape::Plain, typed: false };
        let (served, by) = (Arc::clone(&port), Arc::clone(&vcpu_set));
        let input = Input { source, port: served, vcpu_set: by, left: Vec::new(), muted: false };
        let devices = EventLoop::start("devices", vec![Arc::new(Mutex::new(input))]).expect("a thread");
        let vcpu = thread::spawn(move || port.pio_write(PioAddress(0x3f8), 0, b"o"));
        writing.recv_timeout(LONG).expect("the guest writes");

        keys.write_all(b"a").expect("it is watched");
        while rustix::io::ioctl_fionread(&keys).expect("it is a pipe") > 0 {
            thread::yield_now();
        }
        keys.write_all(b"\x01x").expect("it is watched");
        let (ends, ended) = mpsc::channel();
        thread::spawn(move || {
            let exit = vcpu_set.wait_for_end();
            devices.stop();
            let _ = ends.send(exit);
        });
        assert_eq!(ended.recv_timeout(LONG), Ok(Exit::ConsoleQuit));
        assert!(!vcpu.is_finished(), "nobody has read");
        drop(unread);
        vcpu.join().expect("a closed pipe takes no output");
    }

    /// A port whose guest never reads, and the loop that serves `source`.
    fn deaf_guest(source: Source, vcpu_set: &Arc<VcpuSet>) -> EventLoop {
        let irq = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
        let port = Arc::new(Port::new(Serial::new(irq, Box::new(io::sink())).expect("a port")));
        let input = Input { source, port, vcpu_set: Arc::clone(vcpu_set), left: Vec::new(), muted: false };
        EventLoop::start("devices", vec![Arc::new(Mutex::new(input))]).expect("a thread")
    }

    #[test]
    fn keys_end_a_vm_whose_guest_reads_none() {
        let (input, mut keys) = io::pipe().expect("a pipe");
        let input = File::from(OwnedFd::from(input));
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let devices = deaf_guest(Source::Stdin { input, escape: Escape::Plain, typed: true }, &vcpu_set);
        keys.write_all(&[b'a'; 20_000]).expect("they are read");
        keys.write_all(b"\x01x").expect("they are read");
        let (ends, ended) = mpsc::channel();
        thread::spawn(move || ends.send(vcpu_set.wait_for_end()));
        assert_eq!(ended.recv_timeout(LONG), Ok(Exit::ConsoleQuit));
        devices.stop();
    }

    #[test]
    fn a_client_that_has_gone_keeps_nobody_away() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("console");
        let client = Arc::new(Mutex::new(None));
        let source = Source::Socket { listener: listen(&path).expect("it listens"), client: client.clone() };
        let devices = deaf_guest(source, &VcpuSet::new(1).expect("a vcpu_set"));
        let mut first = UnixStream::connect(&path).expect("it listens");
        // More than the guest is given, so that it is no longer read.
        first.write_all(&[b'a'; 20_000]).expect("there is room on the way");
        let output = ClientOutput(client);
        let heard = |stream: &mut UnixStream, mut output: ClientOutput| {
            stream.set_nonblocking(true).expect("a flag of a socket");
            let begun = std::time::Instant::now();
            while begun.elapsed() < LONG {
                let _ = output.write(b"o");
                match stream.read(&mut [0; 1]) {
                    Ok(1..) => return true,
                    Ok(0) => return false,
                    Err(_) => thread::yield_now(),
                }
            }
            false
        };
        assert!(heard(&mut first, ClientOutput(Arc::clone(&output.0))));
        let mut second = UnixStream::connect(&path).expect("it listens");
        assert!(!heard(&mut second, ClientOutput(Arc::clone(&output.0))), "the first is still there");
        drop(first);
        let mut third = UnixStream::connect(&path).expect("it listens");
        assert!(heard(&mut third, output), "it has the console now");
        devices.stop();
    }

    #[test]
    fn a_socket_that_took_its_place_stays() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("console");
        let vcpu_set = VcpuSet::new(1).expect("a vcpu_set");
        let open = || {
            let irq = EventFd::new(EFD_NONBLOCK).expect("an eventfd");
            Console::open(&config::Console::Socket(path.clone()), irq, &vcpu_set).expect("a console")
        };
        let first = open();
        std::fs::remove_file(&path).expect("it is there");
        let second = open();
        drop(first);
        assert!(path.exists(), "it is another's");
        drop(second);
        assert!(!path.exists());
    }

    #[test]
    fn nobody_else_may_connect() {
        use std::os::unix::fs::PermissionsExt;

        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("console");
        let listener = listen(&path).expect("it listens");
        assert_eq!(std::fs::metadata(&path).expect("it is there").permissions().mode() & 0o777, 0o600);
        UnixStream::connect(&path).expect("its owner may");
        listener.accept().expect("it waits for nobody");
        assert!(listen(&path).is_err(), "the place is taken");
    }
}
