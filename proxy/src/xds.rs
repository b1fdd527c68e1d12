//! Configuration that comes while the proxy runs.
//!
//! Two halves meet here. The *client* ([`client`]) speaks the protocol (streams, polls, files; ACK, NACK, nonces,
//! reconnects, TTLs) and knows no resource's meaning. The *store* knows what resources mean, decides which are wanted,
//! and answers each [`Update`] with a [`Verdict`]. Both run on the main thread.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use tidegate_api::wkt::Any;
use tokio::sync::oneshot;

use crate::config::config_source::Source;

pub mod cache;
pub mod client;
pub mod store;
pub mod tables;

/// A kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// LDS.
    Listener,
    /// RDS.
    RouteConfiguration,
    /// VHDS: gRPC delta only.
    VirtualHost,
    /// CDS.
    Cluster,
    /// EDS.
    ClusterLoadAssignment,
    /// SDS.
    Secret,
}

impl Kind {
    /// All kinds.
    pub const ALL: [Self; 6] = [
        Self::Listener,
        Self::RouteConfiguration,
        Self::VirtualHost,
        Self::Cluster,
        Self::ClusterLoadAssignment,
        Self::Secret,
    ];

    /// `type.googleapis.com/…`
    pub fn type_url(self) -> &'static str {
        match self {
            Self::Listener => "type.googleapis.com/envoy.config.listener.v3.Listener",
            Self::RouteConfiguration => "type.googleapis.com/envoy.config.route.v3.RouteConfiguration",
            Self::VirtualHost => "type.googleapis.com/envoy.config.route.v3.VirtualHost",
            Self::Cluster => "type.googleapis.com/envoy.config.cluster.v3.Cluster",
            Self::ClusterLoadAssignment => {
                "type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment"
            }
            Self::Secret => "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
        }
    }

    /// What its discovery service is called.
    pub fn service(self) -> &'static str {
        match self {
            Self::Listener => "LDS",
            Self::RouteConfiguration => "RDS",
            Self::VirtualHost => "VHDS",
            Self::Cluster => "CDS",
            Self::ClusterLoadAssignment => "EDS",
            Self::Secret => "SDS",
        }
    }

    /// The kind that a type URL names.
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    /// Whether a state-of-the-world response lists everything there is, so that what it lacks is gone. Of other kinds
    /// what a response lacks is unchanged.
    pub fn lists_everything(self) -> bool {
        matches!(self, Self::Listener | Self::Cluster)
    }
}

/// What is wanted of one kind from one source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Everything the server has (LDS, CDS; VHDS when its route configuration comes).
    pub wildcard: bool,
    /// Resources by name.
    pub names: BTreeSet<Arc<str>>,
}

/// Identifies a subscription.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Key {
    /// From where.
    pub source: Source,
    /// What.
    pub kind: Kind,
}

/// What the client tells the store.
#[derive(Debug)]
pub enum Event {
    /// Resources came.
    Update(Update),
    /// The client itself threw a response away, or resources of it (those that it lacks in its [`Event::Update`]), and
    /// says so to the server: another type than asked for, a name twice, …
    Rejected {
        /// Which subscription.
        key: Key,
        /// `version_info`, or `system_version_info`.
        version: String,
        /// What goes into `error_detail`.
        reason: String,
    },
    /// A stream, a poll or a file failed. What was accepted holds; the client tries again by itself.
    Failed {
        /// The subscriptions that it concerns.
        keys: Vec<Key>,
        /// Why, for logs and `/config_dump`.
        reason: String,
    },
    /// So many requests of a stream wait for a token of a rate limit: that of `rate_limit_settings`, or the one for
    /// rejections. 0: none do any more.
    RateLimited {
        /// How many.
        pending: usize,
    },
    /// A stream stands again, or a poll succeeded after a failure.
    Connected {
        /// The subscriptions that it concerns.
        keys: Vec<Key>,
        /// `control_plane.identifier` of the server, where it says one.
        identifier: Option<String>,
    },
}

/// Resources that the server sent, or the end of some.
#[derive(Debug)]
pub struct Update {
    /// Which subscription.
    pub key: Key,
    /// What.
    pub change: Change,
    /// Where the answer goes; it becomes the ACK or the NACK.
    pub verdict: oneshot::Sender<Verdict>,
}

/// What changed.
#[derive(Debug)]
pub enum Change {
    /// State of the world (gRPC, REST, files). See [`Kind::lists_everything`] for what is not in it.
    State {
        /// `version_info`.
        version: String,
        /// The resources, heartbeats excluded.
        resources: Vec<Resource>,
        /// Resources that could not be read (REST, files): each is to be rejected alone, and what was accepted under
        /// its name stays. Empty for gRPC, where a resource comes as bytes.
        unreadable: Vec<Unreadable>,
        /// Resources of which the server only said that they are as they were (TTL heartbeats).
        unchanged: Vec<Arc<str>>,
    },
    /// Incremental.
    Delta {
        /// `system_version_info`, for show.
        version: String,
        /// Added or changed resources, heartbeats excluded.
        resources: Vec<Resource>,
        /// `removed_resources`.
        removed: Vec<Arc<str>>,
    },
    /// The TTL of these resources ran out. Nothing goes back to the server.
    Expired(Vec<Arc<str>>),
}

/// A resource as it came: type checked, not decoded.
#[derive(Clone, Debug)]
pub struct Resource {
    /// The name in the `Resource` wrapper; none for a bare Any of a state-of-the-world response.
    pub name: Option<Arc<str>>,
    /// Version of this one resource; empty in state-of-the-world responses.
    pub version: String,
    /// The message, of the kind's type.
    pub body: Any,
    /// Unknown fields that were dropped where the message came as JSON: `file or URL: path`, each to be warned about.
    pub unknown_fields: Vec<String>,
}

/// A resource whose JSON or YAML is not a message of its type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unreadable {
    /// Its name, as far as it can be found.
    pub name: Option<Arc<str>>,
    /// What is wrong, one line per problem: `file or URL:line: path: message`.
    pub error: String,
}

/// The store's answer to an [`Update`].
#[derive(Debug)]
pub enum Verdict {
    /// Everything holds.
    Accept,
    /// Something doesn't.
    Reject {
        /// For `error_detail`: names every bad resource and says what is wrong.
        message: String,
        /// Names (wrapper names in delta) of the resources that were not applied. Empty with `nothing_applied`.
        rejected: Vec<Arc<str>>,
        /// The whole response was thrown away.
        nothing_applied: bool,
    },
}

/// Longest `error_detail.message`, in bytes: what an HTTP/2 peer takes without complaint.
pub const MAX_ERROR_DETAIL: usize = 4096;

/// First wait before a stream is opened again after a failure.
pub const BACKOFF_BASE: Duration = Duration::from_millis(500);
/// Longest such wait.
pub const BACKOFF_MAX: Duration = Duration::from_secs(30);
