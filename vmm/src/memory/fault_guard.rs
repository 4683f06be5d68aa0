//! What happens where a device reaches for guest memory that is not there.
//!
//! Memory that the guest has not plugged is closed to this process ([`pluggable`](crate::memory::pluggable)),
//! so an access faults (SIGSEGV); and as another vCPU can unplug it at any moment, no check beforehand could
//! exclude that. An access to memory in a file faults as well where the host has no page for it any more
//! (SIGBUS): reserved huge pages that the guest gave up may be another's by now. A vCPU that goes there itself
//! ends the VM, as KVM can't run it on. A device's access ends it as calmly: the handler puts memory of nobody
//! in that place, so that the access can finish, and tells that it had to; whoever is told ends the VM.

use std::io;
use std::mem::MaybeUninit;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, OnceLock};

use devices::events::Subscriber;
use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::exit::Exit;
use crate::memory::Region;
use crate::vcpu_set::VcpuSet;

/// What is replaced at a time: the least that can be cut out of a mapping, whatever its backing.
const REPLACED: usize = 2 << 20;

/// What the kernel sends where memory can't be reached, and where it can't be had.
const SIGNALS: [libc::c_int; 2] = [libc::SIGSEGV, libc::SIGBUS];

struct Guard {
    regions: Vec<Range<usize>>,
    told: EventFd,
    /// What was done about [`SIGNALS`] before.
    before: [libc::sigaction; 2],
}

/// A signal handler has nothing else to find its state by. Set once, by the one VM of this process.
static GUARD: OnceLock<Guard> = OnceLock::new();

/// Ends a VM one of whose devices has reached for memory that is not there.
pub struct FaultGuard {
    told: EventFd,
    vcpu_set: Arc<VcpuSet>,
}

impl FaultGuard {
    /// Watches guest memory from now on.
    ///
    /// # Errors
    /// The host refuses an event or a handler, or another guest's memory is watched already.
    pub fn watch(regions: &[Region], vcpu_set: Arc<VcpuSet>) -> io::Result<Self> {
        Ok(Self { told: catch(regions)?, vcpu_set })
    }
}

impl Subscriber for FaultGuard {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::new(&self.told, EventSet::IN))
    }

    fn process(&mut self, _: Events, _: &mut EventOps) -> EventResult<()> {
        let _ = self.told.read();
        self.vcpu_set.end(Exit::VcpuFailed(
            "the host could not provide memory that a device touched (out of huge pages, or memory that the guest \
             has not plugged?)"
                .into(),
        ));
        Ok(())
    }
}

fn catch(regions: &[Region]) -> io::Result<EventFd> {
    let told = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let regions = regions.iter().map(|region| {
        let start = region.host as usize;
        start..start.saturating_add(usize::try_from(region.size.0).unwrap_or(usize::MAX))
    });
    let [segv, bus] = SIGNALS.map(action);
    let guard = Guard { regions: regions.collect(), told: told.try_clone()?, before: [segv?, bus?] };
    GUARD.set(guard).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
    // SAFETY: all zeros is a valid sigaction, with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    // On the stack of its own that each thread of Rust has: the fault may be a stack's overflow.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    for signal in SIGNALS {
        // SAFETY: the handler calls nothing that is not safe in a signal handler.
        if unsafe { libc::sigaction(signal, &action, ptr::null_mut()) } != 0 {
            return Err(io::Error::last_os_error());
        }
    }
    Ok(told)
}

/// What is done about a signal at present.
fn action(signal: libc::c_int) -> io::Result<libc::sigaction> {
    let mut action = MaybeUninit::uninit();
    // SAFETY: asks for the present action, into a place of its size.
    if unsafe { libc::sigaction(signal, ptr::null(), action.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: filled in by the successful call above.
    Ok(unsafe { action.assume_init() })
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(guard) = GUARD.get() else { return };
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid one, with an address for both signals.
    let address = unsafe { (*info).si_addr() } as usize;
    let region = guard.regions.iter().find(|region| region.contains(&address));
    if region.is_some_and(|region| replace(address, region)) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of a local; write(2) is safe in a signal handler. A full counter is
        // one that tells already.
        let _ = unsafe { libc::write(guard.told.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        return;
    }
    let [segv, bus] = &guard.before;
    let before = if signal == libc::SIGSEGV { segv } else { bus };
    // SAFETY: as the kernel called this handler, with the action that was set before it.
    unsafe { hand_on(before, signal, info, context) };
}

/// Lets the access at `address`, which lies in `region`, finish in memory of nobody.
fn replace(address: usize, region: &Range<usize>) -> bool {
    let start = address - address % REPLACED;
    let len = REPLACED.min(region.end.saturating_sub(start));
    let at = ptr::without_provenance_mut(start);
    let protection = libc::PROT_READ | libc::PROT_WRITE;
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE | libc::MAP_FIXED;
    // SAFETY: inside guest memory, whose regions start at such a boundary; nobody holds a reference to it, and
    // what was in it is of no use any more. mmap is a plain system call.
    unsafe { libc::mmap(at, len, protection, flags, -1, 0) == at }
}

/// A fault elsewhere is whose it was before.
///
/// # Safety
/// To be called from a handler of such a signal with what the kernel gave it.
unsafe fn hand_on(
    before: &libc::sigaction,
    signal: libc::c_int,
    info: *mut libc::siginfo_t,
    context: *mut libc::c_void,
) {
    type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);
    if before.sa_flags & libc::SA_SIGINFO != 0 && before.sa_sigaction > libc::SIG_IGN {
        // SAFETY: with SA_SIGINFO it is the address of such a handler (Rust's own, of stack overflows).
        let handler: Handler = unsafe { std::mem::transmute::<usize, Handler>(before.sa_sigaction) };
        return handler(signal, info, context);
    }
    // SAFETY: the access is made again and meets the action that was there before.
    unsafe { libc::sigaction(signal, before, ptr::null_mut()) };
}

#[cfg(test)]
mod tests {
    use api::units::Bytes;
    use devices::testing::huge_pages::Pool;
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::config::{Backing, MemoryOptions};
    use crate::memory::Ram;

    /// The one test in this process that sets the handlers.
    #[test]
    fn an_access_to_memory_that_is_not_there_finishes_and_is_told() {
        let ram = |backing, boot| {
            let options = MemoryOptions { backing, ..MemoryOptions::default() };
            Ram::with_pluggable(boot, Bytes::mib(128), options).expect("address space")
        };
        // Not a multiple of what is replaced.
        let mut rams = vec![ram(Backing::Anonymous, Bytes::mib(63)), ram(Backing::Memfd, Bytes::mib(63))];
        let mut pool = Pool::reserve(2);
        rams.extend(pool.as_ref().map(|_| ram(Backing::HugePages2M, Bytes::mib(4))));
        let regions: Vec<Region> = rams.iter().flat_map(|ram| ram.regions().to_vec()).collect();
        let told = catch(&regions).expect("handlers");
        assert!(told.read().is_err(), "nothing has happened");
        for ram in &rams {
            let region = ram.pluggable().expect("asked for").region();
            let inside = GuestAddress(region.guest.0 + (5 << 20));
            ram.guest().write_obj(7u8, inside).expect("in the region");
            assert_eq!(told.read().expect("told"), 1);
            assert_eq!(ram.guest().read_obj::<u8>(inside).expect("in the region"), 7);
        }
        if let (Some(pool), Some(ram)) = (&mut pool, rams.last()) {
            // Given up by the guest, and gone to another when a device touches it.
            ram.guest().write_obj(7u8, GuestAddress(2 << 20)).expect("boot memory");
            let page = ram.regions()[0].host.wrapping_add(2 << 20);
            // SAFETY: a huge page of this test's own, of which nobody holds a reference.
            assert_eq!(unsafe { libc::madvise(page.cast(), 2 << 20, libc::MADV_REMOVE) }, 0);
            pool.shrink(1);
            ram.guest().write_obj(8u8, GuestAddress(2 << 20)).expect("boot memory");
            assert_eq!(told.read().expect("told"), 1);
        }
        assert!(catch(&regions).is_err(), "there is one VM in a process");
    }
}
