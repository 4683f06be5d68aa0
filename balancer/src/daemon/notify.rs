//! Tells systemd how the daemon is doing: sd_notify(3), a few lines over a datagram socket.
//!
//! Without `NOTIFY_SOCKET` nothing is sent.

use std::env;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

use api::service_manager;
use tokio::time::Instant;
use tracing::warn;

/// The connection to the service manager.
#[derive(Debug, Default)]
pub struct Notify {
    to: Option<(UnixDatagram, SocketAddr)>,
    /// How long the manager waits for a sign of life before it kills the daemon.
    watchdog: Option<Duration>,
    pinged: Option<Instant>,
    ready: bool,
}

impl Notify {
    /// As the service manager set `NOTIFY_SOCKET` and `WATCHDOG_USEC`.
    pub fn from_environment() -> Self {
        let Some(path) = env::var_os(service_manager::VARIABLE).filter(|path| !path.is_empty()) else {
            return Self::default();
        };
        let ours = env::var("WATCHDOG_PID").map_or(true, |pid| pid == std::process::id().to_string());
        let watchdog = env::var("WATCHDOG_USEC").ok().filter(|_| ours).and_then(|text| text.parse().ok());
        Self::to(path.as_bytes(), watchdog.map(Duration::from_micros)).unwrap_or_else(|error| {
            warn!("cannot tell the service manager anything: {error}");
            Self::default()
        })
    }

    fn to(path: &[u8], watchdog: Option<Duration>) -> io::Result<Self> {
        let address = service_manager::address(path)?;
        let socket = UnixDatagram::unbound()?;
        // A manager that doesn't read must not stop the rounds.
        socket.set_nonblocking(true)?;
        Ok(Self { to: Some((socket, address)), watchdog, ..Self::default() })
    }

    /// How long the manager waits for a sign of life.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// A round is over: the first one makes the daemon ready, later ones are signs of life.
    pub fn round(&mut self, status: impl FnOnce() -> String) {
        if self.to.is_none() {
            return;
        }
        if !self.ready {
            self.ready = true;
            self.pinged = Some(Instant::now());
            self.send(&format!("READY=1\nWATCHDOG=1\nSTATUS={}", status()));
            return;
        }
        // Half of the time, as sd_watchdog_enabled(3) advises, and once a second at most otherwise.
        let pause = self.watchdog.map_or(Duration::from_secs(10), |watchdog| watchdog / 2);
        if self.pinged.is_none_or(|pinged| pinged.elapsed() >= pause.min(Duration::from_secs(10))) {
            self.pinged = Some(Instant::now());
            self.send(&format!("WATCHDOG=1\nSTATUS={}", status()));
        }
    }

    /// Settings are read anew; [`Notify::reloaded`] follows in any case.
    pub fn reloading(&self) {
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
        let microseconds = i128::from(now.tv_sec) * 1_000_000 + i128::from(now.tv_nsec) / 1000;
        self.send(&format!("RELOADING=1\nMONOTONIC_USEC={microseconds}"));
    }

    /// The daemon goes on, with new settings or the old ones.
    pub fn reloaded(&self) {
        self.send("READY=1");
    }

    pub fn stopping(&self) {
        self.send("STOPPING=1");
    }

    fn send(&self, text: &str) {
        if let Some((socket, address)) = &self.to {
            // A lost message is followed by others; without any the manager acts.
            let _ = socket.send_to_addr(text.as_bytes(), address);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::linux::net::SocketAddrExt;

    use super::*;

    fn heard(listener: &UnixDatagram) -> String {
        let mut buffer = [0; 512];
        let length = listener.recv(&mut buffer).unwrap();
        String::from_utf8_lossy(&buffer[..length]).into_owned()
    }

    #[test]
    fn a_manager_hears_of_every_change() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("notify");
        let listener = UnixDatagram::bind(&path).unwrap();
        let mut notify = Notify::to(path.as_os_str().as_bytes(), Some(Duration::ZERO)).unwrap();
        notify.round(|| "2 VMs".to_owned());
        assert_eq!(heard(&listener), "READY=1\nWATCHDOG=1\nSTATUS=2 VMs");
        notify.round(|| "3 VMs".to_owned());
        assert_eq!(heard(&listener), "WATCHDOG=1\nSTATUS=3 VMs");
        notify.reloading();
        assert!(heard(&listener).starts_with("RELOADING=1\nMONOTONIC_USEC="));
        notify.reloaded();
        assert_eq!(heard(&listener), "READY=1");
        notify.stopping();
        assert_eq!(heard(&listener), "STOPPING=1");
    }

    #[test]
    fn a_sign_of_life_is_sent_twice_in_its_time() {
        let name = format!("ballast-notify-{}", std::process::id());
        let listener =
            UnixDatagram::bind_addr(&SocketAddr::from_abstract_name(name.as_bytes()).unwrap()).unwrap();
        listener.set_nonblocking(true).unwrap();
        let mut notify = Notify::to(format!("@{name}").as_bytes(), Some(Duration::from_secs(3600))).unwrap();
        for _ in 0..5 {
            notify.round(String::new);
        }
        assert!(heard(&listener).starts_with("READY=1"));
        assert!(listener.recv(&mut [0; 8]).is_err(), "one is enough for half an hour");
    }

    #[test]
    fn without_a_manager_nothing_happens() {
        let mut notify = Notify::default();
        notify.round(|| unreachable!("nobody reads it"));
        notify.reloading();
        notify.stopping();
        assert!(Notify::to(b"", None).is_err() || Notify::to(&[b'x'; 200], None).is_err());
    }
}
