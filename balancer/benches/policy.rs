//! What one round of the policy costs a VM: `cargo bench -p balancer`.
//!
//! The throughput that is printed counts VMs: at most 2 us each is the bar at 10,000.

use std::time::Duration;

use api::guest_memory::GuestMemory;
use api::limits::Limits;
use api::status::DriverState;
use api::units::Bytes;
use balancer::policy::{HostObservation, Observation, Policy, Settings, Vm};
use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};

/// A host on which every other VM wants more than it has, and memory is short.
fn vms(count: u64) -> Vec<Vm> {
    (0..count)
        .map(|id| {
            let limits: Limits = "512M,min=256M,max=4G".parse().expect("valid limits");
            let spare = Bytes::mib(if id % 2 == 0 { 10 } else { 300 } + id % 7);
            let observed = Observation {
                host_rss: Some(limits.startup()),
                driver: DriverState::Active,
                guest: Some(GuestMemory { age: Duration::from_millis(500), spare, ..GuestMemory::default() }),
                ..Observation::of(limits)
            };
            Vm::new(id, Duration::from_secs(1000), observed)
        })
        .collect()
}

fn a_round(criterion: &mut Criterion) {
    let mut group = criterion.benchmark_group("a round");
    for count in [10, 1_000, 10_000] {
        let mut vms = vms(count);
        let host = HostObservation::of(Bytes::mib(520 * count));
        let mut policy = Policy::new(Settings::default());
        let mut decisions = Vec::new();
        let mut now = Duration::from_secs(1000);
        group.throughput(Throughput::Elements(count));
        group.bench_with_input(BenchmarkId::from_parameter(count), &count, |bencher, _| {
            bencher.iter(|| {
                now += Duration::from_secs(1);
                policy.decide(now, host, &mut vms, &mut decisions)
            });
        });
    }
    group.finish();
}

criterion_group!(benches, a_round);
criterion_main!(benches);
