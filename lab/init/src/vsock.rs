//! Programs in a guest that speak to the host by AF_VSOCK.

use std::fs::File;
use std::io::{self, Read, Write};
use std::mem;
use std::os::fd::{AsRawFd, FromRawFd};
use std::thread;

/// Any context (`linux/vm_sockets.h`).
const ANY: u32 = u32::MAX;
/// The host.
const HOST: u32 = 2;

fn checked(result: libc::c_int, what: &str) -> Result<libc::c_int, String> {
    if result < 0 { Err(format!("{what}: {}", io::Error::last_os_error())) } else { Ok(result) }
}

fn socket() -> Result<File, String> {
    // SAFETY: the call takes numbers; what it returns is a new descriptor of nobody else.
    unsafe {
        let socket =
            checked(libc::socket(libc::AF_VSOCK, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0), "socket")?;
        Ok(File::from_raw_fd(socket))
    }
}

/// Calls with the address of `port` of `cid`.
fn with_address(
    cid: u32,
    port: u32,
    call: impl FnOnce(*const libc::sockaddr, libc::socklen_t) -> libc::c_int,
) -> libc::c_int {
    // SAFETY: an address of zeros is one.
    let mut address: libc::sockaddr_vm = unsafe { mem::zeroed() };
    address.svm_family = libc::AF_VSOCK as libc::sa_family_t;
    (address.svm_cid, address.svm_port) = (cid, port);
    call((&raw const address).cast(), mem::size_of_val(&address) as libc::socklen_t)
}

/// Says back to each who connects to `port` what he says, from now on.
pub fn echo(port: u32) -> Result<(), String> {
    let listener = socket()?;
    // SAFETY: a whole address is read.
    let bound = with_address(ANY, port, |address, length| unsafe {
        libc::bind(listener.as_raw_fd(), address, length)
    });
    checked(bound, "bind")?;
    // SAFETY: the call takes numbers.
    checked(unsafe { libc::listen(listener.as_raw_fd(), 8) }, "listen")?;
    thread::spawn(move || {
        loop {
            // SAFETY: nothing is asked of the other's address; what it returns is a new descriptor.
            let client =
                unsafe { libc::accept(listener.as_raw_fd(), std::ptr::null_mut(), std::ptr::null_mut()) };
            if client < 0 {
                return println!("ERROR accept: {}", io::Error::last_os_error());
            }
            // SAFETY: it is nobody else's.
            let mut client = unsafe { File::from_raw_fd(client) };
            thread::spawn(move || {
                let mut piece = vec![0; 64 << 10];
                while let Ok(count @ 1..) = client.read(&mut piece) {
                    if client.write_all(&piece[..count]).is_err() {
                        break;
                    }
                }
            });
        }
    });
    Ok(())
}

/// Sends `count` bytes to `port` of the host, which says them back.
pub fn send(port: u32, count: usize) -> Result<(), String> {
    let mut stream = socket()?;
    // SAFETY: a whole address is read.
    let connected = with_address(HOST, port, |address, length| unsafe {
        libc::connect(stream.as_raw_fd(), address, length)
    });
    checked(connected, "connect")?;
    let said: Vec<u8> = (0..count).map(|place| (place * 31 % 251) as u8).collect();
    let mut out = stream.try_clone().map_err(|error| error.to_string())?;
    let to_say = said.clone();
    let says = thread::spawn(move || {
        out.write_all(&to_say)?;
        // SAFETY: the call takes numbers.
        unsafe { libc::shutdown(out.as_raw_fd(), libc::SHUT_WR) };
        Ok::<_, io::Error>(())
    });
    let mut heard = Vec::new();
    stream.read_to_end(&mut heard).map_err(|error| format!("read: {error}"))?;
    says.join().map_err(|_| "the sender panicked")?.map_err(|error| format!("write: {error}"))?;
    if heard == said { Ok(()) } else { Err(format!("{} of {count} bytes came back", heard.len())) }
}
