//! A ballast VM, over its API.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::client::{Client, EventSource, PeerProcess};
use api::limits::Limits;
use api::status::Pauser;
use api::units::Bytes;

use super::{Answer, Driver, Error, FRESH, Status};

/// A way to one VM of ballast.
pub struct Ballast {
    client: Client,
    /// What it is; asked at the first report and after an error.
    known: Option<Known>,
}

/// What does not change while a process lives.
#[derive(Clone, Copy)]
struct Known {
    pid: u32,
    started: Instant,
}

impl Ballast {
    /// The VM whose API listens at `socket`. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { client: Client::new(socket), known: None }
    }

    async fn stand(&mut self, patience: Duration) -> Result<Box<Status>, Error> {
        // Unknown again if anything fails: another process may take its place.
        let known = match self.known.take() {
            Some(known) => known,
            None => {
                let vm = self.client.status().await?;
                let uptime = Duration::from_millis(vm.uptime_ms);
                let now = Instant::now();
                Known { pid: vm.pid, started: now.checked_sub(uptime).unwrap_or(now) }
            }
        };
        let memory = self.client.fresh_memory(FRESH, patience).await?;
        self.known = Some(known);
        // The VM's own word counts only if the kernel has none.
        let pid = self.client.process().pid().or(Some(known.pid));
        let uptime = Some(known.started.elapsed());
        Ok(Box::new(Status { pid, uptime, overhead: Bytes::ZERO, memory }))
    }
}

impl Driver for Ballast {
    fn process(&self) -> PeerProcess {
        self.client.process()
    }

    fn hang_up(&mut self) {
        self.client.hang_up();
    }

    fn events(&self) -> Option<EventSource> {
        Some(EventSource::new(self.client.socket().to_owned()))
    }

    fn report(&mut self, patience: Duration) -> Answer<'_, Box<Status>> {
        Box::pin(self.stand(patience))
    }

    fn set_target(&mut self, target: Bytes) -> Answer<'_, ()> {
        Box::pin(async move {
            let outcome = self.client.set_target(target).await;
            if outcome.is_err() {
                self.known = None;
            }
            outcome
        })
    }

    fn set_limits(&mut self, limits: Limits) -> Answer<'_, ()> {
        Box::pin(self.client.set_limits(limits))
    }

    fn set_paused(&mut self, paused: bool) -> Option<Answer<'_, ()>> {
        Some(Box::pin(async move {
            if paused {
                self.client.pause_as(Pauser::Balancer).await
            } else {
                self.client.resume_as(Pauser::Balancer).await
            }
        }))
    }
}
