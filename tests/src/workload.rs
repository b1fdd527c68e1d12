//! The process inside a pod, and how a test talks to it.
//!
//! One request is one message on a SOCK_SEQPACKET pair that is the workload's standard input; the answer
//! carries the socket as a file descriptor.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::{
    AddressFamily, ControlMessage, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, sendmsg,
    socketpair,
};
use serde::{Deserialize, Serialize};
use socket2::{Domain, Protocol, Socket, Type};

use crate::program;

/// Connect attempts are given up after this long, so that a test that should have been intercepted and was
/// not ends.
pub const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// What a test asks of a workload.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub enum Request {
    /// An unconnected TCP socket; `true`: IPv6.
    Socket {
        /// AF_INET6 instead of AF_INET.
        v6: bool,
    },
    /// A connected TCP socket.
    Connect(Connect),
}

/// How to connect.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Connect {
    /// Destination, `172.16.0.1:50001`; `[::ffff:172.16.0.1]:50001` uses an IPv6 socket.
    pub to: String,
    /// Bind here first.
    pub from: Option<String>,
    /// Set SO_MARK first.
    pub mark: Option<u32>,
}

impl Connect {
    /// A plain connect.
    pub fn to(address: &str) -> Self {
        Self { to: address.to_owned(), from: None, mark: None }
    }

    /// Bind to this address first.
    #[must_use]
    pub fn from(mut self, address: &str) -> Self {
        self.from = Some(address.to_owned());
        self
    }

    /// Set SO_MARK first.
    #[must_use]
    pub fn mark(mut self, mark: u32) -> Self {
        self.mark = Some(mark);
        self
    }

    /// Makes the socket and connects it, in whatever namespace the thread is.
    pub fn open(&self) -> io::Result<Socket> {
        let invalid = |error: std::net::AddrParseError| io::Error::new(io::ErrorKind::InvalidInput, error);
        let to: SocketAddr = self.to.parse().map_err(invalid)?;
        let socket = Socket::new(Domain::for_address(to), Type::STREAM, Some(Protocol::TCP))?;
        if let Some(mark) = self.mark {
            socket.set_mark(mark)?;
        }
        if let Some(from) = &self.from {
            let from: SocketAddr = from.parse().map_err(invalid)?;
            socket.set_reuse_address(true)?;
            socket.bind(&from.into())?;
        }
        // Not connect_timeout: that makes the socket nonblocking, which is another path in the kernel.
        socket.set_write_timeout(Some(CONNECT_TIMEOUT))?;
        socket.connect(&to.into()).map_err(|error| match error.raw_os_error() {
            Some(errno) if errno == nix::errno::Errno::EINPROGRESS as i32 => {
                io::Error::from_raw_os_error(nix::errno::Errno::ETIMEDOUT as i32)
            }
            _ => error,
        })?;
        socket.set_write_timeout(None)?;
        Ok(socket)
    }
}

#[derive(Serialize, Deserialize)]
enum Reply {
    Socket,
    Errno(i32),
    Error(String),
}

/// A running workload; killed on drop.
#[derive(Debug)]
pub struct Workload {
    child: Child,
    control: Mutex<OwnedFd>,
}

impl Workload {
    /// Starts `command` + `workload serve`.
    pub fn start(mut command: Command) -> Result<Self> {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = command
            .arg(program::built("workload")?)
            .arg("serve")
            .stdin(Stdio::from(theirs))
            .spawn()
            .context("start a workload")?;
        let workload = Self { child, control: Mutex::new(ours) };
        // The process has entered its namespace and cgroup when it answers.
        workload.socket(Domain::IPV4).context("the workload did not start")?;
        Ok(workload)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Connects.
    pub fn connect(&self, connect: &Connect) -> io::Result<TcpStream> {
        self.ask(&Request::Connect(connect.clone())).map(TcpStream::from)
    }

    /// An unconnected socket.
    pub fn socket(&self, domain: Domain) -> io::Result<Socket> {
        self.ask(&Request::Socket { v6: domain == Domain::IPV6 }).map(Socket::from)
    }

    fn ask(&self, request: &Request) -> io::Result<OwnedFd> {
        let control = self.control.lock().unwrap_or_else(PoisonError::into_inner);
        send(control.as_raw_fd(), &serde_json::to_vec(request)?, None)?;
        let (reply, fd) = receive(control.as_raw_fd())?;
        match (serde_json::from_slice(&reply)?, fd) {
            (Reply::Socket, Some(fd)) => Ok(fd),
            (Reply::Errno(errno), _) => Err(io::Error::from_raw_os_error(errno)),
            (Reply::Error(text), _) => Err(io::Error::other(text)),
            (Reply::Socket, None) => Err(io::Error::other("the workload sent no socket")),
        }
    }
}

impl Drop for Workload {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Answers requests on standard input until the test closes its end.
pub fn serve() -> io::Result<()> {
    let stdin = io::stdin();
    loop {
        let (request, _) = receive(stdin.as_raw_fd())?;
        if request.is_empty() {
            return Ok(());
        }
        let opened = match serde_json::from_slice(&request)? {
            Request::Socket { v6 } => {
                let domain = if v6 { Domain::IPV6 } else { Domain::IPV4 };
                Socket::new(domain, Type::STREAM, Some(Protocol::TCP))
            }
            Request::Connect(connect) => connect.open(),
        };
        let (reply, socket) = match opened {
            Ok(socket) => (Reply::Socket, Some(socket)),
            Err(error) => match error.raw_os_error() {
                Some(errno) => (Reply::Errno(errno), None),
                None => (Reply::Error(error.to_string()), None),
            },
        };
        send(stdin.as_raw_fd(), &serde_json::to_vec(&reply)?, socket.as_ref().map(AsRawFd::as_raw_fd))?;
    }
}

fn send(control: RawFd, message: &[u8], fd: Option<RawFd>) -> io::Result<()> {
    let fds = fd.map(|fd| [fd]);
    let cmsgs: Vec<_> = fds.iter().map(|fds| ControlMessage::ScmRights(fds)).collect();
    sendmsg::<()>(control, &[IoSlice::new(message)], &cmsgs, MsgFlags::MSG_NOSIGNAL, None)?;
    Ok(())
}

fn receive(control: RawFd) -> io::Result<(Vec<u8>, Option<OwnedFd>)> {
    let mut buffer = vec![0; 64 << 10];
    let mut space = nix::cmsg_space!([RawFd; 1]);
    let mut slices = [IoSliceMut::new(&mut buffer)];
    let message = recvmsg::<()>(control, &mut slices, Some(&mut space), MsgFlags::MSG_CMSG_CLOEXEC)?;
    let mut fd = None;
    for cmsg in message.cmsgs()? {
        if let ControlMessageOwned::ScmRights(fds) = cmsg {
            // SAFETY: the kernel has just installed this descriptor for us; nobody else knows its number.
            fd = fds.first().map(|&fd| unsafe { OwnedFd::from_raw_fd(fd) });
        }
    }
    let length = message.bytes;
    buffer.truncate(length);
    Ok((buffer, fd))
}
