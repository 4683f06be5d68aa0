//! What `ballast run` tells the guest's cloud-init.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use disks::seed::{Seed, SshKeys, UserName};

use crate::failure::Failure;

/// The longest file that is read: more than cloud-init's user-data may have, and than anybody's keys do.
const MOST: u64 = 2 << 20;

/// What the guest's cloud-init is told at its first boot.
#[derive(clap::Args)]
pub struct SeedArgs {
    /// User-data for the guest's cloud-init: a file that begins with #cloud-config, or a script
    ///
    /// The guest gets it on a read-only disk behind all others (a NoCloud seed), with DHCP for each of its
    /// Ethernets. It is set up once, and again when the file, the host name or the VM's name is another.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["user", "ssh_key"])]
    cloud_init: Option<PathBuf>,
    /// Have the guest's cloud-init make this user, who may become root by sudo
    #[arg(long, value_name = "NAME", requires = "ssh_key")]
    user: Option<UserName>,
    /// The public key with which that user logs in; once for each file
    #[arg(long = "ssh-key", value_name = "FILE", requires = "user")]
    ssh_key: Vec<PathBuf>,
    /// The guest's host name, which its cloud-init sets
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
}

impl SeedArgs {
    /// The seed that the flags ask for, of a VM that the user calls `name`. `by_vsock`: it has a socket device.
    pub fn seed(&self, name: Option<&str>, by_vsock: bool) -> Result<Option<Seed>, Failure> {
        let user_data = match (&self.cloud_init, &self.user) {
            (Some(path), _) => read(path)?,
            (None, Some(user)) => Seed::user_data_of(user, &self.keys()?, by_vsock),
            (None, None) if self.hostname.is_some() => Seed::no_user_data(),
            (None, None) => return Ok(None),
        };
        // A user who sets no host name finds the guest under the VM's.
        let host_name = self.hostname.as_deref().or(name);
        let seed = Seed::new(&user_data, host_name, name);
        let said = |error| match &self.cloud_init {
            Some(path) => Failure::usage(format_args!("{}: {error}", path.display())),
            None => Failure::usage(error),
        };
        seed.map(Some).map_err(said)
    }

    fn keys(&self) -> Result<SshKeys, Failure> {
        let mut all = SshKeys::default();
        for path in &self.ssh_key {
            let keys: Result<SshKeys, _> = read(path)?.parse();
            all.extend(keys.map_err(|error| Failure::usage(format_args!("{}: {error}", path.display())))?);
        }
        Ok(all)
    }
}

/// A text file of a size that makes sense.
fn read(path: &Path) -> Result<String, Failure> {
    let failed = |error: &dyn ToString| {
        Failure::new(format_args!("{} can't be read: {}", path.display(), error.to_string()))
    };
    let mut text = String::new();
    let file = File::open(path).map_err(|error| failed(&error))?;
    if !file.metadata().is_ok_and(|there| there.is_file()) {
        return Err(failed(&"it is no file"));
    }
    file.take(MOST).read_to_string(&mut text).map_err(|error| failed(&error))?;
    if text.len() as u64 == MOST { Err(failed(&"it is too long")) } else { Ok(text) }
}
