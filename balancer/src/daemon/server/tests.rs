//! That the document has the routes that are served; `balancer/tests/api.rs` holds the answers against it.

use std::collections::BTreeSet;

use axum::routing::MethodFilter;
use serde_json::Value;

use super::ROUTES;

#[test]
fn what_is_described_is_served_and_the_other_way_round() {
    let document: Value =
        serde_saphyr::from_str(include_str!("../../../../resources/balancer-openapi.yaml")).unwrap();
    let methods = ["get", "put", "post", "delete", "patch", "head", "options", "trace"];
    let mut described = BTreeSet::new();
    for (path, item) in document["paths"].as_object().unwrap() {
        for method in item.as_object().unwrap().keys().filter(|key| methods.contains(&key.as_str())) {
            described.insert((method.clone(), path.clone()));
        }
    }
    let served: BTreeSet<_> =
        ROUTES.iter().map(|route| (name(route.method), route.path.to_owned())).collect();
    assert_eq!(served, described);
    assert_eq!(document["info"]["version"], env!("CARGO_PKG_VERSION"));
}

fn name(method: MethodFilter) -> String {
    let names = [
        (MethodFilter::GET, "get"),
        (MethodFilter::PUT, "put"),
        (MethodFilter::POST, "post"),
        (MethodFilter::DELETE, "delete"),
    ];
    names.iter().find(|(known, _)| *known == method).unwrap().1.to_owned()
}
