//! Asks the balancer how everything stands; where none answers, each VM for itself.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::client::{Client, Error};
use api::limits::Limits;
use api::runtime;
use balancer::daemon::client::{Client as Balancer, Error as BalancerError};
use balancer::driver::Kind;
use balancer::host::{HostMemory, MEMINFO};

use super::snapshot::{Condition, Host, Snapshot, Source, Vm};
use crate::discovery::{Answer, Discovery};

/// How long anyone may take to answer: nobody waits for longer than this for a picture.
const PATIENCE: Duration = Duration::from_millis(800);

/// How many pictures a balancer that hangs is left out of, as each try costs [`PATIENCE`].
const REST: u32 = 10;

/// Learns how things stand, again and again.
pub struct Gatherer {
    directory: PathBuf,
    balancer: Balancer,
    /// Pictures that still do without the balancer, and why.
    rest: Option<(u32, String)>,
    vms: Discovery,
    /// The VMs of other VMMs in the last picture: only the balancer knows them.
    foreign: BTreeSet<String>,
}

impl Gatherer {
    /// For the VMs in `directory`.
    pub fn new(directory: PathBuf) -> Self {
        let balancer = Balancer::new(&directory, PATIENCE);
        let vms = Discovery::new(directory.clone(), PATIENCE);
        Self { directory, balancer, rest: None, vms, foreign: BTreeSet::new() }
    }

    /// How things stand now.
    ///
    /// # Errors
    /// A sentence: no directory, or no word of the host's memory.
    pub async fn gather(&mut self) -> Result<Snapshot, String> {
        self.foreign.clear();
        if let Some((pictures, because)) = self.rest.take()
            && pictures > 0
        {
            self.rest = Some((pictures - 1, because.clone()));
            return self.ask_vms(because).await;
        }
        match self.balancer.state().await {
            Ok(state) => {
                let foreign = state.vms.iter().filter(|vm| vm.vmm != Kind::Ballast);
                self.foreign.extend(foreign.map(|vm| vm.name.clone()));
                self.vms.rest();
                Ok(Snapshot::of_balancer(state))
            }
            Err(BalancerError::NotRunning { .. }) => self.ask_vms("no balancer runs".to_owned()).await,
            Err(error @ BalancerError::NotAnswering) => {
                self.rest = Some((REST, error.to_string()));
                self.ask_vms(error.to_string()).await
            }
            Err(error) => self.ask_vms(error.to_string()).await,
        }
    }

    async fn ask_vms(&mut self, because: String) -> Result<Snapshot, String> {
        let host = HostMemory::read(Path::new(MEMINFO)).map_err(|error| error.to_string())?;
        let answers = self.vms.ask(|_| true).await.map_err(|error| error.to_string())?;
        let vms = answers.into_iter().map(vm).collect();
        let HostMemory { total, available, .. } = host;
        Ok(Snapshot { source: Source::Vms { because }, host: Host { total, available, budget: None }, vms })
    }

    /// Sets new limits; says what came of it.
    pub async fn set_limits(&mut self, name: &str, limits: Limits) -> Result<String, String> {
        if self.foreign.contains(name) {
            self.balancer.set_limits(name, limits).await.map_err(|error| error.to_string())?;
        } else {
            self.vm(name)?.set_limits(limits).await.map_err(|error| error.to_string())?;
        }
        Ok(format!("{name} has new limits: {} to {}", limits.min(), limits.max()))
    }

    /// Pauses a VM that runs, lets one run on that is paused; says which.
    pub async fn pause_or_resume(&mut self, name: &str) -> Result<String, String> {
        if self.foreign.contains(name) {
            return Err(format!("{name} is no VM of ballast: only its own VMM can pause it"));
        }
        let mut vm = self.vm(name)?;
        let done = async {
            if vm.status().await?.state.paused_by().is_some() {
                vm.resume().await?;
                return Ok(format!("{name} runs on"));
            }
            vm.pause().await?;
            Ok(format!("{name} is paused: p lets it run on"))
        };
        done.await.map_err(|error: Error| error.to_string())
    }

    fn vm(&self, name: &str) -> Result<Client, String> {
        let socket = runtime::socket_in(&self.directory, name).map_err(|error| error.to_string())?;
        Ok(Client::new(socket))
    }
}

fn vm(Answer { name, memory }: Answer) -> Vm {
    let condition = match memory {
        Ok(status) => return Vm::alone(name, &status),
        Err(Error::NoSuchVm { .. }) => Condition::Dead,
        Err(Error::NotAnswering { .. } | Error::Busy { .. } | Error::HungUp { .. }) => {
            Condition::NotAnswering
        }
        Err(
            Error::Nonsense { .. } | Error::NotAllowed { .. } | Error::Unable { .. } | Error::Refused { .. },
        ) => Condition::Unreadable,
    };
    Vm::mute(name, condition)
}
