//! The VMs of one directory, asked again and again over connections that are kept.

use std::collections::HashMap;
use std::path::PathBuf;
use std::time::Duration;

use api::client::{Client, Error};
use api::runtime::{self, RuntimeError};
use api::status::MemoryStatus;
use balancer::driver::FRESH;
use tokio::task::JoinSet;

/// What one VM said of its memory.
pub struct Answer {
    /// The VM's name.
    pub name: String,
    /// What it said, or why it did not.
    pub memory: Result<MemoryStatus, Error>,
}

/// The VMs of one directory.
pub struct Discovery {
    directory: PathBuf,
    patience: Duration,
    /// How long a VM may wait for its guest to report anew.
    wait: Option<Duration>,
    clients: HashMap<String, Client>,
}

impl Discovery {
    /// The VMs in `directory`. All together may take `patience` to answer.
    pub fn new(directory: PathBuf, patience: Duration) -> Self {
        Self { directory, patience, wait: None, clients: HashMap::new() }
    }

    /// Has each guest report anew when it is asked. A VM waits for that for `wait` at most, and then
    /// says what it has.
    pub fn asking_guests(mut self, wait: Duration) -> Self {
        self.wait = Some(wait);
        self
    }

    /// Asks all VMs whose name `wanted` takes, at once; their answers, by name.
    ///
    /// # Errors
    /// Where the directory can't be read.
    pub async fn ask(&mut self, wanted: impl Fn(&str) -> bool) -> Result<Vec<Answer>, RuntimeError> {
        let found = runtime::sockets(&self.directory)?;
        let mut known = std::mem::take(&mut self.clients);
        let mut asked = JoinSet::new();
        for (name, socket) in found.into_iter().filter(|(name, _)| wanted(name)) {
            let kept = known.remove(&name);
            let (patience, wait) = (self.patience, self.wait);
            asked.spawn(async move {
                let mut client = kept.unwrap_or_else(|| Client::new(&socket).with_timeout(patience));
                let memory = match wait {
                    Some(wait) => client.fresh_memory(FRESH, wait).await,
                    None => client.memory().await,
                };
                // One that ended while it was asked took its socket with it.
                let left =
                    matches!(memory, Err(Error::NoSuchVm { .. })) && matches!(socket.try_exists(), Ok(false));
                (client, Answer { name, memory }, left)
            });
        }
        let mut answers = Vec::with_capacity(asked.len());
        for (client, answer, left) in asked.join_all().await {
            if !left {
                self.clients.insert(answer.name.clone(), client);
                answers.push(answer);
            }
        }
        answers.sort_by(|a, b| a.name.cmp(&b.name));
        Ok(answers)
    }

    /// Lets go of all connections until it is asked again.
    pub fn rest(&mut self) {
        self.clients.clear();
    }
}
