//! The daemon's metrics, and the dashboard that shows them.

mod fakes;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::time::Duration;

use api::units::Bytes;
use balancer::daemon::{self, Config};
use fakes::FakeVm;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::UnixStream;

/// Every wait is for an event; this is only when to give up.
const PATIENCE: Duration = Duration::from_secs(60);

async fn page(directory: &Path) -> Option<String> {
    let mut stream = UnixStream::connect(daemon::socket_in(directory)).await.ok()?;
    stream.write_all(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n").await.ok()?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.ok()?;
    Some(answer.split_once("\r\n\r\n")?.1.to_owned())
}

/// The metrics of a daemon that has granted memory and taken some.
async fn busy_page() -> String {
    let directory = tempfile::tempdir().unwrap();
    let limits = "256M,min=128M,max=1G";
    let web = FakeVm::start(directory.path(), "web", limits, Bytes::mib(100));
    let _db = FakeVm::start(directory.path(), "db", limits, Bytes::mib(100));
    let pressure = directory.path().join("pressure");
    std::fs::write(&pressure, "some avg10=1.50 avg60=0.00 avg300=0.00 total=1\n").unwrap();
    let mut config = Config {
        directory: Some(directory.path().to_owned()),
        budget: Some(Bytes::mib(1024)),
        interval: Duration::from_millis(100),
        ..Config::default()
    };
    config.sources.pressure = pressure;
    tokio::spawn(daemon::run(config, std::future::pending()));
    let waited = tokio::time::timeout(PATIENCE, async {
        loop {
            tokio::time::sleep(Duration::from_millis(20)).await;
            let Some(page) = page(directory.path()).await else { continue };
            if page.contains("vm_used_bytes{vm=\"web\"}") {
                web.state().used = Bytes::mib(500);
            }
            if page.contains("time_to_grant_seconds_count 1\n") {
                return page;
            }
        }
    });
    waited.await.expect("a grant within its time")
}

fn dashboard() -> Value {
    serde_json::from_str(include_str!("../../resources/grafana/balancer.json")).unwrap()
}

/// The queries of all panels.
fn queries(dashboard: &Value) -> Vec<&str> {
    let panels = dashboard["panels"].as_array().unwrap().iter();
    let targets = panels.flat_map(|panel| panel["targets"].as_array().unwrap());
    targets.map(|target| target["expr"].as_str().unwrap()).collect()
}

/// The metrics that an expression asks for.
fn asked_for(expression: &str) -> impl Iterator<Item = &str> {
    let words = expression.split(|c: char| !(c.is_ascii_alphanumeric() || "_:".contains(c)));
    words.filter(|word| word.starts_with("ballast_"))
}

/// The names of what Prometheus stores: samples, with the endings of their kinds.
fn names(page: &str) -> BTreeSet<String> {
    let samples = page.lines().filter(|line| !line.starts_with('#'));
    samples.filter_map(|line| line.split(['{', ' ']).next()).map(str::to_owned).collect()
}

#[tokio::test]
async fn every_query_of_the_dashboard_names_a_metric_that_there_is() {
    let page = busy_page().await;
    let names = names(&page);
    let dashboard = dashboard();
    let mut asked = BTreeSet::new();
    for expression in queries(&dashboard) {
        for name in asked_for(expression) {
            assert!(names.contains(name), "{name} is not in\n{page}");
            asked.insert(name.to_owned());
        }
        assert!(asked_for(expression).next().is_some(), "{expression} asks for nothing");
    }
    // And the other way: what is measured is shown. A histogram is shown by its buckets.
    for name in names.iter().filter(|name| !name.ends_with("_sum") && !name.ends_with("_count")) {
        assert!(asked.contains(name), "no panel shows {name}");
    }
}

#[tokio::test]
async fn prometheus_itself_has_no_remark() {
    let page = busy_page().await;
    lab::promtool::check_metrics(&page).unwrap();
}

/// A file of `resources/prometheus`.
fn of_prometheus(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../resources/prometheus").join(name)
}

#[test]
fn every_query_of_the_dashboard_is_understood_by_prometheus() {
    let directory = tempfile::tempdir().unwrap();
    let rules: Vec<Value> = queries(&dashboard())
        .iter()
        // What Grafana fills in.
        .map(|query| query.replace("$__rate_interval", "1m").replace("$vm", "web"))
        .enumerate()
        .map(|(number, query)| json!({ "record": format!("query:{number}"), "expr": query }))
        .collect();
    // JSON is YAML.
    let file = directory.path().join("queries.yml");
    std::fs::write(&file, json!({ "groups": [{ "name": "dashboard", "rules": rules }] }).to_string())
        .unwrap();
    lab::promtool::check_rules(&[&file]).unwrap();
}

#[test]
fn alerts_fire_when_they_should_and_not_before() {
    lab::promtool::check_rules(&[&of_prometheus("alerts.yml"), &of_prometheus("recording.yml")]).unwrap();
    lab::promtool::test_rules(&[&of_prometheus("tests/rules.yml")]).unwrap();
    let tests = std::fs::read_to_string(of_prometheus("tests/rules.yml")).unwrap();
    for file in ["alerts.yml", "recording.yml"] {
        let rules = std::fs::read_to_string(of_prometheus(file)).unwrap();
        let named = rules.lines().filter_map(|line| line.trim().strip_prefix("- "));
        let named = named.filter_map(|line| line.strip_prefix("alert: ").or(line.strip_prefix("record: ")));
        for name in named {
            assert!(tests.contains(name), "{name} has no test");
        }
    }
}

#[tokio::test]
async fn every_rule_asks_for_metrics_that_there_are() {
    let page = busy_page().await;
    let names = names(&page);
    for file in ["alerts.yml", "recording.yml"] {
        let rules = std::fs::read_to_string(of_prometheus(file)).unwrap();
        let expressions = rules.lines().filter_map(|line| line.trim().strip_prefix("expr: "));
        let asked: Vec<&str> = expressions.flat_map(asked_for).collect();
        assert!(!asked.is_empty());
        for name in asked {
            assert!(names.contains(name), "{name} of {file} is not in\n{page}");
        }
    }
}
