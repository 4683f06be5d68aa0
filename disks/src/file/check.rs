//! Whether a disk's file is whole.

use std::path::{Path, PathBuf};
use std::process::Command;

use serde::{Deserialize, Serialize};

use super::{FileError, Format, Info};
use crate::tool::{self, Stop, Tool};

const QEMU_IMG: Tool = Tool { program: "qemu-img", package: "qemu-utils" };

/// What was found in a file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Check {
    /// The file.
    pub path: PathBuf,
    /// Its format.
    pub format: Format,
    /// Places whose data may be lost, or be taken for another's.
    pub corruptions: u64,
    /// Clusters that take room and belong to nothing.
    pub leaks: u64,
    /// Places that could not be looked at.
    pub errors: u64,
}

impl Check {
    /// Whether no data is in danger. Room that has leaked is lost until the image is mended, and nothing else is.
    pub const fn is_sound(&self) -> bool {
        self.corruptions == 0 && self.errors == 0
    }
}

/// What `qemu-img check --output=json` says; a number that is not there is zero.
#[derive(Deserialize)]
#[serde(rename_all = "kebab-case", default)]
#[derive(Default)]
struct Answer {
    corruptions: u64,
    leaks: u64,
    check_errors: u64,
}

/// Looks at a file that nobody writes: at the tables of a qcow2 image by `qemu-img`, at a raw one by its length.
///
/// # Errors
/// [`FileError`], also where it is in use.
pub fn check(path: &Path, format: Format, stop: &Stop) -> Result<Check, FileError> {
    // What no VM would take is told as a VM would tell it.
    let info = Info::of(path, format)?;
    let nothing = Check { path: path.to_owned(), format, corruptions: 0, leaks: 0, errors: 0 };
    if info.in_use {
        let path = path.to_owned();
        return Err(devices::virtio::block::disk::DiskError::Locked { path }.into());
    }
    if format == Format::Raw {
        let is_whole = super::whole(info.size)? == info.size;
        return if is_whole { Ok(nothing) } else { Err(FileError::Size(info.size.0.to_string())) };
    }
    tool::look_for([&QEMU_IMG])?;
    let mut command = Command::new(QEMU_IMG.program);
    command.args(["check", "--output=json", "-f", "qcow2"]).arg(image_name(path));
    // 2 is corruption, 3 leaks: both are told in what it says.
    let said = tool::ask(command, stop, &[2, 3])?;
    let answer: Answer = serde_json::from_slice(&said).map_err(|_| FileError::Answer(path.to_owned()))?;
    let Answer { corruptions, leaks, check_errors } = answer;
    Ok(Check { corruptions, leaks, errors: check_errors, ..nothing })
}

/// A path that qemu-img takes for a file's, and for no option or protocol.
fn image_name(path: &Path) -> PathBuf {
    if path.is_absolute() { path.to_owned() } else { Path::new(".").join(path) }
}
