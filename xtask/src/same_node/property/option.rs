//! Flags of send and recv, socket options, ioctls.

use std::os::fd::{AsRawFd, RawFd};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::socket::MsgFlags;
use socket2::Socket;

use crate::same_node::kernel;
use crate::same_node::site::PATIENCE;
use crate::same_node::talk;
use crate::same_node::trial::{Property, Trial, both, once, veth};

pub(super) const ALL: &[Property] = &[
    both("MSG_OOB: POLLPRI, the byte, the mark", urgent),
    both("MSG_OOB with SO_OOBINLINE: SIOCATMARK", urgent_inline),
    both("MSG_PEEK", peek),
    both("MSG_WAITALL over several sends", waitall),
    both("MSG_TRUNC throws away", trunc),
    both("recvmmsg", recvmmsg),
    both("SO_RCVLOWAT: poll, recv", lowat),
    both("SO_RCVTIMEO, MSG_DONTWAIT with nothing there", nothing),
    both("FIONREAD", fionread),
    once("FIONREAD and poll of data that came before the socket was in the map", fionread_early),
    both("TCP_INQ: what recvmsg says is left", inq),
    both("SIOCOUTQ while the reader stalls", outq),
    both("MSG_MORE holds data back", more),
    both("TCP_INFO: bytes_acked, bytes_received", tcp_info),
    veth("the link is down: does data arrive", link_down),
    veth("the link is down: TCP_USER_TIMEOUT of 200 ms", user_timeout),
];

const NONE: MsgFlags = MsgFlags::empty();

fn urgent(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"ab", NONE);
    talk::send_once(&left, b"c!", MsgFlags::MSG_OOB);
    talk::wait_readable(&right);
    let events = talk::events(&right, libc::POLLPRI, Duration::from_millis(50));
    let urgent = talk::receive(&right, 16, MsgFlags::MSG_OOB);
    let rest = talk::receive(&right, 16, NONE);
    Ok(format!("{events}; {urgent}; {rest}"))
}

fn urgent_inline(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    right.set_out_of_band_inline(true)?;
    talk::send_once(&left, b"ab", NONE);
    talk::send_once(&left, b"c", MsgFlags::MSG_OOB);
    talk::wait_until(|| kernel::query(&right, libc::FIONREAD).is_ok_and(|count| count == 3));
    let mut seen = Vec::new();
    for _ in 0..2 {
        let mark = kernel::query(&right, kernel::SIOCATMARK)? != 0;
        let data = talk::receive(&right, 16, NONE);
        seen.push(format!("{}{data}", if mark { "mark " } else { "" }));
    }
    Ok(seen.join(", "))
}

fn peek(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"one ", NONE);
    talk::send_once(&left, b"two", NONE);
    talk::settle();
    let peeked = talk::receive(&right, 16, MsgFlags::MSG_PEEK);
    let part = talk::receive(&right, 2, MsgFlags::MSG_PEEK);
    Ok(format!("{peeked}, {part}, {}", talk::receive(&right, 16, NONE)))
}

fn waitall(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    Ok(thread::scope(|scope| {
        let seen = scope.spawn(|| talk::receive(&right, 9, MsgFlags::MSG_WAITALL));
        for piece in [b"one", b"two", b"six"] {
            talk::settle();
            talk::send_once(&left, piece, NONE);
        }
        seen.join().unwrap_or_default()
    }))
}

fn trunc(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"away kept", NONE);
    talk::settle();
    let mut untouched = [b'.'; 5];
    let count = nix::sys::socket::recv(raw(&right), &mut untouched, MsgFlags::MSG_TRUNC);
    let touched = if untouched == *b"....." { "not copied" } else { "copied" };
    Ok(format!("{count:?}, {touched}; {}", talk::receive(&right, 16, NONE)))
}

fn recvmmsg(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"one", NONE);
    talk::send_once(&left, b"two", NONE);
    talk::settle();
    let counts = kernel::recvmmsg(&right, &[2, 3, 8, 8], libc::MSG_DONTWAIT);
    Ok(counts.map_or_else(|error| error.to_string(), |counts| format!("{counts:?}")))
}

fn lowat(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    kernel::set_option(&right, libc::SOL_SOCKET, libc::SO_RCVLOWAT, 8)?;
    talk::send_once(&left, b"1234", NONE);
    let few = talk::events(&right, libc::POLLIN, Duration::from_millis(50));
    talk::send_once(&left, b"5678", NONE);
    let enough = talk::events(&right, libc::POLLIN, PATIENCE);
    Ok(format!("4 of 8: {few}; 8: {enough}; {}", talk::receive(&right, 16, NONE)))
}

fn nothing(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let start = Instant::now();
    let waited = talk::receive(&right, 16, NONE);
    let long = if start.elapsed() >= PATIENCE.mul_f32(0.9) { "after the timeout" } else { "at once" };
    let at_once = talk::receive(&right, 16, MsgFlags::MSG_DONTWAIT);
    drop(left);
    Ok(format!("{waited} {long}, {at_once}"))
}

fn fionread(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"twelve bytes", NONE);
    talk::settle();
    let count = kernel::query(&right, libc::FIONREAD)?;
    talk::receive(&right, 5, NONE);
    Ok(format!("{count}, {}", kernel::query(&right, libc::FIONREAD)?))
}

fn fionread_early(trial: &mut Trial<'_>) -> Result<String> {
    let (_client, server) = trial.site.connect_deferred(trial.route, b"early")?;
    talk::settle();
    let events = talk::events(&server, libc::POLLIN, PATIENCE);
    let count = kernel::query(&server, libc::FIONREAD)?;
    Ok(format!("{events}, {count}, {}", talk::receive(&server, 16, NONE)))
}

fn inq(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    kernel::set_option(&right, libc::IPPROTO_TCP, TCP_INQ, 1)?;
    talk::send_once(&left, b"twelve bytes", NONE);
    talk::wait_readable(&right);
    let mut space = nix::cmsg_space!(i32);
    let mut buffer = [0; 5];
    let mut slices = [std::io::IoSliceMut::new(&mut buffer)];
    let message = nix::sys::socket::recvmsg::<()>(raw(&right), &mut slices, Some(&mut space), NONE)?;
    let told = message.cmsgs()?.next().is_some();
    Ok(format!("{} bytes, {}", message.bytes, if told { "told" } else { "not told" }))
}

/// Not in libc for all targets (linux/tcp.h).
const TCP_INQ: i32 = 36;

fn outq(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect_with(super::pressure::small_buffers)?;
    super::pressure::fill(&left, &vec![0; 1 << 20]);
    talk::settle();
    let stalled = kernel::query(&left, kernel::SIOCOUTQ)?;
    drop(right);
    Ok(if stalled > 0 { "bytes wait" } else { "nothing waits" }.to_owned())
}

fn more(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"one ", MsgFlags::from_bits_retain(libc::MSG_MORE));
    let held = talk::events(&right, libc::POLLIN, Duration::from_millis(50));
    talk::send_once(&left, b"two", NONE);
    talk::settle();
    Ok(format!("{held}; {}", talk::receive(&right, 16, NONE)))
}

fn tcp_info(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    for _ in 0..10 {
        talk::send_all(&left, &[0; 1000]);
        talk::receive(&right, 1000, MsgFlags::MSG_WAITALL);
        talk::send_all(&right, &[0; 100]);
        talk::receive(&left, 100, MsgFlags::MSG_WAITALL);
    }
    talk::wait_until(|| kernel::tcp_info(&right).is_ok_and(|info| info.tcpi_unacked == 0));
    let info = kernel::tcp_info(&left)?;
    // The SYN counts as one byte that was acknowledged.
    Ok(format!("{} and {}", info.tcpi_bytes_acked / 1000 * 1000, info.tcpi_bytes_received))
}

fn link_down(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    trial.site.set_link(false)?;
    let sent = talk::send_once(&left, b"through the wall", NONE);
    let seen = talk::receive(&right, 64, NONE);
    trial.site.set_link(true)?;
    Ok(format!("{sent}; {seen}"))
}

fn user_timeout(trial: &mut Trial<'_>) -> Result<String> {
    let (left, _right) = trial.connect()?;
    left.set_tcp_user_timeout(Some(Duration::from_millis(200)))?;
    trial.site.set_link(false)?;
    talk::send_once(&left, b"x", NONE);
    left.set_read_timeout(Some(Duration::from_secs(3)))?;
    let seen = talk::receive(&left, 64, NONE);
    trial.site.set_link(true)?;
    Ok(seen)
}

fn raw(socket: &Socket) -> RawFd {
    socket.as_raw_fd()
}
