//! `ballast net`.

use api::status::{LinkRequest, NetStatus, VmStatus};
use serde::Serialize;

use crate::failure::Failure;
use crate::{client, output, sentence, statuses, table};

/// Look at the networks of VMs that run, take links down and up
///
/// With the name of a VM, down takes the link of its card down, as if the cable was out: the guest is told, and frames
/// are dropped both ways and counted. It stays so over a reset of the guest, until up, or until the VM's process ends.
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "\
Examples:
  ballast net list
  ballast net web down
  ballast net web up net1"
)]
pub struct Args {
    #[command(subcommand)]
    command: Option<Command>,
    /// The VM, as `ballast ps` names it
    #[arg(required = true)]
    name: Option<String>,
    /// What becomes of the link
    #[arg(required = true)]
    link: Option<Link>,
    /// Which card, as `ballast net list` says [default: the only one]
    #[arg(value_name = "CARD")]
    card: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum Link {
    /// Frames pass
    Up,
    /// Frames are dropped
    Down,
}

#[derive(clap::Subcommand)]
enum Command {
    List(ListArgs),
}

/// List the network cards of this user's VMs: where they lead, and what passed them since their VM started
///
/// ADDRESS is the guest's where ballast's side gives it one (user). LINK is down where nobody is at the cable's other
/// end any more, and taken down where `ballast net NAME down` did that. DROPPED counts frames that were lost in the VM's process, either way, and LIMITED is the time in which
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
    match args {
        Args { command: Some(Command::List(args)), .. } => list(args),
        Args { name: Some(name), link: Some(link), card, .. } => set_link(name, *link, card.as_deref()),
        // The parser asks for both.
        Args { .. } => Err(Failure::usage("name a VM, and say up or down")),
    }
}

fn set_link(vm: &str, link: Link, card: Option<&str>) -> Result<(), Failure> {
    let mut client = client::named(vm)?;
    let net = client::block_on(async {
        let net = match card {
            Some(card) => card.to_owned(),
            None => only_card(&client.status().await?)?,
        };
        client.set_link(&LinkRequest { net: net.clone(), up: link == Link::Up }).await?;
        Ok::<_, Failure>(net)
    })?;
    let is = if link == Link::Up { "up" } else { "down" };
    output::text(&format!("{net} of {vm}: {is}, and its guest is told\n"))
}

/// The card of a VM that has one.
fn only_card(vm: &VmStatus) -> Result<String, Failure> {
    match vm.nets.as_slice() {
        [net] => Ok(net.id.clone()),
        [] => Err(Failure::new(format_args!("the VM {} has no network card", vm.name))),
        nets => {
            let known: Vec<_> = nets.iter().map(|net| net.id.as_str()).collect();
            let known = known.join(", ");
            Err(Failure::usage(format_args!(
                "the VM {} has several network cards, name one: {known}",
                vm.name
            )))
        }
    }
}

fn list(ListArgs { name, json }: &ListArgs) -> Result<(), Failure> {
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
        match net {
            NetStatus { taken_down: true, .. } => "taken down",
            NetStatus { up: true, .. } => "up",
            NetStatus { up: false, .. } => "down",
        }
        .to_owned(),
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
