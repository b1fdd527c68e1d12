//! Moves bytes between two connected sockets until both are done. Knows sockets, no configuration.
//!
//! One task polls both directions. Each direction (`half`) is either copying through the worker's scratch
//! buffer, for small messages, or splicing through a pooled pipe, for bulk, and changes over by what it sees.
//! While nothing moves, a connection holds neither buffer nor pipe. At most one buffer's or pipe's worth is
//! held per direction, and nothing more is read until it is gone: that is the flow control.
//!
//! How connections end, both ways round:
//! - A FIN is forwarded after the bytes before it; the other direction goes on.
//! - A RST is forwarded as a RST at once. What the side that reset had sent before, and is already here, goes
//!   out first as far as the other side takes it without waiting.
//! - A side that sent its FIN and is then found gone (it closed both directions) is flushed: what it sent
//!   still reaches the other side, then the FIN, and the connection ends when that side has acknowledged it
//!   all. What the other side sends in the meantime has nobody to go to and is dropped.
//! - A time limit or a drain ends both sides with a FIN, or with a RST to a side that would otherwise take
//!   a cut-off stream for a complete one. What a side has sent counts as read once it is here, the ring's buffers
//!   included; the kernel makes the FIN a RST where something is still in the socket.

mod copy;
mod counters;
mod duplex;
mod half;
mod lane;
mod nearby;
mod resources;
mod splice;

use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::connection::record::CloseType;
use crate::drain;
use crate::uring::{PendingHangUp, time};

pub use counters::{Counters, Direction};
pub use resources::{PipeBudget, Resources};

/// How much one read by copy takes at most, in bytes; filling it is what makes a direction splice.
pub const SCRATCH: usize = 64 * 1024;

/// How bytes are moved.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Mode {
    /// Copies small messages and splices bulk, per direction.
    #[default]
    Adaptive,
    /// Always copies.
    CopyOnly,
    /// Always splices, as far as there are pipes.
    SpliceOnly,
}

/// One of the two sockets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Side {
    /// The client's.
    Downstream,
    /// The endpoint's.
    Upstream,
}

impl Side {
    /// The opposite one.
    #[must_use]
    pub fn other(self) -> Self {
        match self {
            Self::Downstream => Self::Upstream,
            Self::Upstream => Self::Downstream,
        }
    }
}

/// What a connection may do, and what may end it.
#[derive(Debug, Default)]
pub struct Options<'a> {
    /// How bytes are moved.
    pub mode: Mode,
    /// Ends a connection on which no byte was received or sent for so long, also while it is flushed.
    pub idle_timeout: Option<Duration>,
    /// Ends the connection at this moment whatever it does.
    pub deadline: Option<Instant>,
    /// Bytes held at most for the downstream while it takes none; 0 is 1 MiB. A direction that splices may
    /// hold 64 KiB even if this is less.
    pub downstream_buffer_limit: u32,
    /// The same for the upstream.
    pub upstream_buffer_limit: u32,
    /// Ends the connection when its worker says so.
    pub killed: Option<&'a drain::Open>,
}

/// How a connection ended. Both sockets have been ended as it says when [`run`] returns; closing the
/// descriptors is all that is left to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// What ended it.
    pub cause: Cause,
    /// How the downstream connection ended.
    pub downstream: CloseType,
    /// How the upstream connection ended.
    pub upstream: CloseType,
}

/// What ended a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Both sides sent their FIN, and both were forwarded.
    Finished {
        /// Whose came first.
        first: Side,
    },
    /// A side reset the connection, or was gone when something was to be sent to it.
    Reset {
        /// That side.
        by: Side,
    },
    /// Another error of a socket.
    Error {
        /// Whose socket.
        side: Side,
        /// As in errno(3), for example `ETIMEDOUT`.
        errno: i32,
    },
    /// [`Options::idle_timeout`] passed.
    IdleTimeout,
    /// [`Options::deadline`] came.
    MaxDuration,
    /// [`Options::killed`] said so.
    Killed,
}

/// Moves bytes between two sockets, the downstream's and the upstream's (both nonblocking, with `TCP_NODELAY`), until
/// the connection has ended. `hang_up` is a wait for the end of the downstream's, where one was begun.
///
/// Must be called in a runtime of [`crate::uring::start`]. `counters` may be read at any time meanwhile. A
/// caller that drops the future instead ends both connections by closing the sockets: with a FIN, or with a
/// RST if something was left unread.
pub fn run<'a>(
    resources: &'a Resources,
    sockets: [&'a Socket; 2],
    hang_up: Option<PendingHangUp>,
    options: &Options<'a>,
    counters: &'a Counters,
) -> Running<'a> {
    let duplex = duplex::Duplex::new(resources, sockets, hang_up, options, counters);
    Running { duplex, timer: time::sleep(Duration::ZERO) }
}

/// What [`run`] returns.
pub struct Running<'a> {
    duplex: duplex::Duplex<'a>,
    timer: time::Sleep,
}

impl Future for Running<'_> {
    type Output = Outcome;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Outcome> {
        let this = &mut *self;
        this.duplex.poll(&mut this.timer, cx)
    }
}

#[cfg(test)]
mod tests;
