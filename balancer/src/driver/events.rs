//! What a VM says unasked: `GET /memory/events` of a ballast VM, line by line.

use std::path::PathBuf;
use std::time::Duration;

use api::agent::MemoryEvent;
use http_body_util::{BodyExt, Empty};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tokio::time::{sleep, timeout};

use super::error::{Error, clean};
use super::{DEFAULT_TIMEOUT, Kind};

const PATH: &str = "/memory/events";
const REQUEST: &str = "GET /memory/events";

/// The longest line that is read; a full one has about 600 bytes.
const LONGEST_LINE: usize = 4 << 10;

/// The most that is held of what came.
const LARGEST_PIECE: usize = 16 << 10;

/// How long nothing is read after a piece: a VM that talks without end costs little.
const BREATH: Duration = Duration::from_millis(20);

/// A way to hear one VM.
#[derive(Clone, Debug)]
pub struct EventSource {
    socket: PathBuf,
}

impl EventSource {
    /// The VM whose API listens at `socket`.
    pub fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// Listens until the connection ends, and hands `each` event over as it comes.
    ///
    /// # Errors
    /// Always, as a VM that lives doesn't end its events: says why it did.
    pub async fn listen(&self, mut each: impl FnMut(MemoryEvent)) -> Error {
        let opened = timeout(DEFAULT_TIMEOUT, self.open()).await;
        let opened = opened.unwrap_or_else(|_| {
            Err(Error::NotAnswering {
                socket: self.socket.clone(),
                request: REQUEST.to_owned(),
                within: DEFAULT_TIMEOUT,
            })
        });
        let (_connection, mut body) = match opened {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        let mut held = Vec::new();
        loop {
            let piece = match body.frame().await {
                None => return self.hung_up("no more events"),
                Some(Err(error)) => return self.hung_up(&error.to_string()),
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            held.extend_from_slice(&piece);
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                match serde_json::from_slice(held.get(..end).unwrap_or_default()) {
                    Ok(event) => each(event),
                    Err(error) => return self.nonsense(&error.to_string()),
                }
                held.drain(..=end);
            }
            if held.len() > LONGEST_LINE {
                return self.nonsense("a line without an end");
            }
            sleep(BREATH).await;
        }
    }

    async fn open(&self) -> Result<(Connection, Incoming), Error> {
        let stream = UnixStream::connect(&self.socket)
            .await
            .map_err(|error| Error::unreachable(Kind::Ballast, &self.socket, REQUEST, &error))?;
        let (mut sender, driver) = http1::Builder::new()
            .max_buf_size(LARGEST_PIECE)
            .handshake(TokioIo::new(stream))
            .await
            .map_err(|error| self.hung_up(&error.to_string()))?;
        // Its error also reaches whoever waits for the body.
        let connection = Connection(tokio::spawn(async move { drop(driver.await) }).abort_handle());
        let request = Request::get(PATH).header(HOST, "localhost").body(Empty::<Bytes>::new());
        let request = request.map_err(|error| self.nonsense(&error.to_string()))?;
        let response: Response<Incoming> = sender.send_request(request).await.map_err(|error| {
            if error.is_parse() {
                self.nonsense(&error.to_string())
            } else {
                self.hung_up(&error.to_string())
            }
        })?;
        let status = response.status();
        if !status.is_success() {
            return Err(Error::Refused {
                socket: self.socket.clone(),
                request: REQUEST.to_owned(),
                status: status.as_u16().to_string(),
                error: "it tells no events".to_owned(),
            });
        }
        Ok((connection, response.into_body()))
    }

    fn hung_up(&self, cause: &str) -> Error {
        Error::HungUp { socket: self.socket.clone(), request: REQUEST.to_owned(), cause: clean(cause) }
    }

    fn nonsense(&self, what: &str) -> Error {
        Error::Nonsense {
            kind: Kind::Ballast,
            socket: self.socket.clone(),
            request: REQUEST.to_owned(),
            what: clean(what),
        }
    }
}

/// The task that moves the bytes, ended with this.
struct Connection(tokio::task::AbortHandle);

impl Drop for Connection {
    fn drop(&mut self) {
        self.0.abort();
    }
}
