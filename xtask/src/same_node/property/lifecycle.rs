//! Programs, maps and processes that end in the middle of a connection.

use std::os::fd::OwnedFd;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use nix::sys::socket::MsgFlags;
use socket2::Socket;

use crate::same_node::acceleration::Acceleration;
use crate::same_node::kernel;
use crate::same_node::talk::{self, Drain};
use crate::same_node::trial::{Property, Trial, both};

pub(super) const ALL: &[Property] = &[
    both("the reader's socket leaves the map while data waits", reader_leaves),
    both("the writer's socket leaves the map while data waits", writer_leaves),
    both("the program is detached while data waits", detached),
    both("the program is detached: later data goes through TCP", detached_stops),
    both("the program is replaced while data waits", replaced),
    both("everything is closed while data waits (the loader is killed)", closed),
    both("everything is closed during a transfer", closed_in_transfer),
    both("kill -9 of the writer, data not yet read", killed_writer),
    both("kill -9 of the reader, with unread data", killed_reader),
];

/// What the reader gets, when something happens between two sends.
fn between(
    trial: &mut Trial<'_>,
    what: fn(&mut Acceleration, &Socket, &Socket) -> Result<()>,
) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, 3_000);
    talk::send_all(&left, &data[..1_000]);
    talk::wait_readable(&right);
    if let Some(acceleration) = &mut trial.acceleration {
        what(acceleration, &left, &right)?;
    }
    Ok(finish(&left, &right, &data, trial.seed))
}

/// Two more sends, an end, and what the reader gets of it all.
fn finish(left: &Socket, right: &Socket, data: &[u8], seed: u64) -> String {
    talk::send_all(left, &data[1_000..2_000]);
    talk::send_all(left, &data[2_000..]);
    let _ = left.shutdown(std::net::Shutdown::Write);
    thread::sleep(Duration::from_millis(20));
    talk::drain(right, seed)
}

fn reader_leaves(trial: &mut Trial<'_>) -> Result<String> {
    between(trial, |acceleration, _, right| acceleration.remove(right))
}

fn writer_leaves(trial: &mut Trial<'_>) -> Result<String> {
    between(trial, |acceleration, left, _| acceleration.remove(left))
}

fn detached(trial: &mut Trial<'_>) -> Result<String> {
    between(trial, |acceleration, _, _| acceleration.stop())
}

fn detached_stops(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    if let Some(acceleration) = &trial.acceleration {
        acceleration.stop()?;
    }
    talk::send_all(&left, &talk::bytes(trial.seed, 0, 1_000));
    let seen = Drain::new(trial.seed).run(&right, 1_000);
    let through =
        talk::wait_until(|| kernel::tcp_info(&left).is_ok_and(|info| info.tcpi_bytes_acked >= 1_000));
    Ok(format!("{seen}, {}", if through { "through TCP" } else { "not through TCP" }))
}

fn replaced(trial: &mut Trial<'_>) -> Result<String> {
    between(trial, |acceleration, _, _| acceleration.replace())
}

fn closed(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, 3_000);
    talk::send_all(&left, &data[..1_000]);
    talk::wait_readable(&right);
    close(trial);
    Ok(finish(&left, &right, &data, trial.seed))
}

fn closed_in_transfer(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, 4 << 20);
    let seed = trial.seed;
    Ok(thread::scope(|scope| {
        scope.spawn(|| {
            for piece in data.chunks(16 << 10) {
                talk::send_all(&left, piece);
                thread::sleep(Duration::from_micros(100));
            }
            let _ = left.shutdown(std::net::Shutdown::Write);
        });
        let seen = scope.spawn(|| talk::drain(&right, seed));
        thread::sleep(Duration::from_millis(20));
        close(trial);
        seen.join().unwrap_or_default()
    }))
}

/// Closes everything; the kernel frees maps and programs a little later.
fn close(trial: &mut Trial<'_>) {
    trial.acceleration = None;
    thread::sleep(Duration::from_millis(100));
}

fn killed_writer(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_all(&left, &talk::bytes(trial.seed, 0, 1_000));
    talk::wait_readable(&right);
    killed(left)?;
    Ok(talk::drain(&right, trial.seed))
}

fn killed_reader(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_all(&left, &talk::bytes(trial.seed, 0, 1_000));
    talk::wait_readable(&right);
    killed(right)?;
    let seen = Drain::new(trial.seed).run(&left, 1);
    Ok(format!("recv {seen}; send {}", talk::send_once(&left, b"x", MsgFlags::empty())))
}

/// Gives the socket to another process and kills that.
fn killed(socket: Socket) -> Result<()> {
    let mut child = keeper(socket)?;
    child.kill().context("kill")?;
    child.wait()?;
    thread::sleep(Duration::from_millis(30));
    Ok(())
}

/// A process that has the only copy of the socket, as its standard input.
fn keeper(socket: Socket) -> Result<Child> {
    let child = Command::new("sleep")
        .arg("60")
        .stdin(Stdio::from(OwnedFd::from(socket)))
        .spawn()
        .context("run sleep")?;
    // Until the program runs, the child still has a copy of this process' descriptors that are closed by exec.
    let executable = format!("/proc/{}/exe", child.id());
    let own = std::fs::read_link("/proc/self/exe")?;
    talk::wait_until(|| std::fs::read_link(&executable).is_ok_and(|path| path != own));
    Ok(child)
}
