//! A daemon in a process of its own, which can be killed and whose processor time can be told.
//!
//! It is the program that asks for it, started again: that one calls [`serve`] before anything else.
#![allow(dead_code, reason = "each program uses a part")]

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::client::Client;
use balancer::daemon::{self, Config, LastResort};

/// Every wait is for an event; this is only when to give up.
pub const PATIENCE: Duration = Duration::from_secs(120);

const DIRECTORY: &str = "BALLAST_TEST_DIRECTORY";
const BUDGET: &str = "BALLAST_TEST_BUDGET";
const INTERVAL: &str = "BALLAST_TEST_INTERVAL_MS";
const PAUSES: &str = "BALLAST_TEST_PAUSES";

/// Runs the daemon until it is killed, where [`Daemon`] started this process for that.
pub fn serve() {
    let number = |name| std::env::var(name).ok().and_then(|text| text.parse().ok());
    let (Ok(directory), Some(budget), Some(interval)) =
        (std::env::var(DIRECTORY), number(BUDGET), number(INTERVAL))
    else {
        return;
    };
    tracing_subscriber::fmt().with_writer(std::io::stderr).with_ansi(false).init();
    let mut config = Config {
        directory: Some(directory.into()),
        budget: Some(Bytes(budget)),
        interval: Duration::from_millis(interval),
        ..Config::default()
    };
    if let Ok(pauses) = std::env::var(PAUSES) {
        config.last_resort = if pauses == "1" { LastResort::Pause } else { LastResort::Advise };
        // An emergency that lasts is a minute, and what was done has ten seconds to work.
        config.policy.emergency_dwell = Duration::from_millis(200);
        config.policy.patience = Duration::from_millis(100);
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(daemon::run(config, std::future::pending())).unwrap();
}

/// The process; it is killed when this is dropped.
pub struct Daemon {
    child: Child,
    log: PathBuf,
}

impl Daemon {
    pub fn start(directory: &Path, budget: Bytes, interval: Duration) -> Self {
        Self::start_with(directory, budget, interval, |_| {})
    }

    /// One that comes to its last resort soon, and pauses VMs then, or only advises to.
    pub fn start_hasty(directory: &Path, budget: Bytes, pauses: bool) -> Self {
        Self::start_with(directory, budget, Duration::from_millis(50), |command| {
            command.env(PAUSES, if pauses { "1" } else { "0" });
        })
    }

    /// One that may have so many descriptors, and no more.
    pub fn start_with_descriptors(directory: &Path, budget: Bytes, interval: Duration, most: u32) -> Self {
        Self::start_with(directory, budget, interval, |command| {
            let program = command.get_program().to_owned();
            let arguments: Vec<_> = command.get_args().map(ToOwned::to_owned).collect();
            let settings: Vec<_> = command
                .get_envs()
                .filter_map(|(name, value)| Some((name.to_owned(), value?.to_owned())))
                .collect();
            let limit = format!("ulimit -n {most} && exec \"$0\" \"$@\"");
            let mut limited = Command::new("sh");
            limited.args(["-c", &limit]).arg(program).args(arguments).envs(settings);
            *command = limited;
        })
    }

    fn start_with(
        directory: &Path,
        budget: Bytes,
        interval: Duration,
        change: impl FnOnce(&mut Command),
    ) -> Self {
        let log = directory.join("log");
        let file = File::options().create(true).append(true).open(&log).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command
            .args(["--exact", "the_daemon_process", "--nocapture"])
            .env(DIRECTORY, directory)
            .env(BUDGET, budget.0.to_string())
            .env(INTERVAL, interval.as_millis().to_string());
        change(&mut command);
        command.stdout(Stdio::null()).stderr(file);
        Self { child: command.spawn().unwrap(), log }
    }

    /// As `kill -9`: no word to anyone.
    pub fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub fn log(&self) -> String {
        fs::read_to_string(&self.log).unwrap()
    }

    /// The processor time it has used.
    pub fn busy(&self) -> Duration {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<_> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
        // utime and stime (proc(5)), in hundredths of a second on every Linux.
        let ticks = |index: usize| fields[index].parse::<u64>().unwrap();
        Duration::from_millis((ticks(11) + ticks(12)) * 10)
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub fn client(directory: &Path) -> Client {
    Client::new(directory, PATIENCE)
}

/// How many rounds the daemon has made; 0 while it doesn't answer.
pub async fn rounds(directory: &Path) -> u64 {
    client(directory).state().await.map_or(0, |state| state.rounds)
}

pub async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}
