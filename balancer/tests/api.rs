//! The daemon's socket, held against `resources/balancer-openapi.yaml`.

mod fakes;

use std::path::Path;
use std::time::Duration;

use api::limits::Limits;
use api::status::{DriverState, PlugCounters, PlugStatus};
use api::units::Bytes;
use balancer::daemon::client::{self, Error};
use balancer::daemon::{self, Config, Fate, Process, ReservationRequest};
use fakes::{FakeVm, Manner};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;
use tokio::task::JoinHandle;

const LIMITS: &str = "256M,min=128M,max=1G";

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

fn start(directory: &Path) -> JoinHandle<()> {
    let config = Config {
        directory: Some(directory.to_owned()),
        budget: Some(Bytes::gib(1)),
        interval: Duration::from_millis(100),
        ..Config::default()
    };
    tokio::spawn(async move { daemon::run(config, std::future::pending()).await.unwrap() })
}

async fn until<F: Future<Output = bool>>(what: &str, mut done: impl FnMut() -> F) {
    let waited = tokio::time::timeout(PATIENCE, async {
        while !done().await {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    assert!(waited.await.is_ok(), "gave up waiting until {what}");
}

fn client(directory: &Path) -> client::Client {
    client::Client::new(directory, PATIENCE)
}

struct Answer {
    status: u16,
    content_type: Option<String>,
    head: String,
    body: String,
}

/// One request to version 1 as bytes, so that any can be made.
async fn ask(directory: &Path, method: &str, path: &str, body: &str) -> Answer {
    ask_at(directory, method, &format!("/v1{path}"), body).await
}

async fn ask_at(directory: &Path, method: &str, path: &str, body: &str) -> Answer {
    let mut stream = UnixStream::connect(daemon::socket_in(directory)).await.unwrap();
    let length = body.len();
    let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut bytes = Vec::new();
    loop {
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n") {
            let field =
                |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
            let length = field("content-length").map_or(0, |length| length.parse().unwrap());
            if body.len() >= length {
                let status = head.split(' ').nth(1).unwrap().parse().unwrap();
                return Answer {
                    status,
                    content_type: field("content-type").map(str::to_owned),
                    head: head.to_owned(),
                    body: body.to_owned(),
                };
            }
        }
        assert_ne!(stream.read_buf(&mut bytes).await.unwrap(), 0, "it hung up in mid answer");
    }
}

fn document() -> Value {
    serde_saphyr::from_str(include_str!("../../resources/balancer-openapi.yaml")).unwrap()
}

/// A schema of the document, with everything that it refers to.
fn check(document: &Value, schema: &Value, instance: &Value) {
    assert!(schema.is_object());
    let mut whole = schema.clone();
    whole["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    whole["components"] = document["components"].clone();
    let validator = jsonschema::validator_for(&whole).unwrap();
    let errors: Vec<String> =
        validator.iter_errors(instance).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?}\nin {instance:#}");
}

/// Asks, and holds the answer against what the document says of `template`.
async fn described(directory: &Path, method: &str, path: &str, template: &str, body: &str) -> Answer {
    let document = document();
    let answer = ask(directory, method, path, body).await;
    let responses = &document["paths"][template][method.to_lowercase()]["responses"];
    let mut response = &responses[answer.status.to_string()];
    assert!(response.is_object(), "{method} {path} answered {}: {}", answer.status, answer.body);
    if let Some(reference) = response["$ref"].as_str() {
        response = document.pointer(reference.strip_prefix('#').unwrap()).unwrap();
    }
    match &answer.content_type {
        None => assert!(response["content"].is_null() && answer.body.is_empty(), "{method} {path}"),
        Some(content_type) => {
            let schema = &response["content"][content_type.as_str()]["schema"];
            assert!(schema.is_object(), "{method} {path} answered {content_type}");
            let instance = serde_json::from_str(&answer.body).unwrap_or_else(|_| json!(answer.body));
            check(&document, schema, &instance);
        }
    }
    answer
}

/// Else whoever changes the weight of a guest that boots would set its `max` to what it has just then.
#[tokio::test]
async fn limits_are_shown_as_they_were_set_and_not_as_far_as_the_guest_has_drivers() {
    let directory = tempfile::tempdir().unwrap();
    let vm = FakeVm::start(directory.path(), "a", LIMITS, Bytes::mib(100));
    vm.state().memory.plug = Some(PlugStatus {
        driver: DriverState::Absent,
        lacks_driver_ms: None,
        boot: Bytes::mib(256),
        block: Bytes::mib(2),
        requested: Bytes::ZERO,
        plugged: Bytes::ZERO,
        counters: PlugCounters::default(),
    });
    let _daemon = start(directory.path());
    let limits =
        async || Some(client(directory.path()).state().await.ok()?.vms.first()?.memory.as_ref()?.limits);
    until("the VM is known", async || limits().await.is_some()).await;
    assert_eq!(limits().await, Some(LIMITS.parse().unwrap()));
}

#[tokio::test]
async fn every_answer_is_as_described() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let web = FakeVm::start(path, "web", LIMITS, Bytes::mib(300));
    let bad = FakeVm::start(path, "bad", LIMITS, Bytes::mib(300));
    bad.state().manner = Manner::RefusesTargets;
    let _daemon = start(path);
    until("both have a past", || async {
        match client(path).decisions().await {
            Ok(past) => [Fate::Taken, Fate::Refused]
                .iter()
                .all(|&fate| past.decisions.iter().any(|decision| decision.fate == fate)),
            Err(_) => false,
        }
    })
    .await;
    for (method, path_, template, body, status) in [
        ("GET", "/state", "/state", "", 200),
        ("GET", "/decisions", "/decisions", "", 200),
        ("GET", "/vms/web/why", "/vms/{name}/why", "", 200),
        ("GET", "/vms/bad/why", "/vms/{name}/why", "", 200),
        ("GET", "/vms/nobody/why", "/vms/{name}/why", "", 404),
        ("GET", "/vms/%ff/why", "/vms/{name}/why", "", 400),
        ("GET", "/metrics", "/metrics", "", 200),
        ("POST", "/reservations", "/reservations", "{}", 400),
        ("POST", "/reservations", "/reservations", &reservation("../x", "64M"), 400),
        ("POST", "/reservations", "/reservations", &reservation("web", "64M"), 409),
        ("POST", "/reservations", "/reservations", &reservation("big", "1G"), 409),
        ("POST", "/reservations", "/reservations", &reservation("new", "64M"), 201),
        ("GET", "/state", "/state", "", 200),
        ("DELETE", "/reservations/new", "/reservations/{name}", "", 204),
        ("DELETE", "/reservations/new", "/reservations/{name}", "", 404),
        ("DELETE", "/reservations/%ff", "/reservations/{name}", "", 400),
        ("PUT", "/vms/web/limits", "/vms/{name}/limits", "", 400),
        ("PUT", "/vms/%ff/limits", "/vms/{name}/limits", FIXED, 400),
        ("PUT", "/vms/web/limits", "/vms/{name}/limits", r#"{"startup":1,"min":2,"max":3}"#, 400),
        ("PUT", "/vms/nobody/limits", "/vms/{name}/limits", FIXED, 404),
        ("PUT", "/vms/web/limits", "/vms/{name}/limits", FIXED, 204),
    ] {
        let answer = described(path, method, path_, template, body).await;
        assert_eq!(answer.status, status, "{method} {path_} {body}: {}", answer.body);
    }
    assert_eq!(web.state().memory.limits.max(), Bytes::mib(256), "the VM itself was told");
    bad.state().manner = Manner::Silent;
    let answer = described(path, "PUT", "/vms/bad/limits", "/vms/{name}/limits", FIXED).await;
    // By chance it owes an answer just then, and is not asked at all.
    assert!([409, 502].contains(&answer.status), "{}", answer.body);
}

#[tokio::test]
async fn what_somebody_asked_for_who_has_gone_is_not_done() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let web = FakeVm::start(path, "web", LIMITS, Bytes::mib(300));
    let mute = FakeVm::start(path, "mute", LIMITS, Bytes::mib(300));
    let config = Config {
        directory: Some(path.to_owned()),
        budget: Some(Bytes::gib(1)),
        interval: Duration::from_secs(2),
        ..Config::default()
    };
    let _daemon = tokio::spawn(async move { daemon::run(config, std::future::pending()).await.unwrap() });
    let rounds = || async { client(path).state().await.map_or(0, |state| state.rounds) };
    until("it decides", || async { rounds().await > 0 }).await;
    mute.state().manner = Manner::Silent;
    let asked = web.state().requests;
    until("a round has begun", || async { web.state().requests > asked }).await;
    let before = rounds().await;
    // The round waits for the mute one, and this for the round.
    let mut stream = UnixStream::connect(daemon::socket_in(path)).await.unwrap();
    let length = FIXED.len();
    let request =
        format!("PUT /v1/vms/web/limits HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n{FIXED}");
    stream.write_all(request.as_bytes()).await.unwrap();
    tokio::time::sleep(Duration::from_millis(200)).await;
    assert_eq!(rounds().await, before, "the round was over before anybody could go");
    drop(stream);
    until("two more rounds are over", || async { rounds().await > before + 1 }).await;
    assert_eq!(web.state().memory.limits, LIMITS.parse().unwrap());
}

const FIXED: &str = r#"{"startup":268435456,"min":134217728,"max":268435456}"#;

fn reservation(name: &str, limits: &str) -> String {
    let limits: Limits = limits.parse().unwrap();
    json!({ "name": name, "limits": limits, "wait_ms": 60_000 }).to_string()
}

fn wanted(name: &str, limits: &str) -> ReservationRequest {
    serde_json::from_str(&reservation(name, limits)).unwrap()
}

#[tokio::test]
async fn room_for_a_new_vm_is_taken_from_others() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let old = FakeVm::start(path, "old", "900M,min=256M,max=1G", Bytes::mib(200));
    let _daemon = start(path);
    let mut client = client(path);
    while client.state().await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let view = client.reserve(&wanted("new", "512M")).await.unwrap();
    assert!(view.granted == view.size && view.size > Bytes::mib(512), "{view:?}");
    assert!(old.state().memory.actual + view.size <= Bytes::gib(1), "the other gave way first");
    let state = client.state().await.unwrap();
    assert_eq!(state.reservations.len(), 1);
    assert!(state.host.charged >= view.size && state.host.over == Bytes::ZERO);
    // Neither grows into it.
    old.state().used = Bytes::mib(900);
    let rounds = state.rounds;
    while client.state().await.unwrap().rounds < rounds + 5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
        assert!(target(&old) + view.size <= Bytes::gib(1));
    }
    // It becomes the VM's own, and what its VMM does not need goes to others.
    let new = FakeVm::start(path, "new", "512M", Bytes::mib(400));
    loop {
        // Read first: by the time of the answer the reservation may have ended.
        let before = target(&old);
        if client.state().await.unwrap().reservations.is_empty() {
            break;
        }
        assert!(before + view.size <= Bytes::gib(1));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(target(&old) + target(&new) <= Bytes::gib(1));
}

/// A VM beside which another fits by its min, and which gives nothing up for now; and a daemon that knows it.
async fn stubborn(path: &Path) -> (FakeVm, JoinHandle<()>) {
    let stubborn = FakeVm::start(path, "stubborn", "900M,min=128M,max=1G", Bytes::mib(100));
    stubborn.state().follows = false;
    let daemon = start(path);
    until("it is known", || async { client(path).state().await.is_ok_and(|state| state.vms.len() == 1) })
        .await;
    (stubborn, daemon)
}

#[tokio::test]
async fn a_client_that_goes_gives_its_room_back() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (_stubborn, _daemon) = stubborn(path).await;
    let waiting = {
        let path = path.to_owned();
        tokio::spawn(async move { client(&path).reserve(&wanted("new", "512M")).await.map(drop) })
    };
    let reserved = || async { client(path).state().await.unwrap().reservations.len() };
    until("it waits", || async { reserved().await == 1 }).await;
    waiting.abort();
    until("nobody waits", || async { reserved().await == 0 }).await;
    let brief = ReservationRequest { wait_ms: Some(200), ..wanted("new", "512M") };
    let error = client(path).reserve(&brief).await.unwrap_err().to_string();
    assert!(error.contains("not room enough"), "{error}");
}

#[tokio::test]
async fn what_was_reserved_is_known_to_the_next_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let old = FakeVm::start(path, "old", "700M,min=128M,max=1G", Bytes::mib(100));
    let daemon = start(path);
    until("it is known", || async { client(path).state().await.is_ok_and(|state| state.vms.len() == 1) })
        .await;
    let view = client(path).reserve(&wanted("new", "512M")).await.unwrap();
    kill(daemon).await;
    // It wants all there is, at the first round of a daemon that was told of no reservation.
    old.state().used = Bytes::mib(1000);
    let daemon = start(path);
    until("some rounds are over", || async {
        assert!(target(&old) + view.size <= Bytes::gib(1), "{}", target(&old));
        client(path).state().await.is_ok_and(|state| state.rounds > 5)
    })
    .await;
    let state = client(path).state().await.unwrap();
    assert_eq!((state.reservations[0].name.as_str(), state.reservations[0].granted), ("new", view.size));
    assert!(state.reservations[0].expires_in_ms <= view.expires_in_ms);
    // Given back, it is forgotten by all that follow.
    client(path).release("new").await.unwrap();
    kill(daemon).await;
    let _daemon = start(path);
    until("the old one grows into it", || async { target(&old) + view.size > Bytes::gib(1) }).await;
}

#[tokio::test]
async fn whoever_waits_for_room_asks_the_next_daemon() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (stubborn, daemon) = stubborn(path).await;
    let waiting = {
        let path = path.to_owned();
        tokio::spawn(async move { client(&path).reserve(&wanted("new", "512M")).await })
    };
    let waits = || async { client(path).state().await.is_ok_and(|state| state.reservations.len() == 1) };
    until("it waits", waits).await;
    kill(daemon).await;
    stubborn.state().follows = true;
    let _daemon = start(path);
    let view = tokio::time::timeout(PATIENCE, waiting).await.expect("it is answered").unwrap().unwrap();
    assert_eq!(view.granted, view.size);
}

/// As when a host with many VMs has booted.
/// No daemon could ever listen there: a path of a socket has 107 bytes at most.
#[tokio::test]
async fn where_nobody_can_be_asked_nobody_is_asked_again() {
    let directory = tempfile::tempdir().unwrap();
    let length = 96 - directory.path().as_os_str().len();
    let long = directory.path().join("d".repeat(length - 1));
    let begun = tokio::time::Instant::now();
    let error = client(&long).reserve(&wanted("new", "512M")).await.unwrap_err();
    assert!(matches!(error, Error::Failed(_)), "{error}");
    assert!(error.to_string().contains("this process could not ask it"), "{error}");
    assert!(begun.elapsed() < Duration::from_secs(4), "it asked again for {:?}", begun.elapsed());
}

#[tokio::test]
async fn however_many_wait_for_room_others_are_answered() {
    const WAITING: usize = 200;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let old: Vec<_> = (0..32)
        .map(|n| FakeVm::start(path, &format!("old-{n}"), "1G,min=128M,max=1G", Bytes::mib(100)))
        .collect();
    old.iter().for_each(|vm| vm.state().follows = false);
    // Its rounds are a minute apart, but for those that somebody asks for.
    let config = Config {
        directory: Some(path.to_owned()),
        budget: Some(Bytes::gib(32)),
        interval: Duration::from_secs(60),
        ..Config::default()
    };
    let _daemon = tokio::spawn(async move { daemon::run(config, std::future::pending()).await.unwrap() });
    until("they are known", || async {
        client(path).state().await.is_ok_and(|state| state.vms.len() == old.len())
    })
    .await;
    let waiting: Vec<_> = (0..WAITING)
        .map(|n| {
            let path = path.to_owned();
            let wanted = ReservationRequest { wait_ms: Some(300_000), ..wanted(&format!("new-{n}"), "64M") };
            tokio::spawn(async move { client(&path).reserve(&wanted).await.map(drop) })
        })
        .collect();
    until("all wait", || async { client(path).state().await.unwrap().reservations.len() == WAITING }).await;
    waiting.iter().for_each(tokio::task::JoinHandle::abort);

    // Nor does anybody wait for the next round to hear that there is no room.
    let brief = ReservationRequest { wait_ms: Some(200), ..wanted("brief", "64M") };
    let error = tokio::time::timeout(PATIENCE / 2, client(path).reserve(&brief)).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("not room enough"), "{error}");
}

#[tokio::test]
async fn two_that_want_room_under_one_name_do_not_undo_each_other() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let (stubborn, _daemon) = stubborn(path).await;
    let ask = |limits: &'static str| {
        let path = path.to_owned();
        tokio::spawn(async move { client(&path).reserve(&wanted("new", limits)).await })
    };
    let held = || async { client(path).state().await.unwrap().reservations.first().map(|held| held.size) };
    let first = ask("512M");
    until("the first waits", || async { held().await == Some(wanted("new", "512M").size()) }).await;
    let second = ask("500M");
    let api_error = tokio::time::timeout(PATIENCE, first).await.expect("it is told").unwrap().unwrap_err();
    assert!(matches!(api_error, Error::Refused(_)), "it is final: {api_error}");
    assert!(api_error.to_string().contains("took the place"), "{api_error}");
    until("the second waits", || async { held().await == Some(wanted("new", "500M").size()) }).await;
    stubborn.state().follows = true;
    let view = tokio::time::timeout(PATIENCE, second).await.expect("it is answered").unwrap().unwrap();
    assert_eq!(view.size, wanted("new", "500M").size());
}

#[tokio::test]
async fn what_a_vm_touches_before_it_has_a_socket_is_not_counted_twice() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path();
    let old = FakeVm::start(path, "old", "1G,min=1G,max=1G", Bytes::mib(200));
    old.state().memory.host_rss = Some(Bytes::gib(1));
    let meminfo = path.join("meminfo");
    let available = |free: Bytes| {
        let text = format!("MemTotal: {} kB\nMemAvailable: {} kB\n", 4 << 20, free.0 >> 10);
        std::fs::write(path.join("meminfo.new"), text).unwrap();
        std::fs::rename(path.join("meminfo.new"), &meminfo).unwrap();
    };
    available(Bytes::gib(1));
    let mut config = Config {
        directory: Some(path.to_owned()),
        host_reserve: Bytes::mib(512),
        interval: Duration::from_millis(50),
        ..Config::default()
    };
    config.sources.meminfo.clone_from(&meminfo);
    // What this process holds is not what the old one says: nobody is to know.
    config.sources.processes = path.join("nowhere");
    let _daemon = tokio::spawn(async move { daemon::run(config, std::future::pending()).await.unwrap() });
    until("it is known", || async { client(path).state().await.is_ok_and(|state| state.vms.len() == 1) })
        .await;
    let state = || async { client(path).state().await.unwrap() };
    let budget = state().await.host.budget;
    assert_eq!(budget, Bytes::mib(1536));
    // This very process is the VM that is about to start.
    let wanted = ReservationRequest { process: Process::own(), ..wanted("new", "400M") };
    client(path).reserve(&wanted).await.unwrap();
    let touched = vec![1_u8; 300 << 20];
    available(Bytes::gib(1) - Bytes(touched.len() as u64));
    let rounds = state().await.rounds;
    until("it was looked at", || async { state().await.rounds > rounds + 2 }).await;
    let host = state().await.host;
    assert_eq!((host.budget, host.over), (budget, Bytes::ZERO), "{host:?}");
    // What others take is not there for VMs.
    available(Bytes::gib(1) - Bytes(touched.len() as u64) - Bytes::mib(200));
    until("that is seen", || async { state().await.host.budget < budget - Bytes::mib(136) }).await;
    assert!(state().await.host.budget < budget - Bytes::mib(136));
    drop(touched);
}

/// Ends a daemon as SIGKILL does: nothing of it runs any more.
async fn kill(daemon: JoinHandle<()>) {
    daemon.abort();
    let _ = daemon.await;
}

fn target(vm: &FakeVm) -> Bytes {
    vm.state().memory.target
}

#[tokio::test]
async fn what_is_not_served_gets_a_sentence() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = start(directory.path());
    until("it serves", || async { client(directory.path()).state().await.is_ok() }).await;
    let error = document()["components"]["schemas"]["Problem"].clone();
    for (method, path, status) in [
        ("GET", "/", 404),
        ("POST", "/state", 405),
        ("GET", "/vms/web", 404),
        ("GET", "/vms/web/limits", 405),
    ] {
        let answer = ask(directory.path(), method, path, "").await;
        assert_eq!(answer.status, status, "{method} {path}");
        check(&document(), &error, &serde_json::from_str(&answer.body).unwrap());
    }
    let answer = ask(directory.path(), "PUT", "/vms/web/limits", &"x".repeat(70_000)).await;
    assert_eq!(answer.status, 413, "a large body is not read");
    check(&document(), &error, &serde_json::from_str(&answer.body).unwrap());
}

#[tokio::test]
async fn paths_without_a_version_are_answered_as_before_and_say_that_they_end() {
    let directory = tempfile::tempdir().unwrap();
    let _daemon = start(directory.path());
    until("it serves", || async { client(directory.path()).state().await.is_ok() }).await;
    for (path, status) in [("/state", 200), ("/vms/nobody/why", 404)] {
        let now = ask(directory.path(), "GET", path, "").await;
        let before = ask_at(directory.path(), "GET", path, "").await;
        assert_eq!((now.status, before.status), (status, status), "{path}");
        assert!(!now.head.contains("deprecation: "), "{}", now.head);
        let link = format!("link: </v1{path}>; rel=\"successor-version\"");
        for header in ["deprecation: @1796083200", "sunset: Tue, 01 Jun 2027 00:00:00 GMT", &link] {
            assert!(before.head.contains(header), "{header} is not in {}", before.head);
        }
        assert_eq!(before.content_type.as_deref(), Some("application/json"));
        if status == 404 {
            let error: Value = serde_json::from_str(&before.body).unwrap();
            let problem: Value = serde_json::from_str(&now.body).unwrap();
            assert_eq!(error, json!({ "error": problem["detail"] }));
        }
    }
}

#[tokio::test]
async fn the_client_says_why_it_got_no_answer() {
    let directory = tempfile::tempdir().unwrap();
    let mut client = client(directory.path());
    let error = client.state().await.unwrap_err();
    assert!(matches!(error, Error::NotRunning { .. }), "{error}");
    let web = FakeVm::start(directory.path(), "web", LIMITS, Bytes::mib(300));
    let _daemon = start(directory.path());
    while !client.why("web").await.is_ok_and(|why| why.memory.is_some()) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let error = client.why("nobody").await.unwrap_err();
    assert!(matches!(error, Error::Refused(_)), "{error}");
    client.set_limits("web", "512M,min=256M,max=512M".parse().unwrap()).await.unwrap();
    assert_eq!(web.state().memory.limits.min(), Bytes::mib(256));
}
