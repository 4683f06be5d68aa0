//! Which kernel it is, and with what command line.

use crate::{MIB, Tree, disk, find, refused};

fn root(tree: &Tree) -> Vec<u8> {
    tree.ext4(8 * MIB, &[])
}

#[test]
fn the_newest_kernel_by_version_with_its_initramfs() {
    let tree = Tree::debian(&["6.1.0-9-amd64", "6.1.0-10-amd64", "5.10.0-30-amd64"])
        .file("boot/vmlinuz-6.1.0-11-amd64.dpkg-new", "half")
        .file("boot/vmlinuz-6.1.0-12-amd64.old", "old")
        .file("boot/vmlinuz-6.1.0-13-amd64", "")
        // An update that has not come to its initramfs.
        .file("boot/vmlinuz-6.1.0-14-amd64", "kernel without");
    let (plan, kernel, initrd) = find(root(&tree)).expect("it boots");
    assert_eq!((kernel.as_str(), initrd.as_str()), ("kernel 6.1.0-10-amd64", "initrd 6.1.0-10-amd64"));
    assert_eq!(plan.kernel, "/boot/vmlinuz-6.1.0-10-amd64");
    for (name, initrd) in
        [("6.12", "initramfs-6.12.img"), ("6.12", "initrd-6.12"), ("virt", "initramfs-virt")]
    {
        let tree =
            Tree::debian(&[]).file(&format!("boot/vmlinuz-{name}"), "k").file(&format!("boot/{initrd}"), "i");
        assert_eq!(find(root(&tree)).expect("it boots").0.initrd, [format!("/boot/{initrd}")]);
    }
}

#[test]
fn links_win_over_versions_as_far_as_they_lead_somewhere() {
    let tree = || Tree::debian(&["6.1.0-9-amd64", "6.1.0-10-amd64"]);
    let linked = tree()
        .link("vmlinuz", "boot/vmlinuz-6.1.0-9-amd64")
        .link("initrd.img", "/boot/initrd.img-6.1.0-9-amd64");
    let (plan, kernel, initrd) = find(root(&linked)).expect("it boots");
    assert_eq!((kernel.as_str(), initrd.as_str()), ("kernel 6.1.0-9-amd64", "initrd 6.1.0-9-amd64"));
    assert_eq!(
        (plan.kernel.as_str(), plan.by.as_str()),
        ("/boot/vmlinuz-6.1.0-9-amd64", "the link /vmlinuz")
    );
    for dangling in [
        tree().link("vmlinuz", "boot/vmlinuz-gone").link("initrd.img", "boot/initrd.img-6.1.0-9-amd64"),
        tree().link("vmlinuz", "boot/vmlinuz-6.1.0-9-amd64"),
        tree().link("vmlinuz", "vmlinuz").link("initrd.img", "initrd.img"),
        tree().link("vmlinuz", "a").link("a", "b/../vmlinuz").link("b", ".").link("initrd.img", "boot"),
        tree().link("vmlinuz", "/dev/vda").link("initrd.img", "../../../../etc/passwd"),
    ] {
        assert_eq!(find(root(&dangling)).expect("it boots").1, "kernel 6.1.0-10-amd64");
    }
    let up = tree()
        .link("vmlinuz", "../../boot/vmlinuz-6.1.0-9-amd64")
        .link("initrd.img", "boot/initrd.img-6.1.0-9-amd64");
    assert_eq!(find(root(&up)).expect("it boots").1, "kernel 6.1.0-9-amd64", "above the root is the root");
}

#[test]
fn an_entry_of_a_boot_loader_wins_and_says_its_command_line() {
    let entry = |version: &str| {
        format!(
            "title Linux\nversion {version}\nlinux /boot/vmlinuz-{version}\ninitrd /boot/ucode.img\n\
             initrd /boot/initrd.img-{version} $tuned_initrd\noptions root=UUID=1 ro crashkernel=1G $tuned_params\n"
        )
    };
    let tree = Tree::debian(&["6.9", "6.10"])
        .file("boot/ucode.img", "ucode")
        .file("boot/loader/entries/a-6.9.conf", &entry("6.9"))
        .file("boot/loader/entries/a-6.10.conf", &entry("6.10"))
        .file("boot/loader/entries/a-6.11.conf", &entry("6.11"))
        .file("boot/loader/entries/rescue.conf", "version 0-rescue\nlinux /boot/vmlinuz-6.9\n");
    let (plan, kernel, initrd) = find(root(&tree)).expect("it boots");
    assert_eq!(plan.by, "/boot/loader/entries/a-6.10.conf");
    assert_eq!(kernel, "kernel 6.10");
    // Each begins at a multiple of four.
    assert_eq!(initrd, "ucode\0\0\0initrd 6.10");
    assert_eq!(plan.cmdline, "root=UUID=1 ro crashkernel=1G");
}

#[test]
fn the_root_may_be_another_partition_than_the_kernels() {
    let script = "label: gpt
start=1MiB, size=8MiB, uuid=00000000-0000-0000-0000-000000000001
start=9MiB, size=8MiB, uuid=00000000-0000-0000-0000-000000000002
";
    let boot = root(&Tree::new().kernel(".", "6.1"));
    let home = Tree::debian(&[]).file("etc/default/grub", "GRUB_CMDLINE_LINUX=\"net.ifnames=0\"\n");
    let (plan, ..) = find(disk(18, script, &[(1, &boot), (9, &root(&home))])).expect("it boots");
    assert_eq!(plan.place, "partition 1 (ext4)");
    assert_eq!(plan.cmdline, "root=PARTUUID=00000000-0000-0000-0000-000000000002 ro net.ifnames=0");
    let said = refused(disk(18, script, &[(1, &boot)]));
    assert!(said.contains("no root file system") && said.contains("--append root="), "{said}");
    // A root that can't be read is known to its own boot loader.
    let entry = "linux /vmlinuz-6.1\ninitrd /initrd.img-6.1\noptions root=UUID=2 rootflags=subvol=root\n";
    let boot = root(&Tree::new().kernel(".", "6.1").file("loader/entries/f.conf", entry));
    let (plan, ..) = find(disk(18, script, &[(1, &boot)])).expect("it boots");
    assert_eq!(plan.cmdline, "ro root=UUID=2 rootflags=subvol=root");
}

/// As systemd-boot has it.
#[test]
fn the_kernel_may_lie_on_the_efi_system_partition() {
    let entry =
        "title Arch\nversion 6.12\nlinux /vmlinuz-linux\ninitrd /ucode.img\ninitrd /initramfs-linux.img\n";
    let contents = "a kernel ".repeat(50_000);
    let esp = Tree::new()
        .file("vmlinuz-linux", &contents)
        .file("initramfs-linux.img", "initrd")
        .file("ucode.img", "code")
        .file("loader/entries/arch.conf", entry);
    for (bits, size, cluster) in [("12", 4, "4"), ("16", 8, "1"), ("32", 40, "1")] {
        let boot = esp.fat(size * MIB, bits, cluster);
        let script = format!(
            "label: gpt
start=1MiB, size={size}MiB, type=c12a7328-f81f-11d2-ba4b-00a0c93ec93b
start={}MiB, size=8MiB, uuid=00000000-0000-0000-0000-000000000002
",
            size + 1
        );
        let whole = disk(size + 10, &script, &[(1, &boot), (size + 1, &root(&Tree::debian(&[])))]);
        let (plan, kernel, initrd) = find(whole).expect("it boots");
        assert_eq!(
            (plan.place.as_str(), plan.by.as_str()),
            ("partition 1 (FAT)", "/loader/entries/arch.conf")
        );
        assert_eq!((kernel.as_str(), initrd.as_str()), (contents.as_str(), "codeinitrd"));
        assert_eq!(plan.cmdline, "root=PARTUUID=00000000-0000-0000-0000-000000000002 ro");
    }
}

#[test]
fn the_distributions_own_words_are_kept() {
    let tree = |words: &str| Tree::debian(&["6.1"]).file("etc/default/grub", words);
    let line = |tree: Tree| {
        let (plan, ..) = find(root(&tree)).expect("it boots");
        plan.cmdline.replace("root=UUID=11111111-2222-3333-4444-555555555555 ", "")
    };
    assert_eq!(line(tree("GRUB_CMDLINE_LINUX=\"console=tty0 a\"\n")), "ro console=tty0 a");
    let more = tree("GRUB_CMDLINE_LINUX=a\n")
        .file("etc/default/grub.d/20_b.cfg", "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX c\"\n")
        .file("etc/default/grub.d/10_a.cfg", "GRUB_CMDLINE_LINUX=\"$GRUB_CMDLINE_LINUX b\"\n")
        .file("etc/default/grub.d/README", "GRUB_CMDLINE_LINUX=x\n");
    assert_eq!(line(more), "ro a b c");
    assert_eq!(line(Tree::debian(&["6.1"]).file("etc/kernel/cmdline", "root=/dev/x rw\n")), "root=/dev/x rw");
}

#[test]
fn a_file_that_is_too_large_for_a_kernel_is_refused() {
    let tree = Tree::debian(&["6.1"]);
    let large = std::fs::File::create(tree.path().join("boot/vmlinuz-6.2")).expect("made");
    large.set_len(65 << 20).expect("long");
    std::fs::write(tree.path().join("boot/initrd.img-6.2"), "i").expect("written");
    let said = refused(tree.ext4(8 * MIB, &[]));
    assert!(said.contains("/boot/vmlinuz-6.2") && said.contains("64 MiB"), "{said}");
}
