//! What the operator sees of control planes: counters and log lines.

use std::net::SocketAddr;
use std::sync::Arc;

use super::Store;
use crate::config::config_source::{Protocol, Source};
use crate::listener::Listener;
use crate::stats::Readout;
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
                Kind::Cluster => self.stats.cluster_manager().cds_update_failure().inc(),
                Kind::Listener => self.stats.listener_manager().lds_update_failure().inc(),
                Kind::ClusterLoadAssignment => {
                    for ((source, _), assignment) in &self.assignments {
                        if *source == key.source {
                            for user in &assignment.users {
                                for cluster in self.clusters.versions(user) {
                                    cluster.stats().update_failure().inc();
                                }
                            }
                        }
                    }
                }
                Kind::Secret => self.secrets.count_failure(&key.source),
                Kind::RouteConfiguration | Kind::VirtualHost => {}
            }
        }
    }

    /// The client threw a response away.
    pub(super) fn rejected(&mut self, key: &Key, reason: &str) {
        tracing::warn!("{} update rejected: {reason}", key.kind.service());
        self.fetched(key.kind);
        match key.kind {
            Kind::Cluster => self.stats.cluster_manager().cds_update_rejected().inc(),
            Kind::Listener => self.stats.listener_manager().lds_update_rejected().inc(),
            Kind::Secret => self.secrets_rejected(&key.source),
            _ => {}
        }
    }

    pub(super) fn connected(&mut self, keys: &[Key], identifier: Option<&str>) {
        if keys.iter().any(has_stream) {
            self.stats.control_plane().connected_state().set(1);
        }
        let failures: u64 = keys.iter().filter_map(|key| self.failing.remove(key)).sum();
        if let Some(server) = identifier {
            self.stats.set_readout(Readout::ControlPlaneIdentifier, server);
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

    pub(super) fn attempt(&self, kind: Kind) {
        match kind {
            Kind::Cluster => self.stats.cluster_manager().cds_update_attempt().inc(),
            Kind::Listener => self.stats.listener_manager().lds_update_attempt().inc(),
            _ => {}
        }
    }

    pub(super) fn count_update(&self, key: &Key, verdict: &Verdict) {
        let accepted = matches!(verdict, Verdict::Accept);
        let version = |text: &str| crate::stats::version_hash(text);
        let tables = self.tables.lock();
        let text = tables.kind(key.kind).map_or("", |table| table.version.as_str());
        match key.kind {
            Kind::Cluster => {
                let stats = self.stats.cluster_manager();
                stats.cds_update_attempt().inc();
                if accepted {
                    stats.cds_update_success().inc();
                    stats.cds_version().set(version(text));
                    self.stats.set_readout(Readout::CdsVersion, text);
                } else {
                    stats.cds_update_rejected().inc();
                }
            }
            Kind::Listener => {
                let stats = self.stats.listener_manager();
                stats.lds_update_attempt().inc();
                if accepted {
                    stats.lds_update_success().inc();
                    stats.lds_version().set(version(text));
                    self.stats.set_readout(Readout::LdsVersion, text);
                } else {
                    stats.lds_update_rejected().inc();
                }
            }
            _ => {}
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
