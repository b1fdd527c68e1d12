//! One measurement: what clients do, for how long, and who pays for it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use serde::{Deserialize, Serialize};

use super::server::Counter;
use super::{Direction, Latencies, Load, MESSAGE, account};

/// What clients do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Work {
    /// Bytes as fast as they go.
    Bulk {
        /// Connections.
        streams: usize,
        /// Which way.
        direction: Direction,
    },
    /// Requests on established connections, one at a time on each.
    Requests {
        /// Bytes of a request, and of its answer.
        size: usize,
        /// Connections.
        connections: usize,
    },
    /// Connections that live for one request of 64 bytes.
    Short {
        /// Connections at once.
        at_once: usize,
    },
    /// Downloads beside requests of 64 bytes.
    Mixed {
        /// Connections of the downloads.
        streams: usize,
        /// Connections of the requests.
        connections: usize,
    },
}

impl Work {
    fn start(self, echo: SocketAddr, bulk: SocketAddr) -> Result<Load> {
        let mut load = Load::new(false);
        match self {
            Self::Bulk { streams, direction } => load.add_bulk(bulk, streams, direction)?,
            Self::Requests { size, connections } => load.add_requests(echo, size, connections)?,
            Self::Short { at_once } => load.add_short(echo, at_once)?,
            Self::Mixed { streams, connections } => {
                load.add_bulk(bulk, streams, Direction::Down)?;
                load.add_requests(echo, MESSAGE, connections)?;
            }
        }
        Ok(load)
    }

    /// Whether bytes arrive at the server that count.
    fn uploads(self) -> bool {
        matches!(self, Self::Bulk { direction: Direction::Up | Direction::Both, .. })
    }

    fn has_bulk(self) -> bool {
        matches!(self, Self::Bulk { .. } | Self::Mixed { .. })
    }

    fn has_requests(self) -> bool {
        !matches!(self, Self::Bulk { .. })
    }
}

/// A measurement to make.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Job {
    /// What clients do.
    pub work: Work,
    /// Where they reach an echo.
    pub echo: SocketAddr,
    /// Where they reach bulk data.
    pub bulk: SocketAddr,
    /// How long the load runs before it is measured.
    pub warm_up: Duration,
    /// How long it is measured.
    pub measure: Duration,
    /// The processes of the proxy; none without one.
    pub proxy: Vec<u32>,
    /// The process of the servers.
    pub server: u32,
    /// The control socket of the servers.
    pub control: PathBuf,
}

/// What was measured.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Measured {
    /// How long.
    pub seconds: f64,
    /// Bytes of bulk data that arrived where they were going.
    pub bytes: u64,
    /// Requests that were answered (or connections that were used and closed).
    pub requests: u64,
    /// How long these took; `None` when there were none.
    pub latency: Option<Quantiles>,
    /// CPU time of the proxy, its servers and its clients, in nanoseconds: the scheduler's own figures.
    pub proxy_ns: u64,
    /// The same of the servers.
    pub server_ns: u64,
    /// The same of the clients.
    pub client_ns: u64,
    /// CPU time of everything on the machine, softirqs included, in nanoseconds (in steps of 10 ms).
    pub machine_ns: u64,
}

/// Latencies in seconds.
#[derive(Clone, Copy, Debug, Serialize, Deserialize)]
pub struct Quantiles {
    /// Half took no longer.
    pub p50: f64,
    /// 99 % took no longer.
    pub p99: f64,
    /// 99.9 % took no longer.
    pub p999: f64,
}

impl Quantiles {
    fn of(latencies: &Latencies) -> Option<Self> {
        let quantile = |fraction| latencies.quantile(fraction).as_secs_f64();
        (latencies.count() > 0).then(|| Self {
            p50: quantile(0.5),
            p99: quantile(0.99),
            p999: quantile(0.999),
        })
    }
}

/// Everything that is read at the beginning and at the end.
struct Sample {
    at: Instant,
    bytes: u64,
    requests: u64,
    proxy_ns: u64,
    server_ns: u64,
    client_ns: u64,
    machine_ns: u64,
}

impl Job {
    /// Runs it, in this process.
    pub fn run(&self) -> Result<Measured> {
        let mut counter = self.work.uploads().then(|| Counter::new(&self.control)).transpose()?;
        let load = self.work.start(self.echo, self.bulk)?;
        wait(&load, self.warm_up);
        load.begin();
        let before = self.sample(&load, counter.as_mut())?;
        wait(&load, self.measure);
        let after = self.sample(&load, counter.as_mut())?;
        let latencies = load.finish()?;
        let measured = Measured {
            seconds: (after.at - before.at).as_secs_f64(),
            bytes: after.bytes - before.bytes,
            requests: after.requests - before.requests,
            latency: Quantiles::of(&latencies),
            proxy_ns: after.proxy_ns - before.proxy_ns,
            server_ns: after.server_ns - before.server_ns,
            client_ns: after.client_ns - before.client_ns,
            machine_ns: after.machine_ns.saturating_sub(before.machine_ns),
        };
        ensure!(measured.bytes > 0 || !self.work.has_bulk(), "no byte arrived in {:?}", self.measure);
        ensure!(
            measured.requests > 0 || !self.work.has_requests(),
            "no request was answered in {:?}",
            self.measure
        );
        Ok(measured)
    }

    fn sample(&self, load: &Load, counter: Option<&mut Counter>) -> Result<Sample> {
        // What is counted first, in one go; reading the CPU times takes longer.
        let received = counter.map_or(Ok(0), Counter::read)?;
        let at = Instant::now();
        let bytes = load.progress.bytes.load(Ordering::Relaxed) + received;
        let requests = load.progress.requests.load(Ordering::Relaxed);
        let mut proxy_ns = 0;
        for pid in &self.proxy {
            proxy_ns += account::cpu_ns(*pid)?;
        }
        Ok(Sample {
            at,
            bytes,
            requests,
            proxy_ns,
            server_ns: account::cpu_ns(self.server)?,
            client_ns: account::cpu_ns(std::process::id())?,
            machine_ns: account::machine_busy_ns()?,
        })
    }
}

/// Sleeps, and no longer when the load has failed already.
fn wait(load: &Load, duration: Duration) {
    let until = Instant::now() + duration;
    while !load.failed() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return;
        }
        sleep(left.min(super::TICK));
    }
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, TcpListener};
    use std::os::unix::net::UnixListener;

    use super::*;
    use crate::load::Server;

    fn free() -> SocketAddr {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        listener.local_addr().expect("bound")
    }

    #[test]
    fn every_work_is_done_and_paid_for() {
        let (echo, bulk) = (Server::echo(free()).expect("listen"), Server::bulk(free()).expect("listen"));
        for work in [
            Work::Bulk { streams: 3, direction: Direction::Down },
            Work::Requests { size: MESSAGE, connections: 5 },
            Work::Requests { size: 16 << 10, connections: 2 },
            Work::Short { at_once: 4 },
            Work::Mixed { streams: 2, connections: 2 },
        ] {
            let job = Job {
                work,
                echo: echo.address(),
                bulk: bulk.address(),
                warm_up: Duration::from_millis(20),
                measure: Duration::from_millis(80),
                proxy: vec![],
                server: std::process::id(),
                control: PathBuf::new(),
            };
            let measured = job.run().unwrap_or_else(|error| panic!("{work:?}: {error:#}"));
            assert_eq!(measured.latency.is_some(), work.has_requests(), "{work:?}");
            assert_eq!(measured.bytes > 0, work.has_bulk(), "{work:?}");
            assert!(measured.client_ns > 0 && measured.proxy_ns == 0, "{work:?}: {measured:?}");
        }
    }

    #[test]
    fn uploads_are_counted_where_they_arrive() {
        let bulk = Server::bulk(free()).expect("listen");
        // A control socket that says something else: its figure is the one that counts.
        let dir = std::env::temp_dir().join(format!("tidegate-load-{}", std::process::id()));
        let _ = std::fs::remove_file(&dir);
        let control = UnixListener::bind(&dir).expect("bind");
        let teller = std::thread::spawn(move || {
            use std::io::{Read, Write};
            let (mut stream, _) = control.accept().expect("accept");
            for count in [100_u64, 142] {
                stream.read_exact(&mut [0]).expect("a question");
                stream.write_all(&count.to_ne_bytes()).expect("an answer");
            }
        });
        let job = Job {
            work: Work::Bulk { streams: 1, direction: Direction::Up },
            echo: bulk.address(),
            bulk: bulk.address(),
            warm_up: Duration::ZERO,
            measure: Duration::from_millis(10),
            proxy: vec![],
            server: std::process::id(),
            control: dir.clone(),
        };
        let measured = job.run().expect("it runs");
        teller.join().expect("no panic");
        let _ = std::fs::remove_file(&dir);
        assert_eq!(measured.bytes, 42);
    }

    #[test]
    fn a_server_that_closes_fails_the_measurement() {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).expect("bind");
        let address = listener.local_addr().expect("bound");
        std::thread::spawn(move || listener.incoming().for_each(drop));
        let job = Job {
            work: Work::Requests { size: MESSAGE, connections: 1 },
            echo: address,
            bulk: address,
            warm_up: Duration::from_mins(1),
            measure: Duration::from_mins(1),
            proxy: vec![],
            server: std::process::id(),
            control: PathBuf::new(),
        };
        let _ = job.run().expect_err("the connection is closed");
    }
}
