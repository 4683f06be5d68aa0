//! The driver for QEMU against the real program, emulated all the way: no KVM is needed.

use std::path::Path;
use std::time::Duration;

use api::status::DriverState;
use api::units::Bytes;
use balancer::driver::qemu::Qemu as Client;
use balancer::driver::{Driver, Error, Status};
use guests::{Qemu, QemuSettings, images, wait_for};
use lab::Kernel;
use tokio::runtime::{Builder, Runtime};

const HAS: Bytes = Bytes::mib(384);
const MIN: Bytes = Bytes::mib(128);
/// How long an emulated guest takes to boot, or to fill or empty its balloon.
const USUALLY: Duration = Duration::from_secs(30);

fn client(socket: &Path) -> Client {
    let limits = "256M,min=128M".parse().expect("these are limits");
    Client::new("guest", socket, Some(limits)).with_timeout(Duration::from_secs(10))
}

struct Test {
    runtime: Runtime,
    client: Client,
}

impl Test {
    fn report(&mut self) -> Result<Box<Status>, Error> {
        self.runtime.block_on(self.client.report(Duration::ZERO))
    }

    fn set_target(&mut self, target: Bytes) {
        self.runtime.block_on(self.client.set_target(target)).expect("QEMU takes a target");
    }

    fn until(&mut self, what: &str, fits: impl Fn(&Status) -> bool) -> Box<Status> {
        wait_for(what, USUALLY, || {
            let status = self.report().expect("QEMU reports");
            fits(&status).then_some(status)
        })
    }
}

fn has_fresh_report(status: &Status) -> bool {
    status.memory.report.as_ref().is_some_and(|report| report.age_ms < 3000)
}

fn used(status: &Status) -> Bytes {
    status.memory.used().expect("a report tells the use")
}

/// One QEMU for all of it: to boot one takes longest.
#[test]
fn a_stock_guest_in_qemu_is_read_and_moved() {
    let directory = tempfile::tempdir().expect("a directory can be made");
    let operator = directory.path().join("operator.qmp");
    let images = images(Kernel::V6_1);
    let mut qemu = QemuSettings::new("guest", &images, HAS, "ballast.console", directory.path())
        .with(&["-qmp", &format!("unix:{},server=on,wait=off", operator.display())])
        .start();
    wait_for("the sockets", USUALLY, || operator.exists().then_some(()));
    let runtime = Builder::new_current_thread().enable_all().build().expect("a runtime can be made");
    let mut test = Test { runtime, client: client(qemu.socket()) };

    before_its_guest_is_up(&mut test, &qemu);
    qemu.wait_until_ready();
    it_reports(&mut test, &mut qemu);
    it_moves(&mut test, &qemu);
    another_client_waits(&mut test, &qemu);
    a_new_daemon_reads_the_truth(&mut test, &qemu);
    a_pause_is_seen(&mut test, &operator);

    qemu.kill();
    let error = wait_for("the end to be seen", USUALLY, || test.report().err());
    assert!(matches!(error, Error::HungUp { .. }), "{error:?}");
    let error = test.report().expect_err("nobody listens");
    assert!(matches!(error, Error::NoSuchVm { .. }), "{error:?}");
}

fn before_its_guest_is_up(test: &mut Test, qemu: &Qemu) {
    let status = test.report().expect("QEMU answers before its guest does");
    assert_eq!(status.pid, Some(qemu.pid()));
    assert!(status.uptime.is_some_and(|uptime| uptime < Duration::from_secs(600)), "{:?}", status.uptime);
    assert_eq!(status.memory.limits.max(), HAS);
    assert_eq!((status.memory.actual, status.memory.target), (HAS, HAS));
    assert_eq!(status.memory.driver, DriverState::Absent);
    assert_eq!(status.memory.report, None);
    assert!(status.overhead > Bytes::mib(4), "QEMU is large beside its guest: {}", status.overhead);
}

fn it_reports(test: &mut Test, qemu: &mut Qemu) {
    let before = test.until("the first report", has_fresh_report);
    assert_eq!(before.memory.driver, DriverState::Active);
    let report = &before.memory.report.as_ref().expect("it reports").statistics;
    let total = report.total.expect("a Linux guest sends its total");
    assert!(total < HAS && total > Bytes(HAS.0 / 4 * 3), "{total}");
    assert!(report.available.is_some_and(|available| available < total));
    assert!(report.minor_faults.is_some(), "{report:?}");
    assert_eq!(report.oom_kills, None, "Linux 6.1 does not send it");
    // The guest counts no balloon, so that what it uses is small beside what it has.
    assert!(used(&before) < Bytes::mib(120), "{}", used(&before));

    qemu.step("grow:100M", USUALLY);
    let expected = used(&before) + Bytes::mib(90);
    let grown = test.until("a report of the growth", |status| used(status) > expected);
    assert!(used(&grown) < used(&before) + Bytes::mib(130), "{} and {}", used(&before), used(&grown));
    assert_eq!(grown.memory.host_rss, None, "the kernel counts, and no driver");
    qemu.step("release", USUALLY);
    test.until("a report of the release", |status| used(status) < expected);
}

/// What the host holds for a process, in pages.
fn resident_pages(qemu: &Qemu) -> u64 {
    let statm = std::fs::read_to_string(format!("/proc/{}/statm", qemu.pid())).expect("it runs");
    statm.split(' ').nth(1).and_then(|pages| pages.parse().ok()).expect("a number")
}

fn it_moves(test: &mut Test, qemu: &Qemu) {
    let before = resident_pages(qemu);
    test.set_target(Bytes::mib(200));
    let shrunk = test.until("the balloon to fill", |status| status.memory.actual <= Bytes::mib(200));
    assert_eq!(shrunk.memory.target, Bytes::mib(200));
    let after = resident_pages(qemu);
    assert!(after < before, "{after} pages, {before} before");
    test.set_target(Bytes::mib(300));
    test.until("the balloon to empty", |status| status.memory.actual >= Bytes::mib(300));
}

fn another_client_waits(test: &mut Test, qemu: &Qemu) {
    let mut second = client(qemu.socket()).with_timeout(Duration::from_millis(500));
    for _ in 0..2 {
        let error = test.runtime.block_on(second.report(Duration::ZERO)).expect_err("QMP serves one client");
        assert!(matches!(error, Error::Busy { .. }), "{error:?}");
        assert!(error.to_string().contains("one client at a time"), "{error}");
    }
    // When the first one goes, the one that waited is served.
    test.client = client(Path::new("/nowhere.qmp"));
    wait_for("the second client to be served", USUALLY, || {
        test.runtime.block_on(second.report(Duration::ZERO)).ok()
    });
}

fn a_new_daemon_reads_the_truth(test: &mut Test, qemu: &Qemu) {
    test.client = client(qemu.socket());
    let status = wait_for("QEMU to serve the next client", USUALLY, || test.report().ok());
    // QEMU does not tell what it was asked for: what it has is what it is asked for from now on.
    assert_eq!(status.memory.target, status.memory.actual);
    assert!(status.memory.actual <= Bytes::mib(301) && status.memory.actual >= MIN);
    assert!(has_fresh_report(&status), "{:?}", status.memory.report);
}

fn a_pause_is_seen(test: &mut Test, operator: &Path) {
    use std::io::{BufRead, BufReader, Write};
    let mut stream = std::os::unix::net::UnixStream::connect(operator).expect("QEMU listens");
    let mut lines = BufReader::new(stream.try_clone().expect("a socket can be cloned")).lines();
    let mut order = |command: &str| {
        stream.write_all(format!("{{\"execute\":\"{command}\"}}\n").as_bytes()).expect("QEMU reads");
        while !lines.next().expect("QEMU answers").expect("in text").contains("\"return\"") {}
    };
    order("qmp_capabilities");
    order("stop");
    test.until("the pause to be seen", |status| status.memory.driver == DriverState::Silent);
    order("cont");
    test.until("the end of the pause to be seen", |status| status.memory.driver == DriverState::Active);
}
