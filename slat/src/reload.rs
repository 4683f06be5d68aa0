//! SLAT on and off on a real host: the module of KVM is loaded anew with the other setting, and as it
//! was in the end.
//!
//! `npt` and `ept` change only when a module is loaded, so there is no gentler way. Nothing is touched
//! unless all of this holds: root, a real host, one such run at a time, a module that nobody uses, and
//! parameters that could be read. [`Reloaded`] puts them back when it is dropped; what is measured in
//! between runs in another process, whose death is no way around that.

use std::collections::BTreeMap;
use std::ffi::CString;
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use crate::host;
use crate::probe::{self, Verdict};

const LOCK: &str = "/run/ballast-slat-reload.lock";
const MODULES: &str = "/sys/module";
/// How long a module may stay busy after its last VM has gone.
const PATIENCE: Duration = Duration::from_secs(5);
/// What parameters read as that their own parser refuses: `vmentry_l1d_flush` tells so why there is nothing to
/// flush (Linux, arch/x86/kvm/vmx/vmx.c, `vmentry_l1d_param`). Left out, it comes up the same by itself.
const ONLY_READ: [(&str, &str); 2] =
    [("vmentry_l1d_flush", "EPT disabled"), ("vmentry_l1d_flush", "not required")];

/// Why the module was not reloaded, or not as it should be.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Not root.
    #[error("reloading a kernel module takes root")]
    NotRoot,
    /// No real host.
    #[error(
        "this host is emulated (or runs under a hypervisor that says nothing else): use `ballast slat lab`, which \
         sets SLAT on and off in hosts of its own"
    )]
    Emulated,
    /// Nothing to switch.
    #[error("no module with a setting for SLAT is loaded: it takes kvm_intel (ept) or kvm_amd (npt)")]
    NoModule,
    /// Two at once.
    #[error("another `--reload-module` runs on this host (it holds {LOCK})")]
    Locked,
    /// Somebody has /dev/kvm open.
    #[error("{module} is in use ({users} users): stop every VM first; nothing was changed")]
    Busy {
        /// The module.
        module: String,
        /// Its reference count.
        users: String,
    },
    /// A parameter can't be kept.
    #[error(
        "the parameter {name} of {module} can't be kept ({source}), so that it could not be put back; nothing was changed"
    )]
    Parameter {
        /// The module.
        module: String,
        /// The parameter.
        name: String,
        /// Why.
        source: io::Error,
    },
    /// The lock's file.
    #[error("{LOCK} can't be made: {0}")]
    Lock(io::Error),
    /// Taking it out failed.
    #[error("{module} can't be unloaded: {source}")]
    Unload {
        /// The module.
        module: String,
        /// Why.
        source: io::Error,
    },
    /// Putting it in failed.
    #[error("{module} can't be loaded with `{parameters}`: {why}")]
    Load {
        /// The module.
        module: String,
        /// As asked.
        parameters: String,
        /// Why.
        why: String,
    },
    /// The guest says something else.
    #[error("{module} was loaded with SLAT {wanted}, but the probe found {found:?}: {sentence}")]
    Contradiction {
        /// The module.
        module: String,
        /// `on` or `off`.
        wanted: &'static str,
        /// What the probe found.
        found: Verdict,
        /// In words.
        sentence: &'static str,
    },
}

/// The module that can be switched, as it was found.
#[derive(Debug)]
pub struct Switch {
    module: String,
    /// The parameter for SLAT.
    parameter: &'static str,
    saved: BTreeMap<String, String>,
    on: bool,
    // Held until the end: the lock goes with it.
    _lock: File,
}

/// `ept` of kvm_intel, `npt` of kvm_amd.
fn setting(module: &str) -> Option<&'static str> {
    match module {
        "kvm_intel" => Some("ept"),
        "kvm_amd" => Some("npt"),
        _ => None,
    }
}

fn is_on(value: &str) -> bool {
    matches!(value, "Y" | "1")
}

impl Switch {
    /// Looks whether everything is as it must be; changes nothing.
    ///
    /// # Errors
    /// [`Error`] says what is in the way. `even_if_emulated` is for the lab's own hosts.
    pub fn find(even_if_emulated: bool) -> Result<Self, Error> {
        // SAFETY: the call has no preconditions.
        if unsafe { libc::geteuid() } != 0 {
            return Err(Error::NotRoot);
        }
        if host::is_emulated() && !even_if_emulated {
            return Err(Error::Emulated);
        }
        let module = host::kvm_module().ok_or(Error::NoModule)?;
        let parameter = setting(&module).ok_or(Error::NoModule)?;
        let lock = File::create(LOCK).map_err(Error::Lock)?;
        // SAFETY: an open file of our own.
        if unsafe { libc::flock(lock.as_raw_fd(), libc::LOCK_EX | libc::LOCK_NB) } != 0 {
            return Err(Error::Locked);
        }
        let saved = parameters(Path::new(MODULES), &module)?;
        let on = saved.get(parameter).is_some_and(|value| is_on(value));
        let switch = Self { module, parameter, saved, on, _lock: lock };
        switch.idle()?;
        Ok(switch)
    }

    /// Whether SLAT is on as the host is set up.
    pub const fn is_on(&self) -> bool {
        self.on
    }

    /// What a person types to put things back, should this process be killed in between.
    pub fn rescue(&self) -> String {
        format!("modprobe -r {0}; modprobe {0} {1}", self.module, words(&self.saved))
    }

    fn idle(&self) -> Result<(), Error> {
        let read = || fs::read_to_string(Path::new(MODULES).join(&self.module).join("refcnt"));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let users = read().map_or_else(|error| error.to_string(), |text| text.trim().to_owned());
            if users == "0" {
                return Ok(());
            }
            // A VM that has just ended is given up a moment later.
            if Instant::now() >= deadline {
                return Err(Error::Busy { module: self.module.clone(), users });
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Loads the module with SLAT the other way round. Dropping what comes back puts everything as it was.
    ///
    /// # Errors
    /// Where the module can't be taken out, in which case nothing has changed, or comes up otherwise than
    /// asked for, in which case it has been put back.
    pub fn reload(&self) -> Result<Reloaded<'_>, Error> {
        let mut other = self.saved.clone();
        other.insert(self.parameter.to_owned(), if self.on { "0" } else { "1" }.to_owned());
        self.idle()?;
        unload(&self.module)?;
        // From here on every way out goes through its drop.
        let reloaded = Reloaded { switch: self, restored: false };
        load(&self.module, &other)?;
        self.agrees(!self.on)?;
        Ok(reloaded)
    }

    /// Asks a guest whether SLAT is on.
    fn agrees(&self, on: bool) -> Result<(), Error> {
        let found = probe::probe().verdict;
        let right = if on { Verdict::Slat } else { Verdict::ShadowPaging };
        if found == right {
            return Ok(());
        }
        let wanted = if on { "on" } else { "off" };
        Err(Error::Contradiction { module: self.module.clone(), wanted, found, sentence: found.sentence() })
    }

    fn restore(&self) -> Result<(), Error> {
        // Where it could not be loaded the other way round there is nothing to take out.
        if fs::exists(Path::new(MODULES).join(&self.module)).unwrap_or(true) {
            self.idle()?;
            unload(&self.module)?;
        }
        load(&self.module, &self.saved)?;
        self.agrees(self.on)
    }
}

/// The module as it was not before; as it was again when this is dropped.
#[derive(Debug)]
pub struct Reloaded<'s> {
    switch: &'s Switch,
    restored: bool,
}

impl Reloaded<'_> {
    /// Puts the module back and asks a guest whether it is.
    ///
    /// # Errors
    /// Where it can't be; the sentence for the user then comes with [`Switch::rescue`].
    pub fn restore(mut self) -> Result<(), Error> {
        self.restored = true;
        self.switch.restore()
    }
}

impl Drop for Reloaded<'_> {
    fn drop(&mut self) {
        if self.restored {
            return;
        }
        if let Err(error) = self.switch.restore() {
            let rescue = self.switch.rescue();
            // A panic here would hide what is worse.
            let _ = writeln!(io::stderr(), "ballast: {error}; put the module back by hand: {rescue}");
        }
    }
}

/// All parameters of a module that has been loaded, but for those that no module could be loaded with.
fn parameters(root: &Path, module: &str) -> Result<BTreeMap<String, String>, Error> {
    let directory = root.join(module).join("parameters");
    let fault = |name: &str, source| Error::Parameter { module: module.into(), name: name.into(), source };
    let mut all = BTreeMap::new();
    for entry in fs::read_dir(&directory).map_err(|e| fault("(all)", e))? {
        let entry = entry.map_err(|e| fault("(all)", e))?;
        let name = entry.file_name().to_string_lossy().into_owned();
        let value = fs::read_to_string(entry.path()).map_err(|e| fault(&name, e))?;
        let value = value.trim();
        if value.contains('"') {
            let why = format!("{value} has a quote in it");
            return Err(fault(&name, io::Error::new(io::ErrorKind::InvalidData, why)));
        }
        // A string that was never set reads as `(null)`.
        if value != "(null)" && !ONLY_READ.contains(&(name.as_str(), value)) {
            all.insert(name, value.to_owned());
        }
    }
    Ok(all)
}

/// Each parameter as the kernel, modprobe and a shell all take it: blanks between quotes (Linux, lib/cmdline.c).
fn settings(parameters: &BTreeMap<String, String>) -> Vec<String> {
    let setting = |(name, value): (&String, &String)| match value.contains(char::is_whitespace) {
        true => format!("{name}=\"{value}\""),
        false => format!("{name}={value}"),
    };
    parameters.iter().map(setting).collect()
}

fn words(parameters: &BTreeMap<String, String>) -> String {
    settings(parameters).join(" ")
}

fn unload(module: &str) -> Result<(), Error> {
    let fault = |source| Error::Unload { module: module.into(), source };
    let name = CString::new(module).map_err(|e| fault(e.into()))?;
    // SAFETY: a terminated string; the call never waits (O_NONBLOCK) and refuses where somebody uses it.
    match unsafe { libc::syscall(libc::SYS_delete_module, name.as_ptr(), libc::O_NONBLOCK) } {
        0 => Ok(()),
        _ => Err(fault(io::Error::last_os_error())),
    }
}

/// Loads it from its file where that is not compressed, else by modprobe, which knows how.
fn load(module: &str, parameters: &BTreeMap<String, String>) -> Result<(), Error> {
    let words = words(parameters);
    let fault = |why: String| Error::Load { module: module.into(), parameters: words.clone(), why };
    let release = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    let roots = [Path::new("/lib/modules").join(release.trim()), PathBuf::from("/lib/modules")];
    if let Some(path) = roots.iter().find_map(|root| plain_file(root, module)) {
        let file = File::open(&path).map_err(|e| fault(format!("{}: {e}", path.display())))?;
        let text = CString::new(words.clone()).map_err(|e| fault(e.to_string()))?;
        // SAFETY: an open file and a terminated string.
        return match unsafe { libc::syscall(libc::SYS_finit_module, file.as_raw_fd(), text.as_ptr(), 0) } {
            0 => Ok(()),
            _ => Err(fault(io::Error::last_os_error().to_string())),
        };
    }
    let output = Command::new("modprobe").arg(module).args(settings(parameters)).output();
    let output = output.map_err(|e| fault(format!("modprobe: {e}")))?;
    if output.status.success() {
        return Ok(());
    }
    Err(fault(String::from_utf8_lossy(&output.stderr).trim().to_owned()))
}

/// The file of a module in KVM's own directory or beside the others.
fn plain_file(root: &Path, module: &str) -> Option<PathBuf> {
    let names = [module.to_owned(), module.replace('_', "-")];
    let directories = [root.join("kernel/arch/x86/kvm"), root.to_owned()];
    let paths = directories.iter().flat_map(|d| names.iter().map(move |n| d.join(format!("{n}.ko"))));
    paths.into_iter().find(|path| path.is_file())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn parameters_are_kept_as_they_are_written() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("kvm_amd/parameters");
        fs::create_dir_all(&directory).expect("directories");
        for (name, value) in [("npt", "Y\n"), ("nested", "1\n"), ("path", "(null)\n"), ("list", "1,2\n")] {
            fs::write(directory.join(name), value).expect("a file");
        }
        let saved = parameters(root.path(), "kvm_amd").expect("readable");
        assert_eq!(words(&saved), "list=1,2 nested=1 npt=Y");
        let missing = parameters(root.path(), "kvm_intel");
        assert!(matches!(missing, Err(Error::Parameter { .. })));
    }

    #[test]
    fn what_a_module_could_not_be_loaded_with_is_left_out_or_refused_before_it_is_touched() {
        let root = tempfile::tempdir().expect("a directory");
        let directory = root.path().join("kvm_intel/parameters");
        fs::create_dir_all(&directory).expect("directories");
        let write = |name: &str, value: &str| fs::write(directory.join(name), value).expect("a file");
        write("ept", "Y\n");
        for (value, kept) in [
            ("not required", "ept=Y"),
            ("EPT disabled", "ept=Y"),
            ("cond", "ept=Y vmentry_l1d_flush=cond"),
            ("two words", "ept=Y vmentry_l1d_flush=\"two words\""),
        ] {
            write("vmentry_l1d_flush", value);
            let saved = parameters(root.path(), "kvm_intel").expect("readable");
            assert_eq!(words(&saved), kept);
            assert_eq!(settings(&saved).len(), saved.len(), "a setting is one word");
        }
        write("vmentry_l1d_flush", "a\"b");
        let refused = parameters(root.path(), "kvm_intel").expect_err("it can't be quoted");
        assert!(refused.to_string().contains("nothing was changed"), "{refused}");
    }

    #[test]
    fn module_files_are_found_under_either_spelling() {
        let root = tempfile::tempdir().expect("a directory");
        assert_eq!(plain_file(root.path(), "kvm_amd"), None);
        let directory = root.path().join("kernel/arch/x86/kvm");
        fs::create_dir_all(&directory).expect("directories");
        let path = directory.join("kvm-amd.ko");
        fs::write(&path, "").expect("a file");
        assert_eq!(plain_file(root.path(), "kvm_amd"), Some(path));
    }

    #[test]
    fn a_host_without_the_setting_is_left_alone() {
        // Nowhere that tests run may it go further than looking.
        if fs::exists("/sys/module/kvm_amd").unwrap_or(true)
            || fs::exists("/sys/module/kvm_intel").unwrap_or(true)
        {
            return;
        }
        let refused = Switch::find(true).expect_err("there is nothing to switch");
        assert!(matches!(refused, Error::NotRoot | Error::NoModule), "{refused}");
    }
}
