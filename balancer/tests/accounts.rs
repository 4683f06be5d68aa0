//! Whose word counts for what a VM holds and may hold: the daemon among VMs that lie, hang, or were
//! never heard.

mod fakes;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use api::status::Pauser;
use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, Holder, ReservationRequest, State, VmView};
use balancer::policy::guards::Standing;
use fakes::{FakeVm, Manner};
use tempfile::TempDir;

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

const LIMITS: &str = "256M,min=128M,max=1G";

/// A host whose kernel says what the test wants to hear. All fake VMs run in this very process.
struct HostFiles {
    directory: TempDir,
    kernel: TempDir,
}

impl HostFiles {
    /// One of 8 GiB.
    fn new() -> Self {
        let host = Self { directory: tempfile::tempdir().unwrap(), kernel: tempfile::tempdir().unwrap() };
        fs::create_dir(host.kernel.path().join(std::process::id().to_string())).unwrap();
        host.has_left(Bytes::gib(8));
        host
    }

    fn path(&self) -> &Path {
        self.directory.path()
    }

    fn vm(&self, name: &str, limits: &str, used: Bytes) -> FakeVm {
        FakeVm::start(self.path(), name, limits, used)
    }

    fn write(&self, file: &str, text: &str) -> PathBuf {
        let (new, path) = (self.kernel.path().join("new"), self.kernel.path().join(file));
        fs::write(&new, text).unwrap();
        fs::rename(new, &path).unwrap();
        path
    }

    fn has_left(&self, available: Bytes) {
        let text = format!("MemTotal: {} kB\nMemAvailable: {} kB\n", 8 << 20, available.0 >> 10);
        self.write("meminfo", &text);
    }

    /// The control group of all VMs has this limit.
    fn limits_vms_to(&self, limit: Bytes) {
        self.write(&format!("{}/cgroup", std::process::id()), "0::/vms.slice\n");
        fs::create_dir_all(self.kernel.path().join("groups/vms.slice")).unwrap();
        self.write("groups/vms.slice/memory.max", &format!("{}\n", limit.0));
    }

    fn holds_for_a_vm(&self, held: Bytes) {
        self.holds_in_huge_pages_too(held, Bytes::ZERO);
    }

    fn holds_for_process(&self, pid: u32, held: Bytes) {
        fs::create_dir_all(self.kernel.path().join(pid.to_string())).unwrap();
        self.write(&format!("{pid}/status"), &format!("VmRSS:\t{} kB\n", held.0 >> 10));
    }

    fn holds_in_huge_pages_too(&self, ordinary: Bytes, reserved: Bytes) {
        let text = format!("VmRSS:\t{} kB\nHugetlbPages:\t{} kB\n", ordinary.0 >> 10, reserved.0 >> 10);
        self.write(&format!("{}/status", std::process::id()), &text);
    }

    /// Starts a daemon; without a `budget`, for all of the host but 512 MiB.
    fn balance(&self, budget: Option<Bytes>) {
        let mut config = Config {
            directory: Some(self.path().to_owned()),
            budget,
            interval: Duration::from_millis(50),
            ..Config::default()
        };
        config.sources.meminfo = self.kernel.path().join("meminfo");
        config.sources.processes = self.kernel.path().to_owned();
        config.sources.groups = self.kernel.path().join("groups");
        tokio::spawn(async move { daemon::run(config, std::future::pending()).await.unwrap() });
    }

    async fn until(&self, what: &str, done: impl Fn(&State) -> bool) -> State {
        let waited = tokio::time::timeout(PATIENCE, async {
            loop {
                match Client::new(self.path(), PATIENCE).state().await {
                    Ok(state) if done(&state) => return state,
                    _ => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        });
        waited.await.unwrap_or_else(|_| panic!("gave up waiting until {what}"))
    }

    /// Waits for some more rounds.
    async fn goes_on(&self) -> State {
        let rounds = self.until("there are rounds", |state| state.rounds > 0).await.rounds;
        self.until("rounds go on", |state| state.rounds > rounds + 4).await
    }
}

fn view<'a>(state: &'a State, name: &str) -> Option<&'a VmView> {
    state.vms.iter().find(|vm| vm.name == name)
}

fn charge(state: &State, name: &str) -> Bytes {
    view(state, name).and_then(|vm| vm.memory.as_ref()).map_or(Bytes::ZERO, |memory| memory.charge)
}

const ACTIVATED: &str = "BALLAST_TEST_ACTIVATED";
/// The value of that with which it keeps no connection.
const HANGS_UP: &str = "hangs up";

/// What [`Activated`] runs in a process of its own; without its word there is nothing to do.
#[tokio::test]
async fn the_activated_vm() {
    if std::env::var_os(ACTIVATED).is_none() {
        return;
    }
    let listener = StdListener::from(std::io::stdin().as_fd().try_clone_to_owned().unwrap());
    listener.set_nonblocking(true).unwrap();
    let listener = tokio::net::UnixListener::from_std(listener).unwrap();
    let vm = FakeVm::listening(listener, PathBuf::from("/nowhere"), "activated", LIMITS, Bytes::mib(100));
    vm.state().memory.host_rss = None;
    if std::env::var(ACTIVATED).unwrap() == HANGS_UP {
        vm.state().manner = Manner::OneAnswerAConnection;
    }
    std::future::pending::<()>().await;
}

/// A VM in a process of its own, on a socket that this one made, as a service manager does.
struct Activated(Child);

impl Activated {
    fn start(directory: &Path) -> Self {
        Self::start_with(directory, "keeps connections")
    }

    fn start_with(directory: &Path, manner: &str) -> Self {
        let listener = StdListener::bind(directory.join("activated.sock")).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "the_activated_vm", "--nocapture"]).env(ACTIVATED, manner);
        command.stdin(OwnedFd::from(listener)).stdout(Stdio::null());
        Self(command.spawn().unwrap())
    }
}

impl Drop for Activated {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[tokio::test]
async fn a_vm_whose_socket_another_process_made_is_counted_once() {
    let host = HostFiles::new();
    host.holds_for_a_vm(Bytes::mib(12));
    let vm = Activated::start(host.path());
    host.holds_for_process(vm.0.id(), Bytes::mib(200));
    host.has_left(Bytes::gib(1));
    host.balance(None);
    let state = host.until("it is known", |state| charge(state, "activated") > Bytes::ZERO).await;
    assert_eq!(state.host.budget, Bytes::mib(200 + 1024 - 512), "{:?}", state.host);
    let memory = view(&state, "activated").unwrap().memory.clone().unwrap();
    assert_eq!((memory.host_rss, memory.holder), (Some(Bytes::mib(200)), Holder::Known));
}

#[tokio::test]
async fn a_vm_whose_socket_was_removed_is_charged_until_its_process_ends() {
    for manner in ["keeps connections", HANGS_UP] {
        let host = HostFiles::new();
        let vm = Activated::start_with(host.path(), manner);
        host.holds_for_process(vm.0.id(), Bytes::mib(200));
        host.balance(Some(Bytes::gib(1)));
        let known = host.until("it is known", |state| charge(state, "activated") > Bytes::ZERO).await;
        fs::remove_file(host.path().join("activated.sock")).unwrap();
        let state = host.goes_on().await;
        assert_eq!(charge(&state, "activated"), charge(&known, "activated"), "{manner}");
        let standing = view(&state, "activated").unwrap().standing;
        assert_eq!(standing == Standing::NotAnswering, manner == HANGS_UP, "{standing:?}");

        // Another VM comes to have its name, and both count.
        let _other = host.vm("activated", LIMITS, Bytes::mib(100));
        let old = format!("activated-{}", vm.0.id());
        let both = |state: &State| [&old, "activated"].iter().all(|name| charge(state, name) > Bytes::ZERO);
        host.until("both are known", both).await;
        let state = host.goes_on().await;
        assert!(both(&state), "{:?}", state.vms);
        assert!(state.host.charged >= charge(&state, &old) + charge(&state, "activated"));
        drop(vm);
        let state = host.until("that is seen", |state| view(state, &old).is_none()).await;
        assert!(charge(&state, "activated") > Bytes::ZERO);
    }
}

#[tokio::test]
async fn a_vm_that_moves_its_socket_is_counted_once() {
    let host = HostFiles::new();
    let vm = Activated::start(host.path());
    host.holds_for_process(vm.0.id(), Bytes::mib(200));
    host.balance(Some(Bytes::gib(1)));
    host.until("it is known", |state| charge(state, "activated") > Bytes::ZERO).await;
    fs::rename(host.path().join("activated.sock"), host.path().join("moved.sock")).unwrap();
    let state = host.until("it is known anew", |state| charge(state, "moved") > Bytes::ZERO).await;
    assert_eq!(view(&state, "activated").map(|_| ()), None);
    let state = host.goes_on().await;
    assert_eq!(state.host.charged, charge(&state, "moved"));
}

#[tokio::test]
async fn a_vm_whose_process_is_not_shown_is_counted_once() {
    let host = HostFiles::new();
    let vm = host.vm("hidden", LIMITS, Bytes::mib(100));
    vm.state().memory.host_rss = None;
    vm.state().follows = false;
    host.has_left(Bytes::gib(1));
    host.balance(None);
    let state = host.until("it is known", |state| charge(state, "hidden") > Bytes::ZERO).await;
    // What it has counts as gone from what the host has left, and is its charge.
    assert_eq!(state.host.budget, Bytes::mib(256 + 1024 - 512), "{:?}", state.host);
    assert_eq!(charge(&state, "hidden"), Bytes::mib(256));
    let memory = view(&state, "hidden").unwrap().memory.clone().unwrap();
    assert_eq!((memory.host_rss, memory.holder), (None, Holder::Hidden));
}

#[tokio::test]
async fn no_vm_makes_memory_by_saying_that_it_holds_much() {
    let host = HostFiles::new();
    let liar = host.vm("liar", LIMITS, Bytes::mib(100));
    liar.state().memory.host_rss = Some(Bytes::gib(1024));
    liar.state().follows = false;
    host.holds_for_a_vm(Bytes::mib(200));
    // Other programs have all of the rest.
    host.has_left(Bytes::gib(1));
    host.balance(None);
    let state = host.until("it is known", |state| charge(state, "liar") > Bytes::ZERO).await;
    assert_eq!(state.host.budget, Bytes::mib(200 + 1024 - 512), "{:?}", state.host);
    assert_eq!(view(&state, "liar").unwrap().memory.as_ref().unwrap().host_rss, Some(Bytes::mib(200)));
}

#[tokio::test]
async fn no_vm_takes_memory_from_others_by_saying_that_it_holds_little() {
    for told in [Some(Bytes::ZERO), None] {
        let host = HostFiles::new();
        let liar = host.vm("liar", "1G,min=128M,max=1G", Bytes::mib(100));
        liar.state().memory.host_rss = told;
        liar.state().follows = false;
        host.holds_for_a_vm(Bytes::mib(1024));
        host.has_left(Bytes::gib(1));
        host.balance(None);
        let state = host.until("it is known", |state| charge(state, "liar") > Bytes::ZERO).await;
        let least = Bytes::mib(1024 - 64 + 1024 - 512);
        assert!(state.host.budget >= least, "{told:?}: {} is less than {least}", state.host.budget);
    }
}

#[tokio::test]
async fn a_vm_that_says_that_it_is_paused_is_charged_what_the_kernel_holds() {
    let host = HostFiles::new();
    let liar = host.vm("liar", "1G,min=128M,max=2G", Bytes::mib(800));
    {
        let memory = &mut liar.state().memory;
        (memory.paused_by, memory.host_rss) = (Some(Pauser::Balancer), Some(Bytes::ZERO));
    }
    host.holds_for_a_vm(Bytes::mib(700));
    // Too little to resume it.
    host.balance(Some(Bytes::mib(900)));
    let paused = |state: &State| view(state, "liar").is_some_and(|vm| vm.standing == Standing::Paused);
    let state = host.until("it is known", paused).await;
    assert_eq!(charge(&state, "liar"), Bytes::mib(700 - 64));
    host.holds_for_a_vm(Bytes::mib(900));
    let state = host.until("it is found to run", |state| !paused(state)).await;
    assert_eq!(charge(&state, "liar"), Bytes::gib(1), "all that it may touch");
}

#[tokio::test]
async fn no_vm_is_given_more_than_its_control_group_allows() {
    let host = HostFiles::new();
    let vm = host.vm("web", LIMITS, Bytes::mib(900));
    host.holds_for_a_vm(Bytes::mib(250));
    host.limits_vms_to(Bytes::mib(512));
    let allowed = Bytes::mib(512).saturating_sub(Bytes::mib(512).percent(3));
    host.balance(Some(Bytes::gib(4)));
    host.until("it is given all that it may have", |_| vm.state().memory.target == allowed.page_floor())
        .await;
    let state = host.goes_on().await;
    assert_eq!(vm.state().memory.target, allowed.page_floor());
    let memory = view(&state, "web").and_then(|vm| vm.memory.clone()).unwrap();
    assert_eq!((memory.cgroup_limit, memory.limits.max()), (Some(allowed), Bytes::gib(1)));
    let why = Client::new(host.path(), PATIENCE).why("web").await.unwrap();
    assert!(why.sentence.contains("control group allows"), "{}", why.sentence);
}

#[tokio::test]
async fn a_vm_that_hangs_is_looked_at_through_its_process() {
    let host = HostFiles::new();
    let vm = host.vm("web", "1G,min=1G,max=1G", Bytes::mib(100));
    vm.state().memory.host_rss = Some(Bytes::mib(300));
    host.holds_for_a_vm(Bytes::mib(310));
    host.has_left(Bytes::gib(4));
    host.balance(None);
    let state = host.until("it is known", |state| charge(state, "web") > Bytes::ZERO).await;
    let budget = state.host.budget;
    assert_eq!(budget, Bytes::mib(300 + 4096 - 512));
    vm.state().manner = Manner::Silent;
    host.until("it is silent", |state| view(state, "web").is_some_and(|vm| vm.errors > 0)).await;
    // Its guest goes on touching what is its own.
    host.holds_for_a_vm(Bytes::mib(810));
    host.has_left(Bytes::mib(4096 - 500));
    let held =
        |state: &State| view(state, "web").and_then(|vm| vm.memory.as_ref()).and_then(|vm| vm.host_rss);
    host.until("that is seen", |state| held(state) == Some(Bytes::mib(800))).await;
    let state = host.goes_on().await;
    assert_eq!((state.host.budget, charge(&state, "web")), (budget, Bytes::gib(1)), "nothing changed");
}

#[tokio::test]
async fn a_vm_that_says_it_has_more_than_the_host_takes_nothing_from_the_others() {
    let host = HostFiles::new();
    let liar = host.vm("liar", "1024G", Bytes::gib(1024));
    liar.state().memory.host_rss = Some(Bytes::gib(1024));
    let good = host.vm("good", LIMITS, Bytes::mib(250));
    host.holds_for_a_vm(Bytes::mib(400));
    host.balance(Some(Bytes::mib(1024)));
    let served =
        |state: &State| good.state().memory.target >= Bytes::mib(300) && charge(state, "liar") > Bytes::ZERO;
    let state = host.until("the good one is served", served).await;
    assert_eq!((charge(&state, "liar"), state.host.over), (Bytes::mib(400), Bytes::ZERO));
    // It is charged what it comes to hold, whatever it says.
    host.holds_for_a_vm(Bytes::mib(600));
    host.until("that is seen", |state| charge(state, "liar") == Bytes::mib(600)).await;
}

#[tokio::test]
async fn a_new_daemon_charges_who_is_there_and_does_not_answer() {
    let host = HostFiles::new();
    let hangs = host.vm("hangs", LIMITS, Bytes::mib(100));
    hangs.state().manner = Manner::Silent;
    host.holds_for_a_vm(Bytes::mib(500));
    let needy = host.vm("needy", LIMITS, Bytes::mib(900));
    host.balance(Some(Bytes::mib(1000)));
    let state =
        host.until("it is charged", |state| view(state, "hangs").is_some_and(|vm| vm.held.is_some())).await;
    assert_eq!(view(&state, "hangs").unwrap().held, Some(Bytes::mib(500)));
    let state =
        host.until("the other has what is left", |_| needy.state().memory.target >= Bytes::mib(484)).await;
    assert_eq!((state.host.budget, state.host.over), (Bytes::mib(1000), Bytes::ZERO));
    let state = host.goes_on().await;
    assert!(needy.state().memory.target <= Bytes::mib(500), "{:?}", state.host);
    assert!(state.host.charged > Bytes::mib(900) && state.host.over == Bytes::ZERO, "{:?}", state.host);
    // Once it answers it is charged as any other.
    hangs.state().manner = Manner::Sound;
    host.until("it is heard", |state| charge(state, "hangs") > Bytes::ZERO).await;
}

#[tokio::test]
async fn reserved_huge_pages_are_no_part_of_the_budget() {
    let host = HostFiles::new();
    let huge = host.vm("huge", "4G,min=1G,max=4G", Bytes::gib(1));
    huge.state().memory.host_rss = Some(Bytes::gib(3));
    host.holds_in_huge_pages_too(Bytes::mib(20), Bytes::gib(3));
    host.has_left(Bytes::gib(1));
    host.balance(None);
    let memory = |state: &State| view(state, "huge").and_then(|vm| vm.memory.clone());
    let state = host.until("it is known", |state| memory(state).is_some()).await;
    let known = memory(&state).unwrap();
    assert!(known.reserved_huge_pages, "{known:?}");
    assert_eq!((known.charge, known.overhead), (Bytes::ZERO, Bytes::mib(20)));
    assert_eq!(view(&state, "huge").unwrap().standing, Standing::Static);
    assert_eq!(state.host.charged, Bytes::ZERO);
    // It moves in steps, and may stand as before the VM was known.
    let budget = state.host.budget;
    assert!(budget == Bytes::mib(512) || budget == Bytes::mib(512 - 20), "{budget}");

    let path = host.path();
    let ask = |name: &str, limits: &str, reserved_huge_pages| {
        let (name, limits) = (name.to_owned(), limits.parse().unwrap());
        let wanted =
            ReservationRequest { name, limits, wait_ms: Some(30_000), process: None, reserved_huge_pages };
        async move { Client::new(path, PATIENCE).reserve(&wanted).await }
    };
    assert!(ask("ordinary", "1G", false).await.is_err(), "of ordinary memory there is not so much");
    ask("ordinary", "400M", false).await.unwrap();
    // It needs room for its VMM alone.
    let view = ask("another", "48G", true).await.unwrap();
    assert_eq!((view.granted, view.size), (Bytes::mib(64), Bytes::mib(64)));
    let api_error = ask("third", "48G", true).await.unwrap_err();
    assert!(api_error.to_string().contains("beside its huge pages"), "{api_error}");
    assert!(huge.state().targets.is_empty(), "nobody moved it");
}
