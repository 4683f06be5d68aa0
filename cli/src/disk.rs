//! `ballast disk`.

pub mod running;

use std::path::{Path, PathBuf};

use api::signals;
use api::units::Bytes;
use devices::virtio::block::disk::DiskError;
use disks::ToolError;
use disks::file::{self, Create, FileError, Format, Info, NewSize};

use crate::failure::Failure;
use crate::output;

/// Make disks, look at them, make them larger
#[derive(clap::Args)]
#[command(after_help = "\
What a file is, its name says (.qcow2; raw otherwise), or --format: never its contents, which a guest
may have written. A disk that a VM or one of QEMU's tools uses is left alone.

Examples:
  ballast disk create data.img --size 20G
  ballast disk create web.qcow2 --backing debian.qcow2
  ballast disk resize web.qcow2 +10G
  ballast disk resize --vm web disk0 +10G
  ballast disk list
  ballast disk info web.qcow2")]
pub struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(clap::Subcommand)]
enum Command {
    Create(CreateArgs),
    Info(InfoArgs),
    Resize(ResizeArgs),
    List(ListArgs),
    Check(CheckArgs),
}

/// Make an empty disk, or one that shows another where it has nothing of its own
///
/// It takes room on the host as its guest writes. A disk with a backing file takes the guest's writes, and the other
/// file stays as it is: many can lie over one. `ballast run` takes such a disk with `backing=allow`.
#[derive(clap::Args)]
struct CreateArgs {
    /// The disk's file
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// How large the disk is; with --backing as large as that, unless said otherwise
    #[arg(long, value_name = "SIZE", required_unless_present = "backing")]
    size: Option<Bytes>,
    /// The format: raw or qcow2 [default: by the name]
    #[arg(long)]
    format: Option<Format>,
    /// What the disk shows where it has nothing of its own; the disk is a qcow2 image then
    #[arg(long, value_name = "FILE")]
    backing: Option<PathBuf>,
    /// The format of that: raw or qcow2 [default: by its name]
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,
    /// Replace a file of that name
    #[arg(long)]
    force: bool,
}

/// Tell size, room taken, what lies behind a disk, and whether somebody may write it
#[derive(clap::Args)]
struct InfoArgs {
    /// The disk's file
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The format: raw or qcow2 [default: by the name]
    #[arg(long)]
    format: Option<Format>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Make a disk larger: one that is not in use, or with --vm one of a VM that runs
///
/// What is added reads as zeros. A guest that runs is told at once, another finds it at its next start; partitions and
/// file systems grow by what the guest does then (Debian's images do it by themselves when they start). Disks are
/// never made smaller.
#[derive(clap::Args)]
struct ResizeArgs {
    /// The disk's file; with --vm what the VM calls the disk, as `ballast disk list` says
    #[arg(value_name = "DISK")]
    path: PathBuf,
    /// The VM whose disk it is, as `ballast ps` names it
    #[arg(long, value_name = "NAME", conflicts_with = "format")]
    vm: Option<String>,
    /// The new size, or how much is added: 20G, +10G
    #[arg(value_name = "SIZE")]
    size: NewSize,
    /// The format: raw or qcow2 [default: by the name]
    #[arg(long)]
    format: Option<Format>,
}

/// List the disks of this user's VMs with what they have done since their VM started
///
/// LIMITED is how long requests waited for the disk's limits (iops=, bytes-per-second=); ERRORS how often the host could not
/// do what the guest asked for.
#[derive(clap::Args)]
struct ListArgs {
    /// The VM, as `ballast ps` names it [default: all]
    name: Option<String>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

/// Look whether a disk's file is whole; what is found in an image, `qemu-img check -r` mends
#[derive(clap::Args)]
struct CheckArgs {
    /// The disk's file
    #[arg(value_name = "PATH")]
    path: PathBuf,
    /// The format: raw or qcow2 [default: by the name]
    #[arg(long)]
    format: Option<Format>,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

fn format(stated: Option<Format>, path: &Path) -> Format {
    stated.unwrap_or_else(|| Format::of_name(path))
}

pub fn run(args: Args) -> Result<(), Failure> {
    match args.command {
        Command::Create(CreateArgs { path, size, format: stated, backing, backing_format, force }) => {
            let format = format(stated, &path);
            let backing = backing.map(|behind| {
                let format = backing_format.unwrap_or_else(|| Format::of_name(&behind));
                (behind, format)
            });
            output::text(&describe(&Create { path, format, size, backing, force }.run()?))
        }
        Command::Info(InfoArgs { path, format: stated, json }) => {
            let info = Info::of(&path, format(stated, &path))?;
            if json { output::json(&info) } else { output::text(&describe(&info)) }
        }
        Command::Resize(ResizeArgs { path, size, vm: Some(vm), .. }) => {
            output::text(&running::resize(&vm, &path.to_string_lossy(), size)?)
        }
        Command::List(ListArgs { name, json }) => running::list(name.as_deref(), json),
        Command::Resize(ResizeArgs { path, size, format: stated, vm: None }) => {
            output::text(&describe(&file::resize(&path, format(stated, &path), size)?))
        }
        Command::Check(CheckArgs { path, format: stated, json }) => {
            let check = file::check(&path, format(stated, &path), signals::stop_flag())?;
            let (path, file::Check { corruptions, leaks, errors, .. }) = (path.display(), &check);
            if json {
                output::json(&check)?;
            } else if check.is_sound() {
                let leaked = match leaks {
                    0 => String::new(),
                    leaks => format!("; {leaks} clusters have leaked (qemu-img check -r leaks {path})"),
                };
                output::text(&format!("{path}: whole{leaked}\n"))?;
            }
            if check.is_sound() {
                return Ok(());
            }
            Err(Failure::new(format_args!(
                "{path} is damaged: {corruptions} wrong entries, {errors} that can't be read; copy the file, then \
                 mend it with `qemu-img check -r all {path}`"
            )))
        }
    }
}

/// A disk in a line or two.
fn describe(info: &Info) -> String {
    let Info { path, format, size, allocated, version, backing, in_use } = info;
    let version = version.map_or(String::new(), |version| format!(" version {version}"));
    let used = if *in_use { ", in use" } else { "" };
    let mut text = format!("{}: {format}{version}, {size}, {allocated} on the host{used}\n", path.display());
    if let Some(behind) = backing {
        text.push_str(&format!("behind it: {} ({})\n", behind.path.display(), behind.format));
    }
    text
}

impl From<FileError> for Failure {
    fn from(error: FileError) -> Self {
        match error {
            FileError::Format(_) | FileError::Size(_) | FileError::NoSize | FileError::RawBacking => {
                Self::usage(error)
            }
            FileError::Tool(ToolError::Stopped) => Self::stopped("stopped"),
            // What `ballast run` writes behind a path is a flag here.
            FileError::Disk(error @ DiskError::LooksLikeQcow2 { .. }) => Self::usage(error),
            error => Self::new(error),
        }
    }
}
