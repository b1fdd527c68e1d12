//! The control plane itself, tried with a client that is not ours: the real Envoy.

use anyhow::Result;
use serde_json::json;
use tidegate_tests::config::{http_rds, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{Kind, Snapshot};
use tidegate_tests::proxy::{Engine, Setup};
use tidegate_tests::tool;

use crate::world::{LISTENER, World, with_log};

/// Listener, cluster, endpoints and routes come, change and go.
fn serves_envoy(transport: Transport) -> Result<()> {
    let world = World::new()?;
    let plane = Snapshot::start(Some(&world.netns))?;
    let source = transport.source();
    plane.update(|changes| {
        changes.set(&resource::eds_cluster("c", &source, json!({})).unwrap());
        changes.set(&resource::endpoints("c", &[World::A]).unwrap());
        changes.set(&resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({}))).unwrap());
        let http = http_rds("r", &source);
        changes.set(&resource::listener("127.0.0.1:10001", json!({}), &http).unwrap());
        changes.set(&resource::routes("r", &[("any", &["*"], "c")]).unwrap());
    });
    let proxy = Setup::new(&format!("{:#}", transport.bootstrap(plane.address())))
        .engine(Engine::Envoy(tool::envoy()?))
        .netns(&world.netns)
        .start()?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    for kind in [Kind::Cluster, Kind::Endpoints, Kind::Listener, Kind::Route] {
        with_log(plane.accepted(kind), &proxy)?;
    }
    plane.set(&resource::endpoints("c", &[World::B])?);
    with_log(plane.accepted(Kind::Endpoints), &proxy)?;
    with_log(world.reaches(LISTENER, "b"), &proxy)?;
    plane.set(&resource::listener("127.0.0.1:10002", json!({}), &json!({"name": "x.unknown"}))?);
    let reason = with_log(plane.rejected(Kind::Listener), &proxy)?;
    assert!(transport == Transport::Rest || reason.contains("127.0.0.1_10002"), "{reason}");
    plane.remove(Kind::Listener, "127.0.0.1_10002");
    plane.remove(Kind::Listener, "127.0.0.1_10000");
    with_log(plane.accepted(Kind::Listener), &proxy)?;
    with_log(world.refused(LISTENER), &proxy)
}

#[test]
fn envoy_takes_ads() -> Result<()> {
    serves_envoy(Transport::Ads)
}

#[test]
fn envoy_takes_delta_ads() -> Result<()> {
    serves_envoy(Transport::DeltaAds)
}

#[test]
fn envoy_takes_a_stream_per_kind() -> Result<()> {
    serves_envoy(Transport::Grpc)
}

#[test]
fn envoy_takes_a_delta_stream_per_kind() -> Result<()> {
    serves_envoy(Transport::DeltaGrpc)
}

#[test]
fn envoy_polls() -> Result<()> {
    serves_envoy(Transport::Rest)
}
