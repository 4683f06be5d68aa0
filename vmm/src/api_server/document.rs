//! Holds `resources/openapi.yaml` against the server, both ways: what is
//! described is served, and what is served is described.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use api::agent::{AgentFigures, AgentStatus, EventKind, MemoryEvent, Version};
use api::limits::Limits;
use api::report::Report;
use api::status::{
    AgedReport, BalloonCounters, ConsoleStatus, CushionStatus, DiskCount, DiskStatus, DriverState,
    MemoryStatus, NetCount, NetStatus, OomDeflate, PauseRequest, Pauser, PlugCounters, PlugStatus,
    ShareStatus, VmState, VmStatus,
};
use api::units::Bytes;
use serde_json::{Value, json};

use super::fresh::{Fresh, LONGEST_WAIT, USUAL_WAIT};
use super::http::{Answer, Request, Response};
use super::routes::{ROUTES, route};
use crate::control::Control;
use crate::inspect::{MappedRegion, MemoryMap, TranslateRequest, Translation};

/// The control of a VM that is not started; it needs no KVM.
pub fn control() -> Arc<Control> {
    let limits: Limits = "256M,min=128M,max=1G".parse().unwrap();
    Arc::new(Control::new("test".parse().unwrap(), "2".parse().unwrap(), limits))
}

fn document() -> Value {
    serde_saphyr::from_str(include_str!("../../../resources/openapi.yaml")).unwrap()
}

/// A schema of the document, with everything that it refers to.
fn check(document: &Value, schema: &Value, instance: &Value) {
    let mut whole = schema.clone();
    whole["$schema"] = json!("https://json-schema.org/draft/2020-12/schema");
    whole["components"] = document["components"].clone();
    let validator = jsonschema::validator_for(&whole).unwrap();
    let errors: Vec<String> =
        validator.iter_errors(instance).map(|error| format!("{}: {error}", error.instance_path())).collect();
    assert!(errors.is_empty(), "{errors:#?}\nin {instance:#}");
}

fn named<'a>(document: &'a Value, schema: &str) -> &'a Value {
    let schema = &document["components"]["schemas"][schema];
    assert!(schema.is_object());
    schema
}

/// The response that the document describes for a status, references followed.
fn described<'a>(document: &'a Value, method: &str, path: &str, status: u16) -> &'a Value {
    let responses = &document["paths"][path][method.to_lowercase()]["responses"];
    let response = &responses[status.to_string()];
    assert!(response.is_object(), "{method} {path} answered {status}, which the document does not know");
    match response["$ref"].as_str() {
        Some(reference) => document.pointer(reference.strip_prefix('#').unwrap()).unwrap(),
        None => response,
    }
}

/// The answer of a VM that is not started, for which nobody has to wait.
fn at_once(control: &Arc<Control>, method: &str, target: &str, body: &str) -> Response {
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let path = &format!("{}{path}", api::version::PREFIX);
    let request = Request { method, path, query, body: body.as_bytes(), upgrade: "", if_match: None };
    match route(request, control) {
        Answer::Now(response) => response,
        Answer::Later(limit, _) => panic!("{method} {target} may take {limit:?}"),
        Answer::HandOver(_) => panic!("{method} {target} goes on in another protocol"),
    }
}

/// Asks the server, and holds its answer against the document.
fn ask(document: &Value, control: &Arc<Control>, method: &str, target: &str, body: &str) -> Response {
    let answer = at_once(control, method, target, body);
    let path = target.split_once('?').map_or(target, |(path, _)| path);
    let response = described(document, method, path, answer.status.as_u16());
    match answer.content_type {
        None => assert!(response["content"].is_null(), "{method} {path} has no body"),
        Some(content_type) => {
            let schema = &response["content"][content_type]["schema"];
            assert!(schema.is_object(), "{method} {path} answered {content_type}");
            let text = str::from_utf8(&answer.body).unwrap();
            let instance = serde_json::from_str(text).unwrap_or_else(|_| json!(text));
            check(document, schema, &instance);
        }
    }
    answer
}

#[test]
fn what_is_described_is_served_and_the_other_way_round() {
    let document = document();
    let methods = ["get", "put", "post", "delete", "patch", "head", "options", "trace"];
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|key| methods.contains(&key.as_str())) {
            described.insert((method.to_uppercase(), path.clone()));
        }
    }
    let served: BTreeSet<(String, String)> =
        ROUTES.iter().map(|route| (route.method.to_owned(), route.path.to_owned())).collect();
    assert_eq!(served, described);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

#[test]
fn every_answer_is_as_described() {
    let document = document();
    let control = control();
    let mut statuses = BTreeSet::new();
    for served in &ROUTES {
        for body in ["", "{}", r#"{"target":268435456}"#, r#"{"target":1}"#, r#"{"address":4096}"#] {
            statuses.insert(ask(&document, &control, served.method, served.path, body).status.as_u16());
        }
    }
    let limits = r#"{"startup":134217728,"min":134217728,"max":268435456,"buffer_percent":5,"weight":1}"#;
    statuses.insert(ask(&document, &control, "PUT", "/memory/limits", limits).status.as_u16());
    assert_eq!(statuses, BTreeSet::from([200, 204, 400, 409, 426]));
}

#[test]
fn what_may_be_asked_of_a_reports_age_is_as_described() {
    let document = document();
    let parameters = document["paths"]["/memory"]["get"]["parameters"].as_array().unwrap();
    let ms = |duration: Duration| json!(u64::try_from(duration.as_millis()).unwrap());
    let mut names = BTreeSet::new();
    for parameter in parameters {
        let (name, schema) = (parameter["name"].as_str().unwrap(), &parameter["schema"]);
        assert!(Fresh::parse(&format!("{name}=1")).is_ok(), "{name}");
        if name == "wait_ms" {
            assert_eq!((&schema["default"], &schema["maximum"]), (&ms(USUAL_WAIT), &ms(LONGEST_WAIT)));
        }
        names.insert(name);
    }
    assert_eq!(names, BTreeSet::from(["max_age_ms", "wait_ms"]));
    for (query, status) in [
        ("", 200),
        ("max_age_ms=0", 200),
        ("max_age_ms=20&wait_ms=1000", 200),
        ("wait_ms=1001", 400),
        ("max_age_ms=soon", 400),
        ("x=1", 400),
    ] {
        let answer = ask(&document, &control(), "GET", &format!("/memory?{query}"), "");
        assert_eq!(answer.status.as_u16(), status, "{query}");
    }
}

#[test]
fn paths_and_methods_that_are_not_served_get_the_error_that_is_described() {
    let document = document();
    for (method, path) in [("GET", "/"), ("POST", "/vm"), ("POST", "/memory/target"), ("get", "/vm")] {
        let answer = at_once(&control(), method, path, "");
        assert!([404, 405].contains(&answer.status.as_u16()), "{method} {path}");
        check(&document, named(&document, "Problem"), &serde_json::from_slice(&answer.body).unwrap());
    }
}

/// An agent that has said all it can.
fn agent() -> AgentStatus {
    let figures = serde_json::to_value(AgentFigures::default()).unwrap();
    let full: serde_json::Map<_, _> =
        figures.as_object().unwrap().keys().map(|name| (name.clone(), json!(u64::MAX))).collect();
    AgentStatus {
        connected: true,
        version: Some(Version::OWN),
        age_ms: u64::MAX,
        distress_age_ms: Some(u64::MAX),
        figures: serde_json::from_value(Value::Object(full)).unwrap(),
        had: Some(Bytes(u64::MAX)),
        managed: Some(Bytes(u64::MAX)),
        heard: u64::MAX,
        dropped: u64::MAX,
        malformed: u64::MAX,
    }
}

#[test]
fn every_line_of_the_events_is_as_described() {
    let document = document();
    for event in [
        EventKind::Subscribed,
        EventKind::Figures,
        EventKind::Distress,
        EventKind::Stalls,
        EventKind::DeflatedOnOom,
        EventKind::AgentGone,
        EventKind::DiskFailed,
    ] {
        for agent in [None, Some(agent())] {
            let line = serde_json::to_value(MemoryEvent { sequence: u64::MAX, event, agent }).unwrap();
            check(&document, named(&document, "MemoryEvent"), &line);
        }
    }
}

/// A disk that has counted all that it can.
pub fn full_disk() -> DiskStatus {
    let count = DiskCount { operations: u64::MAX, bytes: Bytes(u64::MAX) };
    DiskStatus {
        id: "disk0".to_owned(),
        size: Bytes(u64::MAX),
        read_only: true,
        reads: count,
        writes: count,
        cleared: count,
        flushes: u64::MAX,
        errors: u64::MAX,
        limited: u64::MAX,
        limited_ms: u64::MAX,
        failure: Some("No space left on device (os error 28): make room where its file lies".to_owned()),
    }
}

/// A network card of which there is something to say in each place.
pub fn full_net() -> NetStatus {
    let most = u64::MAX;
    let count = NetCount { frames: most, bytes: Bytes(most), dropped: most, limited: most, limited_ms: most };
    NetStatus {
        id: "net0".to_owned(),
        mac: "52:54:00:12:34:56".to_owned(),
        backend: "user".to_owned(),
        address: Some("10.0.2.15".to_owned()),
        forwards: vec!["tcp:127.0.0.1:2222:22".to_owned()],
        up: false,
        received: count,
        sent: count,
    }
}

/// The memory of a VM that has all that one can have, with a driver in this state.
pub fn full_memory(driver: DriverState) -> MemoryStatus {
    let mut statistics = Report::default();
    for tag in 0..20 {
        statistics.set(tag, u64::MAX);
    }
    MemoryStatus {
        limits: Limits::fixed(Bytes::gib(1)).unwrap(),
        target: Bytes::gib(1),
        actual: Bytes(u64::MAX),
        given: Some(Bytes(u64::MAX)),
        most: Some(Bytes(u64::MAX)),
        settled: false,
        followed: Some(true),
        paused_by: Some(Pauser::Balancer),
        host_rss: Some(Bytes::ZERO),
        host_huge: Some(Bytes::ZERO),
        driver,
        report: Some(AgedReport {
            age_ms: u64::MAX,
            had: Some(Bytes(u64::MAX)),
            managed: Some(Bytes(u64::MAX)),
            statistics,
        }),
        agent: Some(agent()),
        counters: BalloonCounters::default(),
        plug: Some(PlugStatus {
            driver,
            lacks_driver_ms: Some(u64::MAX),
            boot: Bytes::mib(256),
            block: Bytes::mib(2),
            requested: Bytes::mib(64),
            plugged: Bytes::mib(66),
            counters: PlugCounters::default(),
        }),
        cushion: Some(CushionStatus { size: Bytes::mib(64), held: Bytes::ZERO }),
        oom_deflate: Some(OomDeflate { taken: Bytes(u64::MAX), had: Bytes(u64::MAX), age_ms: u64::MAX }),
    }
}

#[test]
fn a_full_answer_is_as_described() {
    let document = document();
    for driver in [DriverState::Absent, DriverState::Active, DriverState::Silent, DriverState::Broken] {
        let status = serde_json::to_value(full_memory(driver)).unwrap();
        check(&document, named(&document, "MemoryStatus"), &status);
    }
    let paused = |by| VmState::Paused { by };
    for state in [
        VmState::Created,
        VmState::Running,
        VmState::Sleeping,
        paused(Pauser::Operator),
        paused(Pauser::Balancer),
        paused(Pauser::Disk),
        VmState::Stopped,
    ] {
        let console = Some(ConsoleStatus { written: Bytes(u64::MAX), ..ConsoleStatus::default() });
        let (disks, nets, shares) = (vec![full_disk()], vec![full_net()], vec![ShareStatus::default()]);
        let vm = VmStatus { state, console, disks, nets, shares, ..control().status() };
        check(&document, named(&document, "VmStatus"), &serde_json::to_value(vm).unwrap());
    }
}

#[test]
fn a_pause_names_who_asks_or_nobody() {
    let document = document();
    for by in [Pauser::Operator, Pauser::Balancer] {
        let request = serde_json::to_value(PauseRequest { by }).unwrap();
        check(&document, named(&document, "PauseRequest"), &request);
    }
    let control = control();
    for path in ["/vm/pause", "/vm/resume"] {
        for (body, status) in [
            ("", 409),
            ("{}", 409),
            (r#"{"by":"operator"}"#, 409),
            (r#"{"by":"balancer"}"#, 409),
            (r#"{"by":"me"}"#, 400),
            (r#"{"by":"balancer","force":true}"#, 400),
            ("balancer", 400),
        ] {
            assert_eq!(ask(&document, &control, "POST", path, body).status.as_u16(), status, "{path} {body}");
        }
    }
}

#[test]
fn what_an_onlooker_learns_is_as_described() {
    let document = document();
    let region = MappedRegion { guest: 1 << 32, host: u64::MAX, size: Bytes::gib(1) };
    let map = MemoryMap { regions: vec![region] };
    check(&document, named(&document, "MemoryMap"), &serde_json::to_value(map).unwrap());
    for physical in [None, Some(u64::MAX)] {
        let seen = Translation { cpu: 255, cr0: u64::MAX, cr3: 0, cr4: 0, efer: 0, physical };
        check(&document, named(&document, "Translation"), &serde_json::to_value(seen).unwrap());
    }
    let request = TranslateRequest { cpu: 0, address: u64::MAX };
    check(&document, named(&document, "TranslateRequest"), &serde_json::to_value(request).unwrap());
}

#[test]
fn the_check_itself_finds_what_is_wrong() {
    let document = document();
    let mut whole = named(&document, "TargetRequest").clone();
    whole["components"] = document["components"].clone();
    let validator = jsonschema::validator_for(&whole).unwrap();
    assert!(validator.is_valid(&json!({"target": 4096})));
    for wrong in [json!({}), json!({"target": "1G"}), json!({"target": -1}), json!({"target": 1, "x": 1})] {
        assert!(!validator.is_valid(&wrong), "{wrong}");
    }
}
