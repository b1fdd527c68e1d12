//! What was accepted and what was refused, resource by resource, for `/config_dump` and the cache on disk. The store
//! writes it; the admin server reads it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use super::Kind;

/// Shared by the store and the admin server.
#[derive(Clone, Debug, Default)]
pub struct Tables(Arc<Mutex<All>>);

/// All kinds.
#[derive(Debug, Default)]
pub struct All {
    kinds: BTreeMap<Kind, Table>,
    generation: u64,
}

/// One kind of resource.
#[derive(Debug, Default)]
pub struct Table {
    /// `version_info` of the last accepted response, or `system_version_info`.
    pub version: String,
    /// By name.
    pub records: BTreeMap<Arc<str>, Record>,
}

/// One resource.
#[derive(Debug, Default)]
pub struct Record {
    /// In force.
    pub active: Option<Held>,
    /// Accepted, and waiting for what it needs.
    pub warming: Option<Box<Held>>,
    /// Why the last update of it was refused.
    pub error: Option<Box<Refused>>,
}

/// An accepted resource.
#[derive(Clone, Debug)]
pub struct Held {
    /// Its own version, or that of its response.
    pub version: Arc<str>,
    /// The encoded message.
    pub body: Arc<[u8]>,
    /// When it came.
    pub at: SystemTime,
    /// From the cache on disk: the control plane has not confirmed it.
    pub stale: bool,
}

/// A refused resource.
#[derive(Clone, Debug)]
pub struct Refused {
    /// Its version.
    pub version: Arc<str>,
    /// What the control plane was told.
    pub details: String,
    /// The encoded message; empty when it could not be read.
    pub body: Arc<[u8]>,
    /// When it came.
    pub at: SystemTime,
}

impl Tables {
    /// Locks everything. Hold it for moments only: the main thread writes here.
    pub fn lock(&self) -> MutexGuard<'_, All> {
        // Consistent after every statement, so a panic while it was locked spoils nothing.
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl All {
    /// One kind, if there ever was a resource of it.
    pub fn kind(&self, kind: Kind) -> Option<&Table> {
        self.kinds.get(&kind)
    }

    /// Changes whenever anything may have changed.
    pub fn generation(&self) -> u64 {
        self.generation
    }

    /// Resources in force that no control plane has confirmed.
    pub fn stale(&self) -> usize {
        let records = self.kinds.values().flat_map(|table| table.records.values());
        records.filter(|record| record.active.as_ref().is_some_and(|held| held.stale)).count()
    }

    /// One kind, to change it.
    pub fn kind_mut(&mut self, kind: Kind) -> &mut Table {
        self.generation += 1;
        self.kinds.entry(kind).or_default()
    }
}

impl Table {
    /// A resource is waited for.
    pub fn expect(&mut self, name: &Arc<str>) {
        self.records.entry(Arc::clone(name)).or_default();
    }

    /// A resource was accepted; it warms until [`Table::activate`].
    pub fn accept(&mut self, name: &Arc<str>, held: Held) {
        let record = self.records.entry(Arc::clone(name)).or_default();
        record.warming = Some(Box::new(held));
        record.error = None;
    }

    /// A control plane sent what is there already.
    pub fn confirm(&mut self, name: &str) {
        if let Some(record) = self.records.get_mut(name) {
            for held in record.active.iter_mut().chain(record.warming.as_deref_mut()) {
                held.stale = false;
            }
            record.error = None;
        }
    }

    /// What was warming is in force.
    pub fn activate(&mut self, name: &str) {
        if let Some(record) = self.records.get_mut(name)
            && let Some(held) = record.warming.take()
        {
            record.active = Some(*held);
        }
    }

    /// An update was refused.
    pub fn refuse(&mut self, name: &Arc<str>, refused: Refused) {
        self.records.entry(Arc::clone(name)).or_default().error = Some(Box::new(refused));
    }

    /// An update was refused before anybody could read it; if it is known why, that stays.
    pub fn refuse_unread(&mut self, name: &Arc<str>, version: &str, details: &str) {
        let record = self.records.entry(Arc::clone(name)).or_default();
        if record.error.as_ref().is_none_or(|known| known.details != details) {
            record.error = Some(Box::new(Refused {
                version: version.into(),
                details: details.to_owned(),
                body: Arc::default(),
                at: SystemTime::now(),
            }));
        }
    }

    /// A resource is gone.
    pub fn remove(&mut self, name: &str) {
        self.records.remove(name);
    }
}
