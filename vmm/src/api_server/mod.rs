//! The VM's API: HTTP/1.1 and JSON over a Unix socket, described in `resources/openapi.yaml`.
//!
//! One thread serves at most [`MOST_CONNECTIONS`] clients and sleeps while
//! nobody asks. There is no runtime behind it: what a client can make this
//! process hold is bounded by the buffers of those few connections.
//!
//! [`http`] turns bytes into requests and responses into bytes, [`routes`]
//! turns a request into a response, or says how long it may wait for one. `connection` is one
//! client's state, `socket` the way in, and [`Server`] turns the wheel.

mod connection;
#[cfg(test)]
mod document;
pub mod fresh;
pub mod http;
pub mod metrics;
pub mod routes;
mod server;
mod socket;
mod stream;

pub use server::{MOST_CONNECTIONS, Server};
pub use socket::BindError;
pub(crate) use socket::{SocketFile, listen};
