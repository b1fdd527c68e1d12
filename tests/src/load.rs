//! Load for measurements: servers and clients that spend as little as they can themselves.
//!
//! Each kind of work is one thread over one epoll, however many connections it has, so that the scheduler has little
//! to decide. Threads start in the network namespace of their caller; [`agent`] and [`server::Process`] put clients and
//! servers into processes of their own, with a namespace, a cgroup and CPU time of their own.

pub mod account;
pub mod agent;
mod client;
pub mod job;
mod latencies;
pub mod server;
pub mod visits;

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use serde::{Deserialize, Serialize};

pub use self::latencies::Latencies;
pub use self::server::Server;
pub use self::visits::Visit;

/// Bytes of a small request, and of its response.
pub const MESSAGE: usize = 64;

/// Bytes per read and write of bulk streams.
const CHUNK: usize = 256 << 10;

/// How often a thread looks whether it should stop, and the longest that a stalled exchange is waited for.
const TICK: Duration = Duration::from_millis(50);
const STALLED: Duration = Duration::from_secs(10);

/// Which way bulk bytes go.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Direction {
    /// From the server to the client.
    Down,
    /// From the client to the server.
    Up,
    /// Both at once, as fast as each goes.
    Both,
}

impl Direction {
    /// What a client tells a bulk server with its first byte.
    fn code(self) -> u8 {
        match self {
            Self::Down => b'd',
            Self::Up => b'u',
            Self::Both => b'b',
        }
    }

    fn from_code(code: u8) -> Option<Self> {
        [Self::Down, Self::Up, Self::Both].into_iter().find(|direction| direction.code() == code)
    }

    fn receives(self) -> bool {
        self != Self::Up
    }

    fn sends(self) -> bool {
        self != Self::Down
    }
}

/// What clients have done, and whether they should go on.
#[derive(Debug, Default)]
struct Progress {
    /// Bytes of bulk streams that arrived here.
    bytes: AtomicU64,
    /// Answered requests, or connections that were used and closed.
    requests: AtomicU64,
    /// Whether latencies count already; before, the load only warms up.
    measuring: AtomicBool,
    stop: AtomicBool,
}

impl Progress {
    fn stopped(&self) -> bool {
        self.stop.load(Ordering::Relaxed)
    }
}

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    progress: Arc<Progress>,
    threads: Vec<JoinHandle<Result<Latencies>>>,
}

impl Load {
    fn new(measuring: bool) -> Self {
        let progress = Progress { measuring: AtomicBool::new(measuring), ..Progress::default() };
        Self { progress: Arc::new(progress), threads: Vec::new() }
    }

    /// Sends a message of [`MESSAGE`] bytes and waits for its echo, on all connections at once. Every latency counts.
    pub fn requests(to: SocketAddr, connections: usize) -> Result<Self> {
        let mut load = Self::new(true);
        load.add_requests(to, MESSAGE, connections)?;
        Ok(load)
    }

    fn add_requests(&mut self, to: SocketAddr, size: usize, connections: usize) -> Result<()> {
        let streams = connect_all(to, connections)?;
        self.add(move |progress| client::exchange(&streams, size, progress))
    }

    fn add_bulk(&mut self, to: SocketAddr, streams: usize, direction: Direction) -> Result<()> {
        let streams = connect_all(to, streams)?;
        self.add(move |progress| client::bulk(&streams, direction, progress))
    }

    fn add_short(&mut self, to: SocketAddr, at_once: usize) -> Result<()> {
        self.add(move |progress| client::short(to, at_once, progress))
    }

    fn add(&mut self, work: impl FnOnce(&Progress) -> Result<Latencies> + Send + 'static) -> Result<()> {
        let progress = Arc::clone(&self.progress);
        let thread = thread::Builder::new().name("load-client".to_owned()).spawn(move || work(&progress))?;
        self.threads.push(thread);
        Ok(())
    }

    /// The warm-up is over.
    fn begin(&self) {
        self.progress.measuring.store(true, Ordering::Relaxed);
    }

    /// Whether a thread has given up.
    fn failed(&self) -> bool {
        self.threads.iter().any(JoinHandle::is_finished)
    }

    /// Ends it; fails when a connection failed, since the figures would then mean something else. How long each
    /// request (or short connection) took; nothing for bulk.
    pub fn finish(mut self) -> Result<Latencies> {
        self.progress.stop.store(true, Ordering::Relaxed);
        let mut latencies = Latencies::new();
        for thread in self.threads.drain(..) {
            latencies.add(&thread.join().map_err(|_| anyhow!("a load thread panicked"))??);
        }
        Ok(latencies)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.progress.stop.store(true, Ordering::Relaxed);
    }
}

/// Connections over which one message went to an echo server and back, and that are quiet since.
pub fn idle(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    let mut streams = Vec::with_capacity(count);
    for number in 0..count {
        let mut stream = connect(to)?;
        ping(&mut stream).with_context(|| format!("idle connection {number}"))?;
        streams.push(stream);
    }
    Ok(streams)
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALLED))?;
    stream.set_write_timeout(Some(STALLED))?;
    Ok(stream)
}

fn connect_all(to: SocketAddr, count: usize) -> Result<Vec<TcpStream>> {
    (0..count).map(|_| connect(to)).collect()
}

/// One message there and back.
fn ping(stream: &mut TcpStream) -> Result<()> {
    let mut message = [b'm'; MESSAGE];
    stream.write_all(&message).context("send")?;
    stream.read_exact(&mut message).context("receive")?;
    Ok(())
}

/// What a nonblocking call did: `None` when it would have had to wait.
fn unless_blocked(outcome: io::Result<usize>) -> io::Result<Option<usize>> {
    match outcome {
        Ok(count) => Ok(Some(count)),
        Err(error) if matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => {
            Ok(None)
        }
        Err(error) => Err(error),
    }
}
