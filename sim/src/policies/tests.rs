use super::*;

fn vm(id: usize, actual: u64, used: u64) -> VmInput {
    let limits: Limits = "2G,min=512M,max=8G".parse().unwrap();
    let (actual, used) = (Bytes::mib(actual), Bytes::mib(used));
    let spare = actual.saturating_sub(used);
    let report = Report {
        taken: Duration::ZERO,
        total: actual,
        available: spare,
        free: spare,
        committed: used,
        stalls: 0,
    };
    VmInput {
        id,
        limits,
        target: actual,
        actual,
        unmanaged: Bytes::ZERO,
        most: limits.max(),
        allowed: None,
        resident: used,
        hidden: false,
        driver: true,
        answers: true,
        uptime: Duration::from_secs(1000),
        report: Some(report),
    }
}

fn view(now: u64, budget: u64, vms: &[VmInput]) -> PolicyInput<'_> {
    PolicyInput { now: Duration::from_secs(now), budget: Bytes::mib(budget), reserved: Bytes::ZERO, vms }
}

fn target(policy: &mut dyn MemoryPolicy, view: &PolicyInput, id: usize) -> Option<u64> {
    let mut targets = Vec::new();
    policy.decide(view, &mut targets);
    targets.iter().rev().find(|target| target.0 == id).map(|target| target.1.0 >> 20)
}

#[test]
fn filling_gives_all_there_is_and_no_more() {
    let mib = Bytes::mib;
    let given = fill(mib(1000), &[(mib(100), mib(200), 1), (mib(100), mib(900), 1), (mib(50), mib(900), 2)]);
    assert_eq!(given[0], mib(200));
    assert!(given.iter().copied().sum::<Bytes>() <= mib(1000));
    assert!(given.iter().copied().sum::<Bytes>() > mib(999));
    assert_eq!((given[2] - mib(50)).0 / (1 << 20), (given[1] - mib(100)).0 * 2 / (1 << 20));
}

#[test]
fn static_divides_by_size_and_then_rests() {
    let vms = [vm(0, 2048, 1000), vm(1, 2048, 1000)];
    let mut policy = fixed::Static::default();
    assert_eq!(target(&mut policy, &view(0, 6144, &vms), 0), Some(3072));
    assert_eq!(target(&mut policy, &view(1, 6144, &vms), 0), None);
}

#[test]
fn hyperv_gives_what_is_committed_and_a_buffer_and_less_to_all_when_short() {
    let vms = [vm(0, 2048, 1000), vm(1, 2048, 3000)];
    let mut policy = hyperv::HyperV::default();
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 1), Some(3600));
    assert_eq!(target(&mut policy, &view(0, 4500, &vms), 0), Some(1200));
    let short = target(&mut policy, &view(0, 4096, &vms), 1).unwrap();
    assert!((2800..3000).contains(&short), "{short}");
    assert_eq!(hyperv::floor(Bytes::gib(4)), Bytes::mib(488));
}

#[test]
fn hyperv_takes_what_is_needed_at_once_and_else_after_five_minutes() {
    let mut policy = hyperv::HyperV::default();
    let idle = [vm(0, 4096, 1000)];
    assert_eq!(target(&mut policy, &view(0, 65536, &idle), 0), None);
    assert_eq!(target(&mut policy, &view(299, 65536, &idle), 0), None);
    assert_eq!(target(&mut policy, &view(300, 65536, &idle), 0), Some(1200));
    let both = [vm(0, 4096, 1000), vm(1, 2048, 3000)];
    assert_eq!(target(&mut policy, &view(301, 65536, &both), 0), None);
    assert_eq!(target(&mut policy, &view(302, 5000, &both), 0), Some(1200));
    // Some guests commit little and use much.
    let mut frugal = vm(0, 1024, 1000);
    frugal.report.as_mut().unwrap().committed = Bytes::mib(7);
    assert_eq!(target(&mut policy, &view(303, 65536, &[frugal]), 0), Some(1200));
}

#[test]
fn who_starts_holds_no_more_than_it_was_given() {
    let mut starting = vm(0, 8192, 0);
    (starting.driver, starting.target, starting.uptime) = (false, Bytes::gib(2), Duration::from_secs(5));
    assert_eq!(starting.held(), Bytes::gib(2));
    starting.uptime = Duration::from_secs(500);
    assert_eq!(starting.held(), Bytes::gib(8));
}

#[test]
fn esxi_holds_nobody_back_until_it_is_short_and_then_taxes_the_idle() {
    let mut policy = esxi::Esxi::default();
    let idle_and_busy = [vm(0, 4096, 600), vm(1, 4096, 3800)];
    assert_eq!(target(&mut policy, &view(0, 65536, &idle_and_busy), 0), Some(8192));
    let view = view(5, 8192, &idle_and_busy);
    let (idle, busy) = (target(&mut policy, &view, 0).unwrap(), target(&mut policy, &view, 1).unwrap());
    assert!(idle < busy && idle >= 8192 * 35 / 100, "{idle} {busy}");
    assert!(idle + busy <= 8192);
}

#[test]
fn selfballoon_goes_up_at_once_and_down_an_eighth() {
    let mut policy = selfballoon::Selfballoon;
    let vms = [vm(0, 4608, 0), vm(1, 1024, 2000)];
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 0), Some(4608 - (4608 - 512) / 8));
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 1), Some(2000 + 512));
}

#[test]
fn mom_waits_for_ten_samples_grows_to_use_and_a_fifth_and_shrinks_by_a_twentieth() {
    let mut policy = mom::Mom::default();
    let vms = [vm(0, 2048, 2000), vm(1, 4096, 100)];
    for second in 0..9 {
        assert_eq!(target(&mut policy, &view(second, 65536, &vms), 0), None);
    }
    assert_eq!(target(&mut policy, &view(9, 65536, &vms), 0), Some(2000 + 409));
    let mut policy = mom::Mom::default();
    for second in 0..9 {
        target(&mut policy, &view(second, 2500, &vms), 1);
    }
    assert_eq!(target(&mut policy, &view(9, 2500, &vms), 1), Some(4096 * 95 / 100));
}

#[test]
fn proxmox_moves_a_hundred_mib_a_round_and_the_pressed_first() {
    let mut policy = proxmox::Proxmox;
    let vms = [vm(0, 2048, 2000), vm(1, 2048, 100)];
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 0), Some(2148));
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 1), None, "the comfortable wait");
    assert_eq!(target(&mut policy, &view(0, 2000, &vms), 1), Some(1948), "and pay");
}

#[test]
fn squeezed_puts_all_at_the_same_part_of_their_way_and_leaves_the_stuck_out() {
    let mut policy = squeezed::Squeezed::default();
    let mut vms = [vm(0, 2048, 100), vm(1, 2048, 2000)];
    assert_eq!(target(&mut policy, &view(0, 8192, &vms), 0), Some(4096));
    assert_eq!(target(&mut policy, &view(10, 8192, &vms), 1), Some(4096));
    vms[0].target = Bytes::mib(1024);
    for second in 11..20 {
        target(&mut policy, &view(second, 8192, &vms), 0);
    }
    assert_eq!(target(&mut policy, &view(21, 8192, &vms), 0), None);
    assert_eq!(target(&mut policy, &view(32, 8192, &vms), 1), Some(8192 - 2048));
}

#[test]
fn ours_is_the_policy_and_gives_use_and_a_buffer() {
    let mut policy = ballast::Ballast::default();
    let vms = [vm(0, 1024, 1000)];
    assert_eq!(target(&mut policy, &view(0, 65536, &vms), 0), Some(1200));
}

#[test]
fn words_are_read_back() {
    for name in PolicyName::ALL {
        assert_eq!(name.word().parse::<PolicyName>(), Ok(name));
    }
    assert!("kvm".parse::<PolicyName>().is_err());
}
