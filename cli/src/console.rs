//! `ballast console`.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use api::client::{Error, Upgraded};
use vmm::console::Escape;
use vmm::terminal::Terminal;

use crate::client;
use crate::failure::Failure;
use crate::relay::{End, Keyboard, converse};
use crate::sentence;

/// How long a VM whose guest reboots may take to be there again.
const RESTART: Duration = Duration::from_secs(3);

/// Look at a running VM's console, and write to it
#[derive(clap::Args)]
#[command(after_help = "\
The last 64 KiB of the console come first. Ctrl-A x detaches, and the VM runs on; Ctrl-A Ctrl-A sends one Ctrl-A.
Many may look at a console at a time, and one of them writes.

Examples:
  ballast console web
  ballast console web --watch | grep -m1 'login:'
  echo reboot | ballast console web

Standard input that is no terminal is sent to its end; output is shown until the VM ends, or Ctrl-C.")]
pub struct Args {
    /// The VM, as `ballast ps` names it
    name: String,
    /// Only look, and send nothing
    #[arg(long)]
    watch: bool,
    /// Write in the place of whoever does now
    #[arg(long, conflicts_with = "watch")]
    take_over: bool,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let mut mode = match (args.watch, args.take_over) {
        (true, _) => "watch",
        (_, true) => "take-over",
        _ => "write",
    };
    let mut attached = attach(&args.name, mode)??;
    let stop = api::signals::stop_flag();
    let input = if args.watch { Terminal::None } else { enter_terminal()? };
    let mut keyboard = match &input {
        _ if args.watch => None,
        Terminal::InBackground => {
            sentence::say("this command runs in the background: it sends nothing");
            None
        }
        Terminal::None => Some(Keyboard { escape: None }),
        Terminal::Raw(_) => {
            sentence::say(format_args!("attached to `{}`; Ctrl-A x detaches\r", args.name));
            Some(Keyboard { escape: Some(Escape::Plain) })
        }
    };
    if mode == "take-over" {
        mode = "write";
    }
    loop {
        match converse(attached, &mut keyboard, stop)? {
            End::Detached => {
                drop(input);
                if keyboard.is_some_and(|keyboard| keyboard.escape.is_some()) {
                    sentence::say(format_args!("detached from `{}`, which runs on", args.name));
                }
                return Ok(());
            }
            End::HungUp => {}
        }
        let Some(again) = attach_again(&args.name, mode, stop) else { break };
        sentence::say(format_args!("`{}` has started again\r", args.name));
        attached = again;
    }
    drop(input);
    sentence::say(format_args!("`{}` has ended", args.name));
    Ok(())
}

fn enter_terminal() -> Result<Terminal, Failure> {
    Terminal::enter().map_err(|error| Failure::new(format!("can't use the terminal: {error}")))
}

fn attach(name: &str, mode: &str) -> Result<Result<Upgraded, Error>, Failure> {
    let mut vm = client::named(name)?;
    client::block_on(async { Ok(vm.console(mode).await) })
}

/// The VM's next run, where it comes soon.
fn attach_again(name: &str, mode: &str, stop: &AtomicBool) -> Option<Upgraded> {
    let deadline = Instant::now() + RESTART;
    while Instant::now() < deadline && !stop.load(Ordering::Relaxed) {
        if let Ok(Ok(attached)) = attach(name, mode) {
            return Some(attached);
        }
        sleep(Duration::from_millis(100));
    }
    None
}
