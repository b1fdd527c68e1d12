//! Listener filters: what is read from a connection before its filter chain is chosen.
//!
//! Inspectors peek (`MSG_PEEK`), so that the upstream gets every byte; only a PROXY protocol header is taken off
//! the stream, to the byte. The parsers are pure; here is the loop that feeds them. `original_dst` reads
//! nothing and has no part in this.

use std::cell::RefCell;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::time::Duration;

use socket2::Socket;
use thiserror::Error;

use crate::config::listener::{Listener, ListenerFilter};
use crate::stats::{ListenerStats, Stats};
use crate::sys::socket;
use crate::uring::{self, Interest, time};

pub mod http_inspector;
mod inspect;
pub mod proxy_protocol;
pub mod tls_inspector;

use inspect::{Step, step};

/// What was learnt of a connection. Filters of a second listener (after a hand-off) add to it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Inspected {
    /// `tls` when an inspector saw a ClientHello; empty stands for `raw_buffer`.
    pub transport_protocol: &'static str,
    /// SNI in lower case.
    pub server_name: Option<Box<str>>,
    /// ALPN in the client's order, or what http_inspector recognised (`http/1.0`, `http/1.1`, `h2c`).
    pub application_protocols: Vec<Box<str>>,
    /// The source that a PROXY protocol header names.
    pub source: Option<SocketAddr>,
    /// The destination that a PROXY protocol header names.
    pub destination: Option<SocketAddr>,
    /// The timeout passed, and the listener goes on with what is known (`downstream_pre_cx_timeout` counts it).
    pub timed_out: bool,
}

/// Why a connection ended before its filter chain was chosen.
#[derive(Debug, Error)]
pub enum Ended {
    /// `listener_filters_timeout`.
    #[error("listener filters timed out")]
    Timeout,
    /// The client sent a FIN, or reset, before enough was there.
    #[error("the client left before the listener filters were done")]
    RemoteClose,
    /// What the client sent is refused: a bad PROXY header, a ClientHello that is too large, …
    #[error("refused by a listener filter")]
    Refused,
    /// The socket failed.
    #[error("reading failed: {0}")]
    Io(#[from] io::Error),
}

impl Ended {
    /// Counts it in the listener's stats. What a filter refused is in the filter's own.
    pub fn count(&self, stats: &ListenerStats) {
        match self {
            Self::Timeout => stats.downstream_pre_cx_timeout().inc(),
            Self::RemoteClose => stats.downstream_listener_filter_remote_close().inc(),
            Self::Io(_) => stats.downstream_listener_filter_error().inc(),
            Self::Refused => {}
        }
    }
}

/// Runs the listener filters of `listener` in their order, under its timeout. After the timeout it ends well
/// when the listener says so, with what is known by then. Must run in a worker's runtime.
pub async fn run(
    socket: &Socket,
    listener: &Listener,
    stats: &Stats,
    inspected: &mut Inspected,
) -> Result<(), Ended> {
    let mut reader = Reader { fd: socket.as_fd(), low_water: 1 };
    let all = async {
        for filter in &listener.listener_filters {
            run_one(&mut reader, filter, stats, inspected).await?;
        }
        Ok(())
    };
    let result = match listener.listener_filters_timeout {
        None => all.await,
        Some(timeout) => time::timeout(timeout, all).await.unwrap_or(Err(Ended::Timeout)),
    };
    match result {
        Err(Ended::Timeout) if listener.continue_on_listener_filters_timeout => {
            inspected.timed_out = true;
            Ok(())
        }
        result => result,
    }
}

async fn run_one(
    reader: &mut Reader<'_>,
    filter: &ListenerFilter,
    stats: &Stats,
    inspected: &mut Inspected,
) -> Result<(), Ended> {
    let mut have = 0;
    loop {
        let peeked =
            reader.peek(inspect::limit(filter), |bytes| (bytes.len(), step(filter, bytes, stats, inspected)));
        let (len, next) = match peeked {
            Ok((0, Step::NeedMore(_))) => return Err(Ended::RemoteClose),
            Ok(peeked) => peeked,
            // Nothing has come yet.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                (0, step(filter, &[], stats, inspected))
            }
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Err(Ended::RemoteClose),
            Err(error) => return Err(error.into()),
        };
        match next {
            Step::Done => return Ok(()),
            Step::Consume(header) => return reader.consume(header),
            Step::Refuse => return Err(Ended::Refused),
            Step::NeedMore(total) => reader.wait(len, total, &mut have).await?,
        }
    }
}

/// Most bytes that any filter looks at.
const SCRATCH: usize = proxy_protocol::MAX_HEADER;

thread_local! {
    /// Peeked bytes, for as long as one parser looks at them. One for each worker, made when first needed.
    static PEEKED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// The receive queue of a socket, looked at without taking from it.
struct Reader<'a> {
    fd: BorrowedFd<'a>,
    /// `SO_RCVLOWAT` as it is set now.
    low_water: usize,
}

impl Reader<'_> {
    /// Looks at the first bytes, at most `limit`. None at all is the peer's FIN; `WouldBlock`: none yet.
    fn peek<R>(&self, limit: usize, look: impl FnOnce(&[u8]) -> R) -> io::Result<R> {
        PEEKED.with_borrow_mut(|buffer| {
            buffer.resize(SCRATCH, 0);
            let len = socket::peek(self.fd, &mut buffer[..limit])?;
            Ok(look(&buffer[..len]))
        })
    }

    /// Takes exactly so many bytes off the stream. They have been seen, so that they are there.
    fn consume(&mut self, len: usize) -> Result<(), Ended> {
        let mut left = len;
        while left > 0 {
            match socket::discard(self.fd, left)? {
                0 => return Err(Ended::RemoteClose),
                taken => left -= taken,
            }
        }
        Ok(())
    }

    /// Waits until there are `total` bytes, or no more will come. `seen` is how many there were at the last
    /// wait: a wakeup without news is the peer's FIN, or the kernel short of memory.
    ///
    /// Peeked bytes stay readable, so that a plain wait would spin; `SO_RCVLOWAT` makes the kernel wait for more.
    async fn wait(&mut self, len: usize, total: usize, seen: &mut usize) -> Result<(), Ended> {
        /// Time between looks when the kernel does not honour the low-water mark, as under memory pressure.
        const PAUSE: Duration = Duration::from_millis(10);
        let no_news = len > 0 && len <= *seen;
        *seen = len;
        if socket::has_received_fin(self.fd) {
            // What came with the FIN has been looked at, unless it came in between.
            let now = self.peek(SCRATCH, <[u8]>::len).unwrap_or(0);
            return if now > len { Ok(()) } else { Err(Ended::RemoteClose) };
        }
        self.set_low_water(total)?;
        if no_news {
            time::sleep(PAUSE).await;
        }
        uring::ready(self.fd, Interest::Readable).await?;
        Ok(())
    }

    fn set_low_water(&mut self, bytes: usize) -> io::Result<()> {
        if self.low_water != bytes {
            socket::set_receive_low_water(self.fd, bytes)?;
            self.low_water = bytes;
        }
        Ok(())
    }
}

impl Drop for Reader<'_> {
    /// Whoever reads next wants to know of every byte.
    fn drop(&mut self) {
        if self.low_water != 1 {
            // Fails only when the connection is gone, and then nobody reads.
            let _ = socket::set_receive_low_water(self.fd, 1);
        }
    }
}

#[cfg(test)]
mod tests;
