//! `ballast ps`.

use std::path::PathBuf;
use std::time::Duration;

use api::agent::AgentStatus;
use api::client::{Client, Error};
use api::limits::Limits;
use api::runtime;
use api::status::{ConsoleStatus, MemoryStatus, Pauser, VmState, VmStatus};
use api::units::Bytes;
use balancer::daemon::client::{Client as Balancer, Error as BalancerError};
use balancer::daemon::{State, VmView};
use balancer::driver::Kind;
use serde::Serialize;
use tokio::task::JoinSet;

use crate::client;
use crate::disk::running::failed;
use crate::failure::Failure;
use crate::{memory, output, sentence, table};

/// How long a VM may take to say how it is.
const PATIENCE: Duration = Duration::from_secs(1);

/// List the VMs of this user with their memory
#[derive(clap::Args)]
#[command(after_help = "\
Columns: LIMITS is min to max; TARGET what the guest was asked to have, ACTUAL what it has, as far
as its kernel manages that; USED what it can't give up without pain, as it says itself; HOST what the host really holds of it, HUGE
the share of that in huge pages; REPORT how long ago the guest last spoke; DRIVER how its balloon
driver does; AGENT the version of the guest's agent. Of VMs in other VMMs it tells what the balancer
knows, and for STATE how they stand with it.")]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
}

#[derive(Serialize)]
struct Row {
    name: String,
    socket: PathBuf,
    #[serde(flatten)]
    answer: Answer,
}

/// What came of asking.
#[derive(Serialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
enum Answer {
    /// It said how it is.
    Full { vm: VmStatus, memory: Box<MemoryStatus> },
    /// Its process is gone; its socket is still there.
    Dead,
    /// Its process is there and says nothing.
    NotAnswering { error: String },
    /// It said something else.
    Failed { error: String },
    /// It runs in another VMM, and the balancer told this of it.
    OfBalancer { view: Box<VmView> },
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let directory = runtime::directory()?;
    let mut rows = client::block_on(async {
        let mut asked = JoinSet::new();
        for (name, socket) in runtime::sockets(&directory)? {
            asked.spawn(ask(name, socket));
        }
        // VMs of other VMMs have no socket here: only the balancer knows them.
        let mut balancer = Balancer::new(&directory, PATIENCE);
        let (mut rows, state) = tokio::join!(asked.join_all(), balancer.state());
        match state {
            Ok(state) => rows.extend(foreign(state)),
            Err(BalancerError::NotRunning { .. }) => {}
            Err(error) => sentence::say(format_args!("VMs of other VMMs are not listed: {error}")),
        }
        Ok(rows)
    })?;
    // One that ended while we asked took its socket with it.
    let gone = |row: &Row| matches!(row.socket.try_exists(), Ok(false));
    rows.retain(|row| !(matches!(row.answer, Answer::Dead) && gone(row)));
    rows.sort_by(|a, b| a.name.cmp(&b.name));
    for row in &rows {
        match &row.answer {
            Answer::Full { .. } | Answer::OfBalancer { .. } => {}
            Answer::Dead => sentence::say(format_args!(
                "the process of {} is gone without a trace but its socket {}: remove that, or start \
                 a VM of that name",
                row.name,
                row.socket.display()
            )),
            Answer::NotAnswering { error } | Answer::Failed { error } => sentence::say(error),
        }
    }
    if args.json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        sentence::say(format_args!("no VMs in {}", directory.display()));
        return Ok(());
    }
    let head = [
        "NAME", "STATE", "CPUS", "LIMITS", "TARGET", "ACTUAL", "USED", "HOST", "HUGE", "REPORT", "DRIVER",
        "AGENT",
    ];
    let cells: Vec<_> = rows.iter().map(cells).collect();
    output::text(&table::render(head, &cells))?;
    for row in &rows {
        if let Answer::Full { memory, .. } = &row.answer
            && memory.plug.is_some_and(|plug| plug.lacks_driver())
        {
            sentence::say(format_args!("{}: {}", row.name, memory::lacks_plug(memory)));
        }
        if let Answer::Full { vm, .. } = &row.answer {
            for disk in &vm.disks {
                if let Some(failure) = &disk.failure {
                    sentence::say(failed(&row.name, &disk.id, failure));
                }
            }
            if let Some(ConsoleStatus { lost: lost @ Bytes(1..), .. }) = vm.console {
                sentence::say(format_args!(
                    "{}: {lost} of its console are lost: nobody read them in time",
                    row.name
                ));
            }
        }
        let (unmanaged, given) = match &row.answer {
            Answer::Full { memory, .. } => (memory.unmanaged(), memory.given.unwrap_or(memory.actual)),
            Answer::OfBalancer { view } => {
                view.memory.as_ref().map_or((Bytes::ZERO, Bytes::ZERO), |memory| {
                    (memory.unmanaged, memory.actual.saturating_add(memory.unmanaged))
                })
            }
            Answer::Dead | Answer::NotAnswering { .. } | Answer::Failed { .. } => continue,
        };
        if unmanaged > Bytes::ZERO {
            sentence::say(format_args!("{}: {}", row.name, memory::unmanaged(unmanaged, given)));
        }
    }
    Ok(())
}

/// The VMs that the balancer knows and that run in another VMM.
fn foreign(state: State) -> impl Iterator<Item = Row> {
    state.vms.into_iter().filter(|vm| vm.vmm != Kind::Ballast).map(|vm| Row {
        name: vm.name.clone(),
        socket: PathBuf::new(),
        answer: Answer::OfBalancer { view: Box::new(vm) },
    })
}

async fn ask(name: String, socket: PathBuf) -> Row {
    let mut vm = Client::new(&socket).with_timeout(PATIENCE);
    let asking = async { Ok((vm.status().await?, vm.memory().await?)) };
    // Two answers in time, not each in time: nobody waits for longer than this for the table.
    let answer = match tokio::time::timeout(PATIENCE, asking).await {
        Ok(Ok((vm, memory))) => Answer::Full { vm, memory: Box::new(memory) },
        Ok(Err(Error::NoSuchVm { .. })) => Answer::Dead,
        Ok(Err(error @ Error::NotAnswering { .. })) => Answer::NotAnswering { error: error.to_string() },
        Ok(Err(error)) => Answer::Failed { error: error.to_string() },
        Err(_) => Answer::NotAnswering {
            error: format!(
                "{name} did not answer within {PATIENCE:?}: its process hangs or this host is overloaded"
            ),
        },
    };
    Row { name, socket, answer }
}

fn cells(row: &Row) -> [String; 12] {
    let (vm, memory) = match &row.answer {
        Answer::Full { vm, memory } => (vm, memory),
        Answer::OfBalancer { view } => return foreign_cells(view),
        Answer::Dead => return without_answer(&row.name, "dead"),
        Answer::NotAnswering { .. } => return without_answer(&row.name, "not answering"),
        Answer::Failed { .. } => return without_answer(&row.name, "unreadable"),
    };
    let used = memory.used();
    let age = memory.report.as_ref().map(|report| format!("{:.1} s", report.age_ms as f64 / 1000.0));
    let none = || "-".to_owned();
    [
        row.name.clone(),
        state(vm.state).to_owned(),
        vm.cpus.to_string(),
        limits(&memory.limits),
        memory.target.to_string(),
        memory.actual.to_string(),
        used.map_or_else(none, |used: Bytes| used.to_string()),
        memory::host_rss(memory.host_rss),
        memory::huge(memory),
        age.unwrap_or_else(none),
        memory::driver(memory.driver).to_owned(),
        agent(memory.agent.as_ref()),
    ]
}

/// The version of an agent that listens.
fn agent(agent: Option<&AgentStatus>) -> String {
    let Some(agent) = agent.filter(|agent| agent.connected) else { return "-".to_owned() };
    agent.version.map_or_else(|| "silent".to_owned(), String::from)
}

fn foreign_cells(vm: &VmView) -> [String; 12] {
    let none = || "-".to_owned();
    let Some(memory) = &vm.memory else { return without_answer(&vm.name, &vm.standing.to_string()) };
    let age = vm.report_age_ms.map(|age| format!("{:.1} s", age as f64 / 1000.0));
    [
        vm.name.clone(),
        vm.standing.to_string(),
        none(),
        limits(&memory.limits),
        memory.target.to_string(),
        memory.actual.to_string(),
        memory.used.map_or_else(none, |used| used.to_string()),
        memory::host_rss(memory.host_rss),
        none(),
        age.unwrap_or_else(none),
        none(),
        none(),
    ]
}

fn without_answer(name: &str, state: &str) -> [String; 12] {
    std::array::from_fn(|column| match column {
        0 => name.to_owned(),
        1 => state.to_owned(),
        _ => "-".to_owned(),
    })
}

fn limits(limits: &Limits) -> String {
    if limits.is_dynamic() {
        format!("{} - {}", limits.min(), limits.max())
    } else {
        format!("{} static", limits.max())
    }
}

const fn state(state: VmState) -> &'static str {
    match state {
        VmState::Created => "created",
        VmState::Running => "running",
        VmState::Sleeping => "sleeping",
        VmState::Paused { by: Pauser::Operator } => "paused",
        VmState::Paused { by: Pauser::Balancer } => "paused by balancer",
        VmState::Paused { by: Pauser::Disk } => "paused by disk",
        VmState::Stopped => "stopped",
    }
}
