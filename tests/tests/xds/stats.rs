//! What subscriptions to routes and virtual hosts tell in `/stats`, `/stats/prometheus` and `/config_dump`.

use std::collections::BTreeMap;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tidegate_api::discovery::Resource;
use tidegate_api::route::{RouteConfiguration, VirtualHost};
use tidegate_tests::config::http_rds;
use tidegate_tests::control_plane::{Kind, Served, resource, undecodable, wrapped};

use crate::ads::Ads;
use crate::world::{World, with_log};

const HTTP: &str = "127.0.0.1:10001";

/// The stats of one subscription: name, without the scope, to value.
fn subscription(ads: &Ads, scope: &str) -> Result<BTreeMap<String, String>> {
    let body = ads.proxy.admin().read(&format!("/stats?filter=^{}[a-z_]*$", regex_of(scope)))?.body;
    let line = |line: &str| {
        let (name, value) = line.split_once(": ").with_context(|| line.to_owned())?;
        Ok((name.strip_prefix(scope).context("of another scope")?.to_owned(), value.to_owned()))
    };
    body.lines().filter(|line| !line.is_empty()).map(line).collect()
}

fn regex_of(scope: &str) -> String {
    scope.replace('.', "[.]")
}

/// Waits until these stats of a subscription are so. Those that tell the time may be anything but 0.
fn expect(ads: &Ads, scope: &str, expected: &[(&str, &str)]) -> Result<()> {
    // A counter may come a moment after the answer on the stream.
    let last =
        |name: &str| expected.iter().find(|(it, _)| *it == name).map(|(_, value)| value.parse::<u64>());
    if let Some(Ok(success)) = last("update_success") {
        with_log(ads.proxy.wait_stat(&format!("{scope}update_success"), |it| it == success), &ads.proxy)?;
    }
    let stats = subscription(ads, scope)?;
    for (name, value) in expected {
        let found = stats.get(*name).with_context(|| format!("no {scope}{name} in {stats:?}"))?;
        ensure!(
            found == value || (*value == "time" && found.len() == 13),
            "{scope}{name}: {found}, not {value}"
        );
    }
    Ok(())
}

fn host(version: &str, domains: &[&str], cluster: &str) -> Result<Resource> {
    let host: VirtualHost = resource::from_json(&json!({
        "name": "r/any", "domains": domains,
        "routes": [{"match": {"prefix": "/"}, "route": {"cluster": cluster}}],
    }))?;
    Ok(wrapped(version, &host))
}

const RDS: &str = "http.http.rds.r.";
const VHDS: &str = "http.http.rds.vhds.r.";

#[test]
fn routes_over_a_state_of_the_world_stream() -> Result<()> {
    let mut ads = Ads::sotw()?;
    ads.proxy.wait_answering()?;
    ads.accepted(Kind::Cluster, "c1", vec![resource::cluster("a", &[World::A], json!({}))?.packed()])?;
    let http = resource::listener(HTTP, json!({}), &http_rds("r", &resource::ads()))?;
    ads.send(Kind::Listener, "l1", vec![http.packed()])?;
    ads.subscription(Kind::Route)?;
    expect(&ads, RDS, &[("update_attempt", "1"), ("update_success", "0"), ("version_text", "\"\"")])?;
    let routes = |domain: &str| resource::routes("r", &[("any", &[domain], "a")]);
    ads.accepted(Kind::Route, "r1", vec![routes("*")?.packed()])?;
    let first = [
        ("config_reload", "1"),
        ("config_reload_time_ms", "time"),
        ("init_fetch_timeout", "0"),
        ("update_attempt", "2"),
        ("update_empty", "0"),
        ("update_failure", "0"),
        ("update_rejected", "0"),
        ("update_success", "1"),
        ("update_time", "time"),
        ("version", "7014043718409226471"),
        ("version_text", "\"r1\""),
    ];
    expect(&ads, RDS, &first)?;
    assert_eq!(subscription(&ads, RDS)?.len(), first.len() + 1, "and update_duration");
    // The same again is an update, and no other configuration.
    ads.accepted(Kind::Route, "r2", vec![routes("*")?.packed()])?;
    let same = [
        ("config_reload", "1"),
        ("update_attempt", "3"),
        ("update_success", "2"),
        ("version_text", "\"r2\""),
    ];
    expect(&ads, RDS, &same)?;
    // Who is not mentioned on a stream hears nothing.
    ads.accepted(Kind::Route, "r3", vec![])?;
    expect(&ads, RDS, &same)?;
    ads.rejected(Kind::Route, "r4", vec![undecodable(Kind::Route)])?;
    let rejected = [
        ("update_attempt", "4"),
        ("update_rejected", "1"),
        ("update_success", "2"),
        ("version_text", "\"r2\""),
    ];
    expect(&ads, RDS, &rejected)?;
    ads.accepted(Kind::Route, "r5", vec![routes("a.com")?.packed()])?;
    expect(&ads, RDS, &[("config_reload", "2"), ("update_success", "3"), ("update_rejected", "1")])?;
    ads.stream.finish(14, "bye");
    with_log(ads.proxy.wait_stat("http.http.rds.r.update_failure", |failures| failures > 0), &ads.proxy)?;
    // All subscriptions have these.
    let texts = ads.proxy.admin().read("/stats?type=TextReadouts&usedonly")?.body;
    let expected = [
        "cluster_manager.cds.version_text: \"c1\"",
        "http.http.rds.r.version_text: \"r5\"",
        "listener_manager.lds.version_text: \"l1\"",
    ];
    assert_eq!(texts.lines().filter(|line| line.contains("version_text")).collect::<Vec<_>>(), expected);
    expect(
        &ads,
        "cluster_manager.cds.",
        &[("config_reload", "1"), ("update_time", "time"), ("config_reload_time_ms", "time")],
    )?;
    expect(&ads, "listener_manager.lds.", &[("update_success", "1"), ("update_time", "time")])
}

#[test]
fn routes_and_virtual_hosts_over_an_incremental_stream() -> Result<()> {
    let mut ads = Ads::delta()?;
    ads.proxy.wait_answering()?;
    let cluster = resource::eds_cluster("a", &resource::ads(), json!({}))?;
    ads.send_delta(Kind::Cluster, vec![wrapped("1", &cluster)], &[])?;
    ads.accepted_delta(Kind::Endpoints, vec![wrapped("e1", &resource::endpoints("a", &[World::A])?)], &[])?;
    let http = resource::listener(HTTP, json!({}), &http_rds("r", &resource::ads()))?;
    ads.send_delta(Kind::Listener, vec![wrapped("1", &http)], &[])?;
    let routes: RouteConfiguration = resource::from_json(&json!({
        "name": "r", "vhds": {"config_source": resource::ads()},
        "virtual_hosts": [{"name": "own", "domains": ["own.com"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "a"}}]}],
    }))?;
    ads.delta_subscription(Kind::Route)?;
    let nonce = ads.send_delta(Kind::Route, vec![wrapped("r1", &routes)], &[])?;
    ads.delta_subscription(Kind::VirtualHost)?;
    // It is no configuration yet.
    let text = format!("\"{nonce}\"");
    expect(&ads, RDS, &[("config_reload", "0"), ("update_success", "1"), ("version_text", &text)])?;
    expect(&ads, VHDS, &[("update_attempt", "1"), ("update_success", "0"), ("version_text", "\"\"")])?;
    let nonce = ads.send_delta(Kind::VirtualHost, vec![host("v1", &["*"], "a")?], &[])?;
    ads.delta_answer(Kind::VirtualHost, &nonce)?;
    ads.proxy.wait_ready()?;
    let text = format!("\"{nonce}\"");
    expect(
        &ads,
        VHDS,
        &[
            ("config_reload", "1"),
            ("init_fetch_timeout", "0"),
            ("update_attempt", "2"),
            ("update_empty", "0"),
            ("update_failure", "0"),
            ("update_rejected", "0"),
            ("update_success", "1"),
            ("update_time", "time"),
            ("version_text", &text),
        ],
    )?;
    expect(&ads, RDS, &[("config_reload", "1"), ("config_reload_time_ms", "time"), ("update_success", "1")])?;

    // The routes are shown whole, with the version of what came last.
    let dump = ads.proxy.admin().read("/config_dump?resource=dynamic_route_configs")?.body;
    let dump: Value = serde_json::from_str(&dump)?;
    let dump = &dump["configs"][0];
    assert_eq!(dump["version_info"], nonce.as_str(), "{dump:#}");
    let hosts = dump["route_config"]["virtual_hosts"].as_array().context("virtual hosts")?;
    let names: Vec<_> = hosts.iter().map(|host| &host["name"]).collect();
    assert_eq!(names, ["own", "r/any"]);
    assert_eq!(hosts[1]["domains"], json!(["*"]));

    ads.accepted_delta(Kind::VirtualHost, vec![host("v2", &["b.com"], "a")?], &[])?;
    expect(&ads, VHDS, &[("config_reload", "2"), ("update_success", "2")])?;
    let bad = Resource {
        name: "r/bad".into(),
        version: "8".into(),
        resource: Some(undecodable(Kind::VirtualHost)),
        ..Default::default()
    };
    ads.rejected_delta(Kind::VirtualHost, vec![bad], &[])?;
    expect(&ads, VHDS, &[("config_reload", "2"), ("update_success", "2"), ("update_rejected", "1")])?;
    ads.accepted_delta(Kind::VirtualHost, vec![], &["r/any"])?;
    expect(&ads, VHDS, &[("config_reload", "3"), ("update_success", "3")])?;
    expect(&ads, RDS, &[("config_reload", "3"), ("update_success", "1")])?;
    expect(&ads, "cluster.a.", &[("update_attempt", "2"), ("update_success", "1"), ("update_time", "time")])?;

    let metrics = ads.proxy.admin().read("/stats/prometheus?filter=rds&text_readouts")?.body;
    for line in [
        r#"envoy_http_rds_config_reload{envoy_rds_route_config="r",envoy_http_conn_manager_prefix="http"} 3"#,
        r#"envoy_http_rds_config_reload{envoy_rds_route_config="vhds.r",envoy_http_conn_manager_prefix="http"} 3"#,
        r#"envoy_http_rds_update_rejected{envoy_rds_route_config="vhds.r",envoy_http_conn_manager_prefix="http"} 1"#,
        "# TYPE envoy_http_rds_version_text gauge",
    ] {
        assert!(metrics.lines().any(|it| it == line), "{line} in {metrics}");
    }
    let text = "envoy_http_rds_version_text{envoy_rds_route_config=\"vhds.r\",envoy_http_conn_manager_prefix=\"http\",text_value=\"nonce-";
    assert!(metrics.lines().any(|it| it.starts_with(text)), "{text} in {metrics}");
    let name = |line: &str| line.split(['{', ' ']).next().unwrap_or_default().to_owned();
    let mut names: Vec<String> = metrics.lines().filter(|it| !it.starts_with('#')).map(name).collect();
    names.dedup();
    assert!(names.contains(&"envoy_http_rds_update_duration_count".to_owned()), "{names:?}");
    // Without VHDS there is nothing to tell of it.
    let routes = resource::routes("r", &[("any", &["*"], "a")])?;
    ads.accepted_delta(Kind::Route, vec![wrapped("r2", &routes)], &[])?;
    expect(&ads, RDS, &[("config_reload", "4"), ("update_success", "2")])?;
    assert_eq!(subscription(&ads, VHDS)?, BTreeMap::new());
    Ok(())
}
