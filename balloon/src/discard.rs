//! Gives guest memory back to the host: one policy for each kind of backing.

use vm_memory::GuestAddress;

pub use crate::advise::Discarded;

use crate::advise::Batch;
use crate::blocks::{BLOCK, Blocks};
use crate::collapse::{Change, Closed};
use crate::pending::Pending;
use crate::ranges::{self, PartlyGiven, Range};
use api::units::{Bytes, PAGE_SIZE};

/// What lies behind a region of guest memory, which decides what call gives it back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Backing {
    /// Private anonymous memory: `MADV_DONTNEED`.
    Anonymous,
    /// A memfd, or a file on tmpfs or a disk, mapped shared and writable:
    /// `MADV_REMOVE`, which punches a hole in the file; dropping the mapping
    /// alone would keep its pages. A file system that can't have holes refuses,
    /// and that is counted. (A file mapped private is no backing for guest RAM:
    /// what is dropped would read as the file says, not as zeros.)
    SharedFile,
    /// Huge pages of `page` bytes, given back whole or not at all: a private
    /// mapping with `MADV_DONTNEED` (Linux 5.18 or later), a shared one with `MADV_REMOVE`.
    Hugetlb {
        /// Mapped shared (from a memfd or hugetlbfs file).
        shared: bool,
        /// The size of a huge page.
        page: Bytes,
    },
}

impl Backing {
    fn advice(self) -> libc::c_int {
        match self {
            Self::Anonymous | Self::Hugetlb { shared: false, .. } => libc::MADV_DONTNEED,
            Self::SharedFile | Self::Hugetlb { shared: true, .. } => libc::MADV_REMOVE,
        }
    }

    /// The least that the host can take back.
    fn page(self) -> Bytes {
        match self {
            Self::Anonymous | Self::SharedFile => Bytes(PAGE_SIZE),
            Self::Hugetlb { page, .. } => page,
        }
    }
}

/// One region of guest RAM and where it is mapped here.
#[derive(Clone, Copy, Debug)]
pub struct Region {
    /// Its first byte as the guest sees it.
    pub guest: GuestAddress,
    /// Its first byte as this process sees it, on a page boundary of its backing.
    pub host: *mut u8,
    /// How long it is.
    pub len: Bytes,
    /// What lies behind it.
    pub backing: Backing,
    /// Where the guest's accesses to it go in this process, if the host may put huge pages together
    /// there by itself (khugepaged); `None` where it never does.
    pub collapses: Option<*mut u8>,
}

/// What the guest has given up and the host still holds.
enum Given {
    /// It waits for its neighbours.
    Soon(Pending),
    /// Parts of the host's huge pages.
    Huge(PartlyGiven),
}

/// A region, and how it is dropped.
struct Place {
    region: Region,
    range: Range,
    /// What becomes of transparent huge pages.
    blocks: Blocks,
    /// Where the guest's accesses go, and which blocks khugepaged is kept from.
    closed: Option<(*mut u8, Closed)>,
}

impl Place {
    /// Puts `part`, whole host pages of this region, down to go back to the host.
    fn discard(&self, part: Range, batch: &mut Batch) {
        let offset = usize::try_from(part.offset_in(&self.range));
        let (Ok(offset), Ok(len)) = (offset, usize::try_from(part.len.0)) else { return };
        // SAFETY: `part` lies in `range`, which is the region that `Discard::new`'s caller vouches for.
        unsafe { batch.push(self.region.host.add(offset), len, self.region.backing.advice()) };
    }

    /// As [`discard`](Self::discard), with account of the transparent huge pages that this splits.
    fn discard_small(&mut self, part: Range, batch: &mut Batch) {
        let Some(part) = part.within(&self.range) else { return };
        let closed = &mut self.closed;
        let (whole, broken) = self.blocks.dropped(part, |start, whole| match closed {
            Some((_, closed)) if whole => closed.open(start),
            Some((_, closed)) => closed.close(start),
            None => {}
        });
        batch.count_blocks(whole, broken);
        self.discard(part, batch);
    }

    /// Tells the host where it may put huge pages together. To be called before the batch is
    /// flushed: what has gone must not be brought in again first.
    fn advise(&mut self, batch: &mut Batch) {
        let Some((at, closed)) = &mut self.closed else { return };
        for change in closed.take_changes() {
            let Change { range, huge } = change;
            let (Ok(offset), Ok(len)) =
                (usize::try_from(range.offset_in(&self.range)), usize::try_from(range.len.0))
            else {
                continue;
            };
            let advice = if huge { libc::MADV_HUGEPAGE } else { libc::MADV_NOHUGEPAGE };
            // SAFETY: `range` lies in the region, which is mapped there as `Discard::new`'s caller
            // vouches for; neither advice changes what is in it.
            if !unsafe { batch.advise(at.wrapping_add(offset), len, advice) } {
                closed.refused(change);
            }
        }
    }

    /// The guest has all of it back: it may lie in huge pages again.
    fn open(&mut self, batch: &mut Batch) {
        if let Some((_, closed)) = &mut self.closed {
            closed.open_all();
        }
        self.advise(batch);
    }
}

struct Mapped {
    place: Place,
    given: Given,
}

impl Mapped {
    fn new(region: Region) -> Self {
        let range = Range { start: region.guest, len: region.len };
        let given = match region.backing {
            Backing::Hugetlb { page, .. } => Given::Huge(PartlyGiven::new(region.len, page)),
            _ => Given::Soon(Pending::new(range, BLOCK)),
        };
        let closed = region.collapses.map(|at| (at, Closed::new(range)));
        Self { place: Place { region, range, blocks: Blocks::new(range), closed }, given }
    }

    /// Marks `part` as given up, and drops what has come together by it: of the host's huge pages
    /// those that it completes, of other memory all that is ready once there is enough.
    fn give_soon(&mut self, part: Range, batch: &mut Batch) {
        let place = &mut self.place;
        match &mut self.given {
            Given::Soon(pending) => {
                if pending.push(part) {
                    pending.take_ready(|range| place.discard_small(range, batch));
                    place.advise(batch);
                }
            }
            Given::Huge(bits) => {
                let from_start = Range { start: GuestAddress(part.offset_in(&place.range)), len: part.len };
                for huge in bits.give(from_start) {
                    place.discard(inside(&place.range, huge), batch);
                }
            }
        }
    }

    /// Drops `part`, and no huge page of which it is a part only. What is small may wait until
    /// [`finish`](Self::finish).
    fn give_now(&mut self, part: Range, batch: &mut Batch) {
        match &self.given {
            Given::Soon(_) => self.give_soon(part, batch),
            Given::Huge(_) => {
                let Some(whole) = part.whole_pages(self.place.region.backing.page()) else { return };
                self.place.discard(whole, batch);
            }
        }
    }

    /// Drops all that waits for its neighbours.
    fn finish(&mut self, batch: &mut Batch) {
        if let Given::Soon(pending) = &mut self.given {
            pending.take_all(|range| self.place.discard_small(range, batch));
            self.place.advise(batch);
        }
    }
}

/// The range of guest memory that is `part`, counted from the start of `region`.
fn inside(region: &Range, part: Range) -> Range {
    Range { start: GuestAddress(part.start.0.saturating_add(region.start.0)), len: part.len }
}

/// Gives memory of one guest back to the host.
pub struct Discard {
    regions: Vec<Mapped>,
    batch: Batch,
}

// SAFETY: the pointers in it are addresses of guest memory for madvise, which any thread may call.
unsafe impl Send for Discard {}

impl Discard {
    /// For guest RAM in `regions`, which don't overlap.
    ///
    /// # Safety
    /// Each region's `len` bytes at `host` must be guest RAM, mapped as its
    /// `backing` says for as long as the `Discard` lives (and at `collapses` too),
    /// and reached only as memory that may change at any time, never through references: their
    /// content turns to zeros when the guest gives it up.
    pub unsafe fn new(regions: Vec<Region>) -> Self {
        Self { regions: regions.into_iter().map(Mapped::new).collect(), batch: Batch::new() }
    }

    /// What discards have done so far.
    pub fn done(&self) -> Discarded {
        self.batch.done()
    }

    /// The guest has put the pages `pfns` (of 4 KiB) into its balloon: they go
    /// back to the host now, and of huge pages those that `pfns` hold whole: a
    /// driver that doesn't say when it takes pages back may use again by now
    /// what it gave before. Returns how much of it is guest RAM. Pages
    /// elsewhere are left alone.
    pub fn give_up(&mut self, pfns: &mut [u32]) -> Bytes {
        let mut given = Bytes::ZERO;
        for range in ranges::of_pages(pfns) {
            for mapped in &mut self.regions {
                let Some(part) = range.within(&mapped.place.range) else { continue };
                given += part.len;
                mapped.give_now(part, &mut self.batch);
            }
        }
        self.batch.flush();
        self.finish();
        given
    }

    /// As [`give_up`](Self::give_up), but the pages may wait for their
    /// neighbours until [`finish`](Self::finish), so that many go with one
    /// system call, and huge pages whole. Only for a driver that doesn't touch
    /// a page again before it has said so.
    pub fn give_up_soon(&mut self, pfns: &mut [u32]) -> Bytes {
        let mut given = Bytes::ZERO;
        for range in ranges::of_pages(pfns) {
            given += self.give_range_soon(&range);
        }
        self.batch.flush();
        given
    }

    fn give_range_soon(&mut self, range: &Range) -> Bytes {
        let mut given = Bytes::ZERO;
        for mapped in &mut self.regions {
            let Some(part) = range.within(&mapped.place.range) else { continue };
            given += part.len;
            mapped.give_soon(part, &mut self.batch);
        }
        given
    }

    /// What was given up and waits to go.
    pub fn waiting(&self) -> Bytes {
        let waits = |mapped: &Mapped| match &mapped.given {
            Given::Soon(pending) => pending.waiting(),
            Given::Huge(_) => Bytes::ZERO,
        };
        self.regions.iter().map(waits).sum()
    }

    /// What was given up of huge pages that the guest uses in part: the host can't have it.
    pub fn kept(&self) -> Bytes {
        let keeps = |mapped: &Mapped| match &mapped.given {
            Given::Soon(_) => Bytes::ZERO,
            Given::Huge(bits) => bits.waiting(),
        };
        self.regions.iter().map(keeps).sum()
    }

    /// What was given up and the host still holds, in ranges of the guest's: what waits, and parts
    /// of huge pages, with the whole ones beside them.
    pub fn given_up(&self) -> Vec<Range> {
        let mut ranges = Vec::new();
        for Mapped { place, given } in &self.regions {
            match given {
                Given::Soon(pending) => ranges.extend(pending.ranges()),
                Given::Huge(bits) => ranges.extend(bits.ranges().map(|part| inside(&place.range, part))),
            }
        }
        ranges
    }

    /// Whether all of `range` is guest RAM, in whole pages.
    pub fn is_ram(&self, range: &Range) -> bool {
        let found = self.regions.iter().filter_map(|mapped| range.within(&mapped.place.range));
        range.len > Bytes::ZERO
            && range.whole_pages(Bytes(PAGE_SIZE)) == Some(*range)
            && found.fold(Bytes::ZERO, |sum, part| sum.saturating_add(part.len)) == range.len
    }

    /// Takes in what another process saw [given up](Self::given_up).
    pub fn restore(&mut self, given_up: &[Range]) {
        for range in given_up {
            self.give_range_soon(range);
        }
        self.batch.flush();
    }

    /// Gives all that waits back to the host.
    pub fn finish(&mut self) {
        if self.waiting() == Bytes::ZERO {
            return;
        }
        for mapped in &mut self.regions {
            mapped.finish(&mut self.batch);
        }
        self.batch.flush();
    }

    /// The guest takes the pages `pfns` (of 4 KiB) out of its balloon: those that wait stay, and the
    /// host gives it memory for the others when it touches them. Makes no system call. Returns how much
    /// of it is guest RAM; a page that is named twice counts twice.
    pub fn take_back(&mut self, pfns: &mut [u32]) -> Bytes {
        let mut taken = Bytes::ZERO;
        for Mapped { place, given } in &mut self.regions {
            taken += ranges::pages_inside(pfns, &place.range).bytes();
            match given {
                Given::Soon(pending) if pending.waiting() == Bytes::ZERO => {}
                Given::Soon(pending) => ranges::of_pages(pfns).for_each(|range| pending.remove(range)),
                Given::Huge(bits) => {
                    for part in ranges::of_pages(pfns).filter_map(|range| range.within(&place.range)) {
                        let from_start = GuestAddress(part.offset_in(&place.range));
                        bits.take_back(Range { start: from_start, len: part.len });
                    }
                }
            }
        }
        taken
    }

    /// The guest has nothing in its balloon any more, and uses all of it again.
    pub fn take_back_all(&mut self) {
        for mapped in &mut self.regions {
            match &mut mapped.given {
                Given::Soon(pending) => pending.clear(),
                Given::Huge(bits) => bits.clear(),
            }
        }
        self.all_used();
    }

    /// The guest has nothing in its balloon any more: all of its memory may lie in huge pages again.
    pub fn all_used(&mut self) {
        for mapped in &mut self.regions {
            mapped.place.open(&mut self.batch);
        }
    }

    /// Drops free memory that the guest keeps to use as it likes: only what
    /// holds whole pages of the host, as nobody says when it is used again.
    /// Sorts `free` in place. Returns how much of it is guest RAM.
    pub fn drop_free(&mut self, free: &mut [Range]) -> Bytes {
        free.sort_unstable();
        let mut reported = Bytes::ZERO;
        for range in ranges::merged(free.iter().copied()) {
            for Mapped { place, given } in &mut self.regions {
                let Some(part) = range.within(&place.range) else { continue };
                reported += part.len;
                let Some(whole) = part.whole_pages(place.region.backing.page()) else { continue };
                match given {
                    Given::Soon(_) => {
                        place.discard_small(whole, &mut self.batch);
                        place.advise(&mut self.batch);
                    }
                    Given::Huge(_) => place.discard(whole, &mut self.batch),
                }
            }
        }
        self.batch.flush();
        reported
    }
}
