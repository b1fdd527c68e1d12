//! bench.json: what a run has measured, for programs. Bump [`SCHEMA`] when a field changes its meaning.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};

use super::case::Case;
use super::metric::Metric;
use super::site::Topology;
use super::subject::Subject;

/// Version of the schema.
pub(super) const SCHEMA: u32 = 2;

/// A whole run.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Results {
    pub(super) schema: u32,
    pub(super) about: About,
    pub(super) series: Vec<Series>,
    /// Measurements that could not be made, twice.
    pub(super) failures: Vec<String>,
}

/// When, where and how.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct About {
    pub(super) date: String,
    pub(super) machine: Machine,
    /// Program and its version; of tidegate the commit.
    pub(super) versions: BTreeMap<String, String>,
    pub(super) settings: Settings,
    pub(super) load_average_before: String,
    pub(super) load_average_after: String,
    pub(super) seconds: f64,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Machine {
    pub(super) cpu: String,
    pub(super) cpus: usize,
    pub(super) memory_gib: u64,
    pub(super) kernel: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Settings {
    pub(super) quick: bool,
    /// Of each proxy.
    pub(super) worker_threads: u32,
    pub(super) rounds: u32,
    pub(super) seconds_per_measurement: f64,
    pub(super) idle_connections: usize,
    pub(super) congestion_control: String,
    /// How the peers are set up beyond their defaults.
    pub(super) peers: BTreeMap<String, String>,
}

/// One figure of one workload, of everybody.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Series {
    /// Topology, workload and placement: `loopback/bulk-1-down@one-cpu`.
    pub(super) case: String,
    pub(super) topology: Topology,
    pub(super) workload: String,
    /// `free`, `pinned` or `one-cpu`.
    pub(super) placement: String,
    pub(super) title: String,
    pub(super) metric: Metric,
    pub(super) unit: String,
    pub(super) lower_is_better: bool,
    pub(super) subjects: BTreeMap<String, Spread>,
    /// tidegate's figure divided by each other one, round by round.
    pub(super) tidegate_to: BTreeMap<String, Spread>,
}

/// A figure, round by round.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) min: f64,
    pub(super) max: f64,
    /// Null where it could not be measured.
    pub(super) rounds: Vec<Option<f64>>,
}

impl Spread {
    /// `None` of nothing.
    pub(super) fn of(rounds: Vec<Option<f64>>) -> Option<Self> {
        let mut known: Vec<f64> =
            rounds.iter().flatten().copied().filter(|value| value.is_finite()).collect();
        known.sort_by(f64::total_cmp);
        let (min, max) = (short(*known.first()?), short(*known.last()?));
        let rounds = rounds.into_iter().map(|value| value.map(short)).collect();
        Some(Self { median: short(median(&known)), min, max, rounds })
    }

    /// Two rounds between which the median of very many would be found, but for one run of a hundred, whatever the figures are
    /// like (an interval by order statistics, as of the sign test). Of fewer than eight rounds it is the lowest and the
    /// highest, which is right less often.
    pub(super) fn interval(&self) -> (f64, f64) {
        let mut known: Vec<_> = self.rounds.iter().flatten().copied().collect();
        known.sort_by(f64::total_cmp);
        let rounds = known.len() as i32;
        // That `left_out` rounds or fewer lie on one side of the median, and the same of the other side.
        let mut chance = 2.0 * 0.5_f64.powi(rounds);
        let (mut term, mut left_out) = (chance, 0);
        while left_out + 1 < rounds {
            term *= f64::from(rounds - left_out) / f64::from(left_out + 1);
            if chance + term > 0.01 {
                break;
            }
            (chance, left_out) = (chance + term, left_out + 1);
        }
        let at = |index: i32| known.get(index as usize).copied().unwrap_or(self.median);
        (at(left_out), at(rounds - 1 - left_out))
    }
}

/// To five digits: no figure of a bench has more.
fn short(value: f64) -> f64 {
    if value == 0.0 || !value.is_finite() {
        return value;
    }
    let scale = 10_f64.powi(4 - value.abs().log10().floor() as i32);
    let rounded = (value * scale).round() / scale;
    // Division leaves digits behind that parsing the shortest text does not.
    format!("{rounded:.*}", scale.log10().max(0.0) as usize).parse().unwrap_or(rounded)
}

/// NaN of nothing.
pub(super) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    match sorted.len() {
        0 => f64::NAN,
        count if count % 2 == 1 => sorted[count / 2],
        count => f64::midpoint(sorted[count / 2 - 1], sorted[count / 2]),
    }
}

/// Round by round: what disturbed one round disturbed both.
pub(super) fn ratios_by_round(own: &[Option<f64>], theirs: &[Option<f64>]) -> Vec<Option<f64>> {
    let ratio = |(own, theirs): (&Option<f64>, &Option<f64>)| {
        own.zip(*theirs).map(|(own, theirs)| own / theirs).filter(|ratio| ratio.is_finite())
    };
    own.iter().zip(theirs).map(ratio).collect()
}

/// Figures as they come in.
#[derive(Debug, Default)]
pub(super) struct Samples {
    /// In the order in which they were measured first.
    cases: Vec<Case>,
    /// By the case's number.
    figures: BTreeMap<(usize, Metric), Figures>,
}

/// Everybody's figures, round by round.
type Figures = BTreeMap<Subject, Vec<Option<f64>>>;

impl Samples {
    /// Adds what one measurement brought. `round` counts from 0: what is missing before it was not measured.
    pub(super) fn add(&mut self, case: Case, subject: Subject, round: usize, figures: &[(Metric, f64)]) {
        let number = self.cases.iter().position(|known| *known == case).unwrap_or_else(|| {
            self.cases.push(case);
            self.cases.len() - 1
        });
        for (metric, value) in figures {
            let rounds = self.figures.entry((number, *metric)).or_default().entry(subject).or_default();
            rounds.resize(round, None);
            rounds.push(Some(*value));
        }
    }

    /// In the order in which the cases were measured first.
    pub(super) fn series(&self) -> Vec<Series> {
        self.figures
            .iter()
            .map(|((number, metric), figures)| series(self.cases[*number], *metric, figures))
            .collect()
    }
}

fn series(case: Case, metric: Metric, figures: &Figures) -> Series {
    let (mut subjects, mut tidegate_to) = (BTreeMap::new(), BTreeMap::new());
    let own = figures.get(&Subject::TIDEGATE);
    for (subject, rounds) in figures {
        if let Some(spread) = Spread::of(rounds.clone()) {
            subjects.insert(subject.to_string(), spread);
        }
        let ratios = own.filter(|_| *subject != Subject::TIDEGATE).map(|own| ratios_by_round(own, rounds));
        if let Some(spread) = ratios.and_then(Spread::of) {
            tidegate_to.insert(subject.to_string(), spread);
        }
    }
    let placement = case.placement.suffix().trim_start_matches('@');
    Series {
        case: case.to_string(),
        topology: case.topology,
        workload: case.workload.to_string(),
        placement: if placement.is_empty() { "free" } else { placement }.to_owned(),
        title: case.workload.title(),
        metric,
        unit: metric.unit(case.workload),
        lower_is_better: metric.lower_is_better(),
        subjects,
        tidegate_to,
    }
}

impl Series {
    /// The figure of a subject.
    pub(super) fn of(&self, subject: Subject) -> Option<&Spread> {
        self.subjects.get(&subject.to_string())
    }

    /// One figure divided by another, round by round.
    pub(super) fn ratio(&self, own: Subject, to: Subject) -> Option<Spread> {
        let (own, to) = self.of(own).zip(self.of(to))?;
        Spread::of(ratios_by_round(&own.rounds, &to.rounds))
    }
}

impl Results {
    /// Reads a bench.json.
    pub(super) fn read(path: &Path) -> Result<Self> {
        let text = fs::read_to_string(path).with_context(|| format!("read {}", path.display()))?;
        Self::parse(&text).with_context(|| path.display().to_string())
    }

    pub(super) fn parse(text: &str) -> Result<Self> {
        #[derive(Deserialize)]
        struct Version {
            schema: Option<u32>,
        }
        let version: Version = serde_json::from_str(text).context("it is no bench.json")?;
        ensure!(
            version.schema == Some(SCHEMA),
            "it has schema {}, this command reads {SCHEMA}: run `cargo xtask bench` again",
            version.schema.map_or_else(|| "1 (or none)".to_owned(), |schema| schema.to_string()),
        );
        serde_json::from_str(text).context("it is no bench.json")
    }

    /// One series.
    pub(super) fn find(&self, case: &str, metric: Metric) -> Option<&Series> {
        self.series.iter().find(|series| series.case == case && series.metric == metric)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::super::workload::Workload;
    use super::*;

    /// Nothing yet.
    pub(in super::super) fn results() -> Results {
        let machine =
            Machine { cpu: "a CPU".to_owned(), cpus: 2, memory_gib: 4, kernel: "6.18.0".to_owned() };
        let settings = Settings {
            quick: false,
            worker_threads: 1,
            rounds: 2,
            seconds_per_measurement: 1.0,
            idle_connections: 9000,
            congestion_control: "cubic".to_owned(),
            peers: BTreeMap::new(),
        };
        let versions =
            [("tidegate", "v1"), ("envoy", "1.40.0"), ("haproxy", "2.6.12-1"), ("nginx", "1.22.1")];
        Results {
            schema: SCHEMA,
            about: About {
                date: "2026-01-02 03:04 UTC".to_owned(),
                machine,
                versions: versions.map(|(name, version)| (name.to_owned(), version.to_owned())).into(),
                settings,
                load_average_before: "0.10".to_owned(),
                load_average_after: "1.20".to_owned(),
                seconds: 100.0,
            },
            series: Vec::new(),
            failures: Vec::new(),
        }
    }

    impl Results {
        /// Adds a series of these figures.
        pub(in super::super) fn add(&mut self, case: Case, metric: Metric, figures: &[(Subject, &[f64])]) {
            let figures = figures
                .iter()
                .map(|(subject, rounds)| (*subject, rounds.iter().copied().map(Some).collect()));
            self.series.push(series(case, metric, &figures.collect()));
        }
    }

    #[test]
    fn the_middle_of_values() {
        assert!(median(&[]).is_nan());
        assert!((median(&[3.0, 1.0, 2.0]) - 2.0).abs() < 1e-9);
        assert!((median(&[4.0, 1.0, 2.0, 3.0]) - 2.5).abs() < 1e-9);
    }

    #[test]
    fn the_interval_leaves_out_what_chance_brings() {
        let of = |rounds: i32| Spread::of((1..=rounds).map(|round| Some(round.into())).collect()).unwrap();
        // As tables of the sign test have it.
        for (rounds, low, high) in [
            (1, 1.0, 1.0),
            (2, 1.0, 2.0),
            (7, 1.0, 7.0),
            (8, 1.0, 8.0),
            (12, 2.0, 11.0),
            (20, 4.0, 17.0),
            (40, 12.0, 29.0),
        ] {
            assert_eq!(of(rounds).interval(), (low, high), "{rounds}");
        }
        assert_eq!(Spread::of(vec![Some(3.0), None, Some(1.0)]).unwrap().interval(), (1.0, 3.0));
    }

    #[test]
    fn ratios_are_of_the_same_round() {
        let case = Case::loopback(Workload::Short);
        let mut samples = Samples::default();
        // One slow round of both: the ratio does not show it. One round that one of them missed does not count.
        for (round, own, theirs) in [
            (0, Some(1.0), Some(2.0)),
            (1, Some(10.0), Some(20.0)),
            (2, None, Some(7.0)),
            (3, Some(1.0), Some(2.0)),
        ] {
            for (subject, value) in [(Subject::TIDEGATE, own), (Subject::ENVOY, theirs)] {
                if let Some(value) = value {
                    samples.add(case, subject, round, &[(Metric::ProxyCpu, value)]);
                }
            }
        }
        let series = samples.series();
        assert_eq!(series.len(), 1);
        let ratio = &series[0].tidegate_to["envoy"];
        assert!((ratio.median - 0.5).abs() < 1e-9 && (ratio.max - 0.5).abs() < 1e-9);
        assert_eq!(ratio.rounds[2], None);
        assert!((series[0].subjects["tidegate"].median - 1.0).abs() < 1e-9);
        assert_eq!(series[0].unit, "µs/connection");
    }

    #[test]
    fn figures_have_five_digits() {
        for (value, text) in [
            (0.123_456_7, "0.12346"),
            (123_456.7, "123460.0"),
            (1.0, "1.0"),
            (0.0, "0.0"),
            (9.999_99, "10.0"),
        ] {
            assert_eq!(format!("{:?}", short(value)), text);
        }
    }

    #[test]
    fn other_schemas_are_refused() {
        let error = Results::parse(r#"{"schema": 1}"#).expect_err("an old one");
        assert!(error.to_string().contains("schema 1"), "{error:#}");
        assert!(Results::parse("{}").is_err());
        assert!(Results::parse("[").is_err());
    }
}
