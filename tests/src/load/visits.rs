//! Connections that remember when they were made and who was at their other end.
//!
//! Times are of CLOCK_MONOTONIC, in nanoseconds: all processes of a machine have the same.

use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, anyhow};
use nix::time::{ClockId, clock_gettime};
use serde::{Deserialize, Serialize};

use super::STALLED;

/// One connection to a server that says where it was reached ([`super::Server::whereabouts`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Visit {
    /// Before connect(2).
    pub begun: u64,
    /// When the server's answer was there.
    pub ended: u64,
    /// The address at which the server has accepted it.
    pub at: Ipv4Addr,
}

/// Now, as [`Visit`] has it.
pub fn now() -> Result<u64> {
    let now = clock_gettime(ClockId::CLOCK_MONOTONIC)?;
    Ok(now.tv_sec() as u64 * 1_000_000_000 + now.tv_nsec() as u64)
}

/// Threads that visit a server, one connection after the other on each. The first failure ends a thread.
#[derive(Debug)]
pub(super) struct Visitors {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Vec<Visit>>>>,
}

impl Visitors {
    pub(super) fn start(to: SocketAddr, count: usize) -> Result<Self> {
        let mut this = Self { stop: Arc::default(), threads: Vec::new() };
        for _ in 0..count {
            let stop = Arc::clone(&this.stop);
            let work = move || {
                let mut visits = Vec::new();
                while !stop.load(Ordering::Relaxed) {
                    let visit = visit(to).with_context(|| format!("connection {}", visits.len() + 1))?;
                    visits.push(visit);
                }
                Ok(visits)
            };
            this.threads.push(thread::Builder::new().name("load-visitor".to_owned()).spawn(work)?);
        }
        Ok(this)
    }

    /// Stops them; fails when a connection has failed.
    pub(super) fn finish(mut self) -> Result<Vec<Visit>> {
        self.stop.store(true, Ordering::Relaxed);
        let mut visits = Vec::new();
        for thread in self.threads.drain(..) {
            visits.extend(thread.join().map_err(|_| anyhow!("a visitor panicked"))??);
        }
        Ok(visits)
    }
}

impl Drop for Visitors {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

fn visit(to: SocketAddr) -> Result<Visit> {
    let begun = now()?;
    let mut stream = TcpStream::connect(to).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(STALLED))?;
    stream.write_all(b"?").context("send")?;
    let mut at = [0; 4];
    stream.read_exact(&mut at).context("receive")?;
    Ok(Visit { begun, ended: now()?, at: at.into() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::load::Server;

    #[test]
    fn a_server_says_where_it_was_reached() {
        let begin = now().expect("a clock");
        let server = Server::whereabouts("0.0.0.0:0".parse().expect("valid")).expect("listen");
        for at in [Ipv4Addr::LOCALHOST, Ipv4Addr::new(127, 0, 0, 2)] {
            let to = SocketAddr::from((at, server.address().port()));
            let before = server.accepted();
            let visitors = Visitors::start(to, 2).expect("threads");
            while server.accepted() < before + 10 {
                thread::yield_now();
            }
            let visits = visitors.finish().expect("nobody was refused");
            assert!(!visits.is_empty());
            assert!(
                visits.iter().all(|visit| visit.at == at && begin < visit.begun && visit.begun < visit.ended)
            );
        }
    }

    #[test]
    fn a_refused_connection_is_an_error() {
        let server = Server::whereabouts("127.0.0.1:0".parse().expect("valid")).expect("listen");
        let address = server.address();
        drop(server);
        let visitors = Visitors::start(address, 1).expect("threads");
        while !visitors.threads[0].is_finished() {
            thread::yield_now();
        }
        let error = visitors.finish().expect_err("nobody listens");
        assert!(format!("{error:#}").starts_with("connection 1: connect to 127.0.0.1"), "{error:#}");
    }
}
