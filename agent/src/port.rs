//! The port to the VM.

use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use api::agent::PORT;
use rustix::fs::OFlags;

/// Where the kernel lists virtio ports with their names; it needs no udev.
const PORTS: &str = "/sys/class/virtio-ports";

/// The port, open.
pub struct Port(File);

/// What became of some bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sent {
    /// The VM has them.
    Yes,
    /// Nobody takes them now.
    No,
    /// The port is no more: open it anew.
    Gone,
}

impl Port {
    /// Opens the port at `path`, or the one that has the agent's name.
    ///
    /// # Errors
    /// Where there is none, or another program holds it.
    pub fn open(path: Option<&Path>) -> io::Result<Self> {
        let path = match path {
            Some(path) => path.to_owned(),
            None => find(Path::new(PORTS))?,
        };
        let nonblock = OFlags::NONBLOCK.bits().cast_signed();
        File::options().write(true).custom_flags(nonblock).open(path).map(Self)
    }

    /// Sends bytes at once or not at all: what can't be sent now is old by the time it could be.
    pub fn send(&mut self, bytes: &[u8]) -> Sent {
        match self.0.write(bytes) {
            Ok(count) if count == bytes.len() => Sent::Yes,
            // The VM finds its way back at the next frame.
            Ok(_) => Sent::No,
            Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
                Sent::No
            }
            // Memory may be so short that the kernel has none for the bytes either.
            Err(error) if error.kind() == io::ErrorKind::OutOfMemory => Sent::No,
            Err(_) => Sent::Gone,
        }
    }
}

fn find(ports: &Path) -> io::Result<PathBuf> {
    let missing = || {
        let sentence = format!(
            "there is no virtio port {PORT}: load the module virtio_console, and start the VM with an agent port"
        );
        io::Error::new(io::ErrorKind::NotFound, sentence)
    };
    for entry in fs::read_dir(ports).map_err(|_| missing())?.flatten() {
        if fs::read_to_string(entry.path().join("name")).is_ok_and(|name| name.trim() == PORT) {
            return Ok(Path::new("/dev").join(entry.file_name()));
        }
    }
    Err(missing())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_port_is_found_by_its_name() {
        let ports = tempfile::tempdir().unwrap();
        assert_eq!(find(ports.path()).unwrap_err().kind(), io::ErrorKind::NotFound);
        for (device, name) in [("vport0p1", "other\n"), ("vport2p1", "org.ballast.agent.0\n")] {
            fs::create_dir(ports.path().join(device)).unwrap();
            fs::write(ports.path().join(device).join("name"), name).unwrap();
        }
        assert_eq!(find(ports.path()).unwrap(), Path::new("/dev/vport2p1"));
    }

    #[test]
    fn a_port_that_nobody_reads_does_not_hold_the_agent_up() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, rustix::fs::Mode::RWXU).unwrap();
        assert!(Port::open(Some(&path)).is_err(), "nobody is there yet");
        let reader = File::options().read(true).write(true).open(&path).unwrap();
        let mut port = Port::open(Some(&path)).unwrap();
        assert_eq!(port.send(b"hello"), Sent::Yes);
        while port.send(&[0; 4096]) == Sent::Yes {}
        assert_eq!(port.send(&[0; 4096]), Sent::No);
        drop(reader);
        assert_eq!(port.send(b"hello"), Sent::Gone);
    }
}
