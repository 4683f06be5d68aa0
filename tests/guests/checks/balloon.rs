//! Memory that a guest gives up reaches the host, and comes back on first touch.

use std::time::Duration;

use api::units::Bytes;
use lab::Kernel;

use crate::{Vm, VmSettings, images, wait_for};

/// How far the balloon is moved.
pub const MOVE: Bytes = Bytes::mib(256);
/// How long a guest takes to move its balloon so far.
pub const MOVING: Duration = Duration::from_secs(10);
/// How long a guest takes to touch its memory: with shadow paging each page is an exit, and more than one.
pub const TOUCHING: Duration = Duration::from_secs(30);

/// A guest of 640 MiB that has touched nearly all of its memory, so that the host holds it.
pub fn touched(name: &str, kernel: Kernel, arguments: &[&str]) -> Vm {
    let mut vm =
        VmSettings::new(name, &images(kernel), "640M,min=128M", "ballast.console").with(arguments).start();
    vm.wait_until_ready();
    vm.step("grow:440M", TOUCHING);
    vm.step("release", MOVING);
    vm
}

/// Asserts that `change` is [`MOVE`] within 5 %.
pub fn assert_moved(what: &str, change: Bytes) {
    assert!(change >= MOVE.percent(95) && change <= MOVE.percent(105), "{what}: {change} instead of {MOVE}");
}

/// The API's word on resident guest memory, held against the kernel's. The API counts anew
/// every two seconds at most.
pub fn rss(vm: &Vm) -> Bytes {
    wait_for("the API to count what the kernel counts", Duration::from_secs(3), || {
        let (api, kernel) = (vm.memory().host_rss.unwrap(), vm.rss_by_kernel());
        (api.0.abs_diff(kernel.0) <= Bytes::mib(6).0).then_some(kernel)
    })
}

/// Moves the balloon by 256 MiB both ways and sees the host's memory follow.
pub fn inflates_and_deflates(name: &str, kernel: Kernel, arguments: &[&str]) {
    // Without reporting, so that nothing but the balloon moves memory.
    let arguments = [arguments, &["--no-free-page-reporting"]].concat();
    let mut vm = touched(name, kernel, &arguments);
    let before = rss(&vm);

    vm.set_target(Bytes::mib(640) - MOVE);
    vm.wait_for_memory("the balloon to inflate", MOVING, |memory| memory.actual == memory.target);
    let inflated = rss(&vm);
    assert_moved(&format!("{name} inflated"), before.saturating_sub(inflated));

    vm.set_target(Bytes::mib(640));
    vm.wait_for_memory("the balloon to deflate", MOVING, |memory| memory.actual == memory.target);
    vm.step("grow:440M", TOUCHING);
    let deflated = rss(&vm);
    assert_moved(&format!("{name} deflated and touched"), deflated.saturating_sub(inflated));
    vm.step("release", MOVING);

    let counters = vm.memory().counters;
    assert_eq!(counters.inflated, MOVE);
    assert_eq!(counters.deflated, MOVE);
    assert_eq!(counters.discard_failures, 0);
    assert_eq!(counters.malformed, 0);
}

/// What a guest frees goes to the host with nobody asking for it.
pub fn freed_memory_comes_back(kernel: Kernel) {
    let mut vm = VmSettings::new("reporting", &images(kernel), "512M", "ballast.console").start();
    vm.wait_until_ready();
    vm.step("file:128M", MOVING);
    let full = rss(&vm);
    vm.step("remove", MOVING);
    // What is left of free blocks of 2 MiB that are in part in use is not reported.
    let wanted = full.saturating_sub(Bytes::mib(128).percent(75));
    // One chain can report all of it: the memory is gone before the device has counted it.
    let memory = vm.wait_for_memory("reported pages to be given back", MOVING, |memory| {
        memory.host_rss.unwrap() <= wanted && memory.counters.reported >= Bytes::mib(120)
    });
    assert_eq!(memory.target, Bytes::mib(512), "nobody asked for it");
    assert!(rss(&vm) <= wanted + Bytes::mib(6));
}
