//! What each path and method does: a function from a request to a response.

use std::sync::Arc;

use ::http::StatusCode;
use api::limits::Limits;
use api::status::{PauseRequest, Pauser, TargetRequest};
use serde::de::DeserializeOwned;

use super::fresh::Fresh;
use super::http::{Answer, Request, Response};
use super::metrics;
use crate::control::{Control, ControlError};
use crate::vcpu_set::PATIENCE;

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
    /// With the request; answered as soon as that is possible.
    Await(fn(&Arc<Control>, Request<'_>) -> Answer),
}

use Act::{Await, Do};

/// Everything the API does; `resources/openapi.yaml` says the same to the world.
pub const ROUTES: [Route; 12] = [
    Route { method: "GET", path: "/vm", act: Do(|control, _| Response::json(&control.status())) },
    Route { method: "POST", path: "/vm/pause", act: Await(pause) },
    Route {
        method: "POST",
        path: "/vm/resume",
        act: Do(|control, body| {
            pause_request(body)
                .map_or_else(|refused| refused, |PauseRequest { by }| answer(control.resume(by)))
        }),
    },
    Route { method: "POST", path: "/vm/power-button", act: Do(|control, _| answer(control.power_button())) },
    Route { method: "POST", path: "/vm/shutdown", act: Do(|control, _| answer(control.shutdown())) },
    Route { method: "GET", path: "/memory", act: Await(memory) },
    Route { method: "POST", path: "/vm/translate", act: Await(translate) },
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

/// Carries out one request.
pub fn route(request: Request<'_>, control: &Arc<Control>) -> Answer {
    let here = || ROUTES.iter().filter(|route| route.path == request.path);
    // Whoever sends the answer leaves its body out.
    let method = if request.method == "HEAD" { "GET" } else { request.method };
    if let Some(route) = here().find(|route| route.method == method) {
        return match route.act {
            Do(act) => act(control, request.body).into(),
            Await(act) => act(control, request),
        };
    }
    let mut methods: Vec<&str> = here().map(|route| route.method).collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    if methods.is_empty() {
        return Response::error(StatusCode::NOT_FOUND, &format!("there is no {}", request.path)).into();
    }
    let allow = methods.join(", ");
    let sentence = format!("{} takes {allow}, not {}", request.path, request.method);
    Response { allow: Some(allow), ..Response::error(StatusCode::METHOD_NOT_ALLOWED, &sentence) }.into()
}

/// A VM's memory, with a report of its guest as fresh as was asked for, where one comes in time. What came
/// since it was asked for is fresh.
fn memory(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let Fresh { max_age, wait } = match Fresh::parse(request.query) {
        Ok(fresh) => fresh,
        Err(error) => return Response::error(StatusCode::BAD_REQUEST, &error.to_string()).into(),
    };
    let control = Arc::clone(control);
    Answer::within(wait, move |waited| {
        let expected = max_age.is_some_and(|max_age| control.expects_report(max_age.max(waited)));
        (!expected || waited >= wait).then(|| Response::json(&control.memory()))
    })
}

fn pause(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let begun = pause_request(request.body).and_then(|PauseRequest { by }| {
        control.pause(by).map_err(refusal)?;
        Ok(BegunPause { control: Arc::clone(control), by, is_told: false })
    });
    match begun {
        Ok(mut begun) => Answer::within(PATIENCE, move |_| {
            let outcome = begun.control.paused()?;
            begun.is_told = true;
            Some(answer(outcome))
        }),
        Err(refused) => refused.into(),
    }
}

/// A pause that somebody waits for. A client that goes before it was told of the pause leaves none.
struct BegunPause {
    control: Arc<Control>,
    by: Pauser,
    is_told: bool,
}

impl Drop for BegunPause {
    fn drop(&mut self) {
        if !self.is_told {
            self.control.abandon_pause(self.by);
        }
    }
}

fn translate(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let mut seen = match parse(request.body).and_then(|asked| control.translate(asked).map_err(refusal)) {
        Ok(seen) => seen,
        Err(refused) => return refused.into(),
    };
    Answer::within(PATIENCE, move |waited| {
        Some(seen(waited)?.map_or_else(refusal, |seen| Response::json(&seen)))
    })
}

fn events(control: &Control) -> Response {
    match control.subscribe() {
        Some(subscription) => Response::events(subscription.into()),
        None => Response::error(
            StatusCode::SERVICE_UNAVAILABLE,
            "as many clients as may do so wait for this VM's events: end one of them",
        ),
    }
}

fn put<T: DeserializeOwned>(body: &[u8], act: impl FnOnce(T) -> Result<(), ControlError>) -> Response {
    parse(body).map_or_else(|refused| refused, |value| answer(act(value)))
}

/// No body is an operator's.
fn pause_request(body: &[u8]) -> Result<PauseRequest, Response> {
    if body.is_empty() { Ok(PauseRequest::default()) } else { parse(body) }
}

fn parse<T: DeserializeOwned>(body: &[u8]) -> Result<T, Response> {
    serde_json::from_slice(body).map_err(|error| {
        Response::error(StatusCode::BAD_REQUEST, &format!("the body is not what belongs here: {error}"))
    })
}

fn answer(result: Result<(), ControlError>) -> Response {
    result.map_or_else(refusal, |()| Response::done())
}

fn refusal(error: ControlError) -> Response {
    let status = match &error {
        ControlError::Host(_) => StatusCode::INTERNAL_SERVER_ERROR,
        error if error.is_conflict() => StatusCode::CONFLICT,
        _ => StatusCode::BAD_REQUEST,
    };
    Response::error(status, &error.to_string())
}
