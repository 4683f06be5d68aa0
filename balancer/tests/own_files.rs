//! The daemon's own files, when somebody removes or replaces them under it.

mod fakes;

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, DaemonError, State};
use fakes::FakeVm;
use rustix::fs::{CWD, FlockOperation, RenameFlags, flock};
use tempfile::TempDir;
use tokio::task::JoinHandle;

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

const LIMITS: &str = "256M,min=128M,max=1G";

type Running = JoinHandle<Result<(), DaemonError>>;

fn start(directory: &Path) -> Running {
    let config = Config {
        directory: Some(directory.to_owned()),
        budget: Some(Bytes::gib(2)),
        interval: Duration::from_millis(50),
        ..Config::default()
    };
    tokio::spawn(daemon::run(config, std::future::pending()))
}

/// A daemon that serves the VMs in a directory `run` of a place that is there as long as it is held.
async fn serving() -> (TempDir, PathBuf, Running) {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("run");
    let daemon = start(&directory);
    until(&directory, "it serves", |state| state.rounds > 0).await;
    (place, directory, daemon)
}

/// What a daemon says that ends by itself.
async fn end_of(daemon: Running) -> DaemonError {
    tokio::time::timeout(PATIENCE, daemon).await.expect("it ends").unwrap().unwrap_err()
}

/// Puts each of two files where the other was, in one step.
fn exchange(one: &Path, other: &Path) {
    rustix::fs::renameat_with(CWD, one, CWD, other, RenameFlags::EXCHANGE).unwrap();
}

/// Waits until the daemon answers at its socket with this.
async fn until(directory: &Path, what: &str, seen: impl Fn(&State) -> bool) {
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            // A new client each time, as a connection outlives the socket's file.
            match Client::new(directory, PATIENCE).state().await {
                Ok(state) if seen(&state) => return,
                _ => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

fn knows(vm: &str) -> impl Fn(&State) -> bool {
    move |state| state.vms.iter().any(|seen| seen.name == vm && seen.memory.is_some())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().mode() & 0o777
}

#[tokio::test]
async fn a_socket_that_is_removed_or_replaced_is_made_anew() {
    let (place, directory, daemon) = serving().await;
    let socket = daemon::socket_in(&directory);
    fs::remove_file(&socket).unwrap();
    until(&directory, "it serves anew", |state| state.rounds > 0).await;
    assert_eq!(mode(&socket), 0o600);
    // In one step, so that there is no moment without a file.
    let other = place.path().join("other");
    fs::write(&other, "").unwrap();
    fs::rename(&other, &socket).unwrap();
    until(&directory, "it serves anew", |state| state.rounds > 0).await;
    assert!(!daemon.is_finished());
}

#[tokio::test]
async fn a_lock_that_is_removed_is_taken_anew() {
    let (_place, directory, _daemon) = serving().await;
    let lock = directory.join("balancer/lock");
    fs::remove_file(&lock).unwrap();
    let waited = tokio::time::timeout(PATIENCE, async {
        while !fs::File::open(&lock)
            .is_ok_and(|file| flock(&file, FlockOperation::NonBlockingLockExclusive).is_err())
        {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    });
    assert!(waited.await.is_ok(), "nobody holds the lock");
    let second = start(&directory).await.unwrap();
    assert!(matches!(second, Err(DaemonError::AlreadyRunning { .. })), "{second:?}");
    until(&directory, "the first serves", |state| state.rounds > 0).await;
}

#[tokio::test]
async fn a_directory_that_is_removed_is_made_anew_and_watched() {
    let (_place, directory, daemon) = serving().await;
    let vm = FakeVm::start(&directory, "before", LIMITS, Bytes::mib(150));
    until(&directory, "the VM is known", knows("before")).await;
    fs::remove_dir_all(&directory).unwrap();
    until(&directory, "it serves anew", |state| state.rounds > 0).await;
    assert_eq!((mode(&directory), mode(&directory.join("balancer"))), (0o700, 0o700));
    drop(vm);
    let _after = FakeVm::start(&directory, "after", LIMITS, Bytes::mib(150));
    until(&directory, "a VM in the new directory is known", knows("after")).await;
    until(&directory, "the other is not", |state| !knows("before")(state)).await;
    assert!(!daemon.is_finished());
}

#[tokio::test]
async fn a_daemon_whose_place_another_has_taken_ends_and_leaves_that_ones_socket() {
    let (place, directory, daemon) = serving().await;
    // As another daemon would that comes between the removal and the next look. The directory is replaced in one
    // step, so that the first finds all of it at once.
    let new = place.path().join("new");
    fs::create_dir_all(new.join("balancer")).unwrap();
    fs::set_permissions(&new, fs::Permissions::from_mode(0o700)).unwrap();
    let lock = fs::File::create(new.join("balancer/lock")).unwrap();
    flock(&lock, FlockOperation::NonBlockingLockExclusive).unwrap();
    fs::write(new.join("balancer/lock"), "4711\n").unwrap();
    let theirs = new.join("balancer/balancer.sock");
    let _socket = std::os::unix::net::UnixListener::bind(&theirs).unwrap();
    exchange(&new, &directory);
    let error = end_of(daemon).await;
    assert!(matches!(&error, DaemonError::Displaced { pid, .. } if pid == "4711"), "{error}");
    assert!(daemon::socket_in(&directory).exists());
}

#[tokio::test]
async fn a_daemon_without_a_place_ends_and_says_so() {
    let (place, directory, daemon) = serving().await;
    // A file stands where its directory was.
    let file = place.path().join("file");
    fs::write(&file, "").unwrap();
    exchange(&file, &directory);
    let error = end_of(daemon).await;
    assert!(matches!(error, DaemonError::Homeless { .. }), "{error}");
}

#[tokio::test]
async fn a_directory_that_others_can_write_to_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("run");
    fs::create_dir(&directory).unwrap();
    fs::set_permissions(&directory, fs::Permissions::from_mode(0o777)).unwrap();
    let error = start(&directory).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("mode 777"), "{error}");
    assert!(!directory.join("balancer").exists(), "nothing was made in it");
}

#[tokio::test]
async fn promises_that_cannot_be_read_hold_memory_back_until_they_are_over() {
    let place = tempfile::tempdir().unwrap();
    let directory = place.path().join("run");
    let file = directory.join("balancer/reservations.json");
    fs::create_dir_all(file.parent().unwrap()).unwrap();
    for private in [&directory, &directory.join("balancer")] {
        fs::set_permissions(private, fs::Permissions::from_mode(0o700)).unwrap();
    }
    fs::write(&file, "[{\"name\": \"web\", \"si").unwrap();
    // It wants more, and all there is may be promised to others.
    let vm = FakeVm::start(&directory, "needy", LIMITS, Bytes::mib(900));
    let daemon = start(&directory);
    until(&directory, "rounds go on", |state| state.rounds > 10 && knows("needy")(state)).await;
    assert_eq!(vm.state().targets, [], "nothing is given away");
    assert!(file.exists(), "nor is the file lost");
    daemon.abort();
    assert!(daemon.await.unwrap_err().is_cancelled());

    // What was promised an hour ago is over.
    let old = std::time::SystemTime::now() - Duration::from_secs(3600);
    fs::File::options().write(true).open(&file).unwrap().set_modified(old).unwrap();
    let _daemon = start(&directory);
    until(&directory, "it grows", |_| vm.state().memory.target > Bytes::mib(900)).await;
}
