//! Control planes that we did not write.

use anyhow::Result;
use serde_json::json;
use tidegate_tests::config::{self, socket_address};
use tidegate_tests::node::Node;
use tidegate_tests::program;
use tidegate_tests::proxy::Setup;
use tidegate_tests::script::{End, Step, write};
use tidegate_tests::sovereign::{Sovereign, python};
use tidegate_tests::upstream::Upstream;

use crate::world::with_log;

const SERVICE: &str = "172.16.0.1:50001";
const PORT: u16 = 8080;

/// The seed's foo-service by sovereign over REST: its listener as it is, its cluster with EDS, its endpoints where
/// this node has them. A pod's connects are captured as soon as the listener came.
#[test]
fn sovereign_serves_the_seed_s_foo_service() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1", "10.9.0.2"])?;
    let _a = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "a")?;
    let _b = Upstream::identify(Some(server.netns()), "10.9.0.2:80", "b")?;
    let seed = python(&program::repository().join("config/seed-outbound.yaml"));
    let read = format!("import json, yaml\nseed = yaml.safe_load(open({seed}))[\"static_resources\"]\n");
    let source = json!({"api_config_source": {
        "api_type": "REST", "transport_api_version": "V3", "cluster_names": ["sovereign"],
        "refresh_delay": "0.1s", "request_timeout": "10s"}, "resource_api_version": "V3"});
    let clusters = read.clone()
        + &format!("source = json.loads({:?})\n", source.to_string())
        + "def call(**kwargs):
    foo = dict(seed['clusters'][0], type='EDS', eds_cluster_config={'eds_config': source})
    del foo['load_assignment']
    return [foo]
";
    let endpoints = read.clone()
        + "def call(**kwargs):
    return [{'cluster_name': seed['clusters'][0]['name'], 'endpoints': json.load(open(DIR + '/endpoints.json'))}]
";
    let listeners = read
        + "def call(**kwargs):\n    return json.load(open(DIR + '/listeners.json')) + seed['listeners'][:1]\n";
    let sovereign = Sovereign::start(&node.netns, PORT, [&clusters, &endpoints, &listeners])?;
    let at = |address: &str| json!([{"lb_endpoints": [{"endpoint": {"address": socket_address(address)}}]}]);
    sovereign.write("endpoints.json", &at("10.9.0.1:80"))?;
    sovereign.write("listeners.json", &json!([]))?;
    let bootstrap = json!({
        "admin": {"address": socket_address("127.0.0.1:0")},
        "node": {"id": "node-1", "cluster": "foo"}, // sovereign answers 422 without a cluster
        "dynamic_resources": {"lds_config": source, "cds_config": source},
        "static_resources": {"clusters": [
            config::cluster("sovereign", &[&sovereign.address().to_string()], json!({}))]},
    });
    let setup = Setup::new(&format!("{bootstrap:#}")).netns(&node.netns);
    let proxy = setup.pods(node.network.cgroup().path()).start()?;
    let ask = || -> Result<String> {
        let outcome = tidegate_tests::client::run(
            client.connect(SERVICE),
            &[write("hi"), Step::ShutdownWrite, Step::ReadToEnd],
        );
        match outcome {
            tidegate_tests::client::Outcome::Connected(seen) if seen.end == End::Fin => Ok(seen.text()),
            other => anyhow::bail!("{other:?}"),
        }
    };
    assert_eq!(with_log(ask(), &proxy)?, "a\nhi");
    // Endpoints elsewhere.
    sovereign.write("endpoints.json", &at("10.9.0.2:80"))?;
    let deadline = std::time::Instant::now() + tidegate_tests::proxy::PATIENCE;
    while with_log(ask(), &proxy)? != "b\nhi" {
        assert!(std::time::Instant::now() < deadline, "{}", proxy.log_tail());
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    // A listener that can't be is rejected, and takes nothing with it.
    let bad = json!([{"@type": "type.googleapis.com/x.y.Z", "name": "from-the-future"}]);
    sovereign.write("listeners.json", &bad)?;
    with_log(proxy.wait_stat("listener_manager.lds.update_rejected", |count| count > 0), &proxy)?;
    assert_eq!(with_log(ask(), &proxy)?, "b\nhi");
    // Without a control plane everything goes on.
    drop(sovereign);
    with_log(proxy.wait_stat("listener_manager.lds.update_failure", |count| count > 0), &proxy)?;
    assert_eq!(with_log(ask(), &proxy)?, "b\nhi");
    Ok(())
}
