//! The host's kernel does reads and writes by itself (io_uring(7)): a request needs no thread that waits for it.
//!
//! What a ring does passes the filter of system calls by. So it is restricted when it is made, before the
//! sandbox closes: it reads and writes one file, which was open before, and nothing else, whoever asks it.
//! Guest memory is not registered with it: that would pin the pages, and a balloon could not give them back.

use std::collections::VecDeque;
use std::fs;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use io_uring::register::Restriction;
use io_uring::squeue::Flags;
use io_uring::{Builder, EnterFlags, IoUring, cqueue, opcode, squeue, types};

use super::disk::{Hold, Lane};
use super::request::Work;
use super::workers::{Finished, Job};
use crate::sandbox::{Argument, Call};

/// Threads of the kernel that wait for a file of which it has no other way, such as one in the page cache:
/// as many as of ours.
const KERNEL_THREADS: u32 = 4;

/// Requests that a ring has room for at most.
const MOST_ENTRIES: u32 = 4096;

/// The one file, among those that are registered.
const FILE: types::Fixed = types::Fixed(0);

/// `IORING_UNREGISTER_FILES` (`linux/io_uring.h`).
const UNREGISTER_FILES: u8 = 3;

/// What is called once the guest runs.
pub(super) const CALLS: [Call; 2] = [
    Call::any(libc::SYS_io_uring_enter),
    Call {
        number: libc::SYS_io_uring_register,
        argument: Some(Argument { index: 1, value: UNREGISTER_FILES as u64 }),
    },
];

/// Where an administrator turns io_uring off (Linux 6.6).
const DISABLED: &str = "/proc/sys/kernel/io_uring_disabled";

/// Why there is no ring, so that threads do all.
#[derive(Debug, thiserror::Error)]
pub enum NoRing {
    /// This kernel was built without, or a filter of system calls says so.
    #[error("this kernel has no io_uring, or a container keeps it away")]
    Missing,
    /// The administrator has turned it off.
    #[error("io_uring is turned off on this host (sysctl kernel.io_uring_disabled={0})")]
    Disabled(u8),
    /// A container, or something like it.
    #[error("io_uring is kept away from this user, as in a container")]
    Forbidden,
    /// It can't be restricted.
    #[error("io_uring of this kernel can't be restricted to what a disk needs: that takes Linux 5.10")]
    TooOld,
    /// Something else.
    #[error("io_uring can't be had: {0}")]
    Host(io::Error),
}

impl NoRing {
    fn of(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::ENOSYS) => Self::Missing,
            Some(libc::EPERM | libc::EACCES) => match disabled() {
                Some(level @ 1..) => Self::Disabled(level),
                _ => Self::Forbidden,
            },
            Some(libc::EINVAL) => Self::TooOld,
            _ => Self::Host(error),
        }
    }
}

fn disabled() -> Option<u8> {
    fs::read_to_string(DISABLED).ok()?.trim().parse().ok()
}

/// Whether rings can be had here, for whoever wants to know before there is a disk.
///
/// # Errors
/// [`NoRing`] says why not.
pub fn look() -> Result<(), NoRing> {
    let null = fs::File::open("/dev/null").map_err(NoRing::Host)?;
    Ring::new(null.as_fd(), 1).map(drop)
}

/// Reads and writes of one file that the kernel does by itself.
pub struct Ring {
    ring: IoUring,
    /// What the kernel has, and must not go before it has answered. An entry is named by its place here.
    flights: Vec<Option<Flight>>,
    free: Vec<usize>,
    /// Entries that the kernel was not shown yet, in their order.
    fresh: VecDeque<usize>,
    /// The kernel has refused to look at entries once: it gets no more.
    refused: bool,
}

/// A request on its way.
struct Flight {
    job: Job,
    _hold: Option<Hold>,
}

impl Ring {
    /// For so many requests to `file` at once.
    ///
    /// # Errors
    /// [`NoRing`].
    pub fn new(file: BorrowedFd<'_>, requests: u32) -> Result<Self, NoRing> {
        let entries = requests.clamp(1, MOST_ENTRIES).next_power_of_two();
        let ring = make(entries).map_err(NoRing::of)?;
        restrict(&ring, file).map_err(NoRing::of)?;
        let places = entries as usize;
        Ok(Self {
            ring,
            flights: (0..places).map(|_| None).collect(),
            free: (0..places).rev().collect(),
            fresh: VecDeque::with_capacity(places),
            refused: false,
        })
    }

    /// Readable while something is done and not taken.
    pub fn event(&self) -> RawFd {
        self.ring.as_raw_fd()
    }

    /// Requests that the kernel has, or is about to have.
    pub fn in_flight(&self) -> usize {
        self.flights.len().saturating_sub(self.free.len())
    }

    /// Takes a request, to be shown to the kernel by [`enter`](Self::enter). Gives it back where it can't be taken.
    pub fn push(&mut self, job: Job, lane: Lane) -> Result<(), Box<Job>> {
        let Some(place) = self.free.pop() else { return Err(Box::new(job)) };
        let entry = entry(&job, &lane).filter(|_| !self.refused).map(|entry| entry.user_data(place as u64));
        let (Some(entry), Some(flight)) = (entry, self.flights.get_mut(place)) else {
            self.free.push(place);
            return Err(Box::new(job));
        };
        // SAFETY: the vectors are the job's, which moves as a value while they stay where they are, and with
        // their memory they are kept in `flights` until the kernel has answered.
        if unsafe { self.ring.submission().push(&entry) }.is_err() {
            self.free.push(place);
            return Err(Box::new(job));
        }
        *flight = Some(Flight { job, _hold: lane.hold });
        self.fresh.push_back(place);
        Ok(())
    }

    /// Shows the kernel what was pushed. What it does not even look at is moved to `rest`.
    pub fn enter(&mut self, rest: &mut Vec<Job>) {
        while !self.fresh.is_empty() {
            let entered = self.ring.submit();
            let left = self.ring.submission().len();
            let taken = self.fresh.len().saturating_sub(left);
            self.fresh.drain(..taken);
            match entered {
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(_) if taken > 0 => {}
                answer => {
                    tracing::warn!("io_uring takes nothing more, so threads go on: {answer:?}");
                    return self.give_up(rest);
                }
            }
        }
    }

    /// Has no more of it: the kernel sees entries only when it is asked to, and it is asked no more.
    fn give_up(&mut self, rest: &mut Vec<Job>) {
        self.refused = true;
        for place in self.fresh.drain(..) {
            let flight = self.flights.get_mut(place).and_then(Option::take);
            rest.extend(flight.map(|flight| flight.job));
            self.free.push(place);
        }
    }

    /// Takes what is done. What is done in part, or is to be tried again, is moved to `rest`.
    pub fn take(&mut self, finished: &mut Vec<Finished>, rest: &mut Vec<Job>) {
        let Self { ring, flights, free, .. } = self;
        for answer in ring.completion() {
            let Ok(place) = usize::try_from(answer.user_data()) else { continue };
            let Some(Flight { mut job, _hold }) = flights.get_mut(place).and_then(Option::take) else {
                continue;
            };
            free.push(place);
            match job.advance(answered(&answer)) {
                Some(done) => finished.push(job.finish(done)),
                None => rest.push(job),
            }
        }
    }

    /// Waits until something is done: something must be on its way.
    pub fn wait(&self) {
        let flags = EnterFlags::GETEVENTS.bits();
        // What keeps it from waiting is a signal, after which its caller looks and comes back.
        //
        // SAFETY: no entry is shown to the kernel by it, and there is no argument.
        let _ = unsafe { self.ring.submitter().enter::<libc::sigset_t>(0, 1, flags, None) };
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        let (mut finished, mut rest) = (Vec::new(), Vec::new());
        // The kernel never sees these.
        self.give_up(&mut rest);
        while self.in_flight() > 0 {
            self.wait();
            self.take(&mut finished, &mut rest);
        }
        // The kernel takes a ring apart later, and would have the file locked until then.
        let _ = self.ring.submitter().unregister_files();
    }
}

fn make(entries: u32) -> io::Result<IoUring> {
    let disabled = |builder: &mut Builder<squeue::Entry, cqueue::Entry>| {
        builder.setup_r_disabled();
        builder.build(entries)
    };
    // Answers need not interrupt the thread that asked, which looks for them anyway (Linux 5.19).
    let mut builder = IoUring::builder();
    builder.setup_coop_taskrun();
    match disabled(&mut builder) {
        Err(error) if error.raw_os_error() == Some(libc::EINVAL) => disabled(&mut IoUring::builder()),
        ring => ring,
    }
}

/// Leaves the ring nothing but to read and write `file`, and has it begin.
fn restrict(ring: &IoUring, file: BorrowedFd<'_>) -> io::Result<()> {
    let submitter = ring.submitter();
    submitter.register_files(&[file.as_raw_fd()])?;
    // Linux 5.15. The second number is of sockets and the like, of which there are none: as few as there can be.
    let _ = submitter.register_iowq_max_workers(&mut [KERNEL_THREADS, 1]);
    submitter.register_restrictions(&mut [
        Restriction::sqe_op(opcode::Readv::CODE),
        Restriction::sqe_op(opcode::Writev::CODE),
        Restriction::sqe_flags_required(Flags::FIXED_FILE.bits()),
        Restriction::register_op(UNREGISTER_FILES),
    ])?;
    submitter.register_enable_rings()
}

fn entry(job: &Job, lane: &Lane) -> Option<squeue::Entry> {
    let (Work::Read(vectors, _) | Work::Write(vectors, _)) = &job.work else { return None };
    let vectors = vectors.as_slice();
    let count = u32::try_from(vectors.len()).ok().filter(|count| *count <= MOST_VECTORS)?;
    Some(match job.work {
        Work::Read(..) => opcode::Readv::new(FILE, vectors.as_ptr(), count).offset(lane.offset).build(),
        _ => opcode::Writev::new(FILE, vectors.as_ptr(), count).offset(lane.offset).build(),
    })
}

/// Vectors that the kernel takes at once (`IOV_MAX`).
const MOST_VECTORS: u32 = 1024;

fn answered(answer: &cqueue::Entry) -> io::Result<usize> {
    let result = answer.result();
    usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(result.saturating_neg()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use vm_memory::{Bytes, GuestAddress, GuestMemoryMmap};
    use vmm_sys_util::tempfile::TempFile;

    use super::*;
    use crate::virtio::queue::{Chain, IoVectors};

    fn ring(file: &TempFile) -> Option<Ring> {
        look().ok()?;
        Ring::new(file.as_file().as_fd(), 4).ok()
    }

    fn file() -> TempFile {
        let file = TempFile::new().expect("a file");
        fs::write(file.as_path(), [5; 4096]).expect("its contents");
        file
    }

    fn read(memory: &Arc<GuestMemoryMmap>, len: usize, offset: u64) -> Job {
        let mut vectors = IoVectors::new(Arc::clone(memory));
        assert!(vectors.push(GuestAddress(0), len));
        Job::new(0, Chain::default(), Work::Read(vectors, offset), false)
    }

    fn memory() -> Arc<GuestMemoryMmap> {
        Arc::new(GuestMemoryMmap::from_ranges(&[(GuestAddress(0), 16384)]).expect("memory"))
    }

    fn lane(offset: u64) -> Lane {
        Lane { offset, hold: None }
    }

    fn done(ring: &mut Ring) -> (Vec<Finished>, Vec<Job>) {
        let (mut finished, mut rest) = (Vec::new(), Vec::new());
        while ring.in_flight() > 0 {
            ring.wait();
            ring.take(&mut finished, &mut rest);
        }
        (finished, rest)
    }

    #[test]
    fn a_ring_does_nothing_but_to_read_and_write_its_file() {
        let file = file();
        let Some(mut ring) = ring(&file) else { return };
        let other = fs::File::open("/dev/zero").expect("a file");
        let mut byte = [7u8; 1];
        let vector = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        for entry in [
            opcode::Nop::new().build(),
            opcode::Fsync::new(FILE).build(),
            opcode::Close::new(types::Fd(other.as_raw_fd())).build(),
            // No other file, and no other flag.
            opcode::Readv::new(types::Fd(other.as_raw_fd()), &raw const vector, 1).build(),
            opcode::Readv::new(FILE, &raw const vector, 1).build().flags(Flags::ASYNC),
        ] {
            // SAFETY: what it points to lives until the answer.
            unsafe { ring.ring.submission().push(&entry) }.expect("room");
            ring.ring.submit_and_wait(1).expect("an answer");
            let answer = ring.ring.completion().next().expect("an answer");
            assert_eq!(answer.result(), -libc::EACCES);
        }
        assert_eq!(byte, [7]);
        let refused = ring.ring.submitter().register_files(&[other.as_raw_fd()]);
        assert_eq!(refused.expect_err("restricted").raw_os_error(), Some(libc::EACCES));
    }

    #[test]
    fn what_ends_early_leaves_the_rest_to_threads() {
        let file = file();
        let Some(mut ring) = ring(&file) else { return };
        let memory = memory();
        let mut rest = Vec::new();
        for (len, offset) in [(4096, 0), (8192, 0), (512, 4096), (512, 1 << 40)] {
            ring.push(read(&memory, len, offset), lane(offset)).map_err(drop).expect("room");
        }
        assert!(ring.push(read(&memory, 1, 0), lane(0)).is_err(), "more than it has room for");
        ring.enter(&mut rest);
        assert!(rest.is_empty());
        let (finished, rest) = done(&mut ring);
        let kinds: Vec<_> = finished.iter().map(|one| one.done.as_ref().map_err(io::Error::kind)).collect();
        assert_eq!(kinds.iter().filter(|kind| kind.is_ok()).count(), 1);
        let ends = kinds.iter().filter(|kind| **kind == Err(io::ErrorKind::UnexpectedEof));
        assert_eq!(ends.count(), 2);
        let [Job { work: Work::Read(vectors, 4096), .. }] = &rest[..] else { panic!("{}", rest.len()) };
        assert_eq!((vectors.len(), rest[0].bytes()), (4096, 8192));
        assert_eq!(memory.read_obj::<u8>(GuestAddress(4095)).expect("memory"), 5);
    }

    #[test]
    fn a_ring_that_is_given_up_touches_nothing() {
        let file = file();
        let Some(mut ring) = ring(&file) else { return };
        let (memory, mut rest) = (memory(), Vec::new());
        ring.push(read(&memory, 512, 0), lane(0)).map_err(drop).expect("room");
        ring.give_up(&mut rest);
        assert_eq!((rest.len(), ring.in_flight()), (1, 0));
        assert!(ring.push(read(&memory, 512, 0), lane(0)).is_err());
        ring.enter(&mut rest);
        drop(ring);
        assert_eq!(memory.read_obj::<u8>(GuestAddress(0)).expect("memory"), 0);
    }
}
