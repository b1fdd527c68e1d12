//! What is measured, of whom, and how often.

use std::time::Duration;

use super::case::Case;
use super::site::{Placement, Topology};
use super::subject::{Program, Subject};
use super::workload::{DIRECTIONS, STREAMS, Workload};

/// Bulk whose work is compared on one CPU.
pub(super) const BULK_ON_ONE_CPU: [Workload; 5] =
    [Workload::down(1), Workload::down(8), Workload::down(64), Workload::up(1), Workload::up(8)];

/// A case and who is measured in it, in this order.
#[derive(Clone, Debug)]
pub(super) struct Entry {
    pub(super) case: Case,
    pub(super) subjects: Vec<Subject>,
    /// Those of them who are measured in the first rounds only ([`Plan::few_rounds`]).
    pub(super) seldom: Vec<Subject>,
}

impl Entry {
    /// All of them in each round.
    fn new(case: Case, subjects: Vec<Subject>) -> Self {
        Self { case, subjects, seldom: Vec::new() }
    }
}

/// A whole run.
#[derive(Clone, Debug)]
pub(super) struct Plan {
    pub(super) entries: Vec<Entry>,
    pub(super) rounds: u32,
    /// Rounds of what no goal depends on to the last percent.
    pub(super) few_rounds: u32,
    /// Rounds of memory, whose figures hardly vary.
    pub(super) memory_rounds: u32,
    /// Length of one measurement.
    pub(super) measure: Duration,
}

/// What the command line chooses; empty lists choose the default.
#[derive(Clone, Debug, Default)]
pub(super) struct Choice {
    pub(super) quick: bool,
    pub(super) rounds: Option<u32>,
    pub(super) measure: Option<Duration>,
    pub(super) only: Vec<Selector>,
    pub(super) subjects: Vec<Subject>,
    pub(super) topology: Option<Topology>,
    pub(super) placement: Option<Placement>,
    /// There is a second tidegate.
    pub(super) base: bool,
}

/// `request-64x64`, `short@one-cpu`, or a group: `bulk`, `request`, `iperf3`, `wrk`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Selector {
    workloads: Vec<Workload>,
    placement: Option<Placement>,
}

impl std::str::FromStr for Selector {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let (name, placement) = match text.find('@') {
            None => (text, None),
            Some(at) => {
                let placement =
                    Placement::ALL.into_iter().find(|placement| placement.suffix() == &text[at..]);
                let placement = placement.ok_or("after @: pinned or one-cpu")?;
                (&text[..at], Some(placement))
            }
        };
        let group: Vec<_> = every()
            .into_iter()
            .filter(|workload| workload.to_string().split('-').next() == Some(name))
            .collect();
        // `short`, `idle` and `mixed` are names and groups of one.
        let workloads = if group.is_empty() { vec![name.parse()?] } else { group };
        Ok(Self { workloads, placement })
    }
}

/// Every workload of a full run.
fn every() -> Vec<Workload> {
    let mut all = vec![Workload::Idle];
    for streams in STREAMS {
        all.extend(DIRECTIONS.map(|direction| Workload::Bulk { streams, direction }));
    }
    all.extend(Workload::REQUESTS);
    all.extend([Workload::Short, Workload::MIXED]);
    all.extend([1, 8].map(|streams| Workload::Iperf3 { streams }));
    all.extend([Workload::Wrk { connections: 64 }, Workload::Intercept]);
    all
}

impl Choice {
    /// Everybody without access logs and interception.
    fn plain(&self) -> Vec<Subject> {
        Program::ALL
            .into_iter()
            .filter(|program| *program != Program::Base || self.base)
            .map(Subject::plain)
            .collect()
    }

    /// Those with access logs.
    fn logging(&self) -> Vec<Subject> {
        let mut subjects = vec![Subject::TIDEGATE, Subject::ENVOY];
        if !self.quick {
            subjects.extend([Subject::HAPROXY, Subject::NGINX]);
        }
        subjects.into_iter().map(Subject::logging).collect()
    }

    /// The plan that this makes.
    pub(super) fn plan(&self) -> Plan {
        let mut entries = if self.only.is_empty() { self.standard() } else { self.selected() };
        if let Some(topology) = self.topology {
            entries.retain(|entry| entry.case.topology == topology);
        }
        if !self.subjects.is_empty() {
            for entry in &mut entries {
                let veth = entry.case.topology == Topology::Veth;
                entry.subjects.clone_from(&self.subjects);
                entry.subjects.retain(|subject| veth || !subject.is_captured());
            }
        }
        for entry in &mut entries {
            entry.subjects.retain(|subject| entry.case.workload.suits(*subject));
        }
        entries.retain(|entry| !entry.subjects.is_empty());
        if let Some(placement) = self.placement {
            for entry in &mut entries {
                entry.case.placement = placement;
            }
            entries.dedup_by_key(|entry| entry.case);
        }
        self.repeated(entries)
    }

    /// The kernel path, direct connections, and every proxy, over veth.
    pub(super) fn kernel(&self) -> Plan {
        let subjects = [
            Subject::KERNEL,
            Subject::INTERCEPT,
            Subject::ENVOY,
            Subject::HAPROXY,
            Subject::HAPROXY_SPLICE,
            Subject::NGINX,
            Subject::DIRECT,
        ];
        let mut workloads = Vec::new();
        for streams in STREAMS {
            workloads.push(Workload::down(streams));
            workloads.extend((!self.quick).then_some(Workload::up(streams)));
        }
        workloads.extend(Workload::REQUESTS);
        workloads.extend([Workload::Short, Workload::Intercept]);
        let entry = |workload| {
            let subjects = match workload {
                Workload::Intercept => vec![Subject::KERNEL, Subject::KERNEL_MANY, Subject::INTERCEPT],
                Workload::Short => [&[Subject::KERNEL.logging()], &subjects[..]].concat(),
                _ => subjects.to_vec(),
            };
            let mut entry = Entry::new(Case::veth(workload), subjects);
            entry.seldom.clone_from(&entry.subjects);
            if workload != Workload::Intercept {
                entry.seldom.retain(|subject| ![Subject::KERNEL, Subject::DIRECT].contains(subject));
            }
            entry
        };
        // Its goals are a few percent of direct, which few rounds can't tell from chance: fewer than eight can't be 99 % sure.
        let few = self.rounds.unwrap_or(if self.quick { 2 } else { 3 });
        let many = self.rounds.unwrap_or(if self.quick { 8 } else { 12 });
        let plan = self.repeated(workloads.into_iter().map(entry).collect());
        Plan { rounds: many, few_rounds: few, ..plan }
    }

    fn repeated(&self, entries: Vec<Entry>) -> Plan {
        let (rounds, memory_rounds, measure) = if self.quick { (3, 1, 500) } else { (5, 3, 800) };
        let rounds = self.rounds.unwrap_or(rounds);
        Plan {
            entries,
            rounds,
            few_rounds: rounds,
            memory_rounds: self.rounds.map_or(memory_rounds, |rounds| rounds.min(memory_rounds)),
            measure: self.measure.unwrap_or(Duration::from_millis(measure)),
        }
    }

    /// What was named, on the topology that was named (or loopback), with everybody who can be.
    fn selected(&self) -> Vec<Entry> {
        let captured = self.subjects.iter().any(|subject| subject.is_captured());
        let topology = self.topology.unwrap_or(if captured { Topology::Veth } else { Topology::Loopback });
        let mut subjects = self.plain();
        if topology == Topology::Veth {
            subjects.insert(1, Subject::INTERCEPT);
        }
        let cases = self.only.iter().flat_map(|selector| {
            let placement = selector.placement.unwrap_or(Placement::Free);
            selector.workloads.iter().map(move |workload| Case { topology, workload: *workload, placement })
        });
        cases.map(|case| Entry::new(case, subjects.clone())).collect()
    }

    fn standard(&self) -> Vec<Entry> {
        let mut entries = Vec::new();
        let plain = self.plain();
        let mut add = |topology, placement, subjects: &[Subject], workloads: &[Workload]| {
            for workload in workloads {
                let case = Case { topology, workload: *workload, placement };
                entries.push(Entry::new(case, subjects.to_vec()));
            }
        };
        let small = [1, 64, 512].map(|connections| Workload::request(64, connections));
        let short = Workload::Short;
        let all_logging = [plain.clone(), self.logging()].concat();
        let mut captured = plain.clone();
        captured.insert(1, Subject::INTERCEPT);
        add(Topology::Loopback, Placement::Free, &plain, &[Workload::Idle]);
        if self.quick {
            add(
                Topology::Loopback,
                Placement::OneCpu,
                &plain,
                &[Workload::down(1), Workload::down(8), small[0]],
            );
            add(Topology::Loopback, Placement::Free, &plain, &small[1..]);
            add(Topology::Loopback, Placement::Free, &plain, &[Workload::MIXED]);
            add(Topology::Loopback, Placement::Free, &all_logging, &[short]);
            captured.retain(|subject| {
                !matches!(subject.program, Program::HaproxySplice | Program::Nginx | Program::Base)
            });
            add(Topology::Veth, Placement::Free, &captured, &[short, Workload::Intercept]);
            return entries;
        }
        add(Topology::Loopback, Placement::OneCpu, &plain, &BULK_ON_ONE_CPU);
        add(Topology::Loopback, Placement::OneCpu, &plain, &small[..1]);
        let free: Vec<_> = every()
            .into_iter()
            .filter(|workload| !matches!(workload, Workload::Idle | Workload::Short | Workload::Intercept))
            .filter(|workload| *workload != small[1])
            .collect();
        add(Topology::Loopback, Placement::Free, &plain, &free);
        add(Topology::Loopback, Placement::Free, &all_logging, &[small[1], short]);
        let veth = [Workload::down(1), Workload::down(8), small[0], Workload::Intercept];
        add(Topology::Veth, Placement::Free, &captured, &veth);
        // Beside whom they would replace: a sidecar.
        captured.extend(
            [Subject::TIDEGATE, Subject::ENVOY, Subject::HAPROXY].into_iter().map(Subject::redirected),
        );
        add(Topology::Veth, Placement::Free, &captured, &[small[1], short]);
        entries
    }
}

impl Plan {
    /// Everybody who is measured at all.
    pub(super) fn subjects(&self) -> Vec<Subject> {
        let mut subjects: Vec<_> = self.entries.iter().flat_map(|entry| entry.subjects.clone()).collect();
        subjects.sort_unstable();
        subjects.dedup();
        subjects
    }

    /// What is measured on one topology.
    pub(super) fn on(&self, topology: Topology) -> Vec<&Entry> {
        self.entries.iter().filter(|entry| entry.case.topology == topology).collect()
    }

    pub(super) fn uses(&self, used: impl Fn(Workload) -> bool) -> bool {
        self.entries.iter().any(|entry| used(entry.case.workload))
    }

    /// Whether a subject is measured in a case.
    #[cfg(test)]
    pub(super) fn measures(&self, case: Case, subject: Subject) -> bool {
        self.entries.iter().any(|entry| entry.case == case && entry.subjects.contains(&subject))
    }

    /// How often a subject is measured in a case.
    pub(super) fn rounds(&self, entry: &Entry, subject: Subject) -> u32 {
        match entry.case.workload {
            Workload::Idle => self.memory_rounds,
            _ if entry.seldom.contains(&subject) => self.few_rounds,
            _ => self.rounds,
        }
    }

    /// Who is measured in a round. Each round begins with another one, so that nobody always follows the same.
    pub(super) fn turn(&self, entry: &Entry, round: u32) -> Vec<Subject> {
        let mut turn = entry.subjects.clone();
        turn.retain(|subject| round < self.rounds(entry, *subject));
        if !turn.is_empty() {
            let first = round as usize % turn.len();
            turn.rotate_left(first);
        }
        turn
    }

    /// How many single measurements that are.
    pub(super) fn measurements(&self) -> usize {
        let rounds = |entry: &Entry| {
            entry.subjects.iter().map(|subject| self.rounds(entry, *subject) as usize).sum::<usize>()
        };
        self.entries.iter().map(rounds).sum()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn names(plan: &Plan) -> Vec<String> {
        plan.entries.iter().map(|entry| entry.case.to_string()).collect()
    }

    #[test]
    fn what_is_named_is_measured() {
        let only = ["request-64x64", "short@one-cpu"].map(|name| name.parse().expect("a workload"));
        let subjects = ["tidegate", "haproxy"].map(|name| name.parse().expect("a subject"));
        let choice = Choice { only: only.to_vec(), subjects: subjects.to_vec(), ..Choice::default() };
        let plan = choice.plan();
        assert_eq!(names(&plan), ["loopback/request-64x64", "loopback/short@one-cpu"]);
        assert_eq!(plan.subjects(), subjects);
        assert_eq!(plan.measurements(), 20);
    }

    #[test]
    fn who_is_compared_takes_turns_and_is_measured_more_often() {
        let plan = Choice::default().kernel();
        let entry = plan.entries.iter().find(|entry| entry.case.workload == Workload::Short).expect("short");
        let turns: Vec<_> = (0..plan.rounds).map(|round| plan.turn(entry, round)).collect();
        assert!(plan.few_rounds < plan.rounds);
        for (round, turn) in turns.iter().enumerate() {
            let all = round < plan.few_rounds as usize;
            assert_eq!(turn.len(), if all { entry.subjects.len() } else { 2 });
        }
        let first = |subject| turns.iter().filter(|turn| turn.len() == 2 && turn[0] == subject).count();
        assert!(first(Subject::KERNEL).abs_diff(first(Subject::DIRECT)) <= 1);
        let one = Choice { rounds: Some(1), ..Choice::default() }.kernel();
        assert_eq!((one.rounds, one.few_rounds), (1, 1));
    }

    #[test]
    fn every_workload_has_a_name_of_its_own() {
        let mut names = std::collections::BTreeSet::new();
        for workload in every() {
            let name = workload.to_string();
            assert_eq!(name.parse(), Ok(workload));
            assert!(names.insert(name), "{workload} twice");
        }
    }

    #[test]
    fn groups_and_placements() {
        let bulk: Selector = "bulk@pinned".parse().expect("a group");
        assert_eq!(bulk.workloads.len(), 9);
        assert_eq!(bulk.placement, Some(Placement::Pinned));
        for wrong in ["bulk@left", "bulk-", "shorts"] {
            assert!(wrong.parse::<Selector>().is_err(), "{wrong}");
        }
        let one: Selector = "request-100x3".parse().expect("any size");
        assert_eq!(one.workloads, [Workload::request(100, 3)]);
    }

    #[test]
    fn the_standard_plans_have_no_case_twice() {
        for quick in [true, false] {
            for placement in [None, Some(Placement::Pinned)] {
                let plan = Choice { quick, placement, ..Choice::default() }.plan();
                let mut names = names(&plan);
                let count = names.len();
                names.sort();
                names.dedup();
                if placement.is_none() {
                    assert_eq!(names.len(), count, "quick: {quick}");
                }
                assert!(!plan.subjects().contains(&Subject::plain(Program::Base)));
            }
        }
        assert!(
            Choice { base: true, ..Choice::default() }
                .plan()
                .subjects()
                .contains(&Subject::plain(Program::Base))
        );
    }
}
