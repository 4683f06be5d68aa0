//! A vhost-user backend that does as a test says: by the protocol, or not at all.

use std::fs::File;
use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use vmm_sys_util::sock_ctrl_msg::ScmSocket;

// Requests (vhost-user's specification, "Front-end message types").
pub const GET_FEATURES: u32 = 1;
pub const SET_MEM_TABLE: u32 = 5;
pub const SET_VRING_ADDR: u32 = 9;
pub const SET_VRING_BASE: u32 = 10;
pub const GET_VRING_BASE: u32 = 11;
pub const SET_VRING_KICK: u32 = 12;
pub const SET_VRING_CALL: u32 = 13;
pub const GET_PROTOCOL_FEATURES: u32 = 15;
pub const SET_VRING_ENABLE: u32 = 18;

/// Version 1, and whether it is a reply or wants one.
const VERSION: u32 = 1;
const REPLY: u32 = 1 << 2;
const NEED_REPLY: u32 = 1 << 3;

/// What an honest one knows: virtio 1, indirect descriptors, event indices, features of the protocol; and of those
/// that it acknowledges each message.
const FEATURES: u64 = 1 << 32 | 1 << 28 | 1 << 29 | 1 << 30;
const REPLY_ACK: u64 = 1 << 3;

/// The available index at which it says that it has stopped.
pub const STOPPED_AT: u32 = 7;

/// What it does when a request comes, instead of answering it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    Nothing,
    /// Says nothing, and stays.
    Silence,
    /// Ends.
    Death,
    /// Ends in the middle of its answer.
    HalfAnAnswer,
    /// A byte at a time, each just before the limit would be over if each began it anew.
    OneByteAtATime,
    /// Answers something else.
    AnotherRequest,
    /// Its answer says that it is so long.
    Size(u32),
    /// Everything that it could answer, and more.
    Flood,
    /// Says that it failed.
    Refusal,
    /// Knows nothing, or all.
    Value(u64),
}

impl Lie {
    /// Whether it is never taken for an answer. The size that one states counts for nothing, as each has one size.
    pub fn is_no_answer(self) -> bool {
        matches!(
            self,
            Self::Silence | Self::Death | Self::HalfAnAnswer | Self::OneByteAtATime | Self::AnotherRequest
        )
    }
}

/// What came.
#[derive(Debug, Default)]
pub struct Seen {
    /// Each request with its payload.
    pub requests: Vec<(u32, Vec<u8>)>,
    /// The ends of the queues' signals, by their requests: each time, in order.
    pub files: Vec<(u32, File)>,
}

impl Seen {
    /// The payloads of each request of this kind.
    pub fn all(&self, kind: u32) -> Vec<Vec<u8>> {
        let of_kind = self.requests.iter().filter(|(request, _)| *request == kind);
        of_kind.map(|(_, payload)| payload.clone()).collect()
    }
}

pub struct Backend {
    pub seen: Arc<Mutex<Seen>>,
    socket: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Backend {
    /// One that is honest but for requests `at`, with the other end of its connection.
    pub fn start(at: u32, lie: Lie) -> (Self, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        let seen = Arc::<Mutex<Seen>>::default();
        let (sees, socket) = (Arc::clone(&seen), ours.try_clone().unwrap());
        let thread = thread::spawn(move || serve(&ours, &sees, at, lie));
        (Self { seen, socket, thread: Some(thread) }, theirs)
    }

    /// Says something that nobody asked.
    pub fn speak(&self) {
        (&self.socket).write_all(&[0; 12]).unwrap();
    }

    pub fn end(&mut self) {
        let _ = self.socket.shutdown(Shutdown::Both);
        self.wait_for_its_end();
    }

    pub fn wait_for_its_end(&mut self) {
        if let Some(thread) = self.thread.take() {
            thread.join().unwrap();
        }
    }

    /// Signals that it has used buffers of queue `index`.
    pub fn call(&self, index: u64) {
        let seen = self.seen.lock().unwrap();
        let calls = seen.requests.iter().filter(|(kind, _)| *kind == SET_VRING_CALL);
        let files = seen.files.iter().filter(|(kind, _)| *kind == SET_VRING_CALL);
        let of_queue = calls.zip(files).filter(|((_, payload), _)| payload[..8] == index.to_le_bytes());
        let (_, (_, file)) = of_queue.last().unwrap();
        { file }.write_all(&1u64.to_ne_bytes()).unwrap();
    }
}

impl Drop for Backend {
    fn drop(&mut self) {
        self.end();
    }
}

fn serve(mut socket: &UnixStream, seen: &Mutex<Seen>, at: u32, lie: Lie) {
    loop {
        let mut header = [0; 12];
        let Ok((12, file)) = socket.recv_with_fd(&mut header) else { return };
        let word = |place: usize| u32::from_le_bytes(header[place..place + 4].try_into().unwrap());
        let (request, flags, size) = (word(0), word(4), word(8));
        assert_eq!(flags & (VERSION | REPLY), VERSION);
        let mut payload = vec![0; size as usize];
        if socket.read_exact(&mut payload).is_err() {
            return;
        }
        let answer = match request {
            GET_FEATURES => Some(FEATURES.to_le_bytes()),
            GET_PROTOCOL_FEATURES => Some(REPLY_ACK.to_le_bytes()),
            GET_VRING_BASE => {
                let queue = payload[..4].try_into().unwrap();
                Some((u64::from(STOPPED_AT) << 32 | u64::from(u32::from_le_bytes(queue))).to_le_bytes())
            }
            _ if flags & NEED_REPLY != 0 => Some([0; 8]),
            _ => None,
        };
        let mut seen = seen.lock().unwrap();
        seen.files.extend(file.map(|file| (request, file)));
        seen.requests.push((request, payload));
        drop(seen);
        let message = |request: u32, size: u32, value: [u8; 8]| {
            let head = [request, VERSION | REPLY, size].map(u32::to_le_bytes);
            [head.as_flattened(), &value].concat()
        };
        let Some(answer) = answer else { continue };
        let honest = message(request, 8, answer);
        let said = match lie {
            _ if request != at => honest,
            Lie::Nothing => honest,
            Lie::Silence => continue,
            Lie::Death => return drop(socket.shutdown(Shutdown::Both)),
            Lie::HalfAnAnswer => {
                let _ = socket.write_all(&honest[..13]);
                return drop(socket.shutdown(Shutdown::Both));
            }
            Lie::OneByteAtATime => {
                for byte in honest {
                    thread::sleep(Duration::from_millis(150));
                    if socket.write_all(&[byte]).is_err() {
                        return;
                    }
                }
                continue;
            }
            Lie::AnotherRequest => message(request + 1, 8, answer),
            Lie::Size(size) => message(request, size, answer),
            Lie::Flood => honest.repeat(2000),
            Lie::Refusal => message(request, 8, 1u64.to_le_bytes()),
            Lie::Value(value) => message(request, 8, value.to_le_bytes()),
        };
        if socket.write_all(&said).is_err() {
            return;
        }
    }
}
