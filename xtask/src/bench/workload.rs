//! What is measured, and how.

use std::fmt;
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use tidegate_tests::load::job::{Job, Measured, Work};
use tidegate_tests::load::{Direction, account};

use super::metric::Metric;
use super::running::{self, Running};
use super::site::{Placement, Site};
use super::subject::Subject;
use super::tools::Programs;
use super::{external, interception};

/// Connections at once of the short ones.
const SHORT_AT_ONCE: usize = 16;

/// Connections of the small requests beside bulk streams.
const MIXED_CONNECTIONS: usize = 8;

/// Idle connections whose memory is measured, where 20,000 files may be open: a proxy has two for each.
const IDLE_CONNECTIONS: usize = 9000;

/// Files that a proxy has beside those of connections, and then some.
const OTHER_FILES: u64 = 1500;

/// How long a load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(200);

/// How long a proxy is left alone before its memory is read.
const SETTLE: Duration = Duration::from_millis(1200);

/// How long idle connections are watched.
const IDLE_WATCH: Duration = Duration::from_secs(1);

/// Streams of bulk: one, some, many.
pub(super) const STREAMS: [usize; 3] = [1, 8, 64];

/// Ways of bulk.
pub(super) const DIRECTIONS: [Direction; 3] = [Direction::Down, Direction::Up, Direction::Both];

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Workload {
    /// Bytes as fast as they go.
    Bulk { streams: usize, direction: Direction },
    /// Requests on established connections.
    Request { size: usize, connections: usize },
    /// Connections that live for one small request.
    Short,
    /// So many downloads beside small requests.
    Mixed { streams: usize },
    /// iperf3, downloading over so many streams.
    Iperf3 { streams: usize },
    /// wrk against a small HTTP server, over so many connections.
    Wrk { connections: usize },
    /// What interception costs whoever connects.
    Intercept,
    /// Memory, at start and with idle connections.
    Idle,
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&match self {
            Self::Bulk { streams, direction } => format!("bulk-{streams}-{}", word(*direction)),
            Self::Request { size, connections } => format!("request-{size}x{connections}"),
            Self::Short => "short".to_owned(),
            Self::Mixed { streams } => format!("mixed-{streams}"),
            Self::Iperf3 { streams } => format!("iperf3-{streams}"),
            Self::Wrk { connections } => format!("wrk-{connections}"),
            Self::Intercept => "intercept".to_owned(),
            Self::Idle => "idle".to_owned(),
        })
    }
}

/// What follows the streams in the name of a bulk workload.
fn word(direction: Direction) -> &'static str {
    match direction {
        Direction::Down => "down",
        Direction::Up => "up",
        Direction::Both => "both",
    }
}

impl FromStr for Workload {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let count = |text: &str| text.parse().ok().filter(|count| (1..=4096).contains(count));
        let parts: Vec<_> = text.split('-').collect();
        let workload = match parts[..] {
            ["idle"] => Some(Self::Idle),
            ["intercept"] => Some(Self::Intercept),
            ["short"] => Some(Self::Short),
            ["mixed"] => Some(Self::MIXED),
            ["mixed", streams] => count(streams).map(|streams| Self::Mixed { streams }),
            ["iperf3", streams] => count(streams).map(|streams| Self::Iperf3 { streams }),
            ["wrk", connections] => count(connections).map(|connections| Self::Wrk { connections }),
            ["bulk", streams, direction] => {
                let direction = DIRECTIONS.into_iter().find(|known| word(*known) == direction);
                count(streams).zip(direction).map(|(streams, direction)| Self::Bulk { streams, direction })
            }
            ["request", shape] => shape.split_once('x').and_then(|(size, connections)| {
                let size = size.parse().ok().filter(|size| (1..=1 << 20).contains(size))?;
                count(connections).map(|connections| Self::Request { size, connections })
            }),
            _ => None,
        };
        workload.ok_or_else(|| {
            "workloads are bulk-STREAMS-down|up|both, request-BYTESxCONNECTIONS, short, mixed-STREAMS, idle, \
             intercept, iperf3-STREAMS, wrk-CONNECTIONS"
                .to_owned()
        })
    }
}

impl Workload {
    pub(super) const MIXED: Self = Self::Mixed { streams: 64 };

    /// Downloads over one stream, some, many.
    pub(super) const DOWNLOADS: [Self; 3] =
        [Self::down(STREAMS[0]), Self::down(STREAMS[1]), Self::down(STREAMS[2])];

    /// Requests of every size on one connection, some, many.
    pub(super) const REQUESTS: [Self; 9] = [
        Self::request(64, 1),
        Self::request(64, 64),
        Self::request(64, 512),
        Self::request(1024, 1),
        Self::request(1024, 64),
        Self::request(1024, 512),
        Self::request(16384, 1),
        Self::request(16384, 64),
        Self::request(16384, 512),
    ];

    pub(super) const fn down(streams: usize) -> Self {
        Self::Bulk { streams, direction: Direction::Down }
    }

    pub(super) const fn up(streams: usize) -> Self {
        Self::Bulk { streams, direction: Direction::Up }
    }

    pub(super) const fn request(size: usize, connections: usize) -> Self {
        Self::Request { size, connections }
    }

    /// What it is, for people.
    pub(super) fn title(self) -> String {
        let many = |count: usize, what: &str| format!("{count} {what}{}", if count == 1 { "" } else { "s" });
        match self {
            Self::Bulk { streams, direction } => {
                let direction = match direction {
                    Direction::Down => "down",
                    Direction::Up => "up",
                    Direction::Both => "both ways",
                };
                format!("bulk, {} {direction}", many(streams, "stream"))
            }
            Self::Request { size, connections } => format!("{size} B, {}", many(connections, "connection")),
            Self::Short => "connect, 64 B, close".to_owned(),
            Self::Mixed { streams } => format!("64 B beside {}", many(streams, "bulk stream")),
            Self::Iperf3 { streams } => format!("iperf3, {}", many(streams, "stream")),
            Self::Wrk { connections } => format!("wrk, {}", many(connections, "connection")),
            Self::Intercept => "interception".to_owned(),
            Self::Idle => "idle connections".to_owned(),
        }
    }

    /// Whether the clients of a subject can do it.
    pub(super) fn suits(self, subject: Subject) -> bool {
        self != Self::Intercept || subject.is_captured_by_ebpf()
    }

    pub(super) fn work(self) -> Option<Work> {
        match self {
            Self::Bulk { streams, direction } => Some(Work::Bulk { streams, direction }),
            Self::Request { size, connections } => Some(Work::Requests { size, connections }),
            Self::Short => Some(Work::Short { at_once: SHORT_AT_ONCE }),
            Self::Mixed { streams } => Some(Work::Mixed { streams, connections: MIXED_CONNECTIONS }),
            Self::Iperf3 { .. } | Self::Wrk { .. } | Self::Intercept | Self::Idle => None,
        }
    }

    /// Runs it for this long.
    pub(super) fn measure(
        self,
        site: &mut Site,
        running: &Running,
        placement: Placement,
        duration: Duration,
    ) -> Result<Vec<(Metric, f64)>> {
        site.place(running, placement)?;
        if self == Self::Intercept {
            return interception::measure(site, running, duration);
        }
        let measured = match self {
            Self::Iperf3 { streams } => external::iperf3(site, running, streams, duration)?,
            Self::Wrk { connections } => external::wrk(site, running, connections, duration)?,
            _ => {
                let work = self.work().context("idle connections are measured apart")?;
                let job = job(running, work, duration);
                site.agent(running.subject()).run(&job)?
            }
        };
        running::check_log(running, measured.requests)?;
        let mut figures = self.figures(&measured, running.pids().is_empty());
        figures.retain(|(_, value)| value.is_finite()); // wrk knows no 99.9 %
        Ok(figures)
    }

    /// Figures per unit of work, and units of work per second. Without a proxy there are none of its CPU.
    fn figures(self, measured: &Measured, direct: bool) -> Vec<(Metric, f64)> {
        let gib = measured.bytes as f64 / f64::from(1 << 30);
        let mut figures = Vec::new();
        if let Some(latency) = &measured.latency {
            figures.extend([
                (Metric::P50, latency.p50 * 1e6),
                (Metric::P99, latency.p99 * 1e6),
                (Metric::P999, latency.p999 * 1e6),
            ]);
        }
        let (units, scale) = match self {
            Self::Mixed { .. } => {
                // Bytes and requests: no single unit that CPU could be counted by.
                figures.push((Metric::Rate, measured.requests as f64 / measured.seconds));
                figures.push((Metric::BulkRate, gib / measured.seconds));
                return figures;
            }
            Self::Bulk { .. } | Self::Iperf3 { .. } => (gib, 1e9),
            _ => (measured.requests as f64, 1e3),
        };
        let per_unit = |ns: u64| ns as f64 / scale / units;
        figures.push((Metric::Rate, units / measured.seconds));
        figures.push((Metric::MachineCpu, per_unit(measured.machine_ns)));
        if measured.client_ns > 0 {
            figures.push((Metric::LoadCpu, per_unit(measured.server_ns + measured.client_ns)));
        }
        if !direct {
            figures.push((Metric::ProxyCpu, per_unit(measured.proxy_ns)));
        }
        figures
    }

    /// What one unit of work is called.
    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::Bulk { .. } | Self::Iperf3 { .. } => "GiB",
            Self::Short | Self::Intercept => "connection",
            _ => "request",
        }
    }
}

/// The measurement of a subject.
pub(super) fn job(running: &Running, work: Work, duration: Duration) -> Job {
    Job {
        work,
        echo: running.fronts().echo,
        bulk: running.fronts().bulk,
        warm_up: WARM_UP,
        measure: duration,
        proxy: running.pids().to_vec(),
        server: running.servers().pid(),
        control: running.servers().control().to_path_buf(),
    }
}

/// Idle connections that fit: of `limit` files, a proxy needs two for each.
pub(super) fn idle_connections(limit: u64) -> usize {
    let fit = usize::try_from(limit.saturating_sub(OTHER_FILES) / 2).unwrap_or(usize::MAX);
    (fit / 500 * 500).min(IDLE_CONNECTIONS)
}

/// Memory of a subject that is started for this alone: what it has served before would count otherwise.
pub(super) fn idle(
    programs: &Programs,
    site: &mut Site,
    subject: Subject,
    connections: usize,
) -> Result<Vec<(Metric, f64)>> {
    let running = Running::start(programs, site, subject, connections + 100)?;
    sleep(SETTLE);
    let fresh_rss = running.rss()?;
    // Code that only the first connection needs is the program's memory, not the connections'.
    site.agent(subject).hold(running.fronts().echo, 1)?;
    site.agent(subject).release()?;
    sleep(SETTLE);
    let (rss, slab) = (running.rss()?, account::slab_unreclaimable()?);
    site.agent(subject).hold(running.fronts().echo, connections)?;
    sleep(SETTLE);
    let (held_rss, held_slab) = (running.rss()?, account::slab_unreclaimable()?);
    let (cpu, at) = (running.cpu_ns()?, Instant::now());
    sleep(IDLE_WATCH);
    let (cpu, watched) = (running.cpu_ns()? - cpu, at.elapsed().as_secs_f64());
    site.agent(subject).release()?;
    let per_connection = |before: u64, after: u64| after.saturating_sub(before) as f64 / connections as f64;
    let mut figures = vec![(Metric::SlabPerConnection, per_connection(slab, held_slab))];
    if !running.pids().is_empty() {
        figures.extend([
            (Metric::RssStart, fresh_rss as f64 / 1e6),
            (Metric::RssPerConnection, per_connection(rss, held_rss)),
            (Metric::IdleCpu, cpu as f64 / 1e6 / watched),
        ]);
    }
    Ok(figures)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_what_they_say() {
        for name in [
            "bulk-1-down",
            "bulk-64-both",
            "bulk-8-up",
            "request-64x1",
            "request-16384x512",
            "short",
            "mixed-64",
            "idle",
            "iperf3-8",
            "wrk-64",
        ] {
            let workload: Workload = name.parse().expect("a workload");
            assert_eq!(workload.to_string(), name);
        }
        for wrong in
            ["bulk", "bulk-1", "bulk-0-up", "bulk-1-left", "request-64", "request-0x1", "short-1", ""]
        {
            assert!(wrong.parse::<Workload>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_proxy_needs_two_files_for_each_idle_connection() {
        assert_eq!(idle_connections(20_000), 9000);
        assert_eq!(idle_connections(1 << 20), 9000);
        assert_eq!(idle_connections(4096), 1000);
        assert_eq!(idle_connections(1024), 0);
    }
}
