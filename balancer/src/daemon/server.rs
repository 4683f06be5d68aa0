//! The daemon's own socket; `resources/balancer-openapi.yaml` says the same to the world.

use std::path::Path;
use std::time::Duration;

use api::limits::Limits;
use api::problem::{self, Problem};
use api::{runtime, version};
use axum::Extension;
use axum::Json;
use axum::Router;
use axum::body::{Bytes, to_bytes};
use axum::extract::{
    DefaultBodyLimit, FromRequest, FromRequestParts, Path as InPath, Request, State as Given,
};
use axum::http::header::CONTENT_TYPE;
use axum::http::request::Parts;
use axum::http::{HeaderValue, Method, StatusCode, Uri};
use axum::middleware::{Next, from_fn};
use axum::response::{IntoResponse, Response};
use axum::routing::{MethodFilter, MethodRouter, get, on};
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;

use super::api_error::ApiError;
use super::command::Command;
use super::listen::ClientPermit;
use super::metrics;
use super::reservation::ReservationRequest;
use super::shared::Shared;

/// The largest body that is read; the largest that makes sense has some hundred bytes.
const LARGEST_BODY: usize = 64 << 10;

/// How long a body may take to come; one write of a client's is all of it.
const LONGEST_BODY: Duration = Duration::from_secs(10);

/// What the handlers have: the last state, and the way to the rounds.
#[derive(Clone)]
pub struct Api {
    /// What can be read at any time.
    pub shared: Shared,
    /// What is to be done.
    pub commands: mpsc::Sender<Command>,
}

/// One thing that the socket does.
pub struct Route {
    /// The method it takes.
    pub method: MethodFilter,
    /// Its path, with names in braces.
    pub path: &'static str,
    handler: fn(MethodFilter) -> MethodRouter<Api>,
}

/// Everything that the socket does.
pub const ROUTES: [Route; 7] = [
    Route { method: MethodFilter::GET, path: "/state", handler: |method| on(method, state) },
    Route { method: MethodFilter::GET, path: "/decisions", handler: |method| on(method, decisions) },
    Route { method: MethodFilter::GET, path: "/vms/{name}/why", handler: |method| on(method, why) },
    Route { method: MethodFilter::PUT, path: "/vms/{name}/limits", handler: |method| on(method, set_limits) },
    Route { method: MethodFilter::POST, path: "/reservations", handler: |method| on(method, reserve) },
    Route {
        method: MethodFilter::DELETE,
        path: "/reservations/{name}",
        handler: |method| on(method, release),
    },
    Route { method: MethodFilter::GET, path: "/metrics", handler: |method| on(method, metrics) },
];

/// What is served to the daemon's user.
pub fn private(api: Api) -> Router {
    let under = |prefix: &str| {
        ROUTES.iter().fold(Router::new(), |router, route| {
            router.route(&format!("{prefix}{}", route.path), (route.handler)(route.method))
        })
    };
    finish(under(version::PREFIX).merge(under("").layer(from_fn(unversioned))), api)
}

/// Answers a path without a version as the release before did, and says until when.
async fn unversioned(request: Request, next: Next) -> Response {
    let announcement = version::announcement(request.uri().path());
    let mut response = next.run(request).await;
    if response.headers().get(CONTENT_TYPE).is_some_and(|kind| kind == problem::CONTENT_TYPE) {
        let status = response.status();
        let (_, body) = response.into_parts();
        let body = to_bytes(body, LARGEST_BODY).await.unwrap_or_default();
        let error = serde_json::from_slice(&body).map(|problem: Problem| problem.to_unversioned_json());
        let json = [(CONTENT_TYPE, "application/json")];
        response = (status, json, error.unwrap_or_default()).into_response();
    }
    for (name, value) in announcement {
        // A path has no byte that a header does not take.
        if let Ok(value) = HeaderValue::try_from(value) {
            response.headers_mut().insert(name, value);
        }
    }
    response
}

/// What is served over TCP, to anyone who can connect.
pub fn public(api: Api) -> Router {
    finish(Router::new().route("/metrics", get(metrics)), api)
}

fn finish(router: Router<Api>, api: Api) -> Router {
    router
        .fallback(
            |uri: Uri| async move { refuse(StatusCode::NOT_FOUND, format!("there is no {}", uri.path())) },
        )
        .method_not_allowed_fallback(|method: Method, uri: Uri| async move {
            refuse(StatusCode::METHOD_NOT_ALLOWED, format!("{} does not take {method}", uri.path()))
        })
        .layer(DefaultBodyLimit::max(LARGEST_BODY))
        .with_state(api)
}

/// Every answer that is not what was asked for.
fn refuse(status: StatusCode, error: impl ToString) -> Response {
    let title = status.canonical_reason().unwrap_or_default();
    let problem = Problem::new(status.as_u16(), title, error.to_string());
    (status, [(CONTENT_TYPE, problem::CONTENT_TYPE)], problem.to_json()).into_response()
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let status = match &self {
            Self::NoSuchVm(_) | Self::NoReservation(_) => StatusCode::NOT_FOUND,
            // A VM's "no" is the client's mistake or a conflict; whatever else it says is its own trouble.
            Self::OfVm { status, .. } if status == "400" => StatusCode::BAD_REQUEST,
            Self::Name(_) => StatusCode::BAD_REQUEST,
            Self::OfVm { .. }
            | Self::Busy(_)
            | Self::NoRoom { .. }
            | Self::NoRoomForVmm { .. }
            | Self::RunsAlready(_)
            | Self::Replaced(_) => StatusCode::CONFLICT,
            Self::Body { status, .. } => StatusCode::from_u16(*status).unwrap_or(StatusCode::BAD_REQUEST),
            Self::NoAnswer(_) => StatusCode::BAD_GATEWAY,
            Self::NotInTime { .. } | Self::TooManyReservations | Self::Stopping => {
                StatusCode::SERVICE_UNAVAILABLE
            }
        };
        refuse(status, self)
    }
}

async fn state(Given(api): Given<Api>) -> Response {
    Json(&*api.shared.get()).into_response()
}

async fn decisions(Given(api): Given<Api>) -> Response {
    let decisions = api.shared.history().decisions();
    Json(decisions).into_response()
}

async fn why(Given(api): Given<Api>, Named(name): Named) -> Response {
    let state = api.shared.get();
    match state.vms.iter().find(|vm| vm.name == name) {
        Some(vm) => {
            let why = api.shared.history().why(vm);
            Json(why).into_response()
        }
        None => ApiError::NoSuchVm(name).into_response(),
    }
}

async fn set_limits(Given(api): Given<Api>, Named(vm): Named, body: Body) -> Result<StatusCode, ApiError> {
    let limits: Limits = read(body)?;
    ask(&api, |answer| Command::SetLimits { vm, limits, answer }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn reserve(
    Given(api): Given<Api>,
    Extension(permit): Extension<ClientPermit>,
    body: Body,
) -> Result<Response, ApiError> {
    let request: ReservationRequest = read(body)?;
    // The path of its socket is made of it.
    runtime::socket_in(Path::new(""), &request.name)
        .map_err(|error| ApiError::Body { status: 400, error: error.to_string() })?;
    // However many VMs start at once, others are told how things stand.
    if !permit.wait() {
        return Err(ApiError::TooManyReservations);
    }
    let view = ask(&api, |answer| Command::Reserve { request, answer }).await?;
    Ok((StatusCode::CREATED, Json(view)).into_response())
}

async fn release(Given(api): Given<Api>, Named(name): Named) -> Result<StatusCode, ApiError> {
    ask(&api, |answer| Command::Release { name, answer }).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn metrics(Given(api): Given<Api>) -> Response {
    ([(CONTENT_TYPE, api::metrics::CONTENT_TYPE)], metrics::page(&api.shared)).into_response()
}

/// The name in a path.
struct Named(String);

impl<S: Send + Sync> FromRequestParts<S> for Named {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let name: String = InPath::from_request_parts(parts, state)
            .await
            .map(|InPath(name)| name)
            .map_err(|rejection| ApiError::Name(rejection.body_text()))?;
        runtime::check_name(&name).map_err(|error| ApiError::Name(error.to_string()))?;
        Ok(Self(name))
    }
}

/// A body that came whole and in time.
struct Body(Bytes);

impl<S: Send + Sync> FromRequest<S> for Body {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &S) -> Result<Self, ApiError> {
        match timeout(LONGEST_BODY, Bytes::from_request(request, state)).await {
            Ok(Ok(bytes)) => Ok(Self(bytes)),
            Ok(Err(rejection)) => {
                Err(ApiError::Body { status: rejection.status().as_u16(), error: rejection.body_text() })
            }
            Err(_) => {
                let error = format!("it did not come within {} s", LONGEST_BODY.as_secs());
                Err(ApiError::Body { status: StatusCode::REQUEST_TIMEOUT.as_u16(), error })
            }
        }
    }
}

fn read<T: DeserializeOwned>(Body(body): Body) -> Result<T, ApiError> {
    serde_json::from_slice(&body).map_err(|error| ApiError::Body { status: 400, error: error.to_string() })
}

/// Hands a command to the rounds and waits for its end.
async fn ask<T>(
    api: &Api,
    command: impl FnOnce(oneshot::Sender<Result<T, ApiError>>) -> Command,
) -> Result<T, ApiError> {
    let (answer, answered) = oneshot::channel();
    api.commands.send(command(answer)).await.map_err(|_| ApiError::Stopping)?;
    answered.await.unwrap_or(Err(ApiError::Stopping))
}

#[cfg(test)]
mod tests;
