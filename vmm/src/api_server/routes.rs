//! What each path and method does: a function from a request to a response.

use std::sync::Arc;

use ::http::StatusCode;
use api::limits::Limits;
use api::status::{CONSOLE_PROTOCOL, PauseRequest, Pauser, ResizeRequest, TargetRequest, VSOCK_PROTOCOL};
use api::version;
use devices::virtio::vsock::Answers;
use serde::de::DeserializeOwned;

use super::fresh::Fresh;
use super::http::{self, Answer, Request, Response};
use super::metrics;
use super::{generation, unversioned};
use crate::console::Mode;
use crate::control::{Control, ControlError, disks};
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
    /// Answered at once.
    Do(fn(&Control, Request<'_>) -> Response),
    /// Answered as soon as that is possible.
    Await(fn(&Arc<Control>, Request<'_>) -> Answer),
}

use Act::{Await, Do};

/// Everything the API does; `resources/openapi.yaml` says the same to the world.
pub const ROUTES: [Route; 17] = [
    Route { method: "GET", path: "/vm", act: Do(|control, _| Response::json(&control.status())) },
    Route { method: "POST", path: "/vm/pause", act: Await(pause) },
    Route {
        method: "POST",
        path: "/vm/resume",
        act: Do(|control, request| {
            pause_request(request.body)
                .map_or_else(|refused| refused, |PauseRequest { by }| answer(control.resume(by)))
        }),
    },
    Route { method: "POST", path: "/vm/power-button", act: Do(|control, _| answer(control.power_button())) },
    Route { method: "POST", path: "/vm/shutdown", act: Do(|control, _| answer(control.shutdown())) },
    Route { method: "GET", path: "/vm/console", act: Await(attach) },
    Route { method: "GET", path: "/vm/vsock", act: Await(call_guest) },
    Route { method: "POST", path: "/disks/resize", act: Await(resize_disk) },
    Route { method: "GET", path: "/memory", act: Await(memory) },
    Route { method: "POST", path: "/vm/translate", act: Await(translate) },
    Route { method: "GET", path: "/memory/map", act: Do(|control, _| Response::json(&control.memory_map())) },
    Route { method: "GET", path: "/memory/events", act: Do(|control, _| events(control)) },
    Route {
        method: "GET",
        path: "/memory/target",
        act: Do(|control, _| {
            let target = control.memory().target;
            Response::json(&TargetRequest { target }).with("ETag", generation::of_target(control))
        }),
    },
    Route {
        method: "PUT",
        path: "/memory/target",
        act: Do(|control, request| {
            let set = |wanted: TargetRequest| control.set_target(wanted.target);
            put(control, request, generation::of_target, set)
        }),
    },
    Route {
        method: "GET",
        path: "/memory/limits",
        act: Do(|control, _| Response::json(&control.limits()).with("ETag", generation::of_limits(control))),
    },
    Route {
        method: "PUT",
        path: "/memory/limits",
        act: Do(|control, request| {
            put(control, request, generation::of_limits, |limits: Limits| control.set_limits(limits))
        }),
    },
    Route {
        method: "GET",
        path: "/metrics",
        act: Do(|control, _| metrics::response(&control.status(), &control.memory())),
    },
];

/// Carries out one request. Those without a version are answered as the release before did, and told so.
pub fn route(request: Request<'_>, control: &Arc<Control>) -> Answer {
    let asked = request.path;
    match asked.strip_prefix(version::PREFIX).filter(|path| path.starts_with('/')) {
        Some(path) => carry_out(Request { path, ..request }, asked, control),
        None => unversioned::answer(carry_out(request, asked, control), asked),
    }
}

/// Carries out a request whose path was `asked` for with its version.
fn carry_out(request: Request<'_>, asked: &str, control: &Arc<Control>) -> Answer {
    let here = || ROUTES.iter().filter(|route| route.path == request.path);
    // Whoever sends the answer leaves its body out.
    let method = if request.method == "HEAD" { "GET" } else { request.method };
    if let Some(route) = here().find(|route| route.method == method) {
        return match route.act {
            Do(act) => act(control, request).into(),
            Await(act) => act(control, request),
        };
    }
    let mut methods: Vec<&str> = here().map(|route| route.method).collect();
    if methods.contains(&"GET") {
        methods.push("HEAD");
    }
    if methods.is_empty() {
        return Response::error(StatusCode::NOT_FOUND, &format!("there is no {asked}")).into();
    }
    let allow = methods.join(", ");
    let sentence = format!("{asked} takes {allow}, not {}", request.method);
    Response::error(StatusCode::METHOD_NOT_ALLOWED, &sentence).with("Allow", allow).into()
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

fn resize_disk(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let begun =
        parse(request.body).and_then(|asked: ResizeRequest| control.resize_disk(&asked).map_err(refusal));
    match begun {
        Ok(mut grown) => Answer::within(disks::PATIENCE, move |waited| Some(answer(grown(waited)?))),
        Err(refused) => refused.into(),
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

/// Attaches the client to the console: what follows the answer is the guest's output, and the client's input.
fn attach(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let mode = match request.query.strip_prefix("mode=").map(Mode::parse) {
        None if request.query.is_empty() => Mode::Watch,
        Some(Some(mode)) => mode,
        _ => {
            let sentence = "the query must be mode=watch, mode=write or mode=take-over";
            return Response::error(StatusCode::BAD_REQUEST, sentence).into();
        }
    };
    if let Err(refused) = wants(request, CONSOLE_PROTOCOL, "ballast console") {
        return refused.into();
    }
    match control.attach_to_console(mode) {
        Ok(place) => Answer::HandOver(Box::new(move |stream, input| {
            place.serve(stream, http::switching_to(CONSOLE_PROTOCOL), input);
        })),
        Err(refused) => refusal(refused).into(),
    }
}

/// Whether the request asks for its connection to go on in `protocol`, as `command` does.
fn wants(request: Request<'_>, protocol: &'static str, command: &str) -> Result<(), Response> {
    if request.upgrade == protocol && request.method == "GET" {
        return Ok(());
    }
    let sentence = format!("send `Connection: Upgrade` and `Upgrade: {protocol}`, as `{command}` does");
    Err(Response::error(StatusCode::UPGRADE_REQUIRED, &sentence).with("Upgrade", protocol))
}

/// Connects the client to a port of the guest: what follows the answer is what the program there says.
fn call_guest(control: &Arc<Control>, request: Request<'_>) -> Answer {
    let Some(Ok(port)) = request.query.strip_prefix("port=").map(str::parse::<u32>) else {
        return Response::error(StatusCode::BAD_REQUEST, "the query must be port=N, a port of the guest")
            .into();
    };
    if let Err(refused) = wants(request, VSOCK_PROTOCOL, "ballast vsock") {
        return refused.into();
    }
    let incoming = match control.vsock() {
        Ok(incoming) => Arc::clone(incoming),
        Err(refused) => return refusal(refused).into(),
    };
    let sentence = format!(
        "the guest refused port {port}: nobody listens there, or it has no driver (load vmw_vsock_virtio_transport)"
    );
    let answers = Answers {
        accepted: http::switching_to(VSOCK_PROTOCOL),
        names_port: false,
        refused: Response::error(StatusCode::BAD_GATEWAY, &sentence).whole(),
    };
    Answer::HandOver(Box::new(move |stream, _| {
        if let Err(crowded) = incoming.connect(port, stream, answers) {
            tracing::warn!("{crowded}");
        }
    }))
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

/// Puts a value in the place of one whose generation is told, unless the client knows of another generation only.
fn put<T: DeserializeOwned>(
    control: &Control,
    request: Request<'_>,
    generation: fn(&Control) -> String,
    act: impl FnOnce(T) -> Result<(), ControlError>,
) -> Response {
    let value = match parse(request.body) {
        Ok(value) => value,
        Err(refused) => return refused,
    };
    // One thread serves all clients, so that none comes between.
    let now = generation(control);
    if !generation::matches(request.if_match, &now) {
        let sentence = "this has changed since you read it: read it again (GET), and decide anew";
        return Response::error(StatusCode::PRECONDITION_FAILED, sentence).with("ETag", now);
    }
    match act(value) {
        Ok(()) => Response::done().with("ETag", generation(control)),
        Err(error) => refusal(error),
    }
}

/// No body is an operator's.
fn pause_request(body: &[u8]) -> Result<PauseRequest, Response> {
    let request = if body.is_empty() { PauseRequest::default() } else { parse(body)? };
    if request.by == Pauser::Disk {
        return Err(Response::error(
            StatusCode::BAD_REQUEST,
            "a disk asks for nothing here: use operator or balancer",
        ));
    }
    Ok(request)
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
