//! The client of a ballast VM's API: HTTP/1.1 and JSON over the VM's Unix socket.
//!
//! What comes back is not trusted: a guest may have taken over the process at
//! the other end. So every exchange has a time limit, every body a bound, and
//! text that ends up in a log or on a terminal is cleaned first.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use balloon::limits::Limits;
use balloon::status::{MemoryStatus, TargetRequest, VmStatus};
use balloon::units::Bytes;
use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONTENT_TYPE, HOST};
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::net::UnixStream;
use tokio::task::AbortHandle;

/// How long one request may take where nobody says otherwise.
///
/// A VM answers from its own memory in well under a millisecond; a second is
/// the tick of the balancer, which must not wait longer for anyone.
pub const DEFAULT_TIMEOUT: Duration = Duration::from_secs(1);

/// The largest body that is read. A full answer is about 2 KiB.
pub const LARGEST_BODY: usize = 256 << 10;

/// The largest response head that is read.
const LARGEST_HEAD: usize = 16 << 10;

/// The longest text from a VM that is passed on in an error, in characters.
const LONGEST_SENTENCE: usize = 300;

/// Why a VM's API gave no answer that could be used.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// Nobody listens at the socket.
    #[error(
        "no VM answers at {}: it has ended or never started; `ballast ps` lists those that run", .socket.display()
    )]
    NoSuchVm {
        /// Where it was looked for.
        socket: PathBuf,
    },
    /// This user may not connect.
    #[error("not allowed to connect to {}: run as the user who started the VM, or as root", .socket.display())]
    NotAllowed {
        /// The socket.
        socket: PathBuf,
    },
    /// No answer in time.
    #[error(
        "the VM at {} did not answer {request} within {} ms: its process hangs or this host is overloaded",
        .socket.display(), .within.as_millis()
    )]
    NotAnswering {
        /// The socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// The limit that passed.
        within: Duration,
    },
    /// The connection broke in the middle.
    #[error("the VM at {} hung up during {request} ({cause}): it has probably just ended", .socket.display())]
    HungUp {
        /// The socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// What the connection said.
        cause: String,
    },
    /// An answer that can't be understood.
    #[error(
        "the VM at {} answered {request} with nonsense ({what}): is it a ballast VM of this version?",
        .socket.display()
    )]
    Nonsense {
        /// The socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// What is wrong with it.
        what: String,
    },
    /// The VM understood and said no.
    #[error("the VM at {} refused {request} ({status}): {error}", .socket.display())]
    Refused {
        /// The socket.
        socket: PathBuf,
        /// Method and path.
        request: String,
        /// The HTTP status, 4xx or 5xx.
        status: u16,
        /// The VM's own sentence.
        error: String,
    },
}

/// The body of every refusal.
#[derive(Deserialize)]
struct Refusal {
    error: String,
}

/// A connection that carries one request after another.
struct Connection {
    sender: SendRequest<Full<hyper::body::Bytes>>,
    /// Ends the task that moves the bytes.
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A client for one VM.
///
/// Keeps one connection open and makes a new one when that broke. Needs a tokio
/// runtime with I/O and time; one thread is enough.
///
/// ```no_run
/// # async fn example() -> Result<(), balancer::driver::ballast::Error> {
/// use balancer::driver::ballast::Client;
/// let mut vm = Client::new("/run/ballast/web.sock");
/// let memory = vm.memory().await?;
/// println!("{} of {}", memory.actual, memory.limits.max());
/// # Ok(())
/// # }
/// ```
pub struct Client {
    socket: PathBuf,
    timeout: Duration,
    largest_body: usize,
    connection: Option<Connection>,
}

impl Client {
    /// A client for the VM whose API listens at `socket`. Connects at the first request.
    pub fn new(socket: impl Into<PathBuf>) -> Self {
        Self { socket: socket.into(), timeout: DEFAULT_TIMEOUT, largest_body: LARGEST_BODY, connection: None }
    }

    /// The same client with another limit for each request.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }

    /// The same client with another bound on what is read of one answer, in bytes.
    #[must_use]
    pub(crate) fn with_largest_body(mut self, bytes: usize) -> Self {
        self.largest_body = bytes;
        self
    }

    /// Where the VM listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// `GET /vm`: what this VM is and where it stands.
    ///
    /// # Errors
    /// See [`Error`]; the same holds for every request.
    pub async fn status(&mut self) -> Result<VmStatus, Error> {
        self.get("/vm").await
    }

    /// `GET /memory`: limits, target, actual, and the guest's last report.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn memory(&mut self) -> Result<MemoryStatus, Error> {
        self.get("/memory").await
    }

    /// `PUT /memory/target`: asks the guest to have `target`.
    ///
    /// # Errors
    /// [`Error::Refused`] with 409 where no balloon driver runs; else see [`Error`].
    pub async fn set_target(&mut self, target: Bytes) -> Result<(), Error> {
        self.put("/memory/target", &TargetRequest { target }).await
    }

    /// `PUT /memory/limits`: what the administrator allows this VM.
    ///
    /// # Errors
    /// [`Error::Refused`] where `max` is larger than the VM's memory map; else see [`Error`].
    pub async fn set_limits(&mut self, limits: Limits) -> Result<(), Error> {
        self.put("/memory/limits", &limits).await
    }

    /// `POST /vm/pause`: stops the vCPUs, keeps the memory.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn pause(&mut self) -> Result<(), Error> {
        self.post("/vm/pause").await
    }

    /// `POST /vm/resume`: lets the vCPUs run again.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn resume(&mut self) -> Result<(), Error> {
        self.post("/vm/resume").await
    }

    /// `POST /vm/power-button`: asks the guest to shut down.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn power_button(&mut self) -> Result<(), Error> {
        self.post("/vm/power-button").await
    }

    /// `POST /vm/shutdown`: ends the VM without asking its guest.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn shutdown(&mut self) -> Result<(), Error> {
        self.post("/vm/shutdown").await
    }

    /// Any other question that a VM answers: `GET path`.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn get<T: DeserializeOwned>(&mut self, path: &'static str) -> Result<T, Error> {
        let (request, _, body) = self.exchange(Method::GET, path, hyper::body::Bytes::new()).await?;
        serde_json::from_slice(&body).map_err(|error| self.nonsense(request, error.to_string()))
    }

    /// Any other question that takes words: `POST path`. It must do no harm when it is asked twice.
    ///
    /// # Errors
    /// See [`Error`].
    pub async fn ask<Q: Serialize, T: DeserializeOwned>(
        &mut self,
        path: &'static str,
        question: &Q,
    ) -> Result<T, Error> {
        let request = format!("POST {path}");
        let json = serde_json::to_vec(question).map_err(|error| self.nonsense(request, error.to_string()))?;
        let (request, _, body) = self.exchange(Method::POST, path, json.into()).await?;
        serde_json::from_slice(&body).map_err(|error| self.nonsense(request, error.to_string()))
    }

    async fn put<T: Serialize>(&mut self, path: &'static str, body: &T) -> Result<(), Error> {
        let request = format!("PUT {path}");
        let json = serde_json::to_vec(body).map_err(|error| self.nonsense(request, error.to_string()))?;
        self.exchange(Method::PUT, path, json.into()).await.map(drop)
    }

    async fn post(&mut self, path: &'static str) -> Result<(), Error> {
        self.exchange(Method::POST, path, hyper::body::Bytes::new()).await.map(drop)
    }

    /// One request and its whole answer, within the time limit.
    async fn exchange(
        &mut self,
        method: Method,
        path: &'static str,
        body: hyper::body::Bytes,
    ) -> Result<(String, StatusCode, hyper::body::Bytes), Error> {
        let request = format!("{method} {path}");
        let within = self.timeout;
        let outcome = tokio::time::timeout(within, self.send(&method, path, &request, body)).await;
        let answer = outcome.unwrap_or_else(|_| {
            Err(Error::NotAnswering { socket: self.socket.clone(), request: request.clone(), within })
        });
        let (status, body) = match answer {
            Ok(answer) => answer,
            Err(error) => {
                // Half an exchange may be in flight: the next request starts on a clean connection.
                self.connection = None;
                return Err(error);
            }
        };
        if status.is_success() {
            return Ok((request, status, body));
        }
        if !(status.is_client_error() || status.is_server_error()) {
            return Err(self.nonsense(request, format!("status {}", status.as_u16())));
        }
        let error = serde_json::from_slice(&body)
            .map_or_else(|_| "it gave no reason".to_owned(), |refusal: Refusal| clean(&refusal.error));
        Err(Error::Refused { socket: self.socket.clone(), request, status: status.as_u16(), error })
    }

    async fn send(
        &mut self,
        method: &Method,
        path: &'static str,
        request: &str,
        body: hyper::body::Bytes,
    ) -> Result<(StatusCode, hyper::body::Bytes), Error> {
        let kept = self.connection.take();
        let reused = kept.is_some();
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.connect(request).await?,
        };
        let mut response = connection.sender.send_request(build(method, path, body.clone())).await;
        // A server may close a connection that stood idle; only a fresh one tells how it is doing.
        // Every request here asks for a state, so that sending it twice does no harm.
        if reused && response.as_ref().is_err_and(|error| !error.is_parse()) {
            connection = self.connect(request).await?;
            response = connection.sender.send_request(build(method, path, body)).await;
        }
        let response = response.map_err(|error| self.broken(request, &error))?;
        let (status, body) = self.collect(request, response).await?;
        // The server said `Connection: close`, or is about to: begin anew next time.
        if connection.sender.ready().await.is_ok() {
            self.connection = Some(connection);
        }
        Ok((status, body))
    }

    async fn collect(
        &self,
        request: &str,
        response: Response<hyper::body::Incoming>,
    ) -> Result<(StatusCode, hyper::body::Bytes), Error> {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, self.largest_body).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                self.nonsense(request.to_owned(), format!("a body of more than {} bytes", self.largest_body))
            } else {
                match error.downcast::<hyper::Error>() {
                    Ok(error) => self.broken(request, &error),
                    Err(error) => self.nonsense(request.to_owned(), error.to_string()),
                }
            }
        })?;
        Ok((head.status, body.to_bytes()))
    }

    async fn connect(&self, request: &str) -> Result<Connection, Error> {
        let stream =
            UnixStream::connect(&self.socket).await.map_err(|error| self.unreachable(request, error))?;
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(LARGEST_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(request, &error))?;
        // Its error also reaches whoever waits for the response.
        let task = tokio::spawn(async move { drop(driver.await) }).abort_handle();
        Ok(Connection { sender, task })
    }

    fn unreachable(&self, request: &str, error: io::Error) -> Error {
        let socket = self.socket.clone();
        match error.kind() {
            io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused => Error::NoSuchVm { socket },
            io::ErrorKind::PermissionDenied => Error::NotAllowed { socket },
            // A Unix socket whose queue of connections is full.
            io::ErrorKind::WouldBlock => {
                Error::NotAnswering { socket, request: request.to_owned(), within: Duration::ZERO }
            }
            _ => Error::HungUp { socket, request: request.to_owned(), cause: error.to_string() },
        }
    }

    fn broken(&self, request: &str, error: &hyper::Error) -> Error {
        if error.is_parse() {
            return self.nonsense(request.to_owned(), error.to_string());
        }
        Error::HungUp { socket: self.socket.clone(), request: request.to_owned(), cause: error.to_string() }
    }

    fn nonsense(&self, request: String, what: String) -> Error {
        Error::Nonsense { socket: self.socket.clone(), request, what: clean(&what) }
    }
}

fn build(method: &Method, path: &'static str, body: hyper::body::Bytes) -> Request<Full<hyper::body::Bytes>> {
    let has_body = !body.is_empty();
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method.clone();
    *request.uri_mut() = hyper::Uri::from_static(path);
    request.headers_mut().insert(HOST, hyper::header::HeaderValue::from_static("localhost"));
    if has_body {
        let json = hyper::header::HeaderValue::from_static("application/json");
        request.headers_mut().insert(CONTENT_TYPE, json);
    }
    request
}

/// Text from a VM, made fit for a log line or a terminal: one line, no escapes, bounded.
fn clean(text: &str) -> String {
    text.chars().take(LONGEST_SENTENCE).map(|c| if c.is_control() { ' ' } else { c }).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_from_a_vm_cannot_drive_a_terminal() {
        let hostile = format!("a\x1b[2J\nb\r{}", "x".repeat(1000));
        let cleaned = clean(&hostile);
        assert!(!cleaned.chars().any(char::is_control), "{cleaned:?}");
        assert_eq!(cleaned.chars().count(), LONGEST_SENTENCE);
    }
}
