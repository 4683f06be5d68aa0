//! How fast the block device is beside fio: a driver of ours over real memory and a real file, no KVM.
//!
//! Both do the same on the same file, one after the other, again and again: 4 KiB at random places, one request
//! at a time and 32 at once, and 128 KiB one after the other. fio takes the engine that `--engine` names.
//! Medians of the ratios of each round: what else the machine does hits both alike. Then 20,000 requests are done
//! for what each costs the host, the driver's part included.
//!
//! `cargo bench -p devices --bench block`, or with `-- --engine io_uring --seconds 5 --rounds 9 --only qcow2`.
//! `-- --count` only counts; `-- --threads` has the device do without io_uring.

#![allow(clippy::unwrap_used, reason = "a benchmark has nobody to tell but its user")]

mod counts;

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use devices::testing::{BUFFERS, CARRIERS, Guest, HIGH};
use devices::virtio::block::Block;
use devices::virtio::block::disk::Disk;
use devices::virtio::block::qcow2::{Qcow2Disk, Qcow2Options};
use devices::virtio::block::raw::{Cache, RawDisk, RawOptions};
use virtio_bindings::virtio_blk::{VIRTIO_BLK_T_IN, VIRTIO_BLK_T_OUT};
use virtio_bindings::virtio_ring::{VRING_DESC_F_NEXT, VRING_DESC_F_WRITE};
use vm_memory::{Bytes, GuestAddress};

use counts::Counting;

/// Bytes of the file.
const SIZE: u64 = 256 << 20;

/// Requests whose costs are counted.
const COUNTED: u64 = 20_000;

#[derive(Clone, Copy)]
struct Case {
    name: &'static str,
    /// As fio calls it.
    pattern: &'static str,
    bytes: u32,
    depth: u16,
    /// Of fio's speed, what is asked for: raw, and qcow2.
    bars: [f64; 2],
}

const CASES: [Case; 6] = [
    Case { name: "4 KiB random reads, 1", pattern: "randread", bytes: 4096, depth: 1, bars: [0.8, 0.7] },
    Case { name: "4 KiB random writes, 1", pattern: "randwrite", bytes: 4096, depth: 1, bars: [0.8, 0.7] },
    Case { name: "4 KiB random reads, 32", pattern: "randread", bytes: 4096, depth: 32, bars: [0.9, 0.7] },
    Case { name: "4 KiB random writes, 32", pattern: "randwrite", bytes: 4096, depth: 32, bars: [0.9, 0.7] },
    Case { name: "128 KiB reads in a row, 4", pattern: "read", bytes: 128 << 10, depth: 4, bars: [0.9, 0.7] },
    Case {
        name: "128 KiB writes in a row, 4",
        pattern: "write",
        bytes: 128 << 10,
        depth: 4,
        bars: [0.9, 0.7],
    },
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    // `cargo test --benches` runs this as well: a benchmark is no test.
    if arguments.iter().any(|argument| argument == "--test") {
        return;
    }
    let value = |name: &str| {
        let at = arguments.iter().position(|argument| argument == name)?;
        arguments.get(at + 1).cloned()
    };
    let number = |name: &str, usual: u64| value(name).map_or(usual, |text| text.parse().unwrap());
    let engine = value("--engine").unwrap_or_else(|| "psync".to_owned());
    let has = |name: &str| arguments.iter().any(|argument| argument == name);
    let threads = has("--threads");
    let (time, rounds) = (Duration::from_secs(number("--seconds", 2)), number("--rounds", 5));
    let directory = vmm_sys_util::tempdir::TempDir::new_in(Path::new(env!("CARGO_TARGET_TMPDIR"))).unwrap();
    let raw = directory.as_path().join("disk.img");
    fill(&raw);
    let image = directory.as_path().join("disk.qcow2");
    let made =
        Command::new("qemu-img").args(["convert", "-f", "raw", "-O", "qcow2"]).arg(&raw).arg(&image).status();
    assert!(made.unwrap().success());
    for (kind, path) in [("raw", &raw), ("qcow2", &image)] {
        if value("--only").is_some_and(|only| only != kind) {
            continue;
        }
        for case in CASES {
            let bar = case.bars[usize::from(kind == "qcow2")];
            let counted = || ours(path, case, threads, Duration::MAX, COUNTED).1;
            if has("--count") {
                println!("{kind:<6} {:<28} {}", case.name, counted());
                continue;
            }
            let mut ratios = Vec::new();
            let (mut best_fio, mut best_ours) = (0.0_f64, 0.0_f64);
            for _ in 0..rounds {
                // Always on the raw file: what fio does has no format.
                let fio = fio(&raw, case, &engine, time);
                let (ours, _) = ours(path, case, threads, time, u64::MAX);
                ratios.push(ours / fio);
                (best_fio, best_ours) = (best_fio.max(fio), best_ours.max(ours));
            }
            ratios.sort_by(f64::total_cmp);
            let ratio = ratios[ratios.len() / 2];
            let word = if ratio >= bar { "met" } else { "missed" };
            println!(
                "{kind:<6} {:<28} fio ({engine}) {best_fio:>8.0}/s  device {best_ours:>8.0}/s  median ratio {ratio:.2} \
                 ({:.2} to {:.2}), asked {bar}: {word}",
                case.name,
                ratios[0],
                ratios[ratios.len() - 1]
            );
            println!("{:<35} {}", "", counted());
        }
    }
}

fn fill(path: &PathBuf) {
    let mut file = File::create(path).unwrap();
    let piece: Vec<u8> =
        (0..1 << 20).map(|place: u32| (place.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for _ in 0..SIZE >> 20 {
        file.write_all(&piece).unwrap();
    }
    file.sync_all().unwrap();
}

/// Requests a second by fio.
fn fio(file: &Path, case: Case, engine: &str, time: Duration) -> f64 {
    // An engine without a queue has as many threads.
    let (depth, jobs) = if engine == "psync" { (1, case.depth.min(4)) } else { (case.depth, 1) };
    let output = Command::new("fio")
        .args([
            "--name=disk",
            "--direct=1",
            "--thread",
            "--group_reporting",
            "--time_based",
            "--output-format=terse",
        ])
        .arg(format!("--filename={}", file.display()))
        .arg(format!("--size={SIZE}"))
        .arg(format!("--rw={}", case.pattern))
        .arg(format!("--bs={}", case.bytes))
        .arg(format!("--ioengine={engine}"))
        .arg(format!("--iodepth={depth}"))
        .arg(format!("--numjobs={jobs}"))
        .arg(format!("--runtime={}", time.as_secs().max(1)))
        .output()
        .expect("fio is installed");
    let text = String::from_utf8(output.stdout).unwrap();
    let fields: Vec<&str> = text.lines().last().unwrap_or_default().split(';').collect();
    let field = |index: usize| fields.get(index).and_then(|field| field.parse().ok()).unwrap_or(0.0);
    // Of reads and of writes (fio's HOWTO, "terse output").
    let rate: f64 = field(7) + field(48);
    assert!(rate > 0.0, "{text}");
    rate
}

fn open(path: &Path) -> Arc<dyn Disk> {
    let cache = Cache::Direct;
    if path.extension().is_some_and(|end| end == "qcow2") {
        return Arc::new(
            Qcow2Disk::open(path, Qcow2Options { read_only: false, cache, backing: false }).unwrap(),
        );
    }
    Arc::new(RawDisk::open(path, RawOptions { read_only: false, cache, stated: true }).unwrap())
}

/// Requests a second by the device, for so long or until so many are done, and what they cost.
fn ours(path: &Path, case: Case, threads: bool, time: Duration, most: u64) -> (f64, String) {
    let mut counting = Counting::new();
    let block = Block::new(open(path), "disk", 1).unwrap();
    let block = if threads { block.on_threads() } else { block };
    let mut guest = Guest::on(CARRIERS[1], |_| Box::new(block));
    guest.start(0);
    let writes = case.pattern.ends_with("write");
    let is_random = case.pattern.starts_with("rand");
    let sectors = u64::from(case.bytes / 512);
    let places = SIZE / u64::from(case.bytes);
    let (mut seed, mut at) = (1u64, 0u64);
    let kind = if writes { VIRTIO_BLK_T_OUT } else { VIRTIO_BLK_T_IN };
    let ask = |guest: &mut Guest, place: u16, seed: &mut u64, at: &mut u64| {
        let next = if is_random {
            *seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (*seed >> 33) % places
        } else {
            *at = (*at + 1) % places;
            *at
        };
        let header = BUFFERS + 16 * u64::from(place);
        let sector = next * sectors;
        guest.ram.memory.write_obj([u64::from(kind).to_le(), sector.to_le()], GuestAddress(header)).unwrap();
        guest.offer(0, 3 * place);
    };
    for place in 0..case.depth {
        let head = 3 * place;
        let header = BUFFERS + 16 * u64::from(place);
        let data = HIGH + u64::from(case.bytes) * u64::from(place);
        let flag = if writes { 0 } else { VRING_DESC_F_WRITE };
        guest.describe(0, head, header, 16, VRING_DESC_F_NEXT, head + 1);
        guest.describe(0, head + 1, data, case.bytes, flag | VRING_DESC_F_NEXT, head + 2);
        guest.describe(0, head + 2, BUFFERS + 0x1000 + u64::from(place), 1, VRING_DESC_F_WRITE, 0);
        ask(&mut guest, place, &mut seed, &mut at);
    }
    counting.begin();
    guest.notify(0);
    let start = Instant::now();
    let mut done = 0u64;
    while start.elapsed() < time && done < most {
        let used = guest.used(0);
        if used.is_empty() {
            assert!(guest.wait(10_000), "nothing comes back");
            continue;
        }
        done += used.len() as u64;
        for (head, _) in used {
            ask(&mut guest, head as u16 / 3, &mut seed, &mut at);
        }
        guest.notify(0);
    }
    let elapsed = start.elapsed();
    let costs = counting.end(done);
    // Nothing may be on its way to memory that goes.
    let mut left = usize::from(case.depth);
    while left > 0 {
        left -= guest.used(0).len();
        if left > 0 {
            assert!(guest.wait(10_000), "nothing comes back");
        }
    }
    let check: u8 = guest.ram.memory.read_obj(GuestAddress(BUFFERS + 0x1000)).unwrap();
    assert_eq!(check, 0, "a request failed");
    (done as f64 / elapsed.as_secs_f64(), costs)
}
