//! Connects the socket device.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::io;
use std::os::unix::net::UnixStream;

use devices::sandbox::SandboxNeeds;
use devices::virtio::vsock::Vsock;

use super::{BuildError, refused};
use crate::config::{ConfigError, VsockOptions};
use crate::sandbox;
use crate::vsock_socket::VsockSocket;

/// The device, with its socket on the host if it has one, and what both need of the sandbox: to connect to those who
/// serve the guest, and to nobody else.
pub fn open(options: &VsockOptions) -> Result<(Vsock, Option<VsockSocket>, SandboxNeeds), BuildError> {
    let mut served: BTreeMap<u32, CString> = BTreeMap::new();
    let mut needs = SandboxNeeds::default();
    for serve in &options.serve {
        let path = options.path_of(serve)?;
        let absolute = sandbox::absolute(&path).map_err(refused("the path of a socket"))?;
        if served.insert(serve.port, absolute).is_some() {
            return Err(ConfigError::ServedTwice(serve.port).into());
        }
        needs.connect.push(path);
    }
    let vsock = Vsock::new(Box::new(move |port| {
        let path = served.get(&port).ok_or(io::ErrorKind::ConnectionRefused)?;
        Ok(UnixStream::from(sandbox::connect(path)?))
    }));
    let vsock = vsock.map_err(refused("descriptors for the socket device"))?;
    let socket = options.socket.as_ref().map(|path| VsockSocket::at(path, vsock.incoming())).transpose()?;
    needs.remove.extend(options.socket.clone());
    Ok((vsock, socket, needs))
}
