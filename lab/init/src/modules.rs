//! Kernel modules, loaded in the order of a list.

use std::ffi::CString;
use std::fs::{self, File};
use std::io;
use std::path::Path;

/// Where the lab puts the list of a guest's modules.
pub const LIST: &str = "/lib/modules/order";

/// Loads modules, which must come behind those that they depend on.
///
/// Each is a path, then the module's parameters behind a space if it has any. A module that
/// finds no device stays loaded; one that can't be loaded is said on the
/// console and passed over, as a guest that lacks it may still do its work.
pub fn load<'a>(modules: impl IntoIterator<Item = &'a str>) {
    for module in modules {
        let (path, parameters) = module.split_once(' ').unwrap_or((module, ""));
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
        load(list.lines().filter(|line| without.is_none_or(|name| !line.contains(&format!("/{name}.ko")))));
    }
}

fn load_one(path: &Path, parameters: &str) -> io::Result<()> {
    let parameters = CString::new(parameters)?;
    match rustix::system::finit_module(&File::open(path)?, &parameters, 0) {
        Ok(()) | Err(rustix::io::Errno::EXIST) => Ok(()),
        Err(error) => Err(error.into()),
    }
}
