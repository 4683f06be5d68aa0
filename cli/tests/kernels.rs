//! `ballast` unpacks kernels in a process of its own, once for all who start at the same time.

use std::fs::{self, File};
use std::io::{Seek, Write};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;
use std::thread;
use std::time::Duration;

use image::helper::Helper;
use image::kernel::header::SetupHeader;
use image::kernel::payload::Format;
use image::testing::{TestKernel, pack};
use image::{Error, Origin, Unpacking};

const BALLAST: &str = env!("CARGO_BIN_EXE_ballast");

fn helper() -> Helper {
    Helper { program: BALLAST.into(), arguments: vec!["unpack-kernel".to_owned()] }
}

fn shell(script: &str) -> Helper {
    Helper { program: "/bin/sh".into(), arguments: ["-c", script, "sh"].map(str::to_owned).to_vec() }
}

fn file(contents: &[u8]) -> File {
    let mut file = tempfile::tempfile().expect("a temporary file");
    file.write_all(contents).expect("written");
    file.rewind().expect("a file");
    file
}

fn unpacking(helper: Helper, cache: Option<&Path>) -> Unpacking {
    Unpacking { helper, cache: cache.map(Path::to_owned) }
}

#[test]
fn each_format_is_unpacked_in_the_confined_process() {
    for format in [Format::Gzip, Format::Lz4, Format::Zstd, Format::Xz, Format::Lzma] {
        let image = file(&TestKernel { format, ..TestKernel::default() }.bzimage());
        let prepared = unpacking(helper(), None).prepare(&image);
        let (kernel, origin) = prepared.unwrap_or_else(|error| panic!("{format}: {error}"));
        assert!(matches!(origin, Origin::Unpacked), "{format}: {origin}");
        assert_eq!(kernel.relocations().len(), 3, "{format}");
    }
}

#[test]
fn what_the_process_says_of_a_kernel_is_heard() {
    let damaged = TestKernel::default().bzimage_with(&[&[0x1f, 0x8b][..], &[0; 100]].concat());
    let error = unpacking(helper(), None).prepare(&file(&damaged)).expect_err("it is damaged");
    assert!(matches!(&error, Error::Refused(said) if said.contains("gzip")), "{error}");
    let bomb = TestKernel::default().bzimage_with(&pack(&vec![0; 64 << 20], Format::Xz));
    let error = unpacking(helper(), None).prepare(&file(&bomb)).expect_err("it is too large");
    assert!(matches!(&error, Error::Refused(said) if said.contains("16 MiB")), "{error}");
}

#[test]
fn a_process_that_ends_otherwise_is_no_kernel() {
    let image = TestKernel::default().bzimage();
    let refused = |script| unpacking(shell(script), None).prepare(&file(&image)).expect_err(script);
    assert!(matches!(refused("kill -9 $$"), Error::BadEnd(_)));
    assert!(matches!(refused("exit 1"), Error::BadEnd(_)));
    assert!(matches!(refused("exit 0"), Error::Prepared(_)));
    let error = refused("printf '\\033[2Jnot\\nthis' >&2; exit 1");
    assert!(
        matches!(&error, Error::Refused(said) if said.ends_with("[2Jnot this") && !said.contains(char::is_control)),
        "{error}"
    );
    assert!(matches!(refused("echo no room >&2; exit 3"), Error::Write(_)));
    let missing = Helper { program: "/nowhere/ballast".into(), arguments: Vec::new() };
    assert!(matches!(unpacking(missing, None).prepare(&file(&image)), Err(Error::Helper(_))));
}

#[test]
fn a_process_that_takes_too_long_is_ended() {
    let image = TestKernel::default().bzimage();
    let header = SetupHeader::parse(&image).expect("it is whole");
    let (input, output) = (file(&image), tempfile::tempfile().expect("a temporary file"));
    let error = shell("exec sleep 1000").unpack(&input, &header, &output, Duration::from_millis(20));
    assert!(matches!(error, Err(Error::TooSlow(_))), "{error:?}");
}

#[test]
fn a_kept_kernel_is_unpacked_once() {
    let directory = tempfile::tempdir().expect("a directory");
    let (cache, log) = (directory.path().join("kernels"), directory.path().join("log"));
    let counted = shell(&format!("echo started >> {}; exec {BALLAST} unpack-kernel \"$@\"", log.display()));
    let unpacking = unpacking(counted, Some(&cache));
    let image = TestKernel::default().bzimage();
    let all = || {
        thread::scope(|scope| {
            let start = || unpacking.prepare(&file(&image)).expect("it is a kernel");
            let threads: Vec<_> = (0..8).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().expect("it is prepared").1).collect::<Vec<_>>()
        })
    };
    let unpacked = |all: &[Origin]| all.iter().filter(|origin| matches!(origin, Origin::Unpacked)).count();
    assert_eq!(unpacked(&all()), 1);
    let started = || fs::read_to_string(&log).expect("it was started").lines().count();
    assert_eq!((unpacked(&all()), started()), (0, 1));
    // Damaged, it is unpacked once more.
    let kept = fs::read_dir(&cache).expect("it is there").flatten().map(|entry| entry.path());
    let kept =
        kept.into_iter().find(|path| path.extension().is_some_and(|end| end == "kernel")).expect("kept");
    fs::write(&kept, b"nonsense").expect("written");
    assert_eq!((unpacked(&all()), started()), (1, 2));
}

#[test]
fn no_cache_costs_time_and_no_kernel() {
    let image = TestKernel::default().bzimage();
    let unpacking = unpacking(helper(), Some(Path::new("/dev/null/kernels")));
    let (_, origin) = unpacking.prepare(&file(&image)).expect("it is a kernel");
    assert!(matches!(&origin, Origin::NotKept(Error::Cache { .. })), "{origin}");
}

/// As some service managers and shells start what they start (`trap '' CHLD`).
#[test]
fn a_parent_that_does_not_hear_of_its_children_keeps_no_kernel_from_being_unpacked() {
    let mut kernel = tempfile::NamedTempFile::new().expect("a temporary file");
    kernel.write_all(&TestKernel::default().bzimage()).expect("written");
    let mut command = Command::new(BALLAST);
    command.arg("check").arg("--kernel").arg(kernel.path());
    // SAFETY: signal(2) may be called between fork and exec.
    unsafe {
        command.pre_exec(|| {
            libc::signal(libc::SIGCHLD, libc::SIG_IGN);
            Ok(())
        });
    }
    let said = String::from_utf8(command.output().expect("it runs").stdout).expect("text");
    assert!(said.contains("starts unpacked"), "{said}");
}

#[test]
fn check_says_how_a_kernel_is_booted() {
    let check = |contents: &[u8]| {
        let mut file = tempfile::NamedTempFile::new().expect("a temporary file");
        file.write_all(contents).expect("written");
        let output = Command::new(BALLAST).arg("check").arg("--kernel").arg(file.path()).output();
        String::from_utf8(output.expect("it runs").stdout).expect("text")
    };
    let said = check(&TestKernel::default().bzimage());
    assert!(said.contains("starts unpacked") && said.contains("by 3 relocations"), "{said}");
    let said = check(&TestKernel { runs: Vec::new(), ..TestKernel::default() }.bzimage());
    assert!(said.contains("always at the same address"), "{said}");
    let said = check(b"\x7fELF, and not a bzImage");
    assert!(said.contains("is booted as it is: it has no header of a bzImage"), "{said}");
}
