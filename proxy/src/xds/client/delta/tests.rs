//! Each test of the list of protocol points carries the point's number.

use proptest::prelude::*;
use prost::Message;
use tidegate_api::wkt::{self, Any};

use super::*;
use crate::config::config_source::Protocol as Variant;
use crate::xds::client::protocol::CODE_INTERNAL;
use crate::xds::client::protocol::tests::{api, body, replace, wanted};

const ALL: &[&str] = &["*"];

use Kind::{Cluster, ClusterLoadAssignment, Listener, VirtualHost};

/// A client, its server's side of one stream, and a clock.
struct Bench {
    client: Delta,
    now: Instant,
    nonce: u32,
}

impl Bench {
    fn new() -> Self {
        Self::with(&api(Variant::AggregatedDeltaGrpc))
    }

    fn with(source: &ApiSource) -> Self {
        let mut client = Delta::new(Rc::new(Node { id: "n".into(), ..Default::default() }), source);
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
    fn sent(&mut self) -> Vec<DeltaDiscoveryRequest> {
        let mut requests = Vec::new();
        while let Next::Send(request) = self.client.next(self.now) {
            requests.push(request);
            assert!(requests.len() < 1000, "it never stops");
        }
        requests
    }

    fn one(&mut self) -> DeltaDiscoveryRequest {
        let mut sent = self.sent();
        assert_eq!(sent.len(), 1, "{sent:#?}");
        sent.remove(0)
    }

    fn response(&mut self, kind: Kind, resources: Vec<Wrapper>, removed: &[&str]) -> DeltaDiscoveryResponse {
        self.nonce += 1;
        DeltaDiscoveryResponse {
            system_version_info: "s".into(),
            resources,
            type_url: kind.type_url().into(),
            removed_resources: removed.iter().map(|name| (*name).to_owned()).collect(),
            nonce: format!("n{}", self.nonce),
            ..Default::default()
        }
    }

    fn receive(&mut self, kind: Kind, resources: Vec<Wrapper>, removed: &[&str]) -> Received {
        let response = self.response(kind, resources, removed);
        self.client.receive(response, self.now)
    }

    /// A response that reaches the store: names of resources, removed names.
    fn delivered(
        &mut self,
        kind: Kind,
        resources: Vec<Wrapper>,
        removed: &[&str],
    ) -> (ResponseId, Vec<String>, Vec<String>) {
        match self.receive(kind, resources, removed) {
            Received::Deliver(Delivery {
                id,
                change: Change::Delta { resources, removed, .. },
                refused: None,
            }) => {
                let names = resources.iter().map(|it| it.name.as_ref().unwrap().to_string()).collect();
                (id, names, removed.iter().map(ToString::to_string).collect())
            }
            other => panic!("{other:?}"),
        }
    }

    /// The ACK of a response that the store accepts.
    fn accepted(&mut self, kind: Kind, resources: Vec<Wrapper>, removed: &[&str]) -> DeltaDiscoveryRequest {
        let (id, _, _) = self.delivered(kind, resources, removed);
        self.client.judged(id, Verdict::Accept);
        self.one()
    }

    fn after(&mut self, seconds: u64) -> &mut Self {
        self.now += Duration::from_secs(seconds);
        self
    }

    fn reconnect(&mut self) -> Vec<DeltaDiscoveryRequest> {
        self.client.closed();
        assert_eq!(self.client.next(self.now), Next::Idle);
        self.client.opened();
        self.sent()
    }
}

fn resource(kind: Kind, name: &str, version: &str) -> Wrapper {
    Wrapper {
        name: name.into(),
        version: version.into(),
        resource: Some(body(kind, name)),
        ..Default::default()
    }
}

fn heartbeat(name: &str, version: &str, seconds: i64) -> Wrapper {
    let ttl = Some(wkt::Duration { seconds, nanos: 0 });
    Wrapper { name: name.into(), version: version.into(), ttl, ..Default::default() }
}

fn mortal(kind: Kind, name: &str, version: &str, seconds: i64) -> Wrapper {
    Wrapper { resource: Some(body(kind, name)), ..heartbeat(name, version, seconds) }
}

fn rejection(rejected: &[&str]) -> Verdict {
    let nothing_applied = rejected.is_empty();
    let rejected = rejected.iter().map(|name| Arc::from(*name)).collect();
    Verdict::Reject { message: "bad".into(), rejected, nothing_applied }
}

fn error(request: &DeltaDiscoveryRequest) -> &str {
    let detail = request.error_detail.as_ref().expect("a NACK");
    assert_eq!(detail.code, CODE_INTERNAL);
    &detail.message
}

fn versions(request: &DeltaDiscoveryRequest) -> Vec<(&str, &str)> {
    request.initial_resource_versions.iter().map(|(name, version)| (&**name, &**version)).collect()
}

#[test]
fn p01_the_node_goes_out_first_and_then_as_configured() {
    let mut bench = Bench::new();
    bench.want(Cluster, ALL);
    bench.want(Listener, ALL);
    assert!(bench.sent().iter().all(|request| request.node.is_some()));
    let source = ApiSource { set_node_on_first_message_only: true, ..api(Variant::AggregatedDeltaGrpc) };
    let mut bench = Bench::with(&source);
    bench.want(Cluster, ALL);
    bench.want(Listener, ALL);
    let nodes: Vec<_> = bench.sent().iter().map(|request| request.node.is_some()).collect();
    assert_eq!(nodes, [true, false]);
    assert!(bench.reconnect()[0].node.is_some(), "on a new stream again");
}

#[test]
fn p03_each_response_gets_exactly_one_ack_with_its_nonce_and_nothing_else() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    for round in 1..=3 {
        let ack = bench.accepted(Cluster, vec![resource(Cluster, "a", "1")], &[]);
        let expected = DeltaDiscoveryRequest {
            node: ack.node.clone(),
            type_url: Cluster.type_url().into(),
            response_nonce: format!("n{round}"),
            ..Default::default()
        };
        assert_eq!(ack, expected);
        assert_eq!(bench.sent(), []);
    }
}

#[test]
fn p04_a_nack_has_the_reason_and_its_nonce() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (id, _, _) = bench.delivered(Cluster, vec![resource(Cluster, "a", "1")], &[]);
    bench.client.judged(id, rejection(&[]));
    let nack = bench.one();
    assert_eq!((error(&nack), &*nack.response_nonce), ("bad", "n1"));
    // p05
    assert_eq!(bench.accepted(Cluster, vec![resource(Cluster, "a", "2")], &[]).error_detail, None);
}

#[test]
fn p06_a_server_that_repeats_a_bad_response_costs_ten_requests_a_second() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let end = bench.now + Duration::from_mins(1);
    let mut requests = 0;
    let bad = |bench: &mut Bench| {
        let (id, _, _) = bench.delivered(Cluster, vec![resource(Cluster, "a", "1")], &[]);
        bench.client.judged(id, rejection(&[]));
    };
    bad(&mut bench);
    while bench.now < end {
        match bench.client.next(bench.now) {
            Next::Send(_) => {
                requests += 1;
                bad(&mut bench);
            }
            Next::Wait(at) => {
                assert!(at > bench.now, "it spins");
                bench.now = at;
            }
            Next::Idle => panic!("the rejection is lost"),
        }
    }
    assert!((550..=615).contains(&requests), "{requests}");
    // What is wanted is not held up by it.
    while let Next::Send(_) = bench.client.next(bench.now) {}
    bad(&mut bench);
    bench.client.ask(Cluster, Ask::Add("x".into()));
    let change = bench.one();
    assert_eq!((change.resource_names_subscribe, &*change.response_nonce), (vec!["x".to_owned()], ""));
}

#[test]
fn p07_the_same_version_is_passed_on_again() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    bench.accepted(Cluster, vec![resource(Cluster, "a", "1")], &[]);
    let (_, names, _) = bench.delivered(Cluster, vec![resource(Cluster, "a", "1")], &[]);
    assert_eq!(names, ["a"]);
}

#[test]
fn p08_p09_a_resource_of_another_type_or_of_garbage_is_rejected_with_its_response() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let other = Wrapper { resource: Some(body(Listener, "b")), ..resource(Cluster, "b", "1") };
    let garbage = Any { value: vec![0xff; 9], ..body(Cluster, "") };
    let garbage = Wrapper { resource: Some(garbage), ..resource(Cluster, "b", "1") };
    for (bad, reason) in [(other, "is not that of the response"), (garbage, "not a valid message")] {
        let received = bench.receive(Cluster, vec![resource(Cluster, "a", "1"), bad], &[]);
        assert!(matches!(received, Received::Rejected { .. }), "{received:?}");
        let nack = bench.one();
        assert!(error(&nack).contains(reason), "{nack:?}");
    }
    assert_eq!(versions(&bench.reconnect()[0]), [], "nothing was applied");
}

#[test]
fn p10_a_name_that_comes_twice_is_rejected_with_its_response() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let twice = vec![resource(Cluster, "a", "1"), resource(Cluster, "a", "2")];
    assert!(matches!(bench.receive(Cluster, twice, &[]), Received::Rejected { .. }));
    assert_eq!(error(&bench.one()), "\"a\" comes twice");
    let both = bench.receive(Cluster, vec![resource(Cluster, "a", "1")], &["a"]);
    assert!(matches!(both, Received::Rejected { .. }));
    assert!(error(&bench.one()).contains("both"));
}

#[test]
fn p11_a_type_that_was_not_asked_for_is_ignored() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let received = bench.receive(Listener, vec![resource(Listener, "a", "1")], &[]);
    assert!(matches!(received, Received::Ignored(_)), "{received:?}");
    let unknown = DeltaDiscoveryResponse { type_url: "type.googleapis.com/x.Y".into(), ..Default::default() };
    assert!(matches!(bench.client.receive(unknown, bench.now), Received::Ignored(_)));
    assert_eq!(bench.sent(), []);
}

#[test]
fn p12_p13_types_are_apart_and_nothing_waits_for_a_response() {
    let mut bench = Bench::new();
    bench.want(Cluster, ALL);
    bench.want(ClusterLoadAssignment, &["a"]);
    bench.sent();
    bench.client.ask(ClusterLoadAssignment, Ask::Add("b".into()));
    assert_eq!(bench.one().resource_names_subscribe, ["b"]);
    let (id, _, _) = bench.delivered(Cluster, vec![], &[]);
    let ack = bench.accepted(ClusterLoadAssignment, vec![], &[]);
    assert_eq!((&*ack.type_url, &*ack.response_nonce), (ClusterLoadAssignment.type_url(), "n2"));
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.one().response_nonce, "n1");
}

#[test]
fn p14_everything_is_asked_for_without_names() {
    let mut bench = Bench::new();
    bench.want(Cluster, ALL);
    let request = bench.one();
    assert_eq!((request.resource_names_subscribe.len(), &*request.response_nonce), (0, ""));
}

#[test]
fn p16_a_new_eds_cluster_asks_for_its_name_only_without_nonce() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.accepted(ClusterLoadAssignment, vec![resource(ClusterLoadAssignment, "a", "1")], &[]);
    bench.client.ask(ClusterLoadAssignment, Ask::Add("b".into()));
    bench.want(ClusterLoadAssignment, &["a", "b", "c"]);
    let request = bench.one();
    assert_eq!(
        (request.resource_names_subscribe, &*request.response_nonce),
        (vec!["b".into(), "c".into()], "")
    );
    assert_eq!(request.initial_resource_versions.len(), 0);
    assert_eq!(bench.sent(), []);
}

#[test]
fn p17_p18_removed_clusters_are_unsubscribed() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a", "b"])]);
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    let request = bench.one();
    assert_eq!(
        (request.resource_names_unsubscribe, request.resource_names_subscribe),
        (vec!["a".into()], vec![])
    );
    bench.want(ClusterLoadAssignment, &[]);
    let request = bench.one();
    assert_eq!((request.resource_names_unsubscribe, &*request.response_nonce), (vec!["b".to_owned()], ""));
    // What is still under way gets its answer.
    assert!(matches!(bench.receive(ClusterLoadAssignment, vec![], &[]), Received::Done));
    assert_eq!(bench.one().response_nonce, "n1");
    assert_eq!(bench.reconnect(), []);
}

#[test]
fn p19_what_nobody_asked_for_is_left_out_and_acked() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    let resources = ["x", "a"].map(|name| resource(ClusterLoadAssignment, name, "1")).to_vec();
    let (id, names, _) = bench.delivered(ClusterLoadAssignment, resources, &[]);
    assert_eq!(names, ["a"]);
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.one().error_detail, None);
    assert_eq!(versions(&bench.reconnect()[0]), [("a", "1")]);
}

#[test]
fn p20_changes_have_no_nonce_even_next_to_an_ack() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    let (id, _, _) = bench.delivered(ClusterLoadAssignment, vec![], &[]);
    bench.client.judged(id, Verdict::Accept);
    bench.want(ClusterLoadAssignment, &["b"]);
    let sent = bench.sent();
    assert_eq!(sent.len(), 2);
    assert_eq!((&*sent[0].response_nonce, sent[0].resource_names_subscribe.len()), ("n1", 0));
    assert_eq!(sent[1].response_nonce, "");
    assert_eq!(sent[1].resource_names_subscribe, ["b"]);
    assert_eq!(sent[1].resource_names_unsubscribe, ["a"]);
}

#[test]
fn p20_what_cancels_out_is_not_sent() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.client.ask(ClusterLoadAssignment, Ask::Add("b".into()));
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("b".into()));
    assert_eq!(bench.sent(), []);
    // Away and back: what was forgotten has to come again.
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    bench.client.ask(ClusterLoadAssignment, Ask::Add("a".into()));
    let request = bench.one();
    assert_eq!(
        (&*request.resource_names_subscribe, &*request.resource_names_unsubscribe),
        (&["a".to_owned()][..], &[][..])
    );
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    bench.client.ask(ClusterLoadAssignment, Ask::Add("a".into()));
    bench.client.ask(ClusterLoadAssignment, Ask::Remove("a".into()));
    assert_eq!(bench.one().resource_names_unsubscribe, ["a"]);
}

#[test]
fn p21_everything_and_names_are_both_asked_for_after_a_reconnect() {
    let mut bench = Bench::subscribed(&[(VirtualHost, ALL)]);
    bench.client.ask(VirtualHost, Ask::Add("r1/b.com".into()));
    assert_eq!(bench.one().resource_names_subscribe, ["r1/b.com"]);
    assert_eq!(bench.reconnect()[0].resource_names_subscribe, ["*", "r1/b.com"]);
    // Names stay when everything is not wanted any more, and the other way round.
    bench.want(VirtualHost, &["r1/b.com"]);
    let request = bench.one();
    assert_eq!(
        (request.resource_names_unsubscribe, request.resource_names_subscribe),
        (vec!["*".to_owned()], vec![])
    );
    bench.want(VirtualHost, &["*", "r1/b.com"]);
    assert_eq!(bench.one().resource_names_subscribe, ["*"]);
    bench.accepted(VirtualHost, vec![virtual_host("r1/b", "b")], &[]);
    bench.client.ask(VirtualHost, Ask::Remove("r1/b.com".into()));
    assert_eq!(bench.one().resource_names_unsubscribe, ["r1/b.com"]);
    assert_eq!(versions(&bench.reconnect()[0]), [("r1/b", "1")], "the server's answer decides");
}

fn virtual_host(outer: &str, inner: &str) -> Wrapper {
    let aliases = vec!["r1/b.com".to_owned()];
    Wrapper {
        name: outer.into(),
        aliases,
        resource: Some(body(VirtualHost, inner)),
        ..resource(VirtualHost, "", "1")
    }
}

#[test]
fn p24_removed_resources_are_passed_on_and_unknown_ones_ignored() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let both = vec![resource(Cluster, "a", "1"), resource(Cluster, "b", "1")];
    bench.accepted(Cluster, both, &[]);
    let (id, names, removed) = bench.delivered(Cluster, vec![], &["b", "nobody"]);
    assert_eq!((names.len(), removed), (0, vec!["b".to_owned()]));
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.one().error_detail, None);
    assert_eq!(versions(&bench.reconnect()[0]), [("a", "1")]);
    // One that is not judged yet is known too.
    let (first, _, _) = bench.delivered(Cluster, vec![resource(Cluster, "c", "1")], &[]);
    let (second, _, removed) = bench.delivered(Cluster, vec![], &["c"]);
    assert_eq!(removed, ["c"]);
    bench.client.judged(first, Verdict::Accept);
    bench.client.judged(second, Verdict::Accept);
    assert_eq!(versions(&bench.reconnect()[0]), [("a", "1")]);
}

#[test]
fn p25_removed_endpoints_leave_the_initial_versions_and_stay_asked_for() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.accepted(ClusterLoadAssignment, vec![resource(ClusterLoadAssignment, "a", "1")], &[]);
    let (id, _, removed) = bench.delivered(ClusterLoadAssignment, vec![], &["a"]);
    assert_eq!(removed, ["a"]);
    bench.client.judged(id, Verdict::Accept);
    bench.one();
    let request = &bench.reconnect()[0];
    assert_eq!((versions(request), &*request.resource_names_subscribe), (vec![], &["a".to_owned()][..]));
}

#[test]
fn p28_a_resource_under_another_name_is_rejected_alone() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let odd = Wrapper { resource: Some(body(Cluster, "e")), ..resource(Cluster, "x", "1") };
    let nameless = resource(Cluster, "", "1");
    let empty = Wrapper { resource: None, ..resource(Cluster, "y", "1") };
    let received = bench.receive(Cluster, vec![odd, resource(Cluster, "good", "1"), nameless, empty], &[]);
    let Received::Deliver(Delivery { id, change: Change::Delta { resources, .. }, refused: Some(_) }) =
        received
    else {
        panic!("{received:?}");
    };
    assert_eq!(resources.len(), 1);
    bench.client.judged(id, Verdict::Accept);
    let nack = bench.one();
    let message = error(&nack);
    for part in ["\"x\": the resource calls itself \"e\"", "without a name", "\"y\": it has no body"] {
        assert!(message.contains(part), "{message}");
    }
    assert_eq!(versions(&bench.reconnect()[0]), [("good", "1")]);
    // The outer name of a virtual host starts with its route configuration; the inner one may.
    for inner in ["b", "r1/b"] {
        let mut bench = Bench::subscribed(&[(VirtualHost, ALL)]);
        let (_, names, _) = bench.delivered(VirtualHost, vec![virtual_host("r1/b", inner)], &[]);
        assert_eq!(names, ["r1/b"]);
    }
}

#[test]
fn aliases_are_names_too() {
    let mut bench = Bench::subscribed(&[(VirtualHost, &["r1/b.com"])]);
    let (_, names, _) = bench.delivered(VirtualHost, vec![virtual_host("r1/b", "b")], &[]);
    assert_eq!(names, ["r1/b"]);
}

#[test]
fn p37_a_refresh_subscribes_again() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["a"])]);
    bench.client.ask(ClusterLoadAssignment, Ask::Refresh("a".into()));
    let request = bench.one();
    assert_eq!((&*request.resource_names_subscribe, &*request.response_nonce), (&["a".to_owned()][..], ""));
}

#[test]
fn p43_a_verdict_after_the_stream_is_gone_counts_but_is_not_sent() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    let (id, _, _) = bench.delivered(Cluster, vec![resource(Cluster, "a", "1")], &[]);
    assert_eq!(versions(&bench.reconnect()[0]), []);
    bench.client.judged(id, Verdict::Accept);
    assert_eq!(bench.sent(), []);
    assert_eq!(versions(&bench.reconnect()[0]), [("a", "1")]);
}

#[test]
fn p46_a_reconnect_names_accepted_versions_only() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL), (ClusterLoadAssignment, &["a", "b"])]);
    let three = ["good", "bad", "gone"].map(|name| resource(Cluster, name, "1")).to_vec();
    let (id, _, _) = bench.delivered(Cluster, three, &[]);
    bench.client.judged(id, rejection(&["bad"]));
    error(&bench.one());
    bench.accepted(Cluster, vec![], &["gone"]);
    let (id, _, _) = bench.delivered(Cluster, vec![resource(Cluster, "good", "2")], &[]);
    bench.client.judged(id, rejection(&[]));
    bench.one();
    bench.accepted(ClusterLoadAssignment, vec![resource(ClusterLoadAssignment, "b", "7")], &[]);
    let sent = bench.reconnect();
    assert_eq!(sent.len(), 2);
    assert_eq!((sent[0].resource_names_subscribe.len(), versions(&sent[0])), (0, vec![("good", "1")]));
    assert_eq!(sent[1].resource_names_subscribe, ["a", "b"]);
    assert_eq!(versions(&sent[1]), [("b", "7")]);
    assert!(sent.iter().all(|request| request.response_nonce.is_empty()));
}

#[test]
fn p47_an_empty_answer_to_a_reconnect_removes_nothing() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    bench.accepted(Cluster, vec![resource(Cluster, "a", "1")], &[]);
    bench.reconnect();
    let (id, names, removed) = bench.delivered(Cluster, vec![], &[]);
    assert_eq!((names.len(), removed.len()), (0, 0));
    bench.client.judged(id, Verdict::Accept);
    bench.one();
    assert_eq!(versions(&bench.reconnect()[0]), [("a", "1")]);
}

#[test]
fn p48_after_a_reconnect_only_removed_resources_remove() {
    let mut bench = Bench::subscribed(&[(Cluster, ALL)]);
    bench.accepted(Cluster, vec![resource(Cluster, "a", "1"), resource(Cluster, "b", "1")], &[]);
    bench.reconnect();
    let (id, _, removed) = bench.delivered(Cluster, vec![resource(Cluster, "b", "2")], &["a"]);
    assert_eq!(removed, ["a"]);
    bench.client.judged(id, Verdict::Accept);
    bench.one();
    assert_eq!(versions(&bench.reconnect()[0]), [("b", "2")]);
}

#[test]
fn p49_a_resource_ends_with_its_ttl_and_nothing_is_sent() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    bench.accepted(Listener, vec![mortal(Listener, "a", "1", 5), resource(Listener, "b", "1")], &[]);
    assert_eq!(bench.client.expires_at(), Some(bench.now + Duration::from_secs(5)));
    let now = bench.after(5).now;
    assert_eq!(bench.client.expire(now), [(Listener, vec!["a".into()])]);
    assert_eq!(bench.sent(), []);
    assert_eq!(versions(&bench.reconnect()[0]), [("b", "1")], "forgotten");
}

#[test]
fn p50_a_heartbeat_restarts_the_timer_and_gets_its_ack() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    bench.accepted(Listener, vec![mortal(Listener, "a", "1", 5)], &[]);
    bench.after(3);
    let received = bench.receive(Listener, vec![heartbeat("a", "1", 5)], &[]);
    assert!(matches!(received, Received::Done), "{received:?}");
    let ack = bench.one();
    assert_eq!((ack.error_detail, &*ack.response_nonce), (None, "n2"));
    let now = bench.after(4).now;
    assert_eq!(bench.client.expire(now), []);
    let now = bench.after(1).now;
    assert_eq!(bench.client.expire(now), [(Listener, vec!["a".into()])]);
    // There is nothing any more that could be unchanged.
    let Received::Deliver(Delivery { id, refused: Some(reason), .. }) =
        bench.receive(Listener, vec![heartbeat("a", "1", 5)], &[])
    else {
        panic!("accepted");
    };
    assert!(reason.contains("not held here"), "{reason}");
    bench.client.judged(id, Verdict::Accept);
    error(&bench.one());
    assert_eq!(bench.client.expires_at(), None);
}

#[test]
fn p50_a_heartbeat_may_overtake_the_verdict() {
    let mut bench = Bench::subscribed(&[(Listener, ALL)]);
    bench.delivered(Listener, vec![mortal(Listener, "a", "1", 5)], &[]);
    assert!(matches!(bench.receive(Listener, vec![heartbeat("a", "1", 5)], &[]), Received::Done));
}

#[test]
fn ten_thousand_names_one_by_one() {
    let mut bench = Bench::subscribed(&[(ClusterLoadAssignment, &["first"])]);
    for n in 0..10_000 {
        bench.client.ask(ClusterLoadAssignment, Ask::Add(format!("cluster {n}").into()));
    }
    let request = bench.one();
    assert_eq!(request.resource_names_subscribe.len(), 10_000);
    for n in 0..9_999 {
        bench.client.ask(ClusterLoadAssignment, Ask::Remove(format!("cluster {n}").into()));
    }
    assert_eq!(bench.one().resource_names_unsubscribe.len(), 9_999);
    assert_eq!(bench.reconnect()[0].resource_names_subscribe, ["cluster 9999", "first"]);
}

proptest! {
    /// Whatever comes, nothing panics, and what the server was told in the end is what is wanted.
    #[test]
    fn garbage_never_panics(steps in prop::collection::vec(any_step(), 1..60)) {
        let mut bench = Bench::new();
        let mut open = Vec::new();
        let mut told: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
        let mut asked: BTreeMap<Kind, BTreeSet<String>> = BTreeMap::new();
        for step in steps {
            match step {
                Step::Want(kind, names) => {
                    bench.client.ask(kind, Ask::Replace(wanted(&names)));
                    asked.insert(kind, names.into_iter().collect());
                }
                Step::Bytes(bytes) => {
                    if let Ok(response) = DeltaDiscoveryResponse::decode(&bytes[..]) {
                        bench.client.receive(response, bench.now);
                    }
                }
                Step::Response(kind, bytes, damage) => {
                    let resources = vec![mortal(kind, "a", "1", 3), heartbeat("b", "1", 2), resource(kind, "c", "2")];
                    let mut response = bench.response(kind, resources, &["d", "b"][..usize::from(bytes.len() > 2)]);
                    if damage {
                        let mut encoded = response.encode_to_vec();
                        for (at, byte) in bytes.iter().enumerate() {
                            let at = (usize::from(*byte) * 7 + at) % encoded.len();
                            encoded[at] ^= byte;
                        }
                        match DeltaDiscoveryResponse::decode(&encoded[..]) {
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
                        bench.client.judged(id, if accept { Verdict::Accept } else { rejection(&["a"]) });
                    }
                }
                Step::Reconnect => {
                    told.clear();
                    note(&mut told, bench.reconnect());
                }
                Step::Wait => {
                    let now = bench.after(2).now;
                    bench.client.expire(now);
                }
            }
            if bench.nonce.is_multiple_of(2) {
                note(&mut told, bench.sent());
            }
        }
        for id in open {
            bench.client.judged(id, Verdict::Accept);
        }
        for _ in 0..100 {
            bench.after(1);
            note(&mut told, bench.sent());
        }
        for (kind, names) in asked {
            let told = told.get(kind.type_url()).cloned().unwrap_or_default();
            prop_assert_eq!(told, names, "{:?}", kind);
        }
        prop_assert!(bench.client.unanswered() == 0);
    }
}

/// What a server that understands requests believes to be wanted.
fn note(told: &mut BTreeMap<String, BTreeSet<String>>, requests: Vec<DeltaDiscoveryRequest>) {
    for request in requests {
        let is_first = !told.contains_key(&request.type_url);
        let names = told.entry(request.type_url).or_default();
        if is_first && request.resource_names_subscribe.is_empty() {
            names.insert("*".to_owned());
        }
        names.extend(request.resource_names_subscribe);
        request.resource_names_unsubscribe.iter().for_each(|name| {
            names.remove(name);
        });
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
    let names =
        prop::collection::vec(prop::sample::select(vec!["*", "a", "b", "c"]).prop_map(str::to_owned), 0..4);
    prop_oneof![
        (kind(), names).prop_map(|(kind, names)| Step::Want(kind, names)),
        any::<Vec<u8>>().prop_map(Step::Bytes),
        (kind(), prop::collection::vec(any::<u8>(), 0..4), any::<bool>())
            .prop_map(|(kind, bytes, damage)| Step::Response(kind, bytes, damage)),
        any::<bool>().prop_map(Step::Judge),
        Just(Step::Reconnect),
        Just(Step::Wait),
    ]
}
