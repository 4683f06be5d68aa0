//! Finds VMs by their sockets: those in the runtime directory and those that the configuration names. Watches
//! for changes.

use std::collections::btree_map::{BTreeMap, Entry};
use std::collections::hash_map::HashMap;
use std::fs::{self, Metadata};
use std::io;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use api::limits::Wanted;
use api::runtime;
use inotify::{Inotify, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::time::{Instant, sleep_until};
use tracing::{info, warn};

use super::config::ForeignVms;
use super::log_limiter::LogLimiter;
use super::own_directory;
use crate::driver::ballast::Ballast;
use crate::driver::cloud_hypervisor::CloudHypervisor;
use crate::driver::firecracker::Firecracker;
use crate::driver::qemu::Qemu;
use crate::driver::{Driver, Kind};

/// What tells one file from all others, whatever paths lead to it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FileId {
    device: u64,
    inode: u64,
}

impl FileId {
    /// That of an open file.
    pub fn of(metadata: &Metadata) -> Self {
        Self { device: metadata.dev(), inode: metadata.ino() }
    }

    /// The file at `path` now, if there is one; a link is a file of its own.
    pub fn at(path: &Path) -> Option<Self> {
        fs::symlink_metadata(path).ok().as_ref().map(Self::of)
    }
}

/// The least time between two reports of changes: another VMM's directory may change all the time.
const BETWEEN_CHANGES: Duration = Duration::from_millis(100);

/// Tells a socket from another one that took its name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Incarnation {
    file: FileId,
    /// When it was made, as an inode number may be reused at once. Where the file system does not tell,
    /// `changed` is set instead, which a chmod alters too.
    born: Option<SystemTime>,
    changed: Option<(i64, i64)>,
}

impl Incarnation {
    /// The socket at `path`, if there is one.
    pub fn of(path: &Path) -> Option<Self> {
        let metadata = fs::symlink_metadata(path).ok()?;
        let born = metadata.created().ok();
        metadata.file_type().is_socket().then(|| Self {
            file: FileId::of(&metadata),
            born,
            changed: born.is_none().then(|| (metadata.ctime(), metadata.ctime_nsec())),
        })
    }
}

/// A socket that may be a VM's.
#[derive(Clone, Debug)]
pub struct Found {
    pub name: String,
    pub socket: PathBuf,
    pub incarnation: Incarnation,
    pub kind: Kind,
    /// What it may have, where its VMM does not say.
    pub memory: Option<Wanted>,
}

impl Found {
    /// A new driver for it.
    pub fn driver(&self) -> Box<dyn Driver> {
        let Self { name, socket, memory, .. } = self;
        match self.kind {
            Kind::Ballast => Box::new(Ballast::new(socket)),
            Kind::Qemu => Box::new(Qemu::new(name, socket, *memory)),
            Kind::Firecracker => Box::new(Firecracker::new(socket, *memory)),
            Kind::CloudHypervisor => Box::new(CloudHypervisor::new(socket, *memory)),
        }
    }
}

/// Where VMs are looked for.
pub struct Discovery {
    directory: PathBuf,
    foreign: Vec<ForeignVms>,
    clash_logs: BTreeMap<PathBuf, LogLimiter>,
    /// Paths that lead to a VM which has another one, and which that is.
    aliases: BTreeMap<PathBuf, PathBuf>,
    /// No scan has been made yet.
    new: bool,
}

impl Discovery {
    /// Looks in ballast's own directory, and where other VMMs' sockets are.
    pub fn new(directory: PathBuf, foreign: Vec<ForeignVms>) -> Self {
        Self { directory, foreign, clash_logs: BTreeMap::new(), aliases: BTreeMap::new(), new: true }
    }

    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// All sockets. One that several paths lead to is one VM, and the path that leads there without symbolic
    /// links names it. Of two VMs with one name the second is left out and logged. The first scan also logs
    /// each entry of the configuration for which there is no socket.
    ///
    /// # Errors
    /// ballast's own directory can't be read.
    pub fn scan(&mut self, now: Duration) -> Result<Vec<Found>, runtime::RuntimeError> {
        let own = runtime::sockets(&self.directory)?;
        let mut candidates = Candidates::default();
        for (name, socket) in own {
            candidates.add(name, socket, Kind::Ballast, None);
        }
        for ForeignVms { driver, sockets, memory } in &self.foreign {
            let mut any = false;
            for (name, socket) in sockets.find() {
                any |= candidates.add(name, socket, *driver, *memory);
            }
            if self.new && !any {
                info!(
                    "no VM of {driver} has a socket at {} yet; looking for one from now on",
                    sockets.as_str()
                );
            }
        }
        self.new = false;
        let Candidates { found: candidates, aliases, .. } = candidates;
        for (alias, real) in &aliases {
            if self.aliases.get(alias) != Some(real) {
                info!("{} is the same socket as {}: that is one VM", alias.display(), real.display());
            }
        }
        self.aliases = aliases;
        let mut found = BTreeMap::new();
        for candidate in candidates {
            self.name(&mut found, now, candidate);
        }
        self.clash_logs.retain(|socket, _| !matches!(socket.try_exists(), Ok(false)));
        Ok(found.into_values().collect())
    }

    /// Takes a VM in unless another one has its name.
    fn name(&mut self, found: &mut BTreeMap<String, Found>, now: Duration, candidate: Found) {
        match found.entry(candidate.name.clone()) {
            Entry::Vacant(place) => {
                self.clash_logs.remove(&candidate.socket);
                place.insert(candidate);
            }
            Entry::Occupied(first) => {
                let (name, other, socket) = (first.key(), &first.get().socket, candidate.socket);
                if self.clash_logs.entry(socket.clone()).or_default().is_due(now, "clash") {
                    warn!(
                        "the VM at {} is LEFT OUT, and its memory not counted: it would be called {name}, \
                         as the one at {} is; give its socket another name",
                        socket.display(),
                        other.display()
                    );
                }
            }
        }
    }

    /// Watches all of it, and the daemon's own files.
    ///
    /// # Errors
    /// As [`DirectoryWatch::new`].
    pub fn watch(&self) -> io::Result<DirectoryWatch> {
        let others = self.foreign.iter().map(|entry| entry.sockets.parent());
        DirectoryWatch::new(&self.directory, others.chain([own_directory(&self.directory)]))
    }
}

/// The sockets of one scan, each once.
#[derive(Default)]
struct Candidates {
    found: Vec<Found>,
    places: HashMap<FileId, usize>,
    aliases: BTreeMap<PathBuf, PathBuf>,
}

impl Candidates {
    /// Adds one; false where there is no socket.
    fn add(&mut self, name: String, socket: PathBuf, kind: Kind, memory: Option<Wanted>) -> bool {
        // It may be no socket, or have gone since.
        let Some(incarnation) = Incarnation::of(&socket) else { return false };
        let place = *self.places.entry(incarnation.file).or_insert(self.found.len());
        let Some(first) = self.found.get_mut(place) else {
            self.found.push(Found { name, socket, incarnation, kind, memory });
            return true;
        };
        // Two entries of the configuration may well name one socket: the first counts.
        if first.socket == socket {
            return true;
        }
        // A link may lead to another VM tomorrow: the path without links is the VM's, with all that its entry
        // says. Of ballast's own VMs it is known what they are.
        if first.kind != Kind::Ballast && !is_direct(&first.socket) && is_direct(&socket) {
            let alias = std::mem::replace(first, Found { name, socket, incarnation, kind, memory }).socket;
            self.aliases.insert(alias, first.socket.clone());
        } else {
            self.aliases.insert(socket, first.socket.clone());
        }
        true
    }
}

/// Whether no symbolic link lies on the way.
fn is_direct(path: &Path) -> bool {
    fs::canonicalize(path).is_ok_and(|real| real == path)
}

/// Reports changes in directories.
pub struct DirectoryWatch {
    inotify: AsyncFd<Inotify>,
    quiet: Instant,
}

impl DirectoryWatch {
    /// Watches `directory` and those of the others that exist.
    ///
    /// # Errors
    /// `directory` does not exist, or the user has no inotify watches left.
    pub fn new(directory: &Path, others: impl IntoIterator<Item = PathBuf>) -> io::Result<Self> {
        let inotify = Inotify::init()?;
        let changes = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MOVE
            | WatchMask::DELETE_SELF
            | WatchMask::MOVE_SELF;
        inotify.watches().add(directory, changes)?;
        for other in others {
            // The next watch tries again; until then rescans see changes there.
            let _ = inotify.watches().add(other, changes);
        }
        // SAFETY: `Inotify` owns its descriptor until it is dropped, and nothing here replaces it.
        let inotify = unsafe { AsyncFd::register(inotify) }?;
        Ok(Self { inotify, quiet: Instant::now() })
    }

    /// Waits for a change. What changed is left to [`Discovery::scan`].
    ///
    /// # Errors
    /// The watch is lost; make a new one.
    pub async fn changed(&mut self) -> io::Result<()> {
        sleep_until(self.quiet).await;
        let mut buffer = [0; 4096];
        loop {
            let mut ready = self.inotify.readable_mut().await?;
            match ready.try_io(|inotify| inotify.get_mut().read_events(&mut buffer).map(drop)) {
                Ok(result) => {
                    self.quiet = Instant::now() + BETWEEN_CHANGES;
                    return result;
                }
                Err(_would_block) => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::daemon::config::Sockets;

    fn foreign(pattern: String) -> ForeignVms {
        ForeignVms { driver: Kind::Qemu, sockets: Sockets::new(&pattern).unwrap(), memory: None }
    }

    #[test]
    fn names_are_unique_over_all_vmms() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let listen = |path: PathBuf| UnixListener::bind(path).unwrap();
        let _sockets = [
            listen(own.path().join("web.sock")),
            listen(other.path().join("web.qmp")),
            listen(other.path().join("db.qmp")),
        ];
        fs::write(other.path().join("file.qmp"), "").unwrap();
        let pattern = format!("{}/*.qmp", other.path().display());
        // The same sockets twice: that is no clash.
        let entries = vec![foreign(pattern.clone()), foreign(pattern)];
        let mut discovery = Discovery::new(own.path().to_owned(), entries);
        let found = discovery.scan(Duration::ZERO).unwrap();
        let names: Vec<_> = found.iter().map(|found| (found.name.as_str(), found.kind)).collect();
        assert_eq!(names, [("db", Kind::Qemu), ("web", Kind::Ballast)]);
        assert_eq!(discovery.clash_logs.keys().collect::<Vec<_>>(), [&other.path().join("web.qmp")]);

        // Its name is free again.
        fs::remove_file(own.path().join("web.sock")).unwrap();
        let found = discovery.scan(Duration::ZERO).unwrap();
        assert!(found.iter().any(|found| found.name == "web" && found.kind == Kind::Qemu));
        assert!(discovery.clash_logs.is_empty());
    }

    #[test]
    fn one_socket_behind_several_paths_is_one_vm() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let other_path = other.path().canonicalize().unwrap();
        let api = other_path.join("web/api");
        fs::create_dir_all(&api).unwrap();
        let _socket = UnixListener::bind(api.join("ch.sock")).unwrap();
        // Sorted before the real one.
        std::os::unix::fs::symlink(other_path.join("web"), other_path.join("latest")).unwrap();
        std::os::unix::fs::symlink(api.join("ch.sock"), api.join("link.sock")).unwrap();
        // Ballast's own, which an entry of the configuration names as well.
        let _own = UnixListener::bind(own.path().join("db.sock")).unwrap();
        fs::hard_link(own.path().join("db.sock"), own.path().join("same.sock")).unwrap();
        let entry = |pattern: String| ForeignVms { driver: Kind::CloudHypervisor, ..foreign(pattern) };
        let entries = vec![
            foreign(format!("{}/latest/api/ch.sock", other_path.display())),
            entry(format!("{}/*/api/ch.sock", other_path.display())),
            entry(format!("{}/link.sock", api.display())),
            entry(format!("{}/*.sock", own.path().display())),
        ];
        let mut discovery = Discovery::new(own.path().to_owned(), entries);
        for _ in 0..2 {
            let found = discovery.scan(Duration::ZERO).unwrap();
            let found: Vec<_> =
                found.iter().map(|found| (found.name.as_str(), found.kind, found.socket.clone())).collect();
            let expected = [
                ("db", Kind::Ballast, own.path().join("db.sock")),
                ("web", Kind::CloudHypervisor, api.join("ch.sock")),
            ];
            assert_eq!(found, expected);
            assert!(discovery.clash_logs.is_empty());
            assert_eq!(discovery.aliases.len(), 2, "{:?}", discovery.aliases);
        }
    }

    #[test]
    fn a_socket_whose_mode_is_changed_is_the_same() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("web.sock");
        let _first = UnixListener::bind(&path).unwrap();
        let metadata = fs::symlink_metadata(&path).unwrap();
        if metadata.created().is_err() {
            eprintln!("not tested: {} does not tell when files were made", directory.path().display());
            return;
        }
        let first = Incarnation::of(&path).unwrap();
        // Until the clock by which files are stamped has gone on.
        while fs::symlink_metadata(&path).unwrap().ctime_nsec() == metadata.ctime_nsec() {
            fs::set_permissions(&path, fs::Permissions::from_mode(0o660)).unwrap();
        }
        assert_eq!(Incarnation::of(&path), Some(first));

        let other = directory.path().join("other.sock");
        let _second = UnixListener::bind(&other).unwrap();
        fs::rename(&other, &path).unwrap();
        assert_ne!(Incarnation::of(&path), Some(first));
    }

    #[tokio::test]
    async fn changes_in_every_directory_are_told() {
        let (own, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let missing = other.path().join("missing");
        let mut watch = DirectoryWatch::new(own.path(), [missing, other.path().to_owned()]).unwrap();
        for directory in [&own, &other] {
            fs::write(directory.path().join("file"), "").unwrap();
            tokio::time::timeout(Duration::from_secs(60), watch.changed()).await.unwrap().unwrap();
        }
    }
}
