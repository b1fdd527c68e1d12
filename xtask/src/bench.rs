//! `cargo xtask bench`: tidegate, Envoy and HAProxy side by side, with one worker thread each.
//!
//! All of them run at the same time in a network namespace of their own and take turns (A B C, A B C, …), so that
//! whatever else the machine does hits all alike. CPU is what the scheduler has charged to the proxy's threads.

mod process;
mod report;
mod subject;
mod workload;
mod xds;

use std::collections::BTreeMap;
use std::io::IsTerminal;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Args, Subcommand};
use nix::sched::{CpuSet, sched_setaffinity};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use nix::unistd::Pid;
use tidegate_tests::netns::Netns;
use tidegate_tests::tool;

use self::report::{Report, Settings};
use self::subject::{Kind, Programs, Subject};
use self::workload::{Memory, Metric, Workload};
use crate::{cargo, root};

/// Arguments of `bench`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    /// Something else than the data path.
    #[command(subcommand)]
    of: Option<Of>,
    /// Fewer and shorter rounds: about 90 seconds instead of 10 minutes.
    #[arg(long)]
    quick: bool,
    /// Rounds of each measurement [default: 7; with --quick: 3].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Give the proxies CPU 0 for their own and the load generator the others.
    #[arg(long)]
    pin: bool,
    /// Measure memory only.
    #[arg(long)]
    memory: bool,
    /// Use this Envoy instead of installing one into target/tools.
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Measure this tidegate instead of building one.
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
}

/// What else is measured.
#[derive(Subcommand, Debug)]
enum Of {
    /// Thousands of clusters and listeners from a control plane: time, memory, and what traffic feels of it.
    Xds(xds::Xds),
}

/// The figures of one metric and one subject, round by round.
type Samples = BTreeMap<(Metric, Kind), Vec<f64>>;

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        match &self.of {
            Some(Of::Xds(xds)) => xds.run(),
            None => self.data_path(),
        }
    }

    fn data_path(&self) -> Result<()> {
        let tidegate = match &self.tidegate {
            Some(path) => path.clone(),
            None => cargo::build_release()?,
        };
        let envoy = match &self.envoy {
            Some(path) => path.clone(),
            None => tool::envoy()?, // before root: what it installs stays the caller's
        };
        root::become_root()?;
        root::clean_up_on_signals()?;
        tool::require(&[("ip", "iproute2"), ("taskset", "util-linux"), ("haproxy", "haproxy")])?;
        let programs =
            Programs { tidegate, envoy, haproxy: tool::find("haproxy").context("haproxy")?, pin: self.pin };
        let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
        setrlimit(Resource::RLIMIT_NOFILE, hard, hard)?;
        let settings = Settings {
            rounds: self.rounds.unwrap_or(if self.quick { 3 } else { 7 }),
            seconds: if self.quick { 1.0 } else { 3.0 },
            idle_connections: workload::IDLE_CONNECTIONS,
            pinned: self.pin,
        };
        let mut report = Report::start(settings, &programs)?;
        let netns = Netns::new("bench")?;
        let samples = netns.enter(|| self.measure(&programs, &settings))??;
        report.finish(&samples)?;
        Ok(())
    }

    fn measure(&self, programs: &Programs, settings: &Settings) -> Result<Samples> {
        if self.pin {
            keep_off_first_cpu()?;
        }
        let mut samples = Samples::new();
        let memory_rounds = if self.quick { 1 } else { 3 };
        for round in 1..=memory_rounds {
            for kind in Kind::PROXIES {
                progress(&format!("memory: round {round}/{memory_rounds}, {}", kind.name()));
                for (metric, value) in Memory::measure(programs, kind)? {
                    samples.entry((metric, kind)).or_default().push(value);
                }
            }
        }
        if !self.memory {
            run_workloads(programs, settings, &mut samples)?;
        }
        progress("");
        Ok(samples)
    }
}

fn run_workloads(programs: &Programs, settings: &Settings, samples: &mut Samples) -> Result<()> {
    let subjects =
        Kind::ALL.iter().map(|kind| Subject::start(programs, *kind)).collect::<Result<Vec<_>>>()?;
    let duration = Duration::from_secs_f64(settings.seconds);
    for round in 1..=settings.rounds {
        for workload in Workload::ALL {
            for subject in &subjects {
                let name = subject.kind().name();
                progress(&format!("round {round}/{}: {workload}, {name}", settings.rounds));
                let values = workload
                    .measure(subject, duration)
                    .with_context(|| format!("{workload} through {name}"))?;
                for (metric, value) in values {
                    samples.entry((metric, subject.kind())).or_default().push(value);
                }
            }
        }
    }
    Ok(())
}

/// One line that is overwritten by the next; nothing when nobody looks.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}

/// This thread and those that it starts leave CPU 0 to the proxies.
fn keep_off_first_cpu() -> Result<()> {
    let mut cpus = CpuSet::new();
    for cpu in 1..std::thread::available_parallelism()?.get() {
        cpus.set(cpu)?;
    }
    sched_setaffinity(Pid::from_raw(0), &cpus).context("--pin needs two CPUs")
}
