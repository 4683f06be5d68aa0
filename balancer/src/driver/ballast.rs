//! A ballast VM: HTTP/1.1 and JSON over the VM's Unix socket.

use std::path::{Path, PathBuf};
use std::time::Duration;

use api::limits::Limits;
use api::status::{MemoryStatus, PauseRequest, Pauser, TargetRequest, VmStatus};
use api::units::Bytes;
use hyper::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

pub use super::Error;
use super::http::Http;
use super::{Answer, DEFAULT_TIMEOUT, Driver, EventSource, FRESH, Kind, Status};

/// A client for one VM.
///
/// Keeps one connection open and makes a new one when that broke. Needs a tokio
/// runtime with I/O and time; one thread is enough.
///
/// ```no_run
/// # async fn example() -> Result<(), balancer::driver::ballast::Error> {
/// use balancer::driver::ballast::Client;
/// let mut vm = Client::new("/run/ballast/web.sock");
/// let memory = vm.memory().await?;
/// println!("{} of {}", memory.actual, memory.limits.max());
/// # Ok(())
/// # }
/// ```
pub struct Client {
    http: Http,
    /// What it is; asked at first sight and after an error.
    known: Option<Known>,
}

/// What does not change while a process lives.
#[derive(Clone, Copy)]
struct Known {
    pid: u32,
    started: std::time::Instant,
}

/// The body of every refusal.
#[derive(Deserialize)]
struct ErrorBody {
    error: String,
}

fn sentence(body: &[u8]) -> Option<String> {
    serde_json::from_slice(body).ok().map(|body: ErrorBody| body.error)
}

impl Client {
    /// A client for the VM whose API listens at `socket`. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { http: Http::new(Kind::Ballast, socket.into(), DEFAULT_TIMEOUT, sentence), known: None }
    }

    /// The same client with another limit for each request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.http.set_timeout(timeout);
        self
    }

    /// Where the VM listens.
    pub fn socket(&self) -> &Path {
        self.http.socket()
    }

    /// `GET /vm`: what this VM is and where it stands.
    ///
    /// # Errors
    /// See [`Error`]; the same holds for every request.
    pub async fn status(&mut self) -> Result<VmStatus, Error> {
        self.http.get("/vm").await
    }

    /// `GET /memory`: limits, target, actual, and the guest's last report.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn memory(&mut self) -> Result<MemoryStatus, Error> {
        self.http.get("/memory").await
    }

    /// As [`Client::memory`], with a report that is no older than `max_age` where the guest can give one
    /// within `patience`, a second at most. A VM of an older version answers as it always did.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn fresh_memory(
        &mut self,
        max_age: Duration,
        patience: Duration,
    ) -> Result<MemoryStatus, Error> {
        let (max_age, wait) = (max_age.as_millis(), patience.as_millis());
        self.http.get(&format!("/memory?max_age_ms={max_age}&wait_ms={wait}")).await
    }

    /// `PUT /memory/target`: asks the guest to have `target`.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where no balloon driver runs; else see [`Error`].
    pub async fn set_target(&mut self, target: Bytes) -> Result<(), Error> {
        self.http.send(Method::PUT, "/memory/target", &TargetRequest { target }).await
    }

    /// `PUT /memory/limits`: what the administrator allows this VM.
    ///
    /// # Errors
    /// [`Error::Refused`] where `max` is larger than the VM's memory map; else see [`Error`].
    pub async fn set_limits(&mut self, limits: Limits) -> Result<(), Error> {
        self.http.send(Method::PUT, "/memory/limits", &limits).await
    }

    /// `POST /vm/pause`: stops the vCPUs, keeps the memory.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pause(&mut self) -> Result<(), Error> {
        self.http.post("/vm/pause").await
    }

    /// As [`Client::pause`], in the name of `by`.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where the VM does not run, and the pause is not `by`'s to take.
    pub async fn pause_as(&mut self, by: Pauser) -> Result<(), Error> {
        self.http.send(Method::POST, "/vm/pause", &PauseRequest { by }).await
    }

    /// `POST /vm/resume`: lets the vCPUs run again.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resume(&mut self) -> Result<(), Error> {
        self.http.post("/vm/resume").await
    }

    /// As [`Client::resume`], in the name of `by`.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where the pause is not `by`'s to end.
    pub async fn resume_as(&mut self, by: Pauser) -> Result<(), Error> {
        self.http.send(Method::POST, "/vm/resume", &PauseRequest { by }).await
    }

    /// `POST /vm/power-button`: asks the guest to shut down.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn power_button(&mut self) -> Result<(), Error> {
        self.http.post_once("/vm/power-button").await
    }

    /// `POST /vm/shutdown`: ends the VM without asking its guest.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn shutdown(&mut self) -> Result<(), Error> {
        self.http.post("/vm/shutdown").await
    }

    /// Any other question that a VM answers: `GET path`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        self.http.get(path).await
    }

    /// Any other question that takes words: `POST path`. It must do no harm when it is asked twice.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn ask<Q: Serialize, T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        question: &Q,
    ) -> Result<T, Error> {
        self.http.ask(path, question).await
    }

    async fn stand(&mut self, patience: Duration) -> Result<Box<Status>, Error> {
        // Unknown again where anything fails: another process may take its place.
        let known = match self.known.take() {
            Some(known) => known,
            None => {
                let vm = self.status().await?;
                let uptime = Duration::from_millis(vm.uptime_ms);
                let now = std::time::Instant::now();
                Known { pid: vm.pid, started: now.checked_sub(uptime).unwrap_or(now) }
            }
        };
        let memory = self.fresh_memory(FRESH, patience).await?;
        self.known = Some(known);
        // The VM's own word only where the kernel has none.
        let pid = self.http.pid().or(Some(known.pid));
        let uptime = Some(known.started.elapsed());
        Ok(Box::new(Status { pid, uptime, overhead: Bytes::ZERO, memory }))
    }
}

impl Driver for Client {
    fn socket(&self) -> &Path {
        self.http.socket()
    }

    fn process(&self) -> Option<u32> {
        self.http.pid()
    }

    fn events(&self) -> Option<EventSource> {
        Some(EventSource::new(self.socket().to_owned()))
    }

    fn report(&mut self, patience: Duration) -> Answer<'_, Box<Status>> {
        Box::pin(self.stand(patience))
    }

    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()> {
        Box::pin(async move {
            let outcome = Client::set_target(self, target).await;
            if outcome.is_err() {
                self.known = None;
            }
            outcome
        })
    }

    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()> {
        Box::pin(Client::set_limits(self, limits))
    }

    fn set_paused(&mut self, paused: bool) -> Option<Answer<'_, ()>> {
        Some(Box::pin(async move {
            if paused {
                self.pause_as(Pauser::Balancer).await
            } else {
                self.resume_as(Pauser::Balancer).await
            }
        }))
    }
}
