//! How far ahead a near peer may send.
//!
//! The kernel lets a receive buffer grow as long as its reader keeps up, to 6 MiB by default: what a far peer needs to keep a
//! long line full. A near one is ahead by as much then, and what it has sent has left the caches by the time that it is read. So the
//! buffer is fixed when bulk begins; small messages never come to it.

use std::cell::Cell;
use std::io;
use std::os::fd::BorrowedFd;
use std::time::Duration;

use crate::sys::socket::{self, window};

/// Who answers within this is near. The buffer below is good for more than 3 GB/s even then, whatever the packets: 1 MiB in 100 µs
/// is 10 GB/s, and the worst that drivers do is to take three times as much memory as a packet has bytes. One worker moves no more.
const NEAR: Duration = Duration::from_micros(100);
/// What the receive buffer becomes, in bytes. The kernel makes it twice what is asked for.
const BUFFER: usize = 1 << 20;
/// A window is never limited to less than this by the kernel on its own, in bytes: who has less was told to.
const SMALLEST_WINDOW: usize = 32 * 1024;

/// Whether a worker does that at all.
#[derive(Debug)]
pub(super) struct Nearby(Cell<bool>);

impl Nearby {
    /// Where the kernel doesn't let buffers grow past it, there is nothing to do.
    pub(super) fn new() -> Self {
        Self(Cell::new(window::largest_receive_buffer().is_some_and(|bytes| bytes > BUFFER)))
    }

    /// Bulk begins to come from this socket.
    pub(super) fn bulk_begins(&self, source: BorrowedFd<'_>) {
        if self.0.get() && limit(source).is_err_and(|e| will_always_be(&e)) {
            self.0.set(false);
        }
    }
}

/// What the configuration has set (`socket_options`) stays as it is; so does what has grown already: bytes would be thrown away.
fn limit(source: BorrowedFd<'_>) -> io::Result<()> {
    if window::is_receive_buffer_set(source)?
        || socket::measured(source)?.min_round_trip > NEAR
        || window::receive_buffer(source)? > BUFFER
        || window::window_clamp(source)? < SMALLEST_WINDOW
    {
        return Ok(());
    }
    window::set_receive_buffer(source, BUFFER / 2)?;
    // The kernel would leave it at what the smaller buffer had.
    window::set_window_clamp(source, BUFFER)
}

/// No capability, or a kernel that can't tell whether somebody has set the size.
fn will_always_be(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EPERM | libc::ENOPROTOOPT))
}

#[cfg(test)]
mod tests {
    use super::*;
    use socket2::Socket;
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd as _;

    fn pair() -> (TcpStream, Socket) {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        (peer, listener.accept().unwrap().0.into())
    }

    fn state(socket: &Socket) -> (bool, usize, usize) {
        let fd = socket.as_fd();
        (
            window::is_receive_buffer_set(fd).unwrap(),
            window::receive_buffer(fd).unwrap(),
            window::window_clamp(fd).unwrap(),
        )
    }

    #[test]
    fn a_near_peer_gets_a_fixed_window() {
        let (_peer, socket) = pair();
        assert!(!state(&socket).0);
        Nearby(Cell::new(true)).bulk_begins(socket.as_fd());
        assert_eq!(state(&socket), (true, BUFFER, BUFFER));
    }

    #[test]
    fn what_somebody_has_set_is_left_alone() {
        for set in [
            (|socket| socket.set_recv_buffer_size(20_000)) as fn(&Socket) -> io::Result<()>,
            |socket| window::set_receive_buffer(socket.as_fd(), 2 << 20),
            |socket| window::set_window_clamp(socket.as_fd(), 16 << 10),
        ] {
            let (_peer, socket) = pair();
            set(&socket).unwrap();
            let before = state(&socket);
            Nearby(Cell::new(true)).bulk_begins(socket.as_fd());
            assert_eq!(state(&socket), before);
        }
    }

    #[test]
    fn nothing_is_done_where_buffers_stay_small() {
        let (_peer, socket) = pair();
        let before = state(&socket);
        Nearby(Cell::new(false)).bulk_begins(socket.as_fd());
        assert_eq!(state(&socket), before);
    }

    #[test]
    fn what_the_kernel_refuses_for_good_is_not_asked_again() {
        let lasting = [libc::EPERM, libc::ENOPROTOOPT].map(io::Error::from_raw_os_error);
        assert!(lasting.iter().all(will_always_be));
        assert!(!will_always_be(&io::Error::from_raw_os_error(libc::ENOTCONN)));
    }
}
