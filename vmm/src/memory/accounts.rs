//! What the host holds of a guest's memory, by the kernel's own accounts.
//!
//! `/proc/self/smaps` tells it a mapping at a time (Documentation/filesystems/proc.rst), and the
//! kernel walks the page tables for that: tens of milliseconds for each GiB of small pages on a
//! busy host, so seconds for a large guest. Nobody who asks waits that long: a thread of its own
//! counts, and until it is done they get its last count, moved by what the kernel has given to this
//! process and taken from it since. That figure of the whole process costs nothing to read.

use std::fs::File;
use std::io::{self, BufRead, BufReader, Seek};
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::thread::Builder;
use std::time::{Duration, Instant};

use api::units::{Bytes, Pages};
use parking_lot::{Condvar, Mutex, MutexGuard};

use crate::events::STACK;

/// From one count to the next there are so many times what it took, so that asking costs at most a
/// tenth of a processor, however often anyone asks.
const KEPT: u32 = 10;

/// Nobody waits for a count for longer, and a count that took longer is not taken as it is.
const PATIENCE: Duration = Duration::from_millis(100);

/// Until the next count where the kernel refused one.
const REFUSED: Duration = Duration::from_secs(2);

/// What the host holds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Held {
    /// Pages of the mapping that are there.
    pub resident: Bytes,
    /// Those of them that are parts of huge pages and mapped as such.
    pub huge: Bytes,
}

/// The accounts of a few mappings of this process.
pub struct Accounts {
    /// What the kernel tells of the mappings of this process, from the start.
    smaps: Box<dyn Fn() -> io::Result<Box<dyn BufRead>> + Send + Sync>,
    /// What it tells of the whole.
    statm: File,
    /// The memfd behind the mappings, if there is one.
    file: Option<File>,
    mappings: Vec<Range<u64>>,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    last: Option<Count>,
    counter: Counter,
}

/// Who counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Counter {
    /// Whoever asks.
    Asker,
    /// A thread, which has nothing to do.
    Idle,
    /// A thread, which was asked then.
    Busy { since: Instant },
}

/// A count, and what it took to get it.
#[derive(Clone, Copy, Debug)]
struct Count {
    at: Instant,
    took: Duration,
    held: Held,
    /// What the process or the file had then (see [`Accounts::quick`]).
    quick: Bytes,
}

impl Count {
    /// Whether it is not old yet.
    fn is_kept(&self, now: Instant) -> bool {
        now.saturating_duration_since(self.at) < self.took.saturating_mul(KEPT)
    }

    /// Whether it can be told as it is.
    fn is_good(&self, now: Instant) -> bool {
        self.took < PATIENCE && self.is_kept(now)
    }

    /// What is held when the process or the file has `quick`, and mapped is `mapped`.
    ///
    /// All but the guest's memory hardly changes; and as the count took its least, the error is
    /// to more.
    fn moved(&self, quick: Bytes, mapped: Bytes) -> Held {
        let resident = self.held.resident.saturating_add(quick).saturating_sub(self.quick).min(mapped);
        Held { resident, huge: self.held.huge.min(resident) }
    }
}

impl Accounts {
    /// The accounts of what lies in `mappings`, by this process's addresses, which are of `file` or of
    /// anonymous memory. What they are read from is opened here: nothing can be opened once the guest runs.
    ///
    /// # Errors
    /// When the kernel's accounts can't be opened.
    pub fn new(mappings: Vec<Range<u64>>, file: Option<File>) -> io::Result<Self> {
        let (smaps, statm) = (Arc::new(File::open("/proc/self/smaps")?), File::open("/proc/self/statm")?);
        let smaps = move || {
            (&*smaps).rewind()?;
            Ok(Box::new(BufReader::new(Arc::clone(&smaps))) as Box<dyn BufRead>)
        };
        let state = State { last: None, counter: Counter::Asker };
        let (state, changed) = (Mutex::new(state), Condvar::new());
        Ok(Self { smaps: Box::new(smaps), statm, file, mappings, state, changed })
    }

    /// Has a thread count from now on, to the end of the process, whenever someone asks.
    ///
    /// # Errors
    /// There is no thread to be had.
    pub fn start(self: &Arc<Self>) -> io::Result<()> {
        let accounts = Arc::clone(self);
        Builder::new().name("accounts".to_owned()).stack_size(STACK).spawn(move || accounts.serve())?;
        self.state.lock().counter = Counter::Idle;
        Ok(())
    }

    /// What the host holds: counted not long ago, or moved from an older count. Once
    /// [started](Self::start) it takes a tenth of a second at most.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read, or the first count takes longer than that and is not done yet.
    pub fn held(&self) -> io::Result<Held> {
        let mut state = self.state.lock();
        // Whoever asks meanwhile waits for the same count.
        if state.counter == Counter::Asker {
            let good = state.last.filter(|count| count.is_kept(Instant::now()));
            let count = good.map_or_else(|| self.count(), Ok)?;
            state.last = Some(count);
            return Ok(count.held);
        }
        let now = Instant::now();
        if state.counter == Counter::Idle && !state.last.is_some_and(|count| count.is_kept(now)) {
            state.counter = Counter::Busy { since: now };
            self.changed.notify_all();
        }
        if let (Counter::Busy { since }, true) =
            (state.counter, state.last.is_none_or(|count| count.took < PATIENCE))
        {
            let patience = (since + PATIENCE).saturating_duration_since(now);
            let busy = |state: &mut State| matches!(state.counter, Counter::Busy { .. });
            self.changed.wait_while_for(&mut state, busy, patience);
        }
        let last = state.last;
        drop(state);
        match last {
            Some(count) if count.is_good(Instant::now()) => Ok(count.held),
            Some(count) => Ok(count.moved(self.quick()?, self.mapped())),
            None => Err(io::ErrorKind::WouldBlock.into()),
        }
    }

    /// Counts when asked to.
    fn serve(&self) {
        let mut state = self.state.lock();
        loop {
            let idle = |state: &mut State| !matches!(state.counter, Counter::Busy { .. });
            self.changed.wait_while(&mut state, idle);
            let count = MutexGuard::unlocked(&mut state, || self.count());
            match count {
                Ok(count) => state.last = Some(count),
                Err(error) => {
                    tracing::warn!("what the host holds of the guest's memory can't be counted: {error}");
                    // The one before is still the best there is.
                    if let Some(last) = &mut state.last {
                        (last.at, last.took) = (Instant::now(), REFUSED / KEPT);
                    }
                }
            }
            state.counter = Counter::Idle;
            self.changed.notify_all();
        }
    }

    fn count(&self) -> io::Result<Count> {
        let (begun, before) = (Instant::now(), self.quick()?);
        let held = self.ask()?;
        let (at, after) = (Instant::now(), self.quick()?);
        Ok(Count { at, took: at.saturating_duration_since(begun), held, quick: before.min(after) })
    }

    fn mapped(&self) -> Bytes {
        self.mappings.iter().map(|all| Bytes(all.end.saturating_sub(all.start))).sum()
    }

    /// Forgets what was counted, for a test that asks for this moment.
    #[cfg(test)]
    pub(super) fn forget(&self) {
        self.state.lock().last = None;
    }

    /// What the host holds at this moment.
    ///
    /// # Errors
    /// When the kernel's accounts can't be read.
    pub fn ask(&self) -> io::Result<Held> {
        let mapped = self.read((self.smaps)()?)?;
        let Some(file) = &self.file else { return Ok(mapped.held) };
        // Others may have touched pages of a memfd that this process has not mapped: what is allocated and not
        // swapped out is there.
        let resident = allocated(file)?.saturating_sub(mapped.swapped);
        Ok(Held { resident, huge: mapped.held.huge.min(resident) })
    }

    /// What costs nothing to read and moves with what is held: what the memfd has allocated, or the anonymous
    /// memory of this process.
    fn quick(&self) -> io::Result<Bytes> {
        self.file.as_ref().map_or_else(|| self.process(), allocated)
    }

    /// The anonymous memory of this process, from counters that the kernel keeps anyway
    /// (`/proc/self/statm`, proc(5): pages resident, and those of them that belong to files).
    fn process(&self) -> io::Result<Bytes> {
        let mut text = [0; 128];
        let len = self.statm.read_at(&mut text, 0)?;
        let statm = str::from_utf8(text.get(..len).unwrap_or_default()).unwrap_or_default();
        let mut pages = statm.split_ascii_whitespace().skip(1).map_while(|field| field.parse().ok());
        let (Some(resident), Some(files)) = (pages.next(), pages.next()) else {
            return Err(io::ErrorKind::InvalidData.into());
        };
        Ok(Pages(resident).bytes().saturating_sub(Pages(files).bytes()))
    }

    fn read(&self, smaps: impl BufRead) -> io::Result<Mapped> {
        let mut inside = false;
        let (mut held, mut swapped) = (Held::default(), Bytes::ZERO);
        for line in smaps.lines() {
            let line = line?;
            if let Some(range) = mapping_line(&line) {
                inside = self.mappings.iter().any(|all| all.start <= range.start && range.end <= all.end);
                continue;
            }
            let Some((field, amount)) = line.split_once(':').filter(|_| inside) else { continue };
            let amount = || Bytes::kib(amount.trim().trim_end_matches(" kB").parse().unwrap_or(0));
            match field {
                "Rss" => held.resident = held.resident.saturating_add(amount()),
                // Of a shared mapping, all that is swapped out of that part of the file.
                "Swap" => swapped = swapped.saturating_add(amount()),
                "AnonHugePages" | "ShmemPmdMapped" | "FilePmdMapped" => {
                    held.huge = held.huge.saturating_add(amount());
                }
                // Not part of Rss.
                "Shared_Hugetlb" | "Private_Hugetlb" => {
                    held.resident = held.resident.saturating_add(amount());
                    held.huge = held.huge.saturating_add(amount());
                }
                _ => {}
            }
        }
        Ok(Mapped { held, swapped })
    }
}

/// What smaps tells of the mappings.
struct Mapped {
    held: Held,
    swapped: Bytes,
}

/// What a file in memory has allocated, swapped out or not. st_blocks counts 512 bytes, whatever the file
/// system's block is (stat(2)).
///
/// # Errors
/// When the kernel does not tell.
pub fn allocated(file: &File) -> io::Result<Bytes> {
    let blocks = u64::try_from(rustix::fs::fstat(file)?.st_blocks).unwrap_or(0);
    Ok(Bytes(blocks.saturating_mul(512)))
}

/// The addresses in the first line of a mapping in smaps, such as `7f00-7f01 rw-p ...`.
fn mapping_line(line: &str) -> Option<Range<u64>> {
    let (start, rest) = line.split_once('-')?;
    let (end, _) = rest.split_once(' ')?;
    Some(u64::from_str_radix(start, 16).ok()?..u64::from_str_radix(end, 16).ok()?)
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    #[test]
    fn only_the_mappings_asked_for_count_and_each_kind_of_huge_page_does() {
        let accounts = Accounts::new(vec![0x20_0000..0x40_0000, 0x40_0000..0x80_0000], None).unwrap();
        let smaps = "\
00100000-00200000 rw-p 00000000 00:00 0
Rss:                1024 kB
AnonHugePages:      1024 kB
00200000-00400000 rw-p 00000000 00:00 0
Rss:                3072 kB
AnonHugePages:      2048 kB
ShmemPmdMapped:        0 kB
VmFlags: rd wr mr mw me dc ac sd
00400000-00800000 rw-s 00000000 00:01 7    /memfd:guest-memory (deleted)
Rss:                   0 kB
Shared_Hugetlb:     2048 kB
Swap:               3072 kB
SwapPss:            3072 kB
00800000-00a00000 rw-s 00000000 00:01 7
ShmemPmdMapped:     2048 kB
";
        let mapped = accounts.read(smaps.as_bytes()).unwrap();
        assert_eq!(mapped.held, Held { resident: Bytes::mib(5), huge: Bytes::mib(4) });
        assert_eq!(mapped.swapped, Bytes::mib(3));
    }

    /// The file has 9 MiB, of which the kernel says that it swapped out five: the rest is resident, whoever
    /// touched it.
    #[test]
    fn what_is_swapped_out_of_a_memfd_is_not_held() {
        let file = tempfile::tempfile().unwrap();
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, 9 << 20).unwrap();
        let all = allocated(&file).unwrap();
        assert!(all >= Bytes::mib(9));
        let mapping = 0x10_0000..0x200_0000;
        let mut accounts = Accounts::new(vec![mapping], Some(file)).unwrap();
        let smaps = "\
00100000-02000000 rw-s 00000000 00:01 7    /memfd:guest-memory (deleted)
Rss:                1024 kB
ShmemPmdMapped:     2048 kB
Swap:               5120 kB
";
        accounts.smaps = Box::new(move || Ok(Box::new(smaps.as_bytes()) as Box<dyn BufRead>));
        let held = accounts.held().unwrap();
        assert_eq!(held, Held { resident: all - Bytes::mib(5), huge: Bytes::mib(2) });
        // Reckoned from an older count, it moves with what the file has.
        let count = accounts.state.lock().last.unwrap();
        assert_eq!(count.moved(all + Bytes::mib(1), Bytes::mib(30)).resident, held.resident + Bytes::mib(1));
    }

    fn counted(at: Instant, milliseconds: u64) -> Count {
        let held = Held { resident: Bytes::mib(100), huge: Bytes::mib(40) };
        Count { at, took: Duration::from_millis(milliseconds), held, quick: Bytes::mib(110) }
    }

    #[test]
    fn a_count_is_kept_in_proportion_to_what_it_took_and_told_as_it_is_where_that_was_little() {
        let now = Instant::now();
        let later = |milliseconds| now + Duration::from_millis(milliseconds);
        assert!(counted(now, 10).is_good(later(99)));
        assert!(!counted(now, 10).is_kept(later(100)));
        assert!(!counted(now, 0).is_kept(now));
        assert!(counted(now, 60_000).is_kept(later(599_999)));
        assert!(!counted(now, 60_000).is_good(now));
    }

    #[test]
    fn an_old_count_follows_what_the_process_took_and_gave_back() {
        let count = counted(Instant::now(), 1000);
        let moved = |process| count.moved(Bytes::mib(process), Bytes::mib(500));
        assert_eq!(moved(110), count.held);
        assert_eq!(moved(210).resident, Bytes::mib(200));
        assert_eq!(moved(30), Held { resident: Bytes::mib(20), huge: Bytes::mib(20) });
        assert_eq!(moved(5).resident, Bytes::ZERO);
        assert_eq!(moved(5000).resident, Bytes::mib(500), "no more than there is");
    }

    /// A kernel that takes its time is a pipe into which nobody has written yet.
    #[test]
    fn whoever_asks_while_a_long_count_goes_on_gets_what_is_known() {
        const LONG: Duration = Duration::from_secs(60);
        let directory = tempfile::tempdir().unwrap();
        let smaps = directory.path().join("smaps");
        let mode = rustix::fs::Mode::RUSR | rustix::fs::Mode::WUSR;
        rustix::fs::mknodat(rustix::fs::CWD, &smaps, rustix::fs::FileType::Fifo, mode, 0).unwrap();
        let tell = |mib: u64| {
            let text = format!("10000000-20000000 rw-p 00000000 00:00 0\nRss: {} kB\n", mib << 10);
            let smaps = smaps.clone();
            std::thread::spawn(move || std::fs::write(smaps, text).unwrap())
        };
        let mapping = 0x1000_0000..0x4000_0000;
        let path = smaps.clone();
        let open = move || Ok(Box::new(BufReader::new(File::open(&path)?)) as Box<dyn BufRead>);
        let accounts = Accounts::new(vec![mapping], None).unwrap();
        let accounts = Arc::new(Accounts { smaps: Box::new(open), ..accounts });
        accounts.start().unwrap();
        // Nothing is known before the first count is done, and nobody waits for it.
        assert_eq!(accounts.held().unwrap_err().kind(), io::ErrorKind::WouldBlock);
        tell(100).join().unwrap();
        let deadline = Instant::now() + LONG;
        while accounts.held().is_err() {
            assert!(Instant::now() < deadline, "it is never counted");
        }
        if let Some(last) = &mut accounts.state.lock().last {
            assert_eq!(last.held.resident, Bytes::mib(100));
            last.took = Duration::ZERO;
        }

        let taken = vec![1u8; 64 << 20];
        let (sender, answer) = mpsc::channel();
        let asked = Arc::clone(&accounts);
        std::thread::spawn(move || sender.send(asked.held().unwrap()).unwrap());
        let held = answer.recv_timeout(LONG).expect("it waits for no count").resident;
        // Each processor may keep some pages of the kernel's counters to itself, and a test has a heap.
        assert!((Bytes::mib(156)..Bytes::mib(172)).contains(&held), "{held}");
        assert!(matches!(accounts.state.lock().counter, Counter::Busy { .. }), "nothing was told");

        tell(7).join().unwrap();
        while accounts.held().unwrap().resident > Bytes::mib(15) {
            assert!(Instant::now() < deadline, "{:?}", accounts.held());
            std::thread::yield_now();
        }
        drop(taken);
    }

    #[test]
    fn the_thread_counts_what_is_there_now() {
        use crate::config::MemoryOptions;
        use crate::memory::Ram;
        use vm_memory::{Bytes as _, GuestAddress};

        let ram = Ram::new(Bytes::mib(64), MemoryOptions::default()).unwrap();
        ram.count().unwrap();
        let deadline = Instant::now() + Duration::from_secs(60);
        let first = std::iter::from_fn(|| Some(ram.held())).find_map(|held| {
            assert!(Instant::now() < deadline, "{held:?}");
            held.ok()
        });
        assert_eq!(first.unwrap().resident, Bytes::ZERO);
        for page in 0..Bytes::mib(8).pages().0 {
            ram.guest().write_obj(1u8, GuestAddress(page * 4096)).unwrap();
        }
        // An old count, and one that the thread will be waited for.
        if let Some(last) = &mut ram.accounts.state.lock().last {
            last.took = Duration::ZERO;
        }
        while ram.held().unwrap().resident != Bytes::mib(8) {
            assert!(Instant::now() < deadline, "{:?}", ram.held());
            std::thread::yield_now();
        }
        let state = ram.accounts.state.lock();
        assert_eq!(state.last.map(|count| count.held.resident), Some(Bytes::mib(8)));
    }
}
