//! HTTP/1.1 as far as the API needs it: pure functions from bytes to a request
//! and from a response to bytes (RFC 9112).
//!
//! Everything is bounded: a head of [`LONGEST_HEAD`], a body of
//! [`LONGEST_BODY`], [`MOST_HEADERS`] header lines.

use std::fmt::Write;
use std::os::unix::net::UnixStream;
use std::time::Duration;

use ::http::StatusCode;
use api::problem::{self, Problem};
use serde::Serialize;

use super::stream::Stream;

/// The longest request line with headers, in bytes.
pub const LONGEST_HEAD: usize = 8 << 10;

/// The longest request body, in bytes; the largest that any route takes is a few hundred.
pub const LONGEST_BODY: usize = 64 << 10;

/// The most header lines of a request.
pub const MOST_HEADERS: usize = 32;

/// One request, borrowed from the connection's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// The method as sent: upper case, case matters.
    pub method: &'a str,
    /// The path without its query.
    pub path: &'a str,
    /// The query; empty where there is none.
    pub query: &'a str,
    /// The body; empty where none was sent.
    pub body: &'a [u8],
    /// The protocol that the client wants to go on in; empty where it names none.
    pub upgrade: &'a str,
    /// The generations of what it is about with one of which it is to be carried out (RFC 9110, section 13.1.1).
    pub if_match: Option<&'a [u8]>,
}

/// What the bytes received so far are.
#[derive(Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The beginning of a request.
    Incomplete,
    /// One whole request; more may follow it.
    Complete {
        /// The request.
        request: Request<'a>,
        /// How many bytes it took.
        length: usize,
        /// Whether the client wants to go on afterwards.
        keep_alive: bool,
    },
    /// Nothing that could be answered otherwise, and no telling where the next request begins.
    Malformed(Response),
}

/// What a request comes to.
pub enum Answer {
    /// This.
    Now(Response),
    /// Nothing yet. It is to be asked for when something has come that it may wait for, and at the latest
    /// when the request has waited for so long.
    Later(Duration, Later),
    /// The connection goes on in another protocol, with somebody else.
    HandOver(HandOver),
}

/// Takes a connection over, with what the client has sent after its request. To answer the request is its own.
pub type HandOver = Box<dyn FnOnce(UnixStream, Vec<u8>)>;

/// The answer to a request that has waited for so long; `None` where there is none yet.
pub type Later = Box<dyn FnMut(Duration) -> Option<Response>>;

impl Answer {
    /// What `later` says, now or when the request has waited for `limit` at the latest.
    pub fn within(limit: Duration, mut later: impl FnMut(Duration) -> Option<Response> + 'static) -> Self {
        later(Duration::ZERO).map_or_else(|| Self::Later(limit, Box::new(later)), Self::Now)
    }
}

impl From<Response> for Answer {
    fn from(response: Response) -> Self {
        Self::Now(response)
    }
}

/// One response, ready to be sent.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Its status code.
    pub status: StatusCode,
    /// What the body is; `None` where there is none.
    pub content_type: Option<&'static str>,
    /// Headers besides those that each has.
    pub headers: Vec<(&'static str, String)>,
    /// The body.
    pub body: Vec<u8>,
    /// What follows the body for as long as the client listens; the connection ends with it.
    pub stream: Option<Stream>,
}

impl Response {
    /// 204: done.
    pub const fn done() -> Self {
        Self {
            status: StatusCode::NO_CONTENT,
            content_type: None,
            headers: Vec::new(),
            body: Vec::new(),
            stream: None,
        }
    }

    /// 200 with `value` as JSON.
    pub fn json(value: &impl Serialize) -> Self {
        match serde_json::to_vec(value) {
            Ok(body) => Self::with_body(StatusCode::OK, "application/json", body),
            Err(error) => Self::error(
                StatusCode::INTERNAL_SERVER_ERROR,
                &format!("the answer can't be encoded: {error}"),
            ),
        }
    }

    /// 200 with a text.
    pub fn text(content_type: &'static str, text: String) -> Self {
        Self::with_body(StatusCode::OK, content_type, text.into_bytes())
    }

    /// 200 with a line of JSON for each event, as they come.
    pub fn events(stream: Stream) -> Self {
        Self { stream: Some(stream), ..Self::with_body(StatusCode::OK, "application/jsonl", Vec::new()) }
    }

    /// An error with its sentence as problem details (RFC 9457).
    pub fn error(status: StatusCode, sentence: &str) -> Self {
        let title = status.canonical_reason().unwrap_or_default();
        let problem = Problem::new(status.as_u16(), title, sentence);
        Self::with_body(status, problem::CONTENT_TYPE, problem.to_json())
    }

    /// The same with another header. Neither has a line end.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    const fn with_body(status: StatusCode, content_type: &'static str, body: Vec<u8>) -> Self {
        Self { status, content_type: Some(content_type), headers: Vec::new(), body, stream: None }
    }

    /// All of its bytes; the connection ends with them.
    pub fn whole(&self) -> Vec<u8> {
        let mut bytes = self.head(false);
        bytes.extend_from_slice(&self.body);
        bytes
    }

    /// The bytes to send before the body.
    pub fn head(&self, keep_alive: bool) -> Vec<u8> {
        let mut head = format!(
            "HTTP/1.1 {} {}\r\n",
            self.status.as_str(),
            self.status.canonical_reason().unwrap_or_default()
        );
        // Writing to a String does not fail.
        if let Some(content_type) = self.content_type {
            let _ = write!(head, "Content-Type: {content_type}\r\n");
        }
        for (name, value) in &self.headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        // A 204 must not carry a length (RFC 9110, section 8.6). What has no end known beforehand
        // ends with the connection (RFC 9112, section 6.3).
        if self.status != StatusCode::NO_CONTENT && self.stream.is_none() {
            let _ = write!(head, "Content-Length: {}\r\n", self.body.len());
        }
        head.push_str(if keep_alive {
            "Connection: keep-alive\r\n\r\n"
        } else {
            "Connection: close\r\n\r\n"
        });
        head.into_bytes()
    }
}

/// The head of the answer after which the connection goes on in `protocol` (RFC 9110, section 15.2.2).
pub fn switching_to(protocol: &str) -> Vec<u8> {
    format!("HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: {protocol}\r\n\r\n")
        .into_bytes()
}

fn malformed<'a>(status: StatusCode, sentence: &str) -> Parsed<'a> {
    Parsed::Malformed(Response::error(status, sentence))
}

/// Reads one request from the front of `bytes`.
pub fn parse(bytes: &[u8]) -> Parsed<'_> {
    let mut headers = [httparse::EMPTY_HEADER; MOST_HEADERS];
    let mut head = httparse::Request::new(&mut headers);
    let bounded = bytes.get(..LONGEST_HEAD).unwrap_or(bytes);
    let head_length = match head.parse(bounded) {
        Ok(httparse::Status::Complete(length)) => length,
        Ok(httparse::Status::Partial) if bytes.len() < LONGEST_HEAD => return Parsed::Incomplete,
        Ok(httparse::Status::Partial) => {
            return malformed(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the request's head is longer than 8 KiB",
            );
        }
        Err(httparse::Error::TooManyHeaders) => {
            return malformed(
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
                "the request has more than 32 headers",
            );
        }
        Err(httparse::Error::Version) => {
            return malformed(StatusCode::HTTP_VERSION_NOT_SUPPORTED, "this server speaks HTTP/1.1");
        }
        Err(error) => {
            return malformed(StatusCode::BAD_REQUEST, &format!("this is not an HTTP/1.1 request: {error}"));
        }
    };
    let (Some(method), Some(target), Some(version)) = (head.method, head.path, head.version) else {
        return malformed(StatusCode::BAD_REQUEST, "the request line is not complete");
    };
    let framing = match Framing::of(method, head.headers) {
        Ok(framing) => framing,
        Err(response) => return Parsed::Malformed(response),
    };
    let Some(target) = without_origin(target) else {
        return malformed(StatusCode::BAD_REQUEST, "the request's target must be a path, such as /vm");
    };
    let Some(length) = head_length.checked_add(framing.body) else {
        return malformed(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is longer than 64 KiB");
    };
    let Some(body) = bytes.get(head_length..length) else {
        return Parsed::Incomplete;
    };
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let keep_alive = framing.keep_alive.unwrap_or(version == 1);
    let (upgrade, if_match) = (framing.upgrade, framing.if_match);
    let request = Request { method, path, query, body, upgrade, if_match };
    Parsed::Complete { request, length, keep_alive }
}

/// The path and query of a target, which may name the server before them (RFC 9112, section 3.2.2).
fn without_origin(target: &str) -> Option<&str> {
    if target.starts_with('/') {
        return Some(target);
    }
    let (scheme, rest) = target.split_once("://")?;
    if !["http", "https"].iter().any(|known| scheme.eq_ignore_ascii_case(known)) {
        return None;
    }
    let path = rest.find(['/', '?']).and_then(|begin| rest.get(begin..));
    Some(path.filter(|path| path.starts_with('/')).unwrap_or("/"))
}

/// What the headers say about where a request ends and what comes after it.
struct Framing<'a> {
    body: usize,
    keep_alive: Option<bool>,
    upgrade: &'a str,
    if_match: Option<&'a [u8]>,
}

impl<'a> Framing<'a> {
    fn of(method: &str, headers: &[httparse::Header<'a>]) -> Result<Self, Response> {
        let mut length = None;
        let mut keep_alive = None;
        let mut protocol = "";
        let mut upgrades = false;
        let mut if_match = None;
        for header in headers {
            let is = |name| header.name.eq_ignore_ascii_case(name);
            if is("transfer-encoding") {
                // RFC 9112, section 6.1: refusing the coding is allowed, guessing the length is not.
                return Err(Response::error(
                    StatusCode::LENGTH_REQUIRED,
                    "send the body with a Content-Length: transfer codings are not supported",
                ));
            } else if is("expect") {
                return Err(Response::error(
                    StatusCode::EXPECTATION_FAILED,
                    "send the body at once: Expect is not supported",
                ));
            } else if is("content-length") {
                let value = body_length(header.value)?;
                if length.is_some_and(|before| before != value) {
                    let sentence = "the request has two lengths that contradict each other";
                    return Err(Response::error(StatusCode::BAD_REQUEST, sentence));
                }
                length = Some(value);
            } else if is("upgrade") {
                protocol = str::from_utf8(header.value).unwrap_or_default();
            } else if is("if-match") {
                // Of several lines one counts: more is refused then, and not less.
                if_match = Some(header.value);
            } else if is("connection") {
                let options = header.value.split(|&byte| byte == b',');
                for option in options.map(<[u8]>::trim_ascii) {
                    if option.eq_ignore_ascii_case(b"close") {
                        keep_alive = Some(false);
                    } else if option.eq_ignore_ascii_case(b"upgrade") {
                        upgrades = true;
                    } else if option.eq_ignore_ascii_case(b"keep-alive") && keep_alive.is_none() {
                        keep_alive = Some(true);
                    }
                }
            }
        }
        match length {
            None if method == "PUT" => {
                Err(Response::error(StatusCode::LENGTH_REQUIRED, "send the body with a Content-Length"))
            }
            length => {
                let upgrade = if upgrades { protocol } else { "" };
                Ok(Self { body: length.unwrap_or(0), keep_alive, upgrade, if_match })
            }
        }
    }
}

fn body_length(value: &[u8]) -> Result<usize, Response> {
    // `usize::from_str` would take a plus sign, RFC 9110 takes digits alone.
    let digits = !value.is_empty() && value.iter().all(u8::is_ascii_digit);
    let text = str::from_utf8(value).ok().filter(|_| digits).ok_or_else(|| {
        Response::error(StatusCode::BAD_REQUEST, "the request's Content-Length is not a number of bytes")
    })?;
    // Digits that don't fit a usize are too large as well.
    text.parse().ok().filter(|&length| length <= LONGEST_BODY).ok_or_else(|| {
        Response::error(StatusCode::PAYLOAD_TOO_LARGE, "the request's body is longer than 64 KiB")
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn refused(bytes: &[u8]) -> Option<StatusCode> {
        match parse(bytes) {
            Parsed::Malformed(response) => Some(response.status),
            _ => None,
        }
    }

    #[test]
    fn a_request_is_read_up_to_its_end() {
        let bytes = b"PUT /memory/target?x=1 HTTP/1.1\r\nhost: vm\r\ncontent-length: 4\r\n\r\nbodyGET";
        let request = Request {
            method: "PUT",
            path: "/memory/target",
            query: "x=1",
            body: b"body",
            upgrade: "",
            if_match: None,
        };
        assert_eq!(parse(bytes), Parsed::Complete { request, length: bytes.len() - 3, keep_alive: true });
        for cut in 0..bytes.len() - 3 {
            assert_eq!(parse(&bytes[..cut]), Parsed::Incomplete, "{cut}");
        }
    }

    #[test]
    fn a_target_may_name_the_server() {
        for (target, path, query) in [
            ("http://localhost/vm", "/vm", ""),
            ("HTTP://[::1]:80/memory?wait_ms=1", "/memory", "wait_ms=1"),
            ("https://a@b/", "/", ""),
            ("http://localhost", "/", ""),
            ("http://localhost?x=/vm", "/", ""),
        ] {
            let head = format!("GET {target} HTTP/1.1\r\n\r\n");
            let Parsed::Complete { request, .. } = parse(head.as_bytes()) else { panic!("{target}") };
            assert_eq!((request.path, request.query), (path, query), "{target}");
        }
        for target in ["vm", "*", "localhost:80", "file:///vm", "://vm"] {
            let head = format!("GET {target} HTTP/1.1\r\n\r\n");
            assert_eq!(refused(head.as_bytes()), Some(StatusCode::BAD_REQUEST), "{target}");
        }
    }

    #[test]
    fn connections_end_when_the_client_wants() {
        for (head, expected) in [
            ("GET / HTTP/1.1\r\n\r\n", true),
            ("GET / HTTP/1.0\r\n\r\n", false),
            ("GET / HTTP/1.1\r\nConnection: te, Close\r\n\r\n", false),
            ("GET / HTTP/1.0\r\nConnection: Keep-Alive\r\n\r\n", true),
        ] {
            let Parsed::Complete { keep_alive, .. } = parse(head.as_bytes()) else { panic!("{head}") };
            assert_eq!(keep_alive, expected, "{head}");
        }
    }

    #[test]
    fn another_protocol_is_wanted_where_the_connection_says_so() {
        for (headers, expected) in [
            ("Connection: Upgrade\r\nUpgrade: x", "x"),
            ("upgrade: x\r\nconnection: keep-alive, upgrade", "x"),
            ("Upgrade: x", ""),
            ("Connection: upgrade", ""),
        ] {
            let head = format!("GET / HTTP/1.1\r\n{headers}\r\n\r\n");
            let Parsed::Complete { request, .. } = parse(head.as_bytes()) else { panic!("{head}") };
            assert_eq!(request.upgrade, expected, "{head}");
        }
    }

    #[test]
    fn what_can_not_be_framed_is_refused() {
        let put = "PUT /memory/target HTTP/1.1\r\n";
        for (bytes, status) in [
            (format!("{put}\r\n"), StatusCode::LENGTH_REQUIRED),
            (format!("{put}Transfer-Encoding: chunked\r\n\r\n"), StatusCode::LENGTH_REQUIRED),
            (format!("{put}Content-Length: 2\r\nContent-Length: 3\r\n\r\n"), StatusCode::BAD_REQUEST),
            (format!("{put}Content-Length: +2\r\n\r\n"), StatusCode::BAD_REQUEST),
            (format!("{put}Content-Length: 0x2\r\n\r\n"), StatusCode::BAD_REQUEST),
            (format!("{put}Content-Length: \r\n\r\n"), StatusCode::BAD_REQUEST),
            (format!("{put}Content-Length: 65537\r\n\r\n"), StatusCode::PAYLOAD_TOO_LARGE),
            (format!("{put}Content-Length: 99999999999999999999999\r\n\r\n"), StatusCode::PAYLOAD_TOO_LARGE),
            (format!("{put}Expect: 100-continue\r\n\r\n"), StatusCode::EXPECTATION_FAILED),
            ("GET / HTTP/2.0\r\n\r\n".into(), StatusCode::HTTP_VERSION_NOT_SUPPORTED),
            ("nonsense\r\n\r\n".into(), StatusCode::BAD_REQUEST),
            ("\0\0\0\0".into(), StatusCode::BAD_REQUEST),
            (
                format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(33)),
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ),
            (
                format!("GET / HTTP/1.1\r\na: {}", "b".repeat(LONGEST_HEAD)),
                StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            ),
        ] {
            assert_eq!(refused(bytes.as_bytes()), Some(status), "{bytes}");
        }
    }

    #[test]
    fn a_response_says_how_long_it_is() {
        let error = Response::error(StatusCode::NOT_FOUND, "no \"such\" path");
        let text = String::from_utf8([error.head(false), error.body].concat()).unwrap();
        assert_eq!(
            text,
            "HTTP/1.1 404 Not Found\r\nContent-Type: application/problem+json\r\nContent-Length: 83\r\n\
             Connection: close\r\n\r\n{\"type\":\"about:blank\",\"title\":\"Not Found\",\"status\":404,\
             \"detail\":\"no \\\"such\\\" path\"}"
        );
        assert!(!String::from_utf8(Response::done().head(true)).unwrap().contains("Content-Length"));
    }

    proptest! {
        #[test]
        fn no_bytes_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            parse(&bytes);
        }

        #[test]
        fn no_headers_panic(lines in prop::collection::vec("(content-length|connection|x|transfer-encoding): [ -~]{0,20}\r\n", 0..40)) {
            let bytes = format!("PUT / HTTP/1.1\r\n{}\r\n", lines.concat());
            if let Parsed::Complete { length, .. } = parse(bytes.as_bytes()) {
                prop_assert!(length <= bytes.len());
            }
        }
    }
}
