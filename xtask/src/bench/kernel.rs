//! `cargo xtask bench kernel`: the kernel path against direct connections and against all proxies.

use anyhow::{Result, ensure};
use clap::Args;

use super::case::Case;
use super::goals::Bound::{AtLeast, AtMost};
use super::goals::{self, Goal, goal};
use super::metric::Metric;
use super::options::Options;
use super::run::How;
use super::site::{Placement, Topology};
use super::subject::Subject;
use super::workload::Workload;
use super::{about, report};

/// Arguments of `bench kernel`.
#[derive(Args, Debug)]
pub(super) struct Kernel {
    /// Fewer rounds, shorter, downloads only: about 4.5 minutes instead of 11.
    #[arg(long)]
    quick: bool,
    #[command(flatten)]
    options: Options,
    /// Exit with 1 when a goal of the kernel path is missed, or was not measured.
    #[arg(long)]
    goals: bool,
}

const BULK: &[Case] = &Case::each(Topology::Veth, Placement::Free, Workload::DOWNLOADS);
const REQUESTS: &[Case] = &Case::each(Topology::Veth, Placement::Free, Workload::REQUESTS);
const SHORT: &[Case] = &[Case::veth(Workload::Short)];
const INTERCEPT: &[Case] = &[Case::veth(Workload::Intercept)];

const OWN: Subject = Subject::KERNEL;
const DIRECT: &[Subject] = &[Subject::DIRECT];

/// Of direct, in rate; of latencies, which are better when they are lower, the inverse.
const NEARLY: f64 = 0.97;

const GOALS: &[Goal] = &[
    goal("bulk: throughput", BULK, Metric::Rate, OWN, DIRECT, AtLeast(NEARLY)).within_noise(),
    goal("requests: rate", REQUESTS, Metric::Rate, OWN, DIRECT, AtLeast(NEARLY)).within_noise(),
    goal("requests: p50", REQUESTS, Metric::P50, OWN, DIRECT, AtMost(1.0 / NEARLY)).within_noise(),
    goal("requests: p99", REQUESTS, Metric::P99, OWN, DIRECT, AtMost(1.0 / NEARLY)).within_noise(),
    goal("connect, 64 B, close: rate", SHORT, Metric::Rate, OWN, DIRECT, AtLeast(NEARLY)).within_noise(),
    goal("connect, 64 B, close: p50", SHORT, Metric::P50, OWN, DIRECT, AtMost(1.0 / NEARLY)).within_noise(),
    goal("connect, 64 B, close: p99", SHORT, Metric::P99, OWN, DIRECT, AtMost(1.0 / NEARLY)).within_noise(),
    goal("bulk: proxy CPU, s/GiB", BULK, Metric::ProxyCpu, OWN, &[], AtMost(0.0)),
    goal("requests: proxy CPU, µs", REQUESTS, Metric::ProxyCpu, OWN, &[], AtMost(0.0)),
    goal("connect(2): eBPF, µs", INTERCEPT, Metric::ConnectCpu, OWN, &[], AtMost(2.0)),
    goal(
        "connect(2): eBPF, 10,000 services x 10",
        INTERCEPT,
        Metric::ConnectCpu,
        Subject::KERNEL_MANY,
        &[OWN],
        AtMost(1.1),
    )
    .within_noise(),
];

impl Kernel {
    pub(super) fn run(&self) -> Result<()> {
        let plan = self.options.choice(self.quick).kernel();
        let (rounds, few_rounds) = (plan.rounds, plan.few_rounds);
        let results = self.options.measure(plan, None, How { quick: self.quick, profile: false })?;
        let outcomes = goals::outcomes_of(GOALS, &results);
        print!(
            "{}{}{}",
            report::header(&results.about, Some(Subject::DIRECT)),
            report::table(&results, Some(Subject::DIRECT)),
            goals::table(&outcomes),
        );
        println!(
            "rounds: {rounds} of {OWN} and {}, {few_rounds} of the others and of interception\n\
             between: where the median of many rounds would be, in 99 of 100 runs; missed is what has all of that beyond the bound",
            Subject::DIRECT,
        );
        let path = about::write("kernel.json", &format!("{}\n", serde_json::to_string_pretty(&results)?))?;
        println!("\nall figures of all rounds: {}", path.display());
        ensure!(results.failures.is_empty(), "{} measurements failed", results.failures.len());
        if self.goals { goals::require(&outcomes) } else { Ok(()) }
    }
}

#[cfg(test)]
mod tests {
    use super::super::plan::Choice;
    use super::*;

    #[test]
    fn every_run_measures_every_goal() {
        for quick in [true, false] {
            let plan = Choice { quick, ..Choice::default() }.kernel();
            for goal in GOALS {
                for case in goal.cases() {
                    for subject in goal.subjects() {
                        assert!(plan.measures(*case, subject), "{case}: {subject}");
                    }
                }
            }
        }
    }
}
