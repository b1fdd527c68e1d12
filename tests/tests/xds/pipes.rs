//! Control planes and servers of secrets on Unix domain sockets, as agents on the same machine have them.

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tidegate_api::tls::Secret;
use tidegate_tests::config::{self, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{
    Authority, ControlPlane, Identity, Kind, Method, Served, delta_response, response, wrapped,
};
use tidegate_tests::proxy::Setup;
use tidegate_tests::run::{self, TempDir};

use crate::sds::{accepted, certificate, configure, example};
use crate::world::{LISTENER, World, with_log};

#[test]
fn istio_agent_as_it_is_written() -> Result<()> {
    let (world, dir) = (World::new()?, TempDir::new("agent")?);
    let directory = dir.path().join("etc/istio/proxy");
    std::fs::create_dir_all(&directory)?;
    // As in a sidecar, whose working directory is /.
    let working_directory = dir.path().display().to_string();
    let mut proxy = Setup::new(&example("xds-istio-agent.yaml", &[])?)
        .netns(&world.netns)
        .wrapper(&["env", "-C", &working_directory])
        .spawn()?;
    proxy.wait_answering()?;
    // Before the agent is there.
    let missing = format!(
        "./etc/istio/proxy/XDS: No such file or directory (os error 2) (the path is relative to {working_directory})"
    );
    proxy.lines("proxy.log", &missing, 1)?;
    let socket = directory.join("XDS").display().to_string();
    let mut plane = ControlPlane::start_on(&socket, Some(&world.netns), None)?;
    let stream = with_log(plane.stream(Method::DELTA_ADS), &proxy)?;
    let first = stream.delta_request_for(Kind::Cluster)?;
    assert!(first.node.is_some_and(|node| node.id.starts_with("sidecar~10.0.0.9~")));
    let cluster = resource::cluster("c", &[World::A], json!({}))?;
    stream.send_delta(&delta_response(Kind::Cluster, "c1", vec![wrapped("1", &cluster)], &[]));
    stream.delta_request_for(Kind::Listener)?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    // Nobody's bytes go to the agent.
    let other = resource::listener("127.0.0.1:10001", json!({}), &tcp_proxy("xds-grpc", json!({})))?;
    let listeners = vec![wrapped("1", &listener), wrapped("1", &other)];
    stream.send_delta(&delta_response(Kind::Listener, "l1", listeners, &[]));
    let answer = stream.delta_request_for(Kind::Listener)?;
    let reason = answer.error_detail.context("a NACK")?.message;
    assert!(
        reason.contains("127.0.0.1_10001") && reason.contains("\"xds-grpc\" has endpoints on unix"),
        "{reason}"
    );
    with_log(world.reaches(LISTENER, "a"), &proxy)?;

    // What the operator sees.
    let clusters = proxy.admin().read("/clusters")?.body;
    for line in
        ["xds-grpc::./etc/istio/proxy/XDS::cx_active::1", "xds-grpc::./etc/istio/proxy/XDS::hostname::"]
    {
        assert!(clusters.lines().any(|it| it == line), "{clusters}");
    }
    let clusters: Value = serde_json::from_str(&proxy.admin().read("/clusters?format=json")?.body)?;
    let agent = clusters["cluster_statuses"].as_array().context("clusters")?.iter();
    let agent = agent.filter(|it| it["name"] == "xds-grpc").map(|it| &it["host_statuses"][0]["address"]);
    assert_eq!(agent.collect::<Vec<_>>(), [&json!({"pipe": {"path": "./etc/istio/proxy/XDS"}})]);
    assert_eq!(proxy.stat("cluster.xds-grpc.upstream_cx_active")?, 1);

    // The agent starts again, with a socket of its own.
    plane.restart()?;
    let stream = with_log(plane.stream(Method::DELTA_ADS), &proxy)?;
    let again = stream.delta_request_for(Kind::Cluster)?;
    assert_eq!(again.initial_resource_versions.get("c").map(String::as_str), Some("1"));
    with_log(world.reaches(LISTENER, "a"), &proxy)
}

#[test]
fn spire_as_it_is_written() -> Result<()> {
    let (world, dir, authority) = (World::new()?, TempDir::new("spire")?, Authority::new()?);
    let server = authority.issue(&["spiffe://example.org/control-plane"])?.for_known_clients();
    let plane = ControlPlane::start_tls(Some(&world.netns), server)?;
    let socket = dir.path().join("agent.sock").display().to_string();
    let agent = ControlPlane::start_on(&socket, Some(&world.netns), None)?;
    let port = format!("port_value: {}", plane.address().port());
    let bootstrap = example(
        "xds-spire.yaml",
        &[
            ("/run/spire/sockets/agent.sock", &socket),
            ("{ address: control-plane.example.com", "{ address: 127.0.0.1"),
            ("port_value: 18443", &port),
        ],
    )?;
    let mut proxy = Setup::new(&bootstrap).netns(&world.netns).spawn()?;
    proxy.wait_answering()?;
    let own = authority.issue(&["spiffe://example.org/tidegate"])?;
    let own_secret = certificate("spiffe://example.org/tidegate", own.chain_pem(), &own.key_pem())?;
    let ca: Secret = resource::from_json(&json!({"name": "spiffe://example.org",
        "validation_context": {"trusted_ca": {"inline_string": authority.pem()}}}))?;
    // Envoy has a stream for each secret.
    let envoy = std::env::var_os("TIDEGATE_TEST_ENVOY").is_some();
    let mut open = Vec::new();
    for _ in 0..if envoy { 2 } else { 1 } {
        let stream = with_log(agent.stream(Method { kind: Some(Kind::Secret), delta: false }), &proxy)?;
        let mut names = stream.request_for(Kind::Secret)?.resource_names;
        names.sort();
        let secrets = [&ca, &own_secret].map(Served::packed);
        let wanted = [&ca, &own_secret].into_iter().zip(secrets);
        let secrets = wanted.filter(|(secret, _)| names.contains(&secret.name)).map(|(_, packed)| packed);
        stream.send(&response(Kind::Secret, "1", "1", secrets.collect()));
        assert!(envoy || names == ["spiffe://example.org", "spiffe://example.org/tidegate"], "{names:?}");
        accepted(&stream, Kind::Secret)?;
        open.push(stream);
    }
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(own.der()));
    configure(&stream)?;
    with_log(world.reaches(LISTENER, "a"), &proxy)
}

/// REST, TLS, and a name that is no file.
#[test]
fn rest_behind_tls_on_an_abstract_socket() -> Result<()> {
    let (world, dir) = (World::new()?, TempDir::new("rest")?);
    let identity = Identity::for_names(&["xds.example.com"])?;
    let ca = dir.path().join("ca.pem");
    std::fs::write(&ca, identity.ca_pem())?;
    let name = format!("@{}", run::unique("xds"));
    let plane = ControlPlane::start_on(&name, Some(&world.netns), Some(identity))?;
    let mut bootstrap = Transport::Rest.bootstrap(&name);
    config::merge(
        &mut bootstrap["static_resources"]["clusters"][0],
        json!({"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
            "common_tls_context": {"validation_context": {
                "trusted_ca": {"filename": ca},
                "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": "xds.example.com"}}]}},
        }}}),
    );
    let proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).spawn()?;
    let poll = with_log(plane.poll(Kind::Cluster), &proxy)?;
    let cluster = resource::cluster("c", &[World::A], json!({}))?;
    poll.answer_with(&response(Kind::Cluster, "1", "", vec![cluster.packed()]))?;
    let poll = with_log(plane.poll(Kind::Listener), &proxy)?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    poll.answer_with(&response(Kind::Listener, "1", "", vec![listener.packed()]))?;
    with_log(world.reaches(LISTENER, "a"), &proxy)
}
