//! What no policy can do better than.
//!
//! A guest that waits for nothing needs its demand and what its kernel keeps free. When all guests together
//! need more than the budget, some wait under any policy: at least as many as it takes to do without what is
//! missing, each down to its min. A policy that moved memory at once and knew the future would still have
//! these stalls. A policy that overruns the budget is not bound by this.

use std::time::Duration;

use api::units::Bytes;

use super::guest::{BOOT, LOADING, watermark};
use super::score::Score;
use super::trace::{Series, Trace};
use super::world::{LONGEST_WAIT, WARM_UP};
use super::{STEP, Setup};

/// The least that VMs must wait for memory in this trace, counted as for policies. What faulty VMs need, and
/// what starting VMs need early, is left out.
pub fn bound(trace: &Trace, setup: &Setup) -> Score {
    let budget = setup.host.budget();
    let steps = Duration::from_secs(trace.seconds).as_millis() / STEP.as_millis();
    let mut score = Score::default();
    let mut spared = Vec::new();
    for step in 0..steps as u32 {
        let now = STEP * step;
        if now < WARM_UP {
            continue;
        }
        spared.clear();
        let mut needed = Bytes::ZERO;
        let well = trace.vms.iter().skip(setup.faults.len());
        for series in well.filter(|series| runs(series, now)) {
            let need = need(series, now);
            needed = needed.saturating_add(need);
            spared.push(need.saturating_sub(series.limits.min()));
        }
        score.steps += spared.len() as u64;
        score.stalled += least_stalled(&mut spared, needed.saturating_sub(budget));
    }
    score
}

fn runs(series: &Series, now: Duration) -> bool {
    now >= Duration::from_secs(series.starts) && series.ends.is_none_or(|end| now < Duration::from_secs(end))
}

/// What the guest must have to wait for nothing.
fn need(series: &Series, now: Duration) -> Bytes {
    let mut demand = series.at(now);
    let mut min = series.limits.min();
    if series.starts > 0 {
        let since = now.saturating_sub(Duration::from_secs(series.starts) + LONGEST_WAIT + BOOT);
        demand = demand.min(Bytes(LOADING.0.saturating_mul(since.as_secs())));
        // A VM that waits or boots holds no more than it has touched.
        if since.is_zero() {
            min = Bytes::ZERO;
        }
    }
    // A 128th of all that it has is kept free, which is more than a 128th of its demand.
    let need = demand.saturating_add(watermark(demand)).min(series.limits.max());
    need.max(min)
}

/// The least number of guests that can do without `missing` together.
fn least_stalled(spared: &mut [Bytes], missing: Bytes) -> u64 {
    spared.sort_unstable_by(|a, b| b.cmp(a));
    let mut left = missing;
    let mut stalled = 0;
    for most in spared {
        if left == Bytes::ZERO {
            break;
        }
        left = left.saturating_sub(*most);
        stalled += 1;
    }
    stalled
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::policies::PolicyName;
    use crate::trace::Kind;
    use crate::world;

    #[test]
    fn as_few_wait_as_can_make_up_for_what_is_missing() {
        let mib = |sizes: &[u64]| sizes.iter().map(|&size| Bytes::mib(size)).collect::<Vec<_>>();
        assert_eq!(least_stalled(&mut mib(&[100, 300, 200]), Bytes::ZERO), 0);
        assert_eq!(least_stalled(&mut mib(&[100, 300, 200]), Bytes::mib(300)), 1);
        assert_eq!(least_stalled(&mut mib(&[100, 300, 200]), Bytes::mib(301)), 2);
        assert_eq!(least_stalled(&mut mib(&[100, 300]), Bytes::gib(9)), 2);
    }

    #[test]
    fn no_law_that_keeps_the_budget_passes_the_bound() {
        for (kind, vms) in [(Kind::Steady, 24), (Kind::Peaks, 12), (Kind::Mixed, 18), (Kind::Storm, 30)] {
            let trace = Trace::generate(kind, 3, vms, 900);
            let setup = Setup::default();
            let bound = bound(&trace, &setup);
            for name in PolicyName::ALL {
                let score = world::run(&trace, &setup, &mut *name.make(), &mut |_| ());
                if score.over_budget == 0 {
                    assert!(score.stalled >= bound.stalled, "{name}, {kind}: {score:?} below {bound:?}");
                }
            }
        }
        let trace = Trace::generate(Kind::Steady, 3, 60, 900);
        assert!(bound(&trace, &Setup::default()).stalled > 0);
    }
}
