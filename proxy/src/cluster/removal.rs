//! Endpoints that are gone: which connections end with them, and when.
//!
//! Envoy keeps connections to endpoints that are removed, and so do clusters here unless they have a policy
//! ([`EndpointRemoval`]). The main thread compares the endpoints before and after a change, for clusters with a policy
//! only, and reports who is lost. Whoever owns the workers has them end connections when the deadline has passed, if
//! the endpoint has not come back by then.

use std::collections::HashSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering::Relaxed};
use std::time::Duration;

use tokio::sync::mpsc::UnboundedSender;

use super::Cluster;
use super::endpoint::{HealthFlag, Host, HostSet};
use crate::config::cluster::EndpointRemoval;

/// Why, and how, connections to an endpoint end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loss {
    /// Why.
    pub reason: Reason,
    /// With a RST instead of a FIN.
    pub reset: bool,
}

/// Why connections to an endpoint end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Reason {
    /// It is an endpoint of its cluster no more.
    Removed,
    /// The control plane says that it is not to be used.
    Unhealthy,
    /// Health checks or outlier detection say so (`close_connections_on_host_health_failure`).
    HealthFailure,
}

impl Reason {
    /// As in access logs.
    pub fn name(self) -> &'static str {
        match self {
            Self::Removed => "endpoint_removed",
            Self::Unhealthy => "endpoint_unhealthy",
            Self::HealthFailure => "host_health_failure",
        }
    }
}

/// Endpoints whose connections are to end.
#[derive(Debug)]
pub struct Lost {
    /// Of this cluster.
    pub cluster: Arc<str>,
    /// Why, and how.
    pub loss: Loss,
    /// So long from now.
    pub deadline: Duration,
    hosts: Vec<(Arc<Host>, u16)>,
}

impl Lost {
    /// The deadline has passed: those that have not come back. Connections to removed ones that come up later end at
    /// once.
    pub fn take(self) -> Vec<Arc<Host>> {
        let Self { hosts, loss, .. } = self;
        hosts
            .into_iter()
            .filter_map(|(host, since)| host.absence().end(since, loss).then_some(host))
            .collect()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.hosts.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.hosts.is_empty()
    }
}

/// Whether an endpoint is among those of its cluster, and whether the cluster may use it. Written by the main thread.
///
/// From the lowest bit: it is removed; it is unhealthy; connections to it end, with a RST; how often it was lost, so
/// that a deadline of an earlier time is not taken for one of this time.
#[derive(Debug, Default)]
pub(super) struct Absence(AtomicU16);

const REMOVED: u16 = 1;
const UNHEALTHY: u16 = 1 << 1;
const ENDED: u16 = 1 << 2;
const RESET: u16 = 1 << 3;
const STATE: u16 = REMOVED | UNHEALTHY | ENDED | RESET;
const ONCE: u16 = 1 << 4;

fn bit(reason: Reason) -> u16 {
    match reason {
        Reason::Removed => REMOVED,
        Reason::Unhealthy | Reason::HealthFailure => UNHEALTHY,
    }
}

impl Absence {
    /// It is lost. Returns since when, for [`Absence::end`]; none if that was known.
    fn begin(&self, reason: Reason) -> Option<u16> {
        let bit = bit(reason);
        let now = self.0.load(Relaxed);
        if now & bit != 0 {
            return None;
        }
        // One that is removed after it got unhealthy has two deadlines, and the earlier one holds: both have the same
        // count.
        let count = if now & STATE == 0 { (now & !STATE).wrapping_add(ONCE) } else { now & !STATE };
        self.0.store(count | now & STATE | bit, Relaxed);
        Some(count)
    }

    /// It is an endpoint, and perhaps one that may be used. Returns whether it was removed before.
    fn present(&self, usable: bool) -> bool {
        let now = self.0.load(Relaxed);
        let over = now & if usable { STATE } else { STATE & !UNHEALTHY };
        if over != 0 {
            self.0.store(now & !over, Relaxed);
        }
        now & REMOVED != 0
    }

    /// Time is up. False if it came back since.
    fn end(&self, since: u16, loss: Loss) -> bool {
        let now = self.0.load(Relaxed);
        let lost = now & bit(loss.reason) != 0 && now & !STATE == since;
        // An unhealthy one may still be chosen, in panic: only those that nobody chooses any more end what comes.
        if lost && loss.reason == Reason::Removed {
            self.0.store(now | ENDED | if loss.reset { RESET } else { 0 }, Relaxed);
        }
        lost
    }

    /// Why connections to it end at once, if they do. Called once for each connection.
    pub(super) fn loss(&self) -> Option<Loss> {
        let now = self.0.load(Relaxed);
        (now & ENDED != 0).then_some(Loss { reason: Reason::Removed, reset: now & RESET != 0 })
    }
}

impl Cluster {
    /// Who is told of lost endpoints. Does nothing for a cluster that keeps its connections.
    pub fn report_losses(&self, to: &UnboundedSender<Lost>) {
        if self.config.endpoint_removal.is_some() || self.config.close_connections_on_host_health_failure {
            let _ = self.losses.set(to.clone());
        }
    }

    /// It replaces `former`, which was in force.
    pub fn note_successor_of(&self, former: &Self) {
        let sender = self.losses.get();
        if sender.is_some() || former.losses.get().is_some() {
            self.compare(&former.hosts(), &self.hosts(), sender);
        }
    }

    /// It is removed, and was in force.
    pub fn note_removal(&self) {
        if let Some(sender) = self.losses.get() {
            self.compare(&self.hosts(), &HostSet::new(0, Vec::new(), 140, 0.0), Some(sender));
        }
    }

    pub(super) fn note_losses(&self, old: &HostSet, new: &HostSet) {
        if let Some(sender) = self.losses.get()
            && self.announced.load(Relaxed)
        {
            self.compare(old, new, Some(sender));
        }
    }

    fn compare(&self, old: &HostSet, new: &HostSet, sender: Option<&UnboundedSender<Lost>>) {
        let members: HashSet<_> = new.endpoints().map(|endpoint| Arc::as_ptr(&endpoint.host)).collect();
        let (were_usable, usable) = (usable(old), usable(new));
        // Those that connections may have, and that are not to be used any more.
        let mut down = Vec::new();
        for host in new.endpoints().map(|endpoint| &endpoint.host) {
            let is_usable = usable.contains(&Arc::as_ptr(host));
            let was_removed = host.absence().present(is_usable);
            if !is_usable && (was_removed || were_usable.contains(&Arc::as_ptr(host))) {
                down.push(host);
            }
        }
        let Some(sender) = sender else { return };
        let policy = self.config.endpoint_removal;
        let removed = old.endpoints().filter(|endpoint| !members.contains(&Arc::as_ptr(&endpoint.host)));
        if let Some(EndpointRemoval { reset, deadline, .. }) = policy {
            let removed = removed.map(|endpoint| &endpoint.host);
            self.report(sender, removed, Loss { reason: Reason::Removed, reset }, deadline);
        }
        if self.config.close_connections_on_host_health_failure {
            let loss = Loss { reason: Reason::HealthFailure, reset: false };
            self.report(sender, down.iter().copied().filter(|host| has_failed(host)), loss, Duration::ZERO);
        }
        if let Some(EndpointRemoval { reset, deadline, include_unhealthy: true }) = policy {
            self.report(sender, down.into_iter(), Loss { reason: Reason::Unhealthy, reset }, deadline);
        }
    }

    fn report<'a>(
        &self,
        sender: &UnboundedSender<Lost>,
        hosts: impl Iterator<Item = &'a Arc<Host>>,
        loss: Loss,
        deadline: Duration,
    ) {
        let hosts: Vec<_> =
            hosts.filter_map(|host| Some((Arc::clone(host), host.absence().begin(loss.reason)?))).collect();
        if !hosts.is_empty() {
            // Nobody listens any more when the process ends.
            let _ = sender.send(Lost { cluster: Arc::clone(self.name()), loss, deadline, hosts });
        }
    }
}

fn has_failed(host: &Host) -> bool {
    host.health_flags() & (HealthFlag::FailedActive as u32 | HealthFlag::FailedOutlier as u32) != 0
}

/// The endpoints that balancers use.
fn usable(set: &HostSet) -> HashSet<*const Host> {
    let usable = set.priorities().iter().flat_map(|at| at.healthy.iter().chain(&at.degraded));
    usable.map(|endpoint| Arc::as_ptr(&endpoint.host)).collect()
}

#[cfg(test)]
mod tests {
    use std::slice::from_ref;

    use tokio::sync::mpsc;

    use super::super::endpoint::tests::endpoint;
    use super::super::tests::{config, ip};
    use super::*;
    use crate::config::cluster::Discovery;
    use crate::config::endpoint::HealthStatus;
    use crate::stats::Stats;

    const LOSS: Loss = Loss { reason: Reason::Removed, reset: true };

    #[test]
    fn only_the_deadline_of_the_last_absence_counts() {
        let absence = Absence::default();
        let first = absence.begin(Reason::Removed).unwrap();
        assert_eq!(absence.begin(Reason::Removed), None, "it is gone already");
        assert!(absence.present(true));
        assert!(!absence.end(first, LOSS), "it came back");
        let second = absence.begin(Reason::Removed).unwrap();
        assert!(!absence.end(first, LOSS), "that was another time");
        assert_eq!(absence.loss(), None);
        assert!(absence.end(second, LOSS));
        assert_eq!(absence.loss(), Some(LOSS));
        absence.present(false);
        assert_eq!(absence.loss(), None);
    }

    #[test]
    fn an_unhealthy_endpoint_that_is_then_removed_has_both_deadlines() {
        let absence = Absence::default();
        let unhealthy = Loss { reason: Reason::Unhealthy, reset: false };
        let since = absence.begin(Reason::Unhealthy).unwrap();
        assert!(absence.end(since, unhealthy));
        assert_eq!(absence.loss(), None, "in panic it may be chosen again");
        let since = absence.begin(Reason::Removed).unwrap();
        assert!(absence.end(since, LOSS));
        assert_eq!(absence.loss(), Some(LOSS));
    }

    fn ports(lost: Lost) -> Vec<u16> {
        lost.take().iter().map(|host| host.address().ip().unwrap().port()).collect()
    }

    fn cluster(change: impl FnOnce(&mut crate::config::cluster::Cluster)) -> Arc<Cluster> {
        let mut config = config("c", Discovery::Static, &[ip(1), ip(2)]);
        change(&mut config);
        Cluster::build(Arc::new(config), &Stats::new(1), None)
    }

    #[test]
    fn a_cluster_without_a_policy_reports_nothing() {
        let cluster = cluster(|_| {});
        let (sender, mut lost) = mpsc::unbounded_channel();
        cluster.report_losses(&sender);
        cluster.replace_endpoints(Vec::new());
        cluster.note_removal();
        assert!(lost.try_recv().is_err());
    }

    #[test]
    fn removed_and_unhealthy_endpoints_are_reported_once() {
        let policy = EndpointRemoval { reset: true, deadline: Duration::ZERO, include_unhealthy: true };
        let cluster = cluster(|config| config.endpoint_removal = Some(policy));
        let (sender, mut lost) = mpsc::unbounded_channel();
        cluster.report_losses(&sender);
        let mut draining = endpoint(cluster.registry(), 2, 1, 0);
        draining.health_status = HealthStatus::Draining;
        cluster.replace_endpoints(vec![draining.clone()]);
        let (removed, unhealthy) = (lost.try_recv().unwrap(), lost.try_recv().unwrap());
        assert_eq!((removed.loss.reason, unhealthy.loss.reason), (Reason::Removed, Reason::Unhealthy));
        assert_eq!((ports(removed), ports(unhealthy)), (vec![1], vec![2]));
        draining.weight = 7;
        cluster.replace_endpoints(vec![draining]);
        assert!(lost.try_recv().is_err());
    }

    #[test]
    fn a_failed_health_check_ends_connections_if_the_cluster_wants_that() {
        for wanted in [false, true] {
            let cluster = cluster(|config| config.close_connections_on_host_health_failure = wanted);
            let (sender, mut lost) = mpsc::unbounded_channel();
            cluster.report_losses(&sender);
            cluster.endpoints()[0].host.set_health_flag(HealthFlag::FailedActive, true);
            cluster.refresh_health();
            let reported = lost.try_recv().map(|lost| (lost.loss.reason, ports(lost)));
            assert_eq!(reported.ok(), wanted.then(|| (Reason::HealthFailure, vec![1])));
            // Its removal is no concern of the field.
            cluster.replace_endpoints(vec![endpoint(cluster.registry(), 2, 1, 0)]);
            assert!(lost.try_recv().is_err());
        }
    }

    #[test]
    fn a_successor_without_the_endpoint_removes_it() {
        let policy = EndpointRemoval { reset: false, deadline: Duration::ZERO, include_unhealthy: false };
        let old = cluster(|_| {});
        let mut config = config("c", Discovery::Static, &[ip(2), ip(3)]);
        config.endpoint_removal = Some(policy);
        let new = Cluster::build(Arc::new(config), &Stats::new(1), Some(&old));
        let (sender, mut lost) = mpsc::unbounded_channel();
        new.report_losses(&sender);
        new.note_successor_of(&old);
        assert_eq!(lost.try_recv().map(ports).ok(), Some(vec![1]));
        new.note_removal();
        assert_eq!(lost.try_recv().map(ports).ok(), Some(vec![2, 3]));
    }

    #[test]
    fn the_task_of_a_connection_is_told() {
        let connections = std::rc::Rc::new(crate::drain::Connections::default());
        let host = Arc::new(Host::new(crate::addr::EndpointAddr::Ip(([127, 0, 0, 1], 1).into())));
        let (open, other) = (connections.open(0), connections.open(0));
        open.set_host(&host);
        connections.end_hosts(from_ref(&host), LOSS);
        assert_eq!(open.ending(), Some(crate::drain::Ending::Lost(LOSS)));
        assert_eq!(other.ending(), None);
        // A connection that was on its way.
        host.absence().begin(Reason::Removed).map(|since| host.absence().end(since, LOSS));
        other.set_host(&host);
        assert_eq!(other.ending(), Some(crate::drain::Ending::Lost(LOSS)));
    }
}
