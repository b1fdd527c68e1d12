//! A run: round after round, everybody in turn.

use std::collections::BTreeMap;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::sys::resource::{Resource, getrlimit};

use super::case::Case;
use super::external::Servers;
use super::metric::Metric;
use super::plan::Plan;
use super::profile::Profile;
use super::results::{About, Results, SCHEMA, Samples, Settings};
use super::running::Running;
use super::site::{Site, Topology};
use super::subject::Subject;
use super::tools::Programs;
use super::workload::{self, Workload};
use super::{about, progress};

/// Connections that a proxy must allow: more than any workload has, and few enough for HAProxy to start where 20,000 files
/// may be open.
const SPARE_CONNECTIONS: usize = 4500;

/// How a run is made.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct How {
    pub(super) quick: bool,
    /// perf tells where the proxies' CPU goes.
    pub(super) profile: bool,
}

/// A run in the making.
pub(super) struct Run {
    plan: Plan,
    programs: Programs,
    how: How,
    idle_connections: usize,
    samples: Samples,
    failures: Vec<String>,
    congestion_control: String,
    begun: Instant,
    done: usize,
}

impl Run {
    pub(super) fn new(plan: Plan, programs: Programs, how: How) -> Result<Self> {
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE)?;
        let idle_connections = workload::idle_connections(limit);
        ensure!(
            idle_connections > 0 || !plan.uses(|workload| workload == Workload::Idle),
            "with {limit} open files no idle connections can be measured: raise RLIMIT_NOFILE"
        );
        Ok(Self {
            plan,
            programs,
            how,
            idle_connections,
            samples: Samples::default(),
            failures: Vec::new(),
            congestion_control: String::new(),
            begun: Instant::now(),
            done: 0,
        })
    }

    /// Makes it.
    pub(super) fn results(mut self, named: Option<&Path>) -> Result<Results> {
        let (date, before) = (about::date()?, about::load_average()?);
        let versions = about::versions(&self.programs, named)?;
        for topology in [Topology::Loopback, Topology::Veth] {
            if !self.plan.on(topology).is_empty() {
                self.measure(topology).with_context(|| format!("topology {topology}"))?;
            }
        }
        progress("");
        let about = About {
            date,
            machine: about::machine()?,
            versions,
            settings: self.settings(),
            load_average_before: before,
            load_average_after: about::load_average()?,
            seconds: self.begun.elapsed().as_secs_f64().round(),
        };
        Ok(Results { schema: SCHEMA, about, series: self.samples.series(), failures: self.failures })
    }

    fn settings(&self) -> Settings {
        let peers = [
            (Subject::ENVOY, "--concurrency 1; admin server and stats"),
            (Subject::HAPROXY, "nbthread 1; stats socket"),
            (
                Subject::HAPROXY_SPLICE,
                "nbthread 1; option splice-request, option splice-response, tune.pipesize 1048576; stats socket",
            ),
            (
                Subject::NGINX,
                "worker_processes 1; no stats of streams in the open source version; log buffer=64k flush=1s",
            ),
        ];
        Settings {
            quick: self.how.quick,
            worker_threads: 1,
            rounds: self.plan.rounds,
            seconds_per_measurement: self.plan.measure.as_secs_f64(),
            idle_connections: self.idle_connections,
            congestion_control: self.congestion_control.clone(),
            peers: peers.into_iter().map(|(peer, how)| (peer.to_string(), how.to_owned())).collect(),
        }
    }

    fn measure(&mut self, topology: Topology) -> Result<()> {
        let entries: Vec<_> = self.plan.on(topology).into_iter().cloned().collect();
        let mut subjects: Vec<_> = entries.iter().flat_map(|entry| entry.subjects.clone()).collect();
        subjects.sort_unstable();
        subjects.dedup();
        let captured: Vec<_> = subjects.iter().copied().filter(|subject| subject.is_captured()).collect();
        let mut site = Site::new(topology, &captured)?;
        site.congestion_control().clone_into(&mut self.congestion_control);

        // Proxies of their own, before others run.
        for entry in entries.iter().filter(|entry| entry.case.workload == Workload::Idle) {
            for round in 0..self.plan.memory_rounds {
                for subject in &entry.subjects {
                    let (programs, connections) = (self.programs.clone(), self.idle_connections);
                    self.note(entry.case, *subject, round, self.plan.memory_rounds, || {
                        workload::idle(&programs, &mut site, *subject, connections)
                    });
                }
            }
        }
        let entries: Vec<_> =
            entries.into_iter().filter(|entry| entry.case.workload != Workload::Idle).collect();
        subjects.retain(|subject| entries.iter().any(|entry| entry.subjects.contains(subject)));
        let uses = |used: fn(Workload) -> bool| entries.iter().any(|entry| used(entry.case.workload));
        let _servers = Servers::start(
            &self.programs,
            &site,
            uses(|workload| matches!(workload, Workload::Wrk { .. })),
            uses(|workload| matches!(workload, Workload::Iperf3 { .. })),
        )?;
        let mut running = BTreeMap::new();
        for subject in subjects {
            progress(&format!("{topology}: starting {subject}"));
            running.insert(subject, Running::start(&self.programs, &mut site, subject, SPARE_CONNECTIONS)?);
        }
        let (duration, how) = (self.plan.measure, self.how);
        for round in 0..self.plan.rounds {
            for entry in &entries {
                for subject in self.plan.turn(entry, round) {
                    let rounds = self.plan.rounds(entry, subject);
                    let running = &running[&subject];
                    self.note(entry.case, subject, round, rounds, || {
                        let profiled = how.profile && !running.pids().is_empty();
                        let profile = profiled.then(|| Profile::start(running.pids())).transpose()?;
                        let mut figures = entry.case.workload.measure(
                            &mut site,
                            running,
                            entry.case.placement,
                            duration,
                        )?;
                        if let Some(profile) = profile {
                            figures.extend(profile.finish()?.of(&figures));
                        }
                        Ok(figures)
                    });
                }
            }
        }
        Ok(())
    }

    /// Keeps what one measurement brings. A failure may be chance: a second one in a row is reported.
    fn note(
        &mut self,
        case: Case,
        subject: Subject,
        round: u32,
        rounds: u32,
        mut measure: impl FnMut() -> Result<Vec<(Metric, f64)>>,
    ) {
        let left = (self.plan.measurements() - self.done) as f64 / self.done.max(1) as f64;
        let left = self.begun.elapsed().mul_f64(left).as_secs();
        let left =
            if self.done == 0 { String::new() } else { format!(", {}:{:02} left", left / 60, left % 60) };
        progress(&format!("round {}/{rounds}{left}: {case}, {subject}", round + 1));
        let outcome = measure().or_else(|error| {
            progress(&format!("{case}, {subject}: {error:#}; once more"));
            sleep(Duration::from_millis(300));
            measure()
        });
        match outcome {
            Ok(figures) => self.samples.add(case, subject, round as usize, &figures),
            Err(error) => {
                self.failures.push(format!("{case}, {subject}, round {}: {error:#}", round + 1));
            }
        }
        self.done += 1;
    }
}
