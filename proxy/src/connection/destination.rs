//! Where a connection was meant to go before something redirected it.

use std::net::SocketAddr;
use std::os::fd::AsFd;

use socket2::Socket;

use crate::addr::{OriginalDst, unmapped};
use crate::intercept::Capture;
use crate::sys::socket;

/// The original destination of an accepted connection; none when it was made to our own address.
///
/// In this order: what eBPF put into the SYN or stored with the socket, what conntrack knows (iptables and nftables REDIRECT), the
/// socket's own address where that is not the listening socket's (TPROXY).
pub fn restore(
    socket: &Socket,
    local: SocketAddr,
    capture: Option<&Capture>,
    transparent: bool,
) -> Option<OriginalDst> {
    if let Some(capture) = capture {
        match capture.original_dst.read(socket.as_fd()) {
            Ok(Some(address)) => return Some(OriginalDst(unmapped(address))),
            Ok(None) => {}
            Err(error) => tracing::debug!(%error, "the storage of an accepted socket can't be read"),
        }
    }
    match socket::original_dst(socket) {
        Ok(Some(address)) => Some(OriginalDst(address)),
        Ok(None) => transparent.then_some(OriginalDst(local)),
        Err(error) => {
            tracing::debug!(%error, "the original destination can't be read");
            None
        }
    }
}
