//! The socket device of a VM, as data.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::ConfigError;

text!(ServedPort);

/// The socket device.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct VsockOptions {
    /// Ports of the host that the guest may connect to.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub serve: Vec<ServedPort>,
    /// Where the VM listens for programs of the host that ask for a port of the guest in a line of text.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub socket: Option<PathBuf>,
}

impl VsockOptions {
    /// Where the program listens that serves a port: without a path of its own, at the VM's own with the port behind it.
    ///
    /// # Errors
    /// [`ConfigError::ServedNowhere`].
    pub fn path_of(&self, served: &ServedPort) -> Result<PathBuf, ConfigError> {
        let beside = || {
            let mut path =
                self.socket.clone().ok_or(ConfigError::ServedNowhere(served.port))?.into_os_string();
            path.push(format!("_{}", served.port));
            Ok(path.into())
        };
        served.path.clone().map_or_else(beside, Ok)
    }
}

/// A port of the host, and the Unix socket of the program that serves it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ServedPort {
    /// The port, as the guest names it.
    pub port: u32,
    /// Where the program listens.
    pub path: Option<PathBuf>,
}

/// `PORT:PATH`, or `PORT` where the VM has a socket of its own beside which it is.
impl FromStr for ServedPort {
    type Err = ConfigError;

    fn from_str(text: &str) -> Result<Self, ConfigError> {
        let wrong = || ConfigError::ServedPort(text.to_owned());
        let (port, path) = text.split_once(':').map_or((text, None), |(port, path)| (port, Some(path)));
        let port = port.parse().ok().filter(|port| *port != u32::MAX).ok_or_else(wrong)?;
        if path.is_some_and(str::is_empty) {
            return Err(wrong());
        }
        Ok(Self { port, path: path.map(PathBuf::from) })
    }
}

impl fmt::Display for ServedPort {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match &self.path {
            Some(path) => write!(f, "{}:{}", self.port, path.display()),
            None => write!(f, "{}", self.port),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn served_ports_are_read_and_others_refused() {
        let served: ServedPort = "1024:/run/a:b.sock".parse().unwrap();
        assert_eq!(served, ServedPort { port: 1024, path: Some("/run/a:b.sock".into()) });
        assert_eq!(served.to_string(), "1024:/run/a:b.sock");
        let beside: ServedPort = "1024".parse().unwrap();
        assert_eq!(beside.to_string(), "1024");
        let mut options = VsockOptions::default();
        assert_eq!(options.path_of(&beside), Err(ConfigError::ServedNowhere(1024)));
        options.socket = Some("/run/vm.vsock".into());
        assert_eq!(options.path_of(&beside), Ok("/run/vm.vsock_1024".into()));
        assert_eq!(options.path_of(&served), Ok("/run/a:b.sock".into()));
        for bad in ["", "1024:", ":/run/x", "-1:/run/x", "4294967295:/run/x", "http:/run/x"] {
            assert!(bad.parse::<ServedPort>().is_err(), "{bad}");
        }
    }
}
