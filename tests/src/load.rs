//! Load for measurements: servers and clients that spend as little as they can themselves.
//!
//! Threads start in the network namespace of their caller.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use hdrhistogram::Histogram;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

/// Bytes of one request, and of its response.
pub const MESSAGE: usize = 64;

/// Bytes per read and write of bulk streams.
const CHUNK: usize = 256 << 10;

/// Threads that make short connections.
const SHORT_THREADS: usize = 4;

/// How often a thread looks whether it should stop, and the longest that a stalled exchange is waited for.
const TICK: Duration = Duration::from_millis(50);
const STALLED: Duration = Duration::from_secs(10);

/// A server on threads; stops on drop.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Sends back what it gets, all connections on one thread.
    pub fn echo(address: SocketAddr) -> Result<Self> {
        let listener = listen(address)?;
        Self::start(address, move |stop| {
            if let Err(error) = serve_echo(&listener, stop) {
                eprintln!("load: the echo server ended: {error}");
            }
        })
    }

    /// Sends until the peer goes away, each connection on a thread of its own.
    pub fn source(address: SocketAddr) -> Result<Self> {
        let listener = listen(address)?;
        Self::start(address, move |stop| {
            while !stop.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok((stream, _)) => {
                        thread::spawn(move || pour(stream));
                    }
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        })
    }

    fn start(address: SocketAddr, serve: impl FnOnce(&AtomicBool) + Send + 'static) -> Result<Self> {
        let stop: Arc<AtomicBool> = Arc::default();
        let thread = {
            let stop = Arc::clone(&stop);
            thread::Builder::new().name("load-server".to_owned()).spawn(move || serve(&stop))?
        };
        Ok(Self { address, stop, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Longest time that is told from longer ones, in nanoseconds.
const LONGEST: u64 = 300_000_000_000;

/// How long things took, to three digits.
#[derive(Debug)]
pub struct Latencies(Histogram<u64>);

impl Default for Latencies {
    fn default() -> Self {
        Self::new()
    }
}

impl Latencies {
    /// None yet.
    pub fn new() -> Self {
        Self(Histogram::new_with_max(LONGEST, 3).expect("a valid range and precision"))
    }

    /// Adds one.
    pub fn record(&mut self, took: Duration) {
        self.0.saturating_record(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX));
    }

    /// The longest of the `fraction` (0 to 1) that took least; zero of nothing.
    pub fn quantile(&self, fraction: f64) -> Duration {
        Duration::from_nanos(self.0.value_at_quantile(fraction))
    }
}

/// Clients at work.
#[derive(Debug)]
pub struct Load {
    done: Arc<AtomicU64>,
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Latencies>>>,
}

impl Load {
    /// Downloads from a [`Server::source`]; counts bytes.
    pub fn bulk(to: SocketAddr, streams: usize) -> Result<Self> {
        Self::start(streams, move |done, stop, _| download(to, done, stop))
    }

    /// Sends a message and waits for its echo, on all connections at once; counts echoes.
    pub fn requests(to: SocketAddr, connections: usize) -> Result<Self> {
        let streams = connect_all(to, connections)?;
        Self::start(1, move |done, stop, latencies| exchange(&streams, done, stop, latencies))
    }

    /// Connects, exchanges one message and closes, again and again; counts connections.
    pub fn short(to: SocketAddr) -> Result<Self> {
        Self::start(SHORT_THREADS, move |done, stop, latencies| {
            while !stop.load(Ordering::Relaxed) {
                let begun = Instant::now();
                ping(&mut connect(to)?)?;
                latencies.record(begun.elapsed());
                done.fetch_add(1, Ordering::Relaxed);
            }
            Ok(())
        })
    }

    fn start<W>(threads: usize, work: W) -> Result<Self>
    where
        W: Fn(&AtomicU64, &AtomicBool, &mut Latencies) -> Result<()> + Clone + Send + 'static,
    {
        let (done, stop): (Arc<AtomicU64>, Arc<AtomicBool>) = Default::default();
        let threads = (0..threads)
            .map(|_| {
                let (done, stop, work) = (Arc::clone(&done), Arc::clone(&stop), work.clone());
                thread::Builder::new().name("load-client".to_owned()).spawn(move || {
                    let mut latencies = Latencies::new();
                    work(&done, &stop, &mut latencies).map(|()| latencies)
                })
            })
            .collect::<io::Result<_>>()?;
        Ok(Self { done, stop, threads })
    }

    /// How much was done so far.
    pub fn done(&self) -> u64 {
        self.done.load(Ordering::Relaxed)
    }

    /// Ends it; fails when a connection failed, since the figures would then mean something else. How long each
    /// request (or short connection) took; nothing for bulk.
    pub fn finish(mut self) -> Result<Latencies> {
        self.stop.store(true, Ordering::Relaxed);
        let mut latencies = Latencies::new();
        for thread in self.threads.drain(..) {
            latencies.0 += thread.join().map_err(|_| anyhow::anyhow!("a load thread panicked"))??.0;
        }
        Ok(latencies)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
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

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

fn connect(to: SocketAddr) -> Result<TcpStream> {
    let stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(STALLED))?;
    stream.set_write_timeout(Some(STALLED))?;
    Ok(stream)
}

fn connect_all(to: SocketAddr, count: usize) -> Result<Arc<[TcpStream]>> {
    (0..count).map(|_| connect(to)).collect()
}

/// One message there and back.
fn ping(stream: &mut TcpStream) -> Result<()> {
    let mut message = [b'm'; MESSAGE];
    stream.write_all(&message).context("send")?;
    stream.read_exact(&mut message).context("receive")?;
    Ok(())
}

fn pour(mut stream: TcpStream) {
    let chunk = vec![b'b'; CHUNK];
    if stream.set_nonblocking(false).is_ok() {
        while stream.write_all(&chunk).is_ok() {}
    }
}

fn download(to: SocketAddr, done: &AtomicU64, stop: &AtomicBool) -> Result<()> {
    let mut stream = connect(to)?;
    let mut chunk = vec![0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let count = stream.read(&mut chunk).context("download")?;
        ensure!(count > 0, "the download ended");
        done.fetch_add(count as u64, Ordering::Relaxed);
    }
    Ok(())
}

fn exchange(
    streams: &[TcpStream],
    done: &AtomicU64,
    stop: &AtomicBool,
    latencies: &mut Latencies,
) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    let message = [b'm'; MESSAGE];
    for (index, stream) in streams.iter().enumerate() {
        stream.set_nonblocking(true)?;
        epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
        (&*stream).write_all(&message)?;
    }
    let mut received = vec![0; streams.len()];
    let mut sent = vec![Instant::now(); streams.len()];
    let mut events = vec![EpollEvent::empty(); streams.len()];
    let mut quiet = Duration::ZERO;
    while !stop.load(Ordering::Relaxed) {
        let count = epoll.wait(&mut events, EpollTimeout::try_from(TICK)?)?;
        quiet = if count == 0 { quiet + TICK } else { Duration::ZERO };
        ensure!(quiet < STALLED, "no answer to any of {} requests", streams.len());
        for event in &events[..count] {
            let index = event.data() as usize;
            let mut stream = &streams[index];
            let mut buffer = [0; MESSAGE];
            match stream.read(&mut buffer[received[index]..]) {
                Ok(0) => bail!("a connection was closed"),
                Ok(count) => received[index] += count,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                Err(error) => return Err(error.into()),
            }
            if received[index] == MESSAGE {
                received[index] = 0;
                done.fetch_add(1, Ordering::Relaxed);
                let now = Instant::now();
                latencies.record(now - sent[index]);
                sent[index] = now;
                stream.write_all(&message)?;
            }
        }
    }
    Ok(())
}

/// Key of the listening socket among the events.
const LISTENER: u64 = u64::MAX;

fn serve_echo(listener: &TcpListener, stop: &AtomicBool) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut streams: Vec<Option<TcpStream>> = Vec::new();
    let mut vacant = Vec::new();
    let mut events = vec![EpollEvent::empty(); 512];
    let mut buffer = [0; 4096];
    while !stop.load(Ordering::Relaxed) {
        let count = epoll.wait(&mut events, EpollTimeout::try_from(TICK)?)?;
        for event in &events[..count] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    let index = vacant.pop().unwrap_or(streams.len());
                    epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
                    if index == streams.len() {
                        streams.push(Some(stream));
                    } else {
                        streams[index] = Some(stream);
                    }
                }
                continue;
            }
            let index = event.data() as usize;
            let Some(stream) = &mut streams[index] else { continue };
            let alive = match stream.read(&mut buffer) {
                Ok(0) => false,
                // An echo is small: it fits into the send buffer, or the client has stopped reading.
                Ok(count) => stream.write_all(&buffer[..count]).is_ok(),
                Err(error) => error.kind() == io::ErrorKind::WouldBlock,
            };
            if !alive {
                streams[index] = None; // closing takes it out of the epoll
                vacant.push(index);
            }
        }
    }
    Ok(())
}
