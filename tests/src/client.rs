//! Scripted clients.

use std::io;
use std::net::TcpStream;

use serde::{Deserialize, Serialize};

use crate::script::{self, Step, Transcript};

/// What a client saw.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Outcome {
    /// connect() failed: the errno's name.
    NotConnected(String),
    /// It connected, ran its script, and saw this.
    Connected(Transcript),
}

/// Runs the script on the connection, or notes why there is none.
pub fn run(connected: io::Result<TcpStream>, steps: &[Step]) -> Outcome {
    match connected {
        Ok(stream) => Outcome::Connected(script::run(stream, steps)),
        Err(error) => Outcome::NotConnected(errno_name(&error)),
    }
}

/// `ECONNREFUSED`, `ETIMEDOUT`, …
pub fn errno_name(error: &io::Error) -> String {
    match error.raw_os_error() {
        Some(errno) => format!("{:?}", nix::errno::Errno::from_raw(errno)),
        None => error.to_string(),
    }
}
