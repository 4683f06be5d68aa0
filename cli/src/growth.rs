//! How a guest is to get memory beyond what it starts with, where the command line leaves that open.

use std::borrow::Borrow;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};
use std::path::{Path, PathBuf};

use api::guest_memory;
use api::limits::Limits;
use api::units::Bytes;
use image::kernel::prepared::PreparedKernel;
use image::modules::{self, Module};
use image::{BootFile, Error};

const MODULE: &str = "virtio_mem";
/// A parameter that it has had since it is in Linux (5.8).
const PARAMETER: &str = "unplug_online";

/// What was found out about a guest.
#[derive(Debug)]
pub enum Growth {
    /// It can plug.
    Plug(Module),
    /// It can plug once its root file system is there, which has the module in this file.
    PlugLate(PathBuf),
    /// It can't, or nobody knows, for this reason.
    Balloon(String),
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plug(Module::InInitramfs(file)) => write!(f, "it plugs memory: its initramfs has {file}"),
            Self::Plug(Module::BuiltIn) => write!(f, "it plugs memory: {MODULE} is built into its kernel"),
            Self::PlugLate(file) => {
                write!(f, "it plugs memory, once its udev has loaded {}", file.display())
            }
            Self::Balloon(why) => write!(f, "it grows by its balloon: {why}"),
        }
    }
}

/// What a guest that boots these can do. Only where its initramfs does not tell, `unpack` is asked for what the
/// kernel holds that is packed; it gives none where that is not to be looked into. Its disk has the module as
/// `on_disk`, as far as that is known.
pub fn of_guest<K: Borrow<PreparedKernel>>(
    kernel: &BootFile,
    initrd: Option<&BootFile>,
    on_disk: Option<&Path>,
    unpack: impl FnOnce(&File) -> Result<Option<K>, Error>,
) -> Growth {
    let unknown = |what: &str, file: &BootFile, why: &Error| {
        Growth::Balloon(format!(
            "nobody knows whether the {what} {} has {MODULE}: {why}",
            file.name().display()
        ))
    };
    let in_initramfs = initrd.map(|file| {
        let found = file.open().map_err(Error::Read).and_then(|file| modules::in_initramfs(&file, MODULE));
        found.map_err(|why| unknown("initramfs", file, &why))
    });
    if let Some(Ok(Some(module))) = in_initramfs {
        return Growth::Plug(module);
    }
    // Whatever loads it comes early enough: until then nothing is asked of the guest.
    if let Some(file) = on_disk {
        return Growth::PlugLate(file.to_owned());
    }
    match built_in(kernel, unpack) {
        Ok(true) => return Growth::Plug(Module::BuiltIn),
        Ok(false) => {}
        Err(why) if !matches!(in_initramfs, Some(Err(_))) => return unknown("kernel", kernel, &why),
        Err(_) => {}
    }
    match in_initramfs {
        Some(Err(unknown)) => unknown,
        Some(Ok(_)) => Growth::Balloon(format!("neither its kernel nor its initramfs has {MODULE}")),
        None => Growth::Balloon(format!("its kernel has no {MODULE}, and there is no initramfs that could")),
    }
}

fn built_in<K: Borrow<PreparedKernel>>(
    kernel: &BootFile,
    unpack: impl FnOnce(&File) -> Result<Option<K>, Error>,
) -> Result<bool, Error> {
    let mut file = kernel.open().map_err(Error::Read)?;
    let mut magic = [0; 4];
    file.read_exact(&mut magic).map_err(Error::Read)?;
    file.rewind().map_err(Error::Read)?;
    if magic == *b"\x7fELF" {
        return modules::has_parameter(&mut file, MODULE, PARAMETER).map_err(Error::Read);
    }
    // Without unpacking it is as if it had none: nothing is known of what is packed.
    let Some(kernel) = unpack(&file)? else { return Ok(false) };
    let mut contents = kernel.borrow().contents().map_err(Error::Read)?;
    modules::has_parameter(&mut contents, MODULE, PARAMETER).map_err(Error::Read)
}

impl Growth {
    /// Whether it plugs.
    pub fn is_plug(&self) -> bool {
        matches!(self, Self::Plug(_) | Self::PlugLate(_))
    }
}

/// Whether a VM with these limits has anything to plug.
pub fn has_more(limits: &Limits) -> bool {
    limits.max() > limits.startup()
}

/// What is to be said of a guest whose kernel spends a large part of its startup memory on its max before it
/// runs; `None` where that is little.
pub fn starts_with_too_little(limits: Limits, plugs: bool) -> Option<String> {
    // One that plugs has structures for what is plugged, when it is.
    let map = if plugs { limits.startup() } else { limits.max() };
    let (cost, least) = (guest_memory::fixed_cost(map), guest_memory::least_start(map));
    let startup = limits.startup();
    if startup >= least || cost <= Bytes(startup.0 / 8) {
        return None;
    }
    Some(format!(
        "with max={map} this guest spends {cost} before it runs, and it starts with {startup}: start it with at \
         least {least}, or let it plug (--grow plug)"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_guest_that_its_max_leaves_little_of_its_start_is_warned_of() {
        let said = |limits: &str, plugs| starts_with_too_little(limits.parse().expect("limits"), plugs);
        for fits in ["128M", "256M,max=1G", "512M,max=16G"] {
            assert_eq!(said(fits, false), None, "{fits}");
        }
        for short in ["256M,max=4G", "256M,max=16G", "1G,max=64G"] {
            let told = said(short, false).expect("it is short");
            assert!(told.contains("--grow plug"), "{told}");
            assert_eq!(said(short, true), None);
        }
        assert!(said("256M,max=16G", false).expect("short").contains("at least 512 MiB"));
    }
}
