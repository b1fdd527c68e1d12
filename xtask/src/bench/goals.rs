//! What the data path is to reach, and what a run says about it.
//!
//! Ratios are of one run, round by round, so that they hold on any machine. Where several workloads or peers are named,
//! the worst of them counts; figures count to two digits behind the point.

use std::fmt::Write as _;

use anyhow::{Result, ensure};

use super::case::Case;
use super::metric::Metric;
use super::plan::BULK_ON_ONE_CPU;
use super::report::number;
use super::results::Results;
use super::site::{Placement, Topology};
use super::subject::Subject;
use super::workload::Workload;

/// A bound of one figure.
pub(super) struct Goal {
    what: &'static str,
    cases: &'static [Case],
    metric: Metric,
    /// Whose figure it is.
    subject: Subject,
    /// What it is divided by; nothing: the figure itself is bound.
    to: &'static [Subject],
    bound: Bound,
    /// It is missed only where the rounds agree on that: where no ratio that they allow ([`super::results::Spread::interval`]) is within the
    /// bound.
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

    /// The end of an interval that is nearer to what is wanted.
    fn better(self, (low, high): (f64, f64)) -> f64 {
        match self {
            AtMost(_) => low,
            AtLeast(_) => high,
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

const ONE_CPU: &[Case] = &Case::each(Topology::Loopback, Placement::OneCpu, BULK_ON_ONE_CPU);
const ONE_STREAM: &[Case] =
    &[Case::loopback(Workload::down(1)).one_cpu(), Case::loopback(Workload::up(1)).one_cpu()];
/// Between two CPUs of a virtual machine a wake-up takes longer than any proxy, and depends on where the scheduler puts
/// whom; on one CPU latency is the work that lies between request and answer.
const REQUEST_1: &[Case] = &[Case::loopback(Workload::request(64, 1)).one_cpu()];
const REQUEST_64: &[Case] = &[Case::loopback(Workload::request(64, 64))];
const REQUEST_512: &[Case] = &[Case::loopback(Workload::request(64, 512))];
const SHORT: &[Case] = &[Case::loopback(Workload::Short)];
const VETH_SHORT: &[Case] = &[Case::veth(Workload::Short)];
const MIXED: &[Case] = &[Case::loopback(Workload::MIXED)];
const IDLE: &[Case] = &[Case::loopback(Workload::Idle)];
const INTERCEPT: &[Case] = &[Case::veth(Workload::Intercept)];

const OWN: Subject = Subject::TIDEGATE;
const CAPTURED: Subject = Subject::INTERCEPT;
const ENVOY: &[Subject] = &[Subject::ENVOY];
const HAPROXY: &[Subject] = &[Subject::HAPROXY];
const SPLICE: &[Subject] = &[Subject::HAPROXY_SPLICE];
const PEERS: &[Subject] = &[Subject::ENVOY, Subject::HAPROXY, Subject::HAPROXY_SPLICE, Subject::NGINX];

pub(super) const fn goal(
    what: &'static str,
    cases: &'static [Case],
    metric: Metric,
    subject: Subject,
    to: &'static [Subject],
    bound: Bound,
) -> Goal {
    Goal { what, cases, metric, subject, to, bound, within_noise: false }
}

const GOALS: &[Goal] = &[
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, ENVOY, AtMost(1.0 / 3.0)),
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, SPLICE, AtMost(1.05)),
    goal("bulk, one CPU: proxy CPU", ONE_CPU, Metric::ProxyCpu, OWN, HAPROXY, AtMost(1.0 / 6.0)),
    goal(
        "bulk, one CPU, 1 stream: throughput",
        ONE_STREAM,
        Metric::Rate,
        OWN,
        &[Subject::DIRECT],
        AtLeast(0.72),
    ),
    goal("bulk, one CPU: throughput", ONE_CPU, Metric::Rate, OWN, SPLICE, AtLeast(1.0)),
    goal("64 B, 64 connections: proxy CPU", REQUEST_64, Metric::ProxyCpu, OWN, ENVOY, AtMost(0.40)),
    goal(
        "64 B, 64 connections: proxy CPU",
        REQUEST_64,
        Metric::ProxyCpu,
        OWN,
        &[Subject::HAPROXY, Subject::NGINX],
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
    goal("access log: CPU per connection", SHORT, Metric::ProxyCpu, OWN.logging(), &[OWN], AtMost(1.05)),
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
    /// What the rounds there allow, if noise counts.
    pub(super) interval: Option<(f64, f64)>,
    /// Workloads and peers that were not measured.
    pub(super) missing: usize,
    pub(super) met: bool,
    /// It is met only because the rounds don't agree that it is missed.
    pub(super) excused: bool,
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
    pub(super) fn cases(&self) -> &'static [Case] {
        self.cases
    }

    /// Who must be measured.
    #[cfg(test)]
    pub(super) fn subjects(&self) -> impl Iterator<Item = Subject> {
        self.to.iter().copied().chain([self.subject])
    }

    fn outcome(&self, results: &Results) -> Outcome {
        let (mut worst, mut missing): (Option<Worst>, usize) = (None, 0);
        for case in self.cases {
            let series = results.find(&case.to_string(), self.metric);
            for to in self.compared_with() {
                let spread = match to {
                    None => series.and_then(|series| series.of(self.subject)).cloned(),
                    Some(to) => series.and_then(|series| series.ratio(self.subject, to)),
                };
                let Some(spread) = spread else {
                    missing += 1;
                    continue;
                };
                let interval = self.within_noise.then(|| spread.interval());
                let figure = spread.median;
                let holds = self.bound.holds(figure);
                let met = interval.map_or(holds, |interval| self.bound.holds(self.bound.better(interval)));
                let is_worse = |known: &Worst| {
                    if met == known.met { self.bound.worse(figure, known.figure) } else { known.met }
                };
                if worst.as_ref().is_none_or(is_worse) {
                    worst = Some(Worst { figure, interval, met, holds, place: self.place(*case, to) });
                }
            }
        }
        Outcome {
            what: self.what,
            to: self.to.iter().map(Subject::to_string).collect::<Vec<_>>().join(", "),
            bound: self.bound.text(),
            met: worst.as_ref().is_some_and(|worst| worst.met),
            excused: worst.as_ref().is_some_and(|worst| worst.met && !worst.holds),
            interval: worst.as_ref().and_then(|worst| worst.interval),
            worst: worst.map(|worst| (worst.figure, worst.place)),
            missing,
        }
    }

    /// Who is compared with, one after the other; nobody, once, when the figure itself is bound.
    fn compared_with(&self) -> impl Iterator<Item = Option<Subject>> {
        self.to.iter().copied().map(Some).chain(self.to.is_empty().then_some(None))
    }

    /// Which of several workloads and peers.
    fn place(&self, case: Case, to: Option<Subject>) -> String {
        let workload = (self.cases.len() > 1).then(|| case.workload.to_string());
        let to = to.filter(|_| self.to.len() > 1).map(|to| to.to_string());
        workload.into_iter().chain(to).collect::<Vec<_>>().join(", ")
    }
}

/// The worst figure of a goal so far: of those that miss it, if there are any.
struct Worst {
    figure: f64,
    interval: Option<(f64, f64)>,
    met: bool,
    /// Without an excuse.
    holds: bool,
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
            (true, true) if outcome.excused => "within noise",
            (true, true) => "met",
            (true, false) => "MISSED",
        };
        let place = if place.is_empty() { String::new() } else { format!(" ({place})") };
        let noise = outcome.interval.map_or_else(String::new, |(low, high)| {
            format!(", between {} and {}", number(low), number(high))
        });
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
    use super::super::plan::Choice;
    use super::super::results::tests::results;
    use super::*;

    #[test]
    fn the_worst_counts() {
        let mut results = results();
        let outcome = GOALS[0].outcome(&results);
        assert_eq!(outcome.worst, None, "nothing was measured");
        assert!(!outcome.met);
        results.add(ONE_CPU[0], Metric::ProxyCpu, &[(OWN, &[1.0, 2.0]), (Subject::ENVOY, &[4.0, 8.0])]);
        results.add(ONE_CPU[1], Metric::ProxyCpu, &[(OWN, &[1.0, 2.0]), (Subject::ENVOY, &[2.0, 4.0])]);
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
        let goal = |bound| goal("", VETH_SHORT, Metric::Rate, Subject::KERNEL, &[Subject::DIRECT], bound);
        let mut results = results();
        // The median of the ratios is .96; twelve rounds allow .955 to .975, since one outlier at each end tells nothing.
        let own = [50.0, 95.5, 96.0, 96.0, 96.0, 96.0, 96.0, 96.0, 96.0, 96.5, 97.5, 120.0];
        let figures: [(_, &[f64]); 2] = [(Subject::KERNEL, &own), (Subject::DIRECT, &[100.0; 12])];
        results.add(VETH_SHORT[0], Metric::Rate, &figures);
        assert!(!goal(AtLeast(0.97)).outcome(&results).met);
        let outcome = goal(AtLeast(0.97)).within_noise().outcome(&results);
        assert!(outcome.met && outcome.worst == Some((0.96, String::new())), "{outcome:?}");
        assert_eq!((outcome.interval, outcome.excused), (Some((0.955, 0.975)), true));
        assert!(!goal(AtLeast(0.96)).within_noise().outcome(&results).excused);
        assert!(!goal(AtLeast(0.99)).within_noise().outcome(&results).met);
        assert!(goal(AtMost(0.955)).within_noise().outcome(&results).met);
        assert!(!goal(AtMost(0.94)).within_noise().outcome(&results).met);
    }

    #[test]
    fn of_what_is_missed_the_worst_is_shown_and_else_of_all() {
        let goal = |bound| goal("", ONE_STREAM, Metric::Rate, OWN, ENVOY, bound).within_noise();
        let mut results = results();
        // The lower one varies more.
        for (case, own) in [(ONE_STREAM[0], [0.5, 0.8, 1.2]), (ONE_STREAM[1], [0.89, 0.9, 0.91])] {
            results.add(case, Metric::Rate, &[(OWN, &own), (Subject::ENVOY, &[1.0; 3])]);
        }
        let shown = |bound| {
            let outcome = goal(bound).outcome(&results);
            (outcome.met, outcome.worst.map(|(figure, _)| figure))
        };
        assert_eq!(shown(AtLeast(1.0)), (false, Some(0.9)));
        assert_eq!(shown(AtLeast(0.9)), (true, Some(0.8)));
    }

    #[test]
    fn the_full_run_measures_every_goal_and_the_quick_one_nearly() {
        let (full, quick) = (Choice::default().plan(), Choice { quick: true, ..Choice::default() }.plan());
        for goal in GOALS {
            for subject in goal.subjects() {
                for case in goal.cases {
                    assert!(full.measures(*case, subject), "{case}: {subject}");
                }
                assert!(quick.measures(goal.cases[0], subject), "{}: {subject}", goal.cases[0]);
            }
        }
    }
}
