//! Clusters and their endpoints.

use std::sync::Arc;

use tidegate_api::endpoint as endpoint_api;
use tidegate_api::wkt::Any;

use super::clusters::{self, Origin};
use super::subscription::{Applying, SubscriptionStats as _};
use super::{Deadline, Internal, Phase, Store, response};
use crate::cluster::{Cluster as RuntimeCluster, dns};
use crate::config::cluster::{Cluster, Eds};
use crate::config::config_source::Source;
use crate::config::dynamic::{self, Valid};
use crate::xds::{Key, Kind};

impl Store {
    pub(super) fn add_cluster(
        &mut self,
        mut config: Cluster,
        content: u64,
        origin: Origin,
    ) -> clusters::Added {
        if let Some(outlier) = &mut config.outlier_detection {
            outlier.apply_runtime(&self.runtime);
        }
        if let Some(check) = &mut config.health_check {
            check.apply_runtime(&self.runtime);
        }
        let (name, eds) = (Arc::clone(&config.name), config.eds.clone());
        let before: Vec<_> =
            self.clusters.versions(&name).map(|version| Arc::clone(version.config())).collect();
        let (resolver, secrets) = (&mut self.resolver, &mut self.secrets);
        let find_resolver = || {
            if resolver.is_none() {
                match dns::Resolver::from_system() {
                    Ok(system) => *resolver = Some(Arc::new(system)),
                    Err(error) => tracing::error!(cluster = %name, "{error}"),
                }
            }
            resolver.clone()
        };
        let added =
            self.clusters.add(config, content, origin, find_resolver, |config| secrets.credentials(config));
        if matches!(added, clusters::Added::New | clusters::Added::Modified) {
            if let Some((id, resolved)) = self.clusters.unresolved(&name) {
                let (internal, name) = (self.internal.0.clone(), Arc::clone(&name));
                tokio::task::spawn_local(async move {
                    resolved.await;
                    let _ = internal.send(Internal::Resolved(name, id));
                });
            }
            if let Some(eds) = &eds {
                self.want_endpoints(&name, eds);
            }
            self.want_secrets(&name);
            for former in before {
                self.release_cluster(&name, &former);
            }
        }
        added
    }

    /// What a former version of a cluster was subscribed to, unless another one is.
    pub(super) fn release_cluster(&mut self, name: &str, former: &Cluster) {
        if let Some(eds) = &former.eds {
            self.drop_endpoints(name, eds);
        }
        self.drop_secrets(name, former);
    }

    pub(super) fn eds_of(&self, name: &str) -> Vec<Arc<Eds>> {
        self.clusters.versions(name).filter_map(|cluster| cluster.config().eds.clone()).collect()
    }

    /// A cluster wants endpoints. Those that are known already hold for it at once.
    pub(super) fn want_endpoints(&mut self, cluster: &Arc<str>, eds: &Eds) {
        let id = (eds.config.source.clone(), Arc::clone(&eds.service_name));
        let assignment = self.assignments.entry(id).or_default();
        let first = assignment.users.is_empty();
        if !assignment.users.contains(cluster) {
            assignment.users.reserve_exact(1); // there are seldom two
            assignment.users.push(Arc::clone(cluster));
        }
        if let Some(body) = assignment.known.clone() {
            let body = Any { type_url: Kind::ClusterLoadAssignment.type_url().into(), value: body.to_vec() };
            let label = response::label(Kind::ClusterLoadAssignment, &eds.service_name);
            let applied =
                dynamic::check(&body, &label).map_err(|error| response::reason(&error)).and_then(|valid| {
                    self.apply_assignment(cluster, &eds.config.source, &eds.service_name, &valid, None)
                });
            match applied {
                Ok(()) => return,
                // Right for other clusters, but not for this one: perhaps the next ones are.
                Err(error) => tracing::warn!(%cluster, "its endpoints can't be used: {error}"),
            }
        }
        if self.phase == Phase::Primary {
            return; // wanted when the clusters are there through which it comes
        }
        self.subscribe_endpoints(eds, first);
    }

    pub(super) fn subscribe_endpoints(&mut self, eds: &Eds, first: bool) {
        for version in self.clusters_of(eds) {
            version.stats().subscribed(&eds.config.source);
        }
        if first {
            let key = Key { source: eds.config.source.clone(), kind: Kind::ClusterLoadAssignment };
            self.client.add(&key, Arc::clone(&eds.service_name));
        }
        let deadline = Deadline::Endpoints(eds.config.source.clone(), Arc::clone(&eds.service_name));
        self.expire_after(eds.config.initial_fetch_timeout, deadline);
    }

    fn clusters_of(&self, eds: &Eds) -> Vec<Arc<RuntimeCluster>> {
        let id = (eds.config.source.clone(), Arc::clone(&eds.service_name));
        let users =
            self.assignments.get(&id).map(|assignment| assignment.users.as_slice()).unwrap_or_default();
        users.iter().flat_map(|user| self.versions_of(user, &id.0, &id.1)).collect()
    }

    pub(super) fn subscribe_static_endpoints(&mut self) {
        let mut wanted: Vec<Arc<Eds>> = Vec::new();
        for name in self.clusters.warming() {
            for eds in self.clusters.versions(name).filter_map(|cluster| cluster.config().eds.clone()) {
                if !wanted.contains(&eds) {
                    wanted.push(eds);
                }
            }
        }
        for eds in wanted {
            self.subscribe_endpoints(&eds, true);
        }
    }

    pub(super) fn drop_endpoints(&mut self, cluster: &str, eds: &Eds) {
        // A version that is still in force may use it.
        let id = (eds.config.source.clone(), Arc::clone(&eds.service_name));
        if self.eds_of(cluster).iter().any(|used| (&used.config.source, &used.service_name) == (&id.0, &id.1))
        {
            return;
        }
        let Some(assignment) = self.assignments.get_mut(&id) else { return };
        assignment.users.retain(|user| **user != *cluster);
        if assignment.users.is_empty() {
            self.assignments.remove(&id);
            self.tables.lock().kind_mut(Kind::ClusterLoadAssignment).remove(&eds.service_name);
            let key = Key { source: id.0, kind: Kind::ClusterLoadAssignment };
            self.client.remove(&key, id.1);
        }
    }

    /// Every version of a cluster that has its endpoints from there gets these, of this response or of an earlier one.
    pub(super) fn apply_assignment(
        &mut self,
        cluster: &Arc<str>,
        source: &Source,
        service: &str,
        valid: &Valid<endpoint_api::ClusterLoadAssignment>,
        applying: Option<&Applying>,
    ) -> Result<(), String> {
        let label = response::label(Kind::ClusterLoadAssignment, service);
        for version in self.versions_of(cluster, source, service) {
            match dynamic::load_assignment(valid.clone(), version.config(), &label) {
                Ok(converted) => {
                    response::log_warnings(cluster, &converted.warnings);
                    if !version.set_assignment(&converted.value) {
                        version.stats().update_no_rebuild().inc();
                    }
                    match applying {
                        Some(applying) => version.stats().count_success(applying),
                        None => version.stats().update_success().inc(),
                    }
                    self.clusters.ready(cluster, version.id());
                }
                Err(error) => return Err(response::reason(&error)),
            }
        }
        Ok(())
    }

    /// The versions of a cluster that have their endpoints from there.
    pub(super) fn versions_of(
        &self,
        cluster: &str,
        source: &Source,
        service: &str,
    ) -> Vec<Arc<RuntimeCluster>> {
        let uses = |version: &&Arc<RuntimeCluster>| {
            let eds = version.config().eds.as_ref();
            eds.is_some_and(|eds| eds.config.source == *source && *eds.service_name == *service)
        };
        self.clusters.versions(cluster).filter(uses).cloned().collect()
    }

    pub(super) fn give_up_endpoints(&mut self, source: &Source, service: &Arc<str>) {
        let Some(assignment) = self.assignments.get(&(source.clone(), Arc::clone(service))) else { return };
        if assignment.known.is_some() {
            return;
        }
        for cluster in assignment.users.clone() {
            for version in self.versions_of(&cluster, source, service) {
                version.stats().count_timeout();
                self.clusters.ready(&cluster, version.id());
            }
            tracing::warn!(%cluster, "no endpoints came within initial_fetch_timeout");
        }
    }
}
