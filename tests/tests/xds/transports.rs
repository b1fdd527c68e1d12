//! Every transport brings listeners, clusters, endpoints and routes, changes them, and takes them away.

use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::json;
use tidegate_tests::config::{http_rds, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{
    ControlPlane, Identity, Kind, Served, Snapshot, response, write_atomically,
};
use tidegate_tests::proxy::{PATIENCE, Setup};
use tidegate_tests::run::TempDir;
use tidegate_tests::upstream::Upstream;

use crate::world::{LISTENER, World, with_log};

const HTTP: &str = "127.0.0.1:10001";

/// A plane that has a listener, an HTTP listener with RDS, and a cluster with EDS that leads to `a`.
pub(crate) fn plane(world: &World, transport: Transport) -> Result<Snapshot> {
    let plane = Snapshot::start(Some(&world.netns))?;
    fill(&plane, transport)?;
    Ok(plane)
}

fn fill(plane: &Snapshot, transport: Transport) -> Result<()> {
    let source = transport.source();
    let cluster = resource::eds_cluster("c", &source, json!({}))?;
    let endpoints = resource::endpoints("c", &[World::A])?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    let http = resource::listener(HTTP, json!({}), &http_rds("r", &source))?;
    let routes = resource::routes("r", &[("any", &["*"], "c")])?;
    plane.update(|changes| {
        changes.set(&cluster);
        changes.set(&endpoints);
        changes.set(&listener);
        changes.set(&http);
        changes.set(&routes);
    });
    Ok(())
}

/// What [`plane`] serves arrives, changes and goes.
pub(crate) fn serves(transport: Transport, setup: impl FnOnce(Setup) -> Setup) -> Result<()> {
    let world = World::new()?;
    let plane = plane(&world, transport)?;
    let bootstrap = format!("{:#}", transport.bootstrap(plane.address()));
    let proxy = setup(Setup::new(&bootstrap)).netns(&world.netns).start()?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    for kind in [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Route] {
        with_log(plane.accepted(kind), &proxy)?;
    }
    plane.set(&resource::endpoints("c", &[World::B])?);
    with_log(plane.accepted(Kind::Endpoints), &proxy)?;
    with_log(world.reaches(LISTENER, "b"), &proxy)?;
    // One that can't be: it is rejected, the others stay.
    plane.set(&resource::listener("127.0.0.1:10002", json!({}), &json!({"name": "x.unknown"}))?);
    let reason = with_log(plane.rejected(Kind::Listener), &proxy)?;
    assert!(transport == Transport::Rest || reason.contains("127.0.0.1_10002"), "{reason}");
    with_log(world.reaches(LISTENER, "b"), &proxy)?;
    plane.update(|changes| {
        changes.remove(Kind::Listener, "127.0.0.1_10002");
        changes.remove(Kind::Listener, "127.0.0.1_10000");
    });
    with_log(plane.accepted(Kind::Listener), &proxy)?;
    with_log(world.refused(LISTENER), &proxy)?;
    // The control plane goes; what it said holds.
    drop(plane);
    let listeners = proxy.admin().read("/listeners")?.body;
    assert!(listeners.contains("127.0.0.1_10001") && !listeners.contains("127.0.0.1_10000"), "{listeners}");
    Ok(())
}

fn serves_us(transport: Transport) -> Result<()> {
    serves(transport, |setup| setup)
}

/// Twenty polls that fail are no twenty warnings. When the server is back, the log says so.
#[test]
fn p52_polls_that_keep_failing_are_told_less_and_less() -> Result<()> {
    let world = World::new()?;
    let mut plane = plane(&world, Transport::Rest)?;
    let bootstrap = format!("{:#}", Transport::Rest.bootstrap(plane.address()));
    let proxy = Setup::new(&bootstrap).netns(&world.netns).start()?;
    plane.stop();
    proxy.wait_stat("cluster_manager.cds.update_failure", |failures| failures >= 20)?;
    let told: Vec<_> = proxy
        .log()
        .lines()
        .filter(|line| line.contains("WARN") && line.contains("CDS: "))
        .map(str::to_owned)
        .collect();
    // At the 1st, 2nd, 4th, 8th and 16th; more may have failed by now.
    assert!((5..=8).contains(&told.len()), "{told:#?}");
    assert!(told[0].contains("what was accepted holds") && told[4].contains("failed 16 times"), "{told:#?}");
    plane.restart()?;
    proxy.lines("proxy.log", "CDS: works again after", 1).map(drop)
}

#[test]
fn ads() -> Result<()> {
    serves_us(Transport::Ads)
}

#[test]
fn delta_ads() -> Result<()> {
    serves_us(Transport::DeltaAds)
}

#[test]
fn a_stream_per_kind() -> Result<()> {
    serves_us(Transport::Grpc)
}

#[test]
fn a_delta_stream_per_kind() -> Result<()> {
    serves_us(Transport::DeltaGrpc)
}

#[test]
fn rest() -> Result<()> {
    serves_us(Transport::Rest)
}

/// Writes what a control plane would send.
fn write(dir: &TempDir, kind: Kind, resources: Vec<tidegate_api::wkt::Any>) -> Result<()> {
    let json = resource::to_json(&response(kind, "1", "", resources))?;
    let name = match kind {
        Kind::Cluster => "cds.json",
        Kind::Endpoints => "eds.json",
        Kind::Route => "rds.json",
        _ => "lds.json",
    };
    write_atomically(&dir.path().join(name), &serde_json::to_vec_pretty(&json)?)
}

#[test]
fn files() -> Result<()> {
    let world = World::new()?;
    let dir = TempDir::new("xds")?;
    let file = |name: &str| resource::file(&dir.path().join(name));
    let cluster = resource::eds_cluster("c", &file("eds.json"), json!({}))?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    let http = resource::listener(HTTP, json!({}), &http_rds("r", &file("rds.json")))?;
    write(&dir, Kind::Cluster, vec![cluster.packed()])?;
    write(&dir, Kind::Endpoints, vec![resource::endpoints("c", &[World::A])?.packed()])?;
    write(&dir, Kind::Listener, vec![listener.packed(), http.packed()])?;
    write(&dir, Kind::Route, vec![resource::routes("r", &[("any", &["*"], "c")])?.packed()])?;
    let bootstrap = json!({
        "admin": {"address": tidegate_tests::config::socket_address("127.0.0.1:0")},
        "node": {"id": "test-node", "cluster": "test-cluster"},
        "dynamic_resources": {"lds_config": file("lds.json"), "cds_config": file("cds.json")},
    });
    let proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).start()?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    write(&dir, Kind::Endpoints, vec![resource::endpoints("c", &[World::B])?.packed()])?;
    with_log(world.reaches(LISTENER, "b"), &proxy)?;
    // Garbage changes nothing, and is got over.
    write_atomically(&dir.path().join("lds.json"), b"{\"resources\": [")?;
    with_log(proxy.wait_stat("listener_manager.lds.update_failure", |count| count > 0), &proxy)
        .or_else(|_| proxy.wait_stat("listener_manager.lds.update_rejected", |count| count > 0))?;
    assert_eq!(world.ask(LISTENER)?, "b");
    write(&dir, Kind::Listener, vec![http.packed()])?;
    with_log(world.refused(LISTENER), &proxy)
}

/// Clusters of a control plane connect from where the cluster manager says too, and so do their health checks.
#[test]
fn the_cluster_manager_s_source_address_is_theirs() -> Result<()> {
    let world = World::new()?;
    let upstream = Upstream::identify(Some(&world.netns), "127.0.0.1:8003", "c")?;
    let dir = TempDir::new("xds")?;
    let file = |name: &str| resource::file(&dir.path().join(name));
    let check = json!({
        "timeout": "5s", "interval": "0.1s", "no_traffic_interval": "0.1s",
        "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {},
    });
    let cluster = resource::eds_cluster("c", &file("eds.json"), json!({"health_checks": [check]}))?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    write(&dir, Kind::Cluster, vec![cluster.packed()])?;
    write(&dir, Kind::Endpoints, vec![resource::endpoints("c", &["127.0.0.1:8003"])?.packed()])?;
    write(&dir, Kind::Listener, vec![listener.packed()])?;
    let bind = json!({"source_address": {"address": "127.0.0.5", "port_value": 0}});
    let bootstrap = json!({
        "admin": {"address": tidegate_tests::config::socket_address("127.0.0.1:0")},
        "node": {"id": "test-node", "cluster": "test-cluster"},
        "cluster_manager": {"upstream_bind_config": bind},
        "dynamic_resources": {"lds_config": file("lds.json"), "cds_config": file("cds.json")},
    });
    let proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).start()?;
    with_log(world.reaches(LISTENER, "c"), &proxy)?;
    with_log(proxy.wait_stat("cluster.c.health_check.success", |count| count > 1), &proxy)?;
    let deadline = Instant::now() + PATIENCE;
    // The client's, and two of the checks; the upstream accepts them when it comes to it.
    while upstream.accepted().len() < 3 {
        assert!(Instant::now() < deadline, "{:?}", upstream.accepted());
        sleep(Duration::from_millis(20));
    }
    let peers = upstream.accepted();
    assert!(peers.iter().all(|peer| peer.ip().to_string() == "127.0.0.5"), "{peers:?}");
    Ok(())
}

#[test]
fn ads_behind_tls() -> Result<()> {
    let world = World::new()?;
    let identity = Identity::for_names(&["istiod.istio-system.svc"])?;
    let ca = identity.ca_pem().to_owned();
    let plane = Snapshot::start_tls(Some(&world.netns), identity)?;
    fill(&plane, Transport::Ads)?;
    let mut bootstrap = Transport::Ads.bootstrap(plane.address());
    bootstrap["static_resources"]["clusters"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "sni": "istiod.istio-system.svc",
            "common_tls_context": {"validation_context": {
                "trusted_ca": {"inline_string": ca},
                "match_typed_subject_alt_names": [
                    {"san_type": "DNS", "matcher": {"exact": "istiod.istio-system.svc"}}],
            }},
        },
    });
    let proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).start()?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    with_log(plane.accepted(Kind::Listener), &proxy)
}

#[test]
fn a_control_plane_that_is_not_who_it_should_be_is_not_believed() -> Result<()> {
    let world = World::new()?;
    let impostor = Identity::for_names(&["istiod.istio-system.svc"])?;
    let expected = Identity::for_names(&["istiod.istio-system.svc"])?;
    let plane = Snapshot::start_tls(Some(&world.netns), impostor)?;
    let mut bootstrap = Transport::Ads.bootstrap(plane.address());
    bootstrap["static_resources"]["clusters"][0]["transport_socket"] = json!({
        "name": "envoy.transport_sockets.tls",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {"validation_context": {"trusted_ca": {"inline_string": expected.ca_pem()}}},
        },
    });
    let mut proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).spawn()?;
    proxy.wait_answering().context("the admin server serves although there is no configuration")?;
    proxy.wait_stat("cluster_manager.cds.update_failure", |count| count > 0)?;
    assert_eq!(plane.requests(), []);
    assert_eq!(proxy.admin().read("/ready")?.status, 503);
    Ok(())
}

#[test]
fn p33_unknown_fields_are_told_and_ignored() -> Result<()> {
    let world = World::new()?;
    let plane = ControlPlane::start(Some(&world.netns))?;
    let bootstrap = format!("{:#}", Transport::Rest.bootstrap(plane.address()));
    let mut proxy = Setup::new(&bootstrap).netns(&world.netns).spawn()?;
    let mut cluster = tidegate_tests::config::cluster("c", &[World::A], json!({"from_the_future": 1}));
    cluster["@type"] = Kind::Cluster.type_url().into();
    let poll = plane.poll(Kind::Cluster)?;
    assert_eq!(poll.json["node"]["id"], "test-node");
    assert_eq!(poll.json["type_url"], Kind::Cluster.type_url());
    poll.answer(200, json!({"version_info": "1", "resources": [cluster]}).to_string().as_bytes());
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    plane.poll(Kind::Listener)?.answer_with(&response(Kind::Listener, "1", "", vec![listener.packed()]))?;
    proxy.wait_ready()?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    assert_eq!(proxy.stat("server.dynamic_unknown_fields")?, 1);
    proxy.lines("proxy.log", "from_the_future", 1)?;
    // What was accepted is said from then on.
    for kind in [Kind::Cluster, Kind::Listener] {
        loop {
            let poll = plane.poll(kind)?;
            let version = poll.request.version_info.clone();
            poll.answer(304, b"");
            if version == "1" {
                break;
            }
        }
    }
    Ok(())
}
