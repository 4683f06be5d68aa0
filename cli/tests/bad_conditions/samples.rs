//! Arguments for each command.

use std::fmt;

/// A command with arguments.
pub struct Sample {
    /// Its path in the program's command tree.
    pub command: &'static str,
    /// Words; files are in the scene's work directory.
    pub arguments: &'static str,
    /// The codes with which it ends where nothing is wrong.
    pub usual: &'static [i32],
    /// Whether it goes on until it is asked to end.
    pub serves: bool,
    /// Whether it is to find a VM and a balancer.
    pub finds: bool,
}

impl fmt::Display for Sample {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.command, self.arguments)
    }
}

const fn alone(command: &'static str, arguments: &'static str, usual: &'static [i32]) -> Sample {
    Sample { command, arguments, usual, serves: false, finds: false }
}

const fn client(command: &'static str, arguments: &'static str, usual: &'static [i32]) -> Sample {
    Sample { command, arguments, usual, serves: false, finds: true }
}

/// Of a command that takes KVM, which is not everywhere: 3 where there is none.
pub const SAMPLES: &[Sample] = &[
    alone("", "", &[2]),
    alone("", "--help", &[0]),
    alone("", "--version", &[0]),
    alone("", "no-such-command", &[2]),
    alone("check", "", &[0, 3]),
    alone("check", "--json", &[0, 3]),
    alone("check", "vm.toml", &[0]),
    // No kernel is in that file.
    alone("run", "--kernel vmlinuz --memory 64M --console none", &[1, 3]),
    alone("run", "--config vm.toml --console none", &[1, 3]),
    client("ps", "", &[0]),
    client("ps", "--json", &[0]),
    // Standard output is no terminal.
    client("top", "", &[2]),
    client("top", "--once", &[0]),
    client("top", "--json --once", &[0]),
    Sample { serves: true, ..client("top", "--json --interval 100ms", &[0]) },
    client("memory", "web", &[0]),
    client("memory", "web --limits 256M,min=64M --json", &[0]),
    // It has not started.
    client("memory", "web --target 128M", &[1]),
    client("why", "web", &[0]),
    // Nobody has a file of that name.
    alone("enable", "no-such-vm-here", &[2]),
    alone("start", "no-such-vm-here", &[2]),
    // 0 where systemd runs, and there is nothing to disable.
    alone("disable", "no-such-vm-here", &[0, 1]),
    // 1 where there is no journalctl.
    alone("logs", "no-such-vm-here --lines 1 --events", &[0, 1]),
    client("stop", "web --timeout 100ms", &[1]),
    client("pause", "web", &[0, 1]),
    client("resume", "web", &[0, 1]),
    // It has not started.
    client("console", "web", &[1]),
    client("console", "web --watch", &[1]),
    client("vsock", "web 22", &[1]),
    // Where there is such a VM it becomes ssh, which goes by its own rules.
    client("ssh", "me@other", &[1]),
    client("disk list", "", &[0]),
    client("disk list", "web --json", &[0]),
    alone("net", "", &[2]),
    client("net list", "", &[0]),
    client("net list", "web --json", &[0]),
    alone("slat", "", &[2]),
    alone("slat probe", "", &[0, 3]),
    alone("slat walk", "--steps", &[0]),
    client("slat walk", "--vm web --gpa 0x1000", &[0, 1]),
    alone("slat run", "--payload warm-touch --passes 1 --rounds 1 --output out.json", &[0, 3]),
    alone("slat run", "--payload warm-touch --reload-module", &[1]),
    alone("slat lab", "--kernel-root nowhere --output lab.json", &[1]),
    alone("slat lab", "--kernel-root nowhere --nested", &[1, 3]),
    alone("slat all", "--output nowhere/out.json", &[2]),
    alone("slat report", "run.json --html report.html", &[0]),
    alone("slat compare", "run.json run.json", &[0]),
    alone("slat inside", "", &[1]),
    alone("slat guest", "", &[1]),
    alone("slat vm", "--kernel vmlinuz --initrd initrd --memory 64M", &[1]),
    Sample { serves: true, ..alone("balancer", "--interval 50ms --budget 64M --beside-others", &[0]) },
    alone("balancer", "--check balancer.toml", &[0]),
    // 1 where no cluster runs.
    alone("fleet", "", &[0, 1]),
    alone("fleet", "--json", &[0, 1]),
    client("fleet publish", "--dry-run", &[0]),
    // There is no cluster to tell it to.
    client("fleet publish", "--node host1 --state publish.json", &[1]),
    alone("sim", "--vms 2 --seeds 1..4 --hours 0.1 --plot plots", &[0]),
    alone("sim fleet", "--hosts 3 --vms 20 --hours 1 --plot plots", &[0]),
    // Its guest has told nothing.
    client("record", "-o recording.csv --interval 100ms --for 200ms", &[1]),
    Sample { serves: true, ..client("record", "-o recording.csv --interval 100ms", &[1]) },
    alone("run", "--kernel vmlinuz --memory 64M --console none --user me --ssh-key vmlinuz", &[2]),
    alone("disk", "", &[2]),
    alone("disk create", "new.qcow2 --size 1G", &[0]),
    alone("disk create", "new.img --size 1G", &[0]),
    alone("disk info", "disk.img --json", &[0]),
    alone("disk resize", "disk.img +1G", &[0]),
    // 1 where qemu-img is missing.
    alone("disk check", "disk.img", &[0, 1]),
    alone("image", "", &[2]),
    alone("image create", "", &[2]),
    // Too small: it would take minutes otherwise.
    alone("image create debian", "--size 1M debian.qcow2", &[2]),
    alone("completions", "bash", &[0]),
    alone("manual-pages", ".", &[0]),
    alone("manual-pages", "--schema", &[0]),
];

/// Commands that only ballast itself runs, gives files alone, and ends after a while.
pub const HELPERS: &[&str] = &["unpack-kernel", "read-disk"];
