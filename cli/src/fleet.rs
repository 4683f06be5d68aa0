//! `ballast fleet`: the hosts and VMs of a Pacemaker cluster, by Pacemaker's own word. Nothing is kept here.

mod cluster;
mod pacemaker;
mod publish;
mod view;

use clap::Subcommand;

use crate::failure::Failure;
use crate::{output, sentence};

/// Show the hosts and VMs of a Pacemaker cluster: floors, pressure, what is placed where and why
#[derive(clap::Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "\
Columns of hosts: STATE is Pacemaker's; CAPACITY what floors it may hold, PLACED the floors that it holds,
FREE what is left; PRESSURE 0 to 100, by its balancer. Columns of VMs: FLOOR is what the VM counts, its
`min`; WHY says why it is where it is, or why nowhere.

A host tells its figures where the resource ocf:ballast:node runs on it. Above the pressure that the
cluster's rule names, a host takes no newcomer and keeps what it has.

Examples:
  ballast fleet
  ballast fleet --json
  ballast fleet publish --dry-run     what this host would tell the cluster now

It asks crm_mon and cibadmin, so it runs on a host of the cluster, as root or in the group haclient.
The manual (`In a Pacemaker cluster`) has the way from three bare hosts to a VM that survives the loss of
one."
)]
pub struct Args {
    /// Print JSON
    #[arg(long)]
    json: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    Publish(publish::Args),
}

pub fn run(args: &Args) -> Result<(), Failure> {
    if let Some(Command::Publish(args)) = &args.command {
        return publish::run(args);
    }
    let view = view::View::of(&pacemaker::cluster()?);
    if args.json {
        return output::json(&view);
    }
    output::text(&view.render())?;
    view.remarks.iter().for_each(sentence::say);
    Ok(())
}
