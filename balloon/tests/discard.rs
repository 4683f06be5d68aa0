//! Memory really goes back to the host, for each backing, and nothing else does.

use std::fs;
use std::io;
use std::os::fd::AsRawFd;
use std::ptr;

use api::units::{Bytes, PAGE_SIZE};
use balloon::collapse::MOST_RUNS;
use balloon::discard::{Backing, Discard, Region};
use balloon::ranges::Range;
use devices::testing::huge_pages::Pool;
use vm_memory::GuestAddress;

const PAGE: usize = PAGE_SIZE as usize;
/// Beyond zero, so that a mix-up of guest and host addresses shows.
const GUEST: u64 = 1 << 30;

/// A mapping of its own, full of ones.
struct Mapping {
    at: *mut u8,
    len: usize,
}

impl Mapping {
    fn new(len: usize, flags: libc::c_int, file: libc::c_int) -> io::Result<Self> {
        let read_write = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let at = unsafe { libc::mmap(ptr::null_mut(), len, read_write, flags, file, 0) };
        if at == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let mapping = Self { at: at.cast(), len };
        // SAFETY: all of a fresh mapping.
        unsafe { ptr::write_bytes(mapping.at, 1, len) };
        Ok(mapping)
    }

    fn anonymous(len: usize) -> Self {
        Self::new(len, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1).unwrap()
    }

    /// Bytes of the file `memfd` that the host holds pages for.
    fn held(memfd: libc::c_int) -> u64 {
        // SAFETY: a struct of plain numbers.
        let mut stat: libc::stat = unsafe { std::mem::zeroed() };
        // SAFETY: fstat fills the struct.
        assert_eq!(unsafe { libc::fstat(memfd, &mut stat) }, 0);
        stat.st_blocks as u64 * 512
    }

    fn discard(&self, backing: Backing) -> Discard {
        let len = Bytes(self.len as u64);
        let region = Region { guest: GuestAddress(GUEST), host: self.at, len, backing, collapses: None };
        // SAFETY: the mapping outlives every test's discard and is read by pointer alone.
        unsafe { Discard::new(vec![region]) }
    }

    /// Which pages the host holds memory for (`mincore(2)`).
    fn resident(&self) -> Vec<bool> {
        let mut pages = vec![0u8; self.len / PAGE];
        // SAFETY: one byte of answer for each page of the mapping.
        assert_eq!(unsafe { libc::mincore(self.at.cast(), self.len, pages.as_mut_ptr()) }, 0);
        pages.iter().map(|page| page & 1 != 0).collect()
    }

    fn byte(&self, at: usize) -> u8 {
        assert!(at < self.len);
        // SAFETY: inside the mapping.
        unsafe { self.at.add(at).read_volatile() }
    }

    /// Which pages of `size` bytes hold ones; reading brings dropped ones back as zeros.
    fn ones(&self, size: usize) -> Vec<bool> {
        (0..self.len / size).map(|page| self.byte(page * size) == 1).collect()
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: mapped in `new`.
        unsafe { libc::munmap(self.at.cast(), self.len) };
    }
}

fn memfd(len: usize, flags: libc::c_uint) -> io::Result<libc::c_int> {
    // SAFETY: a name that ends in zero.
    let file = unsafe { libc::memfd_create(c"ballast-test".as_ptr(), flags) };
    // SAFETY: no pointers.
    if file < 0 || unsafe { libc::ftruncate(file, len as libc::off_t) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(file)
}

fn pfns(pages: &[u64]) -> Vec<u32> {
    pages.iter().map(|page| (GUEST / PAGE_SIZE + page) as u32).collect()
}

#[test]
fn anonymous_pages_go_and_their_neighbours_stay() {
    let mapping = Mapping::anonymous(8 * PAGE);
    let mut discard = mapping.discard(Backing::Anonymous);
    // Out of order, twice, behind the region, below it, and nowhere.
    let mut given = pfns(&[5, 2, 3, 3, 8]);
    given.extend([0, (GUEST / PAGE_SIZE) as u32 - 1, u32::MAX]);
    assert_eq!(discard.give_up(&mut given), Bytes(3 * PAGE_SIZE));
    let left = [true, true, false, false, true, false, true, true];
    assert_eq!(mapping.resident(), left);
    assert_eq!(mapping.ones(PAGE), left);
    let done = discard.done();
    assert_eq!((done.bytes, done.ranges, done.failures), (Bytes(3 * PAGE_SIZE), 2, 0));
    assert!((1..=2).contains(&done.calls));
}

#[test]
fn shared_pages_leave_the_file_too() {
    let file = memfd(8 * PAGE, 0).unwrap();
    let mapping = Mapping::new(8 * PAGE, libc::MAP_SHARED, file).unwrap();
    let before = Mapping::held(file);
    assert_eq!(before, 8 * PAGE_SIZE);
    let mut discard = mapping.discard(Backing::SharedFile);
    discard.give_up(&mut pfns(&[0, 1, 6]));
    assert_eq!(discard.done().failures, 0);
    assert_eq!(before - Mapping::held(file), 3 * PAGE_SIZE);
    assert_eq!(mapping.ones(PAGE), [false, false, true, true, true, true, false, true]);
}

/// On the disk that the tests are built on, not in memory.
#[test]
fn pages_of_a_file_leave_it_too() {
    let file = tempfile::tempfile_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    file.set_len(8 * PAGE_SIZE).unwrap();
    let mapping = Mapping::new(8 * PAGE, libc::MAP_SHARED, file.as_raw_fd()).unwrap();
    file.sync_all().unwrap();
    let mut discard = mapping.discard(Backing::SharedFile);
    discard.give_up(&mut pfns(&[0, 1, 6]));
    if discard.done().failures > 0 {
        eprintln!("SKIPPED: the file system of the build can't have holes");
        return;
    }
    assert_eq!(mapping.ones(PAGE), [false, false, true, true, true, true, false, true]);
    file.sync_all().unwrap();
    assert_eq!(Mapping::held(file.as_raw_fd()), 5 * PAGE_SIZE);
}

#[test]
fn reported_memory_goes_whole_pages_only() {
    let mapping = Mapping::anonymous(8 * PAGE);
    let mut discard = mapping.discard(Backing::Anonymous);
    let range = |start: u64, len: u64| Range { start: GuestAddress(GUEST + start), len: Bytes(len) };
    let mut free =
        [range(5 * PAGE_SIZE - 1, PAGE_SIZE + 2), range(PAGE_SIZE, 10), range(PAGE_SIZE + 10, 5000)];
    discard.drop_free(&mut free);
    assert_eq!(mapping.ones(PAGE), [true, false, true, true, true, false, true, true]);
    let mut beyond =
        [range(7 * PAGE_SIZE, u64::MAX / 2), Range { start: GuestAddress(0), len: Bytes(GUEST) }];
    assert_eq!(discard.drop_free(&mut beyond), Bytes(PAGE_SIZE));
    assert_eq!(mapping.ones(PAGE), [true, false, true, true, true, false, true, false]);
}

#[test]
fn what_the_host_refuses_is_counted() {
    // MADV_REMOVE works on shared mappings only: claim that this private one is such.
    let private = Mapping::anonymous(PAGE);
    let mut discard = private.discard(Backing::SharedFile);
    discard.give_up(&mut pfns(&[0]));
    assert_eq!((discard.done().failures, discard.done().bytes), (1, Bytes::ZERO));
    assert_eq!(private.byte(0), 1);
}

const HUGE: usize = 2 << 20;

/// Address space that starts at a huge page, with nothing in it.
struct Blocks {
    mapping: Mapping,
    start: *mut u8,
    count: usize,
}

impl Blocks {
    fn new(count: usize, advice: Option<libc::c_int>) -> Self {
        let len = (count + 2) * HUGE;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a new mapping, wherever the kernel likes.
        let at =
            unsafe { libc::mmap(ptr::null_mut(), len, libc::PROT_READ | libc::PROT_WRITE, flags, -1, 0) };
        assert_ne!(at, libc::MAP_FAILED);
        let mapping = Mapping { at: at.cast(), len };
        let start = mapping.at.wrapping_add(HUGE - mapping.at as usize % HUGE);
        let blocks = Self { mapping, start, count };
        if let Some(advice) = advice {
            // SAFETY: a part of the mapping, and an advice that changes nothing in it.
            assert_eq!(unsafe { libc::madvise(start.cast(), count * HUGE, advice) }, 0);
        }
        blocks
    }

    fn discard(&self) -> Discard {
        self.discard_where(Some(self.start))
    }

    fn discard_where(&self, collapses: Option<*mut u8>) -> Discard {
        let region = Region {
            guest: GuestAddress(GUEST),
            host: self.start,
            len: Bytes((self.count * HUGE) as u64),
            backing: Backing::Anonymous,
            collapses,
        };
        // SAFETY: the mapping outlives every test's discard and is read by pointer alone.
        unsafe { Discard::new(vec![region]) }
    }

    /// The kernel's mappings of it, upwards: how many blocks, and whether khugepaged is kept away (`nh`),
    /// or wanted (`hg`).
    fn mappings(&self) -> Vec<(usize, &'static str)> {
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let (start, end) = (self.start as usize, self.start as usize + self.count * HUGE);
        let mut mappings = Vec::new();
        let mut blocks = 0;
        for line in smaps.lines() {
            let range = line.split(' ').next().and_then(|range| range.split_once('-'));
            let number = |text| usize::from_str_radix(text, 16).ok();
            if let Some((first, last)) = range.and_then(|(first, last)| number(first).zip(number(last))) {
                blocks = last.min(end).saturating_sub(first.max(start)) / HUGE;
            }
            let Some(flags) = line.strip_prefix("VmFlags:").filter(|_| blocks > 0) else { continue };
            let has = |flag| flags.split(' ').any(|one| one == flag);
            mappings.push((
                blocks,
                if has("nh") {
                    "nh"
                } else if has("hg") {
                    "hg"
                } else {
                    ""
                },
            ));
        }
        mappings
    }

    fn resident(&self) -> usize {
        self.mapping.resident().iter().filter(|page| **page).count()
    }
}

/// Pages `from..to` of a block.
fn part(block: u64, from: u64, to: u64) -> Vec<u32> {
    let first = block * (HUGE / PAGE) as u64;
    pfns(&(first + from..first + to).collect::<Vec<_>>())
}

fn has_huge_pages() -> bool {
    let has = fs::exists("/sys/kernel/mm/transparent_hugepage/enabled").unwrap_or(false);
    if !has {
        eprintln!("SKIPPED: this kernel has no transparent huge pages");
    }
    has
}

/// `khugepaged` would fill a block of which a part went, and so undo what the guest did.
#[test]
fn the_host_is_kept_from_filling_blocks_of_which_a_part_went() {
    if !has_huge_pages() {
        return;
    }
    for advice in [Some(libc::MADV_HUGEPAGE), None] {
        let blocks = Blocks::new(8, advice);
        let mut discard = blocks.discard();
        let plain = [(8, if advice.is_some() { "hg" } else { "" })];
        assert_eq!(blocks.mappings(), plain);
        // Whole ones need no advice.
        discard.give_up(&mut part(6, 0, 512));
        assert_eq!((discard.done().advices, blocks.mappings()), (0, plain.to_vec()));
        // Two that lie side by side are one call, and the first of all has the region advised.
        let mut given = part(2, 100, 512);
        given.extend(part(3, 0, 7));
        discard.give_up(&mut given);
        assert_eq!(discard.done().advices, 2);
        assert_eq!(blocks.mappings(), [(2, "hg"), (2, "nh"), (4, "hg")]);
        // More of the same is no news.
        discard.give_up(&mut part(3, 7, 400));
        assert_eq!(discard.done().advices, 2);
        // One goes whole, by the balloon or as reported memory.
        discard.give_up(&mut part(2, 0, 512));
        assert_eq!(blocks.mappings(), [(3, "hg"), (1, "nh"), (4, "hg")]);
        let start = GuestAddress(GUEST + 3 * HUGE as u64);
        discard.drop_free(&mut [Range { start, len: Bytes(HUGE as u64) }]);
        assert_eq!((discard.done().advices, blocks.mappings()), (4, vec![(8, "hg")]));
        // All that is left is undone at once when the guest has everything back.
        for block in [0, 2, 4, 6] {
            discard.give_up(&mut part(block, 5, 6));
        }
        assert_eq!(blocks.mappings().len(), 8);
        let before = discard.done().advices;
        discard.all_used();
        discard.all_used();
        assert_eq!((discard.done().advices - before, blocks.mappings()), (1, vec![(8, "hg")]));
        assert_eq!(discard.done().failures, 0);
    }
}

/// What a balloon does: pages come in pieces of 1 MiB, and go when enough of them wait.
#[test]
fn blocks_that_break_together_take_few_calls_and_one_mapping() {
    if !has_huge_pages() {
        return;
    }
    let blocks = Blocks::new(512, Some(libc::MADV_HUGEPAGE));
    let mut discard = blocks.discard();
    for first in (0..512 * 512).step_by(256) {
        discard.give_up_soon(&mut pfns(&(first..first + 256).step_by(2).collect::<Vec<_>>()));
    }
    discard.finish();
    let done = discard.done();
    assert_eq!((done.bytes, done.ranges, done.advices), (Bytes::mib(512), 131_072, 3));
    assert_eq!(blocks.mappings(), [(512, "nh")]);
}

/// A guest that gives a page of every second block makes no more mappings than may be.
#[test]
fn mappings_are_bounded_whatever_a_guest_gives_up() {
    if !has_huge_pages() {
        return;
    }
    let count = 2 * MOST_RUNS + 200;
    let blocks = Blocks::new(count, Some(libc::MADV_HUGEPAGE));
    let mut discard = blocks.discard();
    let every_second = (0..count as u64).step_by(2).flat_map(|block| part(block, 1, 2));
    discard.give_up(&mut every_second.collect::<Vec<_>>());
    let mappings = blocks.mappings();
    assert!(mappings.len() <= 2 * MOST_RUNS + 1, "{}", mappings.len());
    let closed: usize = mappings.iter().filter(|(_, flag)| *flag == "nh").map(|(blocks, _)| blocks).sum();
    assert!(closed >= count / 2);
    // Each call closed one or more.
    assert!(discard.done().advices <= 1 + count as u64 / 2);
}

/// Not a test of every day, as the host takes its time: what khugepaged makes of memory that was given up.
#[test]
#[ignore = "takes a minute, and a host with khugepaged's settings as they come"]
fn what_a_guest_gave_up_stays_away() {
    let kept = Blocks::new(8, Some(libc::MADV_HUGEPAGE));
    let left_alone = Blocks::new(8, Some(libc::MADV_HUGEPAGE));
    for (blocks, collapses) in [(&kept, Some(kept.start)), (&left_alone, None)] {
        // SAFETY: all of a fresh mapping.
        unsafe { ptr::write_bytes(blocks.start, 1, 8 * HUGE) };
        let mut given: Vec<u32> = (0..8).flat_map(|block| part(block, 0, 512)).step_by(2).collect();
        blocks.discard_where(collapses).give_up(&mut given);
    }
    let before = kept.resident();
    assert_eq!(left_alone.resident(), before);
    for _ in 0..60 {
        for blocks in [&kept, &left_alone] {
            for page in (1..8 * HUGE / PAGE).step_by(2) {
                // SAFETY: inside the mapping.
                unsafe { blocks.start.add(page * PAGE).write_volatile(1) };
            }
        }
        std::thread::sleep(std::time::Duration::from_secs(1));
    }
    println!("{before} pages; {} without advice a minute later", left_alone.resident());
    assert_eq!(kept.resident(), before);
}

/// Gives huge page 1 of 3 in two parts, then takes a piece of it back and gives that again.
fn huge_pages_go_whole(mapping: &Mapping, shared: bool) {
    let mut discard = mapping.discard(Backing::Hugetlb { shared, page: Bytes(HUGE as u64) });
    let per_huge = (HUGE / PAGE) as u64;
    let free = Pool::free();
    discard.give_up_soon(&mut pfns(&(per_huge..2 * per_huge - 1).collect::<Vec<_>>()));
    assert_eq!((discard.done().calls, Pool::free()), (0, free), "a part of a huge page went");
    assert_eq!((discard.kept(), discard.waiting()), (Bytes(HUGE as u64 - PAGE_SIZE), Bytes::ZERO));
    discard.give_up_soon(&mut pfns(&[2 * per_huge - 1]));
    let done = discard.done();
    assert_eq!((done.bytes, done.calls, done.failures), (Bytes(HUGE as u64), 1, 0));
    assert_eq!((Pool::free(), discard.kept()), (free + 1, Bytes::ZERO));
    assert_eq!(mapping.ones(HUGE), [true, false, true]);

    discard.take_back(&mut pfns(&[per_huge + 7]));
    discard.give_up_soon(&mut pfns(&[per_huge + 8]));
    assert_eq!(discard.done().calls, 1);
    discard.give_up_soon(&mut pfns(&[per_huge + 7]));
    assert_eq!(discard.done().calls, 2);

    // A driver that says nothing when it uses a page again: only what it gives whole at once goes.
    let calls = discard.done().calls;
    discard.give_up(&mut pfns(&(1..per_huge).collect::<Vec<_>>()));
    discard.give_up(&mut pfns(&[0]));
    assert_eq!((discard.done().calls, mapping.ones(HUGE)), (calls, vec![true, false, true]));
    discard.give_up(&mut pfns(&(per_huge - 1..2 * per_huge).collect::<Vec<_>>()));
    assert_eq!(discard.done().calls, calls + 1);

    // Reported memory: only the page that is reported as a whole.
    let start = GuestAddress(GUEST + 2 * HUGE as u64 - PAGE_SIZE);
    discard.drop_free(&mut [Range { start, len: Bytes(HUGE as u64 + PAGE_SIZE) }]);
    discard.drop_free(&mut [Range { start: GuestAddress(GUEST), len: Bytes(HUGE as u64 - PAGE_SIZE) }]);
    assert_eq!(discard.done().failures, 0);
    assert_eq!(mapping.ones(HUGE), [true, false, false]);
}

/// One test, as the pool is one for the whole host.
#[test]
fn huge_pages_go_back_to_the_pool_whole() {
    let Some(_pool) = Pool::reserve(3) else { return };
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_HUGETLB | libc::MAP_HUGE_2MB;
    let private = Mapping::new(3 * HUGE, flags, -1).unwrap();
    huge_pages_go_whole(&private, false);
    drop(private);
    let file = memfd(3 * HUGE, libc::MFD_HUGETLB | libc::MFD_HUGE_2MB).unwrap();
    let shared = Mapping::new(3 * HUGE, libc::MAP_SHARED, file).unwrap();
    huge_pages_go_whole(&shared, true);
    drop(shared);
    // SAFETY: ours, and closed once.
    unsafe { libc::close(file) };
}
