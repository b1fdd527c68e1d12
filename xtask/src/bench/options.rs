//! What the command lines of `bench` have in common.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::Result;
use clap::Args;
use tidegate_tests::load::agent;
use tidegate_tests::tool;

use super::plan::{Choice, Plan};
use super::results::Results;
use super::run::{How, Run};
use super::subject::Program;
use super::tools::Programs;
use super::workload::Workload;
use crate::{cargo, root};

/// Options of a command that measures subjects in turns.
#[derive(Args, Debug)]
pub(super) struct Options {
    /// Rounds of each measurement [default: 5, with --quick 3; `kernel`: 12 and 8 of what its goals compare, 3 and 2 of
    /// the others].
    #[arg(long, value_name = "COUNT", value_parser = clap::value_parser!(u32).range(1..))]
    rounds: Option<u32>,
    /// Length of one measurement [default: 0.8; with --quick: 0.5].
    #[arg(long, value_name = "SECONDS", value_parser = seconds)]
    seconds: Option<Duration>,
    #[command(flatten)]
    named: Named,
}

/// Programs that are there already.
#[derive(Args, Debug)]
pub(super) struct Named {
    /// Use this Envoy instead of installing one into target/tools.
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Measure this tidegate instead of building one.
    #[arg(long, value_name = "PATH")]
    tidegate: Option<PathBuf>,
}

impl Named {
    /// The one that was named, or a release build.
    pub(super) fn tidegate(&self) -> Result<PathBuf> {
        self.tidegate.clone().map_or_else(cargo::build_release, Ok)
    }

    /// The one that was named, or one that is installed. Before root: what it installs stays the caller's.
    pub(super) fn envoy(&self) -> Result<PathBuf> {
        self.envoy.clone().map_or_else(tool::envoy, Ok)
    }
}

impl Options {
    /// Everything else by default.
    pub(super) fn choice(&self, quick: bool) -> Choice {
        Choice { quick, rounds: self.rounds, measure: self.seconds, ..Choice::default() }
    }

    /// Builds and installs what is missing, becomes root, and measures. `base`: another tidegate.
    pub(super) fn measure(&self, plan: Plan, base: Option<&Path>, how: How) -> Result<Results> {
        let subjects = plan.subjects();
        let measured = |program| subjects.iter().any(|subject| subject.program == program);
        let mut programs = Programs::default();
        cargo::build(&["workload"])?;
        if measured(Program::Tidegate) {
            programs.tidegate = self.named.tidegate()?;
        }
        if let Some(base) = base.filter(|_| measured(Program::Base)) {
            programs.base = base.to_path_buf();
        }
        if measured(Program::Envoy) {
            programs.envoy = self.named.envoy()?;
        }
        root::become_root()?;
        root::clean_up_on_signals()?;
        let http = plan.uses(|workload| matches!(workload, Workload::Wrk { .. }));
        let iperf3 = plan.uses(|workload| matches!(workload, Workload::Iperf3 { .. }));
        programs.install(&subjects, http, iperf3)?;
        if how.profile {
            tool::require(&[("perf", "linux-perf")])?;
        }
        agent::raise_file_limit()?;
        Run::new(plan, programs, how)?.results(self.named.tidegate.as_deref())
    }
}

fn seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|error| format!("{error}"))?;
    if (0.05..=600.0).contains(&seconds) {
        Ok(Duration::from_secs_f64(seconds))
    } else {
        Err("between 0.05 and 600".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;

    #[derive(Parser, Debug)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn parse(line: &str) -> Result<Options, clap::Error> {
        Line::try_parse_from(line.split(' ')).map(|line| line.options)
    }

    #[test]
    fn what_is_given_replaces_the_default() {
        let options = parse("bench --rounds 2 --seconds 0.25 --tidegate /a --envoy /b").expect("options");
        let plan = options.choice(true).kernel();
        assert_eq!((plan.rounds, plan.measure), (2, Duration::from_millis(250)));
        let named = (options.named.tidegate().expect("named"), options.named.envoy().expect("named"));
        assert_eq!(named, (PathBuf::from("/a"), PathBuf::from("/b")));
        for (quick, rounds, measure) in [(false, 12, 800), (true, 8, 500)] {
            let plan = parse("bench").expect("no options").choice(quick).kernel();
            assert_eq!((plan.rounds, plan.measure), (rounds, Duration::from_millis(measure)));
        }
    }

    #[test]
    fn bad_figures_are_refused() {
        for bad in [
            "--rounds=0",
            "--rounds=-1",
            "--rounds=x",
            "--seconds=0",
            "--seconds=601",
            "--seconds=NaN",
            "--seconds=x",
        ] {
            let error = parse(&format!("bench {bad}")).expect_err(bad).to_string();
            assert!(error.contains(bad.split('=').next().unwrap_or(bad)), "{error}");
        }
        let error = parse("bench --seconds 0.01").expect_err("too short").to_string();
        assert!(error.contains("between 0.05 and 600"), "{error}");
    }
}
