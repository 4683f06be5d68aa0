//! Which kernel of a disk is booted, and how.
//!
//! In this order: the newest entry of the Boot Loader Specification ([`entries`]), the links `/vmlinuz` and
//! `/initrd.img` that Debian keeps, the newest `vmlinuz-*` ([`version`]). The command line is what the distribution
//! states ([`grub`]), and `root=`.

pub mod entries;
pub mod grub;
pub mod modules;
pub mod version;

use std::rc::Rc;

use api::units::Bytes;
use serde::{Deserialize, Serialize};

use self::version::Version;
use super::SearchError;
use super::ext4::Ext4Files;
use super::fat::FatFiles;
use super::files::Files;
use super::partitions::{self, Volume};
use super::signature::{self, Content};
use super::source::Source;

/// Bytes of a kernel at most.
pub const LARGEST_KERNEL: u64 = 64 << 20;
/// Bytes of an initramfs at most, of all its files together.
pub const LARGEST_INITRD: u64 = 512 << 20;
/// Files of an initramfs at most: a processor's microcode, and the system.
const MOST_INITRDS: usize = 8;

/// What a disk is booted with.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// Where the kernel lies: `partition 1 (ext4)`.
    pub place: String,
    /// What named it.
    pub by: String,
    /// The kernel's file.
    pub kernel: String,
    /// The files of its initramfs, in their order.
    pub initrd: Vec<String>,
    /// The kernel's command line as the distribution states it, with `root=` and `ro`.
    pub cmdline: String,
    /// Where in the root file system this kernel has the driver with which it plugs memory.
    pub memory_driver: Option<String>,
}

/// A file system of the disk.
pub struct FileSystem {
    /// Its files.
    pub files: Box<dyn Files>,
    /// Its UUID, where Linux finds it by that.
    pub uuid: Option<String>,
    /// `partition 1 (ext4)`.
    pub place: String,
    /// Its number in the partition table.
    pub number: Option<u32>,
    /// What Linux calls its PARTUUID.
    pub partuuid: Option<String>,
    /// Whether the table says that it is a root file system.
    pub is_root: bool,
}

/// A kernel that could be booted.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Candidate {
    by: String,
    kernel: String,
    initrd: Vec<String>,
    /// Its command line, where it stands with it.
    options: Option<String>,
}

/// What was found on a disk: the plan, and where its files are.
pub struct Search {
    /// The plan.
    pub plan: Plan,
    systems: Vec<FileSystem>,
    chosen: usize,
}

impl Search {
    /// Looks through a disk.
    ///
    /// # Errors
    /// [`SearchError`] says why there is no kernel.
    pub fn on(source: Rc<dyn Source>) -> Result<Self, SearchError> {
        let (systems, others) = file_systems(source)?;
        let (plan, chosen) = plan(&systems, &others)?;
        Ok(Self { plan, systems, chosen })
    }

    /// Hands the kernel to `take`, piece by piece.
    ///
    /// # Errors
    /// [`SearchError`].
    pub fn kernel(&self, take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>) -> Result<(), SearchError> {
        self.copy(&[&self.plan.kernel], LARGEST_KERNEL, take)
    }

    /// Hands the initramfs to `take`, piece by piece.
    ///
    /// # Errors
    /// [`SearchError`].
    pub fn initrd(&self, take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>) -> Result<(), SearchError> {
        self.copy(&self.plan.initrd.iter().collect::<Vec<_>>(), LARGEST_INITRD, take)
    }

    /// Copies files behind each other, each padded to four bytes, as a kernel wants it of its initramfs
    /// (Documentation/driver-api/early-userspace/buffer-format.rst).
    fn copy(
        &self,
        paths: &[&String],
        limit: u64,
        take: &mut dyn FnMut(&[u8]) -> Result<(), SearchError>,
    ) -> Result<(), SearchError> {
        let Some(system) = self.systems.get(self.chosen) else { return Ok(()) };
        let mut copied: u64 = 0;
        for (number, path) in paths.iter().enumerate() {
            let padding = (4 - copied % 4) % 4;
            if number > 0 && padding > 0 {
                take([0; 4].get(..padding as usize).unwrap_or_default())?;
                copied += padding;
            }
            let size = system.files.size(path)?.unwrap_or(0);
            if copied.saturating_add(size) > limit {
                let (path, limit) = ((*path).clone(), Bytes(limit));
                return Err(SearchError::TooLarge { path, size: Bytes(size), limit });
            }
            system.files.read(path, take)?;
            copied = copied.saturating_add(size);
        }
        Ok(())
    }
}

/// The file systems that can be read, and what else lies on the disk, in words.
fn file_systems(source: Rc<dyn Source>) -> Result<(Vec<FileSystem>, Vec<String>), SearchError> {
    let (mut systems, mut others) = (Vec::new(), Vec::new());
    for Volume { view, number, partuuid, is_root } in partitions::read(source)? {
        let name = number.map_or_else(|| "the disk".to_owned(), |number| format!("partition {number}"));
        let place = |kind: &str| format!("{name} ({kind})");
        let mut add = |files: Box<dyn Files>, uuid, place| {
            let partuuid = partuuid.clone();
            systems.push(FileSystem { files, uuid, place, number, partuuid, is_root });
        };
        match signature::probe(&view).map_err(SearchError::Read)? {
            Content::Ext => match Ext4Files::open(&view, &place("ext4"))? {
                Ok(files) => {
                    let uuid = Some(files.uuid.clone());
                    add(Box::new(files), uuid, place("ext4"));
                }
                Err(reason) => others.push(format!("{name} holds an ext4 {reason}")),
            },
            Content::Fat => match FatFiles::open(&view, &place("FAT")) {
                Ok(files) => add(Box::new(files), None, place("FAT")),
                Err(reason) => others.push(format!("{name} holds a FAT {reason}")),
            },
            Content::Other(kind) => others.push(format!("{name} holds {kind}")),
            Content::Unknown if number.is_none() => return Err(SearchError::Blank),
            Content::Unknown => {}
        }
    }
    Ok((systems, others))
}

/// The plan, and the number of the file system that has its files.
fn plan(systems: &[FileSystem], others: &[String]) -> Result<(Plan, usize), SearchError> {
    if systems.is_empty() {
        let others =
            if others.is_empty() { "its partitions are empty".to_owned() } else { others.join(", ") };
        return Err(SearchError::Unreadable(others));
    }
    let mut found = None;
    for look in [by_entry, by_name] {
        for (number, system) in systems.iter().enumerate() {
            if found.is_none() {
                found = look(&*system.files)?.map(|candidate| (number, system, candidate));
            }
        }
    }
    let Some((number, system, candidate)) = found else {
        let looked = systems.iter().map(|system| format!("looked in {}", system.place));
        let said: Vec<String> = looked.chain(others.iter().cloned()).collect();
        return Err(SearchError::NoKernel(said.join(", ")));
    };
    let Candidate { by, kernel, initrd, options } = candidate;
    let root = root(systems, number)?;
    let stated = match options {
        Some(options) => Some(options),
        None => root.map(|root| grub::command_line(&*root.files)).transpose()?.flatten(),
    };
    let words = stated.as_deref().map(without_variables).unwrap_or_default();
    let has = |name: &str| words.split_whitespace().any(|word| word.split('=').next() == Some(name));
    let mut line = Vec::new();
    if !has("root") {
        let root = root.ok_or_else(|| SearchError::NoRoot(kernel.clone()))?;
        line.push(format!("root={}", name_of(root, !initrd.is_empty())));
    }
    if !has("ro") && !has("rw") {
        line.push("ro".to_owned());
    }
    line.extend((!words.is_empty()).then_some(words));
    let memory_driver = match root {
        Some(root) => modules::of_kernel(&*root.files, &kernel, "kernel/drivers/virtio/virtio_mem.ko")?,
        None => None,
    };
    let plan =
        Plan { place: system.place.clone(), by, kernel, initrd, cmdline: line.join(" "), memory_driver };
    Ok((plan, number))
}

/// What the kernel finds a file system by, or its initramfs.
fn name_of(root: &FileSystem, has_initrd: bool) -> String {
    match (&root.partuuid, &root.uuid) {
        (Some(partuuid), _) => format!("PARTUUID={partuuid}"),
        (None, Some(uuid)) if has_initrd => format!("UUID={uuid}"),
        // Without an initramfs nobody knows UUIDs.
        _ => root.number.map_or_else(|| "/dev/vda".to_owned(), |number| format!("/dev/vda{number}")),
    }
}

/// The root file system: the kernel's own where that is one, or the first that is.
fn root(systems: &[FileSystem], kernels: usize) -> Result<Option<&FileSystem>, SearchError> {
    let own = systems.get(kernels).into_iter();
    let typed = systems.iter().filter(|system| system.is_root);
    for system in own.chain(typed).chain(systems) {
        for release in ["/etc/os-release", "/usr/lib/os-release", "/sbin/init", "/etc/fstab"] {
            if system.files.size(release)?.is_some() {
                return Ok(Some(system));
            }
        }
    }
    Ok(systems.iter().find(|system| system.is_root))
}

/// Takes off words that are variables of a boot loader.
fn without_variables(options: &str) -> String {
    options.split_whitespace().filter(|word| !word.starts_with('$')).collect::<Vec<_>>().join(" ")
}

fn by_entry(files: &dyn Files) -> Result<Option<Candidate>, SearchError> {
    for (prefix, entry) in entries::newest_first(files)? {
        let find = |path: &str| -> Result<Option<String>, SearchError> {
            let path = format!("/{}", path.trim_start_matches('/'));
            for path in [format!("{prefix}{path}"), path] {
                if is_there(files, &path)? {
                    return Ok(Some(path));
                }
            }
            Ok(None)
        };
        let Some(kernel) = find(&entry.linux)? else { continue };
        let mut initrd = Vec::new();
        for path in &entry.initrd {
            initrd.push(find(path)?);
        }
        let whole: Option<Vec<String>> = initrd.into_iter().collect();
        if let Some(initrd) = whole.filter(|initrd| initrd.len() <= MOST_INITRDS) {
            let options = Some(entry.options);
            return Ok(Some(Candidate { by: entry.name, kernel, initrd, options }));
        }
    }
    Ok(None)
}

fn by_name(files: &dyn Files) -> Result<Option<Candidate>, SearchError> {
    let linked = |directory: &str| -> Result<Option<Candidate>, SearchError> {
        let (kernel, initrd) = (format!("{directory}/vmlinuz"), format!("{directory}/initrd.img"));
        let both = is_there(files, &kernel)? && is_there(files, &initrd)?;
        if !both {
            return Ok(None);
        }
        let by = format!("the link {kernel}");
        let (kernel, initrd) = (files.resolve(&kernel)?, vec![files.resolve(&initrd)?]);
        Ok(Some(Candidate { by, kernel, initrd, options: None }))
    };
    for directory in ["", "/boot"] {
        if let Some(candidate) = linked(directory)? {
            return Ok(Some(candidate));
        }
    }
    let mut alone = None;
    for directory in ["/boot", ""] {
        for (name, version) in kernels(files, directory)? {
            let kernel = format!("{directory}/{name}");
            if !is_there(files, &kernel)? {
                continue;
            }
            let by = "its version, the newest".to_owned();
            let mut candidate = Candidate { by, kernel, initrd: Vec::new(), options: None };
            for initrd in initrds(&version) {
                let initrd = format!("{directory}/{initrd}");
                if is_there(files, &initrd)? {
                    candidate.initrd.push(initrd);
                    return Ok(Some(candidate));
                }
            }
            alone.get_or_insert(candidate);
        }
    }
    Ok(alone)
}

/// The kernels of a directory by name, the newest first, each with its version.
fn kernels(files: &dyn Files, directory: &str) -> Result<Vec<(String, String)>, SearchError> {
    let names = files.names(if directory.is_empty() { "/" } else { directory })?;
    let mut kernels: Vec<(String, String)> = names
        .into_iter()
        .filter_map(|name| {
            let version = name.strip_prefix("vmlinuz-")?.to_owned();
            // What package managers leave beside.
            let is_left =
                [".old", ".bak", ".sig", ".efi", ".tmp", ".new"].iter().any(|end| name.ends_with(end))
                    || name.contains(".dpkg-");
            (!is_left).then_some((name, version))
        })
        .collect();
    kernels.sort_by(|(_, one), (_, other)| Version(other).cmp(&Version(one)).then(other.cmp(one)));
    Ok(kernels)
}

/// How distributions name the initramfs of a kernel.
fn initrds(version: &str) -> [String; 4] {
    [
        format!("initrd.img-{version}"),
        format!("initramfs-{version}.img"),
        format!("initrd-{version}"),
        format!("initramfs-{version}"),
    ]
}

/// Whether there is such a file, with something in it: an update that was cut short leaves empty ones.
fn is_there(files: &dyn Files, path: &str) -> Result<bool, SearchError> {
    Ok(files.size(path)?.is_some_and(|size| size > 0))
}
