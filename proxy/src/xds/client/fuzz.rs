//! Fuzz targets: what control planes send. See [`crate::fuzz`].
//!
//! The property: a response is ignored (when nobody asked for it) or gets exactly one answer, of its nonce, after it was
//! judged; the answer is a NACK with a reason if and only if something was refused; nothing waits afterwards, and a new
//! stream begins with what was accepted. The same bytes have the same answer twice. A store takes the resources without a
//! panic, and with the same verdict when they come again.

use std::cell::RefCell;
use std::fmt::Debug;
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Instant;

use prost::{Message, Name};
use prost_reflect::DynamicMessage;
use tidegate_api::core::Node;
use tidegate_api::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
};

use super::delta::Delta;
use super::json::{self, Refusal};
use super::protocol::tests::{api, replace};
use super::protocol::{Next, Protocol, Received};
use super::sotw::Sotw;
use crate::config::config_source::Protocol as Variant;
use crate::config::proto::{Format, Source};
use crate::fuzz::{Target, as_it_is, class, run};
use crate::xds::store::judge;
use crate::xds::store::tests::{Ready, local};
use crate::xds::{Change, Kind, MAX_ERROR_DETAIL, Verdict};

const WORDS: &[&[u8]] = &[
    b"type.googleapis.com/envoy.config.cluster.v3.Cluster",
    b"type.googleapis.com/envoy.config.listener.v3.Listener",
    b"type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment",
    b"type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
    b"type.googleapis.com/envoy.service.discovery.v3.Resource",
    b"-----BEGIN CERTIFICATE-----\n",
    b"-----BEGIN PRIVATE KEY-----\n",
    b"type.googleapis.com/",
    b"\x0a\x01a",
    b"\x12\x00",
    b"\x22",
    b"n1",
    b"127.0.0.1",
];

/// What an answer says.
struct Answer {
    type_url: String,
    nonce: String,
    /// Of a state-of-the-world request.
    version: Option<String>,
    error: Option<String>,
}

/// A response, and the requests of its variant.
trait Wire: Message + Default {
    type Request: Debug + PartialEq;
    fn head(&self) -> (String, String, Option<String>);
    fn answer(request: &Self::Request) -> Answer;
}

impl Wire for DiscoveryResponse {
    type Request = DiscoveryRequest;

    fn head(&self) -> (String, String, Option<String>) {
        (self.type_url.clone(), self.nonce.clone(), Some(self.version_info.clone()))
    }

    fn answer(request: &DiscoveryRequest) -> Answer {
        Answer {
            type_url: request.type_url.clone(),
            nonce: request.response_nonce.clone(),
            version: Some(request.version_info.clone()),
            error: request.error_detail.as_ref().map(|status| status.message.clone()),
        }
    }
}

impl Wire for DeltaDiscoveryResponse {
    type Request = DeltaDiscoveryRequest;

    fn head(&self) -> (String, String, Option<String>) {
        (self.type_url.clone(), self.nonce.clone(), None)
    }

    fn answer(request: &DeltaDiscoveryRequest) -> Answer {
        Answer {
            type_url: request.type_url.clone(),
            nonce: request.response_nonce.clone(),
            version: None,
            error: request.error_detail.as_ref().map(|status| status.message.clone()),
        }
    }
}

/// Everything that is to be sent now.
fn sent<P: Protocol>(client: &mut P, now: Instant) -> Vec<P::Request> {
    let mut requests = Vec::new();
    while let Next::Send(request) = client.next(now) {
        requests.push(request);
        assert!(requests.len() < 100, "it never stops");
    }
    requests
}

/// One stream with one response. Gives everything that was sent after it, and what became of it.
fn stream<P>(mut client: P, input: &[u8], store: Option<&RefCell<Ready>>) -> (Vec<P::Request>, u64)
where
    P: Protocol,
    P::Response: Wire<Request = P::Request>,
{
    let now = Instant::now();
    client.opened();
    for (kind, names) in [
        (Kind::Cluster, &["*"][..]),
        (Kind::Listener, &["*"]),
        (Kind::ClusterLoadAssignment, &["a", "b"]),
        (Kind::RouteConfiguration, &["r"]),
        (Kind::Secret, &["own", "ca"]),
    ] {
        client.ask(kind, replace(names));
    }
    assert_eq!(sent(&mut client, now).len(), 5);
    // Bytes that are no response end the stream.
    let Ok(response) = P::Response::decode(input) else { return (Vec::new(), 0) };
    let (type_url, nonce, version) = response.head();
    let (refused, mut outcome) = match client.receive(response, now) {
        Received::Ignored(what) => {
            assert!(!what.is_empty() && sent(&mut client, now).is_empty());
            return (Vec::new(), 1);
        }
        Received::Done => (None, 2),
        Received::Rejected { reason, .. } => (Some(reason), 3),
        Received::Deliver(delivery) => {
            assert!(sent(&mut client, now).is_empty(), "an answer before the verdict");
            assert_eq!(client.unanswered(), 1);
            if let Some(store) = store {
                let mut store = store.borrow_mut();
                match &delivery.change {
                    Change::State { resources, .. } => store.apply(delivery.id.kind, resources, None),
                    Change::Delta { resources, removed, .. } => {
                        store.apply(delivery.id.kind, resources, Some(removed));
                    }
                    Change::Expired(_) => {}
                }
            }
            let verdict = match delivery.change {
                Change::State { version, resources, unreadable, .. } => {
                    judge(delivery.id.kind, &version, resources, unreadable)
                }
                Change::Delta { version, resources, .. } => {
                    judge(delivery.id.kind, &version, resources, Vec::new())
                }
                Change::Expired(_) => unreachable!("no time has passed"),
            };
            let message = match &verdict {
                Verdict::Accept => None,
                Verdict::Reject { message, .. } => Some(message.clone()),
            };
            client.judged(delivery.id, verdict);
            (message.or(delivery.refused), 4)
        }
    };
    let mut requests = sent(&mut client, now);
    assert_eq!(requests.len(), 1, "{requests:#?}");
    let answer = P::Response::answer(&requests[0]);
    assert_eq!((&answer.type_url, &answer.nonce), (&type_url, &nonce));
    match (&answer.error, &refused) {
        (None, None) => assert_eq!(answer.version, version),
        (Some(text), Some(_)) => {
            assert!(!text.is_empty() && text.len() <= MAX_ERROR_DETAIL);
            assert!(answer.version.is_none_or(|version| version.is_empty()), "nothing was accepted before");
            outcome ^= class(text);
        }
        (sent, wanted) => panic!("{sent:?} was sent for {wanted:?}"),
    }
    assert_eq!(client.unanswered(), 0);
    client.closed();
    client.opened();
    let again = sent(&mut client, now);
    assert_eq!(again.len(), 5);
    for answer in again.iter().map(P::Response::answer) {
        assert!(answer.nonce.is_empty() && answer.error.is_none());
        let accepted = refused.is_none() && answer.type_url == type_url;
        let expected = if accepted { version.clone() } else { version.as_ref().map(|_| String::new()) };
        assert_eq!(answer.version, expected, "{}", answer.type_url);
    }
    requests.extend(again);
    (requests, outcome)
}

fn node() -> Rc<Node> {
    Rc::new(Node { id: "n".into(), cluster: "c".into(), ..Default::default() })
}

/// Files are the proto3 JSON of a message, for people to read; a `.bin` is one that failed.
fn encoded<M: Message + Name>(path: &Path, content: Vec<u8>) -> Option<Vec<u8>> {
    if path.extension().is_some_and(|extension| extension == "bin") {
        return Some(content);
    }
    let descriptor = tidegate_api::descriptors().get_message_by_name(&M::full_name())?;
    let mut json = serde_json::Deserializer::from_slice(&content);
    let message = DynamicMessage::deserialize(descriptor, &mut json);
    Some(message.unwrap_or_else(|error| panic!("{}: {error}", path.display())).encode_to_vec())
}

#[test]
fn fuzz_discovery_response() {
    let target = Target { name: "discovery_response", seed: encoded::<DiscoveryResponse>, words: WORDS };
    local(|| {
        let store = RefCell::new(Ready::new());
        run(&target, |input| {
            let once = |store| stream(Sotw::new(node(), &api(Variant::AggregatedGrpc)), input, store);
            let (requests, outcome) = once(Some(&store));
            assert_eq!(requests, once(None).0, "the same bytes have two answers");
            outcome
        });
        assert!(store.borrow().accepted > 0, "nothing was applied");
    });
}

#[test]
fn fuzz_delta_response() {
    let target = Target { name: "delta_response", seed: encoded::<DeltaDiscoveryResponse>, words: WORDS };
    local(|| {
        let store = RefCell::new(Ready::new());
        run(&target, |input| {
            let once = |store| stream(Delta::new(node(), &api(Variant::AggregatedDeltaGrpc)), input, store);
            let (requests, outcome) = once(Some(&store));
            assert_eq!(requests, once(None).0, "the same bytes have two answers");
            outcome
        });
        assert!(store.borrow().accepted > 0, "nothing was applied");
    });
}

#[test]
fn fuzz_rest_json() {
    let words: &[&[u8]] = &[
        b"\"version_info\"",
        b"\"resources\"",
        b"\"@type\"",
        b"\"name\"",
        b"{}",
        b"[]",
        b",",
        b":",
        b"null",
        b"\\u0000",
        b"\"type.googleapis.com/envoy.config.cluster.v3.Cluster\"",
        b"\"type.googleapis.com/envoy.service.discovery.v3.Resource\"",
        b"\"resource\"",
        b"\"ttl\": \"3s\"",
        b"1e999",
        b"\"connect_timeout\"",
    ];
    local(|| rest_json(&Target { name: "rest_json", seed: as_it_is, words }));
}

fn rest_json(target: &Target) {
    let store = RefCell::new(Ready::new());
    run(target, |input| {
        let text = String::from_utf8_lossy(input);
        let read = || {
            let source = Source { format: Format::Json, ..Source::yaml("fuzz.json", text.clone()) };
            match json::from_text(&source, Kind::Cluster) {
                Err(Refusal::Unreadable(reason)) => (0, Some(reason)),
                Err(Refusal::Rejected { reason, .. }) => (1, Some(reason)),
                Ok(content) => {
                    store.borrow_mut().apply(Kind::Cluster, &content.resources, None);
                    let names: Vec<_> = content.unchanged.iter().map(Arc::clone).collect();
                    match judge(Kind::Cluster, &content.version, content.resources, content.unreadable) {
                        Verdict::Accept => (2 + names.len(), None),
                        Verdict::Reject { message, .. } => (1000, Some(message)),
                    }
                }
            }
        };
        let verdict = read();
        assert_eq!(verdict, read(), "the same bytes have two verdicts");
        let (outcome, reason) = verdict;
        assert!(reason.as_ref().is_none_or(|reason| !reason.is_empty()));
        (outcome, reason.map(|reason| class(&reason)))
    });
}
