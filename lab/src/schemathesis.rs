//! Holds a server on a Unix socket against its OpenAPI document, by requests that are made of the document.

use std::fs;
use std::io;
use std::net::{Shutdown, TcpListener, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use sha2::{Digest, Sha256};

use crate::error::files;
use crate::packages::run;
use crate::{Error, cache, progress};

/// Schemathesis and what it needs, each of one version.
const REQUIREMENTS: &str = include_str!("schemathesis.txt");

/// What is asked, and what the documents say in words.
const FILES: [(&str, &str); 2] = [
    ("schemathesis.toml", include_str!("schemathesis.toml")),
    ("hooks.py", include_str!("schemathesis_hooks.py")),
];

/// Its Python environment, whose `bin/schemathesis` is the program.
///
/// # Errors
/// Where there is no Python with `venv`, or the packages can't be fetched.
pub fn environment() -> Result<PathBuf, Error> {
    let _lock = cache::lock("schemathesis")?;
    let version: String =
        Sha256::digest(REQUIREMENTS).iter().take(6).map(|byte| format!("{byte:02x}")).collect();
    let directory = cache::directory("schemathesis")?.join(version);
    let complete = directory.join("complete");
    if !complete.exists() {
        let requirements = cache::directory("schemathesis")?.join("requirements.txt");
        cache::write_whole(&requirements, REQUIREMENTS.as_bytes())?;
        let _step = progress::begin("fetching schemathesis");
        run(Command::new("python3").args(["-m", "venv", "--clear"]).arg(&directory)).map_err(|error| {
            Error::Failed(format!("{error}: install Debian's python3-venv (`make setup` does)"))
        })?;
        run(Command::new(directory.join("bin/python"))
            .args(["-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"])
            .args(["--only-binary", ":all:", "--requirement"])
            .arg(&requirements))?;
        cache::write_whole(&complete, b"")?;
    }
    for (name, contents) in FILES {
        cache::write_whole(&directory.join(name), contents.as_bytes())?;
    }
    Ok(directory)
}

/// Puts requests to the server at `socket` that `document` allows and some that it forbids, the same at each run,
/// but for the operations that are `left_out` by their names.
///
/// # Errors
/// With all findings: answers that the document does not describe, requests that should have been refused and
/// were not, and the other way round.
pub fn check(document: &Path, socket: &Path, left_out: &[&str]) -> Result<String, Error> {
    let port = bridge(socket.to_owned()).map_err(files("a port for the server"))?;
    let environment = environment()?;
    // It keeps what failed where it runs, and would begin with that the next time.
    let directory = tempfile::tempdir().map_err(files("a temporary directory"))?;
    let document = fs::canonicalize(document).map_err(files(document.display()))?;
    let mut command = Command::new(environment.join("bin/schemathesis"));
    command
        .current_dir(&directory)
        .env("PYTHONPATH", &environment)
        .arg("--config-file")
        .arg(environment.join(FILES[0].0))
        .args(["--no-color", "run", "--checks", "all", "--url"])
        .arg(format!("http://127.0.0.1:{port}/v1"));
    for operation in left_out {
        command.args(["--exclude-operation-id", operation]);
    }
    run(command.arg(document))
}

/// A port of this machine that leads to `socket`, for as long as this process lives.
fn bridge(socket: PathBuf) -> io::Result<u16> {
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    thread::spawn(move || {
        for client in listener.incoming().flatten() {
            // A client that gets no answer is a finding.
            if let Ok(server) = UnixStream::connect(&socket) {
                let _ = join(client, server);
            }
        }
    });
    Ok(port)
}

/// Passes on what either side says, until it ends.
fn join(client: TcpStream, server: UnixStream) -> io::Result<()> {
    let (mut from_client, mut to_client) = (client.try_clone()?, client);
    let (mut from_server, mut to_server) = (server.try_clone()?, server);
    thread::spawn(move || {
        let _ = io::copy(&mut from_client, &mut to_server);
        let _ = to_server.shutdown(Shutdown::Both);
    });
    thread::spawn(move || {
        let _ = io::copy(&mut from_server, &mut to_client);
        let _ = to_client.shutdown(Shutdown::Both);
    });
    Ok(())
}
