//! `cargo xtask parity`: the same configuration and the same clients against the real Envoy and tidegate.

mod case;
mod cases;
mod exceptions;
mod hello;
mod observe;
mod scripts;
mod xds;

use std::path::PathBuf;

use anyhow::{Context, Result, bail};
use clap::{Args, ValueEnum};
use serde_json::Value;
use tidegate_tests::proxy::Engine;
use tidegate_tests::tool;

use self::case::Case;
use self::exceptions::Exception;
use self::observe::Observation;
use crate::cargo;

/// Arguments of `parity`.
#[derive(Args, Debug)]
pub(crate) struct Parity {
    /// Show only cases whose name contains this text (all of them run, since they share one configuration), and run
    /// only such scripts of xDS.
    filter: Option<String>,
    /// Print what one proxy does, and compare nothing.
    #[arg(long, value_name = "PROXY")]
    show: Option<Shown>,
    /// Use this Envoy instead of installing one into target/tools.
    #[arg(long, value_name = "PATH")]
    envoy: Option<PathBuf>,
    /// Only what control planes hear (`xds`), only what clients see (`traffic`), or only random scripts (`scripts`).
    #[arg(long, value_name = "PART")]
    only: Option<Part>,
    /// How many random scripts are played through each proxy.
    #[arg(long, value_name = "M", default_value_t = 240)]
    scripts: usize,
    /// The seed of the first random script; the others follow. Without it, half of them are always the same, and half are
    /// new each time.
    #[arg(long, value_name = "N")]
    seed: Option<u64>,
    /// Print the facts that agree too.
    #[arg(long)]
    verbose: bool,
}

/// What is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Part {
    /// Connections, access logs, stats.
    Traffic,
    /// Requests to control planes.
    Xds,
    /// Random scripts of both ends.
    Scripts,
}

/// Which proxy `--show` runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Shown {
    /// The real Envoy.
    Envoy,
    /// This build.
    Tidegate,
}

impl Parity {
    pub(crate) fn run(&self) -> Result<()> {
        if self.show != Some(Shown::Envoy) {
            cargo::build(&["tidegate"])?;
        }
        if self.show != Some(Shown::Tidegate) {
            self.envoy()?; // before root: what it installs stays the caller's
        }
        crate::root::become_root()?;
        crate::root::clean_up_on_signals()?;
        tool::require(&[("ip", "iproute2"), ("nft", "nftables")])?;
        let wanted = |part| self.only.is_none_or(|only| only == part);
        let traffic = if wanted(Part::Traffic) { self.traffic() } else { Ok(()) };
        let scripts = if wanted(Part::Scripts) && self.filter.is_none() { self.scripts() } else { Ok(()) };
        let xds = if wanted(Part::Xds) { self.xds() } else { Ok(()) };
        traffic.and(scripts).and(xds)
    }

    fn scripts(&self) -> Result<()> {
        let seeds = scripts::seeds(self.seed, self.scripts);
        match self.show {
            Some(Shown::Envoy) => scripts::show(&self.envoy()?, &seeds),
            Some(Shown::Tidegate) => scripts::show(&Engine::Tidegate, &seeds),
            None => scripts::compare(&self.envoy()?, &seeds, self.verbose),
        }
    }

    fn traffic(&self) -> Result<()> {
        let cases = cases::all();
        match self.show {
            Some(shown) => self.show(shown, &cases),
            None => self.compare(&cases),
        }
    }

    fn xds(&self) -> Result<()> {
        let filter = self.filter.as_deref();
        match self.show {
            Some(Shown::Envoy) => xds::show_all(&self.envoy()?, filter),
            Some(Shown::Tidegate) => xds::show_all(&Engine::Tidegate, filter),
            None => return xds::compare(&self.envoy()?, filter, self.verbose),
        }
        Ok(())
    }

    fn envoy(&self) -> Result<Engine> {
        Ok(Engine::Envoy(match &self.envoy {
            Some(path) => path.clone(),
            None => tool::envoy()?,
        }))
    }

    fn wanted(&self, case: &Case) -> bool {
        self.filter.as_ref().is_none_or(|text| case.name.contains(text.as_str()))
    }

    fn show(&self, shown: Shown, cases: &[Case]) -> Result<()> {
        let engine = if shown == Shown::Envoy { self.envoy()? } else { Engine::Tidegate };
        let observations = observe::run(engine, cases)?;
        for (case, observation) in cases.iter().zip(&observations).filter(|(case, _)| self.wanted(case)) {
            println!("{}", case.name);
            for (fact, value) in observation.iter().filter(|(_, value)| self.verbose || notable(value)) {
                println!("    {fact}: {value}");
            }
        }
        Ok(())
    }

    fn compare(&self, cases: &[Case]) -> Result<()> {
        let envoy = observe::run(self.envoy()?, cases).context("Envoy")?;
        let tidegate = observe::run(Engine::Tidegate, cases).context("tidegate")?;
        let (mut same, mut different) = (0, 0);
        let mut excused: Vec<&Exception> = Vec::new();
        for (number, case) in cases.iter().enumerate().filter(|(_, case)| self.wanted(case)) {
            let mut report = Vec::new();
            for (fact, theirs, ours) in differences(&envoy[number], &tidegate[number]) {
                match exceptions::find(case.name, fact) {
                    Some(exception) => excused.push(exception),
                    None => report.push(format!(
                        "         {fact}\n             Envoy    {theirs}\n             tidegate {ours}"
                    )),
                }
            }
            if report.is_empty() {
                same += 1;
                println!("  same   {}", case.name);
            } else {
                different += 1;
                println!("  DIFF   {}\n{}", case.name, report.join("\n"));
            }
        }
        for exception in exceptions::ALL {
            let times = excused.iter().filter(|excused| excused.reason == exception.reason).count();
            println!("  excused {times} times: {}: {}: {}", exception.case, exception.fact, exception.reason);
        }
        println!(
            "parity with Envoy {}, {} cases:\n{same} passed, {different} failed",
            tool::ENVOY_VERSION,
            same + different
        );
        if different > 0 {
            bail!("tidegate differs from Envoy in {different} cases");
        }
        Ok(())
    }
}

/// Facts on which the two disagree; a fact that one of them lacks is `null` there.
fn differences<'a>(theirs: &'a Observation, ours: &'a Observation) -> Vec<(&'a str, &'a Value, &'a Value)> {
    let facts: std::collections::BTreeSet<&String> = theirs.keys().chain(ours.keys()).collect();
    facts
        .into_iter()
        .map(|fact| {
            (fact.as_str(), theirs.get(fact).unwrap_or(&Value::Null), ours.get(fact).unwrap_or(&Value::Null))
        })
        .filter(|(_, theirs, ours)| theirs != ours)
        .collect()
}

/// Whether a value is worth a line.
fn notable(value: &Value) -> bool {
    !value.is_null() && value.as_u64() != Some(0) && value.as_str() != Some("-")
}
