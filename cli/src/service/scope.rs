//! Whose services: the host's, which root has, or those of one user.

use std::env;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rustix::process::geteuid;

use crate::failure::Failure;

/// Where users are whose services run while they are not logged in.
const LINGER: &str = "/var/lib/systemd/linger";

/// Whose services.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The host's.
    System,
    /// Those of the user of this number.
    User(u32),
}

impl Scope {
    /// Of whoever runs this.
    pub fn own() -> Self {
        match geteuid().as_raw() {
            0 => Self::System,
            uid => Self::User(uid),
        }
    }

    /// What systemctl and journalctl are told.
    pub const fn option(&self) -> &'static str {
        match self {
            Self::System => "--system",
            Self::User(_) => "--user",
        }
    }

    /// Where the file of a VM is.
    ///
    /// # Errors
    /// The user has no home.
    pub fn file(&self, name: &str) -> Result<PathBuf, Failure> {
        self.file_in(name, env::var_os("XDG_CONFIG_HOME"), env::var_os("HOME"))
    }

    fn file_in(
        &self,
        name: &str,
        config: Option<OsString>,
        home: Option<OsString>,
    ) -> Result<PathBuf, Failure> {
        let absolute = |path: Option<OsString>| path.map(PathBuf::from).filter(|path| path.is_absolute());
        let directory = match self {
            Self::System => PathBuf::from("/etc"),
            Self::User(_) => {
                absolute(config).or_else(|| Some(absolute(home)?.join(".config"))).ok_or_else(|| {
                    Failure::new("HOME is not set: the file of a VM is in ~/.config/ballast/vms")
                })?
            }
        };
        Ok(directory.join("ballast/vms").join(format!("{name}.toml")))
    }

    /// Whether the user's services start with the host; `None` for the host's own.
    pub fn lingers(&self) -> Option<bool> {
        match self {
            Self::System => None,
            Self::User(_) => {
                let name = env::var_os("USER").or_else(|| env::var_os("LOGNAME"))?;
                Some(Path::new(LINGER).join(name).exists())
            }
        }
    }

    /// What to do where systemd does not know the units of VMs.
    pub fn no_unit(&self) -> String {
        let (unit, place, again) = match self {
            Self::System => ("systemd/ballast@.service", "/etc/systemd/system", "systemctl daemon-reload"),
            Self::User(_) => {
                ("systemd/user/ballast@.service", "~/.config/systemd/user", "systemctl --user daemon-reload")
            }
        };
        format!(
            "systemd has no unit ballast@.service: install the Debian package, or copy resources/{unit} and what its \
             comment names to {place}, then `{again}`"
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_where_its_unit_looks_for_it() {
        let file = |scope: Scope, config: Option<&str>, home: Option<&str>| {
            scope.file_in("web", config.map(Into::into), home.map(Into::into)).ok()
        };
        let expected = |path: &str| Some(PathBuf::from(path));
        assert_eq!(file(Scope::System, Some("/x"), Some("/root")), expected("/etc/ballast/vms/web.toml"));
        let user = Scope::User(1000);
        let home = Some("/home/ada");
        assert_eq!(file(user.clone(), None, home), expected("/home/ada/.config/ballast/vms/web.toml"));
        // What is not absolute does not count (XDG Base Directory Specification).
        assert_eq!(file(user.clone(), Some("x"), home), expected("/home/ada/.config/ballast/vms/web.toml"));
        assert_eq!(file(user.clone(), Some("/x"), home), expected("/x/ballast/vms/web.toml"));
        assert_eq!(file(user, None, None), None);
    }
}
