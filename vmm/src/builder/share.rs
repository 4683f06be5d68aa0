//! Connects shared directories.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use devices::virtio::fs::{Fs, Owner, QUEUES, Spare};
use devices::virtio::vhost_user::{FrontEnd, PATIENCE};

use super::virtiofsd::{Program, ShareError, Virtiofsd};
use super::{BuildError, refused};
use crate::config::{ConfigError, DeviceId, ShareOptions};
use crate::helper::{Helper, Words};
use crate::memory::Ram;

/// When those serve that take the place of one that has failed, each from the end of the one before on. All are
/// started before the sandbox closes, as a VM that runs can start no process: they wait, shut in, and are told of the
/// guest's memory only when they are needed.
const SPARES: [Duration; 2] = [Duration::from_secs(1), Duration::from_secs(10)];

/// How long those that a process has started itself may outlive it.
const ENDS_WITHIN: Duration = Duration::from_secs(1);

/// The processes that share one directory: the one that serves, then those that wait.
struct Sharers {
    path: String,
    tag: String,
    processes: VecDeque<(Arc<Helper>, Words)>,
}

impl Owner for Sharers {
    fn lost(&mut self, reason: &str, next: Option<Duration>) -> bool {
        let Some((helper, mut words)) = self.processes.pop_front() else { return true };
        // Before anything else: it has the guest's memory.
        helper.end();
        let said = words.take();
        let is_over = words.end_within(ENDS_WITHIN);
        let then = match next {
            _ if !is_over => "it has left a process behind that does not end".to_owned(),
            None => "its programs get errors until the VM starts anew".to_owned(),
            Some(wait) => format!(
                "its programs get errors, and in {} s it can mount {} again, once it has unmounted it",
                wait.as_secs(),
                self.tag
            ),
        };
        tracing::error!(
            event = "share-lost",
            "the guest has lost the shared directory {}: {reason}; {said}; {then}",
            self.path
        );
        is_over
    }

    fn serves_again(&mut self) {
        tracing::warn!(
            event = "share-back",
            "the directory {} is shared again: the guest has to unmount {tag} and mount it again",
            self.path,
            tag = self.tag
        );
    }
}

/// The device `id`, and the processes that do its work.
pub fn open(id: &DeviceId, options: &ShareOptions, ram: &Ram) -> Result<(Fs, Vec<Arc<Helper>>), BuildError> {
    let memory = ram.shared().map_err(refused("guest memory to be shared"))?;
    let memory = Arc::new(memory.ok_or_else(|| ConfigError::ShareOfPrivate(id.clone()))?);
    let program = Program::find(options)?;
    let mut processes = VecDeque::new();
    // All of them start beside each other.
    let mut start = || -> Result<_, ShareError> {
        let Virtiofsd { socket, helper, words } = program.start()?;
        processes.push_back((Arc::new(helper), words));
        Ok(socket)
    };
    let first = start()?;
    let mut spares = Vec::new();
    for after in SPARES {
        let front_end = FrontEnd::silent(start()?, &memory, QUEUES, PATIENCE);
        spares.push(Spare { front_end: front_end.map_err(refused("a shared directory"))?, after });
    }
    let front_end = FrontEnd::new(first, &memory, QUEUES, PATIENCE).map_err(|error| {
        let said = processes.front_mut().map_or_else(String::new, |(helper, words)| {
            // What it has to say it says before its end.
            helper.end();
            words.take()
        });
        ShareError::Unusable { path: options.path.clone(), reason: error.to_string(), said }
    })?;
    let helpers = processes.iter().map(|(helper, _)| Arc::clone(helper)).collect();
    let tag = options.tag(id).to_owned();
    let sharers = Sharers { path: options.path.display().to_string(), tag: tag.clone(), processes };
    let fs = Fs::new(&tag, front_end, spares, Box::new(sharers)).map_err(refused("a shared directory"))?;
    Ok((fs, helpers))
}
