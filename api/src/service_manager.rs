//! Where a service manager such as systemd listens to its services: sd_notify(3).

use std::env;
use std::ffi::OsStr;
use std::io;
use std::os::linux::net::SocketAddrExt;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::path::Path;

/// The variable that names its socket.
pub const VARIABLE: &str = "NOTIFY_SOCKET";

/// A socket's address as the variable has it: a path, or an abstract name behind `@`.
///
/// # Errors
/// Where no socket can have it.
pub fn address(name: &[u8]) -> io::Result<SocketAddr> {
    match name.strip_prefix(b"@") {
        Some(name) => SocketAddr::from_abstract_name(name),
        None => SocketAddr::from_pathname(Path::new(OsStr::from_bytes(name))),
    }
}

/// A connection to the manager that started this process; `None` where none wants to hear of it. What is sent
/// over it never waits.
///
/// # Errors
/// Where nobody listens at the address.
pub fn connect() -> io::Result<Option<UnixDatagram>> {
    let Some(name) = env::var_os(VARIABLE).filter(|name| !name.is_empty()) else { return Ok(None) };
    let socket = UnixDatagram::unbound()?;
    socket.set_nonblocking(true)?;
    socket.connect_addr(&address(name.as_bytes())?)?;
    Ok(Some(socket))
}

#[cfg(test)]
mod tests {
    use super::address;

    #[test]
    fn an_address_is_a_path_or_an_abstract_name() {
        assert_eq!(address(b"/run/notify").unwrap().as_pathname().unwrap().to_str(), Some("/run/notify"));
        assert!(address(b"@abc").unwrap().as_pathname().is_none());
        assert!(address(&[b'x'; 200]).is_err());
    }
}
