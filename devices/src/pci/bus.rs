//! The bus: which function answers an access, and where each BAR is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use parking_lot::RwLock;

use super::{BARS, BarRange, Function, SLOTS};

/// Why a function can't be put on the bus.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum SlotError {
    /// There are [`SLOTS`].
    #[error("a PCI bus has no slot {0}: they are numbered from 0 to {last}", last = SLOTS - 1)]
    NoSlot(u8),
    /// It has a function.
    #[error("slot {0} of the PCI bus is taken")]
    Taken(u8),
    /// All slots have one.
    #[error("the PCI bus is full: it has {SLOTS} slots, the host bridge's among them")]
    Full,
}

type SharedFunction = Arc<Mutex<dyn Function>>;

/// A BAR in the window, by its first address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Placed {
    size: u64,
    slot: usize,
    bar: usize,
}

/// Bus 0 of the machine.
///
/// BARs lie in one window, in which there is nothing else. One that the guest moves is followed;
/// one outside the window, or across another, is reached from nowhere until it moves on or the
/// other one goes.
pub struct Bus {
    window: Range<u64>,
    slots: RwLock<[Option<SharedFunction>; SLOTS as usize]>,
    placed: RwLock<BTreeMap<u64, Placed>>,
    /// Held over every change of configuration space, and taken before any function's lock: what is
    /// placed follows what is programmed, in the same order.
    changes: parking_lot::Mutex<()>,
}

impl Bus {
    /// A bus without functions, whose BARs are to lie in `window`, in guest physical addresses.
    pub fn new(window: Range<u64>) -> Self {
        Self {
            window,
            slots: RwLock::default(),
            placed: RwLock::default(),
            changes: parking_lot::Mutex::default(),
        }
    }

    /// Where BARs can be reached.
    pub fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Puts a function into a slot, and its BARs where they are programmed to be.
    ///
    /// # Errors
    /// [`SlotError`] says what is in the way.
    pub fn insert(&self, slot: u8, function: Arc<Mutex<dyn Function>>) -> Result<(), SlotError> {
        let _changes = self.changes.lock();
        match self.slots.write().get_mut(usize::from(slot)) {
            None => return Err(SlotError::NoSlot(slot)),
            Some(Some(_)) => return Err(SlotError::Taken(slot)),
            Some(free) => *free = Some(function),
        }
        self.place_all();
        Ok(())
    }

    /// Puts a function into the first slot that is free, and returns its number.
    ///
    /// # Errors
    /// [`SlotError::Full`].
    pub fn add(&self, function: Arc<Mutex<dyn Function>>) -> Result<u8, SlotError> {
        let free = (0..SLOTS).find(|slot| self.function(usize::from(*slot)).is_none());
        let slot = free.ok_or(SlotError::Full)?;
        self.insert(slot, function)?;
        Ok(slot)
    }

    fn function(&self, slot: usize) -> Option<SharedFunction> {
        self.slots.read().get(slot)?.clone()
    }

    /// Reads configuration space of function 0 in `slot`; all ones where there is none, or where the
    /// access is none that the bus carries.
    pub(super) fn read_config(&self, slot: usize, offset: u16, data: &mut [u8]) {
        match self.function(slot) {
            Some(function) if is_carried(offset, data.len()) => lock(&*function).read_config(offset, data),
            _ => data.fill(0xff),
        }
    }

    /// Writes configuration space of function 0 in `slot`, and moves what moves by it.
    pub(super) fn write_config(&self, slot: usize, offset: u16, data: &[u8]) {
        let Some(function) = self.function(slot).filter(|_| is_carried(offset, data.len())) else { return };
        let _changes = self.changes.lock();
        let before = bars(&*function);
        lock(&*function).write_config(offset, data);
        if bars(&*function) != before {
            self.place_all();
        }
    }

    /// Reads memory of whatever function is at `address`.
    pub(super) fn read_memory(&self, address: u64, data: &mut [u8]) {
        match self.find(address, data.len()) {
            Some((function, bar, offset)) => lock(&*function).read_bar(bar, offset, data),
            None => data.fill(0xff),
        }
    }

    /// Writes memory of whatever function is at `address`.
    pub(super) fn write_memory(&self, address: u64, data: &[u8]) {
        if let Some((function, bar, offset)) = self.find(address, data.len()) {
            lock(&*function).write_bar(bar, offset, data);
        }
    }

    fn find(&self, address: u64, len: usize) -> Option<(SharedFunction, usize, u64)> {
        let (start, placed) = {
            let all = self.placed.read();
            let (start, placed) = all.range(..=address).next_back()?;
            (*start, *placed)
        };
        let offset = address.checked_sub(start)?;
        let end = offset.checked_add(u64::try_from(len).ok()?)?;
        let function = self.function(placed.slot).filter(|_| end <= placed.size)?;
        Some((function, placed.bar, offset))
    }

    /// Puts every BAR where it is programmed to be, if it can be there: those that stay first, so that
    /// nobody is driven off by a newcomer.
    fn place_all(&self) {
        let functions: Vec<_> = (0..usize::from(SLOTS)).map(|slot| self.function(slot)).collect();
        let wanted: Vec<_> = functions.iter().map(|function| function.as_deref().map(bars)).collect();
        let wanted = |slot: usize, bar: usize| *wanted.get(slot)?.as_ref()?.get(bar)?;
        let before = self.placed.read().clone();
        let mut after: BTreeMap<u64, Placed> = before
            .iter()
            .filter(|(start, placed)| {
                wanted(placed.slot, placed.bar).is_some_and(|range| range.address == **start)
            })
            .map(|(start, placed)| (*start, *placed))
            .collect();
        for slot in 0..functions.len() {
            for bar in 0..BARS {
                let Some(BarRange { address, size }) = wanted(slot, bar) else { continue };
                if self.is_free(&after, address, size) {
                    after.insert(address, Placed { size, slot, bar });
                }
            }
        }
        // Off first: two that change places must not both be told of the same address at once.
        let gone = before.iter().filter(|entry| after.get(entry.0) != Some(entry.1));
        let come = after.iter().filter(|entry| before.get(entry.0) != Some(entry.1));
        *self.placed.write() = after.clone();
        let tell = |placed: &Placed, address| {
            if let Some(Some(function)) = functions.get(placed.slot) {
                lock(&**function).place_bar(placed.bar, address);
            }
        };
        gone.for_each(|(_, placed)| tell(placed, None));
        come.for_each(|(start, placed)| tell(placed, Some(*start)));
    }

    fn is_free(&self, placed: &BTreeMap<u64, Placed>, address: u64, size: u64) -> bool {
        let Some(end) = address.checked_add(size) else { return false };
        let inside = address >= self.window.start && end <= self.window.end;
        let below = placed.range(..end).next_back();
        inside && below.is_none_or(|(start, other)| start.saturating_add(other.size) <= address)
    }
}

/// Configuration accesses are 1, 2 or 4 bytes within an aligned group of 4.
fn is_carried(offset: u16, len: usize) -> bool {
    matches!(len, 1 | 2 | 4) && usize::from(offset % 4).saturating_add(len) <= 4
}

fn bars(function: &Mutex<dyn Function>) -> [Option<BarRange>; BARS] {
    let function = lock(function);
    std::array::from_fn(|bar| function.bar(bar))
}

/// A lock of the standard library's, as functions are served by event loops too.
fn lock<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
