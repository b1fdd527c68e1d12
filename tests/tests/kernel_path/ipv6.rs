//! The kernel path over IPv6, and from IPv6 sockets to IPv4 services.

use std::io::{ErrorKind, Read as _};

use anyhow::{Context as _, Result, bail, ensure};
use serde_json::json;
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::{address_field, field};
use tidegate_tests::proxy::PATIENCE;
use tidegate_tests::script::{self, Step, write};
use tidegate_tests::upstream::Upstream;
use tidegate_tests::workload::Connect;

use crate::endpoints::{Eds, connect, eds, is_open, read_error};
use crate::{Lab, data_path, same_on_both_paths};

const SIX: &str = "[fd00:172::1]:50001";
const SIX_BEHIND_PROXY: &str = "[fd00:172::2]:50001";
const FOUR: &str = "172.16.0.1:50001";
/// From an IPv6 socket.
const MAPPED: &str = "[::ffff:172.16.0.1]:50001";
const SIX_ENDPOINT: &str = "[fd00:9::1]:80";
const FOUR_ENDPOINT: &str = "10.9.0.1:80";

#[test]
fn each_socket_goes_straight_to_an_endpoint_of_its_family() -> Result<()> {
    let config = Config::new()
        .service(SIX, "six")
        .cluster("six", &[SIX_ENDPOINT], data_path("KERNEL"))
        .service(SIX_BEHIND_PROXY, "proxied")
        .cluster("proxied", &[SIX_ENDPOINT], data_path("PROXY"))
        .service(FOUR, "four")
        .cluster("four", &[FOUR_ENDPOINT], data_path("KERNEL"))
        .service("172.16.0.9:50001", "six")
        .service("[fd00:172::9]:50001", "four");
    let lab = Lab::start(&config)?;
    let six = Upstream::identify(Some(lab.server.netns()), SIX_ENDPOINT, "six")?;
    let four = Upstream::identify(Some(lab.server.netns()), FOUR_ENDPOINT, "four")?;
    for (service, upstream, name) in [(SIX, &six, "six"), (FOUR, &four, "four"), (MAPPED, &four, "four")] {
        // getpeername(2) is checked there.
        let (local, text) = lab.talk(service)?;
        assert_eq!(text, format!("{name}\nhello"), "{service}");
        let peer = upstream.served()?.peer;
        assert_eq!((peer.ip(), peer.port()), (local.ip().to_canonical(), local.port()), "{service}");
    }
    let (local, _) = lab.talk(SIX_BEHIND_PROXY)?;
    assert_ne!(six.served()?.peer, local, "a socket of the proxy");
    let (kernel, proxied) = (lab.line(SIX)?, lab.line(SIX_BEHIND_PROXY)?);
    let named = |line: &str| {
        same_on_both_paths(line).iter().map(|value| value.replace("proxied", "six")).collect::<Vec<_>>()
    };
    assert_eq!(named(&kernel), named(&proxied), "{kernel}\n{proxied}");
    assert_eq!(address_field(&kernel, "dremote")?, address_field(&kernel, "uplocal")?, "{kernel}");
    for line in lab.proxy.lines("access.log", &format!("dlocal={FOUR}"), 2)? {
        assert_eq!((field(&line, "flags"), field(&line, "up")), ("-", FOUR_ENDPOINT), "{line}");
    }
    // An endpoint of the other family takes the proxy.
    for (service, listener, endpoint) in [
        ("172.16.0.9:50001", "172.16.0.9_50001", SIX_ENDPOINT),
        ("[fd00:172::9]:50001", "[fd00_172__9]_50001", FOUR_ENDPOINT),
    ] {
        lab.talk(service)?;
        let reasons = lab.data_path(listener)?;
        let [reason] = &reasons[..] else { bail!("{listener}: {reasons:?}") };
        ensure!(reason.contains(&format!("endpoint {endpoint} is IPv")), "{reason}");
    }
    Ok(())
}

#[test]
fn connect_says_what_went_wrong_over_ipv6_too() -> Result<()> {
    const EMPTY: &str = "[fd00:172::3]:50001";
    const FULL: &str = "[fd00:172::4]:50001";
    let mut full = data_path("KERNEL");
    full["circuit_breakers"] = json!({"thresholds": [{"max_connections": 1}]});
    let config = Config::new()
        .service(SIX, "dead")
        .cluster("dead", &["[fd00:9::1]:81"], data_path("KERNEL"))
        .service(EMPTY, "empty")
        .cluster("empty", &[], data_path("KERNEL"))
        .service(FULL, "full")
        .cluster("full", &[SIX_ENDPOINT], full);
    let lab = Lab::start(&config)?;
    let _upstream = Upstream::echo(Some(lab.server.netns()), SIX_ENDPOINT)?;
    lab.refused(SIX, "ECONNREFUSED")?;
    lab.refused(EMPTY, "EHOSTUNREACH")?;
    let _first = lab.client.connect(FULL)?;
    lab.refused(FULL, "ECONNREFUSED")?;
    for (service, flags) in [(SIX, "UF,URX"), (EMPTY, "UH"), (FULL, "UO")] {
        let line = lab.line(service)?;
        assert_eq!(field(&line, "flags"), flags, "{line}");
    }
    Ok(())
}

/// Filter chains and hashing by an IPv6 source.
#[test]
fn the_source_counts_over_ipv6_too() -> Result<()> {
    let chain = |name: &str, prefix: &str, len: u8| {
        json!({
            "name": name,
            "filter_chain_match": {"source_prefix_ranges": [{"address_prefix": prefix, "prefix_len": len}]},
            "filters": [tcp_proxy(name, json!({"idle_timeout": "0s"}))],
        })
    };
    let chains = json!([chain("all", "fd00:9::", 64), chain("one", "fd00:9::a", 128)]);
    let fields = json!({"bind_to_port": false, "filter_chains": chains});
    let endpoints = ["[fd00:9::1]:80", "[fd00:9::1]:81", "[fd00:9::1]:82"];
    let mut hashing = data_path("KERNEL");
    hashing["lb_policy"] = json!("MAGLEV");
    let by_source = json!({"idle_timeout": "0s", "hash_policy": [{"source_ip": {}}]});
    let mut hashing_in_proxy = hashing.clone();
    hashing_in_proxy["metadata"] = data_path("PROXY")["metadata"].clone();
    let config = Config::new()
        .listener(SIX, fields, &json!({}))
        .cluster("all", &endpoints[..1], data_path("KERNEL"))
        .cluster("one", &endpoints[1..2], data_path("KERNEL"))
        .listener(
            "[fd00:172::5]:50001",
            json!({"bind_to_port": false}),
            &tcp_proxy("hashed", by_source.clone()),
        )
        .cluster("hashed", &endpoints, hashing)
        .listener(SIX_BEHIND_PROXY, json!({"bind_to_port": false}), &tcp_proxy("proxied", by_source))
        .cluster("proxied", &endpoints, hashing_in_proxy);
    let lab = Lab::start(&config)?;
    let upstreams: Vec<_> = endpoints
        .iter()
        .map(|address| Upstream::identify(Some(lab.server.netns()), address, address))
        .collect::<Result<_>>()?;
    let listeners = lab.proxy.admin().read("/listeners")?.body;
    ensure!(listeners.matches("::data_path::kernel").count() == 2, "{listeners}");
    // Where it arrived, and whether by the app's own socket.
    let talk = |service: &str, from: &str| -> Result<(String, bool)> {
        let connect = Connect::to(service).from(&format!("[{from}]:0"));
        let stream = lab.client.connect_with(&connect).with_context(|| format!("{service} from {from}"))?;
        let local = stream.local_addr()?;
        let seen = script::run(stream, &[write("hello"), Step::ShutdownWrite, Step::ReadToEnd]);
        let straight = upstreams.iter().any(|upstream| upstream.accepted().contains(&local));
        Ok((seen.text().lines().next().unwrap_or_default().to_owned(), straight))
    };
    for (from, endpoint) in [("fd00:9::9", endpoints[0]), ("fd00:9::a", endpoints[1])] {
        assert_eq!(talk(SIX, from)?, (endpoint.to_owned(), true), "from {from}");
        let (hashed, _) = talk("[fd00:172::5]:50001", from)?;
        assert_eq!(hashed, talk(SIX_BEHIND_PROXY, from)?.0, "from {from}");
    }
    Ok(())
}

#[test]
fn connections_to_a_removed_endpoint_are_reset_over_ipv6_and_from_mapped_sockets() -> Result<()> {
    let mut fields = data_path("KERNEL");
    fields["metadata"]["typed_filter_metadata"]["tidegate.endpoint_removal"] =
        json!({"@type": "type.googleapis.com/tidegate.cluster.v1.EndpointRemoval", "action": "RESET"});
    for (listener, service, endpoint) in [(SIX, SIX, SIX_ENDPOINT), (FOUR, MAPPED, FOUR_ENDPOINT)] {
        let config = Config::new().service(listener, "foo").cluster("foo", &[], eds(fields.clone()));
        let lab = Lab::start(&config)?;
        let mut eds = Eds::new(&lab.proxy, &["foo"]);
        eds.apply(&[endpoint])?;
        let _upstream = Upstream::identify(Some(lab.server.netns()), endpoint, "a")?;
        let mut direct = lab.client.connect(endpoint)?;
        direct.set_read_timeout(Some(PATIENCE))?;
        direct.read_exact(&mut [0; 2])?;
        let (stream, _) = connect(&lab.client, service)?;
        eds.apply(&[])?;
        assert_eq!(read_error(&stream), Some(ErrorKind::ConnectionAborted), "{service}");
        assert!(is_open(&direct)?, "tidegate has nothing to do with it");
        lab.proxy.lines("access.log", "details=endpoint_removed", 1)?;
    }
    Ok(())
}
