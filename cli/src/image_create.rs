//! `ballast image`.

use std::io::{IsTerminal, stderr};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use api::signals;
use api::units::Bytes;
use disks::ToolError;
use disks::debian::{Build, BuildError, Release};
use indicatif::{ProgressBar, ProgressStyle};
use tracing::info;

use crate::failure::Failure;
use crate::sentence;

/// Make disk images that boot
#[derive(clap::Args)]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Create(CreateArgs),
}

/// Build an image out of a distribution's packages
#[derive(clap::Args)]
struct CreateArgs {
    #[command(subcommand)]
    distribution: Distribution,
}

#[derive(clap::Subcommand)]
enum Distribution {
    Debian(DebianArgs),
}

/// Build a Debian image: systemd, cloud-init, an OpenSSH server and the cloud kernel
///
/// It is laid out as Debian's genericcloud images are: a GPT whose partition 1 is the root file system (ext4, with
/// /boot in it). There is no boot loader and no EFI partition. It has no user but root, and no password: give the
/// guest a user with `ballast run --user NAME --ssh-key FILE`, or with --cloud-init.
///
/// The same packages give the same image, byte for byte. It takes some minutes, about 200 MB from the mirror, and
/// 2 GB of the directory for temporary files (TMPDIR). It needs mmdebstrap, and without root the right to user
/// namespaces. The image is there whole or not at all; Ctrl-C leaves nothing behind.
#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  ballast image create debian debian.qcow2
  ballast image create debian --release bookworm --size 8G debian.img")]
struct DebianArgs {
    /// The image: qcow2 where the name ends in .qcow2, raw otherwise
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The release's code name
    #[arg(long, value_name = "NAME", default_value = "bookworm")]
    release: Release,
    /// How large the guest's disk is; what is not written in it takes no room
    #[arg(long, value_name = "SIZE", default_value = "4G")]
    size: Bytes,
    /// Where the packages come from [default: Debian's mirrors, with updates and security]
    #[arg(long, value_name = "URL")]
    mirror: Option<String>,
    /// Replace an image of that name
    #[arg(long)]
    force: bool,
}

pub fn run(args: Args) -> Result<(), Failure> {
    let Command::Create(CreateArgs { distribution: Distribution::Debian(args) }) = args.command;
    let DebianArgs { path, release, size, mirror, force } = args;
    let size = disks::file::whole(size).map_err(Failure::usage)?;
    let build = Build { release, size, mirror, path, force };
    build.check()?;
    let (stop, begun) = (signals::stop_flag(), Instant::now());
    let progress = progress();
    let built = build.run(stop, |step| {
        let said = step.to_string();
        if progress.is_hidden() { info!("{said}") } else { progress.set_message(said) }
    });
    progress.finish_and_clear();
    let built = built?;
    sentence::say(format_args!(
        "{}: Debian {} with {} packages on a disk of {}, in {} s; root=PARTUUID={} (UUID {})",
        build.path.display(),
        build.release,
        built.packages,
        build.size,
        begun.elapsed().as_secs(),
        built.partition,
        built.root
    ));
    Ok(())
}

fn progress() -> ProgressBar {
    if !stderr().is_terminal() {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} ({elapsed})") {
        bar.set_style(style);
    }
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

impl From<BuildError> for Failure {
    fn from(error: BuildError) -> Self {
        match error {
            BuildError::Release(_) | BuildError::Size(_) => Self::usage(error),
            BuildError::Tool(ToolError::Stopped) => Self::stopped("stopped: nothing was left behind"),
            error => Self::new(error),
        }
    }
}
