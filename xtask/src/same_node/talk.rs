//! What one end says and the other sees, in words that can be compared.

use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use nix::errno::Errno;
use nix::sys::socket::{MsgFlags, recv, send};
use socket2::Socket;

use super::kernel;
use super::site::PATIENCE;

/// Bytes whose order shows: so many, from a place in an endless row that the seed begins.
pub(super) fn bytes(seed: u64, from: usize, length: usize) -> Vec<u8> {
    (from..from + length).map(|at| byte(seed, at as u64)).collect()
}

fn byte(seed: u64, at: u64) -> u8 {
    let mixed = (seed ^ (at >> 3)).wrapping_mul(0x9e37_79b9_7f4a_7c15);
    ((mixed ^ mixed >> 29) >> (8 * (at & 7))) as u8
}

/// Sends all of it, as often as it takes: how many bytes went, and what ended it.
pub(super) fn send_all(socket: &Socket, data: &[u8]) -> String {
    let mut sent = 0;
    while sent < data.len() {
        match send(socket.as_raw_fd(), &data[sent..], MsgFlags::MSG_NOSIGNAL) {
            Ok(count) => sent += count,
            Err(errno) => return format!("{sent} sent, {errno:?}"),
        }
    }
    format!("{sent} sent")
}

/// One send.
pub(super) fn send_once(socket: &Socket, data: &[u8], flags: MsgFlags) -> String {
    match send(socket.as_raw_fd(), data, flags | MsgFlags::MSG_NOSIGNAL) {
        Ok(count) => format!("{count} sent"),
        Err(errno) => format!("{errno:?}"),
    }
}

/// One receive.
pub(super) fn receive(socket: &Socket, length: usize, flags: MsgFlags) -> String {
    let mut buffer = vec![0; length];
    let start = Instant::now();
    match recv(socket.as_raw_fd(), &mut buffer, flags) {
        Ok(0) => "EOF".to_owned(),
        Ok(count) => match std::str::from_utf8(&buffer[..count]) {
            Ok(text) if count <= 16 => format!("\"{text}\""),
            _ => format!("{count} bytes"),
        },
        Err(Errno::EAGAIN) if blocks(socket, flags) && early(start) => TOO_EARLY.to_owned(),
        Err(errno) => format!("{errno:?}"),
    }
}

/// A receive that ought to wait says that there is nothing.
const TOO_EARLY: &str = "EAGAIN at once though the socket blocks";

fn blocks(socket: &Socket, flags: MsgFlags) -> bool {
    !flags.contains(MsgFlags::MSG_DONTWAIT) && !socket.nonblocking().unwrap_or(false)
}

/// Whether a blocking call has ended before its time was over.
fn early(start: Instant) -> bool {
    start.elapsed() < PATIENCE.mul_f32(0.9)
}

/// Receives everything to the end, or until nothing comes any more: how much was right, and how it ended.
pub(super) fn drain(socket: &Socket, seed: u64) -> String {
    Drain::new(seed).run(socket, usize::MAX)
}

/// A reader that knows what has to come.
#[derive(Debug)]
pub(super) struct Drain {
    seed: u64,
    received: usize,
}

impl Drain {
    pub(super) fn new(seed: u64) -> Self {
        Self { seed, received: 0 }
    }

    /// Receives until there are so many bytes in all, the end, or nothing comes any more.
    pub(super) fn run(&mut self, socket: &Socket, until: usize) -> String {
        let mut buffer = vec![0; 128 << 10];
        let mut too_early = 0;
        let end = loop {
            if self.received >= until {
                break String::new();
            }
            let most = buffer.len().min(until - self.received);
            let start = Instant::now();
            match recv(socket.as_raw_fd(), &mut buffer[..most], MsgFlags::empty()) {
                Ok(0) => break ", EOF".to_owned(),
                Ok(count) => {
                    if let Some(wrong) = self.wrong(&buffer[..count]) {
                        return format!("wrong byte at {wrong}");
                    }
                    self.received += count;
                }
                // Counted, and tried again: what comes after it is worth knowing.
                Err(Errno::EAGAIN)
                    if blocks(socket, MsgFlags::empty()) && early(start) && too_early < 100 =>
                {
                    too_early += 1;
                }
                Err(errno) => break format!(", {errno:?}"),
            }
        };
        let prefix = if too_early > 0 { format!("{TOO_EARLY}, then ") } else { String::new() };
        format!("{prefix}{} bytes{end}", self.received)
    }

    /// Checks data that was received elsewhere.
    pub(super) fn check(&mut self, data: &[u8]) -> bool {
        let right = self.wrong(data).is_none();
        self.received += data.len();
        right
    }

    pub(super) fn received(&self) -> usize {
        self.received
    }

    fn wrong(&self, data: &[u8]) -> Option<usize> {
        (self.received..).zip(data).find_map(|(at, &got)| (got != byte(self.seed, at as u64)).then_some(at))
    }
}

/// Waits until one of the events is there; what poll(2) shows then, or `nothing`.
pub(super) fn events(socket: &Socket, wanted: i16, within: Duration) -> String {
    match kernel::poll(socket, wanted, within) {
        Ok(0) => "nothing".to_owned(),
        Ok(events) => {
            let names = EVENTS.iter().filter(|(event, _)| events & event != 0).map(|(_, name)| *name);
            names.collect::<Vec<_>>().join("+")
        }
        Err(error) => error.to_string(),
    }
}

const EVENTS: &[(i16, &str)] = &[
    (libc::POLLIN, "IN"),
    (libc::POLLPRI, "PRI"),
    (libc::POLLOUT, "OUT"),
    (libc::POLLERR, "ERR"),
    (libc::POLLHUP, "HUP"),
    (libc::POLLRDHUP, "RDHUP"),
];

/// Waits until something can be read.
pub(super) fn wait_readable(socket: &Socket) -> bool {
    events(socket, libc::POLLIN, Duration::from_secs(1)) != "nothing"
}

/// Waits until the condition holds, at most a second.
pub(super) fn wait_until(mut condition: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    while !condition() {
        if start.elapsed() > Duration::from_secs(1) {
            return false;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    true
}

/// The pending error of a socket.
pub(super) fn pending_error(socket: &Socket) -> String {
    match socket.take_error() {
        Ok(None) => "none".to_owned(),
        Ok(Some(error)) => format!("{:?}", Errno::from_raw(error.raw_os_error().unwrap_or(0))),
        Err(error) => error.to_string(),
    }
}

/// Long enough for whatever was sent to arrive.
pub(super) fn settle() {
    std::thread::sleep(Duration::from_millis(30));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_lost_or_swapped_byte_is_found() {
        let right = bytes(7, 0, 4_000);
        assert!(Drain::new(7).check(&right));
        assert!(!Drain::new(8).check(&right), "another seed");
        for at in [0, 1, 8, 3_000] {
            let lost: Vec<_> = right[..at].iter().chain(&right[at + 1..]).copied().collect();
            assert!(!Drain::new(7).check(&lost), "without byte {at}");
        }
        let mut swapped = right.clone();
        swapped.rotate_left(100);
        assert!(!Drain::new(7).check(&swapped));
    }

    #[test]
    fn pieces_are_checked_where_they_belong() {
        let mut drain = Drain::new(7);
        assert!(drain.check(&bytes(7, 0, 1_000)) && drain.check(&bytes(7, 1_000, 500)));
        assert_eq!(drain.received(), 1_500);
        assert!(!drain.check(&bytes(7, 1_000, 500)), "twice");
    }
}
