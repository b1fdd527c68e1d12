//! TCP sockets: everything that the listeners, the connections to upstreams and the pump do to one.
//!
//! All are nonblocking and close-on-exec. Creation is in [`open`].

pub mod open;
mod option;
pub mod window;

use std::io;
use std::mem::{MaybeUninit, size_of};
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::time::Duration;

use socket2::{SockAddr, Socket};

use crate::addr::unmapped;

pub use open::{Keepalive, ListenerOptions, OpenError, StreamOptions, listen, stream};
pub use option::{SocketOption, SocketState};

/// Takes one waiting connection: nonblocking, with the address of its peer (unmapped).
///
/// `WouldBlock` when none waits. See [`is_transient_accept_error`] for what the others mean.
pub fn accept(listener: &Socket) -> io::Result<(Socket, SocketAddr)> {
    let (socket, peer) = listener.accept4(libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC)?;
    let peer = peer.as_socket().ok_or_else(not_inet)?;
    Ok((socket, unmapped(peer)))
}

/// Whether only the connection that was being accepted is lost (it was aborted, or its network failed) and
/// the next one may be taken at once. After another error (`EMFILE`, `ENFILE`, `ENOBUFS`, `ENOMEM`) the
/// connection stays in the queue: wait before the next attempt.
pub fn is_transient_accept_error(error: &io::Error) -> bool {
    matches!(
        error.raw_os_error(),
        Some(
            libc::ECONNABORTED
                | libc::EINTR
                | libc::EPERM
                | libc::EPROTO
                | libc::ENOPROTOOPT
                | libc::ENETDOWN
                | libc::ENETUNREACH
                | libc::EHOSTDOWN
                | libc::EHOSTUNREACH
                | libc::ENONET
                | libc::EOPNOTSUPP
        )
    )
}

/// Starts to connect. `Ok(false)`: under way; wait until the socket is writable, then look at [`error`].
pub fn connect(socket: &Socket, address: &SockAddr) -> io::Result<bool> {
    match socket.connect(address) {
        Ok(()) => Ok(true),
        Err(e) if e.raw_os_error() == Some(libc::EINPROGRESS) => Ok(false),
        Err(e) => Err(e),
    }
}

/// The socket's own address (unmapped).
pub fn local_addr(socket: &Socket) -> io::Result<SocketAddr> {
    Ok(unmapped(socket.local_addr()?.as_socket().ok_or_else(not_inet)?))
}

/// The address of its peer (unmapped). `ENOTCONN` once the peer has reset the connection.
pub fn peer_addr(socket: &Socket) -> io::Result<SocketAddr> {
    Ok(unmapped(socket.peer_addr()?.as_socket().ok_or_else(not_inet)?))
}

/// Where the connection was going before netfilter (`REDIRECT`, `DNAT`) changed its destination; none when
/// it changed nothing.
pub fn original_dst(socket: &Socket) -> io::Result<Option<SocketAddr>> {
    let local = socket.local_addr()?.as_socket().ok_or_else(not_inet)?;
    // A dual-stack socket with a v4-mapped address has its entry among the IPv4 ones.
    let answer = if unmapped(local).is_ipv4() { socket.original_dst_v4() } else { socket.original_dst_v6() };
    match answer {
        Ok(address) => {
            let address = unmapped(address.as_socket().ok_or_else(not_inet)?);
            Ok((address != unmapped(local)).then_some(address))
        }
        // No connection tracking entry, or no connection tracking in this kernel or namespace.
        Err(e) if matches!(e.raw_os_error(), Some(libc::ENOENT | libc::ENOPROTOOPT | libc::ENOTCONN)) => {
            Ok(None)
        }
        Err(e) => Err(e),
    }
}

/// The listening socket keeps the headers of each connection's SYN (`TCP_SAVE_SYN`).
pub fn save_syn(listener: BorrowedFd<'_>) -> io::Result<()> {
    set_option(listener, libc::IPPROTO_TCP, libc::TCP_SAVE_SYN, 1)
}

/// The IP and TCP headers of an accepted socket's SYN (`TCP_SAVED_SYN`), and how many bytes they are: 0 when the listener
/// didn't keep it, when a SYN cookie stood in for it, or when it has been read before. `InvalidInput` when they are longer
/// than the buffer.
pub fn saved_syn(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let mut len = libc::socklen_t::try_from(buffer.len()).unwrap_or(libc::socklen_t::MAX);
    let (level, name) = (libc::IPPROTO_TCP, libc::TCP_SAVED_SYN);
    // SAFETY: the buffer has room for `len` bytes; the kernel stores no more than that.
    let result = unsafe {
        libc::getsockopt(socket.as_raw_fd(), level, name, buffer.as_mut_ptr().cast(), &raw mut len)
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(len as usize) }
}

/// The pending error of the socket (`SO_ERROR`), which reading it clears.
pub fn error(socket: BorrowedFd<'_>) -> io::Result<Option<io::Error>> {
    let code: libc::c_int = option(socket, libc::SOL_SOCKET, libc::SO_ERROR)?;
    Ok((code != 0).then(|| io::Error::from_raw_os_error(code)))
}

/// Receives into `buffer`. 0 is the peer's FIN.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    // SAFETY: `buffer` is writable for its whole length.
    let n = unsafe {
        libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), libc::MSG_DONTWAIT)
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Looks at the first bytes in the receive queue and leaves them there. 0 is the peer's FIN.
pub fn peek(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_PEEK;
    // SAFETY: `buffer` is writable for its whole length.
    let n = unsafe { libc::recv(socket.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// The socket becomes readable when so many bytes are there, or a FIN (`SO_RCVLOWAT`). Under memory pressure
/// the kernel says so earlier. 1 is the default.
pub fn set_receive_low_water(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    let bytes = libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX);
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT, bytes)
}

/// `SO_RCVLOWAT`, bytes.
pub fn receive_low_water(socket: BorrowedFd<'_>) -> io::Result<libc::c_int> {
    option(socket, libc::SOL_SOCKET, libc::SO_RCVLOWAT)
}

/// Whether the peer has sent its FIN, or reset: no more bytes will come than are in the receive queue.
pub fn has_received_fin(socket: BorrowedFd<'_>) -> bool {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events: libc::POLLRDHUP, revents: 0 };
    // SAFETY: `poll` is one live pollfd, and the count says one.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    n > 0 && poll.revents & (libc::POLLRDHUP | libc::POLLHUP | libc::POLLERR) != 0
}

/// Receives up to `len` bytes and throws them away in the kernel, without a copy. 0 is the peer's FIN.
pub fn discard(socket: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: with MSG_TRUNC a TCP socket stores nothing, so a null buffer is never written to (tcp(7)).
    let n = unsafe { libc::recv(socket.as_raw_fd(), ptr::null_mut(), len, flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Sends; a dead peer is an error (`EPIPE`), never a signal.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8]) -> io::Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    // SAFETY: `bytes` is readable for its whole length.
    let n = unsafe { libc::send(socket.as_raw_fd(), bytes.as_ptr().cast(), bytes.len(), flags) };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

/// Ends the socket's direction(s). Not being connected any more is no error.
pub fn shutdown(socket: BorrowedFd<'_>, how: Shutdown) -> io::Result<()> {
    match socket2::SockRef::from(&socket).shutdown(how) {
        Err(e) if e.kind() == io::ErrorKind::NotConnected => Ok(()),
        result => result,
    }
}

/// Sends a FIN. False: the socket is not connected any more.
pub fn send_fin(socket: BorrowedFd<'_>) -> bool {
    socket2::SockRef::from(&socket).shutdown(Shutdown::Write).is_ok()
}

/// Ends the connection with a RST at once, and with it every wait on the socket. What was not sent yet is
/// dropped. The descriptor stays open and unconnected.
pub fn disconnect(socket: BorrowedFd<'_>) -> io::Result<()> {
    let address = libc::sockaddr {
        sa_family: libc::AF_UNSPEC as libc::sa_family_t,
        // The rest is not looked at.
        sa_data: [0; 14],
    };
    let len = size_of::<libc::sockaddr>() as libc::socklen_t;
    // SAFETY: `address` is a live sockaddr of exactly `len` bytes.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const address, len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// Makes the next close send a RST instead of a FIN.
pub fn reset_on_close(socket: BorrowedFd<'_>) -> io::Result<()> {
    socket2::SockRef::from(&socket).set_linger(Some(Duration::ZERO))
}

/// How many bytes (and a FIN counts as one) the peer has not acknowledged yet.
pub fn unacknowledged(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let mut bytes: libc::c_int = 0;
    // SAFETY: SIOCOUTQ (the same number as TIOCOUTQ) stores one int, and `bytes` is one.
    let result = unsafe { libc::ioctl(socket.as_raw_fd(), libc::TIOCOUTQ, &raw mut bytes) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
}

/// Whether the peer is gone for both directions (it reset, or both have sent their FIN): `POLLHUP`/`POLLERR`.
pub fn is_hung_up(socket: BorrowedFd<'_>) -> bool {
    events_now(socket, 0) & (libc::POLLHUP | libc::POLLERR) != 0
}

/// Which of `events` hold now; `POLLHUP` and `POLLERR` are always reported. As in poll(2).
pub fn events_now(socket: BorrowedFd<'_>, events: libc::c_short) -> libc::c_short {
    let mut poll = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    // SAFETY: `poll` is one live pollfd, and the count says one.
    let n = unsafe { libc::poll(&raw mut poll, 1, 0) };
    if n > 0 { poll.revents } else { 0 }
}

/// What the kernel measured on a connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Measured {
    /// Smoothed round trip time.
    pub round_trip: Duration,
    /// The shortest lately (`net.ipv4.tcp_min_rtt_wlen`, 5 minutes by default).
    pub min_round_trip: Duration,
    /// Segments sent again, over the life of the connection.
    pub retransmitted_segments: u32,
    /// Bytes sent again, over the life of the connection.
    pub retransmitted_bytes: u64,
}

/// `TCP_INFO`, as far as it is of use here.
pub fn measured(socket: BorrowedFd<'_>) -> io::Result<Measured> {
    let info: libc::tcp_info = option(socket, libc::IPPROTO_TCP, libc::TCP_INFO)?;
    Ok(Measured {
        round_trip: Duration::from_micros(info.tcpi_rtt.into()),
        min_round_trip: Duration::from_micros(info.tcpi_min_rtt.into()),
        retransmitted_segments: info.tcpi_total_retrans,
        retransmitted_bytes: info.tcpi_bytes_retrans,
    })
}

/// A type that is plain integers, so that the kernel may fill it with any bytes.
trait Plain: Copy {}
impl Plain for libc::c_int {}
impl Plain for libc::tcp_info {}

fn option<T: Plain>(socket: BorrowedFd<'_>, level: libc::c_int, name: libc::c_int) -> io::Result<T> {
    let mut value = MaybeUninit::<T>::zeroed();
    let mut len = size_of::<T>() as libc::socklen_t;
    // SAFETY: `value` has room for `len` bytes; the kernel stores no more than that.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), level, name, value.as_mut_ptr().cast(), &raw mut len) };
    if result < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: zeroed, then partly overwritten by the kernel; any bytes are a valid `Plain`.
    Ok(unsafe { value.assume_init() })
}

fn set_option(
    socket: BorrowedFd<'_>,
    level: libc::c_int,
    name: libc::c_int,
    value: libc::c_int,
) -> io::Result<()> {
    let len = size_of::<libc::c_int>() as libc::socklen_t;
    // SAFETY: `value` is one live int, and `len` is its size.
    let result = unsafe { libc::setsockopt(socket.as_raw_fd(), level, name, (&raw const value).cast(), len) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

fn not_inet() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "not an IPv4 or IPv6 socket")
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (client, listener.accept().unwrap().0.into())
    }

    fn wait_for<T>(mut attempt: impl FnMut() -> Option<T>) -> T {
        for _ in 0..5_000 {
            if let Some(value) = attempt() {
                return value;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        panic!("nothing within 5 s");
    }

    #[test]
    fn disconnect_is_a_real_reset() {
        let (mut client, server) = pair();
        send(server.as_fd(), b"bye").unwrap();
        disconnect(server.as_fd()).unwrap();
        let mut buffer = [0; 8];
        // What was acknowledged before stays readable; then comes the reset.
        let error = loop {
            match client.read(&mut buffer) {
                Ok(0) => panic!("a FIN"),
                Ok(_) => {}
                Err(e) => break e,
            }
        };
        assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    }

    #[test]
    fn discards_without_reading() {
        let (mut client, server) = pair();
        assert_eq!(discard(server.as_fd(), 10).unwrap_err().kind(), io::ErrorKind::WouldBlock);
        client.write_all(b"0123456789").unwrap();
        let n = wait_for(|| discard(server.as_fd(), 4).ok());
        assert_eq!(n, 4);
        let mut buffer = [0; 16];
        assert_eq!(receive(server.as_fd(), &mut buffer).unwrap(), 6);
        assert_eq!(&buffer[..6], b"456789");
        client.shutdown(Shutdown::Write).unwrap();
        assert_eq!(wait_for(|| discard(server.as_fd(), 4).ok()), 0);
    }

    #[test]
    fn what_the_peer_did_is_visible() {
        let (client, server) = pair();
        assert!(!is_hung_up(server.as_fd()));
        assert!(error(server.as_fd()).unwrap().is_none());
        send(server.as_fd(), b"x").unwrap();
        wait_for(|| (unacknowledged(server.as_fd()).unwrap() == 0).then_some(()));
        // Closing with an unread byte is a reset.
        wait_for(|| {
            let mut byte = [0];
            (client.peek(&mut byte).unwrap() == 1).then_some(())
        });
        drop(client);
        wait_for(|| is_hung_up(server.as_fd()).then_some(()));
        assert_eq!(error(server.as_fd()).unwrap().unwrap().kind(), io::ErrorKind::ConnectionReset);
        assert!(error(server.as_fd()).unwrap().is_none(), "reading it clears it");
        shutdown(server.as_fd(), Shutdown::Both).unwrap();
    }

    #[test]
    fn no_netfilter_no_original_destination() {
        let (_client, server) = pair();
        assert_eq!(original_dst(&server).unwrap(), None);
        assert!(measured(server.as_fd()).unwrap().round_trip > Duration::ZERO);
    }
}
