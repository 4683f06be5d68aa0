//! What happens where a guest sends a device to memory that it has not plugged.
//!
//! Such memory is closed to this process ([`pluggable`](crate::memory::pluggable)), so
//! the access faults; and as another vCPU can unplug it at any moment, no check
//! beforehand could exclude that. A vCPU that goes there itself ends the VM, as
//! KVM can't run it on. A device's access shall end it as calmly: the handler
//! opens the one page, so that the access can finish, and tells that it was
//! needed; whoever is told ends the VM.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::AsRawFd;
use std::ptr;
use std::sync::{Arc, OnceLock};

use devices::events::Subscriber;
use event_manager::{EventOps, EventSet, Events, Result as EventResult};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::exit::Exit;
use crate::memory::Region;
use crate::vcpu_set::VcpuSet;

/// What can be opened at a time whatever the backing: a huge page.
const OPENED: usize = 2 << 20;

struct Guard {
    start: usize,
    end: usize,
    told: EventFd,
    before: libc::sigaction,
}

/// A signal handler has nothing else to find its state by. Set once, by the one VM of this process.
static GUARD: OnceLock<Guard> = OnceLock::new();

/// Ends a VM whose guest has sent a device where nothing is plugged.
pub struct FaultGuard {
    told: EventFd,
    vcpu_set: Arc<VcpuSet>,
}

impl FaultGuard {
    /// Watches the region from now on.
    ///
    /// # Errors
    /// The host refuses an event or the handler, or another region is watched already.
    pub fn watch(region: Region, vcpu_set: Arc<VcpuSet>) -> io::Result<Self> {
        Ok(Self { told: catch(region)?, vcpu_set })
    }
}

impl Subscriber for FaultGuard {
    fn init(&mut self, ops: &mut EventOps) -> EventResult<()> {
        ops.add(Events::new(&self.told, EventSet::IN))
    }

    fn process(&mut self, _: Events, _: &mut EventOps) -> EventResult<()> {
        let _ = self.told.read();
        self.vcpu_set
            .end(Exit::VcpuFailed("its guest sent a device to memory that it has not plugged".into()));
        Ok(())
    }
}

fn catch(region: Region) -> io::Result<EventFd> {
    let told = EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?;
    let mut before = MaybeUninit::uninit();
    // SAFETY: asks for the present handler, into a place of its size.
    if unsafe { libc::sigaction(libc::SIGSEGV, ptr::null(), before.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    let start = region.host as usize;
    let end = start.saturating_add(usize::try_from(region.size.0).unwrap_or(usize::MAX));
    // SAFETY: filled in by the successful call above.
    let before = unsafe { before.assume_init() };
    let guard = Guard { start, end, told: told.try_clone()?, before };
    GUARD.set(guard).map_err(|_| io::Error::from(io::ErrorKind::AlreadyExists))?;
    let handler: extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void) = on_fault;
    // SAFETY: all zeros is a valid sigaction, with an empty mask.
    let mut action: libc::sigaction = unsafe { MaybeUninit::zeroed().assume_init() };
    action.sa_sigaction = handler as usize;
    // On the stack of its own that each thread of Rust has: the fault may be a stack's overflow.
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the handler calls nothing that is not safe in a signal handler.
    if unsafe { libc::sigaction(libc::SIGSEGV, &action, ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(told)
}

extern "C" fn on_fault(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    let Some(guard) = GUARD.get() else { return };
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid one, with an address for SIGSEGV.
    let address = unsafe { (*info).si_addr() } as usize;
    if (guard.start..guard.end).contains(&address) && open(address) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes of a local; write(2) is safe in a signal handler. A full counter is
        // one that tells already.
        let _ = unsafe { libc::write(guard.told.as_raw_fd(), one.as_ptr().cast(), one.len()) };
        return;
    }
    // SAFETY: as the kernel called this handler, with the action that was set before it.
    unsafe { hand_on(&guard.before, signal, info, context) };
}

/// Lets the access at `address` finish.
fn open(address: usize) -> bool {
    let at = ptr::without_provenance_mut(address - address % OPENED);
    // SAFETY: guest memory, in a region that starts and ends at such a boundary; mprotect is a
    // plain system call.
    unsafe { libc::mprotect(at, OPENED, libc::PROT_READ | libc::PROT_WRITE) == 0 }
}

/// A fault elsewhere is whose it was before.
///
/// # Safety
/// To be called from a SIGSEGV handler with what the kernel gave it.
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
    use vm_memory::{Bytes as _, GuestAddress};

    use super::*;
    use crate::config::MemoryOptions;
    use crate::memory::Ram;

    /// The one test in this process that sets the handler.
    #[test]
    fn an_access_to_closed_memory_finishes_and_is_told() {
        let ram = Ram::with_pluggable(Bytes::mib(64), Bytes::mib(128), MemoryOptions::default())
            .expect("address space");
        let region = ram.pluggable().expect("asked for").region();
        let told = catch(region).expect("a handler");
        assert!(told.read().is_err(), "nothing has happened");
        let inside = GuestAddress(region.guest.0 + (5 << 20));
        ram.guest().write_obj(7u8, inside).expect("in the region");
        assert_eq!(told.read().expect("told"), 1);
        assert_eq!(ram.guest().read_obj::<u8>(inside).expect("in the region"), 7);
        assert!(catch(region).is_err(), "there is one VM in a process");
    }
}
