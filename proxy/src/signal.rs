//! What signals ask for. SIGTERM and SIGINT: drain, then exit; a second one: exit at once. SIGUSR1: reopen
//! log files. SIGHUP is ignored, as in Envoy.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// A request that came by signal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// SIGTERM or SIGINT.
    Stop,
    /// SIGUSR1.
    ReopenLogs,
}

/// The process's signals, as a stream of requests. Create it once, on the main thread's runtime.
#[derive(Debug)]
pub struct Signals {
    terminate: Signal,
    interrupt: Signal,
    user1: Signal,
    /// Held so that the default action of SIGHUP doesn't end the process.
    _hang_up: Signal,
}

impl Signals {
    /// Takes over the signals.
    pub fn install() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            user1: signal(SignalKind::user_defined1())?,
            _hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// The next request.
    pub async fn next(&mut self) -> Request {
        tokio::select! {
            _ = self.terminate.recv() => Request::Stop,
            _ = self.interrupt.recv() => Request::Stop,
            _ = self.user1.recv() => Request::ReopenLogs,
        }
    }
}
