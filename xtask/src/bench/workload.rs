//! What is measured, and how.

use std::fmt;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tidegate_tests::load::{self, Load};

use super::process;
use super::subject::{Kind, Programs, Subject};

/// Idle connections whose memory is measured.
pub(super) const IDLE_CONNECTIONS: usize = 5000;

/// Connections of the request workload.
const REQUEST_CONNECTIONS: usize = 64;

/// How long a load runs before it is measured.
const WARM_UP: Duration = Duration::from_millis(200);

/// How long a proxy is left alone before its memory is read.
const SETTLE: Duration = Duration::from_millis(1500);

/// One line of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Metric {
    RssIdle,
    RssPerConnection,
    Bulk1Cpu,
    Bulk1Rate,
    Bulk8Cpu,
    Bulk8Rate,
    RequestCpu,
    RequestRate,
    ShortCpu,
    ShortRate,
}

impl Metric {
    /// Its name in bench.json.
    pub(super) fn id(self) -> &'static str {
        match self {
            Self::RssIdle => "rss_idle",
            Self::RssPerConnection => "rss_per_idle_connection",
            Self::Bulk1Cpu => "bulk_1_cpu",
            Self::Bulk1Rate => "bulk_1_rate",
            Self::Bulk8Cpu => "bulk_8_cpu",
            Self::Bulk8Rate => "bulk_8_rate",
            Self::RequestCpu => "request_cpu",
            Self::RequestRate => "request_rate",
            Self::ShortCpu => "short_connection_cpu",
            Self::ShortRate => "short_connection_rate",
        }
    }

    /// What it is, for people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::RssIdle => "RSS at start",
            Self::RssPerConnection => "RSS per idle connection, at 5,000",
            Self::Bulk1Cpu => "bulk, 1 stream: proxy CPU",
            Self::Bulk1Rate => "bulk, 1 stream: throughput",
            Self::Bulk8Cpu => "bulk, 8 streams: proxy CPU",
            Self::Bulk8Rate => "bulk, 8 streams: throughput",
            Self::RequestCpu => "64 B, 64 connections: proxy CPU",
            Self::RequestRate => "64 B, 64 connections: rate",
            Self::ShortCpu => "connect, 64 B, close: proxy CPU",
            Self::ShortRate => "connect, 64 B, close: rate",
        }
    }

    pub(super) fn unit(self) -> &'static str {
        match self {
            Self::RssIdle => "MiB",
            Self::RssPerConnection => "B",
            Self::Bulk1Cpu | Self::Bulk8Cpu => "s/GiB",
            Self::Bulk1Rate | Self::Bulk8Rate => "GiB/s",
            Self::RequestCpu => "µs/request",
            Self::RequestRate => "requests/s",
            Self::ShortCpu => "µs/connection",
            Self::ShortRate => "connections/s",
        }
    }

    pub(super) fn lower_is_better(self) -> bool {
        !matches!(self, Self::Bulk1Rate | Self::Bulk8Rate | Self::RequestRate | Self::ShortRate)
    }
}

/// A kind of load.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Workload {
    /// Downloads over so many streams.
    Bulk(usize),
    /// Small requests on established connections.
    Requests,
    /// Connections that live for one small request.
    Short,
}

impl Workload {
    pub(super) const ALL: [Self; 4] = [Self::Bulk(1), Self::Bulk(8), Self::Requests, Self::Short];

    /// Runs it for this long; the proxy's CPU per unit of work, and units of work per second.
    pub(super) fn measure(self, subject: &Subject, duration: Duration) -> Result<Vec<(Metric, f64)>> {
        let load = self.start(subject)?;
        sleep(WARM_UP);
        let before = (Instant::now(), load.done(), subject.cpu_ns()?);
        sleep(duration);
        let after = (Instant::now(), load.done(), subject.cpu_ns()?);
        load.finish()?;
        let done = (after.1 - before.1) as f64;
        ensure!(done > 0.0, "nothing was done in {duration:?}");
        let (units, cpu_scale) = match self {
            Self::Bulk(_) => (done / f64::from(1 << 30), 1e9),
            Self::Requests | Self::Short => (done, 1e3),
        };
        let (cpu, rate) = self.metrics();
        let mut values = vec![(rate, units / (after.0 - before.0).as_secs_f64())];
        if let (Some(before), Some(after)) = (before.2, after.2) {
            values.push((cpu, (after - before) as f64 / cpu_scale / units));
        }
        Ok(values)
    }

    fn start(self, subject: &Subject) -> Result<Load> {
        match self {
            Self::Bulk(streams) => Load::bulk(subject.source(), streams),
            Self::Requests => Load::requests(subject.echo(), REQUEST_CONNECTIONS),
            Self::Short => Load::short(subject.echo()),
        }
    }

    fn metrics(self) -> (Metric, Metric) {
        match self {
            Self::Bulk(1) => (Metric::Bulk1Cpu, Metric::Bulk1Rate),
            Self::Bulk(_) => (Metric::Bulk8Cpu, Metric::Bulk8Rate),
            Self::Requests => (Metric::RequestCpu, Metric::RequestRate),
            Self::Short => (Metric::ShortCpu, Metric::ShortRate),
        }
    }
}

impl fmt::Display for Workload {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Bulk(streams) => write!(f, "bulk, streams: {streams}"),
            Self::Requests => write!(f, "64 B requests, connections: {REQUEST_CONNECTIONS}"),
            Self::Short => f.write_str("short connections"),
        }
    }
}

/// Memory of a proxy that has just started.
#[derive(Debug)]
pub(super) struct Memory;

impl Memory {
    /// Starts one for this alone: what it has served before would count otherwise.
    pub(super) fn measure(programs: &Programs, kind: Kind) -> Result<Vec<(Metric, f64)>> {
        let subject = Subject::start(programs, kind)?;
        let Some(pid) = subject.pid() else { return Ok(Vec::new()) };
        sleep(SETTLE);
        let idle = process::rss(pid)?;
        let connections = load::idle(subject.echo(), IDLE_CONNECTIONS)?;
        sleep(SETTLE);
        let busy = process::rss(pid)?;
        drop(connections);
        Ok(vec![
            (Metric::RssIdle, idle as f64 / f64::from(1 << 20)),
            (Metric::RssPerConnection, busy.saturating_sub(idle) as f64 / IDLE_CONNECTIONS as f64),
        ])
    }
}
