//! Serving clients of whom some are slow, too many, or never done: none of them may cost the others
//! their answers, or the daemon its descriptors, which it needs for its VMs.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::serve::Listener;
use hyper::Request;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::{Service, service_fn};
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tracing::debug;

use super::reservation::LONGEST_WAIT;

/// How many are served at a time, and how long each may take for what.
#[derive(Clone, Copy, Debug)]
pub struct ConnectionLimits {
    /// Clients at a time. More wait in the kernel's queue until a place is free.
    pub clients: usize,
    /// Beside them, clients that wait for something long: see [`ClientPermit::wait`].
    pub waiting: usize,
    /// From the end of one request, or the beginning, to the whole head of the next. So an idle
    /// client is one as well, and connects anew where it has more to ask.
    pub head: Duration,
    /// For one connection. A request that is under way then has `grace` to its end.
    pub life: Duration,
    /// See `life`.
    pub grace: Duration,
}

impl ConnectionLimits {
    /// For the daemon's own socket, where whoever waits for room may wait long.
    pub const PRIVATE: Self = Self {
        clients: 128,
        waiting: 1024,
        head: Duration::from_secs(30),
        life: Duration::from_secs(600),
        grace: LONGEST_WAIT.saturating_add(Duration::from_secs(10)),
    };

    /// For the metrics over TCP: a scrape takes moments, and comes from a few.
    pub const PUBLIC: Self = Self {
        clients: 16,
        waiting: 0,
        head: Duration::from_secs(10),
        life: Duration::from_secs(120),
        grace: Duration::from_secs(10),
    };
}

/// A client's place among those that are served. Each request finds it among its extensions.
#[derive(Clone, Debug)]
pub struct ClientPermit(Arc<PermitState>);

#[derive(Debug)]
struct PermitState {
    permit: Mutex<OwnedSemaphorePermit>,
    waiting: Arc<Semaphore>,
}

impl ClientPermit {
    /// Leaves it to others for as long as this client is there, as what it asked for takes long. False
    /// where too many do so already.
    #[must_use]
    pub fn wait(&self) -> bool {
        let Ok(permit) = Arc::clone(&self.0.waiting).try_acquire_owned() else { return false };
        *self.0.permit.lock() = permit;
        true
    }
}

/// Serves whoever comes, for ever.
pub async fn serve<L: Listener>(mut listener: L, router: Router, limits: ConnectionLimits) {
    let permits = Arc::new(Semaphore::new(limits.clients));
    let waiting = Arc::new(Semaphore::new(limits.waiting));
    let mut clients = JoinSet::new();
    loop {
        // It is never closed.
        let Ok(permit) = Arc::clone(&permits).acquire_owned().await else { return };
        let (stream, _) = listener.accept().await;
        while clients.try_join_next().is_some() {}
        let permit =
            ClientPermit(Arc::new(PermitState { permit: Mutex::new(permit), waiting: Arc::clone(&waiting) }));
        clients.spawn(serve_one(stream, router.clone(), permit, limits));
    }
}

async fn serve_one<S>(stream: S, router: Router, permit: ClientPermit, limits: ConnectionLimits)
where
    S: AsyncRead + AsyncWrite + Send + Unpin + 'static,
{
    let router = TowerToHyperService::new(router);
    let service = service_fn(|mut request: Request<Incoming>| {
        request.extensions_mut().insert(permit.clone());
        router.call(request)
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(limits.head)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = match timeout(limits.life, connection.as_mut()).await {
        Ok(ended) => ended,
        Err(_) => {
            connection.as_mut().graceful_shutdown();
            timeout(limits.grace, connection).await.unwrap_or(Ok(()))
        }
    };
    if let Err(error) = ended {
        debug!("a client's connection ended: {error}");
    }
}

#[cfg(test)]
mod tests {
    use axum::Extension;
    use axum::routing::get;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::net::{UnixListener, UnixStream};

    use super::*;

    const PATIENCE: Duration = Duration::from_secs(60);

    struct Server {
        directory: tempfile::TempDir,
        _task: JoinSet<()>,
    }

    impl Server {
        fn start(limits: ConnectionLimits) -> Self {
            let directory = tempfile::tempdir().unwrap();
            let listener = UnixListener::bind(directory.path().join("socket")).unwrap();
            // What no server holds back for ever: a body larger than any buffer of a socket.
            let router = Router::new()
                .route("/", get(|| async { "hello" }))
                .route("/large", get(|| async { vec![b'x'; 8 << 20] }))
                .route("/turn", get(turn))
                .route("/wait", get(wait));
            let mut task = JoinSet::new();
            task.spawn(serve(listener, router, limits));
            Self { directory, _task: task }
        }

        async fn connect(&self) -> UnixStream {
            UnixStream::connect(self.directory.path().join("socket")).await.unwrap()
        }

        /// Asks, and waits until the server hangs up.
        async fn ask(&self, path: &str) -> String {
            let mut stream = self.connect().await;
            let question = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
            stream.write_all(question.as_bytes()).await.unwrap();
            read(&mut stream).await
        }
    }

    async fn turn(Extension(permit): Extension<ClientPermit>) -> &'static str {
        if permit.wait() { "waits" } else { "too many" }
    }

    async fn wait(permit: Extension<ClientPermit>) -> &'static str {
        turn(permit).await;
        std::future::pending().await
    }

    async fn read(stream: &mut UnixStream) -> String {
        let mut answer = Vec::new();
        // A connection that is cut may end in an error.
        let _ = timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the server hangs up");
        String::from_utf8_lossy(&answer).into_owned()
    }

    const SHORT: Duration = Duration::from_millis(100);
    const LIMITS: ConnectionLimits =
        ConnectionLimits { clients: 1, waiting: 2, head: PATIENCE, life: PATIENCE, grace: PATIENCE };

    #[tokio::test]
    async fn whoever_never_asks_loses_its_place_to_who_does() {
        let server = Server::start(ConnectionLimits { head: SHORT, ..LIMITS });
        let (mut silent, mut slow) = (server.connect().await, server.connect().await);
        slow.write_all(b"GET / HTT").await.unwrap();
        assert!(server.ask("/").await.ends_with("hello"));
        assert!(!read(&mut silent).await.contains("hello"));
        assert!(!read(&mut slow).await.contains("hello"));
    }

    #[tokio::test]
    async fn whoever_never_reads_its_answer_loses_its_place_too() {
        let server = Server::start(ConnectionLimits { life: SHORT, grace: SHORT, ..LIMITS });
        let mut deaf = server.connect().await;
        deaf.write_all(b"GET /large HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert!(server.ask("/").await.ends_with("hello"));
    }

    #[tokio::test]
    async fn whoever_waits_for_long_takes_no_place_from_who_asks() {
        let server = Server::start(LIMITS);
        let mut waiters = Vec::new();
        for _ in 0..LIMITS.waiting {
            let mut waiter = server.connect().await;
            waiter.write_all(b"GET /wait HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            assert!(server.ask("/").await.ends_with("hello"));
            waiters.push(waiter);
        }
        assert!(server.ask("/turn").await.ends_with("too many"));
        waiters.pop();
        // Its end is noticed some time.
        while !server.ask("/turn").await.ends_with("waits") {}
    }

    #[tokio::test]
    async fn a_client_may_ask_again_on_one_connection() {
        let server = Server::start(LIMITS);
        let mut client = server.connect().await;
        let mut answer = [0; 512];
        for _ in 0..3 {
            client.write_all(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let mut text = String::new();
            while !text.ends_with("hello") {
                let count = timeout(PATIENCE, client.read(&mut answer)).await.expect("an answer").unwrap();
                assert!(count > 0, "{text}");
                text += &String::from_utf8_lossy(&answer[..count]);
            }
        }
    }
}
