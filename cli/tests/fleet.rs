//! `ballast fleet` and the agent ocf:ballast:node, with programs that answer as Pacemaker's do (2.1.5). With the real
//! ones: packaging/test-fleet.

use std::fs::{self, Permissions};
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::{Command, Output};
use std::thread;

const RECORDED: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src/fleet/recorded");

/// A directory of programs of which each does what its script says.
struct Programs(tempfile::TempDir);

impl Programs {
    fn new(programs: &[(&str, &str)]) -> Self {
        let directory = Self(tempfile::tempdir().unwrap());
        programs.iter().for_each(|(name, script)| directory.add(name, script));
        directory
    }

    fn add(&self, name: &str, script: &str) {
        let path = self.path().join(name);
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, Permissions::from_mode(0o755)).unwrap();
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    /// Runs a program with these before all others.
    fn run(&self, mut command: Command) -> Output {
        let path = format!("{}:/usr/bin:/bin", self.path().display());
        command.env("PATH", path).env("BALLAST_RUNTIME_DIR", self.path()).output().unwrap()
    }

    fn fleet(&self, words: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ballast"));
        command.arg("fleet").args(words);
        self.run(command)
    }
}

fn said(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// A program that fails as one of Pacemaker's, with its answer in XML.
fn refuses(code: i32, error: &str) -> String {
    format!(
        "echo '<pacemaker-result><status code=\"{code}\"><errors><error>error: first</error>\
         <error>{error}</error></errors></status></pacemaker-result>'; exit {code}"
    )
}

#[test]
fn where_pacemaker_is_not_there_or_does_not_answer_a_sentence_says_what_to_do() {
    let whole = format!("cat {RECORDED}/pressure.status.xml");
    for (crm_mon, cibadmin, sentence) in [
        (None, None, "apt install pacemaker"),
        (Some(refuses(102, "Connection refused")), None, "`systemctl start pacemaker`"),
        (Some(refuses(102, "Connection refused")), None, "Connection refused"),
        (Some(refuses(4, "Permission denied")), None, "group haclient"),
        (Some("echo broken >&2; exit 1".to_owned()), None, "crm_mon ended with exit status: 1: broken"),
        (Some("kill -9 $$".to_owned()), None, "crm_mon ended with signal: 9 (SIGKILL): it said nothing"),
        (Some("echo hello".to_owned()), None, "crm_mon gave no answer that could be used"),
        (Some("head -c 100000 /dev/urandom".to_owned()), None, "crm_mon gave no answer that could be used"),
        (Some("yes '<a>' | head -c 80000000".to_owned()), None, "crm_mon answered more than 64 MiB"),
        (Some(whole.clone()), None, "cibadmin is not here"),
        (Some(whole.clone()), Some("echo '<cib/>'"), "it has no <configuration>"),
    ] {
        let programs = Programs::new(&[]);
        crm_mon.iter().for_each(|script| programs.add("crm_mon", script));
        cibadmin.iter().for_each(|script| programs.add("cibadmin", script));
        let output = programs.fleet(&[]);
        assert_eq!(output.status.code(), Some(1), "{crm_mon:?}: {output:?}");
        let said = said(&output);
        assert!(said.contains(sentence) && said.lines().count() == 1, "{sentence}: {said}");
    }
}

#[test]
fn a_cluster_is_shown_as_tables_and_as_json() {
    let programs = Programs::new(&[
        ("crm_mon", &format!("cat {RECORDED}/start-failed.status.xml")),
        ("cibadmin", &format!("cat {RECORDED}/start-failed.configuration.xml")),
    ]);
    let output = programs.fleet(&[]);
    assert!(output.status.success(), "{output:?}");
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    for line in
        ["HOST   STATE   NEWCOMERS", "host3  online  yes        960 MiB", "vm7  waiting  -      50 MiB"]
    {
        assert!(text.contains(line), "{line}\n{text}");
    }
    assert!(said(&output).contains("vm7 has failed before"), "{output:?}");
    let output = programs.fleet(&["--json"]);
    let json: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(json["vms"][6]["state"], "waiting");
    assert_eq!(said(&output), "");
}

/// An agent with what it needs, and a `ballast` whose `fleet publish` ends with the code in the file `published`.
fn agent(programs: &Programs, hold: Option<&str>, action: &str) -> Output {
    let mut agent = Command::new("sh");
    agent.arg(concat!(env!("CARGO_MANIFEST_DIR"), "/../packaging/pacemaker/node")).arg(action);
    agent.env("OCF_FUNCTIONS_DIR", programs.path()).env("HA_RSCTMP", programs.path());
    hold.map(|hold| agent.env("OCF_RESKEY_hold", hold));
    programs.run(agent)
}

#[test]
fn a_host_that_can_not_be_asked_fails_and_is_started_anew() {
    let programs = Programs::new(&[
        (
            "ocf-shellfuncs",
            "OCF_SUCCESS=0 OCF_ERR_GENERIC=1 OCF_ERR_UNIMPLEMENTED=3 OCF_ERR_CONFIGURED=6 OCF_NOT_RUNNING=7
            ocf_exit_reason() { echo \"$1\"; }
            check_binary() { :; }",
        ),
        (
            "ballast",
            "echo \"$@\" >> \"$BALLAST_RUNTIME_DIR/calls\"; echo 'no balancer runs'; exit $(cat \"$BALLAST_RUNTIME_DIR/published\")",
        ),
        ("systemctl", "echo \"$@\" >> \"$BALLAST_RUNTIME_DIR/calls\""),
        ("attrd_updater", "echo \"$@\" >> \"$BALLAST_RUNTIME_DIR/calls\""),
    ]);
    let publishes = |code: &str| fs::write(programs.path().join("published"), code).unwrap();
    let calls = || {
        let file = programs.path().join("calls");
        let calls = fs::read_to_string(&file).unwrap_or_default();
        let _ = fs::remove_file(&file);
        calls
    };
    let is = |action: &str, code: i32| {
        let output = agent(&programs, None, action);
        assert_eq!(output.status.code(), Some(code), "{action}: {output:?}");
        String::from_utf8_lossy(&output.stdout).into_owned()
    };
    publishes("0");
    // It tells nothing before it was started.
    is("monitor", 7);
    assert_eq!(calls(), "");
    is("start", 0);
    let told = calls();
    assert!(told.starts_with("start ballast-balancer.service\nfleet publish --state "), "{told}");
    assert!(told.contains("--hold 60s"), "{told}");
    is("monitor", 0);
    publishes("1");
    assert!(is("monitor", 1).contains("no balancer runs"));
    is("stop", 0);
    let told = calls();
    assert!(told.ends_with("--name ballast_pressure --delete\n--name ballast_floors --delete\n"), "{told}");
    assert!(!told.contains("ballast_memory"), "a host without a capacity loses its VMs: {told}");
    is("stop", 0);
    is("start", 1);
    is("monitor", 7);
    is("migrate_to", 3);
    assert!(is("meta-data", 0).contains("<resource-agent name=\"node\""));
    for (hold, code) in [("0", 0), ("9999", 0), ("", 0), ("10000", 6), ("-1", 6), ("1s", 6), ("; reboot", 6)]
    {
        let output = agent(&programs, Some(hold), "validate-all");
        assert_eq!(output.status.code(), Some(code), "{hold:?}: {output:?}");
    }
}

/// Its figures are zero then, and a capacity of zero would drive all VMs away.
#[test]
fn a_balancer_that_has_not_looked_yet_is_asked_again() {
    let programs = Programs::new(&[]);
    fs::create_dir(programs.path().join("balancer")).unwrap();
    let listener = UnixListener::bind(programs.path().join("balancer/balancer.sock")).unwrap();
    let balancer = thread::spawn(move || {
        for rounds in 0..2 {
            let (mut stream, _) = listener.accept().unwrap();
            let mut asked = BufReader::new(stream.try_clone().unwrap());
            let mut line = String::new();
            while line != "\r\n" {
                line.clear();
                asked.read_line(&mut line).unwrap();
            }
            let budget = rounds * (1u64 << 30);
            let body = format!(
                "{{\"rounds\":{rounds},\"host\":{{\"total\":0,\"available\":0,\"budget\":{budget},\"charged\":0,\
                 \"free\":0,\"over\":0,\"unserved\":0,\"state\":\"normal\",\"rounds_over_budget\":0}},\"vms\":[]}}"
            );
            let head =
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\nConnection: close\r\n\r\n", body.len());
            stream.write_all((head + &body).as_bytes()).unwrap();
        }
    });
    let output = programs.fleet(&["publish", "--dry-run"]);
    assert!(output.status.success(), "{output:?}");
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(plan["told_now"]["capacity"], 1024);
    balancer.join().unwrap();
}
