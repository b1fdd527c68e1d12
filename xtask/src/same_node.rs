//! `cargo xtask same-node`: what applications see of a connection whose two ends are on one node when eBPF hands the data
//! from socket to socket (`sockops` and `sk_msg`), against the same connection without it. docs/same-node.md says what
//! came of it.

mod acceleration;
mod kernel;
mod program;
mod property;
mod site;
mod speed;
mod talk;
mod trial;

use anyhow::{Context, Result, ensure};
use clap::Args;
use tidegate_tests::tool;

use acceleration::{Acceleration, Counts};
use site::{Route, Site};
use trial::{Property, Trial, Tried};

use crate::root;

/// Arguments of `same-node`.
#[derive(Args, Debug)]
pub(crate) struct SameNode {
    /// Only properties whose name or subject contains this text.
    filter: Option<String>,
    /// How often each property is tried, each time with the next seed.
    #[arg(long, value_name = "COUNT", default_value_t = 1, value_parser = clap::value_parser!(u64).range(1..))]
    rounds: u64,
    /// The first seed.
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,
    /// Measure requests and bulk instead, each as the ratio of the two in turns.
    #[arg(long)]
    speed: bool,
}

impl SameNode {
    pub(crate) fn run(&self) -> Result<()> {
        let known = property::ALL.iter().any(|(subject, all)| all.iter().any(|one| self.wants(subject, one)));
        ensure!(known, "no property and no subject has this in its name");
        root::become_root()?;
        root::clean_up_on_signals_after(site::leave_cgroup)?;
        tool::require(&[("ip", "iproute2"), ("tc", "iproute2"), ("nsenter", "util-linux")])?;
        let site = Site::new()?;
        if self.speed {
            return speed::run(&site);
        }
        let mut total = Tally::default();
        println!("| property | TCP | accelerated |\n|---|---|---|");
        for (subject, properties) in property::ALL {
            let mut wanted = properties.iter().filter(|property| self.wants(subject, property)).peekable();
            if wanted.peek().is_some() {
                println!("| **{subject}** | | |");
            }
            for property in wanted {
                self.compare(&site, property, &mut total)?;
            }
        }
        println!(
            "\n{} of {} properties differ. {} messages were handed from socket to socket, {} went through TCP.",
            total.different, total.properties, total.counts.redirected, total.counts.passed
        );
        ensure!(total.counts.redirected > 0, "nothing was accelerated: no property was tried");
        Ok(())
    }

    fn wants(&self, subject: &str, property: &Property) -> bool {
        self.filter.as_deref().is_none_or(|filter| property.name.contains(filter) || subject.contains(filter))
    }

    fn compare(&self, site: &Site, property: &Property, total: &mut Tally) -> Result<()> {
        let plain = self.outcomes(site, property, None).with_context(|| property.name)?;
        let accelerated =
            self.outcomes(site, property, Some(&mut total.counts)).with_context(|| property.name)?;
        let same = plain == accelerated;
        total.properties += 1;
        total.different += usize::from(!same);
        let accelerated = if same { "the same".to_owned() } else { accelerated.join("; or: ") };
        println!("| {} | {} | {} |", property.name, plain.join("; or: "), accelerated);
        Ok(())
    }

    /// What is seen with each end in each role, on each route, with each seed; each outcome once.
    fn outcomes(
        &self,
        site: &Site,
        property: &Property,
        mut counts: Option<&mut Counts>,
    ) -> Result<Vec<String>> {
        let routes: &[_] =
            if property.tried == Tried::Veth { &[Route::Veth] } else { &[Route::Loopback, Route::Veth] };
        let roles: &[_] = if property.tried == Tried::BothWays { &[false, true] } else { &[false] };
        let mut outcomes = Vec::new();
        for seed in self.seed..self.seed + self.rounds {
            for &route in routes {
                for &swapped in roles {
                    let acceleration =
                        counts.is_some().then(|| Acceleration::attach(site.cgroup())).transpose()?;
                    let mut trial = Trial { site, route, acceleration, swapped, seed };
                    outcomes
                        .push((property.run)(&mut trial).with_context(|| format!("{route}, seed {seed}"))?);
                    if let (Some(counts), Some(acceleration)) = (&mut counts, &trial.acceleration) {
                        counts.add(acceleration.counts()?);
                    }
                }
            }
        }
        outcomes.sort();
        outcomes.dedup();
        Ok(outcomes)
    }
}

/// What a run has found.
#[derive(Debug, Default)]
struct Tally {
    properties: usize,
    different: usize,
    counts: Counts,
}
