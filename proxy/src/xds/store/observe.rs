//! What the operator sees of control planes: counters and log lines.

use std::net::SocketAddr;
use std::sync::Arc;

use super::Store;
use super::subscription::{Applying, SubscriptionStats};
use crate::config::config_source::{Protocol, Source};
use crate::listener::Listener;
use crate::stats::ClusterStats;
use crate::xds::{Key, Kind, Verdict};

impl Store {
    pub(super) fn failed(&mut self, keys: &[Key], reason: &str) {
        let failures = keys.first().map_or(1, |key| {
            let failures = self.failing.entry(key.clone()).or_default();
            *failures += 1;
            *failures
        });
        // One that fails often, as a poll does, is told of less and less.
        if failures == 1 {
            tracing::warn!("{}: {reason}; what was accepted holds", services(keys));
        } else if failures.is_power_of_two() {
            tracing::warn!("{}: failed {failures} times in a row: {reason}", services(keys));
        } else {
            tracing::debug!("{}: {reason}", services(keys));
        }
        if keys.iter().any(has_stream) {
            self.stats.control_plane().connected_state().set(0);
        }
        self.recall_unfetched(keys);
        for key in keys {
            match key.kind {
                Kind::Cluster => self.stats.cluster_manager().count_failure(),
                Kind::Listener => self.stats.listener_manager().count_failure(),
                Kind::ClusterLoadAssignment => {
                    self.for_users(&key.source, |_| true, SubscriptionStats::count_failure);
                }
                Kind::Secret => self.secrets.count_failure(&key.source),
                Kind::RouteConfiguration => self.routes.count_failure(&key.source),
                Kind::VirtualHost => self.routes.count_failure_of_hosts(&key.source),
            }
        }
    }

    /// The client threw a response away.
    pub(super) fn rejected(&mut self, key: &Key, reason: &str) {
        tracing::warn!("{} update rejected: {reason}", key.kind.service());
        self.fetched(key.kind);
        match key.kind {
            Kind::Cluster => self.stats.cluster_manager().count_rejected(),
            Kind::Listener => self.stats.listener_manager().count_rejected(),
            Kind::ClusterLoadAssignment => {
                self.for_users(&key.source, |_| true, SubscriptionStats::count_rejected);
            }
            Kind::Secret => self.secrets_rejected(&key.source),
            Kind::RouteConfiguration => self.routes.count_rejected(&key.source, |_| true),
            Kind::VirtualHost => self.routes.count_rejected_hosts(&key.source, None),
        }
    }

    pub(super) fn connected(&mut self, keys: &[Key], identifier: Option<&str>) {
        if keys.iter().any(has_stream) {
            self.stats.control_plane().connected_state().set(1);
        }
        let failures: u64 = keys.iter().filter_map(|key| self.failing.remove(key)).sum();
        if let Some(server) = identifier {
            self.stats.control_plane().identifier().set(&server.into());
        }
        if failures > 1 {
            tracing::info!("{}: works again after {failures} failures", services(keys));
        }
        match identifier {
            Some(server) => tracing::info!("{}: connected to control plane {server}", services(keys)),
            None => tracing::info!("{}: connected", services(keys)),
        }
    }

    /// Requests wait for a token of a rate limit, or do no more.
    pub(super) fn rate_limited(&self, pending: usize) {
        let stats = self.stats.control_plane();
        stats.pending_requests().set(pending as u64);
        if pending > 0 {
            stats.rate_limit_enforced().inc();
        }
    }

    /// The stats of a kind that is subscribed to as a whole.
    pub(super) fn stats_of_all(&self, kind: Kind) -> Option<&dyn SubscriptionStats> {
        match kind {
            Kind::Cluster => Some(self.stats.cluster_manager()),
            Kind::Listener => Some(self.stats.listener_manager()),
            _ => None,
        }
    }

    /// A response was applied, or refused.
    pub(super) fn count_update(&self, key: &Key, applying: &Applying, verdict: &Verdict) {
        let Some(stats) = self.stats_of_all(key.kind) else { return };
        match verdict {
            Verdict::Accept => stats.count_success(applying),
            Verdict::Reject { .. } => stats.count_rejected(),
        }
    }

    /// Counts for every cluster that has its endpoints from there, under a name that `concerns` says.
    pub(super) fn for_users(
        &self,
        source: &Source,
        concerns: impl Fn(&str) -> bool,
        count: impl Fn(&ClusterStats),
    ) {
        let assignments =
            self.assignments.iter().filter(|((from, name), _)| from == source && concerns(name));
        for user in assignments.flat_map(|(_, assignment)| &assignment.users) {
            // All versions of a cluster have the same stats.
            if let Some(version) = self.clusters.versions(user).next() {
                count(version.stats());
            }
        }
    }

    /// What goes to disk. Called now and then.
    pub fn save(&mut self) {
        if let Some(cache) = &mut self.cache {
            self.stats.config().stale_resources().set(self.tables.lock().stale() as u64);
            cache.save();
        }
    }

    /// The same, at the end.
    pub fn finish(&mut self) {
        if let Some(cache) = &mut self.cache {
            cache.finish();
        }
    }

    pub(super) fn count(&self) {
        let count = |items: usize| items as u64;
        let clusters = self.stats.cluster_manager();
        clusters.active_clusters().set(count(self.clusters.active_len()));
        clusters.warming_clusters().set(count(self.clusters.warming_len()));
        let listeners = self.stats.listener_manager();
        listeners.total_listeners_active().set(count(self.listeners.active_len()));
        listeners.total_listeners_warming().set(count(self.listeners.warming_len()));
    }

    /// Addresses of bound listeners in force, for the log.
    pub fn bound_addresses(&self) -> Vec<(Arc<str>, SocketAddr)> {
        let listeners = self.listeners.active().into_iter().filter(|listener| listener.config.bind_to_port);
        let addresses = |listener: Arc<Listener>| {
            let name = Arc::clone(&listener.config.name);
            listener.config.addresses.clone().into_iter().map(move |address| (Arc::clone(&name), address))
        };
        listeners.flat_map(addresses).collect()
    }
}

/// `control_plane.connected_state` is about gRPC streams, not about polls and files.
fn has_stream(key: &Key) -> bool {
    match &key.source {
        Source::Ads => true,
        Source::Api(api) => api.protocol != Protocol::Rest,
        Source::Path(_) => false,
    }
}

fn services(keys: &[Key]) -> String {
    keys.iter().map(|key| key.kind.service()).collect::<Vec<_>>().join(", ")
}
