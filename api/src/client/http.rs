//! HTTP/1.1 and JSON over a Unix socket, as ballast, Firecracker and Cloud Hypervisor speak it.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http_body_util::{BodyExt, Full, LengthLimitError, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::{CONNECTION, CONTENT_TYPE, HOST, HeaderValue, UPGRADE};
use hyper::{Method, Request, Response, StatusCode, Uri};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::task::AbortHandle;
use tokio::time::timeout;

use super::error::Error;
use super::peer::{Acquaintance, PeerProcess, PeerStream};
use super::{LARGEST_ANSWER, Peer};
use crate::text::clean;

/// The largest response head that is read.
const LARGEST_HEAD: usize = 16 << 10;

/// A connection that carries one request after another.
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    /// Ends the task that moves the bytes.
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection that goes on in another protocol.
#[derive(Debug)]
pub struct Upgraded {
    /// The connection. Reads and writes wait.
    pub stream: UnixStream,
    /// What has come already.
    pub received: Bytes,
}

/// A client that keeps one connection open and makes a new one when that broke.
pub struct Http {
    peer: &'static Peer,
    socket: PathBuf,
    timeout: Duration,
    largest_answer: usize,
    connection: Option<Connection>,
    /// What paths begin with, as far as is known.
    version: &'static str,
    /// Who is at the other end of the last connection.
    acquaintance: Option<Acquaintance>,
}

impl Http {
    /// A client for the API of a `peer` at `socket`. Connects at the first request.
    pub fn new(peer: &'static Peer, socket: PathBuf, timeout: Duration) -> Self {
        let version = peer.version.unwrap_or_default();
        let largest_answer = LARGEST_ANSWER;
        Self { peer, socket, timeout, largest_answer, connection: None, version, acquaintance: None }
    }

    /// How long one request may take from now on.
    pub fn set_timeout(&mut self, timeout: Duration) {
        self.timeout = timeout;
    }

    /// How many bytes of one answer are read from now on.
    pub fn set_largest_answer(&mut self, bytes: usize) {
        self.largest_answer = bytes;
    }

    /// Where the API listens.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// The process at the other end of the last connection, whether it answered or not.
    pub fn process(&self) -> PeerProcess {
        self.acquaintance.as_ref().map_or(PeerProcess::NotMet, Acquaintance::process)
    }

    /// Gives the connection up; the next request makes another.
    pub fn hang_up(&mut self) {
        self.connection = None;
    }

    /// `GET path`.
    pub async fn get<T: DeserializeOwned>(&mut self, path: &str) -> Result<T, Error> {
        let (request, body) = self.exchange(Method::GET, path, Bytes::new()).await?;
        serde_json::from_slice(&body).map_err(|error| self.nonsense(request, &error.to_string()))
    }

    /// `POST path` with a JSON body and a JSON answer. It must do no harm when it is asked twice.
    pub async fn ask<T: DeserializeOwned>(
        &mut self,
        path: &str,
        question: &impl Serialize,
    ) -> Result<T, Error> {
        let json = serde_json::to_vec(question)
            .map_err(|error| self.nonsense(format!("POST {path}"), &error.to_string()))?;
        let (request, body) = self.exchange(Method::POST, path, json.into()).await?;
        serde_json::from_slice(&body).map_err(|error| self.nonsense(request, &error.to_string()))
    }

    /// A request with a JSON body, whose answer's body means nothing.
    pub async fn send(&mut self, method: Method, path: &str, body: &impl Serialize) -> Result<(), Error> {
        let json = serde_json::to_vec(body)
            .map_err(|error| self.nonsense(format!("{method} {path}"), &error.to_string()))?;
        self.exchange(method, path, json.into()).await.map(drop)
    }

    /// `POST path` without a body, for what must not be done twice. It uses a new connection, as a request
    /// that is lost on a used one is sent again.
    pub async fn post(&mut self, path: &str) -> Result<(), Error> {
        self.connection = None;
        self.exchange(Method::POST, path, Bytes::new()).await.map(drop)
    }

    /// An answer that was well-formed and made no sense.
    pub fn nonsense(&self, request: String, what: &str) -> Error {
        Error::Nonsense { peer: self.peer, socket: self.socket.clone(), request, what: clean(what) }
    }

    /// One request and its whole answer, within the time limit.
    async fn exchange(&mut self, method: Method, path: &str, body: Bytes) -> Result<(String, Bytes), Error> {
        let request = format!("{method} {path}");
        let outcome = timeout(self.timeout, self.try_versions(&method, path, &request, body)).await;
        let (status, body) = match outcome.unwrap_or_else(|_| Err(self.too_late(&request))) {
            Ok(answer) => answer,
            Err(error) => {
                // Half an exchange may be in flight: the next request starts on a clean connection.
                self.connection = None;
                return Err(error);
            }
        };
        if status.is_success() {
            return Ok((request, body));
        }
        Err(self.refused(request, status, &body))
    }

    fn refused(&self, request: String, status: StatusCode, body: &[u8]) -> Error {
        if !(status.is_client_error() || status.is_server_error()) {
            return self.nonsense(request, &format!("status {}", status.as_u16()));
        }
        let sentence = (self.peer.sentence)(body).unwrap_or_else(|| "it gave no reason".to_owned());
        let (socket, status) = (self.socket.clone(), status.as_u16().to_string());
        Error::Refused { socket, request, status, error: clean(&sentence) }
    }

    fn too_late(&self, request: &str) -> Error {
        let (socket, request) = (self.socket.clone(), request.to_owned());
        Error::NotAnswering { socket, request, within: self.timeout }
    }

    /// `GET path`, whose answer has no end: what there is of its body goes on for as long as the connection
    /// is held.
    pub(super) async fn open(&mut self, path: &str) -> Result<(Connection, Incoming), Error> {
        let request = format!("GET {path}");
        let within = self.timeout;
        let opening = async {
            let mut opened = self.opening(&request, &format!("{}{path}", self.version)).await?;
            if opened.1.status() == StatusCode::NOT_FOUND && !self.version.is_empty() {
                opened = self.opening(&request, path).await?;
            }
            Ok(opened)
        };
        let opened = timeout(within, opening).await.unwrap_or_else(|_| Err(self.too_late(&request)));
        let (connection, response) = opened?;
        let status = response.status();
        if status.is_success() {
            Ok((connection, response.into_body()))
        } else {
            Err(self.refused(request, status, &[]))
        }
    }

    async fn opening(
        &mut self,
        request: &str,
        path: &str,
    ) -> Result<(Connection, Response<Incoming>), Error> {
        let uri = self.uri(request, path)?;
        let mut connection = self.connect(request).await?;
        let asked = connection.sender.send_request(build(&Method::GET, uri, Bytes::new())).await;
        Ok((connection, asked.map_err(|error| self.broken(request, &error))?))
    }

    /// `GET path`, after which the connection goes on in `protocol`: returns it, with what has come of that already.
    pub(super) async fn upgrade(&mut self, path: &str, protocol: &'static str) -> Result<Upgraded, Error> {
        let request = format!("GET {path}");
        let within = self.timeout;
        let upgrading = async {
            let versioned = format!("{}{path}", self.version);
            let (mut _connection, mut response) = self.ask_upgrade(&request, &versioned, protocol).await?;
            if response.status() == StatusCode::NOT_FOUND && !self.version.is_empty() {
                (_connection, response) = self.ask_upgrade(&request, path, protocol).await?;
            }
            if response.status() != StatusCode::SWITCHING_PROTOCOLS {
                let (status, body) = self.collect(&request, response).await?;
                return Err(self.refused(request.clone(), status, &body));
            }
            hyper::upgrade::on(response).await.map_err(|error| self.broken(&request, &error))
        };
        let upgraded = timeout(within, upgrading).await.unwrap_or_else(|_| Err(self.too_late(&request)))?;
        let parts = upgraded
            .downcast::<TokioIo<PeerStream>>()
            .map_err(|_| self.hung_up(&request, "its connection is of another kind"))?;
        let stream =
            parts.io.into_inner().into_std().map_err(|error| self.hung_up(&request, &error.to_string()))?;
        Ok(Upgraded { stream, received: parts.read_buf })
    }

    async fn ask_upgrade(
        &mut self,
        request: &str,
        path: &str,
        protocol: &'static str,
    ) -> Result<(Connection, Response<Incoming>), Error> {
        let mut asked = build(&Method::GET, self.uri(request, path)?, Bytes::new());
        asked.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
        asked.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
        let mut connection = self.connect(request).await?;
        let answered = connection.sender.send_request(asked).await;
        let response = answered.map_err(|error| self.broken(request, &error))?;
        Ok((connection, response))
    }

    fn uri(&self, request: &str, path: &str) -> Result<Uri, Error> {
        path.parse().map_err(|error| self.nonsense(request.to_owned(), &format!("{error}: {path}")))
    }

    /// With the version first. Where nothing is there, nothing was done, and an older server may have it without one.
    async fn try_versions(
        &mut self,
        method: &Method,
        path: &str,
        request: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Error> {
        let versioned = format!("{}{path}", self.version);
        let answer = self.try_twice(method, &versioned, request, body.clone()).await?;
        if answer.0 != StatusCode::NOT_FOUND || self.version.is_empty() {
            return Ok(answer);
        }
        let older = self.try_twice(method, path, request, body).await?;
        if older.0 == StatusCode::NOT_FOUND {
            return Ok(answer);
        }
        self.version = "";
        Ok(older)
    }

    async fn try_twice(
        &mut self,
        method: &Method,
        path: &str,
        request: &str,
        body: Bytes,
    ) -> Result<(StatusCode, Bytes), Error> {
        let uri = self.uri(request, path)?;
        let kept = self.connection.take();
        let reused = kept.is_some();
        let mut connection = match kept {
            Some(connection) => connection,
            None => self.connect(request).await?,
        };
        let mut response = connection.sender.send_request(build(method, uri.clone(), body.clone())).await;
        // A server may close a connection that stood idle; only a fresh one tells how it is doing. What comes
        // here on a connection that was used before may be sent twice.
        if reused && response.as_ref().is_err_and(|error| !error.is_parse()) {
            connection = self.connect(request).await?;
            response = connection.sender.send_request(build(method, uri, body)).await;
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
        response: Response<Incoming>,
    ) -> Result<(StatusCode, Bytes), Error> {
        let (head, body) = response.into_parts();
        let body = Limited::new(body, self.largest_answer).collect().await.map_err(|error| {
            if error.is::<LengthLimitError>() {
                self.nonsense(
                    request.to_owned(),
                    &format!("a body of more than {} bytes", self.largest_answer),
                )
            } else {
                match error.downcast::<hyper::Error>() {
                    Ok(error) => self.broken(request, &error),
                    Err(error) => self.nonsense(request.to_owned(), &error.to_string()),
                }
            }
        })?;
        Ok((head.status, body.to_bytes()))
    }

    async fn connect(&mut self, request: &str) -> Result<Connection, Error> {
        let stream = PeerStream::connect(&self.socket)
            .await
            .map_err(|error| Error::unreachable(self.peer, &self.socket, request, &error))?;
        self.acquaintance = Some(stream.acquaintance().clone().after(self.acquaintance.as_ref()));
        let (sender, driver) = http1::Builder::new()
            .max_buf_size(LARGEST_HEAD)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.broken(request, &error))?;
        // Its error also reaches whoever waits for the response.
        let task = tokio::spawn(async move { drop(driver.with_upgrades().await) }).abort_handle();
        Ok(Connection { sender, task })
    }

    pub(super) fn broken(&self, request: &str, error: &hyper::Error) -> Error {
        if error.is_parse() {
            return self.nonsense(request.to_owned(), &error.to_string());
        }
        self.hung_up(request, &error.to_string())
    }

    pub(super) fn hung_up(&self, request: &str, cause: &str) -> Error {
        Error::HungUp { socket: self.socket.clone(), request: request.to_owned(), cause: clean(cause) }
    }
}

fn build(method: &Method, uri: Uri, body: Bytes) -> Request<Full<Bytes>> {
    let has_body = !body.is_empty();
    let mut request = Request::new(Full::new(body));
    *request.method_mut() = method.clone();
    *request.uri_mut() = uri;
    request.headers_mut().insert(HOST, HeaderValue::from_static("localhost"));
    if has_body {
        request.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    }
    request
}
