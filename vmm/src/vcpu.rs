//! Running a vCPU, from each exit to the next entry.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Buses;
use crate::crew::{Admission, Crew, Kick};
use crate::exit::Exit;

/// One vCPU, on its thread.
pub struct Vcpu {
    /// As KVM knows it.
    pub fd: VcpuFd,
    /// Its number, which is its APIC's identifier.
    pub index: u8,
    /// What its port and memory accesses reach.
    pub buses: Arc<Buses>,
    /// Who stops it.
    pub crew: Arc<Crew>,
}

impl Vcpu {
    /// Runs until the VM ends.
    pub fn run(mut self) {
        let flag = ptr::NonNull::from(&mut self.fd.get_kvm_run().immediate_exit).cast::<AtomicU8>();
        self.crew.set_kick(self.index, Some(Kick::this_thread(flag)));
        let crew = Arc::clone(&self.crew);
        let mut last = 0;
        loop {
            let resumes = match crew.admit(self.index) {
                Admission::Enter { resumes } => resumes,
                Admission::Receive(visit) => {
                    visit(&self.fd);
                    continue;
                }
                Admission::Leave => break,
            };
            if last != 0 && resumes != last {
                // Tells the guest that it stood still, so that its watchdogs keep calm. A guest
                // without kvmclock can't be told, and that is the only error there is.
                let _ = self.fd.kvmclock_ctrl();
            }
            last = resumes;
            let ended = self.run_until_called(flag);
            crew.left();
            if let Some(exit) = ended {
                crew.end(exit);
            }
        }
        crew.set_kick(self.index, None);
    }

    /// From exit to entry, until someone calls this vCPU out or it can't go on.
    fn run_until_called(&mut self, immediate_exit: ptr::NonNull<AtomicU8>) -> Option<Exit> {
        let failed = |why: String| Some(Exit::VcpuFailed(why));
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.buses.read_port(port, data),
                Ok(VcpuExit::IoOut(port, data)) => self.buses.write_port(port, data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.read_memory(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.write_memory(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => return Some(Exit::TripleFault),
                Ok(VcpuExit::FailEntry(reason, cpu)) => {
                    return failed(format!(
                        "the processor refused to enter vCPU {} (hardware reason {reason:#x}, host CPU {cpu}); the host's kernel log says more",
                        self.index
                    ));
                }
                Ok(VcpuExit::InternalError) => return failed(self.internal_error()),
                Ok(VcpuExit::MemoryFault { gpa, .. }) => {
                    return failed(format!("the host has no memory for guest address {gpa:#x}"));
                }
                Ok(VcpuExit::SystemEvent(kind, _)) => return Some(system_event(kind)),
                Ok(other) => return failed(format!("vCPU {} left the guest with {other:?}", self.index)),
                Err(error) if error.errno() == libc::EINTR => {
                    // SAFETY: the flag lies in the mapping that `self.fd` holds.
                    unsafe { immediate_exit.as_ref() }.store(0, Ordering::SeqCst);
                    return None;
                }
                Err(error) if error.errno() == libc::EAGAIN => {}
                Err(error) if error.errno() == libc::EFAULT => {
                    return failed(format!(
                        "the host could not provide memory that vCPU {} touched (out of memory or huge pages, or memory that the guest has not plugged?)",
                        self.index
                    ));
                }
                Err(error) => return failed(format!("KVM_RUN of vCPU {} failed: {error}", self.index)),
            }
        }
    }

    /// KVM_EXIT_INTERNAL_ERROR in words; the numbers are KVM_INTERNAL_ERROR_* of linux/kvm.h.
    fn internal_error(&mut self) -> String {
        let rip = self.fd.get_regs().map_or(0, |regs| regs.rip);
        // SAFETY: for this exit reason KVM has filled in the `internal` part of the union,
        // which is plain numbers.
        let number = unsafe { self.fd.get_kvm_run().__bindgen_anon_1.internal.suberror };
        let what = match number {
            1 => "it met an instruction that its emulator does not know".to_owned(),
            2 => "an exception came up while it delivered another".to_owned(),
            3 => "it could not deliver an interrupt or exception".to_owned(),
            4 => "the processor reported an exit that it does not know".to_owned(),
            other => format!("internal error {other}"),
        };
        format!("{what} (vCPU {}, at address {rip:#x})", self.index)
    }
}

/// KVM_SYSTEM_EVENT_* of linux/kvm.h.
fn system_event(kind: u32) -> Exit {
    match kind {
        1 => Exit::PoweredOff,
        2 => Exit::Reboot,
        3 => Exit::Panicked,
        other => Exit::VcpuFailed(format!("an unknown system event ({other})")),
    }
}
