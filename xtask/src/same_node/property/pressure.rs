//! A reader that stalls.

use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, send};
use socket2::Socket;

use crate::same_node::talk::{self, Drain};
use crate::same_node::trial::{Property, Trial, both};

pub(super) const ALL: &[Property] = &[
    both("what a writer can send to a reader that stalls", stalled),
    both("the same, with SO_SNDBUF and SO_RCVBUF of 64 KiB", stalled_small),
    both("a blocking writer to a reader that stalls", blocks),
    both("poll: not writable while the reader stalls, writable when it has read", writable),
    both("epoll, edge-triggered: EPOLLOUT when the reader has read", edge),
    both("everything arrives after a stall", after_stall),
];

/// Where a writer that nothing stops is given up.
const LIMIT: usize = 64 << 20;
/// The same where the reader checks every byte afterwards.
const CHECKED: usize = 8 << 20;
/// Buffers of TCP may hold this much at most here (net.ipv4.tcp_wmem and tcp_rmem end at 4 and 6 MiB on most machines; the
/// kernel's own structures count too, so that it is less).
const BUFFERS: usize = 16 << 20;
const PIECE: usize = 64 << 10;

/// For sockets that hold little.
pub(super) fn small_buffers(socket: &Socket) -> std::io::Result<()> {
    socket.set_send_buffer_size(32 << 10)?;
    socket.set_recv_buffer_size(32 << 10)
}

/// Sends without blocking until it is refused or the limit is reached.
pub(super) fn fill(socket: &Socket, data: &[u8]) -> (usize, Option<Errno>) {
    let mut sent = 0;
    // The window may open a little more when what was sent has arrived.
    let mut patience = 3;
    while sent < data.len() {
        let piece = &data[sent..data.len().min(sent + PIECE)];
        match send(socket.as_raw_fd(), piece, MsgFlags::MSG_DONTWAIT | MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => sent += count,
            Err(Errno::EAGAIN) if patience > 0 => {
                patience -= 1;
                thread::sleep(Duration::from_millis(20));
            }
            Err(errno) => return (sent, Some(errno)),
        }
    }
    (sent, None)
}

/// A writer that never had to wait: the kernel holds all that it has sent.
const NO_END: &str = "no end";

fn verdict(sent: usize, stopped: Option<Errno>, bound: usize) -> String {
    match stopped {
        Some(errno) if sent <= bound => format!("{errno:?} within {} KiB", bound >> 10),
        Some(errno) => format!("{errno:?}, but after more than {} KiB", bound >> 10),
        None => format!("{NO_END}, {} MiB taken", sent >> 20),
    }
}

fn stalled(trial: &mut Trial<'_>) -> Result<String> {
    let (left, _right) = trial.connect()?;
    let (sent, stopped) = fill(&left, &vec![0; LIMIT]);
    Ok(verdict(sent, stopped, BUFFERS))
}

fn stalled_small(trial: &mut Trial<'_>) -> Result<String> {
    let (left, _right) = trial.connect_with(small_buffers)?;
    let (sent, stopped) = fill(&left, &vec![0; LIMIT]);
    Ok(verdict(sent, stopped, 512 << 10))
}

fn blocks(trial: &mut Trial<'_>) -> Result<String> {
    let (left, _right) = trial.connect_with(small_buffers)?;
    let outcome = talk::send_all(&left, &vec![0; 16 << 20]);
    Ok(if outcome.ends_with("EAGAIN") { "blocks".to_owned() } else { format!("{NO_END}, {outcome}") })
}

fn writable(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect_with(small_buffers)?;
    if fill(&left, &talk::bytes(trial.seed, 0, CHECKED)).1.is_none() {
        return Ok(NO_END.to_owned());
    }
    let wanted = libc::POLLOUT;
    let full = talk::events(&left, wanted, Duration::from_millis(50));
    talk::drain(&right, trial.seed);
    let drained = talk::events(&left, wanted, Duration::from_secs(1));
    Ok(format!("stalled: {full}; read: {drained}"))
}

fn edge(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect_with(small_buffers)?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    epoll.add(&left, EpollEvent::new(EpollFlags::EPOLLOUT | EpollFlags::EPOLLET, 0))?;
    if fill(&left, &talk::bytes(trial.seed, 0, CHECKED)).1.is_none() {
        return Ok(NO_END.to_owned());
    }
    let mut events = [EpollEvent::empty()];
    while epoll.wait(&mut events, EpollTimeout::from(50_u8))? > 0 {}
    talk::drain(&right, trial.seed);
    let count = epoll.wait(&mut events, EpollTimeout::from(1000_u16))?;
    Ok(if count > 0 { "an edge".to_owned() } else { "no edge".to_owned() })
}

fn after_stall(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect_with(small_buffers)?;
    let data = talk::bytes(trial.seed, 0, 4 << 20);
    left.set_write_timeout(Some(Duration::from_secs(5)))?;
    Ok(thread::scope(|scope| {
        let sent = scope.spawn(|| talk::send_all(&left, &data));
        thread::sleep(Duration::from_millis(100));
        let seen = Drain::new(trial.seed).run(&right, data.len());
        format!("{}; {seen}", sent.join().unwrap_or_default())
    }))
}
