//! How fast: requests and bulk, as ratios to plain TCP.

use std::os::fd::AsRawFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::Result;
use nix::sys::epoll::{Epoll, EpollCreateFlags, EpollEvent, EpollFlags, EpollTimeout};
use nix::sys::socket::{MsgFlags, recv, send};
use socket2::Socket;

use super::acceleration::Acceleration;
use super::site::{Pair, Route, Site};

/// Length of one measurement.
const MEASURE: Duration = Duration::from_millis(300);
/// How often each of the two is measured, in turns.
const ROUNDS: usize = 7;
/// Bytes that a bulk writer may be ahead of its reader: nothing else limits it when it is accelerated.
const AHEAD: u64 = 4 << 20;
const PIECE: usize = 64 << 10;

/// What moves.
#[derive(Clone, Copy, Debug)]
enum Load {
    /// Requests and answers of so many bytes, on so many connections at once.
    Requests { bytes: usize, connections: usize },
    /// One stream of sends of 64 KiB.
    Bulk,
}

const LOADS: &[(&str, Load)] = &[
    ("requests of 64 B, 1 connection", Load::Requests { bytes: 64, connections: 1 }),
    ("requests of 64 B, 64 connections", Load::Requests { bytes: 64, connections: 64 }),
    ("requests of 16 KiB, 1 connection", Load::Requests { bytes: 16 << 10, connections: 1 }),
    ("requests of 16 KiB, 64 connections", Load::Requests { bytes: 16 << 10, connections: 64 }),
    ("bulk, 1 stream", Load::Bulk),
];

/// Measures everything and prints the medians of the ratios of each round.
pub(super) fn run(site: &Site) -> Result<()> {
    println!("| load | loopback | veth |\n|---|---|---|");
    for (name, load) in LOADS {
        let mut cells = Vec::new();
        for route in [Route::Loopback, Route::Veth] {
            let mut ratios = Vec::with_capacity(ROUNDS);
            for _ in 0..ROUNDS {
                let plain = measure(site, route, *load)?;
                let acceleration = Acceleration::attach(site.cgroup())?;
                ratios.push(measure(site, route, *load)? / plain);
                anyhow::ensure!(acceleration.counts()?.redirected > 0, "nothing was accelerated");
            }
            ratios.sort_by(f64::total_cmp);
            cells.push(format!("{:.2} ({:.2} to {:.2})", ratios[ROUNDS / 2], ratios[0], ratios[ROUNDS - 1]));
        }
        println!("| {name} | {} | {} |", cells[0], cells[1]);
    }
    println!(
        "\naccelerated / TCP, median of {ROUNDS} rounds of {} ms (lowest to highest)",
        MEASURE.as_millis()
    );
    Ok(())
}

/// Requests or bytes a second.
fn measure(site: &Site, route: Route, load: Load) -> Result<f64> {
    match load {
        Load::Requests { bytes, connections } => {
            let pairs =
                (0..connections).map(|_| site.connect(route, |_| Ok(()))).collect::<Result<Vec<_>>>()?;
            requests(pairs, bytes)
        }
        Load::Bulk => bulk(&site.connect(route, |_| Ok(()))?),
    }
}

fn requests(pairs: Vec<Pair>, bytes: usize) -> Result<f64> {
    let (clients, servers): (Vec<_>, Vec<_>) = pairs.into_iter().unzip();
    thread::scope(|scope| {
        let server = scope.spawn(|| answer(&servers, bytes));
        let data = vec![0; bytes];
        let mut buffer = vec![0; bytes];
        let start = Instant::now();
        let mut count = 0;
        while start.elapsed() < MEASURE {
            for client in &clients {
                send(client.as_raw_fd(), &data, MsgFlags::MSG_NOSIGNAL)?;
            }
            for client in &clients {
                receive_exactly(client, &mut buffer)?;
                count += 1;
            }
        }
        let rate = f64::from(count) / start.elapsed().as_secs_f64();
        drop(clients);
        server.join().map_err(|_| anyhow::anyhow!("the server panicked"))??;
        Ok(rate)
    })
}

/// Answers until all clients are gone.
fn answer(servers: &[Socket], bytes: usize) -> Result<()> {
    let epoll = Epoll::new(EpollCreateFlags::EPOLL_CLOEXEC)?;
    for (index, server) in servers.iter().enumerate() {
        epoll.add(server, EpollEvent::new(EpollFlags::EPOLLIN, index as u64))?;
    }
    let mut events = vec![EpollEvent::empty(); servers.len()];
    let mut buffer = vec![0; bytes];
    let mut left = servers.len();
    while left > 0 {
        let count = epoll.wait(&mut events, EpollTimeout::from(2_000_u16))?;
        anyhow::ensure!(count > 0, "no request for 2 s");
        for event in &events[..count] {
            let server = &servers[event.data() as usize];
            if receive_exactly(server, &mut buffer)? {
                send(server.as_raw_fd(), &buffer, MsgFlags::MSG_NOSIGNAL)?;
            } else {
                epoll.delete(server)?;
                left -= 1;
            }
        }
    }
    Ok(())
}

/// Fills the buffer; false at the end.
fn receive_exactly(socket: &Socket, buffer: &mut [u8]) -> Result<bool> {
    let mut received = 0;
    while received < buffer.len() {
        match recv(socket.as_raw_fd(), &mut buffer[received..], MsgFlags::empty())? {
            0 => return Ok(false),
            count => received += count,
        }
    }
    Ok(true)
}

fn bulk((writer, reader): &Pair) -> Result<f64> {
    let (sent, received, over) = (AtomicU64::new(0), AtomicU64::new(0), AtomicBool::new(false));
    thread::scope(|scope| {
        let writing = scope.spawn(|| -> Result<()> {
            let data = vec![0; PIECE];
            while !over.load(Ordering::Relaxed) {
                if sent.load(Ordering::Relaxed) > received.load(Ordering::Relaxed) + AHEAD {
                    thread::yield_now();
                    continue;
                }
                let count = send(writer.as_raw_fd(), &data, MsgFlags::MSG_NOSIGNAL)?;
                sent.fetch_add(count as u64, Ordering::Relaxed);
            }
            writer.shutdown(std::net::Shutdown::Write)?;
            Ok(())
        });
        let mut buffer = vec![0; PIECE];
        let start = Instant::now();
        while start.elapsed() < MEASURE {
            let count = recv(reader.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            received.fetch_add(count as u64, Ordering::Relaxed);
        }
        let rate = received.load(Ordering::Relaxed) as f64 / start.elapsed().as_secs_f64();
        over.store(true, Ordering::Relaxed);
        // The writer may wait for room.
        while recv(reader.as_raw_fd(), &mut buffer, MsgFlags::empty())? > 0 {}
        writing.join().map_err(|_| anyhow::anyhow!("the writer panicked"))??;
        Ok(rate)
    })
}
