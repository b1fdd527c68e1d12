//! The client half: speaks the protocol, knows no resource's meaning.
//!
//! One task for each stream, poll or file, all on the main thread's `LocalSet`:
//!
//! | Source | Task |
//! |---|---|
//! | `ads` | one stream for all kinds: `grpc` |
//! | `api_config_source`, gRPC | one stream for each kind: `grpc` |
//! | `api_config_source`, REST | one poll for each kind: `rest` |
//! | `path_config_source` | one watched file for each kind: `path` |
//!
//! The protocol itself is in `sotw` and `delta`, which do no I/O. `grpc` moves their messages.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::future::Future;
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;

use tidegate_api::core;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::mpsc;

use super::{Event, Key, Kind, Wanted};
use crate::addr::EndpointAddr;
use crate::config::config_source::{ApiSource, Protocol, Source};

mod backoff;
mod delta;
#[cfg(test)]
mod fuzz;
mod grpc;
mod json;
pub mod node;
mod path;
mod protocol;
mod rest;
mod sotw;
mod state;
#[cfg(test)]
mod testing;
mod tls;
mod ttl;
pub mod upstream;

/// What a client is made of.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Who we are: sent as it is. [`node::identify`] makes it from the bootstrap's.
    pub node: core::Node,
    /// `dynamic_resources.ads_config`: what [`Source::Ads`] means. Its protocol is one of the aggregated ones.
    pub ads: Option<Arc<ApiSource>>,
}

/// Subscriptions of this process.
///
/// Lives on the main thread, inside a `LocalSet`. Dropping it ends every stream.
pub struct Client {
    shared: Rc<Shared>,
    tasks: HashMap<TaskId, mpsc::UnboundedSender<(Kind, Ask)>>,
}

/// What every task needs.
struct Shared {
    node: Rc<core::Node>,
    ads: Option<Arc<ApiSource>>,
    dialer: Rc<dyn Dialer>,
    events: mpsc::UnboundedSender<Event>,
}

/// One stream, poll or file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct TaskId {
    source: Source,
    /// None: all kinds.
    kind: Option<Kind>,
}

/// A change of what is wanted.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Ask {
    /// This and nothing else.
    Replace(Wanted),
    /// One more name.
    Add(Arc<str>),
    /// One name less.
    Remove(Arc<str>),
    /// The server is asked for this name again although it is wanted already.
    Refresh(Arc<str>),
}

/// What a task of one kind gets: REST and files.
pub(super) struct Task {
    /// Which subscription it serves.
    pub(super) key: Key,
    /// For requests.
    pub(super) node: Rc<core::Node>,
    /// For connections.
    pub(super) dialer: Rc<dyn Dialer>,
    /// To the store.
    pub(super) events: mpsc::UnboundedSender<Event>,
    /// What is wanted. Several may wait: take them all (`try_recv`) before acting on them. When nothing is wanted any
    /// more, or the channel is closed, the task returns; without an await between the last look at the channel and its
    /// return, so that no ask is lost.
    pub(super) asks: mpsc::UnboundedReceiver<(Kind, Ask)>,
}

impl Client {
    /// A client without subscriptions. `events` goes to the store.
    pub fn new(settings: Settings, dialer: Rc<dyn Dialer>, events: mpsc::UnboundedSender<Event>) -> Self {
        let Settings { node, ads } = settings;
        Self { shared: Rc::new(Shared { node: Rc::new(node), ads, dialer, events }), tasks: HashMap::new() }
    }

    /// Replaces what is wanted of a kind from a source; nothing at all ends the subscription.
    ///
    /// Cheap to call often. Whatever is asked for in one turn of the event loop goes out in one request.
    pub fn want(&mut self, key: &Key, wanted: Wanted) {
        self.ask(key, Ask::Replace(wanted));
    }

    /// Wants one more name.
    pub fn add(&mut self, key: &Key, name: Arc<str>) {
        self.ask(key, Ask::Add(name));
    }

    /// Wants one name less.
    pub fn remove(&mut self, key: &Key, name: Arc<str>) {
        self.ask(key, Ask::Remove(name));
    }

    /// Asks the server again for a name that is wanted already, as for the endpoints of a cluster that warms again.
    /// Delta servers answer that; state-of-the-world servers may keep silent when they have nothing newer.
    pub fn refresh(&mut self, key: &Key, name: Arc<str>) {
        self.ask(key, Ask::Refresh(name));
    }

    fn ask(&mut self, key: &Key, ask: Ask) {
        if let (Kind::VirtualHost, false) = (key.kind, self.shared.is_incremental(&key.source)) {
            if !ask.is_nothing() {
                let reason =
                    "VHDS is incremental only: its source has to be gRPC with api_type DELTA_GRPC".into();
                self.shared.events.send(Event::Failed { keys: vec![key.clone()], reason }).ok();
            }
            return;
        }
        let id = TaskId::of(key);
        match self.tasks.entry(id) {
            Entry::Occupied(mut task) => {
                // A task that had nothing to do any more has ended.
                if let Err(mpsc::error::SendError(ask)) = task.get().send((key.kind, ask))
                    && !ask.1.is_nothing()
                {
                    let successor = self.shared.start(key);
                    successor.send(ask).ok();
                    task.insert(successor);
                }
            }
            Entry::Vacant(_) if ask.is_nothing() => {}
            Entry::Vacant(place) => {
                place.insert(self.shared.start(key)).send((key.kind, ask)).ok();
            }
        }
    }
}

impl TaskId {
    fn of(key: &Key) -> Self {
        let aggregated = match &key.source {
            Source::Ads => true,
            Source::Api(api) => is_aggregated(api),
            Source::Path(_) => false,
        };
        Self { source: key.source.clone(), kind: (!aggregated).then_some(key.kind) }
    }
}

impl Shared {
    fn is_incremental(&self, source: &Source) -> bool {
        let api = match source {
            Source::Ads => self.ads.as_ref(),
            Source::Api(api) => Some(api),
            Source::Path(_) => None,
        };
        api.is_some_and(|api| matches!(api.protocol, Protocol::DeltaGrpc | Protocol::AggregatedDeltaGrpc))
    }

    fn start(&self, key: &Key) -> mpsc::UnboundedSender<(Kind, Ask)> {
        let (sender, asks) = mpsc::unbounded_channel();
        let task = Task {
            key: key.clone(),
            node: Rc::clone(&self.node),
            dialer: Rc::clone(&self.dialer),
            events: self.events.clone(),
            asks,
        };
        match (&key.source, &self.ads) {
            (Source::Path(path), _) => drop(tokio::task::spawn_local(path::run(Arc::clone(path), task))),
            (Source::Api(api), _) if api.protocol == Protocol::Rest => {
                drop(tokio::task::spawn_local(rest::run(Arc::clone(api), task)));
            }
            (Source::Api(api), _) | (Source::Ads, Some(api)) => {
                drop(tokio::task::spawn_local(grpc::run(Arc::clone(api), task)));
            }
            // The conversion of the bootstrap refuses `ads: {}` without an ads_config; resources are checked by the
            // store. What slips through is an error that the operator sees, and no crash.
            (Source::Ads, None) => {
                let reason =
                    "the source is ads, and the bootstrap has no dynamic_resources.ads_config".into();
                self.events.send(Event::Failed { keys: vec![key.clone()], reason }).ok();
            }
        }
        sender
    }
}

/// Whether one stream carries all kinds.
fn is_aggregated(api: &ApiSource) -> bool {
    matches!(api.protocol, Protocol::AggregatedGrpc | Protocol::AggregatedDeltaGrpc)
}

impl Ask {
    /// Whether it wants nothing of a source that nothing was wanted of.
    fn is_nothing(&self) -> bool {
        match self {
            Self::Replace(wanted) => wanted.is_empty(),
            Self::Remove(_) => true,
            Self::Add(_) | Self::Refresh(_) => false,
        }
    }
}

impl Wanted {
    /// Nothing is wanted.
    pub fn is_empty(&self) -> bool {
        !self.wildcard && self.names.is_empty()
    }

    /// Takes over a change.
    pub(super) fn apply(&mut self, ask: Ask) {
        match ask {
            Ask::Replace(wanted) => *self = wanted,
            Ask::Add(name) | Ask::Refresh(name) => {
                self.names.insert(name);
            }
            Ask::Remove(name) => {
                self.names.remove(&name);
            }
        }
    }
}

/// A connection to a control plane.
pub trait Connection: AsyncRead + AsyncWrite + Unpin {}

impl<T: AsyncRead + AsyncWrite + Unpin> Connection for T {}

/// What [`Dialer::dial`] gives.
pub type Dialing<'a> = Pin<Box<dyn Future<Output = Result<Box<dyn Connection>, DialError>> + 'a>>;

/// Opens connections to control planes.
pub trait Dialer {
    /// Opens a connection to an endpoint of the cluster of this name, from the host's network namespace: TCP, and TLS
    /// where the cluster has it (offering `alpn` unless the cluster says otherwise). Takes at most the cluster's
    /// `connect_timeout`.
    fn dial<'a>(&'a self, cluster: &'a str, alpn: Alpn) -> Dialing<'a>;
}

/// What is going to be spoken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Alpn {
    /// HTTP/1.1 (REST).
    Http1,
    /// HTTP/2 (gRPC).
    Http2,
}

/// Why there is no connection.
#[derive(Debug, thiserror::Error)]
pub enum DialError {
    /// The cluster is not there (any more).
    #[error("there is no cluster {0:?}; add it to static_resources.clusters")]
    UnknownCluster(String),
    /// It has no usable endpoint now (no name resolved yet, or all are unhealthy).
    #[error("cluster {0:?} has no usable endpoint")]
    NoEndpoint(String),
    /// Its circuit breaker is full.
    #[error("cluster {0:?} has reached its max_connections")]
    Overflow(String),
    /// What TLS needs is not there, or is bad.
    #[error("cluster {cluster:?}: TLS: {error}")]
    Secret {
        /// Of which cluster.
        cluster: String,
        /// What.
        error: crate::secret::NotReady,
    },
    /// The endpoint did not take the connection.
    #[error("{endpoint}: {reason}")]
    Connect {
        /// Where.
        endpoint: EndpointAddr,
        /// What the kernel or the peer said.
        reason: String,
    },
    /// It took it, but the TLS handshake failed.
    #[error("{endpoint}: TLS: {reason}")]
    Tls {
        /// Where.
        endpoint: EndpointAddr,
        /// Why.
        reason: String,
    },
}

#[cfg(test)]
mod tests;
