//! `cargo xtask bench xds`: one control plane, thousands of clusters and listeners, tidegate and Envoy in turn.
//!
//! Both get the same bytes over one incremental ADS stream and forward with one worker thread. What is measured of one
//! round of one proxy: from the start of the process to `/ready`; memory per pair of cluster and listener; one changed
//! endpoint, to its ACK and to the first connection that it gets, beside thousands of live connections; and small
//! requests while every resource changes at once.

mod node;
mod plane;
mod report;
mod world;

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Args;
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde_json::{Map, Value, json};
use tidegate_tests::load::{self, Latencies, Load, account};
use tidegate_tests::netns::Netns;
use tidegate_tests::tool;

use self::node::{Kind, Node};
use self::plane::Plane;
use self::world::World;
use super::options::Named;
use super::report::number;
use super::results::median;
use super::{about, progress};
use crate::root;

/// Connections that stay open while endpoints change.
const LIVE_CONNECTIONS: usize = 5_000;

/// Connections of the small requests.
const REQUEST_CONNECTIONS: usize = 16;

/// How long a proxy is left alone before its memory is read.
const SETTLE: Duration = Duration::from_millis(1500);

/// Arguments of `bench xds`.
#[derive(Args, Debug)]
pub(crate) struct Xds {
    /// One round, and fewer endpoint updates.
    #[arg(long)]
    quick: bool,
    /// Rounds of each proxy [default: 3; with --quick: 1].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Clusters, and as many listeners.
    #[arg(long, value_name = "COUNT", default_value_t = 10_000, value_parser = clap::value_parser!(u32).range(1..=60_000))]
    pairs: u32,
    /// Endpoints of each cluster.
    #[arg(long, value_name = "COUNT", default_value_t = 10, value_parser = clap::value_parser!(u32).range(1..=200))]
    endpoints: u32,
    #[command(flatten)]
    named: Named,
    /// Leave Envoy out: no ratios.
    #[arg(long)]
    alone: bool,
}

/// One line of the report.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Metric {
    Ready,
    ReadyCpu,
    RssStart,
    RssPerPair,
    AckMedian,
    AckTail,
    EffectMedian,
    EffectTail,
    UpdateCpu,
    PushTime,
    PushCpu,
    QuietTail,
    PushTail,
    Dent,
}

impl Metric {
    fn id(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::ReadyCpu => "ready_cpu",
            Self::RssStart => "rss_without_resources",
            Self::RssPerPair => "rss_per_pair",
            Self::AckMedian => "endpoint_to_ack_p50",
            Self::AckTail => "endpoint_to_ack_p99",
            Self::EffectMedian => "endpoint_to_effect_p50",
            Self::EffectTail => "endpoint_to_effect_p99",
            Self::UpdateCpu => "endpoint_cpu",
            Self::PushTime => "push",
            Self::PushCpu => "push_cpu",
            Self::QuietTail => "request_p99_quiet",
            Self::PushTail => "request_p99_push",
            Self::Dent => "request_p99_push_to_quiet",
        }
    }

    fn title(self) -> &'static str {
        match self {
            Self::Ready => "start to ready",
            Self::ReadyCpu => "start to ready: CPU",
            Self::RssStart => "RSS without resources",
            Self::RssPerPair => "RSS per cluster and listener",
            Self::AckMedian => "one endpoint changed, to ACK: p50",
            Self::AckTail => "one endpoint changed, to ACK: p99",
            Self::EffectMedian => "one endpoint changed, to effect: p50",
            Self::EffectTail => "one endpoint changed, to effect: p99",
            Self::UpdateCpu => "one endpoint changed: CPU",
            Self::PushTime => "everything changed, to the last ACK",
            Self::PushCpu => "everything changed: CPU",
            Self::QuietTail => "64 B request, nothing changes: p99",
            Self::PushTail => "64 B request, everything changes: p99",
            Self::Dent => "the latter to the former",
        }
    }

    fn unit(self) -> &'static str {
        match self {
            Self::Ready | Self::ReadyCpu | Self::PushTime | Self::PushCpu => "s",
            Self::RssStart => "MiB",
            Self::RssPerPair => "KiB",
            Self::AckMedian
            | Self::AckTail
            | Self::EffectMedian
            | Self::EffectTail
            | Self::UpdateCpu
            | Self::QuietTail
            | Self::PushTail => "ms",
            Self::Dent => "",
        }
    }
}

/// Round by round.
type Samples = BTreeMap<(Metric, Kind), Vec<f64>>;

impl Xds {
    pub(crate) fn run(&self) -> Result<()> {
        let tidegate = self.named.tidegate()?;
        let envoy = if self.alone { PathBuf::new() } else { self.named.envoy()? };
        root::become_root()?;
        root::clean_up_on_signals()?;
        tool::require(&[("ip", "iproute2")])?;
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let kinds = if self.alone { &Kind::ALL[..1] } else { &Kind::ALL[..] };
        let rounds = self.rounds.unwrap_or(if self.quick { 1 } else { 3 });
        let mut about = self.about(rounds)?;
        let netns = Netns::new("bench")?;
        let samples = netns.enter(|| self.measure(kinds, rounds, &tidegate, &envoy))??;
        progress("");
        about.insert("load_average_after".to_owned(), json!(about::load_average()?));
        print!("{}{}", self.header(&about, rounds), table(&samples));
        about.insert("metrics".to_owned(), Value::Array(metrics(&samples)));
        let path = about::write("bench-xds.json", &format!("{:#}\n", Value::Object(about)))?;
        println!("\nall figures of all rounds: {}", path.display());
        Ok(())
    }

    fn about(&self, rounds: u32) -> Result<Map<String, Value>> {
        let about = json!({
            "date": about::date()?,
            "machine": about::machine()?,
            "versions": {"tidegate": about::commit(), "envoy": tool::ENVOY_VERSION},
            "settings": {
                "worker_threads": 1, "rounds": rounds, "clusters": self.pairs, "listeners": self.pairs,
                "endpoints": self.pairs * self.endpoints, "protocol": "ADS, incremental",
                "endpoint_updates": self.updates(), "live_connections": LIVE_CONNECTIONS,
                "request_connections": REQUEST_CONNECTIONS,
            },
            "load_average_before": about::load_average()?,
        });
        about.as_object().cloned().context("an object")
    }

    fn header(&self, about: &Map<String, Value>, rounds: u32) -> String {
        let machine = report::describe_machine(about);
        format!(
            "{machine}\ntidegate {}, Envoy {}; one worker thread each; {} clusters, {} listeners, {} endpoints over \
             one incremental ADS stream; {rounds} rounds\nmedians; x: ratio of tidegate to it, median over the rounds\n\n",
            about["versions"]["tidegate"].as_str().unwrap_or("?"),
            tool::ENVOY_VERSION,
            self.pairs,
            self.pairs,
            self.pairs * self.endpoints,
        )
    }

    fn updates(&self) -> usize {
        if self.quick { 100 } else { 300 }
    }

    fn measure(&self, kinds: &[Kind], rounds: u32, tidegate: &Path, envoy: &Path) -> Result<Samples> {
        let mut samples = Samples::new();
        let world = World::new(self.pairs, self.endpoints)?;
        let nothing = World::new(0, 0)?;
        for round in 1..=rounds {
            for &kind in kinds {
                let program = if kind == Kind::Tidegate { tidegate } else { envoy };
                let what = |text: &str| progress(&format!("round {round}/{rounds}, {}: {text}", kind.name()));
                let mut note = |metric, value| samples.entry((metric, kind)).or_default().push(value);
                what("memory without resources");
                let empty = {
                    let mut plane = Plane::start(&nothing)?;
                    let prepared = plane.prepare()?;
                    let node = Node::start(kind, program, &plane)?;
                    plane.serve_start(&node, prepared)?;
                    sleep(SETTLE);
                    account::rss(node.pid())?
                };
                note(Metric::RssStart, empty as f64 / f64::from(1 << 20));
                let mut round = Round { plane: Plane::start(&world)?, updates: self.updates(), kind };
                round
                    .run(program, self.pairs, empty, &what, &mut note)
                    .with_context(|| format!("{}, round {round:?}", kind.name()))?;
            }
        }
        Ok(samples)
    }
}

/// One round of one proxy.
#[derive(Debug)]
struct Round<'w> {
    plane: Plane<'w>,
    updates: usize,
    kind: Kind,
}

impl Round<'_> {
    fn run(
        &mut self,
        program: &Path,
        pairs: u32,
        empty: u64,
        what: &dyn Fn(&str),
        note: &mut dyn FnMut(Metric, f64),
    ) -> Result<()> {
        what("start");
        let prepared = self.plane.prepare()?;
        let started = Instant::now();
        let node = Node::start(self.kind, program, &self.plane)?;
        self.plane.serve_start(&node, prepared)?;
        note(Metric::Ready, started.elapsed().as_secs_f64());
        note(Metric::ReadyCpu, account::cpu_ns(node.pid())? as f64 / 1e9);
        sleep(SETTLE);
        let taken = account::rss(node.pid())?.saturating_sub(empty);
        note(Metric::RssPerPair, taken as f64 / 1024.0 / f64::from(pairs));

        what("one endpoint");
        let live = load::idle(node.echo, LIVE_CONNECTIONS).context("live connections")?;
        let (mut ack, mut effect) = (Latencies::new(), Latencies::new());
        let before = account::cpu_ns(node.pid())?;
        for number in 0..self.updates {
            let (acked, effective) = self.plane.move_probe(&node, number)?;
            ack.record(acked);
            effect.record(effective);
        }
        // The probing connections cost something too, alike for both.
        let cpu = account::cpu_ns(node.pid())? - before;
        note(Metric::UpdateCpu, cpu as f64 / 1e6 / self.updates as f64);
        note(Metric::AckMedian, milliseconds(ack.quantile(0.5)));
        note(Metric::AckTail, milliseconds(ack.quantile(0.99)));
        note(Metric::EffectMedian, milliseconds(effect.quantile(0.5)));
        note(Metric::EffectTail, milliseconds(effect.quantile(0.99)));

        what("requests");
        let load = Load::requests(node.echo, REQUEST_CONNECTIONS)?;
        sleep(Duration::from_secs(2));
        let quiet = load.finish()?.quantile(0.99);
        what("everything changes");
        let prepared = self.plane.prepare_change()?;
        let load = Load::requests(node.echo, REQUEST_CONNECTIONS)?;
        let (before, begun) = (account::cpu_ns(node.pid())?, Instant::now());
        self.plane.change_everything(prepared)?;
        note(Metric::PushTime, begun.elapsed().as_secs_f64());
        note(Metric::PushCpu, (account::cpu_ns(node.pid())? - before) as f64 / 1e9);
        let pushed = load.finish()?.quantile(0.99);
        note(Metric::QuietTail, milliseconds(quiet));
        note(Metric::PushTail, milliseconds(pushed));
        note(Metric::Dent, pushed.as_secs_f64() / quiet.as_secs_f64());
        drop(live);
        Ok(())
    }
}

fn milliseconds(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}

fn table(samples: &Samples) -> String {
    let mut text = format!("{:<40}{:<6}{:>9}{:>10}{:>8}\n", "", "", "tidegate", "Envoy", "x");
    for (metric, own) in
        samples.iter().filter(|((_, kind), _)| *kind == Kind::Tidegate).map(|((m, _), v)| (m, v))
    {
        let theirs = samples.get(&(*metric, Kind::Envoy)).map_or(&[][..], Vec::as_slice);
        let _ = writeln!(
            text,
            "{:<40}{:<6}{:>9}{:>10}{:>8}",
            metric.title(),
            metric.unit(),
            number(median(own)),
            number(median(theirs)),
            report::ratio_text(own, theirs),
        );
    }
    text
}

fn metrics(samples: &Samples) -> Vec<Value> {
    let metrics = samples.keys().filter(|(_, kind)| *kind == Kind::Tidegate).map(|(metric, _)| *metric);
    let metric = |metric: Metric| {
        let values = |kind: Kind| samples.get(&(metric, kind)).map_or(&[][..], Vec::as_slice);
        json!({
            "id": metric.id(), "title": metric.title(), "unit": metric.unit(), "lower_is_better": true,
            "subjects": {"tidegate": report::spread(values(Kind::Tidegate)), "Envoy": report::spread(values(Kind::Envoy))},
            "tidegate_to": {
                "Envoy": report::spread(&report::ratios_by_round(values(Kind::Tidegate), values(Kind::Envoy))),
            },
        })
    };
    metrics.map(metric).collect()
}
