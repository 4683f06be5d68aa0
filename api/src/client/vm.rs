//! A ballast VM.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::error::Error;
use super::http::{Http, Upgraded};
use super::peer::PeerProcess;
use super::{BALLAST, DEFAULT_TIMEOUT};
use crate::limits::Limits;
use crate::status::{
    CONSOLE_PROTOCOL, MemoryStatus, PauseRequest, Pauser, ResizeRequest, TargetRequest, VSOCK_PROTOCOL,
    VmStatus,
};
use crate::units::Bytes;

/// A client for one VM. Every request may fail as [`Error`] says.
///
/// Keeps one connection open and makes a new one when that broke. Needs a tokio
/// runtime with I/O and time; one thread is enough.
///
/// ```no_run
/// # async fn example() -> Result<(), api::client::Error> {
/// use api::client::Client;
/// let mut vm = Client::new("/run/ballast/web.sock");
/// let memory = vm.memory().await?;
/// println!("{} of {}", memory.actual, memory.limits.max());
/// # Ok(())
/// # }
/// ```
pub struct Client {
    http: Http,
}

impl Client {
    /// A client for the VM whose API listens at `socket`. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { http: Http::new(&BALLAST, socket.into(), DEFAULT_TIMEOUT) }
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

    /// The process at the other end of the last connection, whether it answered or not.
    pub fn process(&self) -> PeerProcess {
        self.http.process()
    }

    /// Gives the connection up; the next request makes another.
    pub fn hang_up(&mut self) {
        self.http.hang_up();
    }

    /// `GET /vm`: what this VM is and where it stands.
    pub async fn status(&mut self) -> Result<VmStatus, Error> {
        self.http.get("/vm").await
    }

    /// `GET /memory`: limits, target, actual, and the guest's last report.
    pub async fn memory(&mut self) -> Result<MemoryStatus, Error> {
        self.http.get("/memory").await
    }

    /// As [`Client::memory`], with a report that is no older than `max_age` where the guest can give one
    /// within `patience`, a second at most. A VM of an older version answers as it always did.
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
    /// [`Error::Refused`] with 409 where no balloon driver runs.
    pub async fn set_target(&mut self, target: Bytes) -> Result<(), Error> {
        self.http.send(Method::PUT, "/memory/target", &TargetRequest { target }).await
    }

    /// `PUT /memory/limits`: what the administrator allows this VM.
    ///
    /// # Errors
    /// [`Error::Refused`] where `max` is larger than the VM's memory map.
    pub async fn set_limits(&mut self, limits: Limits) -> Result<(), Error> {
        self.http.send(Method::PUT, "/memory/limits", &limits).await
    }

    /// `POST /vm/pause`: stops the vCPUs, keeps the memory.
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

    /// `POST /disks/resize`: makes a disk larger while its guest runs.
    ///
    /// # Errors
    /// [`Error::Refused`] where there is no such disk, or it can't grow so.
    pub async fn resize_disk(&mut self, request: &ResizeRequest) -> Result<(), Error> {
        self.http.send(Method::POST, "/disks/resize", request).await
    }

    /// `POST /vm/power-button`: asks the guest to shut down.
    pub async fn power_button(&mut self) -> Result<(), Error> {
        self.http.post("/vm/power-button").await
    }

    /// `POST /vm/shutdown`: ends the VM without asking its guest.
    pub async fn shutdown(&mut self) -> Result<(), Error> {
        self.http.post("/vm/shutdown").await
    }

    /// `GET /vm/console`: the guest's output from its last 64 KiB on, and input for it. `mode` is `watch`, `write` or
    /// `take-over`.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where another client writes, or too many are attached.
    pub async fn console(&mut self, mode: &str) -> Result<Upgraded, Error> {
        self.http.upgrade(&format!("/vm/console?mode={mode}"), CONSOLE_PROTOCOL).await
    }

    /// `GET /vm/vsock`: a stream to the program that listens at `port` of the guest.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where the VM has no socket device, and with 502 where the guest refuses.
    pub async fn vsock(&mut self, port: u32) -> Result<Upgraded, Error> {
        self.http.upgrade(&format!("/vm/vsock?port={port}"), VSOCK_PROTOCOL).await
    }

    /// Any other question that a VM answers: `GET path`.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        self.http.get(path).await
    }

    /// Any other question that takes words: `POST path`. It must do no harm when it is asked twice.
    pub async fn ask<Q: Serialize, T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        question: &Q,
    ) -> Result<T, Error> {
        self.http.ask(path, question).await
    }
}
