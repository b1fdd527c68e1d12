//! The protocol, incremental, request by request over ADS.

use std::collections::BTreeMap;

use anyhow::Result;
use serde_json::json;
use tidegate_api::discovery::Resource;
use tidegate_api::route::{RouteConfiguration, VirtualHost};
use tidegate_tests::config::{http_rds, tcp_proxy};
use tidegate_tests::control_plane::resource;
use tidegate_tests::control_plane::{Kind, Method, undecodable, with_ttl, wrapped};

use crate::ads::Ads;
use crate::world::{LISTENER, State, World, with_log};

const SECOND: &str = "127.0.0.1:10001";

fn eds(version: &str, name: &str) -> Result<Resource> {
    Ok(wrapped(version, &resource::eds_cluster(name, &resource::ads(), json!({}))?))
}

fn endpoints(version: &str, name: &str, address: &str) -> Result<Resource> {
    Ok(wrapped(version, &resource::endpoints(name, &[address])?))
}

fn fixed(version: &str, name: &str, address: &str) -> Result<Resource> {
    Ok(wrapped(version, &resource::cluster(name, &[address], json!({}))?))
}

fn listener(version: &str, address: &str, cluster: &str) -> Result<Resource> {
    Ok(wrapped(version, &resource::listener(address, json!({}), &tcp_proxy(cluster, json!({})))?))
}

/// A proxy with the clusters `a` and `b` and a listener to `a`, live.
fn configured() -> Result<Ads> {
    let mut ads = Ads::delta()?;
    ads.accepted_delta(Kind::Cluster, vec![fixed("1", "a", World::A)?, fixed("1", "b", World::B)?], &[])?;
    ads.accepted_delta(Kind::Listener, vec![listener("1", LISTENER, "a")?], &[])?;
    ads.proxy.wait_ready()?;
    Ok(ads)
}

#[test]
fn p14_wildcards_subscribe_to_nothing_by_name() -> Result<()> {
    let ads = Ads::delta()?;
    let request = ads.stream.delta_request()?;
    assert_eq!(request.type_url, Kind::Cluster.type_url());
    assert!(request.resource_names_subscribe.is_empty() && request.initial_resource_versions.is_empty());
    assert!(request.node.is_some_and(|node| node.id == "test-node"));
    Ok(())
}

#[test]
fn p16_p17_p20_endpoints_are_subscribed_to_and_unsubscribed_from() -> Result<()> {
    let ads = Ads::delta()?;
    ads.send_delta(Kind::Cluster, vec![eds("1", "foo")?], &[])?;
    let request = ads.delta_subscription(Kind::Endpoints)?;
    assert_eq!(request.resource_names_subscribe, ["foo"]);
    ads.accepted_delta(Kind::Endpoints, vec![endpoints("1", "foo", World::A)?], &[])?;
    ads.send_delta(Kind::Cluster, vec![eds("1", "bar")?], &[])?;
    let request = ads.delta_subscription(Kind::Endpoints)?;
    assert_eq!((request.resource_names_subscribe, request.response_nonce.as_str()), (vec!["bar".into()], ""));
    ads.accepted_delta(Kind::Endpoints, vec![endpoints("1", "bar", World::A)?], &[])?;
    ads.send_delta(Kind::Cluster, vec![], &["foo"])?;
    let request = ads.delta_subscription(Kind::Endpoints)?;
    assert_eq!(
        (request.resource_names_unsubscribe, request.response_nonce.as_str()),
        (vec!["foo".into()], "")
    );
    Ok(())
}

#[test]
fn p24_what_is_removed_is_gone_and_the_rest_stays() -> Result<()> {
    let ads = configured()?;
    ads.accepted_delta(Kind::Listener, vec![listener("2", SECOND, "b")?], &[])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a", "what is not mentioned stays");
    ads.accepted_delta(Kind::Listener, vec![], &["127.0.0.1_10000", "never-heard-of"])?;
    with_log(ads.world.refused(LISTENER), &ads.proxy)?;
    assert_eq!(ads.world.ask(SECOND)?, "b");
    Ok(())
}

#[test]
fn p25_removed_endpoints_of_a_cluster_that_lives_are_kept() -> Result<()> {
    let mut ads = Ads::delta()?;
    ads.send_delta(Kind::Cluster, vec![eds("1", "c")?], &[])?;
    ads.accepted_delta(Kind::Endpoints, vec![endpoints("1", "c", World::A)?], &[])?;
    ads.accepted_delta(Kind::Listener, vec![listener("1", LISTENER, "c")?], &[])?;
    ads.proxy.wait_ready()?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)?;
    ads.accepted_delta(Kind::Endpoints, vec![], &["c"])?;
    assert_eq!(with_log(ads.world.ask(LISTENER), &ads.proxy)?, "a");
    Ok(())
}

#[test]
fn p29_a_bad_resource_is_rejected_alone() -> Result<()> {
    let ads = configured()?;
    let bad = resource::listener(SECOND, json!({}), &json!({"name": "x.unknown"}))?;
    let third = "127.0.0.1:10002";
    let error =
        ads.rejected_delta(Kind::Listener, vec![wrapped("2", &bad), listener("2", third, "b")?], &[])?;
    assert!(error.contains("127.0.0.1_10001") && !error.contains("127.0.0.1_10002"), "{error}");
    with_log(ads.world.reaches(third, "b"), &ads.proxy)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    // Of several each is named.
    let bad = |address: &str| -> Result<Resource> {
        Ok(wrapped("3", &resource::listener(address, json!({}), &json!({"name": "x.unknown"}))?))
    };
    let listeners = vec![bad("127.0.0.1:10003")?, listener("3", third, "a")?, bad("127.0.0.1:10004")?];
    let error = ads.rejected_delta(Kind::Listener, listeners, &[])?;
    assert!(error.contains("127.0.0.1_10003") && error.contains("127.0.0.1_10004"), "{error}");
    assert!(!error.contains("127.0.0.1_10002"), "{error}");
    with_log(ads.world.reaches(third, "a"), &ads.proxy)?;
    let eds = |name: &str| -> Result<Resource> {
        Ok(wrapped("3", &resource::cluster(name, &[], json!({"type": "EDS", "load_assignment": null}))?))
    };
    let clusters = vec![eds("bad-1")?, fixed("3", "c", World::A)?, eds("bad-2")?, eds("bad-3")?];
    let error = ads.rejected_delta(Kind::Cluster, clusters, &[])?;
    for name in ["bad-1", "bad-2", "bad-3"] {
        assert!(error.contains(name), "{name}: {error}");
    }
    Ok(())
}

#[test]
fn p46_p47_the_stream_comes_back_with_the_versions_that_hold() -> Result<()> {
    let mut ads = configured()?;
    ads.accepted_delta(Kind::Listener, vec![listener("2", SECOND, "b")?], &[])?;
    ads.accepted_delta(Kind::Listener, vec![], &["127.0.0.1_10001"])?;
    let broken = Resource {
        name: "127.0.0.1_10007".into(),
        version: "7".into(),
        resource: Some(undecodable(Kind::Listener)),
        ..Resource::default()
    };
    ads.rejected_delta(Kind::Listener, vec![broken], &[])?;
    ads.plane.stop();
    ads.stream.ended()?;
    ads.plane.restart()?;
    let stream = ads.plane.stream(Method::DELTA_ADS)?;
    ads.replace_stream(stream);
    let versions = |list: &[(&str, &str)]| -> BTreeMap<String, String> {
        list.iter().map(|(name, version)| ((*name).to_owned(), (*version).to_owned())).collect()
    };
    let clusters = ads.delta_subscription(Kind::Cluster)?;
    assert_eq!(
        clusters.initial_resource_versions.into_iter().collect::<BTreeMap<_, _>>(),
        versions(&[("a", "1"), ("b", "1")])
    );
    assert!(clusters.resource_names_subscribe.is_empty() && clusters.response_nonce.is_empty());
    let listeners = ads.delta_subscription(Kind::Listener)?;
    assert_eq!(
        listeners.initial_resource_versions.into_iter().collect::<BTreeMap<_, _>>(),
        versions(&[("127.0.0.1_10000", "1")])
    );
    ads.accepted_delta(Kind::Cluster, vec![], &[])?;
    ads.accepted_delta(Kind::Listener, vec![], &[])?;
    assert_eq!(with_log(ads.world.ask(LISTENER), &ads.proxy)?, "a");
    Ok(())
}

#[test]
fn p28_a_wrapper_with_another_name_is_rejected_alone() -> Result<()> {
    let ads = configured()?;
    let mut other = listener("2", SECOND, "b")?;
    other.name = "something-else".into();
    let third = "127.0.0.1:10002";
    let error = ads.rejected_delta(Kind::Listener, vec![other, listener("2", third, "b")?], &[])?;
    assert!(error.contains("something-else"), "{error}");
    with_log(ads.world.reaches(third, "b"), &ads.proxy)?;
    with_log(ads.world.refused(SECOND), &ads.proxy)
}

#[test]
fn p49_p50_a_resource_lives_as_long_as_its_heart_beats() -> Result<()> {
    let ads = configured()?;
    let mortal = |address: &str| -> Result<Resource> {
        let resource = listener("2", address, "b")?;
        Ok(with_ttl(&resource.name, "2", resource.resource, 2000))
    };
    let third = "127.0.0.1:10002";
    ads.accepted_delta(Kind::Listener, vec![mortal(SECOND)?, mortal(third)?], &[])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    with_log(ads.world.reaches(third, "b"), &ads.proxy)?;
    // The third one gets no heartbeat: when it is gone, so would be the second.
    while ads.world.ask(third).is_ok() {
        let beat = with_ttl("127.0.0.1_10001", "2", None, 2000);
        ads.accepted_delta(Kind::Listener, vec![beat], &[])?;
    }
    assert_eq!(with_log(ads.world.ask(SECOND), &ads.proxy)?, "b");
    with_log(ads.world.refused(SECOND), &ads.proxy)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a", "what has no TTL stays");
    Ok(())
}

#[test]
fn p56_virtual_hosts_come_by_themselves() -> Result<()> {
    let ads = configured()?;
    let http = resource::listener(SECOND, json!({}), &http_rds("r", &resource::ads()))?;
    ads.send_delta(Kind::Listener, vec![wrapped("2", &http)], &[])?;
    let routes: RouteConfiguration =
        resource::from_json(&json!({"name": "r", "vhds": {"config_source": resource::ads()}}))?;
    assert_eq!(ads.delta_subscription(Kind::Route)?.resource_names_subscribe, ["r"]);
    ads.send_delta(Kind::Route, vec![wrapped("1", &routes)], &[])?;
    let host = |version: &str, cluster: &str| -> Result<Resource> {
        let host: VirtualHost = resource::from_json(&json!({
            "name": "r/any", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
        }))?;
        Ok(wrapped(version, &host))
    };
    ads.accepted_delta(Kind::VirtualHost, vec![host("1", "a")?], &[])?;
    with_log(ads.world.reaches(SECOND, "a"), &ads.proxy)?;
    let mut live = ads.world.connect(SECOND)?;
    assert_eq!(live.name()?, "a");
    ads.accepted_delta(Kind::VirtualHost, vec![host("2", "b")?], &[])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    assert_eq!(live.state()?, State::Open);
    Ok(())
}

/// An incremental server has to say what it has removed meanwhile.
#[test]
fn p48_a_server_that_comes_back_with_less_says_what_it_removed() -> Result<()> {
    let mut ads = configured()?;
    ads.accepted_delta(Kind::Listener, vec![listener("2", SECOND, "b")?], &[])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    ads.plane.restart()?;
    let stream = ads.plane.stream(Method::DELTA_ADS)?;
    ads.replace_stream(stream);
    ads.accepted_delta(Kind::Listener, vec![listener("3", LISTENER, "b")?], &[])?;
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)?;
    assert_eq!(ads.world.ask(SECOND)?, "b", "what is not mentioned stays");
    ads.accepted_delta(Kind::Listener, vec![], &["127.0.0.1_10001"])?;
    with_log(ads.world.refused(SECOND), &ads.proxy)
}

/// The wildcard of virtual hosts next to names of other kinds: both come back with the stream, each as it was, and what the
/// server then removes or repeats decides.
#[test]
fn p21_wildcards_and_names_come_back_with_the_stream() -> Result<()> {
    let mut ads = configured()?;
    let http = resource::listener(SECOND, json!({}), &http_rds("r", &resource::ads()))?;
    ads.send_delta(Kind::Listener, vec![wrapped("2", &http)], &[])?;
    assert_eq!(ads.delta_subscription(Kind::Route)?.resource_names_subscribe, ["r"]);
    let routes: RouteConfiguration =
        resource::from_json(&json!({"name": "r", "vhds": {"config_source": resource::ads()}}))?;
    ads.send_delta(Kind::Route, vec![wrapped("1", &routes)], &[])?;
    let host: VirtualHost = resource::from_json(&json!({
        "name": "r/any", "domains": ["*"], "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}],
    }))?;
    let first = ads.delta_subscription(Kind::VirtualHost)?;
    assert!(first.initial_resource_versions.is_empty());
    ads.accepted_delta(Kind::VirtualHost, vec![wrapped("1", &host)], &[])?;
    with_log(ads.world.reaches(SECOND, "a"), &ads.proxy)?;
    ads.plane.restart()?;
    let stream = ads.plane.stream(Method::DELTA_ADS)?;
    ads.replace_stream(stream);
    assert_eq!(ads.delta_subscription(Kind::Route)?.resource_names_subscribe, ["r"]);
    let again = ads.delta_subscription(Kind::VirtualHost)?;
    assert_eq!(again.resource_names_subscribe, first.resource_names_subscribe, "the wildcard, as before");
    let versions: Vec<_> = again.initial_resource_versions.into_iter().collect();
    assert_eq!(versions, [("r/any".to_owned(), "1".to_owned())]);
    assert_eq!(ads.world.ask(SECOND)?, "a");
    ads.accepted_delta(Kind::VirtualHost, vec![], &["r/any"])?;
    // No host is left: it ends without a word from an upstream.
    with_log(ads.world.connect(SECOND)?.end(), &ads.proxy).map(drop)
}
