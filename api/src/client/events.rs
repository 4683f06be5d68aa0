//! What a VM says unasked: `GET /memory/events`, line by line.

use std::path::PathBuf;
use std::time::Duration;

use http_body_util::BodyExt;
use tokio::time::sleep;

use super::error::Error;
use super::http::Http;
use super::{BALLAST, DEFAULT_TIMEOUT};
use crate::agent::MemoryEvent;

const PATH: &str = "/memory/events";
const REQUEST: &str = "GET /memory/events";

/// The longest line that is read; a full one has about 600 bytes.
const LONGEST_LINE: usize = 4 << 10;

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
        let mut http = Http::new(&BALLAST, self.socket.clone(), DEFAULT_TIMEOUT);
        let (_connection, mut body) = match http.open(PATH).await {
            Ok(opened) => opened,
            Err(error) => return error,
        };
        let mut held = Vec::new();
        loop {
            let piece = match body.frame().await {
                None => return http.hung_up(REQUEST, "no more events"),
                Some(Err(error)) => return http.broken(REQUEST, &error),
                Some(Ok(frame)) => frame.into_data().unwrap_or_default(),
            };
            held.extend_from_slice(&piece);
            while let Some(end) = held.iter().position(|byte| *byte == b'\n') {
                match serde_json::from_slice(held.get(..end).unwrap_or_default()) {
                    Ok(event) => each(event),
                    Err(error) => return http.nonsense(REQUEST.to_owned(), &error.to_string()),
                }
                held.drain(..=end);
            }
            if held.len() > LONGEST_LINE {
                return http.nonsense(REQUEST.to_owned(), "a line without an end");
            }
            sleep(BREATH).await;
        }
    }
}
