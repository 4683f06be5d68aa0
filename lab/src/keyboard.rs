//! A person's keys for a host whose emulator does not read them itself.

use std::fs::File;
use std::io::{self, Read, Write};
use std::sync::Mutex;
use std::thread;

use rustix::stdio::stdin;
use rustix::termios::{OptionalActions, Termios, tcgetattr, tcsetattr};

use crate::Error;
use crate::error::files;

/// The modes of this process's terminal before a host had it.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);

/// Hands on what is typed from now on, each key as it is pressed, until this process ends.
///
/// # Errors
/// Where standard input is no terminal, or there is no thread to be had.
pub fn follow(mut host: File) -> Result<(), Error> {
    let raw = || {
        let modes = tcgetattr(stdin())?;
        let mut raw = modes.clone();
        raw.make_raw();
        tcsetattr(stdin(), OptionalActions::Now, &raw)?;
        *BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = Some(modes);
        Ok::<_, rustix::io::Errno>(())
    };
    raw().map_err(|error| files("this terminal")(error.into()))?;
    let pass_on = move || {
        let mut keys = [0; 256];
        while let Ok(count @ 1..) = io::stdin().read(&mut keys) {
            if host.write_all(&keys[..count]).is_err() {
                break;
            }
        }
    };
    thread::Builder::new().spawn(pass_on).map(drop).map_err(files("a thread for the keyboard"))
}

/// Gives the terminal back.
pub fn give_back() {
    if let Some(modes) = BEFORE.lock().unwrap_or_else(std::sync::PoisonError::into_inner).take() {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &modes);
    }
}
