//! `cargo xtask bench compare OLD NEW`: what changed between two runs by more than they vary.

use std::fmt::Write as _;
use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::report::number;
use super::results::{Results, Series, Spread};
use super::subject::Program;

/// Arguments of `bench compare`.
#[derive(Args, Debug)]
pub(super) struct Compare {
    /// A bench.json.
    old: PathBuf,
    /// A later one.
    new: PathBuf,
    /// Whose figures.
    #[arg(long, value_name = "SUBJECT", default_value = "tidegate")]
    subject: String,
    /// Compare figures divided by this subject's of the same round, so that a slower machine is no change; `none`: the
    /// figures themselves.
    #[arg(long, value_name = "SUBJECT", default_value = "none")]
    to: String,
    /// Show what has not changed too.
    #[arg(long)]
    all: bool,
}

impl Compare {
    pub(super) fn run(&self) -> Result<()> {
        let (old, new) = (Results::read(&self.old)?, Results::read(&self.new)?);
        print!("{}", self.table(&old, &new));
        Ok(())
    }

    fn table(&self, old: &Results, new: &Results) -> String {
        let run = |results: &Results| {
            let version = results.about.versions.get(Program::Tidegate.name());
            format!("{} ({})", results.about.date, version.map_or("no tidegate", String::as_str))
        };
        let mut text = format!("old: {}\nnew: {}\n", run(old), run(new));
        if old.about.machine != new.about.machine {
            text += "the machines differ: compare ratios, with --to haproxy, say\n";
        }
        let _ = writeln!(text, "\n{:<34}{:<22}{:>10}{:>10}{:>9}", "", self.subject, "old", "new", "change");
        let (mut shown, mut compared) = (0, 0);
        for series in &new.series {
            let before = old.find(&series.case, series.metric);
            let Some((before, after)) = before.and_then(|s| self.figure(s)).zip(self.figure(series)) else {
                continue;
            };
            compared += 1;
            let change = Change::between(&before, &after, series.lower_is_better);
            if change == Change::Within && !self.all {
                continue;
            }
            shown += 1;
            let _ = writeln!(
                text,
                "{:<34}{:<22}{:>10}{:>10}{:>+8.1}%  {}",
                series.case,
                format!("{} ({})", series.metric.title(), series.unit),
                number(before.median),
                number(after.median),
                (after.median / before.median - 1.0) * 100.0,
                change.text(),
            );
        }
        let _ = writeln!(text, "{compared} figures compared, {shown} shown");
        text
    }

    fn figure(&self, series: &Series) -> Option<Spread> {
        let own = series.subjects.get(&self.subject)?;
        if self.to == "none" {
            return Some(own.clone());
        }
        let theirs = series.subjects.get(&self.to)?;
        Spread::of(super::results::ratios_by_round(&own.rounds, &theirs.rounds))
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Change {
    /// Each median is within the other run's spread, or the spreads overlap.
    Within,
    Better,
    Worse,
}

impl Change {
    /// Beyond the spread: the rounds of the two runs do not overlap.
    fn between(old: &Spread, new: &Spread, lower_is_better: bool) -> Self {
        let (fell, rose) = (new.max < old.min, new.min > old.max);
        match (fell, rose) {
            (false, false) => Self::Within,
            (fell, _) if fell == lower_is_better => Self::Better,
            _ => Self::Worse,
        }
    }

    fn text(self) -> &'static str {
        match self {
            Self::Within => "",
            Self::Better => "better",
            Self::Worse => "WORSE",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::super::case::Case;
    use super::super::metric::Metric;
    use super::super::results::tests::results;
    use super::super::subject::Subject;
    use super::super::workload::Workload;
    use super::*;

    fn spread(rounds: &[f64]) -> Spread {
        Spread::of(rounds.iter().copied().map(Some).collect()).expect("not empty")
    }

    #[test]
    fn only_what_lies_beyond_the_spread_is_a_change() {
        let old = spread(&[10.0, 11.0, 12.0]);
        assert_eq!(Change::between(&old, &spread(&[11.9, 13.0, 14.0]), true), Change::Within);
        assert_eq!(Change::between(&old, &spread(&[12.1, 13.0]), true), Change::Worse);
        assert_eq!(Change::between(&old, &spread(&[12.1, 13.0]), false), Change::Better);
        assert_eq!(Change::between(&old, &spread(&[9.0, 9.9]), true), Change::Better);
        assert_eq!(Change::between(&old, &spread(&[9.0, 9.9]), false), Change::Worse);
    }

    #[test]
    fn a_slower_machine_is_no_change_of_a_ratio() {
        let (mut old, mut new) = (results(), results());
        let case = Case::loopback(Workload::Short);
        let (tidegate, haproxy) = (Subject::TIDEGATE, Subject::HAPROXY);
        old.add(case, Metric::ProxyCpu, &[(tidegate, &[10.0, 11.0]), (haproxy, &[20.0, 22.0])]);
        new.add(case, Metric::ProxyCpu, &[(tidegate, &[20.0, 21.0]), (haproxy, &[40.0, 42.0])]);
        let compare = |to: &str| Compare {
            old: PathBuf::new(),
            new: PathBuf::new(),
            subject: "tidegate".to_owned(),
            to: to.to_owned(),
            all: false,
        };
        assert!(compare("none").table(&old, &new).contains("WORSE"));
        assert!(compare("haproxy").table(&old, &new).contains("1 figures compared, 0 shown"));
        old.about.versions.clear();
        let table = compare("none").table(&old, &new);
        assert!(
            table.contains("old: 2026-01-02 03:04 UTC (no tidegate)\nnew: 2026-01-02 03:04 UTC (v1)"),
            "{table}"
        );
    }
}
