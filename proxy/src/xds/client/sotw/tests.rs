//! Each test of the list of protocol points carries the point's number.

use std::collections::BTreeSet;

use proptest::prelude::*;
use prost::Message;
use tidegate_api::discovery::Resource as Wrapper;
use tidegate_api::wkt;

use super::*;
use crate::config::config_source::{Protocol as Variant, RateLimit};
use crate::xds::client::protocol::CODE_INTERNAL;
use crate::xds::client::protocol::tests::{api, body, replace, wanted};

const ALL: &[&str] = &["*"];

/// A client, its server's side of one stream, and a clock.
struct Bench {
    client: Sotw,
    now: Instant,
    nonce: u32,
}

impl Bench {
    fn new() -> Self {
        Self::with(&api(Variant::AggregatedGrpc))
    }

    fn with(source: &ApiSource) -> Self {
        let node = Node { id: "n".into(), cluster: "c".into(), ..Default::default() };
        let mut client = Sotw::new(Rc::new(node), source);
        client.opened();
        Self { client, now: Instant::now(), nonce: 0 }
    }

    /// With this much wanted and asked for.
    fn subscribed(kinds: &[(Kind, &[&str])]) -> Self {
        let mut bench = Self::new();
        for (kind, names) in kinds {
            bench.want(*kind, names);
        }
        assert_eq!(bench.sent().len(), kinds.len());
        bench
    }

    fn want(&mut self, kind: Kind, names: &[&str]) {
        self.client.ask(kind, replace(names));
    }

    /// Everything that goes out now.
    fn sent(&mut self) -> Vec<DiscoveryRequest> {
        let mut requests = Vec::new();
        while let Next::Send(request) = self.client.next(self.now) {
            requests.push(request);
            assert!(requests.len() < 1000, "it never stops");
        }
        requests
    }

    fn one(&mut self) -> DiscoveryRequest {
        let mut sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:#?}");
        sent.remove(0)
    }

    fn response(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> DiscoveryResponse {
        self.nonce += 1;
        DiscoveryResponse {
            version_info: version.into(),
            resources,
            type_url: kind.type_url().into(),
            nonce: format!("n{}", self.nonce),
            ..Default::default()
        }
    }

    fn receive(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> Received {
        let response = self.response(kind, version, resources);
        self.client.receive(response, self.now)
    }

    /// A response that reaches the store.
    fn delivered(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> (ResponseId, Vec<String>) {
        match self.receive(kind, version, resources) {
            Received::Deliver(Delivery { id, change: Change::State { resources, .. }, refused: None }) => {
                (id, resources.iter().map(|it| name_of(&it.body, kind).unwrap().to_string()).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    fn accepted(&mut self, kind: Kind, version: &str, resources: Vec<Any>) {
        let (id, _) = self.delivered(kind, version, resources);
        self.client.judged(id, Verdict::Accept);
    }

    fn after(&mut self, seconds: u64) -> &mut Self {
        self.now += Duration::from_secs(seconds);
        self
    }

    fn reconnect(&mut self) {
        self.client.closed();
        assert_eq!(self.client.next(self.now), Next::Idle);
        self.client.opened();
    }
}

fn rejection(message: &str) -> Verdict {
    Verdict::Reject { message: message.into(), rejected: vec![], nothing_applied: true }
}

fn wrapped(name: &str, body: Option<Any>, ttl: Option<i64>) -> Any {
    let wrapper = Wrapper {
        name: name.into(),
        resource: body,
        ttl: ttl.map(|seconds| wkt::Duration { seconds, nanos: 0 }),
        ..Default::default()
    };
    Any { type_url: WRAPPER.into(), value: wrapper.encode_to_vec() }
}

fn error(request: &DiscoveryRequest) -> &str {
    let detail = request.error_detail.as_ref().expect("a NACK");
    assert_eq!(detail.code, CODE_INTERNAL);
    &detail.message
}

use Kind::{Cluster, ClusterLoadAssignment, Listener, RouteConfiguration};

#[test]
fn p01_the_node_goes_out_first_and_then_as_configured() {
    let mut bench = Bench::new();
    bench.want(Cluster, ALL);
    bench.want(Listener, ALL);
    assert!(bench.sent().iter().all(|request| request.node.as_ref().unwrap().id == "n"));

    for first in [Cluster, Listener] {
        let mut bench =
            Bench::with(&ApiSource { set_node_on_first_message_only: true, ..api(Variant::AggregatedGrpc) });
        bench.want(first, ALL);
        assert_eq!(bench.one().node.unwrap().cluster, "c");
        bench.want(RouteConfiguration, &["r"]);
        assert_eq!(bench.one().node, None);
        bench.accepted(first, "1", vec![body(first, "x")]);
        assert_eq!(bench.one().node, None);
        bench.reconnect();
        let sent = bench.sent();
        assert_eq!(sent.iter().filter(|request| request.node.is_some()).count(), 1);
        assert!(sent[0].node.is_some(), "on a new stream again");
    }
}

#[test]
fn p02_a_new_stream_starts_without_nonce_and_with_the_last_accepted_version() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    bench.accepted(Cluster, "1", vec![body(Cluster, "a")]);
    assert_eq!(bench.one().response_nonce, "n1");
    let (id, _) = bench.delivered(Cluster, "2", vec![body(Cluster, "b")]);
    bench.client.judged(id, rejection("no"));
    assert_eq!(bench.one().version_info, "1");
    bench.reconnect();
    let request = bench.one();
    assert_eq!((&*request.version_info, &*request.response_nonce), ("1", ""));
    assert_eq!(request.error_detail, None);
}

#[test]
fn p03_each_valid_response_gets_exactly_one_ack() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    for round in 1..=3 {
        let version = format!("v{round}");
        bench.accepted(Cluster, &version, vec![body(Cluster, "a")]);
        let ack = bench.one();
        assert_eq!((ack.version_info, ack.response_nonce), (version, format!("n{round}")));
        assert_eq!((ack.type_url.as_str(), ack.error_detail), (Cluster.type_url(), None));
        assert_eq!(bench.sent(), []);
    }
}

#[test]
fn p04_a_nack_has_the_reason_its_nonce_and_the_last_accepted_version() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (id, _) = bench.delivered(Cluster, "1", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection("a: bad"));
    let nack = bench.one();
    assert_eq!((error(&nack), &*nack.version_info, &*nack.response_nonce), ("a: bad", "", "n1"));
    bench.accepted(Cluster, "2", vec![body(Cluster, "a")]);
    bench.one();
    let (id, _) = bench.delivered(Cluster, "3", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection(&"x".repeat(100_000)));
    let nack = bench.one();
    assert_eq!((&*nack.version_info, &*nack.response_nonce), ("2", "n3"));
    assert!(error(&nack).len() <= crate::xds::MAX_ERROR_DETAIL);
    let (id, _) = bench.delivered(Cluster, "4", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection(""));
    assert_eq!(error(&bench.one()), "rejected", "an empty reason must not make it an ACK");
}

#[test]
fn p05_a_good_response_after_a_bad_one_clears_the_error() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (id, _) = bench.delivered(Cluster, "1", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection("bad"));
    error(&bench.one());
    bench.accepted(Cluster, "2", vec![body(Cluster, "a")]);
    let ack = bench.one();
    assert_eq!((&*ack.version_info, ack.error_detail), ("2", None));
}

/// Requests in so many seconds when the server answers every rejection at once with the same bad response.
fn rejections(bench: &mut Bench, seconds: u64) -> usize {
    let end = bench.now + Duration::from_secs(seconds);
    let mut requests = 0;
    let (id, _) = bench.delivered(Cluster, "bad", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection("bad"));
    loop {
        match bench.client.next(bench.now) {
            Next::Send(_) => {
                requests += 1;
                let (id, _) = bench.delivered(Cluster, "bad", vec![body(Cluster, "a")]);
                bench.client.judged(id, rejection("bad"));
            }
            Next::Wait(at) => {
                assert!(at > bench.now, "it spins");
                bench.now = at;
            }
            Next::Idle => panic!("the rejection is lost"),
        }
        if bench.now >= end {
            return requests;
        }
    }
}

#[test]
fn p06_a_server_that_repeats_a_bad_response_costs_ten_requests_a_second() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let requests = rejections(&mut bench, 60);
    assert!((550..=615).contains(&requests), "{requests}");
    bench.sent();
    // Other kinds are not held up by it.
    let (id, _) = bench.delivered(Cluster, "bad", vec![body(Cluster, "a")]);
    bench.client.judged(id, rejection("bad"));
    bench.want(Listener, ALL);
    assert_eq!(bench.one().type_url, Listener.type_url());
    bench.accepted(Listener, "1", vec![]);
    assert_eq!(bench.one().type_url, Listener.type_url());
}

#[test]
fn p06_rate_limit_settings_limit_every_request() {
    let limit = RateLimit { max_tokens: 100, fill_rate_milli: 10_000 };
    let mut bench = Bench::with(&ApiSource { rate_limit: Some(limit), ..api(Variant::AggregatedGrpc) });
    bench.want(ClusterLoadAssignment, &["a"]);
    bench.one();
    let mut acks = 0;
    let start = bench.now;
    while bench.now < start + Duration::from_secs(10) {
        bench.accepted(ClusterLoadAssignment, "1", vec![body(ClusterLoadAssignment, "a")]);
        match bench.client.next(bench.now) {
            Next::Send(_) => acks += 1,
            Next::Wait(at) => bench.now = at,
            Next::Idle => panic!("the ACK is lost"),
        }
    }
    assert!((190..=201).contains(&acks), "{acks}");
}

#[test]
fn p07_the_same_version_with_other_content_is_passed_on() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    bench.accepted(Cluster, "1", vec![body(Cluster, "a")]);
    let (_, names) = bench.delivered(Cluster, "1", vec![body(Cluster, "b")]);
    assert_eq!(names, ["b"]);
}

#[test]
fn p08_a_resource_of_another_type_is_rejected_with_its_response() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let other = body(Listener, "l");
    for bad in [other.clone(), wrapped("l", Some(other), None), Any::default()] {
        let received = bench.receive(Cluster, "1", vec![body(Cluster, "a"), bad]);
        assert!(matches!(received, Received::Rejected { kind: Cluster, .. }), "{received:?}");
        let nack = bench.one();
        assert!(error(&nack).starts_with("resources[1]: "), "{nack:?}");
        assert_eq!((&*nack.version_info, nack.response_nonce), ("", format!("n{}", bench.nonce)));
    }
}

#[test]
fn p09_bytes_that_are_no_message_are_rejected_with_their_response() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let garbage = Any { value: vec![0xff; 16], ..body(Cluster, "") };
    for bad in [
        garbage.clone(),
        wrapped("a", Some(garbage), None),
        Any { type_url: WRAPPER.into(), value: vec![0xff] },
    ] {
        let received = bench.receive(Cluster, "1", vec![body(Cluster, "a"), bad]);
        assert!(matches!(received, Received::Rejected { .. }), "{received:?}");
        assert!(error(&bench.one()).contains("not a valid message"));
    }
}

#[test]
fn p10_a_name_that_comes_twice_is_rejected_with_its_response() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    for twin in
        [body(Listener, "a"), wrapped("a", Some(body(Listener, "a")), None), wrapped("a", None, Some(1))]
    {
        let received = bench.receive(Listener, "1", vec![body(Listener, "a"), body(Listener, "b"), twin]);
        assert!(matches!(received, Received::Rejected { .. }), "{received:?}");
        assert_eq!(error(&bench.one()), "\"a\" comes twice");
    }
}

#[test]
fn p11_a_type_that_was_not_asked_for_is_ignored() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    for received in [
        bench.receive(Listener, "1", vec![body(Listener, "l")]),
        bench.client.receive(
            DiscoveryResponse { type_url: "type.googleapis.com/x.Y".into(), ..Default::default() },
            bench.now,
        ),
        bench.client.receive(DiscoveryResponse::default(), bench.now),
    ] {
        assert!(matches!(received, Received::Ignored(_)), "{received:?}");
    }
    assert_eq!(bench.sent(), []);
    bench.accepted(Cluster, "1", vec![]);
    assert_eq!(bench.one().version_info, "1");
}

#[test]
fn p12_each_type_has_its_own_version_and_nonce() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL), (ClusterLoadAssignment, &["a"]), (Listener, ALL)]);
    bench.accepted(Cluster, "c1", vec![]);
    bench.accepted(ClusterLoadAssignment, "e1", vec![]);
    bench.sent();
    bench.want(ClusterLoadAssignment, &["a", "b"]);
    let request = bench.one();
    assert_eq!((&*request.version_info, &*request.response_nonce), ("e1", "n2"));
    bench.want(RouteConfiguration, &["r"]);
    let request = bench.one();
    assert_eq!((&*request.version_info, &*request.response_nonce), ("", ""));
}

#[test]
fn p13_requests_do_not_wait_for_responses() {
    let mut bench = Bench::new();
    bench.want(ClusterLoadAssignment, &["a"]);
    assert_eq!(bench.one().resource_names, ["a"]);
    bench.want(ClusterLoadAssignment, &["a", "b"]);
    assert_eq!(bench.one().resource_names, ["a", "b"]);
    bench.want(Cluster, ALL);
    assert_eq!(bench.one().type_url, Cluster.type_url());
}

#[test]
fn p14_everything_is_asked_for_without_names() {
    let mut bench = Bench::new();
    bench.want(Cluster, ALL);
    assert_eq!(bench.one().resource_names, <[String; 0]>::default());
    // But by name when there are others.
    bench.want(Cluster, &["*", "a"]);
    assert_eq!(bench.one().resource_names, ["*", "a"]);
    bench.want(Cluster, ALL);
    assert_eq!(bench.one().resource_names, ["*"]);
}

#[test]
fn p16_new_eds_cluster_lists_all_names() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.accepted(ClusterLoadAssignment, "1", vec![body(ClusterLoadAssignment, "a")]);
    bench.one();
    bench.client.ask(ClusterLoadAssignment, Ask::Add("b".into()));
    bench.client.ask(ClusterLoadAssignment, Ask::Add("c".into()));
    let request = bench.one();
    assert_eq!(request.resource_names, ["a", "b", "c"]);
    assert_eq!((&*request.version_info, &*request.response_nonce), ("1", "n1"));
    bench.client.ask(ClusterLoadAssignment, Ask::Add("c".into()));
    bench.want(ClusterLoadAssignment, &["a", "b", "c"]);
    assert_eq!(bench.sent(), [], "nothing new");
}

#[test]
fn p17_a_removed_cluster_is_left_out() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a", "b"])]);
    bench.accepted(ClusterLoadAssignment, "1", vec![]);
    bench.one();
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    assert_eq!(bench.one().resource_names, ["b"]);
}

#[test]
fn p18_no_names_after_names_means_none() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    let request = bench.one();
    assert_eq!(request.resource_names, <[String; 0]>::default());
    // The server may answer that; nobody is interested, but it gets its ACK.
    assert!(matches!(bench.receive(ClusterLoadAssignment, "7", vec![]), Received::Done));
    let ack = bench.one();
    assert_eq!((&*ack.version_info, &*ack.response_nonce), ("7", "n1"));
    // A later subscription is a new one.
    bench.want(ClusterLoadAssignment, &["b"]);
    assert_eq!(bench.one().version_info, "");
    // Nothing was asked for: nothing has to be ended.
    let mut bench = Bench::new();
    bench.want(ClusterLoadAssignment, &["a"]);
    bench.want(ClusterLoadAssignment, &[]);
    assert_eq!(bench.sent(), []);
}

#[test]
fn p19_what_nobody_asked_for_is_left_out_and_acked() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    let resources = ["x", "a", "y"].map(|name| body(ClusterLoadAssignment, name)).to_vec();
    let (id, names) = bench.delivered(ClusterLoadAssignment, "1", resources);
    assert_eq!(names, ["a"]);
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.one().version_info, "1");
}

#[test]
fn p37_a_refresh_repeats_the_request() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a", "b"])]);
    bench.accepted(ClusterLoadAssignment, "1", vec![]);
    bench.one();
    bench.client.ask(ClusterLoadAssignment, Ask::Refresh("a".into()));
    let request = bench.one();
    assert_eq!(request.resource_names, ["a", "b"]);
    assert_eq!((&*request.version_info, &*request.response_nonce), ("1", "n1"));
}

#[test]
fn p38_a_withheld_verdict_holds_up_nothing_but_its_own_kind() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL), (ClusterLoadAssignment, &["a"])]);
    let (cluster, _) = bench.delivered(Cluster, "1", vec![body(Cluster, "b")]);
    bench.want(ClusterLoadAssignment, &["a", "b"]);
    assert_eq!(bench.one().resource_names, ["a", "b"]);
    bench.accepted(ClusterLoadAssignment, "1", vec![]);
    assert_eq!(bench.one().type_url, ClusterLoadAssignment.type_url());
    // A request of the same kind would answer the response: it waits, and goes out with the answer.
    let (endpoints, _) = bench.delivered(ClusterLoadAssignment, "2", vec![]);
    bench.want(ClusterLoadAssignment, &["a", "b", "c"]);
    assert_eq!(bench.sent(), []);
    bench.client.judged(endpoints, Verdict::Accept);
    let request = bench.one();
    assert_eq!((&*request.version_info, request.resource_names.len()), ("2", 3));
    bench.client.judged(cluster, Verdict::Accept);
    assert_eq!(bench.one().version_info, "1");
}

#[test]
fn verdicts_may_come_in_any_order() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (first, _) = bench.delivered(Cluster, "1", vec![]);
    let (second, _) = bench.delivered(Cluster, "2", vec![]);
    bench.client.judged(second, Verdict::Accept);
    assert_eq!(bench.one().response_nonce, "n2");
    bench.client.judged(first, Verdict::Accept);
    assert_eq!(bench.one().response_nonce, "n1");
    bench.client.ask(Cluster, Ask::Add("x".into()));
    let request = bench.one();
    assert_eq!((&*request.version_info, &*request.response_nonce), ("2", "n2"), "the newer one counts");
    bench.client.judged(first, Verdict::Accept);
    assert_eq!(bench.sent(), [], "a second verdict is nothing");
}

#[test]
fn p43_a_verdict_after_the_stream_is_gone_counts_but_is_not_sent() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (id, _) = bench.delivered(Cluster, "1", vec![body(Cluster, "a")]);
    bench.reconnect();
    let request = bench.one();
    assert_eq!((&*request.version_info, &*request.response_nonce), ("", ""));
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.sent(), []);
    bench.reconnect();
    assert_eq!(bench.one().version_info, "1");
}

#[test]
fn p45_a_reconnect_asks_for_every_type_with_its_version_and_all_names() {
    let mut bench =
        Bench::subscribed(&[(Listener, ALL), (ClusterLoadAssignment, &["a", "b"]), (Cluster, ALL)]);
    bench.accepted(Listener, "l", vec![]);
    bench.accepted(ClusterLoadAssignment, "e", vec![]);
    bench.accepted(Cluster, "c", vec![]);
    bench.sent();
    bench.client.closed();
    bench.client.ask(ClusterLoadAssignment, Ask::Add("c".into()));
    bench.client.opened();
    let sent: Vec<_> = bench
        .sent()
        .into_iter()
        .map(|request| {
            (request.type_url, request.version_info, request.resource_names.len(), request.response_nonce)
        })
        .collect();
    let expected = [(Cluster, "c", 0), (ClusterLoadAssignment, "e", 3), (Listener, "l", 0)]
        .map(|(kind, version, names)| (kind.type_url().to_owned(), version.to_owned(), names, String::new()));
    assert_eq!(sent, expected);
}

#[test]
fn p49_a_resource_ends_with_its_ttl_and_nothing_is_sent() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    let resources = vec![
        wrapped("a", Some(body(Listener, "a")), Some(5)),
        wrapped("b", Some(body(Listener, "b")), None),
        body(Listener, "c"),
    ];
    bench.accepted(Listener, "1", resources);
    bench.one();
    assert_eq!(bench.client.expires_at(), Some(bench.now + Duration::from_secs(5)));
    let now = bench.after(4).now;
    assert_eq!(bench.client.expire(now), []);
    let now = bench.after(1).now;
    assert_eq!(bench.client.expire(now), [(Listener, vec!["a".into()])]);
    assert_eq!((bench.client.expires_at(), bench.sent()), (None, vec![]));
}

#[test]
fn p49_a_ttl_counts_when_its_resource_was_applied_only() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    let resources = |ttl| {
        vec![wrapped("a", Some(body(Listener, "a")), ttl), wrapped("b", Some(body(Listener, "b")), ttl)]
    };
    let (id, _) = bench.delivered(Listener, "1", resources(Some(5)));
    let rejected = vec!["a".into()];
    bench.client.judged(id, Verdict::Reject { message: "a".into(), rejected, nothing_applied: false });
    let now = bench.after(5).now;
    assert_eq!(bench.client.expire(now), [(Listener, vec!["b".into()])]);
    // A response without a TTL ends the timer; one without the resource does too.
    bench.accepted(Listener, "2", resources(Some(5)));
    bench.accepted(Listener, "3", vec![wrapped("a", Some(body(Listener, "a")), None)]);
    assert_eq!(bench.client.expires_at(), None);
}

#[test]
fn p50_a_heartbeat_restarts_the_timer_and_is_no_state_of_the_world() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    let listener = |name| wrapped(name, Some(body(Listener, name)), Some(5));
    bench.accepted(Listener, "1", vec![listener("a"), listener("b"), body(Listener, "c")]);
    bench.one();
    bench.after(3);
    // Envoy 1.40 removes every listener here.
    let received =
        bench.receive(Listener, "1", vec![wrapped("a", None, Some(5)), wrapped("b", None, Some(9))]);
    assert!(matches!(received, Received::Done), "{received:?}");
    let ack = bench.one();
    assert_eq!((&*ack.version_info, &*ack.response_nonce), ("1", "n2"));
    let now = bench.after(3).now;
    assert_eq!(bench.client.expire(now), [], "restarted");
    let now = bench.after(2).now;
    assert_eq!(bench.client.expire(now), [(Listener, vec!["a".into()])]);
}

#[test]
fn p50_heartbeats_beside_resources_are_told_apart() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    let resources = vec![wrapped("a", None, Some(5)), wrapped("b", Some(body(Listener, "b")), Some(5))];
    let Received::Deliver(Delivery { change: Change::State { resources, unchanged, .. }, .. }) =
        bench.receive(Listener, "1", resources)
    else {
        panic!("not delivered");
    };
    assert_eq!((resources.len(), resources[0].name.as_deref(), unchanged), (1, Some("b"), vec!["a".into()]));
}

#[test]
fn a_wrapper_must_carry_the_resource_that_it_names() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let received = bench.receive(Cluster, "1", vec![wrapped("x", Some(body(Cluster, "a")), None)]);
    assert!(matches!(received, Received::Rejected { .. }), "{received:?}");
    assert!(error(&bench.one()).contains("\"x\": the resource calls itself \"a\""));
    assert!(matches!(bench.receive(Cluster, "1", vec![wrapped("", None, None)]), Received::Rejected { .. }));
    let (_, names) = bench.delivered(Cluster, "1", vec![wrapped("", Some(body(Cluster, "a")), None)]);
    assert_eq!(names, ["a"]);
}

#[test]
fn a_server_that_floods_has_to_wait() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let ids: Vec<_> = (0..64).map(|n| bench.delivered(Cluster, &n.to_string(), vec![]).0).collect();
    assert!(bench.client.is_saturated());
    bench.client.judged(ids[0], Verdict::Accept);
    bench.one();
    assert!(!bench.client.is_saturated());
}

/// Names that may be subscribed to.
fn any_names() -> impl Strategy<Value = Vec<String>> {
    prop::collection::vec(prop::sample::select(vec!["*", "a", "b", "c"]).prop_map(str::to_owned), 0..4)
}

proptest! {
    /// Whatever comes, nothing panics, every response of a kind that was asked for gets at most one answer, and the
    /// last request of a kind says what is wanted.
    #[test]
    fn garbage_never_panics(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut bench = Bench::new();
        let mut open = Vec::new();
        let mut last: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut asked = BTreeMap::new();
        for step in steps {
            match step {
                Step::Want(kind, names) => {
                    asked.insert(kind, names.iter().cloned().collect::<BTreeSet<_>>());
                    bench.client.ask(kind, Ask::Replace(wanted(&names)));
                }
                Step::Bytes(bytes) => {
                    if let Ok(response) = DiscoveryResponse::decode(&bytes[..]) {
                        bench.client.receive(response, bench.now);
                    }
                }
                Step::Response(kind, bytes, damage) => {
                    let resources = vec![wrapped("a", Some(body(kind, "a")), Some(3)), body(kind, "b")];
                    let mut response = bench.response(kind, "1", resources);
                    if damage {
                        let mut encoded = response.encode_to_vec();
                        for (at, byte) in bytes.iter().enumerate() {
                            let at = (usize::from(*byte) * 7 + at) % encoded.len();
                            encoded[at] ^= byte;
                        }
                        match DiscoveryResponse::decode(&encoded[..]) {
                            Ok(damaged) => response = damaged,
                            Err(_) => continue,
                        }
                    }
                    if let Received::Deliver(delivery) = bench.client.receive(response, bench.now) {
                        open.push(delivery.id);
                    }
                }
                Step::Judge(accept) => {
                    if let Some(id) = open.pop() {
                        bench.client.judged(id, if accept { Verdict::Accept } else { rejection("no") });
                    }
                }
                Step::Reconnect => { bench.reconnect(); last.clear(); }
                Step::Wait => {
                    let now = bench.after(2).now;
                    bench.client.expire(now);
                }
            }
            for request in bench.sent() {
                last.insert(request.type_url, request.resource_names.into_iter().collect());
            }
        }
        for id in open {
            bench.client.judged(id, Verdict::Accept);
        }
        // Time for rejections that wait.
        for _ in 0..100 {
            bench.after(1);
            for request in bench.sent() {
                last.insert(request.type_url, request.resource_names.into_iter().collect());
            }
        }
        for (kind, names) in asked {
            let Some(said) = last.get(kind.type_url()) else {
                prop_assert!(names.is_empty(), "{kind:?} {names:?} was never asked for");
                continue;
            };
            let silent = names.len() <= 1 && names.iter().all(|name| name == "*");
            prop_assert!(said == &names || (silent && said.is_empty()), "{kind:?}: {said:?} for {names:?}");
        }
        prop_assert!(bench.client.unanswered() == 0);
    }
}

#[derive(Debug, Clone)]
enum Step {
    Want(Kind, Vec<String>),
    Bytes(Vec<u8>),
    Response(Kind, Vec<u8>, bool),
    Judge(bool),
    Reconnect,
    Wait,
}

fn any_step() -> impl Strategy<Value = Step> {
    let kind = || prop::sample::select(vec![Cluster, ClusterLoadAssignment]);
    prop_oneof![
        (kind(), any_names()).prop_map(|(kind, names)| Step::Want(kind, names)),
        any::<Vec<u8>>().prop_map(Step::Bytes),
        (kind(), prop::collection::vec(any::<u8>(), 0..4), any::<bool>())
            .prop_map(|(kind, bytes, damage)| Step::Response(kind, bytes, damage)),
        any::<bool>().prop_map(Step::Judge),
        Just(Step::Reconnect),
        Just(Step::Wait),
    ]
}
