//! What the data path is to reach, and what a run says about it.
//!
//! Ratios are of one run, round by round, so that they hold on any machine. Where several workloads or peers are named,
//! the worst of them counts; figures count to two digits behind the point.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::metric::Metric;
use super::report::number;
use super::results::{Results, Spread};

/// A bound of one figure.
pub(super) struct Goal {
    what: &'static str,
    cases: &'static [&'static str],
    metric: Metric,
    /// Whose figure it is.
    subject: &'static str,
    /// What it is divided by; nothing: the figure itself is bound.
    to: &'static [&'static str],
    bound: Bound,
    /// A figure beyond the bound by no more than what it is divided by varies from round to round ([`Spread::noise`]) is no
    /// miss.
    within_noise: bool,
}

#[derive(Clone, Copy)]
pub(super) enum Bound {
    AtMost(f64),
    AtLeast(f64),
}
use Bound::{AtLeast, AtMost};

impl Bound {
    fn holds(self, value: f64) -> bool {
        let value = (value * 100.0).round() / 100.0;
        match self {
            AtMost(bound) => value <= (bound * 100.0).round() / 100.0,
            AtLeast(bound) => value >= bound,
        }
    }

    /// The figure that it would be without so much bad luck.
    fn relaxed(self, value: f64, noise: f64) -> f64 {
        match self {
            AtMost(_) => value / (1.0 + noise),
            AtLeast(_) => value * (1.0 + noise),
        }
    }

    fn worse(self, a: f64, b: f64) -> bool {
        match self {
            AtMost(_) => a > b,
            AtLeast(_) => a < b,
        }
    }

    fn text(self) -> String {
        match self {
            AtMost(bound) => format!("≤ {}", plain(bound)),
            AtLeast(bound) => format!("≥ {}", plain(bound)),
        }
    }
}

const ONE_CPU: &[&str] = &[
    "loopback/bulk-1-down@one-cpu",
    "loopback/bulk-8-down@one-cpu",
    "loopback/bulk-64-down@one-cpu",
    "loopback/bulk-1-up@one-cpu",
    "loopback/bulk-8-up@one-cpu",
];
const ONE_STREAM: &[&str] = &["loopback/bulk-1-down@one-cpu", "loopback/bulk-1-up@one-cpu"];
/// Between two CPUs of a virtual machine a wake-up takes longer than any proxy, and depends on where the scheduler puts
/// whom; on one CPU latency is the work that lies between request and answer.
const REQUEST_1: &[&str] = &["loopback/request-64x1@one-cpu"];
const REQUEST_64: &[&str] = &["loopback/request-64x64"];
const REQUEST_512: &[&str] = &["loopback/request-64x512"];
const SHORT: &[&str] = &["loopback/short"];
const VETH_SHORT: &[&str] = &["veth/short"];
const MIXED: &[&str] = &["loopback/mixed-64"];
const IDLE: &[&str] = &["loopback/idle"];
const INTERCEPT: &[&str] = &["veth/intercept"];

const OWN: &str = "tidegate";
const CAPTURED: &str = "tidegate+intercept";
const ENVOY: &[&str] = &["envoy"];
const HAPROXY: &[&str] = &["haproxy"];
const SPLICE: &[&str] = &["haproxy-splice"];
const PEERS: &[&str] = &["envoy", "haproxy", "haproxy-splice", "nginx"];

pub(super) const fn goal(
    what: &'static str,
    cases: &'static [&'static str],
    metric: Metric,
    subject: &'static str,
    to: &'static [&'static str],
    bound: Bound,
) -> Goal {
    Goal { what, cases, metric, subject, to, bound, within_noise: false }
}

const GOALS: &[Goal] = &[
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, ENVOY, AtMost(1.0 / 3.0)),
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, SPLICE, AtMost(1.05)),
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, HAPROXY, AtMost(1.0 / 6.0)),
    goal("bulk, one CPU, 1 stream: throughput", ONE_STREAM, Metric::Rate, OWN, &["direct"], AtLeast(0.72)),
    goal("bulk, one CPU: throughput", ONE_CPU, Metric::Rate, OWN, SPLICE, AtLeast(1.0)),
    goal("64 B, 64 connections: proxy CPU", REQUEST_64, Metric::ProxyCpu, OWN, ENVOY, AtMost(0.40)),
    goal(
        "64 B, 64 connections: proxy CPU",
        REQUEST_64,
        Metric::ProxyCpu,
        OWN,
        &["haproxy", "nginx"],
        AtMost(0.75),
    ),
    goal("64 B, 1 connection, one CPU: p50", REQUEST_1, Metric::P50, OWN, PEERS, AtMost(1.0)),
    goal("64 B, 1 connection, one CPU: p99", REQUEST_1, Metric::P99, OWN, PEERS, AtMost(1.0)),
    goal("64 B, 512 connections: rate", REQUEST_512, Metric::Rate, OWN, ENVOY, AtLeast(1.8)),
    goal("64 B, 512 connections: rate", REQUEST_512, Metric::Rate, OWN, HAPROXY, AtLeast(1.2)),
    goal("connect, 64 B, close: rate", SHORT, Metric::Rate, OWN, ENVOY, AtLeast(1.8)),
    goal("connect, 64 B, close: rate", SHORT, Metric::Rate, OWN, HAPROXY, AtLeast(1.2)),
    goal("the same over veth, intercepted", VETH_SHORT, Metric::Rate, CAPTURED, ENVOY, AtLeast(1.8)),
    goal("the same over veth, intercepted", VETH_SHORT, Metric::Rate, CAPTURED, HAPROXY, AtLeast(1.2)),
    goal("64 B beside 64 bulk streams: p99", MIXED, Metric::P99, OWN, PEERS, AtMost(1.0)),
    goal("RSS per idle connection, B", IDLE, Metric::RssPerConnection, OWN, &[], AtMost(1000.0)),
    goal("RSS at start, MB", IDLE, Metric::RssStart, OWN, &[], AtMost(12.0)),
    goal("access log: CPU per connection", SHORT, Metric::ProxyCpu, "tidegate+log", &[OWN], AtMost(1.05)),
    goal("interception: µs of CPU per connect", INTERCEPT, Metric::InterceptCpu, CAPTURED, &[], AtMost(3.0)),
    goal("its programs run by pods not captured", INTERCEPT, Metric::ForeignRuns, CAPTURED, &[], AtMost(0.0)),
];

/// What became of a goal.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) what: &'static str,
    pub(super) to: String,
    pub(super) bound: String,
    /// The worst of what was measured, and where; `None` when nothing was.
    pub(super) worst: Option<(f64, String)>,
    /// The noise there, if it counts.
    pub(super) noise: Option<f64>,
    /// Workloads and peers that were not measured.
    pub(super) missing: usize,
    pub(super) met: bool,
}

/// Every goal of the data path.
pub(super) fn outcomes(results: &Results) -> Vec<Outcome> {
    outcomes_of(GOALS, results)
}

/// These goals.
pub(super) fn outcomes_of(goals: &[Goal], results: &Results) -> Vec<Outcome> {
    goals.iter().map(|goal| goal.outcome(results)).collect()
}

/// Fails when a goal is missed, or was not measured.
pub(super) fn require(outcomes: &[Outcome]) -> Result<()> {
    let missed = outcomes.iter().filter(|outcome| !outcome.met).count();
    ensure!(missed == 0, "{missed} of {} goals are missed", outcomes.len());
    Ok(())
}

impl Goal {
    /// The same, but for the run's noise.
    pub(super) const fn within_noise(self) -> Self {
        Self { within_noise: true, ..self }
    }

    #[cfg(test)]
    pub(super) fn cases(&self) -> &'static [&'static str] {
        self.cases
    }

    /// Who must be measured.
    #[cfg(test)]
    pub(super) fn subjects(&self) -> impl Iterator<Item = &'static str> {
        self.to.iter().copied().chain([self.subject])
    }

    fn outcome(&self, results: &Results) -> Outcome {
        let (mut worst, mut missing): (Option<Worst>, usize) = (None, 0);
        for case in self.cases {
            let series = results.find(case, self.metric);
            let own = series.and_then(|series| series.subjects.get(self.subject));
            for to in if self.to.is_empty() { &[""] } else { self.to } {
                let figure = if self.to.is_empty() {
                    own.map(|spread| spread.median)
                } else {
                    series.and_then(|series| series.ratio(self.subject, to))
                };
                let Some(figure) = figure else {
                    missing += 1;
                    continue;
                };
                let theirs = series.and_then(|series| series.subjects.get(*to)).filter(|_| self.within_noise);
                let noise = theirs.map(Spread::noise);
                let relaxed = self.bound.relaxed(figure, noise.unwrap_or_default());
                if worst.as_ref().is_none_or(|known| self.bound.worse(relaxed, known.relaxed)) {
                    worst = Some(Worst { figure, noise, relaxed, place: self.place(case, to) });
                }
            }
        }
        Outcome {
            what: self.what,
            to: self.to.join(", "),
            bound: self.bound.text(),
            met: worst.as_ref().is_some_and(|worst| self.bound.holds(worst.relaxed)),
            noise: worst.as_ref().and_then(|worst| worst.noise),
            worst: worst.map(|worst| (worst.figure, worst.place)),
            missing,
        }
    }

    /// Which of several workloads and peers.
    fn place(&self, case: &str, to: &str) -> String {
        let workload = case.split(['/', '@']).nth(1).unwrap_or(case);
        match (self.cases.len() > 1, self.to.len() > 1) {
            (true, true) => format!("{workload}, {to}"),
            (true, false) => workload.to_owned(),
            (false, true) => to.to_owned(),
            (false, false) => String::new(),
        }
    }
}

/// The worst figure of a goal so far.
struct Worst {
    figure: f64,
    noise: Option<f64>,
    /// What is compared with the bound.
    relaxed: f64,
    place: String,
}

fn plain(value: f64) -> String {
    if value >= 10.0 || value == 0.0 { format!("{value:.0}") } else { format!("{value:.2}") }
}

/// The goals with what was measured, for people.
pub(super) fn table(outcomes: &[Outcome]) -> String {
    let mut text = format!("\n{:<40}{:<42}{:>8}{:>10}  \n", "goal", "compared with", "", "measured");
    for outcome in outcomes {
        let (measured, place) = match &outcome.worst {
            Some((figure, place)) => (number(*figure), place.as_str()),
            None => ("-".to_owned(), ""),
        };
        let verdict = match (outcome.worst.is_some(), outcome.met) {
            (false, _) => "not measured",
            (true, true) => "met",
            (true, false) => "MISSED",
        };
        let place = if place.is_empty() { String::new() } else { format!(" ({place})") };
        let noise =
            outcome.noise.map_or_else(String::new, |noise| format!(", noise ±{:.1} %", noise * 100.0));
        let missing = match outcome.missing {
            missing if missing > 0 && outcome.worst.is_some() => format!(", {missing} not measured"),
            _ => String::new(),
        };
        let _ = writeln!(
            text,
            "{:<40}{:<42}{:>8}{measured:>10}  {verdict}{place}{noise}{missing}",
            outcome.what, outcome.to, outcome.bound
        );
    }
    text
}

#[cfg(test)]
mod tests {
    use super::super::plan::{Choice, Plan};
    use super::super::results::tests::results;
    use super::*;

    #[test]
    fn the_worst_counts() {
        let mut results = results();
        let outcome = GOALS[0].outcome(&results);
        assert_eq!(outcome.worst, None, "nothing was measured");
        assert!(!outcome.met);
        results.add(
            "loopback/bulk-1-down@one-cpu",
            Metric::ProxyCpu,
            &[("tidegate", &[1.0, 2.0]), ("envoy", &[4.0, 8.0])],
        );
        results.add(
            "loopback/bulk-8-down@one-cpu",
            Metric::ProxyCpu,
            &[("tidegate", &[1.0, 2.0]), ("envoy", &[2.0, 4.0])],
        );
        let outcome = GOALS[0].outcome(&results);
        assert_eq!(outcome.worst, Some((0.5, "bulk-8-down".to_owned())));
        assert!(!outcome.met);
        assert_eq!(outcome.missing, 3);
    }

    #[test]
    fn bounds_hold_to_two_digits() {
        assert!(AtMost(1.0 / 3.0).holds(0.334) && !AtMost(1.0 / 3.0).holds(0.336));
        assert!(AtLeast(0.72).holds(0.716) && !AtLeast(0.72).holds(0.714));
        assert!(AtMost(0.0).holds(0.0) && !AtMost(0.0).holds(0.5));
    }

    #[test]
    fn noise_excuses_no_more_than_itself() {
        let goal = |bound| goal("", &["veth/short"], Metric::Rate, "tidegate+kernel", &["direct"], bound);
        let mut results = results();
        // The median of the ratios is .96, and half of direct's rounds are within 2 % of their median.
        let (own, direct) = ([96.0, 94.08, 97.92], [100.0, 98.0, 102.0]);
        results.add("veth/short", Metric::Rate, &[("tidegate+kernel", &own), ("direct", &direct)]);
        assert!(!goal(AtLeast(0.97)).outcome(&results).met);
        let outcome = goal(AtLeast(0.97)).within_noise().outcome(&results);
        assert!(outcome.met && outcome.worst == Some((0.96, String::new())), "{outcome:?}");
        assert!(outcome.noise.is_some_and(|noise| (noise - 0.02).abs() < 1e-9), "{outcome:?}");
        assert!(!goal(AtLeast(0.99)).within_noise().outcome(&results).met);
        assert!(goal(AtMost(0.95)).within_noise().outcome(&results).met);
        assert!(!goal(AtMost(0.93)).within_noise().outcome(&results).met);
    }

    fn measures(plan: &Plan, case: &str, subject: &str) -> bool {
        plan.entries.iter().any(|entry| {
            entry.case.to_string() == case && entry.subjects.iter().any(|known| known.to_string() == subject)
        })
    }

    #[test]
    fn the_full_run_measures_every_goal_and_the_quick_one_nearly() {
        let (full, quick) = (Choice::default().plan(), Choice { quick: true, ..Choice::default() }.plan());
        for goal in GOALS {
            for case in goal.cases {
                for subject in goal.to.iter().chain([&goal.subject]) {
                    assert!(measures(&full, case, subject), "{case}: {subject}");
                }
            }
            for subject in goal.to.iter().chain([&goal.subject]) {
                assert!(measures(&quick, goal.cases[0], subject), "{}: {subject}", goal.cases[0]);
            }
        }
    }
}
