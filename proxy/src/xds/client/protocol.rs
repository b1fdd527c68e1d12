//! What both variants of the protocol have in common: their face towards the stream, and the checks that every
//! resource gets before it is passed on.

use std::collections::HashSet;
use std::fmt::Write as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message;
use tidegate_api::google::rpc::Status;
use tidegate_api::wkt::{self, Any};

use super::Ask;
use crate::xds::{Change, Kind, MAX_ERROR_DETAIL, Verdict};

/// `google.rpc.Code.INTERNAL`, which Envoy puts into `error_detail`.
pub(super) const CODE_INTERNAL: i32 = 13;

/// Responses that may wait for a verdict, or with their answer for a token, before the stream is not read any more.
const MAX_UNANSWERED: usize = 64;

/// Start-up and reconnect ask in the order in which resources depend on each other.
pub(super) const ORDER: [Kind; 6] = [
    Kind::Cluster,
    Kind::ClusterLoadAssignment,
    Kind::Listener,
    Kind::RouteConfiguration,
    Kind::VirtualHost,
    Kind::Secret,
];

/// One variant of the protocol, for one source: what the server was told, what it said, what is to be told next.
/// No I/O, no clock.
pub(super) trait Protocol: 'static {
    type Request: Message + std::fmt::Debug + 'static;
    type Response: Message + Default + 'static;

    /// Something else is wanted.
    fn ask(&mut self, kind: Kind, ask: Ask);

    /// Kinds of which anything is wanted.
    fn kinds(&self) -> Vec<Kind>;

    /// A new stream stands. Nothing of an earlier one counts but what was accepted.
    fn opened(&mut self);

    /// The stream is gone.
    fn closed(&mut self);

    /// What is to be sent.
    fn next(&mut self, now: Instant) -> Next<Self::Request>;

    /// A response came.
    fn receive(&mut self, response: Self::Response, now: Instant) -> Received;

    /// The store has judged a response (of this stream, or an earlier one).
    fn judged(&mut self, id: ResponseId, verdict: Verdict);

    /// Responses that are not answered yet.
    fn unanswered(&self) -> usize;

    /// Kinds that may have something to send.
    fn pending(&self) -> usize;

    /// So many responses are not answered yet that the server has to wait.
    fn is_saturated(&self) -> bool {
        self.unanswered() >= MAX_UNANSWERED
    }

    /// When a time to live runs out.
    fn expires_at(&self) -> Option<Instant>;

    /// Forgets the resources whose time to live has run out.
    fn expire(&mut self, now: Instant) -> Vec<(Kind, Vec<Arc<str>>)>;

    /// `control_plane.identifier`
    fn identifier(response: &Self::Response) -> Option<&str>;

    /// The gRPC method for one kind, or for all.
    fn method(kind: Option<Kind>) -> &'static str;
}

/// What is to be sent.
#[derive(Debug, PartialEq)]
pub(super) enum Next<R> {
    /// This; ask again afterwards.
    Send(R),
    /// Nothing before this time.
    Wait(Instant),
    /// Nothing.
    Idle,
}

/// What becomes of a response.
#[derive(Debug)]
pub(super) enum Received {
    /// The store has to judge it.
    Deliver(Delivery),
    /// It was thrown away as a whole; the answer is on its way.
    Rejected { kind: Kind, version: String, reason: String },
    /// Nothing in it concerns the store (heartbeats, the end of a subscription); it gets its answer.
    Done,
    /// It is not an answer to anything that this stream asked for. No answer; the text is for the log.
    Ignored(String),
}

/// What the store gets.
#[derive(Debug)]
pub(super) struct Delivery {
    pub(super) id: ResponseId,
    pub(super) change: Change,
    /// Resources that were left out because they are bad: why.
    pub(super) refused: Option<String>,
}

/// Identifies a response that is being judged.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ResponseId {
    pub(super) kind: Kind,
    pub(super) number: u64,
}

/// The error of a NACK.
pub(super) fn error_detail(message: &str) -> Status {
    Status { code: CODE_INTERNAL, message: cut(message), details: vec![] }
}

/// At most [`MAX_ERROR_DETAIL`] bytes.
fn cut(message: &str) -> String {
    const END: &str = "...";
    if message.len() <= MAX_ERROR_DETAIL {
        return message.to_owned();
    }
    let end = message.floor_char_boundary(MAX_ERROR_DETAIL - END.len());
    format!("{}{END}", &message[..end])
}

/// What is wrong with a response, one reason for each resource.
#[derive(Debug, Default)]
pub(super) struct Problems(String);

impl Problems {
    pub(super) fn add(&mut self, what: impl std::fmt::Display) {
        // The rest would be cut off anyway; a response may have thousands of bad resources.
        if self.0.len() <= MAX_ERROR_DETAIL {
            let comma = if self.0.is_empty() { "" } else { "; " };
            write!(self.0, "{comma}{what}").ok();
        }
    }

    pub(super) fn into_text(self) -> Option<String> {
        (!self.0.is_empty()).then_some(self.0)
    }
}

/// Why a resource fails the checks that don't need its meaning.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Fault {
    WrongType(String),
    Malformed(String),
}

impl std::fmt::Display for Fault {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::WrongType(type_url) if type_url.is_empty() => f.write_str("the resource has no type"),
            Self::WrongType(type_url) => {
                write!(f, "the type of the resource, {type_url:?}, is not that of the response")
            }
            Self::Malformed(reason) => write!(f, "not a valid message: {reason}"),
        }
    }
}

/// Checks that a resource is of its response's type, and gives its name. Everything else is skipped, not decoded.
pub(super) fn name_of(body: &Any, kind: Kind) -> Result<Arc<str>, Fault> {
    if body.type_url != kind.type_url() {
        return Err(Fault::WrongType(body.type_url.clone()));
    }
    match Named::decode(&body.value[..]) {
        Ok(named) => Ok(named.name.into()),
        Err(error) => Err(Fault::Malformed(error.to_string())),
    }
}

/// What all kinds of resources have in common: their name is field 1.
#[derive(Clone, PartialEq, prost::Message)]
struct Named {
    #[prost(string, tag = "1")]
    name: String,
}

/// Names that must not come twice.
#[derive(Debug, Default)]
pub(super) struct Once(HashSet<Arc<str>>);

impl Once {
    /// Notes a name. `Err`: it was there.
    pub(super) fn note(&mut self, name: &Arc<str>) -> Result<(), String> {
        if self.0.insert(Arc::clone(name)) { Ok(()) } else { Err(format!("{name:?} comes twice")) }
    }

    pub(super) fn contains(&self, name: &str) -> bool {
        self.0.contains(name)
    }
}

/// `Resource.ttl`. Negative or zero would be gone at once: as in Envoy, such a timer fires at the next turn.
pub(super) fn ttl(ttl: Option<wkt::Duration>) -> Option<Duration> {
    ttl.map(|ttl| Duration::try_from(ttl).unwrap_or_default())
}

/// The type URL of the `Resource` wrapper in state-of-the-world responses.
pub(super) const WRAPPER: &str = "type.googleapis.com/envoy.service.discovery.v3.Resource";

/// Decodes a wrapper.
pub(super) fn unwrap(any: &Any) -> Result<tidegate_api::discovery::Resource, Fault> {
    tidegate_api::discovery::Resource::decode(&any.value[..])
        .map_err(|error| Fault::Malformed(format!("Resource: {error}")))
}

/// Which resources of a judged response hold.
#[derive(Debug)]
pub(super) struct Outcome {
    /// For `error_detail`; none: it is an ACK.
    pub(super) error: Option<String>,
    rejected: HashSet<Arc<str>>,
    nothing_applied: bool,
}

impl Outcome {
    /// Puts the store's verdict and what the client refused together.
    pub(super) fn new(verdict: Verdict, refused: Option<String>) -> Self {
        match verdict {
            Verdict::Accept => Self { error: refused, rejected: HashSet::new(), nothing_applied: false },
            Verdict::Reject { message, rejected, nothing_applied } => {
                let mut problems = Problems::default();
                // An empty text would make it an ACK.
                problems.add(if message.is_empty() { "rejected" } else { &message });
                if let Some(text) = refused {
                    problems.add(text);
                }
                Self {
                    error: problems.into_text(),
                    rejected: rejected.into_iter().collect(),
                    nothing_applied,
                }
            }
        }
    }

    pub(super) fn applied(&self, name: &str) -> bool {
        !self.nothing_applied && !self.rejected.contains(name)
    }

    pub(super) fn anything_applied(&self) -> bool {
        !self.nothing_applied
    }
}

#[cfg(test)]
pub(super) mod tests {
    use proptest::prelude::*;
    use tidegate_api::cluster::Cluster;

    use super::*;
    use crate::config::config_source::{ApiSource, Protocol as Variant};
    use crate::xds::Wanted;

    pub(in crate::xds::client) fn api(protocol: Variant) -> ApiSource {
        ApiSource {
            protocol,
            cluster: "xds".into(),
            authority: None,
            initial_metadata: vec![],
            set_node_on_first_message_only: false,
            rate_limit: None,
            refresh_delay: Duration::ZERO,
            request_timeout: Duration::from_secs(1),
        }
    }

    /// A resource of this kind and name.
    pub(in crate::xds::client) fn body(kind: Kind, name: &str) -> Any {
        let value = Named { name: name.to_owned() }.encode_to_vec();
        Any { type_url: kind.type_url().to_owned(), value }
    }

    /// These names; `*` is everything.
    pub(in crate::xds::client) fn wanted(names: &[impl AsRef<str>]) -> Wanted {
        let (all, names): (Vec<&str>, Vec<&str>) =
            names.iter().map(AsRef::as_ref).partition(|name| *name == "*");
        Wanted { wildcard: !all.is_empty(), names: names.into_iter().map(Arc::from).collect() }
    }

    pub(in crate::xds::client) fn replace(names: &[&str]) -> Ask {
        Ask::Replace(wanted(names))
    }

    #[test]
    fn names_are_found_without_decoding() {
        let cluster = Cluster { name: "a".into(), alt_stat_name: "b".into(), ..Default::default() };
        let body = Any { type_url: Kind::Cluster.type_url().into(), value: cluster.encode_to_vec() };
        assert_eq!(&*name_of(&body, Kind::Cluster).unwrap(), "a");
        assert!(matches!(name_of(&body, Kind::Listener), Err(Fault::WrongType(_))));
        let truncated = Any { value: vec![0x0a, 5, b'a'], ..body.clone() };
        assert!(matches!(name_of(&truncated, Kind::Cluster), Err(Fault::Malformed(_))));
        let empty = Any { value: vec![], ..body };
        assert_eq!(&*name_of(&empty, Kind::Cluster).unwrap(), "");
    }

    #[test]
    fn texts_are_cut_between_characters() {
        assert_eq!(cut("abc"), "abc");
        let long = "é".repeat(MAX_ERROR_DETAIL);
        let short = cut(&long);
        assert!(short.len() <= MAX_ERROR_DETAIL && short.ends_with("é..."));
        let mut problems = Problems::default();
        (0..100_000).for_each(|n| problems.add(format_args!("resource {n}")));
        assert!(problems.into_text().unwrap().len() < 2 * MAX_ERROR_DETAIL);
    }

    proptest! {
        #[test]
        fn a_name_is_found_or_a_fault_in_any_bytes(value: Vec<u8>) {
            let body = Any { type_url: Kind::Secret.type_url().into(), value };
            name_of(&body, Kind::Secret).ok();
        }
    }
}
