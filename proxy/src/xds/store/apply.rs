//! Responses of control planes.

use std::collections::HashSet;
use std::sync::Arc;

use tidegate_api::{
    cluster as cluster_api, endpoint as endpoint_api, listener as listener_api, route as route_api,
};

use super::clusters::{self, Origin};
use super::response::{self, Checked, Contents, Decoded, Rejections};
use super::routes::{Host, HostChanges};
use super::subscription::{self, Applying, SubscriptionStats};
use super::{Deadline, Fetch, Store, UnknownFields, listeners};
use crate::config::config_source::{ConfigSource, Source};
use crate::config::dynamic::{self, Surroundings};
use crate::config::error::ConfigError;
use crate::stats::SharedCounter;
use crate::xds::tables::{All, Held};
use crate::xds::{Change, Key, Kind, Resource, Unreadable, Update, Verdict, Wanted};

impl Store {
    pub(super) fn update(&mut self, update: Update) {
        let Update { key, change, verdict } = update;
        let answer = self.change(&key, change);
        if let Verdict::Reject { message, .. } = &answer {
            tracing::warn!("{} update rejected: {message}", key.kind.service());
        }
        // The client gives up on answers when its stream ends.
        let _ = verdict.send(answer);
    }

    /// A first answer came. As in Envoy, one that was thrown away ends the wait for it too.
    pub(super) fn fetched(&mut self, kind: Kind) {
        let fetch = match kind {
            Kind::Cluster => &mut self.cds,
            Kind::Listener => &mut self.lds,
            _ => return,
        };
        if *fetch == Fetch::Waiting {
            *fetch = Fetch::Done;
        }
    }

    /// Applies a change of what one subscription gives.
    pub(super) fn change(&mut self, key: &Key, change: Change) -> Verdict {
        match change {
            Change::Expired(names) => {
                self.expired(key, &names);
                Verdict::Accept
            }
            Change::State { version, resources, unchanged, unreadable } => {
                let all = key.kind.lists_everything();
                self.apply(key, &version, resources, unreadable, Absent::State { all, unchanged })
            }
            Change::Delta { version, resources, removed } => {
                self.apply(key, &version, resources, Vec::new(), Absent::Removed(removed))
            }
        }
    }

    pub(super) fn apply(
        &mut self,
        key: &Key,
        version: &str,
        resources: Vec<Resource>,
        unreadable: Vec<Unreadable>,
        absent: Absent,
    ) -> Verdict {
        let kind = key.kind;
        let applying = Applying::now(version);
        let before = self.changed_clusters();
        self.fetched(kind);
        let rejections = match kind {
            Kind::Cluster => self.with(key, version, resources, unreadable, |store, contents, rejections| {
                store.apply_clusters(contents, rejections, absent);
            }),
            Kind::Listener => {
                self.with(key, version, resources, unreadable, |store, contents, rejections| {
                    store.apply_listeners(contents, rejections, absent);
                })
            }
            Kind::ClusterLoadAssignment => {
                let rejections =
                    self.with(key, version, resources, unreadable, |store, contents, rejections| {
                        store.apply_assignments(&key.source, contents, &applying, rejections);
                    });
                if !rejections.is_empty() {
                    let refused = |name: &str| rejections.concern(name);
                    self.for_users(&key.source, refused, SubscriptionStats::count_rejected);
                }
                rejections
            }
            Kind::RouteConfiguration => {
                let rejections =
                    self.with(key, version, resources, unreadable, |store, contents, rejections| {
                        store.apply_routes(&key.source, contents, &applying, rejections);
                    });
                if !rejections.is_empty() {
                    self.routes.count_rejected(&key.source, |name| rejections.concern(name));
                }
                rejections
            }
            Kind::VirtualHost => {
                let rejections =
                    self.with(key, version, resources, unreadable, |store, contents, rejections| {
                        store.apply_hosts(&key.source, contents, &applying, rejections, absent);
                    });
                if !rejections.is_empty() {
                    let names: Vec<&str> = rejections.refused().map(|(name, _)| &**name).collect();
                    let names = (!rejections.are_all()).then_some(&names[..]);
                    self.routes.count_rejected_hosts(&key.source, names);
                }
                rejections
            }
            Kind::Secret => {
                let rejections =
                    self.with(key, version, resources, unreadable, |store, contents, rejections| {
                        store.apply_secrets(&key.source, contents, &applying, rejections);
                    });
                self.note_refused_secrets(&key.source, version, &rejections);
                rejections
            }
        };
        if rejections.is_empty() {
            version.clone_into(&mut self.tables.lock().kind_mut(kind).version);
        }
        let verdict = rejections.verdict(kind);
        if !self.reading_cache {
            self.count_update(key, &applying, &verdict);
            if kind == Kind::Cluster && self.changed_clusters() != before {
                let stats = self.stats.cluster_manager();
                stats.cds_config_reload().inc();
                stats.cds_config_reload_time_ms().set(subscription::now());
            }
        }
        verdict
    }

    /// Goes up with every change of clusters.
    fn changed_clusters(&self) -> u64 {
        let stats = self.stats.cluster_manager();
        [stats.cluster_added(), stats.cluster_modified(), stats.cluster_removed()]
            .map(SharedCounter::value)
            .iter()
            .sum()
    }

    pub(super) fn with<M: response::Named>(
        &mut self,
        key: &Key,
        version: &str,
        resources: Vec<Resource>,
        unreadable: Vec<Unreadable>,
        apply: impl FnOnce(&mut Self, Contents<M>, &mut Rejections),
    ) -> Rejections {
        let checked = {
            let tables = self.tables.lock();
            let is_known = |name: &str, body: &[u8]| self.is_known(&tables, key, name, body);
            response::check::<M>(key.kind, version, resources, unreadable, is_known, self.reading_cache)
        };
        match checked {
            Err(rejections) => rejections,
            Ok((contents, mut rejections)) => {
                let checked = self.note_unknown_fields(key.kind, contents.checked, &mut rejections);
                let contents = Contents { checked, ..contents };
                if !contents.unchanged.is_empty() {
                    let mut tables = self.tables.lock();
                    let table = tables.kind_mut(key.kind);
                    for name in &contents.unchanged {
                        let secret = (key.kind == Kind::Secret).then(|| self.secrets.key(&key.source, name));
                        table.confirm(secret.flatten().unwrap_or(name));
                    }
                }
                apply(self, contents, &mut rejections);
                rejections
            }
        }
    }

    /// Whether a resource is what was accepted last, so that nothing would come of applying it. A control plane that
    /// sends the state of the world sends everything for every change.
    fn is_known(&self, tables: &All, key: &Key, name: &str, body: &[u8]) -> bool {
        match key.kind {
            Kind::Cluster | Kind::Listener => {
                let record = tables.kind(key.kind).and_then(|table| table.records.get(name));
                let latest = record.and_then(|record| record.warming.as_deref().or(record.active.as_ref()));
                latest.is_some_and(|latest| *latest.body == *body)
            }
            Kind::ClusterLoadAssignment => {
                let id = (key.source.clone(), Arc::from(name));
                self.assignments.get(&id).is_some_and(|assignment| {
                    assignment.known.as_deref() == Some(body)
                        // A version of a cluster that warms waits for it.
                        && !assignment.users.iter().any(|user| self.clusters.is_warming(user))
                })
            }
            Kind::RouteConfiguration => self.routes.knows(&key.source, name, body),
            Kind::VirtualHost => self.routes.knows_host(&key.source, name, body),
            Kind::Secret => self.secrets.knows(&key.source, name, body),
        }
    }

    /// Counts fields that nobody knows here. Returns the resources that may have theirs.
    pub(super) fn note_unknown_fields<M: response::Named>(
        &self,
        kind: Kind,
        checked: Vec<Checked<M>>,
        rejections: &mut Rejections,
    ) -> Vec<Checked<M>> {
        let mut kept = Vec::with_capacity(checked.len());
        for resource in checked {
            let nameless = resource.message.unknown_fields().iter().map(ToString::to_string);
            let problems: Vec<String> = nameless.chain(resource.unknown_fields.iter().cloned()).collect();
            self.stats.server().dynamic_unknown_fields().add(problems.len() as u64);
            match self.unknown_fields {
                UnknownFields::Reject if !problems.is_empty() => {
                    let Checked { name, wrapper_name, held, .. } = resource;
                    self.refuse(kind, &name, wrapper_name, &held, &problems.join("; "), rejections);
                    continue;
                }
                UnknownFields::Warn => {
                    for problem in problems {
                        tracing::warn!(target: "tidegate::config", "{problem}; it is ignored");
                    }
                }
                UnknownFields::Reject | UnknownFields::Ignore => {}
            }
            kept.push(resource);
        }
        kept
    }

    pub(super) fn apply_clusters(
        &mut self,
        contents: Contents<cluster_api::Cluster>,
        rejections: &mut Rejections,
        absent: Absent,
    ) {
        let gone = absent.gone(&contents, rejections, || self.clusters.dynamic());
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            let content = content(&held);
            let label = response::label(Kind::Cluster, &name);
            let bind = self.upstream_bind.as_ref();
            match message.get(&held, &label).and_then(|valid| dynamic::cluster(valid, bind, &label)) {
                Ok(converted) => {
                    let added = self.add_cluster(converted.value, content, Origin::Dynamic);
                    let stats = self.stats.cluster_manager();
                    match added {
                        clusters::Added::New => stats.cluster_added().inc(),
                        clusters::Added::Modified => stats.cluster_modified().inc(),
                        clusters::Added::Unchanged => {
                            self.tables.lock().kind_mut(Kind::Cluster).confirm(&name);
                            continue;
                        }
                        clusters::Added::Blocked => continue,
                    }
                    response::log_warnings(&name, &converted.warnings);
                    self.tables.lock().kind_mut(Kind::Cluster).accept(&name, held);
                }
                Err(error) => {
                    self.refuse(
                        Kind::Cluster,
                        &name,
                        wrapper_name,
                        &held,
                        &response::reason(&error),
                        rejections,
                    );
                }
            }
        }
        for name in gone {
            let Some(former) = self.clusters.remove(&name, &mut self.changes) else { continue };
            self.snapshot.remove_cluster(&name);
            self.stats.cluster_manager().cluster_removed().inc();
            self.tables.lock().kind_mut(Kind::Cluster).remove(&name);
            for former in former {
                self.release_cluster(&name, &former);
            }
        }
    }

    pub(super) fn apply_listeners(
        &mut self,
        contents: Contents<listener_api::Listener>,
        rejections: &mut Rejections,
        absent: Absent,
    ) {
        // First what goes: its addresses may be wanted.
        for name in absent.gone(&contents, rejections, || self.listeners.dynamic()) {
            if self.listeners.remove(&name, &mut self.changes).is_some() {
                self.snapshot.remove_listener(&name);
                self.stats.listener_manager().listener_removed().inc();
                self.tables.lock().kind_mut(Kind::Listener).remove(&name);
            }
        }
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            if let Err(error) = self.add_listener(&name, message, &held) {
                self.stats.listener_manager().listener_create_failure().inc();
                self.refuse(Kind::Listener, &name, wrapper_name, &held, &why(&error), rejections);
            }
        }
        self.forget_routes();
    }

    pub(super) fn add_listener(
        &mut self,
        name: &Arc<str>,
        message: Decoded<listener_api::Listener>,
        held: &Held,
    ) -> anyhow::Result<()> {
        let label = response::label(Kind::Listener, name);
        let clusters = &self.clusters;
        let around = Surroundings {
            is_cluster: &|name| clusters.contains(name),
            has_pipes: &|name| clusters.in_force(name).is_some_and(|cluster| cluster.config().has_pipes),
            runtime: &self.runtime,
        };
        let converted = dynamic::listener(message.get(held, &label)?, &label, &around)?;
        let config = Arc::new(converted.value);
        let added = self.listeners.add(&config, content(held), Origin::Dynamic)?;
        let stats = self.stats.listener_manager();
        let listener = match added {
            listeners::Added::Unchanged => {
                self.tables.lock().kind_mut(Kind::Listener).confirm(&config.name);
                return Ok(());
            }
            listeners::Added::Blocked => return Ok(()),
            listeners::Added::New(listener) => {
                stats.listener_added().inc();
                listener
            }
            listeners::Added::Modified(listener) => {
                stats.listener_modified().inc();
                listener
            }
        };
        response::log_warnings(&config.name, &converted.warnings);
        self.stats.config().ignored_filters().add(converted.ignored_filters as u64);
        self.tables.lock().kind_mut(Kind::Listener).accept(&config.name, held.clone());
        for (source, route) in self.routes.add(&listener) {
            let key = Key { source: source.source.clone(), kind: Kind::RouteConfiguration };
            self.client.add(&key, Arc::clone(&route));
            self.expire_after(source.initial_fetch_timeout, Deadline::Routes(source.source, route));
        }
        Ok(())
    }

    pub(super) fn apply_assignments(
        &mut self,
        source: &Source,
        contents: Contents<endpoint_api::ClusterLoadAssignment>,
        applying: &Applying,
        rejections: &mut Rejections,
    ) {
        for name in contents.unchanged {
            let id = (source.clone(), name);
            let Some(assignment) = self.assignments.get(&id) else { continue };
            for version in assignment.users.iter().flat_map(|user| self.versions_of(user, source, &id.1)) {
                version.stats().update_no_rebuild().inc();
                version.stats().count_success(applying);
            }
        }
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            let id = (source.clone(), Arc::clone(&name));
            let Some(assignment) = self.assignments.get_mut(&id) else { continue }; // nobody asked for it
            let before = assignment.known.replace(Arc::clone(&held.body));
            let users = assignment.users.clone();
            let label = response::label(Kind::ClusterLoadAssignment, &name);
            let valid = message.get(&held, &label).map_err(|error| response::reason(&error));
            let applied = valid.and_then(|valid| {
                let applying = Some(applying);
                users.iter().try_for_each(|user| self.apply_assignment(user, source, &name, &valid, applying))
            });
            if let Err(error) = applied {
                if let Some(assignment) = self.assignments.get_mut(&id) {
                    assignment.known = before;
                }
                self.refuse(Kind::ClusterLoadAssignment, &name, wrapper_name, &held, &error, rejections);
                continue;
            }
            let mut tables = self.tables.lock();
            let table = tables.kind_mut(Kind::ClusterLoadAssignment);
            table.accept(&name, held);
            table.activate(&name);
        }
    }

    pub(super) fn apply_routes(
        &mut self,
        source: &Source,
        contents: Contents<route_api::RouteConfiguration>,
        applying: &Applying,
        rejections: &mut Rejections,
    ) {
        let mut mentioned: HashSet<Arc<str>> = contents.unchanged.into_iter().collect();
        for name in &mentioned {
            self.routes.count_success(source, name, applying);
        }
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            if !self.routes.wants(source, &name) {
                continue;
            }
            mentioned.insert(Arc::clone(&name));
            match self.update_route(source, &name, message, &held) {
                Ok(vhds) => {
                    self.routes.count_success(source, &name, applying);
                    let mut tables = self.tables.lock();
                    let table = tables.kind_mut(Kind::RouteConfiguration);
                    table.accept(&name, held);
                    table.activate(&name);
                    drop(tables);
                    if let Some(vhds) = vhds {
                        let key = Key { source: vhds.source, kind: Kind::VirtualHost };
                        self.client.want(&key, Wanted { wildcard: true, ..Wanted::default() });
                        let deadline = Deadline::Routes(source.clone(), name);
                        self.expire_after(vhds.initial_fetch_timeout, deadline);
                    }
                }
                Err(error) => {
                    let error = why(&error);
                    self.refuse(Kind::RouteConfiguration, &name, wrapper_name, &held, &error, rejections);
                }
            }
        }
        if subscription::tells_all(source) {
            self.routes.count_empty(source, &mentioned, applying);
        }
    }

    /// Returns where its virtual hosts come from, if not with it.
    fn update_route(
        &mut self,
        source: &Source,
        name: &Arc<str>,
        message: Decoded<route_api::RouteConfiguration>,
        held: &Held,
    ) -> anyhow::Result<Option<ConfigSource>> {
        let label = response::label(Kind::RouteConfiguration, name);
        let valid = message.get(held, &label)?;
        let vhds = valid.message.vhds.as_ref().and_then(|vhds| vhds.config_source.clone());
        let vhds = vhds.map(|vhds| dynamic::config_source(vhds, &label)).transpose()?;
        let hosts = vhds.as_ref().map(|vhds| vhds.source.clone());
        self.routes.update(source, name, valid, Arc::clone(&held.body), hosts)?;
        Ok(vhds)
    }

    pub(super) fn apply_hosts(
        &mut self,
        source: &Source,
        contents: Contents<route_api::VirtualHost>,
        applying: &Applying,
        rejections: &mut Rejections,
        absent: Absent,
    ) {
        let removed = match absent {
            Absent::Removed(names) => names,
            Absent::State { .. } => Vec::new(),
        };
        let mut added = Vec::new();
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            let name = wrapper_name.unwrap_or(name);
            match message.get(&held, &response::label(Kind::VirtualHost, &name)) {
                Ok(valid) => added.push((name, Host { message: valid.message, held })),
                Err(error) => rejections.refuse(name, response::reason(&error)),
            }
        }
        let changes = HostChanges { added: &added, unchanged: &contents.unchanged, removed: &removed };
        let refused = self.routes.update_hosts(source, &changes, applying);
        let mut tables = self.tables.lock();
        let table = tables.kind_mut(Kind::VirtualHost);
        for name in &removed {
            table.remove(name);
        }
        for (name, host) in added {
            if let Some((_, error)) = refused.iter().find(|(refused, _)| *refused == name) {
                table.refuse(&name, response::refused(&host.held.version, error, &host.held.body));
                rejections.refuse(name, error.as_str());
            } else {
                table.accept(&name, host.held);
                table.activate(&name);
            }
        }
    }

    /// Drops the subscriptions of routes that no listener names any more.
    pub(super) fn forget_routes(&mut self) {
        if self.routes.is_empty() {
            return;
        }
        let in_use: HashSet<_> = self
            .listeners
            .versions()
            .flat_map(|listener| listener.rds_chains().map(|(chain, _)| chain.id).collect::<Vec<_>>())
            .collect();
        for (source, name) in self.routes.forget(&in_use) {
            self.tables.lock().kind_mut(Kind::RouteConfiguration).remove(&name);
            self.client.remove(&Key { source, kind: Kind::RouteConfiguration }, name);
        }
    }

    /// TTLs ran out: as if the server had removed these.
    pub(super) fn expired(&mut self, key: &Key, names: &[Arc<str>]) {
        tracing::warn!("{} of {} ran out without a refresh", names.join(", "), key.kind.service());
        let mut rejections = Rejections::default();
        let absent = Absent::Removed(names.to_vec());
        match key.kind {
            Kind::Cluster => self.apply_clusters(Contents::default(), &mut rejections, absent),
            Kind::Listener => self.apply_listeners(Contents::default(), &mut rejections, absent),
            Kind::VirtualHost => {
                let applying = Applying::now("");
                self.apply_hosts(&key.source, Contents::default(), &applying, &mut rejections, absent);
            }
            // As in Envoy, endpoints, routes and secrets stay until there are others.
            Kind::ClusterLoadAssignment | Kind::RouteConfiguration | Kind::Secret => {}
        }
    }

    pub(super) fn refuse(
        &self,
        kind: Kind,
        name: &Arc<str>,
        wrapper_name: Option<Arc<str>>,
        held: &Held,
        error: &str,
        rejections: &mut Rejections,
    ) {
        let refused = response::refused(&held.version, error, &held.body);
        self.tables.lock().kind_mut(kind).refuse(name, refused);
        rejections.refuse(wrapper_name.unwrap_or_else(|| Arc::clone(name)), error);
    }
}

/// What becomes of resources that a response does not have.
pub(super) enum Absent {
    /// State of the world: `all` says that they are gone.
    State { all: bool, unchanged: Vec<Arc<str>> },
    /// These are gone.
    Removed(Vec<Arc<str>>),
}

impl Absent {
    /// Those of the known ones that are gone.
    fn gone<M>(
        self,
        contents: &Contents<M>,
        rejections: &Rejections,
        known: impl FnOnce() -> Vec<Arc<str>>,
    ) -> Vec<Arc<str>> {
        match self {
            Self::Removed(names) => names,
            Self::State { all: false, .. } => Vec::new(),
            Self::State { all: true, unchanged } => {
                let checked = contents.checked.iter().map(|resource| &*resource.name);
                let present: HashSet<&str> = checked
                    .chain(contents.unchanged.iter().chain(&unchanged).map(|name| &**name))
                    .chain(rejections.refused().map(|(name, _)| &**name))
                    .collect();
                known().into_iter().filter(|name| !present.contains(&**name)).collect()
            }
        }
    }
}

/// An error of a resource, in one line, without its name.
fn why(error: &anyhow::Error) -> String {
    error.downcast_ref::<ConfigError>().map_or_else(|| format!("{error:#}"), response::reason)
}

fn content(held: &Held) -> u64 {
    use std::hash::{DefaultHasher, Hasher as _};
    let mut hasher = DefaultHasher::new();
    hasher.write(&held.body);
    hasher.finish()
}
