//! Kernel modules, loaded in the order of a list.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Where the lab puts the list of a guest's modules.
pub const LIST: &str = "/lib/modules/order";

/// Loads every module of the list, dependencies first as it stands there.
///
/// A line is a path, then the module's parameters if it has any. A module that
/// finds no device stays loaded; one that can't be loaded is said on the
/// console and passed over, as a guest that lacks it may still do its work.
pub fn load(list: &str) {
    for line in list.lines().map(str::trim).filter(|line| !line.is_empty()) {
        let (path, parameters) = line.split_once(' ').unwrap_or((line, ""));
        if let Err(error) = load_one(Path::new(path), parameters) {
            println!("guest-init: {path} was not loaded: {error}");
        }
    }
}

/// Loads the modules that [`LIST`] names; none where it does not exist.
///
/// `ballast.without=NAME` on the kernel's command line leaves one out.
pub fn load_listed() {
    let cmdline = fs::read_to_string("/proc/cmdline").unwrap_or_default();
    let without = cmdline.split_whitespace().find_map(|word| word.strip_prefix("ballast.without="));
    if let Ok(list) = fs::read_to_string(LIST) {
        let wanted = |line: &&str| without.is_none_or(|name| !line.contains(&format!("/{name}.ko")));
        load(&list.lines().filter(wanted).collect::<Vec<_>>().join("\n"));
    }
}

fn load_one(path: &Path, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    match rustix::system::finit_module(&File::open(path)?, &parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
