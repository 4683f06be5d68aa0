//! The daemon's own socket: `GET /state` as JSON, `GET /metrics` for Prometheus.

use axum::Json;
use axum::Router;
use axum::extract::State as Given;
use axum::http::header::CONTENT_TYPE;
use axum::response::{IntoResponse, Response};
use axum::routing::get;

use super::metrics;
use super::state::Shared;

/// What is served to the daemon's user.
pub fn private(shared: Shared) -> Router {
    Router::new().route("/state", get(state)).route("/metrics", get(metrics)).with_state(shared)
}

/// What is served over TCP, to anyone who can connect.
pub fn public(shared: Shared) -> Router {
    Router::new().route("/metrics", get(metrics)).with_state(shared)
}

async fn state(Given(shared): Given<Shared>) -> Response {
    Json(&*shared.get()).into_response()
}

async fn metrics(Given(shared): Given<Shared>) -> Response {
    match metrics::page(shared) {
        Ok(page) => ([(CONTENT_TYPE, metrics::OPENMETRICS)], page).into_response(),
        Err(error) => (axum::http::StatusCode::INTERNAL_SERVER_ERROR, error.to_string()).into_response(),
    }
}
