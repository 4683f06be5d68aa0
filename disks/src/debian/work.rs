//! The directory in which an image is built.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use api::units::Bytes;
use tempfile::TempDir;

use super::identity::Identity;
use super::layout::ROOT_START;
use super::{BuildError, host, open_to_all};
use crate::tool;

/// What is done to the files of the packages, as their owner: what is left of the installation goes, the network and
/// the file systems are set up, and the file system is made of them.
pub const FINISH: &str = include_str!("finish.sh");

/// Whether this process is root's.
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// A directory for one build. It goes with this value, with all that is in it.
pub struct Work {
    directory: TempDir,
    /// Where everybody may write, behind a name that nobody can look up.
    open: PathBuf,
}

impl Work {
    /// Makes it.
    ///
    /// # Errors
    /// The directory for temporary files can't be written.
    pub fn new() -> Result<Self, BuildError> {
        let failed = || host("a directory for the work can't be made (TMPDIR says where)".to_owned());
        let builder = || {
            tempfile::Builder::new()
                .permissions(Permissions::from_mode(0o711))
                .prefix("ballast-image-")
                .to_owned()
        };
        let directory = builder().tempdir().map_err(failed())?;
        let open = builder().rand_bytes(24).tempdir_in(directory.path()).map_err(failed())?.keep();
        // Without root the files belong to users of a namespace, who are others here.
        if !is_root() {
            open_to_all(&open, 0o777)?;
        }
        fs::write(open.join("finish.sh"), FINISH).map_err(failed())?;
        open_to_all(&open.join("finish.sh"), 0o644)?;
        Ok(Self { directory, open })
    }

    /// The files of the packages.
    pub fn root(&self) -> PathBuf {
        self.open.join("root")
    }

    /// The disk, raw.
    pub fn image(&self) -> PathBuf {
        self.open.join("disk")
    }

    /// `program` where what it mounts ends with it, whatever becomes of it.
    pub fn in_own_mounts(&self, program: &str) -> Command {
        let mut command = if is_root() {
            let mut command = Command::new("unshare");
            command.args(["--mount", "--propagation", "private", "--", program]);
            command
        } else {
            // It makes a namespace for mounts with that for users.
            Command::new(program)
        };
        command.current_dir(&self.open);
        command
    }

    /// `program` as the owner of the files.
    fn as_owner(&self, program: &str) -> Command {
        let mut command = if is_root() {
            Command::new(program)
        } else {
            let mut command = Command::new("mmdebstrap");
            command.args(["--unshare-helper", program]);
            command
        };
        command.current_dir(&self.open);
        command
    }

    /// Makes the file system of `size`.
    pub fn finish(&self, identity: &Identity, size: Bytes) -> Command {
        let mut command = self.as_owner("sh");
        let kib = |bytes: Bytes| (bytes.0 >> 10).to_string();
        command
            .arg("finish.sh")
            .arg(self.root())
            .arg(self.image())
            .arg(ROOT_START.0.to_string())
            .arg(kib(size));
        command.arg(identity.root.to_string()).arg(identity.partition.to_string());
        command.arg(identity.spread.to_string()).arg(crate::WAKE_RULE_PATH).arg(crate::WAKE_RULE);
        command
    }
}

impl Drop for Work {
    fn drop(&mut self) {
        if !is_root() {
            let mut remove = self.as_owner("rm");
            remove.args(["-rf", "--one-file-system"]).arg(self.root()).arg(self.image());
            remove.env("PATH", tool::search_path()).stdin(Stdio::null()).stdout(Stdio::null());
            let _ = remove.stderr(Stdio::null()).status();
        }
        let directory: &Path = self.directory.path();
        if let Err(error) = fs::remove_dir_all(directory) {
            tracing::warn!("{} was left behind: {error}", directory.display());
        }
    }
}
