//! File systems that were not closed: what is found is what a repair by e2fsck would leave.

use std::fs;

use crate::{MIB, Tree, file, find, run, text};

/// The blocks of a file.
pub fn blocks(path: &str, name: &str) -> Vec<u64> {
    let said = run("debugfs", &["-R", &format!("blocks {name}"), path], "");
    said.split_whitespace().map(|block| block.parse().expect("a number")).collect()
}

/// A journal with transactions, each with a block that it writes or takes back.
pub enum Step {
    Write(u8),
    Revoke,
}

/// A file system whose journal has these transactions on the first block of its kernel, which is `4096` bytes long.
pub fn unclean(options: &[&str], open: &str, steps: &[Step]) -> Vec<u8> {
    let tree =
        Tree::debian(&[]).file("boot/vmlinuz-6.1", &"0".repeat(1024)).file("boot/initrd.img-6.1", "initrd");
    let (directory, path) = file(&tree.ext4(16 * MIB, options));
    let path = text(&path);
    let block = blocks(&path, "/boot/vmlinuz-6.1")[0];
    for step in steps {
        let words = match step {
            Step::Write(digit) => {
                let block_size = if options.contains(&"1024") { 1024 } else { 4096 };
                let contents = text(&directory.path().join("contents"));
                fs::write(&contents, vec![*digit; block_size]).expect("written");
                format!("jw -b {block} {contents}")
            }
            Step::Revoke => format!("jw -r {block}"),
        };
        run("debugfs", &["-w", "-f", "/dev/stdin", &path], &format!("{open}\n{words}\njc\n"));
    }
    fs::read(&path).expect("it is there")
}

/// The kernel after e2fsck has replayed the journal.
fn mended(unclean: &[u8]) -> String {
    let (_directory, path) = file(unclean);
    let path = text(&path);
    // It exits with 1 where it has mended something.
    run("sh", &["-c", "PATH=$PATH:/sbin:/usr/sbin; e2fsck -fy \"$1\" >&2 || test $? -le 1", "sh", &path], "");
    run("debugfs", &["-R", "cat /boot/vmlinuz-6.1", &path], "")
}

const OPENS: [&str; 3] = ["jo", "jo -c -v 2", "jo -c -v 3"];

#[test]
fn what_was_committed_is_read_and_what_was_revoked_is_not() {
    use Step::{Revoke, Write};

    for (options, opens) in [
        (&["-b", "4096"][..], &OPENS[..]),
        (&["-b", "1024"], &OPENS),
        (&["-b", "4096", "-O", "^64bit,^metadata_csum"], &OPENS[..1]),
    ] {
        for open in opens {
            for (steps, digit) in [
                (&[Write(b'1')][..], '1'),
                (&[Write(b'1'), Write(b'2')], '2'),
                // The revoked block may have become one of a file, whose contents never went through the journal.
                (&[Write(b'1'), Revoke], '0'),
                (&[Write(b'1'), Write(b'2'), Revoke], '0'),
                (&[Write(b'1'), Revoke, Write(b'2')], '2'),
                (&[Revoke], '0'),
            ] {
                let disk = unclean(options, open, steps);
                let judged = mended(&disk);
                let (_, kernel, _) = find(disk).unwrap_or_else(|error| panic!("{options:?} {open}: {error}"));
                assert_eq!(kernel, judged, "{options:?} {open}");
                assert_eq!(kernel, digit.to_string().repeat(1024), "{options:?} {open}");
            }
        }
    }
}

#[test]
fn a_block_of_the_journal_that_begins_like_one_of_its_own_is_escaped() {
    let tree =
        Tree::debian(&[]).file("boot/vmlinuz-6.1", &"0".repeat(1024)).file("boot/initrd.img-6.1", "initrd");
    let (directory, path) = file(&tree.ext4(16 * MIB, &[]));
    let path = text(&path);
    let block = blocks(&path, "/boot/vmlinuz-6.1")[0];
    let contents = text(&directory.path().join("contents"));
    fs::write(&contents, [&[0xc0, 0x3b, 0x39, 0x98][..], &[b'x'; 4092]].concat()).expect("written");
    run(
        "debugfs",
        &["-w", "-f", "/dev/stdin", &path],
        &format!("jo -c -v 3\njw -b {block} {contents}\njc\n"),
    );
    let search =
        image::disk::search::Search::on(std::rc::Rc::new(fs::read(&path).expect("there"))).expect("it boots");
    let mut kernel = Vec::new();
    let take = &mut |piece: &[u8]| {
        kernel.extend_from_slice(piece);
        Ok(())
    };
    search.kernel(take).expect("it is read");
    assert_eq!(kernel[..8], [0xc0, 0x3b, 0x39, 0x98, b'x', b'x', b'x', b'x']);
}

#[test]
fn a_journal_with_checksums_of_the_first_kind_is_refused() {
    let disk = unclean(&["-b", "4096", "-O", "^metadata_csum"], OPENS[1], &[Step::Write(b'1')]);
    let said = find(disk).expect_err("nobody knows whether it is whole").to_string();
    assert!(said.contains("journal can't be replayed") && said.contains("--kernel"), "{said}");
}

#[test]
fn a_damaged_journal_is_refused_or_ends_where_the_damage_is() {
    let whole = unclean(&["-b", "4096"], OPENS[2], &[Step::Write(b'1')]);
    let (_directory, path) = file(&whole);
    let places = blocks(&text(&path), "<8>");
    let at = |block: usize| places[block] as usize * 4096;
    // Its superblock: nobody knows what it holds.
    let mut disk = whole.clone();
    disk[at(0) + 0x18] ^= 1;
    let said = find(disk).expect_err("its checksum is wrong").to_string();
    assert!(said.contains("journal can't be replayed") && said.contains("e2fsck"), "{said}");
    let start = u32::from_be_bytes(whole[at(0) + 0x1c..][..4].try_into().expect("four")) as usize;
    // The descriptor, and the commit: the transaction never was.
    for block in [start, start + 2] {
        let mut disk = whole.clone();
        disk[at(block) + 40] ^= 1;
        assert_eq!(find(disk).expect("it boots").1, "0".repeat(1024), "{block}");
    }
    // What it holds: it was there, and is lost.
    let mut disk = whole;
    disk[at(start + 1) + 40] ^= 1;
    let said = find(disk).expect_err("its checksum is wrong").to_string();
    assert!(said.contains("another checksum"), "{said}");
}
