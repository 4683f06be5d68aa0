//! The VM's API: HTTP/1.1 and JSON over a Unix socket, described in `resources/openapi.yaml`.
//!
//! One thread serves at most [`MOST_CONNECTIONS`] clients and sleeps while nobody asks. `httparse` reads
//! request heads; the rest is written here rather than taken from `hyper`, which can run without a runtime
//! too: it was measured to make 0.1 to 0.2 MiB resident in each VM, answers what it can't parse without
//! a body, and hides how far a connection is, by which this server decides whose place a new client gets
//! and that nothing is done for a client that has gone.
//!
//! [`http`] turns bytes into requests and responses into bytes, [`routes`] turns a request into a response,
//! or says how long it may wait for one. `connection` is the state of one client, `socket` makes the file
//! that clients connect to, and [`Server`] is the event loop.

mod connection;
#[cfg(test)]
mod document;
pub mod fresh;
mod generation;
pub mod http;
pub mod metrics;
pub mod routes;
mod server;
mod socket;
mod stream;
mod unversioned;

pub use server::{MOST_CONNECTIONS, Server};
pub use socket::BindError;
pub(crate) use socket::{BACKLOG, CLIENT_COMES, LOOK_EVERY, Listening};
