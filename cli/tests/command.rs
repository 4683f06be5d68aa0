//! The `ballast` command as a user meets it.

use std::fs;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output, Stdio};
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use vmm::api_server::Server;
use vmm::control::Control;
use vmm::host;

/// A runtime directory of a test's own.
struct Place(tempfile::TempDir);

impl Place {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
        command.args(arguments).env("BALLAST_RUNTIME_DIR", self.path()).stdin(Stdio::null());
        command
    }

    fn ballast(&self, arguments: &[&str]) -> Answer {
        Answer::from(self.command(arguments).output().unwrap())
    }
}

#[derive(Debug)]
struct Answer {
    code: Option<i32>,
    out: String,
    err: String,
}

impl From<Output> for Answer {
    fn from(output: Output) -> Self {
        Self {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap(),
            err: String::from_utf8(output.stderr).unwrap(),
        }
    }
}

/// Serves the API of a VM that has been set up and not started, until `work` is done.
fn with_vm(place: &Place, name: &str, work: impl FnOnce()) {
    let server = Server::bind(&place.path().join(format!("{name}.sock"))).unwrap();
    let stop = server.stopper().unwrap();
    let limits = "256M,min=128M,max=1G".parse().unwrap();
    let control = Arc::new(Control::new(name.parse().unwrap(), "2".parse().unwrap(), limits));
    thread::scope(|scope| {
        let serving = scope.spawn(|| server.run(&control));
        // Also when `work` panics: the scope waits for the server.
        let done = Stop(stop);
        work();
        drop(done);
        serving.join().unwrap().unwrap();
    });
}

/// Ends a server when it goes.
struct Stop(vmm_sys_util::eventfd::EventFd);

impl Drop for Stop {
    fn drop(&mut self) {
        self.0.write(1).unwrap();
    }
}

/// A file that may not grow is an error, and no signal's prey.
#[test]
fn a_limit_on_the_size_of_files_ends_nobody() {
    let place = Place::new();
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -f 0; exec \"$0\" completions bash >\"$1\""]);
    limited.arg(env!("CARGO_BIN_EXE_ballast")).arg(place.path().join("completions"));
    let answer = Answer::from(limited.output().unwrap());
    assert_eq!(answer.code, Some(1), "{answer:?}");
    assert!(answer.err.starts_with("ballast: ") && answer.err.contains("File too large"), "{answer:?}");
}

#[test]
fn help_teaches() {
    let place = Place::new();
    let whole = place.ballast(&["--help"]);
    assert_eq!(whole.code, Some(0));
    for word in [
        "check",
        "run",
        "ps",
        "memory",
        "stop",
        "balancer",
        "Examples:",
        "Exit codes:",
        "BALLAST_RUNTIME_DIR",
    ] {
        assert!(whole.out.contains(word), "{word} is missing in {}", whole.out);
    }
    let run = place.ballast(&["run", "--help"]);
    for word in ["min=SIZE", "Ctrl-A x", "10  the guest asked for a reboot", "--hugepages", "Examples:"] {
        assert!(run.out.contains(word), "{word} is missing in {}", run.out);
    }
    for command in ["check", "memory", "stop", "balancer", "completions"] {
        assert!(place.ballast(&[command, "--help"]).out.contains("ballast "), "{command}");
    }
    let nothing = place.ballast(&[]);
    assert_eq!(nothing.code, Some(2));
    assert!(nothing.err.contains("Usage:"), "{}", nothing.err);
}

#[test]
fn arguments_that_make_no_sense_are_named() {
    let place = Place::new();
    for (arguments, word) in [
        (&["run", "--memory", "256M"][..], "--kernel"),
        (&["run", "--kernel", "k", "--memory", "256X"], "not a unit"),
        (&["run", "--kernel", "k", "--memory", "256M,min=512M"], "min 512 MiB <= startup 256 MiB"),
        (&["run", "--kernel", "k", "--memory", "256M", "--cpus", "0"], "number of vCPUs"),
        (&["run", "--kernel", "k", "--memory", "256M", "--console", "tty"], "not a console"),
        (&["run", "--kernel", "k", "--memory", "256M", "--name", "../x"], "not a VM name"),
        (&["run", "--kernel", "k", "--memory", "256M", "--hugepages", "1G"], "huge pages"),
        (&["run", "--kernel", "k", "--memory", "1G", "--hugepages", "2M", "--thp"], "cannot be used with"),
        (&["run", "--kernel", "k", "--memory", "1G", "--statistics-interval", "1d"], "500ms"),
        (&["memory", "Web"], "not a VM's name"),
        (&["memory", "web", "--target", "lots"], "not a size"),
        (&["stop"], "<NAME>"),
        (&["fly"], "fly"),
    ] {
        let answer = place.ballast(arguments);
        assert_eq!(answer.code, Some(2), "{arguments:?}: {}", answer.err);
        assert!(answer.err.starts_with("ballast: "), "{}", answer.err);
        assert!(answer.err.contains(word), "{word} is missing in {}", answer.err);
        assert!(answer.out.is_empty());
    }
}

#[test]
fn run_says_what_is_missing_before_it_starts() {
    let place = Place::new();
    let answer = place.ballast(&["run", "--kernel", "/nonexistent/vmlinuz", "--memory", "64M"]);
    match host::open_for_guests() {
        Ok(_) => {
            assert_eq!(answer.code, Some(1), "{}", answer.err);
            assert!(answer.err.contains("/nonexistent/vmlinuz"), "{}", answer.err);
        }
        Err(reason) => {
            assert_eq!(answer.code, Some(3), "{}", answer.err);
            assert!(answer.err.contains(&reason.to_string()), "{}", answer.err);
        }
    }
    assert!(answer.out.is_empty());
    let left = fs::read_dir(place.path()).unwrap().count();
    assert_eq!(left, 0, "a socket was left behind");
}

#[test]
fn check_says_whether_guests_run_here_and_what_to_do() {
    let place = Place::new();
    let can_run = host::Host::look().can_run();
    let table = place.ballast(&["check"]);
    let json: Value = serde_json::from_str(&place.ballast(&["check", "--json"]).out).unwrap();
    assert_eq!(json["can_run"], can_run.is_ok());
    match can_run {
        Ok(()) => assert_eq!(table.code, Some(0), "{}", table.err),
        Err(reason) => {
            assert_eq!(table.code, Some(3));
            assert!(table.err.contains(&reason.to_string()), "{}", table.err);
            assert!(table.err.contains("make lab"), "{}", table.err);
            assert!(table.out.contains("bad "), "{}", table.out);
        }
    }
    for finding in json["findings"].as_array().unwrap() {
        assert!(table.out.contains(finding["found"].as_str().unwrap()), "{finding} is not in the table");
        let helped = finding["do"].is_string() || finding["about"] == "kvm";
        assert!(finding["grade"] == "good" || helped, "nothing to do about {finding}");
    }
    assert!(table.out.contains(&place.path().display().to_string()), "{}", table.out);
}

#[test]
fn a_balancer_starts_once_says_what_it_does_and_stops_when_asked() {
    let place = Place::new();
    for (arguments, word) in [
        (&["balancer", "--interval", "1ms"][..], "interval"),
        (&["balancer", "--budget", "0"], "budget"),
        (&["balancer", "--beside-others"], "needs a budget"),
        (&["balancer", "--host-reserve", "99999T"], "leaves nothing"),
        (&["balancer", "--config", "/nonexistent.toml"], "/nonexistent.toml"),
        (&["balancer", "--budget", "1G", "--host-reserve", "1G"], "cannot be used with"),
        (&["balancer", "--metrics", "here"], "--metrics"),
    ] {
        let answer = place.ballast(arguments);
        assert_eq!(answer.code, Some(2), "{}", answer.err);
        assert!(answer.err.contains(word), "{word} is missing in {}", answer.err);
    }

    let file = place.path().join("balancer.toml");
    let settings = "budget = \"1G\"\nbeside_others = true\ninterval = \"5s\"\n[[vms]]\ndriver = \"qemu\"\nsockets = \"/nowhere/*.qmp\"\n";
    fs::write(&file, settings).unwrap();
    let arguments = ["balancer", "--config", file.to_str().unwrap(), "--interval", "100ms"];
    let mut first = place.command(&arguments).stderr(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
    let mut log = BufReader::new(first.stderr.take().unwrap());
    let mut line = String::new();
    log.read_line(&mut line).unwrap();
    assert!(line.contains("budget 1 GiB") && line.contains("every 100 ms"), "{line}");
    line.clear();
    log.read_line(&mut line).unwrap();
    assert!(line.contains("no VM of QEMU") && line.contains("/nowhere/*.qmp"), "{line}");

    let second = place.ballast(&arguments);
    assert_eq!(second.code, Some(1));
    assert!(second.err.contains(&format!("process {}", first.id())), "{}", second.err);

    Command::new("kill").args(["-INT", &first.id().to_string()]).status().unwrap();
    let mut rest = String::new();
    log.read_to_string(&mut rest).unwrap();
    assert_eq!(first.wait().unwrap().code(), Some(0), "{rest}");
    assert!(rest.contains("stopped"), "{rest}");
}

#[test]
fn no_vms_are_no_error() {
    let place = Place::new();
    let table = place.ballast(&["ps"]);
    assert_eq!((table.code, table.out.as_str()), (Some(0), ""));
    assert!(table.err.contains("no VMs in"), "{}", table.err);
    let json = place.ballast(&["ps", "--json"]);
    assert_eq!((json.code, json.out.trim(), json.err.as_str()), (Some(0), "[]", ""));
}

#[test]
fn a_vm_that_is_not_there_is_said_to_be_not_there() {
    let place = Place::new();
    for arguments in [&["memory", "ghost"][..], &["stop", "ghost"], &["pause", "ghost"], &["resume", "ghost"]]
    {
        let answer = place.ballast(arguments);
        assert_eq!(answer.code, Some(1));
        assert!(answer.err.contains("no VM `ghost`"), "{}", answer.err);
        assert!(answer.err.contains("ballast ps"), "{}", answer.err);
    }
}

#[test]
fn a_vm_is_shown_and_steered() {
    let place = Place::new();
    with_vm(&place, "web", || {
        let table = place.ballast(&["ps"]);
        assert_eq!(table.code, Some(0), "{}", table.err);
        let row = table.out.lines().nth(1).unwrap();
        for word in ["web", "created", "128 MiB - 1 GiB", "256 MiB", "absent"] {
            assert!(row.contains(word), "{word} is missing in {row}");
        }
        let json: Value = serde_json::from_str(&place.ballast(&["ps", "--json"]).out).unwrap();
        assert_eq!(json[0]["vm"]["name"], "web");
        assert_eq!(json[0]["memory"]["limits"]["max"], 1 << 30);

        let limits = place.ballast(&["memory", "web", "--limits", "256M,min=128M,max=512M", "--json"]);
        assert_eq!(limits.code, Some(0), "{}", limits.err);
        let json: Value = serde_json::from_str(&limits.out).unwrap();
        assert_eq!(json["limits"]["max"], 512 << 20);
        assert!(place.ballast(&["memory", "web"]).out.contains("max            512 MiB\n"));

        let beyond = place.ballast(&["memory", "web", "--limits", "256M,max=2G"]);
        assert_eq!(beyond.code, Some(1));
        assert!(beyond.err.contains("larger max"), "{}", beyond.err);
        let paused = place.ballast(&["pause", "web"]);
        assert_eq!(paused.code, Some(1));
        assert!(paused.err.contains("not started yet"), "{}", paused.err);
    });
}

#[test]
fn ps_lists_a_vm_once_whatever_leads_to_its_socket() {
    let place = Place::new();
    with_vm(&place, "web", || {
        let path = |name: &str| place.path().join(name);
        std::os::unix::fs::symlink("web.sock", path("latest.sock")).unwrap();
        fs::hard_link(path("web.sock"), path("web-too.sock")).unwrap();
        let json: Value = serde_json::from_str(&place.ballast(&["ps", "--json"]).out).unwrap();
        let names: Vec<_> = json.as_array().unwrap().iter().map(|vm| &vm["name"]).collect();
        assert_eq!(names, ["web"]);
        // By its other name it is still found.
        assert_eq!(place.ballast(&["memory", "latest"]).code, Some(0));
    });
}

#[test]
fn ps_names_the_dead_the_deaf_and_the_mad_and_waits_for_none() {
    let place = Place::new();
    drop(UnixListener::bind(place.path().join("dead.sock")).unwrap());
    let _deaf = UnixListener::bind(place.path().join("deaf.sock")).unwrap();
    let mad = UnixListener::bind(place.path().join("mad.sock")).unwrap();
    thread::spawn(move || {
        for stream in mad.incoming() {
            stream.unwrap().write_all(b"\x1b[2Jhello\r\n\r\n").unwrap();
        }
    });
    with_vm(&place, "well", || {
        let begun = Instant::now();
        let answer = place.ballast(&["ps"]);
        assert!(begun.elapsed() < Duration::from_secs(10), "ps hung for {:?}", begun.elapsed());
        assert_eq!(answer.code, Some(0));
        let lines: Vec<&str> = answer.out.lines().collect();
        assert_eq!(lines.len(), 5, "{}", answer.out);
        for (line, name, state) in [
            (1, "dead", "dead"),
            (2, "deaf", "not answering"),
            (3, "mad", "unreadable"),
            (4, "well", "created"),
        ] {
            let line = lines.get(line).unwrap();
            assert!(line.starts_with(name) && line.contains(state), "{line}");
        }
        assert!(!answer.err.contains('\x1b'), "a VM must not drive the terminal");
        assert!(answer.err.contains("dead.sock"), "{}", answer.err);
    });
}

#[test]
fn ps_lists_vms_of_other_vmms_as_the_balancer_knows_them() {
    let place = Place::new();
    fs::create_dir(place.path().join("balancer")).unwrap();
    let balancer = UnixListener::bind(place.path().join("balancer/balancer.sock")).unwrap();
    let of = |name: &str, vmm: &str| {
        serde_json::json!({
            "name": name, "vmm": vmm, "standing": "stuck", "report_age_ms": 1500, "last_reason": null,
            "grows": 0, "shrinks": 0, "errors": 0,
            "memory": {
                "limits": {"startup": 1_u64 << 30, "min": 256 << 20, "max": 2_u64 << 30},
                "used": 300 << 20, "demand": 360 << 20, "entitlement": 360 << 20, "target": 512 << 20,
                "actual": 700 << 20, "host_rss": 650 << 20, "charge": 700 << 20,
            },
        })
    };
    let bytes = 0;
    let state = serde_json::json!({
        "rounds": 1,
        "host": {
            "total": bytes, "available": bytes, "budget": bytes, "charged": bytes, "free": bytes,
            "over": bytes, "unserved": bytes, "state": "normal", "rounds_over_budget": 0,
        },
        "vms": [of("mail", "qemu"), of("web", "ballast"), of("gone", "ballast")],
    });
    let body = state.to_string();
    thread::spawn(move || {
        for stream in balancer.incoming() {
            let mut stream = stream.unwrap();
            let mut request = [0; 4096];
            assert!(stream.read(&mut request).unwrap() > 0);
            let head = format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).unwrap();
        }
    });
    with_vm(&place, "web", || {
        let answer = place.ballast(&["ps"]);
        assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""));
        let lines: Vec<&str> = answer.out.lines().collect();
        assert_eq!(lines.len(), 3, "{}", answer.out);
        for word in ["mail", "stuck", "256 MiB - 2 GiB", "512 MiB", "700 MiB", "650 MiB", "1.5 s"] {
            assert!(lines[1].contains(word), "{word} is missing in {}", lines[1]);
        }
        assert!(
            lines[2].starts_with("web") && lines[2].contains("created"),
            "one that has a socket answers itself"
        );
        let json: Value = serde_json::from_str(&place.ballast(&["ps", "--json"]).out).unwrap();
        assert_eq!((&json[0]["answer"], &json[0]["view"]["name"]), (&"of-balancer".into(), &"mail".into()));
    });
}

#[test]
fn a_filter_of_the_log_that_cannot_be_read_is_told() {
    let place = Place::new();
    for (filter, told) in [("ballast=loud", true), ("a=b=c", true), ("debug", false), ("", false)] {
        let answer = Answer::from(place.command(&["ps"]).env("BALLAST_LOG", filter).output().unwrap());
        assert_eq!(answer.code, Some(0), "{filter}: {answer:?}");
        assert_eq!(answer.err.contains("is left aside"), told, "{filter}: {answer:?}");
    }
}

#[test]
fn completions_exist_for_each_shell() {
    let place = Place::new();
    for shell in ["bash", "zsh", "fish", "elvish", "powershell"] {
        let answer = place.ballast(&["completions", shell]);
        assert_eq!(answer.code, Some(0));
        assert!(answer.out.contains("ballast") && answer.out.contains("memory"), "{shell}");
    }
}

#[test]
fn a_reader_that_has_seen_enough_is_no_error() {
    let place = Place::new();
    let mut child =
        place.command(&["completions", "zsh"]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    drop(child.stdout.take());
    let answer = Answer::from(child.wait_with_output().unwrap());
    assert_eq!((answer.code, answer.err.as_str()), (Some(0), ""));
}
