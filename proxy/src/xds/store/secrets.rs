//! Secrets (SDS): who wants which, and what came.
//!
//! A secret is subscribed to once for each name and source, however many want it, as soon as the cluster is in force
//! through which it comes. Users wait for it, but no longer than `initial_fetch_timeout`, and not after a bad one. A
//! secret that came stays until there is a good one in its place: one that is rejected, removed by its server, or of which
//! a file is bad, changes nothing.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tidegate_api::tls as api;

use super::response::{self, Checked, Contents, Rejections};
use super::subscription::{Applying, SubscriptionStats as _};
use super::{Deadline, Store};
use crate::config;
use crate::config::config_source::Source;
use crate::config::dynamic;
use crate::config::tls::{SecretSource, Use};
use crate::secret::{self, Credentials, Material, Publication};
use crate::stats::{SdsStats, Stats};
use crate::xds::tables::Held;
use crate::xds::{Key, Kind};

/// Stands in the tables' keys between a name and what makes it unique.
pub(crate) const KEY_SEPARATOR: char = '\0';

/// What identifies a secret.
type Id = (Source, Arc<str>);

/// All secrets that somebody wants.
#[derive(Debug)]
pub(super) struct Secrets {
    stats: Arc<Stats>,
    entries: HashMap<Id, Entry>,
    /// Those that were not asked for yet.
    unasked: Vec<Id>,
    /// The last number.
    numbers: u64,
}

#[derive(Debug)]
struct Entry {
    /// By which the watcher of files knows it.
    number: u64,
    /// By which the tables know it: its name, and more if another source has one of this name.
    key: Arc<str>,
    timeout: Option<Duration>,
    /// Clusters, and what it is for them.
    users: Vec<(Arc<str>, Use)>,
    publication: Publication,
    stats: SdsStats,
    fetch: Fetch,
    /// What was accepted last: its files may be replaced.
    accepted: Option<config::tls::Secret>,
    /// The same, encoded, if there is no file to read.
    known: Option<Arc<[u8]>>,
    /// What was refused after it: its files may get better.
    refused: Option<(config::tls::Secret, Held)>,
}

/// How far it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fetch {
    /// Its server can't be asked yet.
    Unasked,
    /// It was asked for.
    Waiting,
    /// It came, was refused, or is waited for no longer.
    Done,
}

impl Entry {
    /// Loads what came, and looks whether all its users can use it.
    fn load(&self, secret: &config::tls::Secret) -> Result<Material, String> {
        let material = Material::load(secret).map_err(|error| error.to_string())?;
        for (user, wanted) in &self.users {
            material.fits(*wanted).map_err(|error| format!("{error} (by cluster '{user}')"))?;
        }
        Ok(material)
    }

    fn directories(&self) -> Vec<std::path::PathBuf> {
        let secrets = self.accepted.iter().chain(self.refused.iter().map(|(secret, _)| secret));
        secrets.flat_map(secret::directories).collect()
    }
}

impl Secrets {
    pub(super) fn new(stats: &Arc<Stats>) -> Self {
        Self { stats: Arc::clone(stats), entries: HashMap::new(), unasked: Vec::new(), numbers: 0 }
    }

    /// What a cluster needs for handshakes; notes that it wants the secrets in there.
    pub(super) fn credentials(&mut self, cluster: &config::cluster::Cluster) -> Option<Credentials> {
        let tls = cluster.tls.as_ref()?;
        for (source, wanted) in tls.secrets() {
            let user = (Arc::clone(&cluster.name), wanted);
            let entry = self.entry(source);
            if !entry.users.contains(&user) {
                entry.users.push(user);
            }
        }
        let stats = self.stats.client_tls(cluster.alt_stat_name.as_ref().unwrap_or(&cluster.name));
        Some(Credentials::new(tls, stats, |source| self.entry(source).publication.slot()))
    }

    fn entry(&mut self, source: &SecretSource) -> &mut Entry {
        let id = (source.config.source.clone(), Arc::clone(&source.name));
        let taken = self.entries.keys().any(|other| other.1 == id.1 && *other != id);
        let (numbers, unasked, stats) = (&mut self.numbers, &mut self.unasked, &self.stats);
        self.entries.entry(id.clone()).or_insert_with(|| {
            unasked.push(id);
            *numbers += 1;
            Entry {
                number: *numbers,
                key: if taken {
                    format!("{}{KEY_SEPARATOR}{numbers}", source.name).into()
                } else {
                    Arc::clone(&source.name)
                },
                timeout: source.config.initial_fetch_timeout,
                users: Vec::new(),
                publication: Publication::new(Arc::clone(&source.name)),
                stats: stats.sds(&source.name),
                fetch: Fetch::Unasked,
                accepted: None,
                known: None,
                refused: None,
            }
        })
    }

    /// Whether nobody has to wait for any of these.
    fn settled(&self, tls: &config::tls::UpstreamTls) -> bool {
        tls.secrets().all(|(source, _)| {
            let id = (source.config.source.clone(), Arc::clone(&source.name));
            self.entries.get(&id).is_none_or(|entry| entry.fetch == Fetch::Done)
        })
    }

    /// Names of those that are waited for.
    pub(super) fn waiting(&self) -> impl Iterator<Item = &Arc<str>> {
        self.entries.iter().filter(|(_, entry)| entry.fetch != Fetch::Done).map(|((_, name), _)| name)
    }

    /// By which the tables know a secret.
    pub(super) fn key(&self, source: &Source, name: &Arc<str>) -> Option<&Arc<str>> {
        self.entries.get(&(source.clone(), Arc::clone(name))).map(|entry| &entry.key)
    }

    /// Whether it is what was accepted last.
    pub(super) fn knows(&self, source: &Source, name: &str, body: &[u8]) -> bool {
        let entry = self.entries.get(&(source.clone(), Arc::from(name)));
        entry.is_some_and(|entry| entry.known.as_deref() == Some(body) && entry.refused.is_none())
    }

    fn from(&self, source: &Source) -> impl Iterator<Item = (&Id, &Entry)> {
        self.entries.iter().filter(move |((from, _), _)| from == source)
    }

    /// An update or a connection failed.
    pub(super) fn count_failure(&self, source: &Source) {
        for (_, entry) in self.from(source).filter(|(_, entry)| entry.fetch != Fetch::Unasked) {
            entry.stats.count_failure();
        }
    }
}

impl Store {
    /// Asks for the secrets whose servers can be reached by now.
    pub(super) fn subscribe_secrets(&mut self) {
        for id in std::mem::take(&mut self.secrets.unasked) {
            let server = match &id.0 {
                Source::Ads => self.dynamic.ads.as_ref().map(|ads| &ads.cluster),
                Source::Api(api) => Some(&api.cluster),
                Source::Path(_) => None,
            };
            let can_be_asked = server.is_none_or(|server| self.clusters.is_active(server));
            let entry = self.secrets.entries.get_mut(&id).filter(|entry| entry.fetch == Fetch::Unasked);
            let Some(entry) = entry else { continue }; // nobody wants it any more
            if !can_be_asked {
                self.secrets.unasked.push(id);
                continue;
            }
            entry.fetch = Fetch::Waiting;
            entry.stats.subscribed(&id.0);
            let (timeout, (source, name)) = (entry.timeout, id);
            self.client.add(&Key { source: source.clone(), kind: Kind::Secret }, Arc::clone(&name));
            self.expire_after(timeout, Deadline::Secret(source, name));
        }
    }

    /// Shows what a cluster waits for, and looks whether it has to.
    pub(super) fn want_secrets(&mut self, cluster: &Arc<str>) {
        let mut names = Vec::new();
        for tls in self.clusters.versions(cluster).filter_map(|version| version.config().tls.as_ref()) {
            let key = |source: &SecretSource| self.secrets.key(&source.config.source, &source.name).cloned();
            names.extend(tls.secrets().filter_map(|(source, _)| key(source)));
        }
        if !names.is_empty() {
            let mut tables = self.tables.lock();
            for name in &names {
                tables.kind_mut(Kind::Secret).expect(name);
            }
        }
        self.check_secrets(cluster);
    }

    /// Those of a cluster's versions that need not wait for secrets may come into force.
    pub(super) fn check_secrets(&mut self, cluster: &Arc<str>) {
        let secrets = &self.secrets;
        let settled = |version: &&Arc<crate::cluster::Cluster>| {
            version.config().tls.as_ref().is_none_or(|tls| secrets.settled(tls))
        };
        let ready: Vec<_> = self.clusters.versions(cluster).filter(settled).map(|it| it.id()).collect();
        for id in ready {
            self.clusters.secrets_ready(cluster, id);
        }
    }

    /// A secret need not be waited for any longer.
    fn settle_secret(&mut self, id: &Id) {
        let Some(entry) = self.secrets.entries.get_mut(id) else { return };
        if entry.fetch == Fetch::Done {
            return;
        }
        entry.fetch = Fetch::Done;
        let users: BTreeSet<_> = entry.users.iter().map(|(user, _)| Arc::clone(user)).collect();
        for user in &users {
            self.check_secrets(user);
        }
    }

    /// A secret does not come in time.
    pub(super) fn give_up_secret(&mut self, source: Source, name: Arc<str>) {
        let id = (source, name);
        let Some(entry) = self.secrets.entries.get(&id).filter(|entry| entry.fetch == Fetch::Waiting) else {
            return;
        };
        entry.stats.count_timeout();
        tracing::warn!(secret = %id.1, "did not come within initial_fetch_timeout; going on without it");
        self.settle_secret(&id);
    }

    /// A cluster does not have this configuration any more: what only that wanted is unsubscribed.
    pub(super) fn drop_secrets(&mut self, cluster: &str, former: &config::cluster::Cluster) {
        let Some(tls) = &former.tls else { return };
        for (source, wanted) in tls.secrets() {
            let id = (source.config.source.clone(), Arc::clone(&source.name));
            let is_it = |(used, what): (&SecretSource, Use)| {
                (&used.config.source, &used.name, what) == (&id.0, &id.1, wanted)
            };
            let mut versions = self.clusters.versions(cluster).filter_map(|it| it.config().tls.as_ref());
            if versions.any(|tls| tls.secrets().any(is_it)) {
                continue; // a version that is still in force uses it
            }
            let Some(entry) = self.secrets.entries.get_mut(&id) else { continue };
            entry.users.retain(|(user, what)| **user != *cluster || *what != wanted);
            if !entry.users.is_empty() {
                continue;
            }
            self.files.forget(&entry.number);
            self.tables.lock().kind_mut(Kind::Secret).remove(&entry.key);
            self.secrets.entries.remove(&id);
            let (source, name) = id;
            self.client.remove(&Key { source, kind: Kind::Secret }, name);
        }
    }

    pub(super) fn apply_secrets(
        &mut self,
        source: &Source,
        contents: Contents<api::Secret>,
        applying: &Applying,
        rejections: &mut Rejections,
    ) {
        for name in contents.unchanged {
            if let Some(entry) = self.secrets.entries.get(&(source.clone(), name)) {
                entry.stats.count_success(applying);
            }
        }
        for resource in contents.checked {
            let Checked { name, wrapper_name, message, held, .. } = resource;
            let id = (source.clone(), Arc::clone(&name));
            if !self.secrets.entries.contains_key(&id) {
                let wanted: Vec<_> =
                    self.secrets.from(source).map(|((_, name), _)| &**name).take(10).collect();
                tracing::warn!(secret = %name, "nobody asked for it; what is wanted from there is {wanted:?}");
                continue;
            }
            let label = response::label(Kind::Secret, &name);
            let taken = match message.get(&held, &label).and_then(|valid| dynamic::secret(valid, &label)) {
                Ok(converted) => {
                    response::log_warnings(&name, &converted.warnings);
                    self.take_secret(&id, converted.value, &held, applying)
                }
                Err(error) => {
                    // What was refused before is out of date, whatever becomes of its files.
                    if let Some(entry) = self.secrets.entries.get_mut(&id) {
                        entry.refused = None;
                    }
                    Err(response::reason(&error))
                }
            };
            if let Err(error) = taken {
                if let Some(key) = self.secrets.key(source, &name) {
                    let refused = response::refused(&held.version, &error, &held.body);
                    self.tables.lock().kind_mut(Kind::Secret).refuse(key, refused);
                }
                rejections.refuse(wrapper_name.unwrap_or(name), error);
            }
        }
    }

    /// A secret came.
    fn take_secret(
        &mut self,
        id: &Id,
        secret: config::tls::Secret,
        held: &Held,
        applying: &Applying,
    ) -> Result<(), String> {
        let Some(entry) = self.secrets.entries.get_mut(id) else { return Ok(()) };
        // Watched before they are read, so that no change falls between.
        entry.refused = Some((secret.clone(), held.clone()));
        self.files.set(&entry.number, entry.directories());
        let material = entry.load(&secret)?;
        self.put_secret(id, secret, material, held, applying);
        Ok(())
    }

    /// A good secret takes the place of what was there.
    fn put_secret(
        &mut self,
        id: &Id,
        secret: config::tls::Secret,
        material: Material,
        held: &Held,
        applying: &Applying,
    ) {
        let Some(entry) = self.secrets.entries.get_mut(id) else { return };
        // What has files is read again, whether it says the same or not.
        entry.known = secret::directories(&secret).is_empty().then(|| Arc::clone(&held.body));
        entry.accepted = Some(secret);
        entry.refused = None;
        self.files.set(&entry.number, entry.directories());
        entry.stats.count_success(applying);
        let key = Arc::clone(&entry.key);
        self.publish_secret(id, material);
        let mut tables = self.tables.lock();
        let table = tables.kind_mut(Kind::Secret);
        table.accept(&key, held.clone());
        table.activate(&key);
        drop(tables);
        self.settle_secret(id);
    }

    /// From now on handshakes use this.
    fn publish_secret(&mut self, id: &Id, material: Material) {
        let Some(entry) = self.secrets.entries.get(id) else { return };
        let names_nobody = matches!(&material, Material::Trust(trust) if trust.names().is_empty());
        let rotated = entry.publication.has_come();
        if !entry.publication.publish(material) {
            return; // the same again
        }
        if rotated {
            tracing::info!(secret = %id.1, "rotated: new connections use the new one");
        }
        for (user, wanted) in &entry.users {
            for version in self.clusters.versions(user) {
                let Some(credentials) = version.credentials() else { continue };
                credentials.stats().ssl_context_update_by_sds().inc();
                if names_nobody && matches!(wanted, Use::Validation { .. }) && credentials.accepts_any_name()
                {
                    tracing::warn!(cluster = %user, secret = %id.1, "{}", config::tls::ANY_NAME);
                }
            }
        }
    }

    /// Files of these secrets were replaced, perhaps.
    pub(super) fn reload_secrets(&mut self, numbers: &BTreeSet<u64>) {
        let concerned = self.secrets.entries.iter().filter(|(_, entry)| numbers.contains(&entry.number));
        let concerned: Vec<Id> = concerned.map(|(id, _)| id.clone()).collect();
        for id in concerned {
            let Some(entry) = self.secrets.entries.get(&id) else { continue };
            if let Some((secret, held)) = entry.refused.clone()
                && let Ok(material) = entry.load(&secret)
            {
                tracing::info!(secret = %id.1, "its files are right now");
                let applying = Applying::now(&held.version);
                self.put_secret(&id, secret, material, &held, &applying);
                continue;
            }
            let Some(secret) =
                entry.accepted.as_ref().filter(|secret| !secret::directories(secret).is_empty())
            else {
                continue;
            };
            match entry.load(secret) {
                Ok(material) => self.publish_secret(&id, material),
                Err(error) => {
                    entry.stats.key_rotation_failed().inc();
                    tracing::warn!(secret = %id.1, "its new files can't be used, the old ones stay in use: {error}");
                }
            }
        }
    }

    /// What a response says of secrets was refused, or all of it. As in Envoy, that ends the wait.
    pub(super) fn note_refused_secrets(&mut self, source: &Source, version: &str, rejections: &Rejections) {
        let refused: HashMap<&str, &str> =
            rejections.refused().map(|(name, reason)| (&**name, reason)).collect();
        if refused.is_empty() {
            return;
        }
        let all = rejections.are_all();
        let concerned = self.secrets.from(source);
        let concerned: Vec<Id> = concerned
            .filter(|((_, name), _)| all || refused.contains_key(&**name))
            .map(|(id, _)| id.clone())
            .collect();
        for id in concerned {
            if let Some(entry) = self.secrets.entries.get(&id) {
                entry.stats.count_rejected();
            }
            if let Some(reason) = refused.get(&*id.1)
                && let Some(key) = self.secrets.key(&id.0, &id.1)
            {
                self.tables.lock().kind_mut(Kind::Secret).refuse_unread(key, version, reason);
            }
            self.settle_secret(&id);
        }
    }

    /// The client threw a response away.
    pub(super) fn secrets_rejected(&mut self, source: &Source) {
        let concerned: Vec<Id> = self.secrets.from(source).map(|(id, _)| id.clone()).collect();
        for id in concerned {
            if let Some(entry) = self.secrets.entries.get(&id) {
                entry.stats.count_rejected();
            }
            self.settle_secret(&id);
        }
    }
}
