//! The micro-VM's vCPUs: each on its thread, from doorbell to doorbell, all of them beginning a round together.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use kvm_ioctls::{VcpuExit, VcpuFd};
use vm_memory::{Bytes as _, GuestAddress, GuestMemoryMmap};
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

use super::code::{self, Params};
use super::failure::{Failure, memory_error};
use super::layout::CODE;
use crate::counters::pmu::{Pmu, Walks, Whose};
use crate::counters::{Counters, Counts};
use crate::host::KernelMemory;

/// One measured round of all vCPUs.
#[derive(Clone, Debug, Default)]
pub struct Round {
    /// Host clock from the first vCPU's start to the last one's end.
    pub elapsed: Duration,
    /// Guest time-stamp counter ticks of the slowest vCPU, where they were taken.
    pub ticks: Option<u64>,
    /// The vCPUs' statistics of this round, added up.
    pub vcpus: Counts,
    /// The virtual machine's statistics at the end of the round.
    pub vm: Counts,
    /// What the host's kernel holds more than before the machine was made, at the end of the round.
    pub kernel: KernelMemory,
    /// Page walks, where the processor's counters can be read.
    pub walks: Walks,
    /// How much of the data lies in the host's huge pages, from 0 to 1, at the end of the last round.
    pub huge: Option<f64>,
}

/// Keeps this thread on the CPU on which it runs: two machines that take turns must share a TLB.
fn stay() {
    // SAFETY: a zeroed set is an empty one; the kernel only reads it.
    unsafe {
        let cpu = libc::sched_getcpu();
        if let Ok(cpu) = usize::try_from(cpu) {
            let mut set: libc::cpu_set_t = std::mem::zeroed();
            libc::CPU_SET(cpu, &mut set);
            libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set);
        }
    }
}

/// A signal that only interrupts `KVM_RUN`.
pub(super) fn install_kick() -> Result<(), Failure> {
    extern "C" fn nothing(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {}
    register_signal_handler(SIGRTMIN(), nothing)
        .map_err(|e| Failure::Unexpected(format!("no handler for the watchdog's signal: {e}")))
}

/// Which round, when this vCPU began it, and what came of it.
pub(super) type Report = Result<(usize, Instant, Round), Failure>;

/// Waits for every vCPU's rounds and puts them together.
pub(super) fn collect(
    receive: &Receiver<Report>,
    rounds: usize,
    vcpus: usize,
    limit: Duration,
    stop: &AtomicBool,
) -> Result<Vec<Round>, Failure> {
    let deadline = Instant::now() + limit;
    let mut all = vec![Round::default(); rounds];
    // From the first vCPU's start to the last one's end: they need not run at the same time.
    let mut spans: Vec<Option<(Instant, Instant)>> = vec![None; rounds];
    let mut missing = rounds * vcpus;
    while missing > 0 {
        if stop.load(Ordering::SeqCst) {
            return Err(Failure::Interrupted);
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Failure::Hung(limit));
        }
        let (number, begin, part) = match receive.recv_timeout(left.min(Duration::from_millis(100))) {
            Ok(report) => report?,
            Err(RecvTimeoutError::Timeout) => continue,
            Err(RecvTimeoutError::Disconnected) => return Err(Failure::Thread),
        };
        let (Some(whole), Some(span)) = (all.get_mut(number), spans.get_mut(number)) else {
            return Err(Failure::Thread);
        };
        whole.vcpus.add(&part.vcpus);
        whole.vm.add(&part.vm);
        // Every vCPU has its own.
        whole.walks = if span.is_none() { part.walks } else { whole.walks.and(part.walks) };
        let end = begin + part.elapsed;
        let (first, last) = span.map_or((begin, end), |(first, last)| (first.min(begin), last.max(end)));
        *span = Some((first, last));
        whole.elapsed = last.duration_since(first);
        whole.ticks = whole.ticks.max(part.ticks);
        if part.kernel != KernelMemory::default() {
            whole.kernel = part.kernel;
        }
        missing -= 1;
    }
    Ok(all)
}

/// Ends the vCPUs' threads, which may be inside the guest.
pub(super) fn end(threads: Vec<JoinHandle<()>>, shared: &Shared) {
    for thread in threads {
        shared.gate.notify_all();
        // A signal that comes just before KVM_RUN is lost: send it until the thread is gone.
        while !thread.is_finished() {
            let _ = thread.kill(SIGRTMIN());
            shared.gate.notify_all();
            std::thread::sleep(Duration::from_millis(1));
        }
        let _ = thread.join();
    }
}

/// What the vCPUs of one machine share: a gate at which a round begins together.
pub(super) struct Shared {
    pub(super) stop: AtomicBool,
    vcpus: usize,
    /// vCPUs at the gate, and how often it has opened.
    waiting: Mutex<(usize, u64)>,
    pub(super) gate: Condvar,
}

impl Shared {
    pub(super) fn new(vcpus: usize) -> Self {
        Self { stop: AtomicBool::new(false), vcpus, waiting: Mutex::new((0, 0)), gate: Condvar::new() }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    /// Waits for all vCPUs; false where the run was stopped meanwhile.
    fn pass(&self) -> bool {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.0 += 1;
        if waiting.0 == self.vcpus {
            *waiting = (0, waiting.1 + 1);
            self.gate.notify_all();
            return !self.stopped();
        }
        let opened = waiting.1;
        while waiting.1 == opened && !self.stopped() {
            waiting = self.gate.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
        !self.stopped()
    }
}

/// One vCPU on its thread.
pub(super) struct Vcpu {
    pub(super) fd: VcpuFd,
    /// Another machine's, which gets a turn at each ring for it.
    pub(super) other: Option<VcpuFd>,
    pub(super) counters: Counters,
    /// The machine's counters and the kernel's memory before it: one of the vCPUs reads them.
    pub(super) machine: Option<(Counters, KernelMemory)>,
    pub(super) shared: Arc<Shared>,
    pub(super) memory: GuestMemoryMmap,
    pub(super) params: u64,
    pub(super) ticks: bool,
    pub(super) report: Sender<Report>,
}

impl Vcpu {
    pub(super) fn run(mut self, rounds: usize) {
        if self.other.is_some() {
            stay();
        }
        // Why there are none the run says once, for all machines.
        let mut pmu = Pmu::of_this_thread(Whose::Guest).ok();
        for number in 0..rounds {
            match self.round(pmu.as_mut()) {
                Ok(Some((begin, round))) => {
                    let _ = self.report.send(Ok((number, begin, round)));
                }
                Ok(None) => return,
                Err(failure) => {
                    let _ = self.report.send(Err(failure));
                    return;
                }
            }
        }
    }

    /// To the start doorbell, through the gate, and to the end doorbell; `None` where it was stopped.
    fn round(&mut self, mut pmu: Option<&mut Pmu>) -> Result<Option<(Instant, Round)>, Failure> {
        if !self.until(code::BEGIN)? || !self.shared.pass() {
            return Ok(None);
        }
        let before = self.counters.read()?;
        if let Some(pmu) = &mut pmu {
            pmu.start();
        }
        let start = Instant::now();
        if !self.until(code::END)? {
            return Ok(None);
        }
        let elapsed = start.elapsed();
        let walks = pmu.map(Pmu::stop).unwrap_or_default();
        let vcpus = self.counters.read()?.since(&before);
        let (vm, kernel) = match &self.machine {
            Some((counters, earlier)) => (counters.read()?, KernelMemory::now().since(*earlier)),
            None => Default::default(),
        };
        let at = GuestAddress(self.params + std::mem::offset_of!(Params, ticks) as u64);
        let ticks = self.memory.read_obj(at).map_err(memory_error)?;
        let ticks = self.ticks.then_some(ticks);
        Ok(Some((start, Round { elapsed, ticks, vcpus, vm, kernel, walks, huge: None })))
    }

    /// Runs the guest until it rings `phase`; false where it was stopped.
    fn until(&mut self, phase: u8) -> Result<bool, Failure> {
        loop {
            if self.shared.stopped() {
                return Ok(false);
            }
            let other = match self.fd.run() {
                Ok(VcpuExit::IoOut(code::DOORBELL, [rung])) if *rung == phase => return Ok(true),
                Ok(VcpuExit::IoOut(code::DOORBELL, [code::SWITCH])) => {
                    self.turn()?;
                    continue;
                }
                Ok(VcpuExit::Intr) => continue,
                Ok(VcpuExit::Shutdown) => return Err(Failure::TripleFault),
                Ok(VcpuExit::InternalError) => return Err(self.emulator()),
                Ok(other) => format!("{other:?}"),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => continue,
                Err(source) => return Err(Failure::Kvm { what: "run the guest", source }),
            };
            return Err(Failure::Unexpected(other));
        }
    }

    /// Runs the other machine, where there is one, for one lap.
    fn turn(&mut self) -> Result<(), Failure> {
        let Some(other) = &mut self.other else { return Ok(()) };
        while !self.shared.stopped() {
            match other.run() {
                Ok(VcpuExit::IoOut(code::DOORBELL, [code::SWITCH])) => return Ok(()),
                Ok(VcpuExit::IoOut(code::DOORBELL, _) | VcpuExit::Intr) => {}
                Ok(exit) => return Err(Failure::Unexpected(format!("the other machine: {exit:?}"))),
                Err(error) if [libc::EINTR, libc::EAGAIN].contains(&error.errno()) => {}
                Err(source) => return Err(Failure::Kvm { what: "run the other machine", source }),
            }
        }
        Ok(())
    }

    fn emulator(&self) -> Failure {
        let Ok(regs) = self.fd.get_regs() else {
            return Failure::Unexpected("an internal error of KVM".into());
        };
        let mut bytes = [0; 8];
        let _ = self.memory.read_slice(&mut bytes, GuestAddress(regs.rip));
        let bytes = bytes.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ");
        Failure::Emulator { offset: regs.rip.wrapping_sub(CODE), bytes }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc::channel;

    #[test]
    fn a_round_lasts_from_the_first_start_to_the_last_end() {
        let (send, receive) = channel();
        let begin = Instant::now();
        // Two vCPUs that had one processor between them: one after the other.
        for (after, walks) in [(10, 1), (0, 2)] {
            let round = Round {
                elapsed: Duration::from_millis(10),
                walks: Walks { cycles: None, count: Some(walks) },
                ..Round::default()
            };
            send.send(Ok((0, begin + Duration::from_millis(after), round))).expect("sent");
        }
        let stop = AtomicBool::new(false);
        let rounds = collect(&receive, 1, 2, Duration::from_secs(5), &stop).expect("both are there");
        assert_eq!(rounds[0].elapsed, Duration::from_millis(20));
        assert_eq!(rounds[0].walks.count, Some(3));
    }
}
