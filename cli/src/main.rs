//! The `ballast` command: arguments in; tables, JSON and sentences out.
//!
//! One module a subcommand. What a subcommand does is done by the crates below;
//! here it is only asked for and shown.

mod balancer;
mod cgroup;
mod check;
mod client;
mod cloud_init;
mod completions;
mod console;
mod discovery;
mod disk;
mod duration;
mod entry;
mod failure;
mod fleet;
mod growth;
mod image_create;
mod journal;
mod logging;
mod manual_pages;
mod memory;
mod net;
mod output;
mod pause;
mod ps;
mod read_disk;
mod record;
mod relay;
mod reservation;
mod resume;
mod run;
mod sentence;
mod service;
mod sim;
mod slat;
mod ssh;
mod standard_error;
mod statuses;
mod stop;
mod supervisor;
mod table;
mod top;
mod unpack_kernel;
mod unpacking;
mod vm_file;
mod vsock;
mod why;

use std::env;
use std::ffi::OsString;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::failure::Failure;

#[derive(Parser)]
#[command(
    name = "ballast",
    version,
    about = "Virtual machines whose memory follows their need",
    long_about = "Virtual machines whose memory follows their need.\n\n\
                  `ballast run` is one VM in one process. `ballast balancer` is one daemon a host: it moves \
                  memory between the VMs that it finds. The other commands look at VMs and steer them.",
    after_help = "Exit codes: 0 done, 1 failed, 2 not understood, 3 this host can't run guests; \
                  `ballast run` has more, see `ballast run --help`.",
    after_long_help = EXAMPLES,
    disable_help_subcommand = true
)]
struct Cli {
    #[command(flatten)]
    logging: logging::Options,
    #[command(subcommand)]
    command: Command,
}

const EXAMPLES: &str = "\
Examples:
  ballast check
  ballast run --name web --kernel vmlinuz --initrd web.cpio.gz --memory 256M,min=128M,max=1G
  ballast ps
  ballast top
  ballast console web
  ballast memory web --target 300M
  ballast balancer --host-reserve 512M

Environment:
  BALLAST_RUNTIME_DIR  where the sockets of VMs are (else $XDG_RUNTIME_DIR/ballast, or
                       /run/ballast for root)
  BALLAST_LOG          what is logged on standard error, such as `debug` or `vmm=trace`

Exit codes:
  0 done   1 failed   2 the command line was not understood   3 this host can't run guests
  `ballast run` has more: see `ballast run --help`.";

#[derive(Subcommand)]
enum Command {
    Check(check::Args),
    Run(Box<run::Args>),
    Ps(ps::Args),
    Top(top::Args),
    Memory(memory::Args),
    Why(why::Args),
    Logs(service::LogsArgs),
    Enable(service::EnableArgs),
    Disable(service::DisableArgs),
    Start(service::StartArgs),
    Stop(stop::Args),
    Pause(pause::Args),
    Resume(resume::Args),
    Console(console::Args),
    Net(net::Args),
    Vsock(vsock::Args),
    Ssh(ssh::Args),
    Slat(slat::Args),
    Balancer(balancer::Args),
    Fleet(fleet::Args),
    Sim(sim::Args),
    Record(record::Args),
    Disk(disk::Args),
    Image(image_create::Args),
    Completions(completions::Args),
    #[command(hide = true)]
    ManualPages(manual_pages::Args),
    #[command(hide = true)]
    UnpackKernel(unpack_kernel::Args),
    #[command(hide = true)]
    ReadDisk(read_disk::Args),
}

fn main() -> ExitCode {
    // A limit on the size of files makes a write fail; it ends nobody.
    // SAFETY: no handler is set, and no other thread runs yet.
    unsafe { libc::signal(libc::SIGXFSZ, libc::SIG_IGN) };
    // A parent that ignores it would have this process never learn how its own children end.
    // SAFETY: as above.
    unsafe { libc::signal(libc::SIGCHLD, libc::SIG_DFL) };
    abort_on_panic();
    let words = match vm_file::expanded(env::args_os().collect()) {
        Ok(words) => words,
        Err(failure) => return failure.tell(),
    };
    let cli = match parse(&words) {
        Ok(cli) => cli,
        Err(error) => return failure::usage(&error),
    };
    match &cli.command {
        // They open nothing, and say one sentence.
        Command::UnpackKernel(_) | Command::ReadDisk(_) => {}
        Command::Run(args) => {
            run::share_one_heap();
            cli.logging.start_small(args.name());
        }
        // A line in the log would tear its picture.
        Command::Top(_) if io::stderr().is_terminal() => {}
        _ => cli.logging.start(),
    }
    let result = match cli.command {
        Command::Check(args) => done(check::run(&args)),
        Command::Run(args) => run::run(*args),
        Command::Ps(args) => done(ps::run(&args)),
        Command::Top(args) => done(top::run(&args)),
        Command::Memory(args) => done(memory::run(&args)),
        Command::Why(args) => done(why::run(&args)),
        Command::Logs(args) => done(service::logs(&args)),
        Command::Enable(args) => done(service::enable(&args)),
        Command::Disable(args) => done(service::disable(&args)),
        Command::Start(args) => done(service::start(&args)),
        Command::Stop(args) => done(stop::run(&args)),
        Command::Pause(args) => done(pause::run(&args)),
        Command::Resume(args) => done(resume::run(&args)),
        Command::Console(args) => done(console::run(&args)),
        Command::Net(args) => done(net::run(&args)),
        Command::Vsock(args) => done(vsock::run(&args)),
        Command::Ssh(args) => done(ssh::run(&args)),
        Command::Slat(args) => done(slat::run(&args)),
        Command::Balancer(args) => done(balancer::run(&args)),
        Command::Fleet(args) => done(fleet::run(&args)),
        Command::Sim(args) => done(sim::run(&args)),
        Command::Record(args) => done(record::run(&args)),
        Command::Disk(args) => done(disk::run(args)),
        Command::Image(args) => done(image_create::run(args)),
        Command::Completions(args) => done(completions::run(&args)),
        Command::ManualPages(args) => done(manual_pages::run(&args)),
        Command::UnpackKernel(args) => Ok(unpack_kernel::run(&args)),
        Command::ReadDisk(args) => Ok(read_disk::run(&args)),
    };
    result.unwrap_or_else(Failure::tell)
}

/// `ballast run` without the other commands.
#[derive(Parser)]
#[command(name = "ballast")]
struct RunAlone {
    #[command(flatten)]
    logging: logging::Options,
    #[command(subcommand)]
    command: RunCommand,
}

#[derive(Subcommand)]
enum RunCommand {
    Run(Box<run::Args>),
}

/// Reads the command line. That of a VM is read by itself: to build what the other commands take would cost each VM
/// time and memory at its start. Whatever is wrong with it, or asked of it, the whole command answers.
///
/// # Errors
/// What clap has to say.
fn parse(words: &[OsString]) -> Result<Cli, clap::Error> {
    if words.iter().any(|word| word == "run")
        && let Ok(RunAlone { logging, command: RunCommand::Run(args) }) = RunAlone::try_parse_from(words)
    {
        return Ok(Cli { logging, command: Command::Run(args) });
    }
    Cli::try_parse_from(words)
}

/// A VM runs whole or not at all: a thread that panics ends the process, in a debug build as well. (A profile
/// would do it too, but would have every dependency built twice for tests, which unwind.)
fn abort_on_panic() {
    let report = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |panic| {
        report(panic);
        std::process::abort();
    }));
}

fn done(result: Result<(), Failure>) -> Result<ExitCode, Failure> {
    result.map(|()| ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use clap::{CommandFactory, Parser};

    use super::{Cli, RunAlone};

    #[test]
    fn the_command_line_contradicts_itself_nowhere() {
        Cli::command().debug_assert();
        RunAlone::command().debug_assert();
    }

    /// What it does not take is for the whole command to answer.
    #[test]
    fn a_vms_command_line_is_taken_by_itself_where_the_whole_command_takes_it() {
        let memory = ["run", "--kernel", "k", "--memory", "64M"];
        for (more, is_run) in [
            (&[][..], true),
            (&["-v", "--cmdline", "-x", "--append", "--", "--cpus=2"], true),
            (&["--memory", "1x"], false),
            (&["--help"], false),
            (&["--version"], false),
            (&["run"], false),
        ] {
            for words in [
                [&["ballast"], &memory[..], more].concat(),
                [&["ballast", "-vv"], &memory[..], more].concat(),
            ] {
                let taken = [RunAlone::try_parse_from(&words).is_ok(), Cli::try_parse_from(&words).is_ok()];
                assert_eq!(taken, [is_run; 2], "{words:?}");
            }
        }
        for other in
            [&["ballast"][..], &["ballast", "ps"], &["ballast", "memory", "run"], &["ballast", "--version"]]
        {
            assert!(RunAlone::try_parse_from(other).is_err(), "{other:?}");
        }
    }
}
