//! The conversations. Numbers are those of the rules that the end-to-end tests have in their names.

use std::time::Duration;

use anyhow::Result;
use serde_json::{Value, json};
use tidegate_api::cluster::Cluster;
use tidegate_api::discovery::Resource;
use tidegate_api::listener::filter::ConfigType;
use tidegate_api::route::{RouteConfiguration, VirtualHost};
use tidegate_api::wkt::Any;
use tidegate_tests::config::{http_rds, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{Kind, Served, packed_wrapper, undecodable, with_ttl, wrapped};

use super::Script;
use super::session::Session;

const FIRST: &str = "127.0.0.1:10000";
const SECOND: &str = "127.0.0.1:10001";

/// Longer than the drain time of the clients.
const DRAINED: Duration = Duration::from_millis(1800);

/// Longer than the life of what is sent with a TTL.
const EXPIRED: Duration = Duration::from_millis(1200);

macro_rules! scripts {
    ($($name:literal => $run:path,)*) => {
        pub(super) const ALL: &[Script] = &[$(Script { name: $name, run: $run }),*];
    };
}

scripts! {
    "ADS: start-up, from clusters to routes (1-3, 14-16, 34)" => start_up,
    "ADS: accepted, rejected, partly accepted (3-5, 7, 29, 30, 32)" => verdicts,
    "ADS: endpoints come and go (16-19, 22, 23)" => endpoints_come_and_go,
    "ADS: the server dies (2, 43-45, 48)" => server_dies,
    "ADS: the stream ends, with a status and with a reset (2, 44, 45)" => stream_ends,
    "ADS: broken responses (8-10)" => broken,
    "ADS: types that nobody asked for, and no type at all (11)" => unknown_types,
    "ADS: a message that is none" => garbage,
    "ADS: several responses at once (12, 13)" => several_at_once,
    "ADS: silence about endpoints (35, 36, 38)" => silent_endpoints,
    "ADS: a cluster changes (37)" => cluster_changes,
    "ADS: the node only once (1)" => node_once,
    "ADS: a listener's routes come, change and go (23, 26, 39)" => routes,
    "ADS: a resource's time runs out (49)" => ttl,
    "delta ADS: start-up, from clusters to routes (1, 14, 16, 20)" => delta_start_up,
    "delta ADS: accepted, rejected, partly accepted (3-5, 29)" => delta_verdicts,
    "delta ADS: removals, known and unknown (17, 24, 25)" => delta_removals,
    "delta ADS: the server dies (46, 47)" => delta_server_dies,
    "delta ADS: broken responses (8-10, 28)" => delta_broken,
    "delta ADS: time runs out, or is renewed (49, 50)" => delta_ttl,
    "delta ADS: virtual hosts (21, 56)" => delta_virtual_hosts,
    "gRPC: a stream for each kind" => streams_by_kind,
    "gRPC: a delta stream for each kind" => delta_streams_by_kind,
    "REST: start-up and news (51, 52)" => polls,
    "REST: what is no answer, and what is rejected (52, 54)" => poll_failures,
}

fn eds(name: &str) -> Result<Cluster> {
    resource::eds_cluster(name, &resource::ads(), json!({}))
}

fn eds_from(name: &str, transport: Transport) -> Result<Cluster> {
    resource::eds_cluster(name, &transport.source(), json!({}))
}

fn endpoints(name: &str, port: u16) -> Result<Any> {
    Ok(resource::endpoints(name, &[&format!("127.0.0.1:{port}")])?.packed())
}

fn fixed(name: &str) -> Result<Cluster> {
    resource::cluster(name, &["127.0.0.1:8001"], json!({}))
}

/// Breaks a rule of the API.
fn invalid_cluster() -> Result<Cluster> {
    resource::from_json(&json!({"name": "bad", "type": "STATIC", "connect_timeout": "0s"}))
}

fn listener(address: &str, cluster: &str) -> Result<tidegate_api::listener::Listener> {
    resource::listener(address, json!({}), &tcp_proxy(cluster, json!({})))
}

/// Follows the rules and can't be built.
fn unusable_listener(address: &str) -> Result<tidegate_api::listener::Listener> {
    let mut listener = listener(address, "a")?;
    for filter in listener.filter_chains.iter_mut().flat_map(|chain| &mut chain.filters) {
        "x.unknown".clone_into(&mut filter.name);
        let unknown = Any { type_url: "type.googleapis.com/does.not.Exist".into(), value: Vec::new() };
        filter.config_type = Some(ConfigType::TypedConfig(unknown));
    }
    Ok(listener)
}

fn http_listener(address: &str, route: &str) -> Result<tidegate_api::listener::Listener> {
    resource::listener(address, json!({}), &http_rds(route, &resource::ads()))
}

fn route(name: &str, cluster: &str) -> Result<RouteConfiguration> {
    resource::routes(name, &[("all", &["*"], cluster)])
}

fn packed<M: Served>(messages: impl IntoIterator<Item = Result<M>>) -> Result<Vec<Any>> {
    messages.into_iter().map(|message| Ok(message?.packed())).collect()
}

fn start_up(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([eds("c"), fixed("f")])?)?;
    s.hear("clusters came")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("endpoints came")?;
    s.send(Kind::Listener, "1", packed([listener(FIRST, "c"), http_listener(SECOND, "r")])?)?;
    s.hear("listeners came")?;
    s.send(Kind::Route, "1", packed([route("r", "c")])?)?;
    s.hear("routes came")
}

fn verdicts(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([invalid_cluster()])?)?;
    s.hear("the first is bad")?;
    s.send(Kind::Cluster, "2", packed([fixed("a")])?)?;
    s.hear("a good one")?;
    s.send(Kind::Cluster, "3", packed([fixed("a"), invalid_cluster()])?)?;
    s.hear("a bad one")?;
    s.send(Kind::Cluster, "4", packed([fixed("a")])?)?;
    s.hear("a good one again")?;
    s.send(Kind::Cluster, "4", packed([fixed("a"), fixed("b")])?)?;
    s.hear("the same version")?;
    s.send(Kind::Listener, "1", packed([unusable_listener(FIRST)])?)?;
    s.hear("a listener that can't be")?;
    s.send(Kind::Listener, "2", packed([unusable_listener(FIRST), listener(SECOND, "a")])?)?;
    s.hear("and one that can")?;
    s.send(Kind::Listener, "3", packed([unusable_listener(FIRST), unusable_listener(SECOND)])?)?;
    s.hear("two that can't be")?;
    s.send(Kind::Listener, "4", Vec::new())?;
    s.hear("none")
}

fn endpoints_come_and_go(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    let named = json!({"eds_cluster_config": {"service_name": "svc"}});
    let named = || resource::eds_cluster("named", &resource::ads(), named.clone());
    s.send(Kind::Cluster, "1", packed([named()])?)?;
    s.hear("a cluster with another name for its endpoints")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("svc", 8001)?])?;
    s.hear("its endpoints")?;
    s.send(Kind::Cluster, "2", packed([named(), eds("c")])?)?;
    s.hear("another cluster")?;
    s.send(Kind::Endpoints, "2", vec![endpoints("svc", 8001)?, endpoints("c", 8002)?])?;
    s.hear("the endpoints of both")?;
    s.send(Kind::Endpoints, "3", vec![endpoints("c", 8001)?, endpoints("nobody's", 8002)?])?;
    s.hear("fewer, and some that nobody asked for")?;
    s.send(Kind::Endpoints, "4", Vec::new())?;
    s.hear("none")?;
    s.send(Kind::Cluster, "3", packed([eds("c")])?)?;
    s.hear("a cluster less")?;
    s.send(Kind::Cluster, "4", Vec::new())?;
    s.hear("no cluster")
}

/// Clusters, endpoints, listeners.
fn configure(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "c1", packed([eds("a"), eds("b")])?)?;
    s.hear("clusters")?;
    s.send(Kind::Endpoints, "e1", vec![endpoints("a", 8001)?, endpoints("b", 8002)?])?;
    s.hear("endpoints")?;
    s.send(Kind::Listener, "l1", packed([listener(FIRST, "a"), listener(SECOND, "b")])?)?;
    s.hear("listeners")
}

fn server_dies(s: &mut Session) -> Result<()> {
    configure(s)?;
    s.send(Kind::Cluster, "c2", packed([invalid_cluster()])?)?;
    s.hear("a rejected version")?;
    s.restart_server()?;
    s.hear("the server is back")?;
    s.send(Kind::Cluster, "c3", packed([eds("a")])?)?;
    s.hear("it forgot a cluster")?;
    s.send(Kind::Listener, "l2", packed([listener(FIRST, "a")])?)?;
    s.hear("it forgot a listener")
}

fn stream_ends(s: &mut Session) -> Result<()> {
    configure(s)?;
    s.end_stream(Kind::Cluster, 14)?;
    s.hear("UNAVAILABLE")?;
    s.send(Kind::Listener, "l2", packed([listener(FIRST, "b")])?)?;
    s.hear("a new listener")?;
    s.reset_stream(Kind::Cluster)?;
    s.hear("RST_STREAM")?;
    s.end_stream(Kind::Cluster, 0)?;
    s.hear("OK")
}

fn broken(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.hear("clusters")?;
    s.send(Kind::Cluster, "2", vec![fixed("a")?.packed(), listener(FIRST, "a")?.packed()])?;
    s.hear("a listener among clusters")?;
    s.send(Kind::Cluster, "3", vec![fixed("a")?.packed(), undecodable(Kind::Cluster)])?;
    s.hear("bytes that are no cluster")?;
    s.send(Kind::Cluster, "4", packed([fixed("a"), fixed("a")])?)?;
    s.hear("a cluster twice")?;
    s.send(Kind::Listener, "1", packed([listener(FIRST, "a"), listener(FIRST, "a")])?)?;
    s.hear("a listener twice")?;
    s.send(Kind::Listener, "2", vec![undecodable(Kind::Listener)])?;
    s.hear("bytes that are no listener")?;
    s.send(Kind::Cluster, "5", packed([fixed("a")])?)?;
    s.hear("all is well again")
}

fn unknown_types(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Secret, "1", Vec::new())?;
    s.hear_perhaps(Duration::ZERO, "a kind that nobody asked for")?;
    s.send_typed(Kind::Cluster, "type.googleapis.com/no.such.Type", Vec::new())?;
    s.hear_perhaps(Duration::ZERO, "a type that does not exist")?;
    s.send(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.hear("the stream goes on")
}

fn garbage(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.hear("clusters")?;
    s.send_bytes(Kind::Cluster, &[0xff; 24])?;
    s.hear("bytes")
}

fn several_at_once(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.send(Kind::Cluster, "2", packed([fixed("a"), fixed("b")])?)?;
    s.send(Kind::Cluster, "3", packed([fixed("b")])?)?;
    s.hear("three versions")?;
    s.send(Kind::Listener, "1", packed([listener(FIRST, "b")])?)?;
    s.send(Kind::Cluster, "4", packed([fixed("b"), eds("e")])?)?;
    s.send(Kind::Listener, "2", packed([listener(SECOND, "b")])?)?;
    s.hear("of two kinds")
}

fn silent_endpoints(s: &mut Session) -> Result<()> {
    let mut source = resource::ads();
    source["initial_fetch_timeout"] = json!("1s");
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([resource::eds_cluster("c", &source, json!({}))])?)?;
    s.hear("clusters")?;
    s.hear("no endpoints in time")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("late endpoints")
}

fn cluster_changes(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([eds("c")])?)?;
    s.hear("clusters")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("endpoints")?;
    let changed = resource::eds_cluster("c", &resource::ads(), json!({"connect_timeout": "3s"}));
    s.send(Kind::Cluster, "2", packed([changed])?)?;
    s.hear("it changes")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("its endpoints again")
}

fn node_once(s: &mut Session) -> Result<()> {
    let once = json!({"dynamic_resources": {"ads_config": {"set_node_on_first_message_only": true}}});
    s.start(Transport::Ads, once)?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([eds("c")])?)?;
    s.hear("clusters")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("endpoints")?;
    s.restart_server()?;
    s.hear("the server is back")
}

fn routes(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([fixed("a"), fixed("b")])?)?;
    s.hear("clusters")?;
    s.send(Kind::Listener, "1", packed([http_listener(FIRST, "r1"), http_listener(SECOND, "r2")])?)?;
    s.hear("two listeners")?;
    s.send(Kind::Route, "1", packed([route("r1", "a")])?)?;
    s.hear("the routes of one")?;
    s.send(Kind::Route, "2", packed([route("r1", "a"), route("r2", "a")])?)?;
    s.hear("of both")?;
    s.send(Kind::Route, "3", packed([route("r1", "b")])?)?;
    s.hear("one changes")?;
    let bad = resource::from_json(&json!({"name": "r1", "virtual_hosts": [{"name": "v", "domains": []}]}));
    s.send(Kind::Route, "4", packed::<RouteConfiguration>([bad])?)?;
    s.hear("a bad one")?;
    s.send(Kind::Listener, "2", packed([http_listener(SECOND, "r2")])?)?;
    // Envoy wants its routes until it has drained.
    s.hear_for(DRAINED, "a listener goes")
}

fn ttl(s: &mut Session) -> Result<()> {
    s.start(Transport::Ads, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.hear("clusters")?;
    let mortal = with_ttl("127.0.0.1_10000", "1", Some(listener(FIRST, "a")?.packed()), 600);
    s.send(Kind::Listener, "1", vec![packed_wrapper(&mortal), listener(SECOND, "a")?.packed()])?;
    s.hear("a listener for a while")?;
    s.hear_perhaps(EXPIRED, "its time is over")?;
    s.send(Kind::Cluster, "2", packed([fixed("a"), fixed("b")])?)?;
    s.hear("something else")
}

fn delta_start_up(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &eds("c")?), wrapped("1", &fixed("f")?)], &[])?;
    s.hear("clusters came")?;
    s.send_delta(Kind::Endpoints, vec![delta_endpoints("c", "1")?], &[])?;
    s.hear("endpoints came")?;
    let listeners = [listener(FIRST, "c")?, http_listener(SECOND, "r")?];
    s.send_delta(Kind::Listener, listeners.iter().map(|listener| wrapped("1", listener)).collect(), &[])?;
    s.hear("listeners came")?;
    s.send_delta(Kind::Route, vec![wrapped("1", &route("r", "c")?)], &[])?;
    s.hear("routes came")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &eds("d")?)], &[])?;
    s.hear("a cluster more")
}

fn delta_endpoints(name: &str, version: &str) -> Result<Resource> {
    Ok(wrapped(version, &resource::endpoints(name, &["127.0.0.1:8001"])?))
}

fn delta_verdicts(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &fixed("a")?)], &[])?;
    s.hear("a good one")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &invalid_cluster()?), wrapped("2", &fixed("a")?)], &[])?;
    s.hear("a bad one")?;
    s.send_delta(Kind::Cluster, vec![wrapped("3", &fixed("a")?)], &[])?;
    s.hear("a good one again")?;
    let both = [unusable_listener(FIRST)?, listener(SECOND, "a")?];
    s.send_delta(Kind::Listener, both.iter().map(|listener| wrapped("1", listener)).collect(), &[])?;
    s.hear("a listener that can't be, and one that can")?;
    s.send_delta(Kind::Listener, Vec::new(), &[])?;
    s.hear("nothing")
}

fn delta_removals(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &eds("a")?), wrapped("1", &eds("b")?)], &[])?;
    s.hear("clusters")?;
    s.send_delta(Kind::Endpoints, vec![delta_endpoints("a", "1")?, delta_endpoints("b", "1")?], &[])?;
    s.hear("endpoints")?;
    s.send_delta(Kind::Endpoints, Vec::new(), &["a"])?;
    s.hear("the endpoints of one are removed")?;
    s.send_delta(Kind::Cluster, Vec::new(), &["b", "nobody"])?;
    s.hear("a cluster is removed")?;
    s.send_delta(Kind::Cluster, vec![wrapped("2", &eds("b")?)], &["a"])?;
    s.hear("one comes back, one goes")?;
    s.restart_server()?;
    s.hear("the server is back")
}

fn delta_server_dies(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("c1", &eds("a")?), wrapped("c2", &eds("b")?)], &[])?;
    s.hear("clusters")?;
    s.send_delta(Kind::Endpoints, vec![delta_endpoints("a", "e1")?, delta_endpoints("b", "e2")?], &[])?;
    s.hear("endpoints")?;
    let listeners = [wrapped("l1", &listener(FIRST, "a")?), wrapped("l2", &unusable_listener(SECOND)?)];
    s.send_delta(Kind::Listener, listeners.to_vec(), &[])?;
    s.hear("a good and a bad listener")?;
    s.restart_server()?;
    s.hear("the server is back")?;
    s.send_delta(Kind::Cluster, Vec::new(), &[])?;
    s.hear("it has no news")?;
    s.end_stream(Kind::Cluster, 14)?;
    s.hear("UNAVAILABLE")
}

fn delta_broken(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &fixed("a")?)], &[])?;
    s.hear("clusters")?;
    s.send_delta(Kind::Cluster, vec![wrapped("2", &fixed("b")?), wrapped("2", &fixed("b")?)], &[])?;
    s.hear("a cluster twice")?;
    let mut other_type = wrapped("2", &fixed("c")?);
    other_type.resource = Some(listener(FIRST, "a")?.packed());
    s.send_delta(Kind::Cluster, vec![other_type], &[])?;
    s.hear("a listener among clusters")?;
    let mut bytes = wrapped("2", &fixed("c")?);
    bytes.resource = Some(undecodable(Kind::Cluster));
    s.send_delta(Kind::Cluster, vec![bytes], &[])?;
    s.hear("bytes that are no cluster")?;
    let mut misnamed = wrapped("2", &fixed("d")?);
    "x".clone_into(&mut misnamed.name);
    s.send_delta(Kind::Cluster, vec![misnamed], &[])?;
    s.hear("a wrapper of another name")
}

fn delta_ttl(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &fixed("a")?)], &[])?;
    s.hear("clusters")?;
    let body = listener(FIRST, "a")?.packed();
    s.send_delta(Kind::Listener, vec![with_ttl("127.0.0.1_10000", "1", Some(body), 60_000)], &[])?;
    s.hear("a listener for a minute")?;
    s.send_delta(Kind::Listener, vec![with_ttl("127.0.0.1_10000", "1", None, 600)], &[])?;
    s.hear("a heartbeat for less")?;
    s.hear_perhaps(EXPIRED, "its time is over")?;
    s.restart_server()?;
    s.hear("the server is back")
}

fn delta_virtual_hosts(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaAds, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &fixed("a")?)], &[])?;
    s.hear("clusters")?;
    s.send_delta(Kind::Listener, vec![wrapped("1", &http_listener(FIRST, "r")?)], &[])?;
    s.hear("a listener")?;
    let vhds: RouteConfiguration =
        resource::from_json(&json!({"name": "r", "vhds": {"config_source": resource::ads()}}))?;
    s.send_delta(Kind::Route, vec![wrapped("1", &vhds)], &[])?;
    s.hear("routes without hosts")?;
    let host: VirtualHost = resource::from_json(&json!({
        "name": "r/any", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}],
    }))?;
    s.send_delta(Kind::VirtualHost, vec![wrapped("1", &host)], &[])?;
    s.hear("a host")?;
    s.restart_server()?;
    s.hear("the server is back")
}

fn streams_by_kind(s: &mut Session) -> Result<()> {
    s.start(Transport::Grpc, json!({}))?;
    s.hear("start")?;
    s.send(Kind::Cluster, "1", packed([eds_from("c", Transport::Grpc)])?)?;
    s.hear("clusters")?;
    s.send(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear("endpoints")?;
    s.send(Kind::Listener, "1", packed([listener(FIRST, "c")])?)?;
    s.hear("listeners")?;
    s.end_stream(Kind::Endpoints, 14)?;
    s.hear("the stream of endpoints ends")?;
    s.send(Kind::Cluster, "2", Vec::new())?;
    s.hear("no cluster")
}

fn delta_streams_by_kind(s: &mut Session) -> Result<()> {
    s.start(Transport::DeltaGrpc, json!({}))?;
    s.hear("start")?;
    s.send_delta(Kind::Cluster, vec![wrapped("1", &eds_from("c", Transport::DeltaGrpc)?)], &[])?;
    s.hear("clusters")?;
    s.send_delta(Kind::Endpoints, vec![delta_endpoints("c", "1")?], &[])?;
    s.hear("endpoints")?;
    s.send_delta(Kind::Listener, vec![wrapped("1", &listener(FIRST, "c")?)], &[])?;
    s.hear("listeners")?;
    s.end_stream(Kind::Listener, 14)?;
    s.hear("the stream of listeners ends")
}

/// Polls wait for as long as the script thinks.
fn start_polling(s: &mut Session) -> Result<()> {
    let api = || json!({"api_config_source": {"request_timeout": "60s"}});
    let source: Value = json!({"cds_config": api(), "lds_config": api()});
    s.start(Transport::Rest, json!({"dynamic_resources": source}))?;
    s.hear_poll("start", Kind::Cluster)
}

fn polls(s: &mut Session) -> Result<()> {
    start_polling(s)?;
    s.answer_with(Kind::Cluster, "1", packed([eds_from("c", Transport::Rest)])?)?;
    s.hear_poll("clusters", Kind::Endpoints)?;
    s.answer_with(Kind::Endpoints, "1", vec![endpoints("c", 8001)?])?;
    s.hear_poll("clusters again", Kind::Cluster)?;
    s.hear_poll("endpoints again", Kind::Endpoints)?;
    s.hear_poll("listeners", Kind::Listener)?;
    s.answer_with(Kind::Listener, "1", packed([listener(FIRST, "c")])?)?;
    s.hear_poll("listeners again", Kind::Listener)?;
    s.answer_with(Kind::Listener, "2", Vec::new())?;
    s.hear_poll("no listeners", Kind::Listener)
}

fn poll_failures(s: &mut Session) -> Result<()> {
    start_polling(s)?;
    s.answer_with(Kind::Cluster, "1", packed([fixed("a")])?)?;
    s.hear_poll("clusters", Kind::Cluster)?;
    for (label, status, body) in [
        ("304", 304, ""),
        ("404", 404, ""),
        ("500", 500, "no"),
        ("no JSON", 200, "{"),
        ("no response", 200, "[]"),
        (
            "an unknown type",
            200,
            r#"{"version_info": "x", "resources": [{"@type": "type.googleapis.com/no.such.Type"}]}"#,
        ),
    ] {
        s.answer(Kind::Cluster, status, body.as_bytes())?;
        s.hear_poll(label, Kind::Cluster)?;
    }
    s.answer_with(Kind::Cluster, "2", packed([invalid_cluster()])?)?;
    s.hear_poll("a bad cluster", Kind::Cluster)?;
    s.answer_with(Kind::Cluster, "3", packed([fixed("a"), fixed("b")])?)?;
    s.hear_poll("good ones", Kind::Cluster)
}
