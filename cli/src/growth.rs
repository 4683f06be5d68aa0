//! How a guest is to get memory beyond what it starts with, where the command line leaves that open.

use std::borrow::Borrow;
use std::fmt;
use std::fs::File;
use std::io::{Read, Seek};

use api::limits::Limits;
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
    /// It can't, or nobody knows, for this reason.
    Balloon(String),
}

impl fmt::Display for Growth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Plug(Module::InInitramfs(file)) => write!(f, "it plugs memory: its initramfs has {file}"),
            Self::Plug(Module::BuiltIn) => write!(f, "it plugs memory: {MODULE} is built into its kernel"),
            Self::Balloon(why) => write!(f, "it grows by its balloon: {why}"),
        }
    }
}

/// What a guest that boots these can do. Only where its initramfs does not tell, `unpack` is asked for what the
/// kernel holds that is packed; it gives none where that is not to be looked into.
pub fn of_guest<K: Borrow<PreparedKernel>>(
    kernel: &BootFile,
    initrd: Option<&BootFile>,
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

/// Whether a VM with these limits has anything to plug.
pub fn has_more(limits: &Limits) -> bool {
    limits.max() > limits.startup()
}
