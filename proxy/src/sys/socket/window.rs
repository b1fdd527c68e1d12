//! How much a peer may send ahead: the receive buffer, and the window that is made of it.

use std::fs;
use std::io;
use std::os::fd::BorrowedFd;

use super::{option, set_option};

/// `SOCK_RCVBUF_LOCK` of the kernel's `include/uapi/linux/socket.h`.
const RECEIVE_BUFFER_IS_SET: libc::c_int = 2;

/// What the kernel lets a receive buffer grow to, in bytes: the last number of `net.ipv4.tcp_rmem`, which counts for IPv6 too.
/// None when it can't be read.
pub fn largest_receive_buffer() -> Option<usize> {
    // Of the reading thread's network namespace; a new one starts with the numbers of the first.
    fs::read_to_string("/proc/sys/net/ipv4/tcp_rmem").ok()?.split_whitespace().nth(2)?.parse().ok()
}

/// The size of the receive buffer (`SO_RCVBUF`), in bytes, the kernel's own structures included.
pub fn receive_buffer(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let bytes: libc::c_int = option(socket, libc::SOL_SOCKET, libc::SO_RCVBUF)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Whether somebody has set that size, so that the kernel leaves it alone (`SO_BUF_LOCK`). `ENOPROTOOPT` before Linux 5.14.
pub fn is_receive_buffer_set(socket: BorrowedFd<'_>) -> io::Result<bool> {
    let locks: libc::c_int = option(socket, libc::SOL_SOCKET, libc::SO_BUF_LOCK)?;
    Ok(locks & RECEIVE_BUFFER_IS_SET != 0)
}

/// Sets it to twice as many bytes (`SO_RCVBUFFORCE`), which the kernel does not change then, whatever `net.core.rmem_max` says.
/// `EPERM` without `CAP_NET_ADMIN`.
pub fn set_receive_buffer(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_option(socket, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, int(bytes))
}

/// The most that the receive window may be (`TCP_WINDOW_CLAMP`), in bytes. The kernel raises it when it enlarges the receive buffer,
/// and only then.
pub fn window_clamp(socket: BorrowedFd<'_>) -> io::Result<usize> {
    let bytes: libc::c_int = option(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP)?;
    Ok(usize::try_from(bytes).unwrap_or(0))
}

/// Sets that.
pub fn set_window_clamp(socket: BorrowedFd<'_>, bytes: usize) -> io::Result<()> {
    set_option(socket, libc::IPPROTO_TCP, libc::TCP_WINDOW_CLAMP, int(bytes))
}

fn int(bytes: usize) -> libc::c_int {
    libc::c_int::try_from(bytes).unwrap_or(libc::c_int::MAX)
}
