//! What clients do: each function is one thread and ends when it is told to.

use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::AsFd;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use socket2::{Domain, Socket, Type};

use super::{CHUNK, Direction, Latencies, MESSAGE, Progress, STALLED, TICK, unless_blocked};

/// Waits for events and notices when there have been none for too long.
struct Events {
    epoll: Epoll,
    ready: Vec<EpollEvent>,
    quiet: Duration,
}

impl Events {
    fn new(room: usize) -> Result<Self> {
        let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
        Ok(Self { epoll, ready: vec![EpollEvent::empty(); room.clamp(1, 1024)], quiet: Duration::ZERO })
    }

    fn watch(&self, stream: impl AsFd, flags: EpollFlags, index: usize) -> Result<()> {
        Ok(self.epoll.add(stream, EpollEvent::new(flags, index as u64))?)
    }

    /// How many of `ready` are filled.
    fn wait(&mut self) -> Result<usize> {
        let count = match self.epoll.wait(&mut self.ready, EpollTimeout::try_from(TICK)?) {
            Err(Errno::EINTR) => 0,
            outcome => outcome?,
        };
        self.quiet = if count == 0 { self.quiet + TICK } else { Duration::ZERO };
        ensure!(self.quiet < STALLED, "nothing has moved on any connection for {STALLED:?}");
        Ok(count)
    }
}

/// Bytes as fast as they go.
pub(super) fn bulk(streams: &[TcpStream], direction: Direction, progress: &Progress) -> Result<Latencies> {
    let mut events = Events::new(streams.len())?;
    let mut flags = EpollFlags::empty();
    flags.set(EpollFlags::EPOLLIN, direction.receives());
    flags.set(EpollFlags::EPOLLOUT, direction.sends());
    for (index, mut stream) in streams.iter().enumerate() {
        stream.write_all(&[direction.code()])?;
        stream.set_nonblocking(true)?;
        events.watch(stream, flags, index)?;
    }
    let (mut incoming, outgoing) = (vec![0; CHUNK], vec![b'b'; CHUNK]);
    while !progress.stopped() {
        for position in 0..events.wait()? {
            let event = events.ready[position];
            let mut stream = &streams[event.data() as usize];
            if event.events().contains(EpollFlags::EPOLLIN) {
                match unless_blocked(stream.read(&mut incoming)).context("download")? {
                    Some(0) => bail!("the download ended"),
                    Some(count) => _ = progress.bytes.fetch_add(count as u64, Ordering::Relaxed),
                    None => {}
                }
            }
            if event.events().contains(EpollFlags::EPOLLOUT) {
                unless_blocked(stream.write(&outgoing)).context("upload")?;
            }
        }
    }
    Ok(Latencies::new())
}

/// How far a connection is with its request.
#[derive(Clone, Copy)]
struct Exchange {
    sent: usize,
    received: usize,
    begun: Instant,
}

/// A message and its echo on every connection, again and again.
pub(super) fn exchange(streams: &[TcpStream], size: usize, progress: &Progress) -> Result<Latencies> {
    let mut events = Events::new(streams.len())?;
    let mut latencies = Latencies::new();
    let message = vec![b'm'; size];
    let mut buffer = vec![0; size];
    let mut exchanges = vec![Exchange { sent: 0, received: 0, begun: Instant::now() }; streams.len()];
    for (index, (stream, exchange)) in streams.iter().zip(&mut exchanges).enumerate() {
        stream.set_nonblocking(true)?;
        // Edges: what could not be written goes on when there is room, and that is rare.
        events.watch(stream, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, index)?;
        exchange.send(stream, &message)?;
    }
    while !progress.stopped() {
        for position in 0..events.wait()? {
            let event = events.ready[position];
            let index = event.data() as usize;
            let (stream, exchange) = (&streams[index], &mut exchanges[index]);
            if exchange.sent < size {
                exchange.send(stream, &message)?;
            }
            if event.events().contains(EpollFlags::EPOLLIN) && exchange.receive(stream, &mut buffer)? {
                let now = Instant::now();
                progress.requests.fetch_add(1, Ordering::Relaxed);
                if progress.measuring.load(Ordering::Relaxed) {
                    latencies.record(now - exchange.begun);
                }
                *exchange = Exchange { sent: 0, received: 0, begun: now };
                exchange.send(stream, &message)?;
            }
        }
    }
    Ok(latencies)
}

impl Exchange {
    /// Sends as much of the rest as there is room for.
    fn send(&mut self, mut stream: &TcpStream, message: &[u8]) -> Result<()> {
        while self.sent < message.len() {
            match unless_blocked(stream.write(&message[self.sent..])).context("send a request")? {
                Some(count) => self.sent += count,
                None => break,
            }
        }
        Ok(())
    }

    /// Whether the whole echo is there. One read, unless it brings a part only: nothing else can follow an echo.
    fn receive(&mut self, mut stream: &TcpStream, buffer: &mut [u8]) -> Result<bool> {
        while self.received < buffer.len() {
            match unless_blocked(stream.read(&mut buffer[self.received..])).context("receive an answer")? {
                Some(0) => bail!("a connection was closed"),
                Some(count) => self.received += count,
                None => return Ok(false),
            }
        }
        Ok(true)
    }
}

/// A connection that lives for one message.
struct Short {
    stream: TcpStream,
    sent: bool,
    received: usize,
    begun: Instant,
}

/// Connects, exchanges one message and closes, again and again, on so many connections at once.
pub(super) fn short(to: SocketAddr, at_once: usize, progress: &Progress) -> Result<Latencies> {
    let mut events = Events::new(at_once)?;
    let mut latencies = Latencies::new();
    let mut slots = (0..at_once).map(|index| Short::open(to, &events, index)).collect::<Result<Vec<_>>>()?;
    while !progress.stopped() {
        for position in 0..events.wait()? {
            let event = events.ready[position];
            let index = event.data() as usize;
            if !slots[index].go_on(event.events())? {
                continue;
            }
            progress.requests.fetch_add(1, Ordering::Relaxed);
            let begun = slots[index].begun;
            // Closing the old one is part of what the new one replaces.
            slots[index] = Short::open(to, &events, index)?;
            if progress.measuring.load(Ordering::Relaxed) {
                latencies.record(slots[index].begun - begun);
            }
        }
    }
    Ok(latencies)
}

impl Short {
    fn open(to: SocketAddr, events: &Events, index: usize) -> Result<Self> {
        let begun = Instant::now();
        let socket = Socket::new(Domain::for_address(to), Type::STREAM.nonblocking(), None)?;
        socket.set_tcp_nodelay(true)?;
        match socket.connect(&to.into()) {
            Err(error) if error.raw_os_error() != Some(Errno::EINPROGRESS as i32) => {
                return Err(error).with_context(|| format!("connect to {to}"));
            }
            _ => {}
        }
        let stream = TcpStream::from(socket);
        events.watch(&stream, EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, index)?;
        Ok(Self { stream, sent: false, received: 0, begun })
    }

    /// Whether the message has come back.
    fn go_on(&mut self, events: EpollFlags) -> Result<bool> {
        if !self.sent {
            if !events.contains(EpollFlags::EPOLLOUT) {
                return Ok(false);
            }
            if let Some(error) = self.stream.take_error()? {
                return Err(error).context("connect");
            }
            self.stream.write_all(&[b'm'; MESSAGE]).context("send a request")?;
            self.sent = true;
            return Ok(false);
        }
        let mut buffer = [0; MESSAGE];
        match unless_blocked(self.stream.read(&mut buffer[self.received..])) {
            Ok(Some(0)) => {
                Err(io::Error::from(io::ErrorKind::UnexpectedEof)).context("a connection was closed")
            }
            Ok(Some(count)) => {
                self.received += count;
                Ok(self.received == MESSAGE)
            }
            Ok(None) => Ok(false),
            Err(error) => Err(error).context("receive an answer"),
        }
    }
}
