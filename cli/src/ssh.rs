//! `ballast ssh`.

use std::env;
use std::os::unix::process::CommandExt;
use std::process::Command;

use crate::client;
use crate::failure::Failure;

/// The port at which the guest's sshd listens.
const PORT: u32 = 22;

/// Log in to a guest by ssh, without a network
#[derive(clap::Args)]
#[command(after_help = "\
The VM must have been started with --vsock, and the guest's sshd listen at port 22 of AF_VSOCK. It does in a guest that
was given a user by `ballast run --vsock --user NAME --ssh-key FILE`, and where systemd is of version 256 or later.

Examples:
  ballast ssh me@web
  ballast ssh me@web -- uptime
  ballast ssh me@web -i ~/.ssh/web_key -L 8080:localhost:80

scp and rsync go the same way with these lines in ~/.ssh/config, for `scp file me@web.vm:`:
  Host *.vm
    ProxyCommand ballast vsock $(basename %h .vm) 22")]
pub struct Args {
    /// The user in the guest, and the VM, as `ballast ps` names it
    #[arg(value_name = "[USER@]NAME")]
    target: String,
    /// Options of ssh, and a command for the guest
    #[arg(trailing_var_arg = true, allow_hyphen_values = true, value_name = "ARGS")]
    arguments: Vec<String>,
}

pub fn run(args: &Args) -> Result<(), Failure> {
    let name = args.target.rsplit_once('@').map_or(args.target.as_str(), |(_, name)| name);
    client::named(name)?;
    let own =
        env::current_exe().map_err(|error| Failure::new(format!("can't find this program: {error}")))?;
    let own = own.to_string_lossy().replace('\'', r"'\''").replace('%', "%%");
    let error = Command::new("ssh")
        .args(["-o", &format!("ProxyCommand='{own}' vsock {name} {PORT}")])
        // Not an address of this host's network, which may have the same name.
        .args(["-o", &format!("HostKeyAlias={name}.ballast")])
        .arg(&args.target)
        .args(&args.arguments)
        .exec();
    Err(Failure::new(format!("can't run ssh: {error}; install it (openssh-client)")))
}
