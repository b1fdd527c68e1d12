//! The protocol, state of the world, request by request over ADS.

use anyhow::Result;
use serde_json::{Value, json};
use tidegate_api::wkt::Any;
use tidegate_tests::config::{http_rds, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport};
use tidegate_tests::control_plane::{Kind, Method, Served, packed_wrapper, response, undecodable, with_ttl};

use crate::ads::Ads;
use crate::world::{LISTENER, State, World, with_log};

const SECOND: &str = "127.0.0.1:10001";

fn eds(name: &str) -> Result<Any> {
    Ok(resource::eds_cluster(name, &resource::ads(), json!({}))?.packed())
}

fn endpoints(name: &str, address: &str) -> Result<Any> {
    Ok(resource::endpoints(name, &[address])?.packed())
}

fn fixed(name: &str, address: &str) -> Result<Any> {
    Ok(resource::cluster(name, &[address], json!({}))?.packed())
}

fn listener(address: &str, cluster: &str) -> Result<Any> {
    Ok(resource::listener(address, json!({}), &tcp_proxy(cluster, json!({})))?.packed())
}

/// A proxy with the clusters `a` and `b` and a listener to `a`, live.
fn configured() -> Result<Ads> {
    let mut ads = Ads::sotw()?;
    ads.accepted(Kind::Cluster, "1", vec![fixed("a", World::A)?, fixed("b", World::B)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "a")?])?;
    ads.proxy.wait_ready()?;
    Ok(ads)
}

#[test]
fn p1_p2_p14_the_first_request() -> Result<()> {
    let ads = Ads::sotw()?;
    let request = ads.stream.request()?;
    let node = request.node.unwrap_or_default();
    assert_eq!((node.id.as_str(), node.cluster.as_str()), ("test-node", "test-cluster"));
    assert!(!node.user_agent_name.is_empty() && node.user_agent_version_type.is_some(), "{node:?}");
    assert_eq!(request.type_url, Kind::Cluster.type_url());
    let nothing =
        (request.version_info, request.response_nonce, request.resource_names, request.error_detail);
    assert_eq!(nothing, (String::new(), String::new(), Vec::new(), None));
    Ok(())
}

#[test]
fn p1_the_node_goes_out_once_when_that_is_asked_for() -> Result<()> {
    let world = World::new()?;
    let plane = tidegate_tests::control_plane::ControlPlane::start(Some(&world.netns))?;
    let mut bootstrap = Transport::Ads.bootstrap(plane.address());
    bootstrap["dynamic_resources"]["ads_config"]["set_node_on_first_message_only"] = json!(true);
    let setup = tidegate_tests::proxy::Setup::new(&format!("{bootstrap:#}"));
    let _proxy = setup.netns(&world.netns).spawn()?;
    let stream = plane.stream(Method::ADS)?;
    assert!(stream.request()?.node.is_some());
    for version in ["1", "2"] {
        stream.send(&tidegate_tests::control_plane::response(Kind::Cluster, version, version, vec![]));
        let request = stream.request_for(Kind::Cluster)?;
        assert_eq!((request.response_nonce.as_str(), request.node), (version, None));
    }
    Ok(())
}

#[test]
fn p3_p4_p5_p7_versions_and_nonces() -> Result<()> {
    let ads = Ads::sotw()?;
    ads.accepted(Kind::Cluster, "1", vec![fixed("a", World::A)?])?;
    let bad = json!({"name": "bad", "type": "STATIC", "connect_timeout": "0s"});
    let bad = resource::from_json::<tidegate_api::cluster::Cluster>(&bad)?.packed();
    let (version, error) = ads.rejected(Kind::Cluster, "2", vec![fixed("a", World::A)?, bad])?;
    assert_eq!(version, "1", "a NACK has the version that holds");
    assert!(error.contains("connect_timeout") || error.contains("ConnectTimeout"), "{error}");
    ads.accepted(Kind::Cluster, "3", vec![fixed("a", World::A)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "a")?])?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)?;
    // The same version with other content.
    ads.accepted(Kind::Cluster, "3", vec![fixed("a", World::B)?])?;
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)
}

#[test]
fn p8_p9_p10_nothing_of_a_broken_response_applies() -> Result<()> {
    let ads = configured()?;
    let broken = [
        vec![fixed("a", World::B)?, listener(LISTENER, "a")?],
        vec![fixed("a", World::B)?, undecodable(Kind::Cluster)],
        vec![fixed("a", World::B)?, fixed("a", World::B)?],
    ];
    for (index, resources) in broken.into_iter().enumerate() {
        let (version, error) = ads.rejected(Kind::Cluster, &format!("bad-{index}"), resources)?;
        assert_eq!(version, "1", "{error}");
        assert_eq!(with_log(ads.world.ask(LISTENER), &ads.proxy)?, "a", "{error}");
    }
    let (version, _) = ads.rejected(Kind::Listener, "bad", vec![undecodable(Kind::Listener)])?;
    assert_eq!(version, "1");
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    Ok(())
}

#[test]
fn p15_p16_p17_p18_endpoints_are_asked_for_by_name() -> Result<()> {
    let ads = Ads::sotw()?;
    let named = json!({"eds_cluster_config": {"service_name": "foo-svc"}});
    let foo = resource::eds_cluster("foo", &resource::ads(), named)?.packed();
    ads.send(Kind::Cluster, "1", vec![foo.clone()])?;
    let request = ads.subscription(Kind::Endpoints)?;
    assert_eq!(request.resource_names, ["foo-svc"]);
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("foo-svc", World::A)?])?;
    ads.send(Kind::Cluster, "2", vec![foo, eds("bar")?])?;
    let request = ads.subscription(Kind::Endpoints)?;
    assert_eq!(request.resource_names, ["bar", "foo-svc"]);
    assert_eq!(request.version_info, "1");
    ads.accepted(Kind::Endpoints, "2", vec![endpoints("foo-svc", World::A)?, endpoints("bar", World::A)?])?;
    ads.send(Kind::Cluster, "3", vec![eds("bar")?])?;
    assert_eq!(ads.subscription(Kind::Endpoints)?.resource_names, ["bar"]);
    ads.send(Kind::Cluster, "4", vec![])?;
    // None, which after names does not mean all.
    assert!(ads.subscription(Kind::Endpoints)?.resource_names.is_empty());
    Ok(())
}

#[test]
fn p19_what_nobody_asked_for_is_ignored_and_acknowledged() -> Result<()> {
    let ads = Ads::sotw()?;
    ads.send(Kind::Cluster, "1", vec![eds("c")?])?;
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("c", World::A)?, endpoints("x", World::B)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?])?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)
}

#[test]
fn p22_what_is_not_in_a_state_of_the_world_is_gone() -> Result<()> {
    let ads = configured()?;
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "a")?, listener(SECOND, "b")?])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    ads.accepted(Kind::Listener, "3", vec![listener(SECOND, "b")?])?;
    with_log(ads.world.refused(LISTENER), &ads.proxy)?;
    ads.accepted(Kind::Cluster, "2", vec![fixed("a", World::A)?])?;
    ads.world.connect(SECOND)?.end()?;
    ads.proxy.lines("proxy.log", "flags=NC", 1)?;
    ads.accepted(Kind::Listener, "4", vec![])?;
    with_log(ads.world.refused(SECOND), &ads.proxy)
}

#[test]
fn p23_endpoints_that_are_not_in_a_response_stay() -> Result<()> {
    let ads = Ads::sotw()?;
    ads.send(Kind::Cluster, "1", vec![eds("c")?, eds("d")?])?;
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("c", World::A)?, endpoints("d", World::A)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?, listener(SECOND, "d")?])?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)?;
    ads.accepted(Kind::Endpoints, "2", vec![endpoints("d", World::B)?])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    ads.accepted(Kind::Endpoints, "3", vec![])?;
    assert_eq!((ads.world.ask(LISTENER)?, ads.world.ask(SECOND)?), ("a".into(), "b".into()));
    Ok(())
}

#[test]
fn p29_a_bad_resource_is_rejected_alone() -> Result<()> {
    let ads = configured()?;
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "a")?, listener(SECOND, "a")?])?;
    with_log(ads.world.reaches(SECOND, "a"), &ads.proxy)?;
    // The second one is changed for the worse, a third one is good; nothing is said of the first.
    let bad = json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "s"}});
    let bad = resource::listener(SECOND, json!({}), &bad)?.packed();
    let third = "127.0.0.1:10002";
    let (version, error) = ads.rejected(Kind::Listener, "3", vec![bad, listener(third, "b")?])?;
    assert_eq!(version, "2");
    assert!(error.contains("127.0.0.1_10001"), "{error}");
    assert!(!error.contains("127.0.0.1_10000") && !error.contains("127.0.0.1_10002"), "{error}");
    with_log(ads.world.reaches(third, "b"), &ads.proxy)?;
    with_log(ads.world.refused(LISTENER), &ads.proxy)?;
    assert_eq!(ads.world.ask(SECOND)?, "a", "what was accepted of it serves on");
    // Of several each is named.
    let bad = |address: &str| -> Result<Any> {
        Ok(resource::listener(address, json!({}), &json!({"name": "x.unknown"}))?.packed())
    };
    let listeners = vec![bad("127.0.0.1:10003")?, listener(third, "b")?, bad("127.0.0.1:10004")?];
    let (_, error) = ads.rejected(Kind::Listener, "4", listeners)?;
    assert!(error.contains("127.0.0.1_10003") && error.contains("127.0.0.1_10004"), "{error}");
    assert!(!error.contains("127.0.0.1_10002"), "{error}");
    let eds = |name: &str| -> Result<Any> {
        Ok(resource::cluster(name, &[], json!({"type": "EDS", "load_assignment": null}))?.packed())
    };
    let clusters =
        vec![eds("bad-1")?, fixed("a", World::A)?, eds("bad-2")?, fixed("b", World::B)?, eds("bad-3")?];
    let (_, error) = ads.rejected(Kind::Cluster, "2", clusters)?;
    for name in ["bad-1", "bad-2", "bad-3"] {
        assert!(error.contains(name), "{name}: {error}");
    }
    assert_eq!(ads.world.ask(third)?, "b");
    Ok(())
}

#[test]
fn p31_a_listener_may_come_before_its_cluster() -> Result<()> {
    let ads = configured()?;
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "later")?])?;
    ads.world.connect(LISTENER)?.end()?;
    ads.proxy.lines("proxy.log", "flags=NC", 1)?;
    ads.accepted(Kind::Cluster, "2", vec![fixed("later", World::B)?])?;
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)
}

#[test]
fn p32_unknown_filters_are_refused() -> Result<()> {
    let ads = configured()?;
    let unknown: Value = json!({"name": "x.unknown"});
    let mut message = resource::listener(SECOND, json!({}), &unknown)?;
    let typed = Any { type_url: "type.googleapis.com/does.not.Exist".into(), value: vec![] };
    use tidegate_api::listener::filter::ConfigType;
    message.filter_chains[0].filters[0].config_type = Some(ConfigType::TypedConfig(typed));
    let (_, error) = ads.rejected(Kind::Listener, "2", vec![listener(LISTENER, "a")?, message.packed()])?;
    assert!(error.contains("127.0.0.1_10001") && error.contains("x.unknown"), "{error}");
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    Ok(())
}

#[test]
fn p34_p38_clusters_first_then_their_endpoints_then_listeners() -> Result<()> {
    let mut ads = Ads::sotw()?;
    // Whatever comes before the endpoints do: it is not listeners.
    let until = |kind: Kind| -> Result<()> {
        loop {
            let request = ads.stream.request()?;
            assert_ne!(request.type_url, Kind::Listener.type_url(), "listeners before the clusters are warm");
            if request.type_url == kind.type_url() {
                ads.note_subscribed(kind);
                return Ok(());
            }
        }
    };
    until(Kind::Cluster)?;
    ads.send(Kind::Cluster, "1", vec![eds("c")?])?;
    until(Kind::Endpoints)?;
    ads.proxy.wait_answering()?;
    assert_eq!(ads.proxy.admin().read("/ready")?.status, 503);
    let endpoints = ads.send(Kind::Endpoints, "1", vec![endpoints("c", World::A)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?])?;
    assert!(ads.answer(Kind::Endpoints, &endpoints)?.error.is_none());
    ads.proxy.wait_ready()?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)
}

/// An EDS cluster that waits no longer than a second.
fn impatient(name: &str) -> Result<Any> {
    let mut source = resource::ads();
    source["initial_fetch_timeout"] = json!("1s");
    Ok(resource::eds_cluster(name, &source, json!({}))?.packed())
}

#[test]
fn p35_p36_endpoints_that_don_t_come_hold_nobody_up_for_ever() -> Result<()> {
    let mut ads = Ads::sotw()?;
    ads.send(Kind::Cluster, "1", vec![impatient("c")?])?;
    assert_eq!(ads.subscription(Kind::Endpoints)?.resource_names, ["c"]);
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?])?;
    ads.proxy.wait_ready()?;
    ads.world.connect(LISTENER)?.end()?;
    ads.proxy.lines("proxy.log", "flags=UH", 1)?;
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("c", World::A)?])?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)
}

#[test]
fn p37_a_changed_cluster_takes_over_when_it_is_warm() -> Result<()> {
    let mut ads = Ads::sotw()?;
    ads.send(Kind::Cluster, "1", vec![eds("c")?])?;
    assert_eq!(ads.subscription(Kind::Endpoints)?.resource_names, ["c"]);
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("c", World::A)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?])?;
    ads.proxy.wait_ready()?;
    with_log(ads.world.reaches(LISTENER, "a"), &ads.proxy)?;
    let elsewhere = json!({"eds_cluster_config": {"service_name": "elsewhere"}});
    let changed = resource::eds_cluster("c", &resource::ads(), elsewhere)?;
    let nonce = ads.send(Kind::Cluster, "2", vec![changed.packed()])?;
    // Which of the names are in the requests meanwhile is the client's affair; the new one must be.
    while !ads.subscription(Kind::Endpoints)?.resource_names.contains(&"elsewhere".to_owned()) {}
    assert_eq!(ads.world.ask(LISTENER)?, "a", "the old cluster serves meanwhile");
    ads.accepted(Kind::Endpoints, "2", vec![endpoints("elsewhere", World::B)?])?;
    assert!(ads.answer(Kind::Cluster, &nonce)?.error.is_none());
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)
}

/// Unlike in Envoy, which asks for the endpoints again and waits for them.
#[test]
fn p37_endpoints_that_are_known_hold_for_a_changed_cluster_at_once() -> Result<()> {
    let mut ads = Ads::sotw()?;
    ads.send(Kind::Cluster, "1", vec![eds("c")?])?;
    ads.accepted(Kind::Endpoints, "1", vec![endpoints("c", World::A)?])?;
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "c")?])?;
    ads.proxy.wait_ready()?;
    let changed = resource::eds_cluster("c", &resource::ads(), json!({"connect_timeout": "3s"}))?;
    ads.accepted(Kind::Cluster, "2", vec![changed.packed()])?;
    assert_eq!(with_log(ads.world.ask(LISTENER), &ads.proxy)?, "a");
    Ok(())
}

#[test]
fn p39_a_listener_waits_for_its_routes() -> Result<()> {
    let ads = configured()?;
    let http = resource::listener(SECOND, json!({}), &http_rds("r", &resource::ads()))?.packed();
    ads.send(Kind::Listener, "2", vec![listener(LISTENER, "a")?, http])?;
    assert_eq!(ads.subscription(Kind::Route)?.resource_names, ["r"]);
    // The routes of the one don't hold up the other.
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    let routes = resource::routes("r", &[("any", &["*"], "b")])?.packed();
    ads.accepted(Kind::Route, "1", vec![routes])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    // Other routes take effect for new connections, and touch no old one.
    let mut live = ads.world.connect(SECOND)?;
    assert_eq!(live.name()?, "b");
    let routes = resource::routes("r", &[("any", &["*"], "a")])?.packed();
    ads.accepted(Kind::Route, "2", vec![routes])?;
    with_log(ads.world.reaches(SECOND, "a"), &ads.proxy)?;
    assert_eq!(live.state()?, State::Open);
    Ok(())
}

#[test]
fn p43_p44_p45_the_stream_comes_back_with_what_was_accepted() -> Result<()> {
    let mut ads = configured()?;
    let mut live = ads.world.connect(LISTENER)?;
    assert_eq!(live.name()?, "a");
    ads.rejected(Kind::Listener, "bad", vec![undecodable(Kind::Listener)])?;
    ads.plane.stop();
    ads.stream.ended()?;
    assert_eq!(live.state()?, State::Open);
    ads.proxy.wait_stat("cluster.xds_cluster.upstream_cx_connect_fail", |count| count > 0)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    ads.plane.restart()?;
    let stream = ads.plane.stream(Method::ADS)?;
    ads.replace_stream(stream);
    for kind in [Kind::Cluster, Kind::Listener] {
        let request = ads.subscription(kind)?;
        assert_eq!((request.version_info.as_str(), request.response_nonce.as_str()), ("1", ""), "{kind:?}");
        assert!(request.error_detail.is_none());
    }
    // What the server has lost meanwhile is gone.
    ads.accepted(Kind::Listener, "9", vec![listener(SECOND, "b")?])?;
    with_log(ads.world.refused(LISTENER), &ads.proxy)?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)
}

#[test]
fn p43_streams_that_end_in_every_way_come_back() -> Result<()> {
    let mut ads = configured()?;
    for way in ["status", "reset", "go away", "garbage"] {
        let ended = match way {
            "status" => {
                ads.stream.finish(14, "going");
                ads.plane.stream(Method::ADS)?
            }
            "reset" => {
                ads.stream.reset();
                ads.plane.stream(Method::ADS)?
            }
            "go away" => {
                ads.plane.go_away();
                ads.stream.finish(0, "");
                ads.plane.restart()?;
                ads.plane.stream(Method::ADS)?
            }
            _ => {
                ads.stream.send_message(&[0xff; 7]);
                ads.plane.stream(Method::ADS)?
            }
        };
        ads.replace_stream(ended);
        let request = ads.stream.request_for(Kind::Cluster)?;
        assert_eq!((request.version_info.as_str(), request.response_nonce.as_str()), ("1", ""), "{way}");
        assert_eq!(ads.world.ask(LISTENER)?, "a", "{way}");
    }
    Ok(())
}

#[test]
fn p30_a_broken_rule_of_the_api_spoils_the_response() -> Result<()> {
    let ads = configured()?;
    let zero = resource::from_json::<tidegate_api::cluster::Cluster>(
        &json!({"name": "zero", "type": "STATIC", "connect_timeout": "0s"}),
    )?;
    ads.rejected(Kind::Cluster, "2", vec![fixed("a", World::B)?, zero.packed()])?;
    assert_eq!(ads.world.ask(LISTENER)?, "a", "not even the good ones apply");
    Ok(())
}

/// Envoy 1.40 takes a heartbeat for a response without resources, and removes all of them.
#[test]
fn p49_p50_a_resource_lives_as_long_as_its_heart_beats() -> Result<()> {
    let ads = configured()?;
    let mortal = |address: &str| -> Result<Any> {
        let name = address.replace(':', "_");
        Ok(packed_wrapper(&with_ttl(&name, "1", Some(listener(address, "b")?), 2000)))
    };
    let third = "127.0.0.1:10002";
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "a")?, mortal(SECOND)?, mortal(third)?])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    with_log(ads.world.reaches(third, "b"), &ads.proxy)?;
    // The third one gets no heartbeat: when it is gone, so would be the second.
    while ads.world.ask(third).is_ok() {
        let beat = packed_wrapper(&with_ttl("127.0.0.1_10001", "1", None, 2000));
        ads.accepted(Kind::Listener, "2", vec![beat])?;
    }
    assert_eq!(with_log(ads.world.ask(SECOND), &ads.proxy)?, "b");
    assert_eq!(ads.world.ask(LISTENER)?, "a", "a heartbeat is no state of the world");
    with_log(ads.world.refused(SECOND), &ads.proxy)?;
    assert_eq!(ads.world.ask(LISTENER)?, "a");
    Ok(())
}

/// The clock is the proxy's own: the life of a listener. Envoy 1.40 sends as many rejections as the server sends responses.
#[test]
fn p6_a_server_that_repeats_itself_is_not_answered_as_often() -> Result<()> {
    let ads = configured()?;
    let mortal = with_ttl("127.0.0.1_10001", "2", Some(listener(SECOND, "b")?), 2000);
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "a")?, packed_wrapper(&mortal)])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    let mut rejections = 0;
    while ads.world.ask(SECOND).is_ok() {
        let (version, _) = ads.rejected(Kind::Cluster, "bad", vec![undecodable(Kind::Cluster)])?;
        assert_eq!(version, "1");
        rejections += 1;
    }
    // Ten at once, then ten a second, for two seconds.
    assert!((5..=40).contains(&rejections), "{rejections} rejections");
    assert_eq!(with_log(ads.world.ask(LISTENER), &ads.proxy)?, "a", "what was accepted serves on");
    assert!(ads.proxy.stat("control_plane.rate_limit_enforced")? > 0);
    ads.accepted(Kind::Cluster, "2", vec![fixed("a", World::B)?])?;
    ads.proxy.wait_stat("control_plane.pending_requests", |pending| pending == 0)?;
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)
}

#[test]
fn p11_what_is_of_no_kind_that_was_asked_for_disturbs_nobody() -> Result<()> {
    let ads = configured()?;
    ads.stream.send(&response(Kind::Secret, "1", "unwanted", vec![]));
    let mut unknown = response(Kind::Cluster, "1", "unknown", vec![undecodable(Kind::Cluster)]);
    unknown.type_url = "type.googleapis.com/no.such.Type".into();
    ads.stream.send(&unknown);
    ads.accepted(Kind::Cluster, "2", vec![fixed("a", World::B)?])?;
    with_log(ads.world.reaches(LISTENER, "b"), &ads.proxy)?;
    let unread = ads.stream.unread();
    assert!(unread.is_empty(), "nobody is told of what nobody asked for: {unread:?}");
    assert!(ads.plane.untaken_streams().is_empty(), "the stream stays up");
    Ok(())
}

#[test]
fn p12_p13_kinds_and_responses_don_t_wait_for_each_other() -> Result<()> {
    let ads = configured()?;
    // Of each kind two, before the first answer is read.
    let clusters = |extra: &str| -> Result<Vec<Any>> { Ok(vec![fixed("a", World::A)?, eds(extra)?]) };
    let sent = [
        (Kind::Cluster, "c2", ads.send(Kind::Cluster, "c2", clusters("e")?)?),
        (Kind::Listener, "l2", ads.send(Kind::Listener, "l2", vec![listener(LISTENER, "a")?])?),
        (Kind::Cluster, "c3", ads.send(Kind::Cluster, "c3", clusters("f")?)?),
        (Kind::Listener, "l3", ads.send(Kind::Listener, "l3", vec![listener(SECOND, "a")?])?),
    ];
    for (kind, version, nonce) in sent {
        let answer = ads.answer(kind, &nonce)?;
        assert!(answer.error.is_none() && answer.version == version, "{kind:?} {version}: {answer:?}");
    }
    // Endpoints were asked for, and asked for again, though nobody has answered.
    while ads.subscription(Kind::Endpoints)?.resource_names != ["f"] {}
    let nonce = ads.send(Kind::Endpoints, "e1", vec![endpoints("f", World::A)?])?;
    assert_eq!(ads.answer(Kind::Endpoints, &nonce)?.version, "e1");
    with_log(ads.world.reaches(SECOND, "a"), &ads.proxy)
}

#[test]
fn p48_a_server_that_comes_back_with_less_has_removed_the_rest() -> Result<()> {
    let mut ads = configured()?;
    ads.accepted(Kind::Listener, "2", vec![listener(LISTENER, "a")?, listener(SECOND, "b")?])?;
    with_log(ads.world.reaches(SECOND, "b"), &ads.proxy)?;
    ads.plane.restart()?;
    let stream = ads.plane.stream(Method::ADS)?;
    ads.replace_stream(stream);
    // Until it has said something, all holds.
    assert_eq!(ads.world.ask(SECOND)?, "b");
    ads.accepted(Kind::Listener, "1", vec![listener(LISTENER, "a")?])?;
    with_log(ads.world.refused(SECOND), &ads.proxy)?;
    ads.accepted(Kind::Cluster, "1", vec![fixed("b", World::B)?])?;
    ads.world.connect(LISTENER)?.end()?;
    ads.proxy.lines("proxy.log", "flags=NC", 1).map(drop)
}
