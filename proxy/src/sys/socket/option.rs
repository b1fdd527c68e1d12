//! Socket options by number, as Envoy's `SocketOption` names them: whatever the kernel has, without a name for it here.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

/// When an option is set.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SocketState {
    /// Before bind(2), also where there is none.
    Prebind,
    /// After bind(2) of a listening socket.
    Bound,
    /// After listen(2).
    Listening,
}

/// One call of setsockopt(2).
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct SocketOption {
    /// `SOL_SOCKET`, `IPPROTO_TCP`, …
    pub level: libc::c_int,
    /// `SO_MARK`, `TCP_USER_TIMEOUT`, …
    pub name: libc::c_int,
    /// What the kernel reads; an integer is a C `int`.
    pub value: Box<[u8]>,
    /// When.
    pub state: SocketState,
    /// Only for sockets of IPv6 (`true`) or of IPv4.
    pub ipv6: Option<bool>,
}

impl SocketOption {
    /// Sets it, if it is for sockets of this address.
    ///
    /// # Errors
    /// Whatever the kernel says.
    pub(super) fn set(&self, socket: BorrowedFd<'_>, address: SocketAddr) -> io::Result<()> {
        if self.ipv6.is_some_and(|ipv6| ipv6 != address.is_ipv6()) {
            return Ok(());
        }
        let len = libc::socklen_t::try_from(self.value.len()).unwrap_or(libc::socklen_t::MAX);
        // SAFETY: `value` is readable for `len` bytes, which are no more than it has.
        let result = unsafe {
            libc::setsockopt(socket.as_raw_fd(), self.level, self.name, self.value.as_ptr().cast(), len)
        };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}
