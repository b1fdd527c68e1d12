//! Servers: an echo, and bulk data both ways.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Socket, Type};

use super::{CHUNK, Direction, TICK, unless_blocked};
use crate::program;

/// Bytes per read of the echo server: the largest request and more.
const ECHO_BUFFER: usize = 64 << 10;

/// A server on a thread; stops on drop.
#[derive(Debug)]
pub struct Server {
    address: SocketAddr,
    stop: Arc<AtomicBool>,
    accepted: Arc<AtomicU64>,
    received: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Sends back what it gets, all connections on one thread.
    pub fn echo(address: SocketAddr) -> Result<Self> {
        Self::start::<Echo>(address)
    }

    /// Sends, takes, or both, as the first byte of a connection says; all connections on one thread.
    pub fn bulk(address: SocketAddr) -> Result<Self> {
        Self::start::<Bulk>(address)
    }

    /// Answers whatever it gets with the IPv4 address at which it was reached, all connections on one thread.
    pub fn whereabouts(address: SocketAddr) -> Result<Self> {
        Self::start::<Whereabouts>(address)
    }

    fn start<C: Connection>(address: SocketAddr) -> Result<Self> {
        let listener = listen(address)?;
        let address = listener.local_addr()?;
        let stop: Arc<AtomicBool> = Arc::default();
        let [accepted, received]: [Arc<AtomicU64>; 2] = Default::default();
        let thread = {
            let (stop, accepted, received) =
                (Arc::clone(&stop), Arc::clone(&accepted), Arc::clone(&received));
            thread::Builder::new().name("load-server".to_owned()).spawn(move || {
                if let Err(error) = serve::<C>(&listener, &stop, &accepted, &received) {
                    eprintln!("load: the server on {address} ended: {error}");
                }
            })?
        };
        Ok(Self { address, stop, accepted, received, thread: Some(thread) })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// How many connections it has accepted.
    pub fn accepted(&self) -> u64 {
        self.accepted.load(Ordering::Relaxed)
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

fn listen(address: SocketAddr) -> Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&address.into()).with_context(|| format!("bind {address}"))?;
    socket.listen(4096)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// What a server does with one connection.
trait Connection: Default {
    /// What it waits for after this: nothing new, other events, or the end.
    fn ready(
        &mut self,
        stream: &TcpStream,
        events: EpollFlags,
        buffer: &mut [u8],
        received: &AtomicU64,
    ) -> Next;
}

enum Next {
    Same,
    Wait(EpollFlags),
    End,
}

/// Key of the listening socket among the events.
const LISTENER: u64 = u64::MAX;

fn serve<C: Connection>(
    listener: &TcpListener,
    stop: &AtomicBool,
    accepted: &AtomicU64,
    received: &AtomicU64,
) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(listener.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, LISTENER))?;
    let mut connections: Vec<Option<(TcpStream, C)>> = Vec::new();
    let mut vacant = Vec::new();
    let mut ready = vec![EpollEvent::empty(); 512];
    let mut buffer = vec![0; CHUNK];
    while !stop.load(Ordering::Relaxed) {
        let count = match epoll.wait(&mut ready, EpollTimeout::try_from(TICK)?) {
            Err(Errno::EINTR) => 0,
            outcome => outcome?,
        };
        for event in &ready[..count] {
            if event.data() == LISTENER {
                while let Ok((stream, _)) = listener.accept() {
                    accepted.fetch_add(1, Ordering::Relaxed);
                    stream.set_nonblocking(true)?;
                    stream.set_nodelay(true)?;
                    let index = vacant.pop().unwrap_or(connections.len());
                    epoll.add(stream.as_fd(), EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
                    if index == connections.len() {
                        connections.push(None);
                    }
                    connections[index] = Some((stream, C::default()));
                }
                continue;
            }
            let index = event.data() as usize;
            let Some((stream, connection)) = &mut connections[index] else { continue };
            match connection.ready(stream, event.events(), &mut buffer, received) {
                Next::Same => {}
                Next::Wait(flags) => {
                    epoll.modify(stream.as_fd(), &mut EpollEvent::new(flags, index as u64))?;
                }
                Next::End => {
                    connections[index] = None; // closing takes it out of the epoll
                    vacant.push(index);
                }
            }
        }
    }
    Ok(())
}

/// What an echo connection still has to send.
#[derive(Default)]
struct Echo {
    rest: Vec<u8>,
}

impl Connection for Echo {
    fn ready(
        &mut self,
        mut stream: &TcpStream,
        _events: EpollFlags,
        buffer: &mut [u8],
        _: &AtomicU64,
    ) -> Next {
        if !self.rest.is_empty() {
            return match unless_blocked(stream.write(&self.rest)) {
                Ok(Some(count)) if count == self.rest.len() => {
                    self.rest = Vec::new();
                    Next::Wait(EpollFlags::EPOLLIN)
                }
                Ok(count) => {
                    self.rest.drain(..count.unwrap_or(0));
                    Next::Same
                }
                Err(_) => Next::End,
            };
        }
        let count = match unless_blocked(stream.read(&mut buffer[..ECHO_BUFFER])) {
            Ok(Some(0)) | Err(_) => return Next::End,
            Ok(None) => return Next::Same,
            Ok(Some(count)) => count,
        };
        match unless_blocked(stream.write(&buffer[..count])) {
            Ok(Some(sent)) if sent == count => Next::Same,
            Ok(sent) => {
                // The socket's buffer is full: nothing is read before the rest is sent.
                self.rest = buffer[sent.unwrap_or(0)..count].to_vec();
                Next::Wait(EpollFlags::EPOLLOUT)
            }
            Err(_) => Next::End,
        }
    }
}

/// The answer to every read is the connection's own address.
#[derive(Default)]
struct Whereabouts;

impl Connection for Whereabouts {
    fn ready(
        &mut self,
        mut stream: &TcpStream,
        _events: EpollFlags,
        buffer: &mut [u8],
        _: &AtomicU64,
    ) -> Next {
        match unless_blocked(stream.read(buffer)) {
            Ok(Some(0)) | Err(_) => return Next::End,
            Ok(None) => return Next::Same,
            Ok(Some(_)) => {}
        }
        // Four bytes have room: the client waits for them before it writes again.
        match stream.local_addr().map(|address| address.ip()) {
            Ok(IpAddr::V4(address)) if stream.write_all(&address.octets()).is_ok() => Next::Same,
            _ => Next::End,
        }
    }
}

/// Which way the bytes of a connection go; `None` before its first byte.
#[derive(Default)]
struct Bulk {
    direction: Option<Direction>,
}

impl Connection for Bulk {
    fn ready(
        &mut self,
        mut stream: &TcpStream,
        events: EpollFlags,
        buffer: &mut [u8],
        received: &AtomicU64,
    ) -> Next {
        let Some(_) = self.direction else {
            let mut code = [0];
            return match unless_blocked(stream.read(&mut code)) {
                Ok(None) => Next::Same,
                Ok(Some(1)) => self.turn(code[0]),
                _ => Next::End,
            };
        };
        if events.intersects(EpollFlags::EPOLLIN | EpollFlags::EPOLLHUP | EpollFlags::EPOLLERR) {
            match unless_blocked(stream.read(buffer)) {
                Ok(Some(0)) | Err(_) => return Next::End,
                Ok(count) => _ = received.fetch_add(count.unwrap_or(0) as u64, Ordering::Relaxed),
            }
        }
        if events.contains(EpollFlags::EPOLLOUT) && unless_blocked(stream.write(buffer)).is_err() {
            return Next::End;
        }
        Next::Same
    }
}

impl Bulk {
    fn turn(&mut self, code: u8) -> Next {
        self.direction = Direction::from_code(code);
        // Input is always watched: it brings the end of the connection too.
        match self.direction {
            Some(direction) if direction.sends_from_server() => {
                Next::Wait(EpollFlags::EPOLLIN | EpollFlags::EPOLLOUT)
            }
            Some(_) => Next::Same,
            None => Next::End,
        }
    }
}

impl Direction {
    fn sends_from_server(self) -> bool {
        self.receives()
    }
}

/// Where the servers of a [`Process`] listen.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Addresses {
    /// Sends back what it gets.
    pub echo: SocketAddr,
    /// Sends or takes, as the client says.
    pub bulk: SocketAddr,
}

#[derive(Serialize, Deserialize)]
struct Order {
    addresses: Addresses,
    /// A Unix socket that tells how many bytes have arrived: clients of uploads can't know.
    control: PathBuf,
}

/// Servers in a process of their own. Ends on drop.
#[derive(Debug)]
pub struct Process {
    child: Child,
    addresses: Addresses,
    control: PathBuf,
}

impl Process {
    /// Starts them through `command` (which enters a namespace, say), with a control socket in `dir`.
    pub fn start(mut command: Command, addresses: Addresses, dir: &Path) -> Result<Self> {
        let control = dir.join("server.sock");
        let order = serde_json::to_string(&Order { addresses: addresses.clone(), control: control.clone() })?;
        let mut child = command
            .arg(program::built("workload")?)
            .args(["load-server", &order])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the servers")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no stdout")?).read_line(&mut line)?;
        let process = Self { child, addresses, control };
        ensure!(line == "ready\n", "the servers at {:?} do not start", process.addresses);
        Ok(process)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Where they listen.
    pub fn addresses(&self) -> &Addresses {
        &self.addresses
    }

    /// The socket that tells how many bytes have arrived.
    pub fn control(&self) -> &Path {
        &self.control
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `workload load-server`: serves until standard input ends.
pub fn run(order: &str) -> Result<()> {
    let order: Order = serde_json::from_str(order).context("what to serve")?;
    super::agent::raise_file_limit()?;
    let _echo = Server::echo(order.addresses.echo)?;
    let bulk = Server::bulk(order.addresses.bulk)?;
    let control = UnixListener::bind(&order.control)
        .with_context(|| format!("the control socket {}", order.control.display()))?;
    let received = Arc::clone(&bulk.received);
    thread::spawn(move || {
        for stream in control.incoming().flatten() {
            let received = Arc::clone(&received);
            thread::spawn(move || tell(stream, &received));
        }
    });
    println!("ready");
    std::io::stdin().read_to_end(&mut Vec::new())?;
    Ok(())
}

/// Answers each byte with the count.
fn tell(mut stream: UnixStream, received: &AtomicU64) {
    let mut question = [0];
    while stream.read_exact(&mut question).is_ok() {
        if stream.write_all(&received.load(Ordering::Relaxed).to_ne_bytes()).is_err() {
            return;
        }
    }
}

/// Bytes that have arrived at the bulk server of a [`Process`].
#[derive(Debug)]
pub(super) struct Counter(UnixStream);

impl Counter {
    pub(super) fn new(control: &Path) -> Result<Self> {
        let stream =
            UnixStream::connect(control).with_context(|| format!("the servers at {}", control.display()))?;
        Ok(Self(stream))
    }

    pub(super) fn read(&mut self) -> Result<u64> {
        let mut answer = [0; 8];
        self.0.write_all(b"?")?;
        self.0.read_exact(&mut answer)?;
        Ok(u64::from_ne_bytes(answer))
    }
}

#[cfg(test)]
mod tests {
    use std::io::Read as _;
    use std::net::{Ipv4Addr, Shutdown};

    use super::*;

    fn free() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        listener.local_addr().expect("bound")
    }

    #[test]
    fn an_echo_larger_than_socket_buffers_comes_back() {
        let server = Server::echo(free()).expect("listen");
        let stream = TcpStream::connect(server.address()).expect("connect");
        let sent: Vec<u8> = (0..32_u32 << 20).map(|index| (index % 251) as u8).collect();
        let writer = {
            let (mut stream, sent) = (stream.try_clone().expect("clone"), sent.clone());
            thread::spawn(move || stream.write_all(&sent))
        };
        // The server runs into a full buffer before anybody reads.
        thread::sleep(std::time::Duration::from_millis(50));
        let mut received = vec![0; sent.len()];
        (&stream).read_exact(&mut received).expect("the echo");
        writer.join().expect("no panic").expect("sent");
        assert!(received == sent);
    }

    #[test]
    fn bulk_goes_the_way_that_the_client_says() {
        let server = Server::bulk(free()).expect("listen");
        let mut down = TcpStream::connect(server.address()).expect("connect");
        down.write_all(&[Direction::Down.code()]).expect("send");
        down.read_exact(&mut vec![0; 3 << 20]).expect("a download");
        assert_eq!(server.received.load(Ordering::Relaxed), 0);

        let mut up = TcpStream::connect(server.address()).expect("connect");
        up.write_all(&[Direction::Up.code()]).expect("send");
        up.write_all(&vec![0; 3 << 20]).expect("an upload");
        up.shutdown(Shutdown::Write).expect("shutdown");
        assert_eq!(up.read(&mut [0]).expect("the end"), 0, "an uploader gets nothing");
        assert_eq!(server.received.load(Ordering::Relaxed), 3 << 20);

        let mut wrong = TcpStream::connect(server.address()).expect("connect");
        wrong.write_all(b"?").expect("send");
        assert_eq!(wrong.read(&mut [0]).expect("the end"), 0);
    }
}
