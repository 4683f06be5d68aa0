//! Kernels that are unpacked on the host: they boot, lie at addresses of chance as they would choose themselves, and
//! no cache that is damaged, full or gone keeps one from starting.

use std::collections::BTreeSet;
use std::ffi::CStr;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use guests::{BOOT, Host, Vm, VmSettings, images};
use lab::Kernel;
use rustix::mount::{MountFlags, mount};

/// How long a guest takes from its last word to the end of its process.
const END: Duration = Duration::from_secs(3);
const MIB: u64 = 1 << 20;
/// Where Debian's kernels are linked, and how many bytes of memory they have here.
const LINKED: u64 = 16 * MIB;
const LINK_MAP: u64 = 0xffff_ffff_8000_0000;
const MEMORY: u64 = 256 * MIB;

const KEPT: &str = "it was kept from an earlier start";
const UNPACKED: &str = "it was unpacked just now";
const NOT_KEPT: &str = "it was unpacked just now, and is not kept";

/// Where a guest's kernel says that it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Addresses {
    physical: u64,
    link: u64,
    memory: u64,
}

fn settings(name: &str, kernel: Kernel, cache: &Path, cmdline: &str) -> VmSettings {
    let cache = cache.to_str().expect("its name is text");
    VmSettings::new(name, &images(kernel), "256M", &format!("ballast.console {cmdline}")).with(&[
        "-v",
        "--kernel-cache",
        cache,
    ])
}

/// Boots a guest to its end; its log says `origin`.
fn boot(settings: &VmSettings, origin: &str) -> Addresses {
    let mut vm = settings.start();
    vm.wait_for_line(origin, BOOT);
    addresses(&mut vm)
}

/// What a guest says when its modules are loaded; then it powers off.
fn addresses(vm: &mut Vm) -> Addresses {
    vm.wait_until_ready();
    vm.type_in("kernel\n");
    let line = vm.wait_for_line("KERNEL ", BOOT);
    let number = |name: &str| {
        let value = line.split_whitespace().find_map(|word| word.strip_prefix(name)?.strip_prefix("=0x"));
        u64::from_str_radix(value.expect("it says so"), 16).expect("a number")
    };
    let addresses =
        Addresses { physical: number("physical"), link: number("link"), memory: number("memory") };
    vm.wait_for_line("DONE kernel", BOOT);
    vm.type_in("end\n");
    assert_eq!(vm.wait_for_end(END), 0, "it powers off");
    addresses
}

fn assert_by_chance(addresses: Addresses) {
    let Addresses { physical, link, .. } = addresses;
    assert!(physical % (2 * MIB) == 0 && (LINKED..MEMORY).contains(&physical), "{addresses:x?}");
    assert!(link % (2 * MIB) == 0 && link >= LINK_MAP + LINKED, "{addresses:x?}");
}

fn assert_differ(all: &[Addresses]) {
    for of in [|at: &Addresses| at.physical, |at: &Addresses| at.link, |at: &Addresses| at.memory] {
        let different: BTreeSet<u64> = all.iter().map(of).collect();
        assert!(different.len() > 1, "{all:x?}");
    }
}

fn kept(cache: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(cache).expect("it is there").flatten().map(|entry| entry.path());
    entries.filter(|path| path.extension().is_some_and(|extension| extension == "kernel")).collect()
}

/// Both cloud kernels: LZ4 and zstd.
#[test]
fn kernels_start_unpacked_at_addresses_of_chance() {
    let host = Host::new().guest(Kernel::V6_1).guest(Kernel::V6_12);
    host.usually(Duration::from_secs(120)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = directory.path().join("kernels");
        let old = |cmdline| settings("old", Kernel::V6_1, &cache, cmdline);
        let mut all = vec![boot(&old(""), UNPACKED)];
        all.extend((0..2).map(|_| boot(&old(""), KEPT)));
        all.iter().for_each(|addresses| assert_by_chance(*addresses));
        assert_differ(&all);

        let linked = boot(&old("nokaslr"), KEPT);
        assert_eq!((linked.physical, linked.link), (LINKED, LINK_MAP + LINKED));
        assert_eq!(linked.memory, 0xffff_8880_0000_0000, "`page_offset_base` is not moved");

        let new = settings("new", Kernel::V6_12, &cache, "");
        let all = [boot(&new, UNPACKED), boot(&new, KEPT)];
        all.iter().for_each(|addresses| assert_by_chance(*addresses));
        assert_eq!(kept(&cache).len(), 2);
    });
}

#[test]
#[ignore = "some twenty boots: make test-long"]
fn no_cache_keeps_a_kernel_from_starting() {
    Host::new().guest(Kernel::V6_1).usually(Duration::from_secs(200)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let cache = directory.path().join("kernels");
        let vm = |cache: &Path| settings("vm", Kernel::V6_1, cache, "");
        assert_by_chance(boot(&vm(&cache), UNPACKED));

        // Damaged in the middle: it unpacks itself this time, and is made anew. Cut off: it is made anew at once.
        let [file] = &kept(&cache)[..] else { panic!("one is kept") };
        let mut contents = fs::read(file).expect("it is there");
        let middle = contents.len() / 2;
        contents[middle] ^= 1;
        fs::write(file, &contents).expect("written");
        assert_by_chance(boot(&vm(&cache), "its contents have changed"));
        assert_by_chance(boot(&vm(&cache), UNPACKED));
        fs::write(file, &contents[..middle]).expect("written");
        assert_by_chance(boot(&vm(&cache), UNPACKED));
        assert_by_chance(boot(&vm(&cache), KEPT));

        // Full, not a directory, open to others, read-only, or off.
        let full = directory.path().join("full");
        mount_tmpfs(&full, MountFlags::empty(), c"size=1m,mode=700");
        assert_by_chance(boot(&vm(&full), NOT_KEPT));
        assert!(kept(&full).is_empty());
        assert_by_chance(boot(&vm(&file.join("kernels")), NOT_KEPT));
        let open = directory.path().join("open");
        fs::create_dir(&open).expect("a directory");
        fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("its owner may");
        assert_by_chance(boot(&vm(&open), NOT_KEPT));
        let read_only = directory.path().join("read-only");
        mount_tmpfs(&read_only, MountFlags::RDONLY, c"mode=700");
        assert_by_chance(boot(&vm(&read_only), NOT_KEPT));
        assert_by_chance(boot(&vm(Path::new("off")), UNPACKED));

        // The bzImage itself, which the kernel's own decompressor puts somewhere.
        let mut as_it_is = vm(&cache);
        as_it_is.arguments = vec!["-v".to_owned(), "--no-unpack".to_owned()];
        assert_by_chance(addresses(&mut as_it_is.start()));

        // Many at once: whoever comes first unpacks.
        let fresh = directory.path().join("fresh");
        let many: Vec<VmSettings> =
            (0..4).map(|index| settings(&format!("vm-{index}"), Kernel::V6_1, &fresh, "")).collect();
        let mut running: Vec<Vm> = many.iter().map(VmSettings::start).collect();
        let unpacked: Vec<bool> = running
            .iter_mut()
            .map(|vm| !vm.wait_for_line("the kernel starts unpacked", BOOT * 4).contains(KEPT))
            .collect();
        assert_eq!(unpacked.iter().filter(|unpacked| **unpacked).count(), 1, "{unpacked:?}");
        let all: Vec<Addresses> = running.iter_mut().map(addresses).collect();
        assert_differ(&all);
    });
}

/// Debian's usual kernel, whose xz has the filter for x86 code.
#[test]
#[ignore = "another kernel to fetch: make test-long"]
fn a_kernel_packed_with_xz_starts_unpacked() {
    Host::new().guest(Kernel::V6_1Generic).usually(Duration::from_secs(90)).run(|| {
        let directory = tempfile::tempdir().expect("a directory");
        let vm = settings("xz", Kernel::V6_1Generic, &directory.path().join("kernels"), "");
        let all = [boot(&vm, UNPACKED), boot(&vm, KEPT), boot(&vm, KEPT)];
        all.iter().for_each(|addresses| assert_by_chance(*addresses));
        assert_differ(&all);
    });
}

fn mount_tmpfs(at: &Path, flags: MountFlags, options: &CStr) {
    fs::create_dir(at).expect("a directory");
    mount("tmpfs", at, "tmpfs", flags, options).expect("a host's first user may mount");
}
