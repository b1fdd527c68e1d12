//! What the cache on disk knows takes the place of what a control plane does not send.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::{Deadline, Fetch, Store};
use crate::xds::cache::CacheError;
use crate::xds::{Change, Key, Kind, Resource, Verdict};

impl Store {
    /// A control plane failed: start-up does not wait any longer for what the cache has.
    pub(super) fn recall_unfetched(&mut self, keys: &[Key]) {
        if self.cache.is_none() {
            return;
        }
        for key in keys {
            match key.kind {
                Kind::Cluster if self.cds == Fetch::Waiting => self.recall(Kind::Cluster),
                Kind::Listener if self.lds == Fetch::Waiting => self.recall(Kind::Listener),
                Kind::ClusterLoadAssignment => {
                    let waiting = self.assignments.iter().filter(|((source, _), assignment)| {
                        *source == key.source && assignment.known.is_none()
                    });
                    let names: Vec<_> = waiting.map(|((_, name), _)| Arc::clone(name)).collect();
                    if !names.is_empty() {
                        self.recall_named(key, &names);
                    }
                }
                Kind::RouteConfiguration | Kind::VirtualHost => {
                    let names: Vec<_> = self.routes.waiting().cloned().collect();
                    if !names.is_empty() {
                        self.recall_named(key, &names);
                    }
                }
                Kind::Cluster | Kind::Listener | Kind::Secret => {}
            }
        }
    }

    /// All clusters or listeners that the cache has.
    pub(super) fn recall(&mut self, kind: Kind) {
        let config = match kind {
            Kind::Cluster => &self.dynamic.cds,
            _ => &self.dynamic.lds,
        };
        let Some(config) = config else { return };
        let key = Key { source: config.source.clone(), kind };
        self.recall_where(&key, |_| true);
    }

    /// Those of these names; virtual hosts are named after their route configuration.
    fn recall_named(&mut self, key: &Key, names: &[Arc<str>]) {
        let kind = key.kind;
        let names: HashSet<&str> = names.iter().map(|name| &**name).collect();
        self.recall_where(key, |resource| {
            let Some(name) = name_of(kind, resource) else { return false };
            // Of a virtual host: `route configuration/virtual host`.
            let owner = name.rsplit_once('/').filter(|_| kind == Kind::VirtualHost).map(|(owner, _)| owner);
            names.contains(owner.unwrap_or(&name))
        });
    }

    /// What was waited for long enough, all at once: the files are read once.
    pub(super) fn recall_expired(&mut self, expired: &[Deadline]) {
        if self.cache.is_none() {
            return;
        }
        let mut names: HashMap<Key, Vec<Arc<str>>> = HashMap::new();
        for deadline in expired {
            let (source, kind, name) = match deadline {
                Deadline::Endpoints(source, name) => (source, Kind::ClusterLoadAssignment, name),
                Deadline::Routes(source, name) => (source, Kind::RouteConfiguration, name),
                Deadline::Cds | Deadline::Lds | Deadline::Secret(..) => continue,
            };
            let known = |assignment: &super::Assignment| assignment.known.is_some();
            let id = (source.clone(), Arc::clone(name));
            let wanted = match kind {
                Kind::ClusterLoadAssignment => !self.assignments.get(&id).is_none_or(known),
                _ => self.routes.waiting().any(|waiting| waiting == name),
            };
            if wanted {
                names.entry(Key { source: source.clone(), kind }).or_default().push(Arc::clone(name));
            }
        }
        for (key, names) in names {
            self.recall_named(&key, &names);
        }
    }

    fn recall_where(&mut self, key: &Key, wanted: impl Fn(&Resource) -> bool) {
        let Some(cache) = &self.cache else { return };
        let (version, mut resources) = match cache.load(key.kind) {
            Ok(Some(known)) => known,
            Ok(None) => return,
            Err(error @ (CacheError::File { .. } | CacheError::Directory { .. })) => {
                tracing::warn!("{error}");
                return;
            }
        };
        resources.retain(wanted);
        if resources.is_empty() {
            return;
        }
        tracing::warn!(
            "{}: {} resources of version {version:?} come from the cache until the control plane answers",
            key.kind.service(),
            resources.len()
        );
        let change = Change::Delta { version, resources, removed: Vec::new() };
        self.reading_cache = true;
        let verdict = self.change(key, change);
        self.reading_cache = false;
        if let Verdict::Reject { message, .. } = verdict {
            tracing::warn!("the cache has resources that can't be used: {message}");
        }
    }
}

/// What a cached resource calls itself.
fn name_of(kind: Kind, resource: &Resource) -> Option<String> {
    use prost::Message as _;
    let body = &resource.body.value[..];
    match kind {
        Kind::VirtualHost => resource.name.as_ref().map(ToString::to_string),
        Kind::RouteConfiguration => {
            tidegate_api::route::RouteConfiguration::decode(body).ok().map(|message| message.name)
        }
        Kind::ClusterLoadAssignment => tidegate_api::endpoint::ClusterLoadAssignment::decode(body)
            .ok()
            .map(|message| message.cluster_name),
        Kind::Listener | Kind::Cluster | Kind::Secret => None,
    }
}
