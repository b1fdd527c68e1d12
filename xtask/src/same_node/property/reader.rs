//! Ways to read and write other than recv and send.

use std::fs::File;
use std::io::Write;
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::errno::Errno;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{ControlMessageOwned, MsgFlags, SockaddrStorage, recvmsg, send};
use socket2::Socket;

use crate::same_node::kernel::{self, Receiver};
use crate::same_node::site::PATIENCE;
use crate::same_node::talk::{self, Drain};
use crate::same_node::trial::{Property, Trial, both};

pub(super) const ALL: &[Property] = &[
    both("splice(2) from the socket, by poll", splice_out),
    both("splice(2) into the socket", splice_in),
    both("sendfile(2) into the socket", sendfile),
    both("writev and readv", vectored),
    both("epoll, edge-triggered, reading until EAGAIN", edge),
    both("io_uring: recv into provided buffers", ring_receive),
    both("io_uring: multishot recv", ring_multishot),
    both("MSG_ZEROCOPY: data, completion", zerocopy),
];

const AMOUNT: usize = 1 << 20;

/// What has arrived, and how it ended.
fn arrived(drain: &Drain, right: bool, end: &str) -> String {
    let right = if right { "" } else { ", WRONG BYTES" };
    format!("{} bytes{right}, {end}", drain.received())
}

fn splice_out(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, AMOUNT);
    Ok(thread::scope(|scope| {
        scope.spawn(|| (talk::send_all(&left, &data), left.shutdown(Shutdown::Write)));
        spliced(&right, trial.seed).unwrap_or_else(|error| error.to_string())
    }))
}

/// Reads as proxies do: when poll says so, splice into a pipe, and the pipe to its end.
fn spliced(socket: &Socket, seed: u64) -> Result<String> {
    let (reader, writer) = nix::unistd::pipe()?;
    let (mut drain, mut right) = (Drain::new(seed), true);
    let mut buffer = vec![0; 64 << 10];
    let mut empty = 0;
    loop {
        if talk::events(socket, libc::POLLIN, PATIENCE) == "nothing" {
            return Ok(arrived(&drain, right, "then nothing"));
        }
        match kernel::splice(socket, &writer, 64 << 10) {
            Ok(0) => return Ok(arrived(&drain, right, "EOF")),
            Ok(count) => {
                let count = nix::unistd::read(&reader, &mut buffer[..count])?;
                right &= drain.check(&buffer[..count]);
            }
            // Readable, and yet nothing to read: a proxy would spin.
            Err(error) if error.raw_os_error() == Some(Errno::EAGAIN as i32) => {
                empty += 1;
                if empty > 100 {
                    return Ok(arrived(&drain, right, "then EAGAIN though poll says POLLIN"));
                }
                thread::sleep(Duration::from_millis(1));
            }
            Err(error) => return Ok(arrived(&drain, right, &error.to_string())),
        }
    }
}

fn splice_in(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, AMOUNT);
    Ok(thread::scope(|scope| {
        let sent = scope.spawn(|| -> Result<usize> {
            let (reader, writer) = nix::unistd::pipe()?;
            let mut sent = 0;
            while sent < AMOUNT {
                let filled = nix::unistd::write(&writer, &data[sent..AMOUNT.min(sent + (32 << 10))])?;
                let mut left_over = filled;
                while left_over > 0 {
                    match kernel::splice(&reader, &left, left_over) {
                        Ok(count) => left_over -= count,
                        Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {
                            talk::events(&left, libc::POLLOUT, PATIENCE);
                        }
                        Err(error) => return Err(error.into()),
                    }
                }
                sent += filled;
            }
            left.shutdown(Shutdown::Write)?;
            Ok(sent)
        });
        let seen = talk::drain(&right, trial.seed);
        match sent.join() {
            Ok(Ok(sent)) => format!("{sent} sent; {seen}"),
            Ok(Err(error)) => format!("{error}; {seen}"),
            Err(_) => "panic".to_owned(),
        }
    }))
}

fn sendfile(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let mut file = memory_file()?;
    file.write_all(&talk::bytes(trial.seed, 0, AMOUNT))?;
    Ok(thread::scope(|scope| {
        let sent = scope.spawn(|| {
            let mut sent = 0;
            while sent < AMOUNT {
                match left.sendfile(&file, sent, std::num::NonZeroUsize::new(AMOUNT - sent)) {
                    Ok(0) => break,
                    Ok(count) => sent += count,
                    Err(error) => return error.to_string(),
                }
            }
            let _ = left.shutdown(Shutdown::Write);
            format!("{sent} sent")
        });
        let seen = talk::drain(&right, trial.seed);
        format!("{}; {seen}", sent.join().unwrap_or_default())
    }))
}

/// A file without a name.
fn memory_file() -> Result<File> {
    use nix::sys::memfd::{MFdFlags, memfd_create};
    Ok(File::from(memfd_create(c"same-node", MFdFlags::MFD_CLOEXEC)?))
}

fn vectored(trial: &mut Trial<'_>) -> Result<String> {
    use std::io::{IoSlice, IoSliceMut, Read};
    let (mut left, mut right) = trial.connect()?;
    let sent = left.write_vectored(&[IoSlice::new(b"abc"), IoSlice::new(b""), IoSlice::new(b"defgh")])?;
    talk::wait_readable(&right);
    let (mut first, mut second) = ([b'.'; 2], [b'.'; 8]);
    let count = right.read_vectored(&mut [IoSliceMut::new(&mut first), IoSliceMut::new(&mut second)])?;
    let text: Vec<u8> = first.into_iter().chain(second).collect();
    Ok(format!("{sent} sent; {count}: {}", String::from_utf8_lossy(&text)))
}

fn edge(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    right.set_nonblocking(true)?;
    epoll.add(
        &right,
        EpollEvent::new(EpollFlags::EPOLLIN | EpollFlags::EPOLLRDHUP | EpollFlags::EPOLLET, 0),
    )?;
    let data = talk::bytes(trial.seed, 0, AMOUNT);
    thread::scope(|scope| {
        scope.spawn(|| {
            for piece in data.chunks(3_000) {
                talk::send_all(&left, piece);
                thread::sleep(Duration::from_micros(50));
            }
            let _ = left.shutdown(Shutdown::Write);
        });
        let mut drain = Drain::new(trial.seed);
        let mut events = [EpollEvent::empty()];
        loop {
            if epoll.wait(&mut events, EpollTimeout::from(1000_u16))? == 0 {
                return Ok(arrived(&drain, true, "then no edge"));
            }
            let seen = drain.run(&right, usize::MAX);
            if !seen.ends_with("EAGAIN") {
                return Ok(seen);
            }
        }
    })
}

fn ring_receive(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let mut receiver = Receiver::new(4, 4 << 10)?;
    receiver.start(right.as_raw_fd())?;
    thread::sleep(Duration::from_millis(20));
    talk::send_once(&left, b"first", MsgFlags::empty());
    let waited = said(receiver.wait(Duration::from_secs(1)));
    talk::send_once(&left, b"second", MsgFlags::empty());
    talk::wait_readable(&right);
    receiver.start(right.as_raw_fd())?;
    let there = said(receiver.wait(Duration::from_secs(1)));
    drop(left);
    receiver.start(right.as_raw_fd())?;
    Ok(format!("{waited}, {there}, {}", said(receiver.wait(Duration::from_secs(1)))))
}

/// Bytes that a ring's buffers have room for.
const BURST: usize = 20_000;

fn ring_multishot(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let mut receiver = Receiver::new(64, 4 << 10)?;
    receiver.start_multishot(right.as_raw_fd())?;
    let mut seen = Vec::new();
    for piece in [b"one", b"two", b"six"] {
        thread::sleep(Duration::from_millis(10));
        talk::send_once(&left, piece, MsgFlags::empty());
        seen.push(said(receiver.wait(Duration::from_secs(1))));
    }
    for from in (0..BURST).step_by(1_000) {
        talk::send_all(&left, &talk::bytes(trial.seed, from, 1_000));
    }
    let (mut drain, mut right) = (Drain::new(trial.seed), true);
    while drain.received() < BURST
        && let Some(Ok(data)) = receiver.wait(Duration::from_secs(1))
    {
        right &= drain.check(&data);
    }
    seen.push(format!("{} bytes{}", drain.received(), if right { "" } else { " (wrong)" }));
    drop(left);
    seen.push(said(receiver.wait(Duration::from_secs(1))));
    Ok(seen.join(", "))
}

fn said(outcome: Option<std::io::Result<Vec<u8>>>) -> String {
    match outcome {
        None => "nothing".to_owned(),
        Some(Ok(data)) if data.is_empty() => "EOF".to_owned(),
        Some(Ok(data)) => format!("\"{}\"", String::from_utf8_lossy(&data)),
        Some(Err(error)) => error.to_string(),
    }
}

fn zerocopy(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    kernel::set_option(&left, libc::SOL_SOCKET, libc::SO_ZEROCOPY, 1)?;
    let data = talk::bytes(trial.seed, 0, 64 << 10);
    let sent = send(left.as_raw_fd(), &data, MsgFlags::from_bits_retain(libc::MSG_ZEROCOPY));
    let seen = Drain::new(trial.seed).run(&right, data.len());
    let completed = talk::wait_until(|| completion(&left));
    let completed = if completed { "completed" } else { "never completed" };
    Ok(format!("{sent:?}; {seen}; {completed}"))
}

/// Who sends the notification (linux/errqueue.h).
const SO_EE_ORIGIN_ZEROCOPY: u8 = 5;

/// Whether the error queue has the notification that the kernel needs the data no longer.
fn completion(socket: &Socket) -> bool {
    let mut space = nix::cmsg_space!(libc::sock_extended_err, libc::sockaddr_in);
    let flags = MsgFlags::MSG_ERRQUEUE | MsgFlags::MSG_DONTWAIT;
    let Ok(message) = recvmsg::<SockaddrStorage>(socket.as_raw_fd(), &mut [], Some(&mut space), flags) else {
        return false;
    };
    message.cmsgs().is_ok_and(|mut messages| {
        messages.any(|message| {
            matches!(message, ControlMessageOwned::Ipv4RecvErr(error, _) if error.ee_origin == SO_EE_ORIGIN_ZEROCOPY)
        })
    })
}
