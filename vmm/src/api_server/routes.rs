//! What each path and method does: a function from a request to a response.

use std::time::Duration;

use api::limits::Limits;
use api::status::{PauseRequest, TargetRequest};
use serde::de::DeserializeOwned;

use super::fresh::Fresh;
use super::http::{Answer, Request, Response, Status};
use super::metrics;
use crate::control::{Control, ControlError};

/// One thing the API does.
pub struct Route {
    /// The method it takes.
    pub method: &'static str,
    /// Its path, whole.
    pub path: &'static str,
    act: Act,
}

enum Act {
    /// With the request's body; answered at once.
    Do(fn(&Control, &[u8]) -> Response),
    /// With the request's query, and for how long it has waited.
    Await(fn(&Control, &str, Duration) -> Answer),
}

use Act::{Await, Do};

/// Everything the API does; `resources/openapi.yaml` says the same to the world.
pub const ROUTES: [Route; 12] = [
    Route { method: "GET", path: "/vm", act: Do(|control, _| Response::json(&control.status())) },
    Route {
        method: "POST",
        path: "/vm/pause",
        act: Do(|control, body| in_name_of(body, |PauseRequest { by }| control.pause(by))),
    },
    Route {
        method: "POST",
        path: "/vm/resume",
        act: Do(|control, body| in_name_of(body, |PauseRequest { by }| control.resume(by))),
    },
    Route { method: "POST", path: "/vm/power-button", act: Do(|control, _| answer(control.power_button())) },
    Route { method: "POST", path: "/vm/shutdown", act: Do(|control, _| answer(control.shutdown())) },
    Route { method: "GET", path: "/memory", act: Await(memory) },
    Route {
        method: "POST",
        path: "/vm/translate",
        act: Do(|control, body| {
            with(body, |asked| control.translate(asked).map(|seen| Response::json(&seen)))
        }),
    },
    Route { method: "GET", path: "/memory/map", act: Do(|control, _| Response::json(&control.memory_map())) },
    Route { method: "GET", path: "/memory/events", act: Do(|control, _| events(control)) },
    Route {
        method: "PUT",
        path: "/memory/target",
        act: Do(|control, body| put(body, |wanted: TargetRequest| control.set_target(wanted.target))),
    },
    Route {
        method: "PUT",
        path: "/memory/limits",
        act: Do(|control, body| put(body, |limits: Limits| control.set_limits(limits))),
    },
    Route {
        method: "GET",
        path: "/metrics",
        act: Do(|control, _| metrics::response(&control.status(), &control.memory())),
    },
];

/// Carries out one request, which has `waited` so long since it was first put. Putting the same request
/// again is how it waits on: what it came to before is forgotten.
pub fn route(request: Request<'_>, waited: Duration, control: &Control) -> Answer {
    let here = || ROUTES.iter().filter(|route| route.path == request.path);
    // Whoever sends the answer leaves its body out.
    let method = if request.method == "HEAD" { "GET" } else { request.method };
    if let Some(route) = here().find(|route| route.method == method) {
        return match route.act {
            Do(act) => act(control, request.body).into(),
            Await(act) => act(control, request.query, waited),
        };
    }
    let mut methods: Vec<&str> = here().map(|route| route.method).collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    if methods.is_empty() {
        return Response::error(Status::NotFound, &format!("there is no {}", request.path)).into();
    }
    let allow = methods.join(", ");
    let sentence = format!("{} takes {allow}, not {}", request.path, request.method);
    Response { allow: Some(allow), ..Response::error(Status::MethodNotAllowed, &sentence) }.into()
}

/// A VM's memory, with a report of its guest as fresh as was asked for, where one comes in time. What came
/// since it was asked for is fresh.
fn memory(control: &Control, query: &str, waited: Duration) -> Answer {
    let fresh = match Fresh::parse(query) {
        Ok(fresh) => fresh,
        Err(error) => return Response::error(Status::BadRequest, &error.to_string()).into(),
    };
    if let Some(max_age) = fresh.max_age
        && control.expects_report(max_age.max(waited))
        && waited < fresh.wait
    {
        return Answer::Later(fresh.wait);
    }
    Response::json(&control.memory()).into()
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
