//! Sockets that answer as other VMMs do, with exchanges written from their published API
//! descriptions, or as none should.

#![allow(dead_code, reason = "each test program uses a part")]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use serde_json::Value;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::{UnixListener, UnixStream};
use tokio::task::JoinHandle;

/// What a VMM answers, and what it was asked.
#[derive(Default)]
pub struct Script {
    /// By `METHOD path`, or by the QMP command: a status (HTTP alone) and a body.
    pub answers: BTreeMap<String, (u16, String)>,
    /// Each request with a body, in order.
    pub orders: Vec<(String, Value)>,
    /// Instead of any answer.
    pub bytes: Option<Vec<u8>>,
    /// Before each answer.
    pub delay: Duration,
}

/// Serves one connection.
type Serve = fn(UnixStream, Arc<Mutex<Script>>) -> Pin<Box<dyn Future<Output = Option<()>> + Send>>;

/// A socket that plays a script; gone when dropped.
pub struct Recorded {
    script: Arc<Mutex<Script>>,
    socket: PathBuf,
    task: JoinHandle<()>,
}

impl Drop for Recorded {
    fn drop(&mut self) {
        self.task.abort();
        let _ = std::fs::remove_file(&self.socket);
    }
}

impl Recorded {
    /// A VMM that speaks HTTP.
    pub fn http(socket: PathBuf, answers: &[(&str, u16, &str)]) -> Self {
        Self::start(socket, answers, |stream, script| Box::pin(serve_http(stream, script)))
    }

    /// QEMU.
    pub fn qmp(socket: PathBuf, answers: &[(&str, &str)]) -> Self {
        let answers: Vec<_> = answers.iter().map(|&(command, body)| (command, 0, body)).collect();
        Self::start(socket, &answers, |stream, script| Box::pin(serve_qmp(stream, script)))
    }

    fn start(socket: PathBuf, answers: &[(&str, u16, &str)], serve: Serve) -> Self {
        let listener = UnixListener::bind(&socket).unwrap();
        let answers =
            answers.iter().map(|&(request, status, body)| (request.to_owned(), (status, body.to_owned())));
        let script = Arc::new(Mutex::new(Script { answers: answers.collect(), ..Script::default() }));
        let shared = Arc::clone(&script);
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                tokio::spawn(serve(stream, Arc::clone(&shared)));
            }
        });
        Self { script, socket, task }
    }

    pub fn script(&self) -> MutexGuard<'_, Script> {
        self.script.lock().unwrap()
    }

    pub fn answer(&self, request: &str, status: u16, body: &str) {
        self.script().answers.insert(request.to_owned(), (status, body.to_owned()));
    }

    /// The bodies of all requests so far to do `request`.
    pub fn orders(&self, request: &str) -> Vec<Value> {
        self.script()
            .orders
            .iter()
            .filter(|(done, _)| done == request)
            .map(|(_, body)| body.clone())
            .collect()
    }

    pub fn socket(&self) -> &Path {
        &self.socket
    }
}

async fn next_answer(
    script: &Mutex<Script>,
    stream: &mut (impl AsyncWriteExt + Unpin),
    request: String,
    body: Value,
) -> Option<(u16, String)> {
    let delay = script.lock().unwrap().delay;
    tokio::time::sleep(delay).await;
    let bytes = script.lock().unwrap().bytes.clone();
    if let Some(bytes) = bytes {
        let _ = stream.write_all(&bytes).await;
        return None;
    }
    let mut script = script.lock().unwrap();
    let answer = script.answers.get(&request).cloned();
    if !body.is_null() {
        script.orders.push((request, body));
    }
    Some(answer.unwrap_or((404, String::new())))
}

async fn serve_http(mut stream: UnixStream, script: Arc<Mutex<Script>>) -> Option<()> {
    let mut bytes = Vec::new();
    loop {
        let head = loop {
            if let Some(end) = bytes.windows(4).position(|window| window == b"\r\n\r\n") {
                break end + 4;
            }
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        };
        let text = String::from_utf8_lossy(&bytes[..head]).into_owned();
        let lower = text.to_ascii_lowercase();
        let length = lower.lines().find_map(|line| line.strip_prefix("content-length:"));
        let length: usize = length.map_or(0, |value| value.trim().parse().unwrap());
        while bytes.len() < head + length {
            if stream.read_buf(&mut bytes).await.ok()? == 0 {
                return None;
            }
        }
        let body = serde_json::from_slice(&bytes[head..head + length]).unwrap_or(Value::Null);
        bytes.drain(..head + length);
        let request = text.lines().next()?.trim_end_matches(" HTTP/1.1").to_owned();
        let (status, body) = next_answer(&script, &mut stream, request, body).await?;
        let length =
            if status == 204 { String::new() } else { format!("Content-Length: {}\r\n", body.len()) };
        let answer = format!("HTTP/1.1 {status} X\r\nServer: API\r\n{length}\r\n{body}");
        stream.write_all(answer.as_bytes()).await.ok()?;
    }
}

/// QEMU's greeting, as of its version 7.2.
const GREETING: &str = r#"{"QMP": {"version": {"qemu": {"micro": 22, "minor": 2, "major": 7}, "package": ""}, "capabilities": ["oob"]}}"#;

async fn serve_qmp(stream: UnixStream, script: Arc<Mutex<Script>>) -> Option<()> {
    let (read, mut write) = stream.into_split();
    write.write_all(format!("{GREETING}\r\n").as_bytes()).await.ok()?;
    let mut lines = BufReader::new(read).lines();
    while let Some(line) = lines.next_line().await.ok()? {
        let order: Value = serde_json::from_str(&line).unwrap();
        let mut command = order["execute"].as_str().unwrap().to_owned();
        if command.starts_with("qom-") {
            let arguments = &order["arguments"];
            let property = arguments["property"].as_str().unwrap_or_default();
            command = format!("{command} {} {property}", arguments["path"].as_str().unwrap());
        }
        let answer = if command == "qmp_capabilities" {
            Some((0, r#""return": {}"#.to_owned()))
        } else {
            let body = order["arguments"].clone();
            next_answer(&script, &mut write, command.trim().to_owned(), body).await
        };
        let (_, answer) = answer?;
        // One answer is one line.
        let line = format!("{{{}, \"id\": {}}}\r\n", answer.replace('\n', " "), order["id"]);
        write.write_all(line.as_bytes()).await.ok()?;
    }
    None
}
