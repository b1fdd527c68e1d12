//! What workers ask the kernel: where an accepted connection was meant to go, and "this socket is mine".

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::sync::Arc;

use tidegate_common::{OriginalDst, OwnSocket, Role, syn};

use super::bpf;
use crate::sys::socket;

/// The largest headers that the kernel keeps, bytes: IPv6 with some extension headers, and TCP with all options.
const MAX_SYN: usize = 256;

/// Reads original destinations. Clone it into each worker: one system call per connection (a second one where the SYN
/// doesn't say), no lock.
#[derive(Clone, Debug)]
pub struct OriginalDstReader {
    map: Arc<OwnedFd>,
}

impl OriginalDstReader {
    pub(super) fn new(map: Arc<OwnedFd>) -> Self {
        Self { map }
    }

    /// Where the application behind the accepted socket `fd` meant to connect (IPv4 as plain IPv4). None when no
    /// captured connect belongs to it: then another means may know (SO_ORIGINAL_DST), or it is to be reset. To be asked once:
    /// the kernel then lets go of the SYN.
    ///
    /// Errors: EBADF or ENOTSOCK when `fd` is no socket; EPERM when the process gave up CAP_BPF.
    pub fn read(&self, fd: BorrowedFd<'_>) -> io::Result<Option<SocketAddr>> {
        let mut packet = [0; MAX_SYN];
        let length = socket::saved_syn(fd, &mut packet)?;
        if let Some(destination) = syn::destination(packet.get(..length).unwrap_or_default()) {
            return Ok(Some(destination));
        }
        let stored = bpf::storage_get::<OriginalDst>(self.map.as_fd(), fd)?;
        Ok(stored
            .filter(|original| original.role == Role::Accepted as u16)
            .map(|original| SocketAddr::new(original.addr.to_ip(), original.port)))
    }
}

/// Marks sockets as the agent's own. Clone it into each worker.
#[derive(Clone, Debug)]
pub struct OwnSocketMarker {
    map: Arc<OwnedFd>,
}

impl OwnSocketMarker {
    pub(super) fn new(map: Arc<OwnedFd>) -> Self {
        Self { map }
    }

    /// Marks an upstream socket for as long as it lives: connect(2) on it is never captured. Needed only where
    /// [`super::programs::Interceptor::covers_own_cgroup`] says so. Do it before connect(2). One system call.
    ///
    /// Errors as [`OriginalDstReader::read`], and ENOMEM.
    pub fn mark(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        bpf::storage_set(self.map.as_fd(), fd, &(OwnSocket::Upstream as u32))
    }

    /// Marks a capture listener for as long as it lives, and has it keep the SYNs. Without a marked listener nothing is
    /// captured in its namespace: the programs take the agent for dead. Do it before the namespace is enrolled. Errors as
    /// [`Self::mark`].
    pub fn mark_listener(&self, fd: BorrowedFd<'_>) -> io::Result<()> {
        socket::save_syn(fd)?;
        bpf::storage_set(self.map.as_fd(), fd, &(OwnSocket::CaptureListener as u32))
    }
}
