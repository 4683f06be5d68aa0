//! What each path and method does: a pure function from a request to a response.

use balloon::limits::Limits;
use balloon::status::{PauseRequest, TargetRequest};
use serde::de::DeserializeOwned;

use super::http::{Request, Response, Status};
use super::metrics;
use crate::control::{Control, ControlError};

/// One thing the API does.
pub struct Route {
    /// The method it takes.
    pub method: &'static str,
    /// Its path, whole.
    pub path: &'static str,
    act: fn(&Control, &[u8]) -> Response,
}

/// Everything the API does; `resources/openapi.yaml` says the same to the world.
pub const ROUTES: [Route; 12] = [
    Route { method: "GET", path: "/vm", act: |control, _| Response::json(&control.status()) },
    Route {
        method: "POST",
        path: "/vm/pause",
        act: |control, body| in_name_of(body, |PauseRequest { by }| control.pause(by)),
    },
    Route {
        method: "POST",
        path: "/vm/resume",
        act: |control, body| in_name_of(body, |PauseRequest { by }| control.resume(by)),
    },
    Route { method: "POST", path: "/vm/power-button", act: |control, _| answer(control.power_button()) },
    Route { method: "POST", path: "/vm/shutdown", act: |control, _| answer(control.shutdown()) },
    Route { method: "GET", path: "/memory", act: |control, _| Response::json(&control.memory()) },
    Route {
        method: "POST",
        path: "/vm/translate",
        act: |control, body| with(body, |asked| control.translate(asked).map(|seen| Response::json(&seen))),
    },
    Route { method: "GET", path: "/memory/map", act: |control, _| Response::json(&control.memory_map()) },
    Route { method: "GET", path: "/memory/events", act: |control, _| events(control) },
    Route {
        method: "PUT",
        path: "/memory/target",
        act: |control, body| put(body, |wanted: TargetRequest| control.set_target(wanted.target)),
    },
    Route {
        method: "PUT",
        path: "/memory/limits",
        act: |control, body| put(body, |limits: Limits| control.set_limits(limits)),
    },
    Route {
        method: "GET",
        path: "/metrics",
        act: |control, _| metrics::response(control.status(), control.memory()),
    },
];

/// Carries out one request.
pub fn route(request: Request<'_>, control: &Control) -> Response {
    let here = || ROUTES.iter().filter(|route| route.path == request.path);
    if let Some(route) = here().find(|route| route.method == request.method) {
        return (route.act)(control, request.body);
    }
    let methods: Vec<&str> = here().map(|route| route.method).collect();
    if methods.is_empty() {
        return Response::error(Status::NotFound, &format!("there is no {}", request.path));
    }
    let allow = methods.join(", ");
    let sentence = format!("{} takes {allow}, not {}", request.path, request.method);
    Response { allow: Some(allow), ..Response::error(Status::MethodNotAllowed, &sentence) }
}

fn events(control: &Control) -> Response {
    match control.subscribe() {
        Some(subscription) => Response::events(subscription.into()),
        None => Response::error(
            Status::ServiceUnavailable,
            "as many clients as may do so wait for this VM's events: end one of them",
        ),
    }
}

fn put<T: DeserializeOwned>(body: &[u8], act: impl FnOnce(T) -> Result<(), ControlError>) -> Response {
    with(body, |value| act(value).map(|()| Response::done()))
}

/// As [`put`], where no body is an operator's.
fn in_name_of(body: &[u8], act: impl FnOnce(PauseRequest) -> Result<(), ControlError>) -> Response {
    if body.is_empty() { answer(act(PauseRequest::default())) } else { put(body, act) }
}

fn with<T: DeserializeOwned>(body: &[u8], act: impl FnOnce(T) -> Result<Response, ControlError>) -> Response {
    match serde_json::from_slice(body) {
        Ok(value) => act(value).unwrap_or_else(|error| refusal(&error)),
        Err(error) => {
            Response::error(Status::BadRequest, &format!("the body is not what belongs here: {error}"))
        }
    }
}

fn answer(result: Result<(), ControlError>) -> Response {
    result.map_or_else(|error| refusal(&error), |()| Response::done())
}

fn refusal(error: &ControlError) -> Response {
    let status = match error {
        ControlError::Host(_) => Status::InternalError,
        error if error.is_conflict() => Status::Conflict,
        _ => Status::BadRequest,
    };
    Response::error(status, &error.to_string())
}
