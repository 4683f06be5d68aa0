//! What a disk is booted by: real file systems and partition tables, made by the programs that make them elsewhere, and
//! hostile ones.

mod damage;
mod journal;
mod tables;
mod which;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;

use image::disk::SearchError;
use image::disk::search::{Plan, Search};

const MIB: usize = 1 << 20;

/// Runs a program that gives `input` something to do.
fn run(program: &str, arguments: &[&str], input: &str) -> String {
    use std::io::Write;

    let path = format!("{}:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default());
    let mut child = Command::new(program)
        .args(arguments)
        .env("PATH", path)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap_or_else(|error| panic!("{program}: {error}: `make setup` installs it"));
    child.stdin.take().expect("piped").write_all(input.as_bytes()).expect("written");
    let output = child.wait_with_output().expect("it ends");
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {} {said}", output.status);
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Files that become a file system.
struct Tree(tempfile::TempDir);

impl Tree {
    fn new() -> Self {
        Self(tempfile::tempdir().expect("a directory"))
    }

    /// A root file system of Debian's kind with these versions of its kernel.
    fn debian(versions: &[&str]) -> Self {
        let mut tree = Self::new().file("etc/os-release", "ID=debian\n");
        for version in versions {
            tree = tree.kernel("boot", version);
        }
        tree
    }

    fn file(self, path: &str, contents: &str) -> Self {
        assert!(!path.starts_with('/'), "it would lie outside");
        let path = self.0.path().join(path);
        fs::create_dir_all(path.parent().expect("it has one")).expect("made");
        fs::write(path, contents).expect("written");
        self
    }

    fn link(self, path: &str, target: &str) -> Self {
        std::os::unix::fs::symlink(target, self.0.path().join(path)).expect("linked");
        self
    }

    /// A kernel and its initramfs, whose contents tell which they are.
    fn kernel(self, directory: &str, version: &str) -> Self {
        self.file(&format!("{directory}/vmlinuz-{version}"), &format!("kernel {version}"))
            .file(&format!("{directory}/initrd.img-{version}"), &format!("initrd {version}"))
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// An ext4 file system.
    fn ext4(&self, size: usize, options: &[&str]) -> Vec<u8> {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("ext4");
        let size = (size / 1024).to_string();
        let (path, tree) = (text(&path), text(self.path()));
        let fixed = ["-q", "-t", "ext4", "-U", "11111111-2222-3333-4444-555555555555", "-d", &tree];
        run("mke2fs", &[&fixed[..], options, &[&path, &size]].concat(), "");
        fs::read(path).expect("it was made")
    }
}

impl Tree {
    /// A FAT file system.
    fn fat(&self, size: usize, bits: &str, cluster: &str) -> Vec<u8> {
        let (_directory, path) = file(&vec![0; size]);
        let path = text(&path);
        run("mkfs.vfat", &["-F", bits, "-s", cluster, &path], "");
        for entry in fs::read_dir(self.path()).expect("there") {
            let entry = text(&entry.expect("there").path());
            run("mcopy", &["-s", "-i", &path, &entry, "::"], "");
        }
        fs::read(path).expect("it was made")
    }
}

fn text(path: &Path) -> String {
    path.to_str().expect("its name is text").to_owned()
}

/// A disk with a partition table by sfdisk, and `partitions` at their places in MiB.
fn disk(size: usize, script: &str, partitions: &[(usize, &[u8])]) -> Vec<u8> {
    let file = tempfile::NamedTempFile::new().expect("a file");
    file.as_file().set_len((size * MIB) as u64).expect("long");
    run("sfdisk", &["-q", &text(file.path())], script);
    let mut disk = fs::read(file.path()).expect("it was made");
    for (place, bytes) in partitions {
        disk[place * MIB..][..bytes.len()].copy_from_slice(bytes);
    }
    disk
}

/// What is found, with the contents of the kernel and the initramfs.
fn find(disk: Vec<u8>) -> Result<(Plan, String, String), SearchError> {
    let search = Search::on(Rc::new(disk))?;
    let (mut kernel, mut initrd) = (Vec::new(), Vec::new());
    search.kernel(&mut |piece| {
        kernel.extend_from_slice(piece);
        Ok(())
    })?;
    search.initrd(&mut |piece| {
        initrd.extend_from_slice(piece);
        Ok(())
    })?;
    let text = |bytes| String::from_utf8(bytes).expect("the tests' files are text");
    Ok((search.plan.clone(), text(kernel), text(initrd)))
}

fn refused(disk: Vec<u8>) -> String {
    find(disk).map(|(plan, ..)| plan).expect_err("there is nothing to boot").to_string()
}

/// A file in a temporary directory.
fn file(contents: &[u8]) -> (tempfile::TempDir, PathBuf) {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("file");
    fs::write(&path, contents).expect("written");
    (directory, path)
}
