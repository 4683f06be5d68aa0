//! Signals that ask a command to end or a daemon to read its settings anew.

use std::future::{Future, pending};
use std::io;

use api::signals::is_ignored;
use tokio::signal::unix::{Signal, SignalKind, signal};

/// A signal that is waited for, unless this process was started to ignore it.
pub struct Inherited(Option<Signal>);

impl Inherited {
    /// Takes the signal away from its default effect, or leaves it ignored.
    ///
    /// # Errors
    /// Where the kernel allows no handlers.
    pub fn take(kind: SignalKind) -> io::Result<Self> {
        if is_ignored(kind.as_raw_value()) {
            Ok(Self(None))
        } else {
            signal(kind).map(|taken| Self(Some(taken)))
        }
    }

    /// Waits for it, for ever where it is ignored.
    pub async fn received(&mut self) {
        let Self(Some(signal)) = self else { return pending().await };
        signal.recv().await;
    }
}

/// Ends when the process is asked to: SIGTERM, or Ctrl-C on the terminal.
///
/// # Errors
/// Where the kernel allows no handlers.
pub fn stop_signal() -> io::Result<impl Future<Output = ()>> {
    let mut terminate = Inherited::take(SignalKind::terminate())?;
    let mut interrupt = Inherited::take(SignalKind::interrupt())?;
    Ok(async move {
        tokio::select! {
            () = terminate.received() => {}
            () = interrupt.received() => {}
        }
    })
}
