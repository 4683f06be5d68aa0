//! A round of the policy allocates nothing once it has seen its VMs. This test has a binary of its
//! own, as it counts every allocation of the process.

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::time::Duration;

use api::guest_memory::GuestMemory;
use api::limits::Limits;
use api::status::DriverState;
use api::units::Bytes;
use balancer::policy::{HostObservation, Observation, Policy, Settings, Stalls, Vm};

thread_local! {
    /// Allocations of this thread: the harness allocates in others.
    static COUNT: Cell<u64> = const { Cell::new(0) };
}

/// The system's allocator, counted.
struct Counting;

// SAFETY: every call goes to the system's allocator as it came; counting allocates nothing, as
// the counter is initialised at compile time and has no destructor.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        // SAFETY: the caller's promises are passed on.
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        COUNT.set(COUNT.get() + 1);
        // SAFETY: the caller's promises are passed on.
        unsafe { System.realloc(block, layout, size) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// A host on which every third VM rises and falls, and memory is short.
fn live(vms: &mut [Vm], second: u64) {
    for vm in vms {
        let rises = vm.id.is_multiple_of(3) && (second / 40 + vm.id).is_multiple_of(2);
        let wants = Bytes::mib(if rises { 900 } else { 300 } + vm.id % 7);
        let observed = &mut vm.observed;
        observed.actual = observed.target;
        observed.guest = Some(GuestMemory {
            age: Duration::from_millis(500),
            spare: observed.actual.saturating_sub(wants),
            ..GuestMemory::default()
        });
        let stalls = observed.stalls.allocation_stalls.unwrap_or(0) + u64::from(wants > observed.actual);
        observed.stalls = Stalls { allocation_stalls: Some(stalls), ..Stalls::default() };
    }
}

#[test]
fn a_round_allocates_nothing() {
    let limits: Limits = "512M,min=256M,max=2G".parse().unwrap();
    let observed = Observation { driver: DriverState::Active, ..Observation::of(limits) };
    let mut vms: Vec<Vm> = (0..60).map(|id| Vm::new(id, Duration::from_secs(1000), observed)).collect();
    let host = HostObservation::of(Bytes::mib(520 * 60));
    let (mut policy, mut decisions) = (Policy::new(Settings::default()), Vec::new());
    let (mut made, mut allocated) = (0, 0);
    for second in 0..600 {
        live(&mut vms, second);
        let before = COUNT.get();
        policy.decide(Duration::from_secs(1000 + second), host, &mut vms, &mut decisions);
        if second >= 300 {
            allocated += COUNT.get() - before;
            made += decisions.len();
        }
        for decision in &decisions {
            vms[decision.vm as usize].observed.target = decision.reason.new;
        }
    }
    assert!(COUNT.get() > 0, "allocations are counted");
    assert!(made > 100, "memory must move, or nothing is tested: {made} decisions");
    assert_eq!(allocated, 0);
}
