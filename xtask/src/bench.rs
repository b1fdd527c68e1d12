//! `cargo xtask bench`: tidegate and its peers side by side, with one worker thread each.
//!
//! All of them run at the same time in network namespaces of their own and take turns (A B C, B C A, …), so that
//! whatever else the machine does hits all alike. CPU is what the scheduler has charged to the threads of a process.

mod about;
mod case;
mod chart;
mod compare;
mod external;
mod goals;
mod headline;
mod instructions;
mod interception;
mod kernel;
mod metric;
mod options;
mod plan;
mod profile;
mod readme;
mod report;
mod results;
mod run;
mod running;
mod site;
mod subject;
mod tools;
mod workload;
mod xds;

use std::io::IsTerminal;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use clap::{Args, Subcommand};

use self::options::Options;
use self::plan::{Choice, Selector};
use self::results::Results;
use self::run::How;
use self::site::{Placement, Topology};
use self::subject::{Program, Subject};

/// Arguments of `bench`.
#[derive(Args, Debug)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Bench {
    /// Something else than the data path.
    #[command(subcommand)]
    of: Option<Of>,
    /// The measurements that the goals need, fewer rounds, shorter: under 3 minutes instead of some 20.
    #[arg(long)]
    quick: bool,
    /// Only these workloads: bulk-STREAMS-down|up|both, request-BYTESxCONNECTIONS, short, mixed-STREAMS, idle,
    /// iperf3-STREAMS, wrk-CONNECTIONS, or a group (bulk, request); @pinned or @one-cpu behind it.
    #[arg(long, value_name = "WORKLOAD", value_delimiter = ',')]
    only: Vec<Selector>,
    /// Only these: tidegate, base, envoy, haproxy, haproxy-splice, nginx, direct; +log writes an access log,
    /// +intercept (tidegate, veth) captures clients in a pod, +redirect (veth) has nftables send them to a proxy in the
    /// pod, +kernel and +kernel-many connect them to the servers.
    #[arg(long, value_name = "SUBJECT", value_delimiter = ',')]
    subjects: Vec<Subject>,
    /// Only this topology [default: both; with --only: loopback].
    #[arg(long, value_enum)]
    topology: Option<Topology>,
    /// Give the proxies the first CPU for their own, and clients and servers the others, in every workload.
    #[arg(long, conflicts_with = "one_cpu")]
    pin: bool,
    /// Run everything on one CPU, in every workload.
    #[arg(long)]
    one_cpu: bool,
    /// Measure memory only: --only idle.
    #[arg(long, conflicts_with = "only")]
    memory: bool,
    #[command(flatten)]
    options: Options,
    /// Measure this tidegate too, as the subject `base`: what a change is compared with.
    #[arg(long, value_name = "PATH")]
    tidegate_base: Option<PathBuf>,
    /// Tell by perf where the proxies' CPU goes. Sampling costs some itself: compare nothing with a run without it.
    #[arg(long)]
    profile: bool,
    /// Exit with 1 when a goal of the data path is missed, or was not measured.
    #[arg(long)]
    goals: bool,
}

/// What else is measured.
#[derive(Subcommand, Debug)]
enum Of {
    /// Thousands of clusters and listeners from a control plane: time, memory, and what traffic feels of it.
    Xds(xds::Xds),
    /// The kernel path against direct connections and all proxies, over veth.
    Kernel(kernel::Kernel),
    /// Show what changed between two runs by more than they vary.
    Compare(compare::Compare),
    /// Count the instructions of the pure core under callgrind, against the counts in the repository.
    Instructions(instructions::Instructions),
    /// Write README's figures and the chart from the bench.json in the repository.
    Readme(readme::Readme),
}

impl Bench {
    pub(crate) fn run(&self) -> Result<()> {
        match &self.of {
            Some(Of::Xds(xds)) => xds.run(),
            Some(Of::Kernel(kernel)) => kernel.run(),
            Some(Of::Compare(compare)) => compare.run(),
            Some(Of::Instructions(instructions)) => instructions.run(),
            Some(Of::Readme(readme)) => readme.run(),
            None => self.data_path(),
        }
    }

    fn data_path(&self) -> Result<()> {
        let plan = self.choice()?.plan();
        ensure!(!plan.entries.is_empty(), "none of the subjects can be measured on this topology");
        let how = How { quick: self.quick, profile: self.profile };
        self.finish(&self.options.measure(plan, self.tidegate_base.as_deref(), how)?)
    }

    fn choice(&self) -> Result<Choice> {
        let base = self.tidegate_base.is_some();
        ensure!(
            base || !self.subjects.iter().any(|subject| subject.program == Program::Base),
            "the subject base is what --tidegate-base names"
        );
        let placement = match (self.pin, self.one_cpu) {
            (true, _) => Some(Placement::Pinned),
            (_, true) => Some(Placement::OneCpu),
            _ => None,
        };
        let only = if self.memory {
            "idle".parse().map(|idle| vec![idle]).map_err(anyhow::Error::msg)?
        } else {
            self.only.clone()
        };
        Ok(Choice {
            only,
            subjects: self.subjects.clone(),
            topology: self.topology,
            placement,
            base,
            ..self.options.choice(self.quick)
        })
    }

    /// Prints and writes everything.
    fn finish(&self, results: &Results) -> Result<()> {
        let mut outcomes = goals::outcomes(results);
        if !self.goals {
            outcomes.retain(|outcome| outcome.worst.is_some());
        }
        print!("{}{}", report::header(&results.about, None), report::table(results, None));
        if !outcomes.is_empty() {
            print!("{}", goals::table(&outcomes));
        }
        let path = about::write("bench.json", &format!("{}\n", serde_json::to_string_pretty(results)?))?;
        let svg = about::write("bench.svg", &chart::svg(results))?;
        println!("\nall figures of all rounds: {}; chart: {}", path.display(), svg.display());
        ensure!(results.failures.is_empty(), "{} measurements failed", results.failures.len());
        if self.goals { goals::require(&outcomes) } else { Ok(()) }
    }
}

/// One line that is overwritten by the next; nothing when nobody looks.
fn progress(text: &str) {
    if std::io::stderr().is_terminal() {
        eprint!("\r\x1b[K{text}");
    }
}
