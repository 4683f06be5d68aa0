//! `ballast slat walk`.

use api::client::Client;
use slat::address::{Check, Guide, Way};
use slat::walk::{Depth, Shape, Walk};
use vmm::inspect::{MemoryMap, TranslateRequest, Translation};

use super::Size;
use crate::failure::Failure;
use crate::{client, output, table};

/// Draw a two-dimensional page walk, or follow an address of a running guest
///
/// Without --vm: the model. Which table is read at which address of which space, and how many memory references
/// that makes.
///
/// With --vm: the way of a real address, from guest virtual (GVA) over guest physical (GPA) and the VM's process
/// (HVA) to the machine (SPA), with each entry of the guest's tables. System physical addresses take root.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ballast slat walk --steps
  ballast slat walk --guest-page 2M --host-page 2M
  ballast slat walk --vm web --gva 0xffffffff81000000
  ballast slat walk --vm web --gpa 0x1000

A vCPU sees an address through the tables that it uses at that moment: those of the process that it runs. Where
the guest changes them meanwhile, `ballast pause` it first.")]
pub struct Args {
    /// Levels of the guest's tables; 0: the guest runs without paging
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(0..=5))]
    guest_levels: u8,
    /// Page size of the guest's tables
    #[arg(long, default_value = "4K", ignore_case = true)]
    guest_page: Size,
    /// Levels of the host's tables; 0: native, or shadow paging
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u8).range(0..=5))]
    host_levels: u8,
    /// Page size of the host's tables
    #[arg(long, default_value = "4K", ignore_case = true)]
    host_page: Size,
    /// List every reference
    #[arg(long)]
    steps: bool,
    /// Follow an address in this VM, as `ballast ps` names it
    #[arg(long, value_name = "NAME", requires = "address",
          conflicts_with_all = ["guest_levels", "guest_page", "host_levels", "host_page", "steps"])]
    vm: Option<String>,
    /// A guest virtual address, such as 0xffffffff81000000
    #[arg(long, value_name = "ADDRESS", value_parser = address, requires = "vm", group = "address")]
    gva: Option<u64>,
    /// A guest physical address
    #[arg(long, value_name = "ADDRESS", value_parser = address, requires = "vm", group = "address")]
    gpa: Option<u64>,
    /// The vCPU whose view of --gva counts
    #[arg(long, default_value_t = 0, value_name = "N", requires = "gva")]
    cpu: u8,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn address(text: &str) -> Result<u64, String> {
    let digits = text.replace('_', "");
    let number = match digits.strip_prefix("0x") {
        Some(digits) => u64::from_str_radix(digits, 16),
        None => digits.parse(),
    };
    number.map_err(|_| "an address is a number of at most 64 bits, such as 0x7f0012345000".into())
}

/// The model, or a real address.
pub fn run(args: &Args) -> Result<(), Failure> {
    match &args.vm {
        Some(name) => real(name, args),
        None => model(args),
    }
}

fn shape(levels: u8, page: Size) -> Result<Option<Shape>, Failure> {
    let depth = match levels {
        0 => return Ok(None),
        4 => Depth::Four,
        5 => Depth::Five,
        other => return Err(Failure::usage(format!("x86-64 has tables of 4 or 5 levels, not {other}"))),
    };
    Ok(Some(Shape { depth, page: page.page() }))
}

fn model(args: &Args) -> Result<(), Failure> {
    let walk = Walk {
        guest: shape(args.guest_levels, args.guest_page)?,
        host: shape(args.host_levels, args.host_page)?,
    };
    if args.json { output::json(&walk.account()) } else { output::text(&walk.text(args.steps)) }
}

fn real(name: &str, args: &Args) -> Result<(), Failure> {
    let mut vm = client::named(name)?;
    let way = client::block_on(async {
        let pid = vm.status().await?.pid;
        let map: MemoryMap = vm.get("/memory/map").await?;
        let guide = Guide::new(pid, &map).map_err(Failure::new)?;
        match (args.gva, args.gpa) {
            (Some(address), _) => follow(&mut vm, &guide, TranslateRequest { cpu: args.cpu, address }).await,
            (_, Some(address)) => guide.physical(address).map_err(Failure::new),
            (None, None) => Err(Failure::usage("which address? Name it with --gva or --gpa")),
        }
    })?;
    if args.json {
        return output::json(&way);
    }
    let rows = table::render(Way::HEAD, &way.rows());
    output::text(&format!("{}\n\n{rows}\n{}", way.heading(name), way.remarks()))
}

/// A guest may change its tables between KVM's look at them and ours: a few tries tell a moment's
/// difference from a real one.
async fn follow(vm: &mut Client, guide: &Guide<'_>, request: TranslateRequest) -> Result<Way, Failure> {
    const TRIES: u32 = 3;
    let mut tries = 0;
    loop {
        let seen: Translation = vm.ask("/vm/translate", &request).await?;
        let way = guide.virtual_address(seen, request.address).map_err(Failure::new)?;
        tries += 1;
        if way.kvm != Some(Check::Differs) || tries == TRIES {
            return Ok(way);
        }
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn addresses_are_read_as_people_write_them() {
        assert_eq!(super::address("0xffff_ffff"), Ok(0xffff_ffff));
        assert_eq!(super::address("4096"), Ok(4096));
        for wrong in ["", "0x", "-1", "ffff", "0x1_0000_0000_0000_0000"] {
            assert!(super::address(wrong).is_err(), "{wrong}");
        }
    }
}
