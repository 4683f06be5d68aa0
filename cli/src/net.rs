//! `ballast net`.

use api::status::{NetStatus, VmStatus};
use serde::Serialize;

use crate::failure::Failure;
use crate::{output, sentence, statuses, table};

/// Look at the networks of VMs that run
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    List(ListArgs),
}

/// List the network cards of this user's VMs: where they lead, and what passed them since their VM started
///
/// ADDRESS is the guest's where ballast's side gives it one (user). LINK is down where nobody is at the cable's other
/// end any more. DROPPED counts frames that were lost in the VM's process, either way, and LIMITED is the time in which
/// the card's limits held frames back.
#[derive(clap::Args)]
struct ListArgs {
    /// One VM, as `ballast ps` names it [default: all]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// The card of one VM.
#[derive(Serialize)]
struct Row {
    vm: String,
    #[serde(flatten)]
    net: NetStatus,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let Command::List(ListArgs { name, json }) = &args.command;
    let (directory, vms) = statuses::of(name.as_deref())?;
    let of_vm = |vm: VmStatus| vm.nets.into_iter().map(move |net| Row { vm: vm.name.clone(), net });
    let rows: Vec<Row> = vms.into_iter().flat_map(of_vm).collect();
    if *json {
        return output::json(&rows);
    }
    if rows.is_empty() {
        sentence::say(format_args!("no VM has a network card in {}", directory.display()));
        return Ok(());
    }
    let head = [
        "VM", "CARD", "BACKEND", "MAC", "ADDRESS", "FORWARDS", "LINK", "RECEIVED", "SENT", "DROPPED",
        "LIMITED",
    ];
    let cells: Vec<_> = rows.iter().map(cells).collect();
    output::text(&table::render(head, &cells))
}

fn cells(Row { vm, net }: &Row) -> [String; 11] {
    let or_none = |text: String| if text.is_empty() { "-".to_owned() } else { text };
    [
        vm.clone(),
        net.id.clone(),
        net.backend.clone(),
        net.mac.clone(),
        or_none(net.address.clone().unwrap_or_default()),
        or_none(net.forwards.join(" ")),
        if net.up { "up" } else { "down" }.to_owned(),
        net.received.bytes.to_string(),
        net.sent.bytes.to_string(),
        net.received.dropped.saturating_add(net.sent.dropped).to_string(),
        limited(net.received.limited_ms.saturating_add(net.sent.limited_ms)),
    ]
}

/// Seconds, of milliseconds.
fn limited(milliseconds: u64) -> String {
    if milliseconds == 0 {
        "-".to_owned()
    } else {
        format!("{}.{} s", milliseconds / 1000, milliseconds / 100 % 10)
    }
}
