//! Running a vCPU, from each exit to the next entry.

use std::ptr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use kvm_bindings::kvm_run;
use kvm_ioctls::{VcpuExit, VcpuFd};

use crate::bus::Buses;
use crate::exit::Exit;
use crate::vcpu_set::{Admission, Kick, VcpuSet};

/// One vCPU, on its thread.
pub struct Vcpu {
    /// As KVM knows it.
    pub fd: VcpuFd,
    /// Its number, which is its APIC's identifier.
    pub index: u8,
    /// What its port and memory accesses reach.
    pub buses: Arc<Buses>,
    /// Who stops it.
    pub vcpu_set: Arc<VcpuSet>,
}

impl Vcpu {
    /// Runs until the VM ends.
    pub fn run(mut self) {
        let shared = ptr::NonNull::from(self.fd.get_kvm_run());
        // SAFETY: the field lies in the mapping that `self.fd` holds.
        let flag = unsafe { ptr::NonNull::from(&mut (*shared.as_ptr()).immediate_exit) }.cast::<AtomicU8>();
        self.vcpu_set.set_kick(self.index, Some(Kick::this_thread(flag)));
        let vcpu_set = Arc::clone(&self.vcpu_set);
        let mut last = 0;
        loop {
            let resumes = match vcpu_set.admit(self.index) {
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
            if let Err(exit) = self.run_until_called(shared, flag) {
                vcpu_set.end(exit);
            }
        }
        vcpu_set.set_kick(self.index, None);
    }

    /// From exit to entry, until someone calls this vCPU out.
    ///
    /// # Errors
    /// How the VM ends, as this vCPU can't go on.
    fn run_until_called(
        &mut self,
        shared: ptr::NonNull<kvm_run>,
        immediate_exit: ptr::NonNull<AtomicU8>,
    ) -> Result<(), Exit> {
        let failed = |why: String| Err(Exit::VcpuFailed(why));
        // Bytes of the port access for which the guest was left.
        // SAFETY: called only for that exit, for which KVM has filled in the `io` part of the union, which is
        // plain numbers; they lie in the mapping that `self.fd` holds.
        let width = || unsafe { (*shared.as_ptr()).__bindgen_anon_1.io.size };
        loop {
            match self.fd.run() {
                Ok(VcpuExit::IoIn(port, data)) => self.buses.read_port(port, width(), data),
                Ok(VcpuExit::IoOut(port, data)) => self.buses.write_port(port, width(), data),
                Ok(VcpuExit::MmioRead(address, data)) => self.buses.read_memory(address, data),
                Ok(VcpuExit::MmioWrite(address, data)) => self.buses.write_memory(address, data),
                Ok(VcpuExit::Intr) => {}
                Ok(VcpuExit::Shutdown) => return Err(Exit::TripleFault),
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
                Ok(VcpuExit::SystemEvent(kind, _)) => return Err(system_event(kind)),
                Ok(other) => return failed(format!("vCPU {} left the guest with {other:?}", self.index)),
                Err(error) if error.errno() == libc::EINTR => {
                    // SAFETY: the flag lies in the mapping that `self.fd` holds.
                    unsafe { immediate_exit.as_ref() }.store(0, Ordering::SeqCst);
                    return Ok(());
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

#[cfg(test)]
mod tests {
    use std::sync::Mutex;
    use std::sync::mpsc::{Sender, channel};
    use std::time::{Duration, Instant};

    use devices::platform::serial::{FirstReader, PORTS, Port};
    use kvm_bindings::kvm_userspace_memory_region;
    use kvm_ioctls::VmFd;
    use vm_device::MutDevicePio;
    use vm_device::bus::{PioAddress, PioAddressOffset, PioRange};
    use vm_device::device_manager::PioManager;
    use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

    use super::*;
    use crate::arch::x86_64::layout::COM1;
    use crate::memory::Ram;
    use crate::vcpu_set::Standing;

    /// A vCPU that runs `code` in real mode from 0x1000 on, with its VM; `None` where there is no KVM.
    fn vcpu(code: &[u8]) -> Option<(VmFd, VcpuFd)> {
        let kvm = crate::kvm::for_tests()?;
        let ram = Ram::new(api::units::Bytes::mib(2), crate::config::MemoryOptions::default()).unwrap();
        vm_memory::Bytes::write_slice(&**ram.guest(), code, vm_memory::GuestAddress(0x1000)).unwrap();
        let vm = kvm.create_vm().unwrap();
        let region = ram.regions()[0];
        let slot = kvm_userspace_memory_region {
            slot: 0,
            flags: 0,
            guest_phys_addr: 0,
            memory_size: region.size.0,
            userspace_addr: region.host as u64,
        };
        // SAFETY: guest RAM, which stays mapped for the life of the process.
        unsafe { vm.set_user_memory_region(slot) }.unwrap();
        let fd = vm.create_vcpu(0).unwrap();
        let mut sregs = fd.get_sregs().unwrap();
        (sregs.cs.base, sregs.cs.selector) = (0, 0);
        fd.set_sregs(&sregs).unwrap();
        let mut regs = fd.get_regs().unwrap();
        (regs.rip, regs.rflags, regs.rax) = (0x1000, 2, 0);
        fd.set_regs(&regs).unwrap();
        Some((vm, fd))
    }

    /// Tells of each write, and how wide it is.
    struct Widths(Sender<usize>);

    impl MutDevicePio for Widths {
        fn pio_read(&mut self, _: PioAddress, _: PioAddressOffset, _: &mut [u8]) {}

        fn pio_write(&mut self, _: PioAddress, _: PioAddressOffset, data: &[u8]) {
            let _ = self.0.send(data.len());
        }
    }

    #[test]
    fn port_accesses_keep_their_width() {
        let code = [
            0xba, 0xf8, 0x0c, // mov dx, 0xcf8
            0x66, 0xef, // out dx, eax
            0xef, // out dx, ax
            0xb9, 0x03, 0x00, // mov cx, 3
            0xf3, 0x6f, // rep outsw
            0xee, // out dx, al
            0xf4, // hlt
        ];
        let Some((_vm, fd)) = vcpu(&code) else { return };
        let (written, output) = channel();
        let mut buses = Buses::default();
        let range = PioRange::new(PioAddress(0xcf8), 4).unwrap();
        buses.devices.register_pio(range, Arc::new(Mutex::new(Widths(written)))).unwrap();
        let vcpu_set = VcpuSet::new(1).unwrap();
        let vcpu = Vcpu { fd, index: 0, buses: Arc::new(buses), vcpu_set: Arc::clone(&vcpu_set) };
        vcpu_set.run();
        vcpu.run();
        assert_eq!(output.try_iter().collect::<Vec<_>>(), [4, 2, 2, 2, 2, 1]);
    }

    #[test]
    fn a_console_that_nobody_reads_keeps_no_vm_from_being_paused() {
        // In real mode, without end: al += 1, and out to the console.
        let code = [0xba, COM1 as u8, (COM1 >> 8) as u8, 0xfe, 0xc0, 0xee, 0xeb, 0xfb];
        let Some((_vm, fd)) = vcpu(&code) else { return };
        let irq = EventFd::new(EFD_NONBLOCK).unwrap();
        let port = Arc::new(Port::new(irq, FirstReader::Present).unwrap());
        let mut buses = Buses::default();
        let range = PioRange::new(PioAddress(COM1), PORTS).unwrap();
        buses.devices.register_pio(range, port.clone()).unwrap();
        let vcpu_set = VcpuSet::new(1).unwrap();
        let vcpu = Vcpu { fd, index: 0, buses: Arc::new(buses), vcpu_set: Arc::clone(&vcpu_set) };
        let thread = std::thread::spawn(move || vcpu.run());
        // A reader that has begun, and hangs.
        let mut chunk = Vec::new();
        vcpu_set.run();
        assert!(port.next_output(&mut chunk));
        let output = || {
            let counts = port.output_counts();
            counts.waiting + counts.lost
        };
        let wait_until = |done: &dyn Fn() -> bool| {
            let begin = Instant::now();
            while !done() {
                assert!(begin.elapsed() < Duration::from_secs(60));
                std::thread::sleep(Duration::from_millis(1));
            }
        };
        wait_until(&|| output() > 10_000);
        vcpu_set.hold();
        wait_until(&|| vcpu_set.standing() == Standing::Held);
        let before = output();
        std::thread::sleep(Duration::from_millis(50));
        assert_eq!(output(), before, "the guest goes on while its VM is paused");
        vcpu_set.run();
        wait_until(&|| output() > before);
        vcpu_set.end(Exit::Stopped);
        thread.join().unwrap();
    }
}
