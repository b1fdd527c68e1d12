//! `exact_balance`: which worker serves a connection, by the workers' own stats.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;

use anyhow::Result;
use serde_json::{Value, json};
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{Proxy, Setup};
use tidegate_tests::script::Step::Echo;
use tidegate_tests::upstream::Upstream;

const WORKERS: u32 = 3;
const SERVICE: &str = "172.16.0.1:50001";

/// Fields of a listener.
fn exact() -> Value {
    json!({"connection_balance_config": {"exact_balance": {}}})
}

/// A connection that reaches an upstream.
fn talk(client: &Pod, address: &str) -> Result<TcpStream> {
    let mut stream = client.connect(address)?;
    stream.write_all(b"hello")?;
    stream.read_exact(&mut [0; 5])?;
    Ok(stream)
}

/// Open connections of a listener by worker.
fn of_workers(proxy: &Proxy, listener: &str) -> Result<Vec<u64>> {
    (0..WORKERS)
        .map(|worker| proxy.stat(&format!("listener.{listener}.worker_{worker}.downstream_cx_active")))
        .collect()
}

/// Opens connections, ends some, and opens others: every worker always has as many as the others.
fn assert_balanced(client: &Pod, address: &str, proxy: &Proxy, listener: &str) -> Result<()> {
    let mut open = (0..30).map(|_| talk(client, address)).collect::<Result<Vec<_>>>()?;
    assert_eq!(of_workers(proxy, listener)?, [10; 3]);
    open.truncate(9);
    let active = format!("listener.{listener}.downstream_cx_active");
    proxy.wait_stat(&active, |active| active == 9)?;
    for _ in 0..36 {
        open.push(talk(client, address)?);
    }
    assert_eq!(of_workers(proxy, listener)?, [15; 3], "whoever had lost more has got more");
    drop(open);
    proxy.wait_stat(&active, |active| active == 0)?;
    Ok(())
}

/// A pod that connects to the service, and an upstream.
fn captured(config: Config) -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::start(Some(server.netns()), "10.9.0.1:80", vec![Echo])?;
    let config = config.cluster("foo", &["10.9.0.1:80"], json!({}));
    let mut proxy = node.proxy(&config).concurrency(WORKERS).start()?;
    assert_balanced(&client, SERVICE, &proxy, "172.16.0.1_50001")?;
    assert!(proxy.stop()?.success());
    Ok(())
}

#[test]
fn connections_of_a_bound_listener_go_to_the_worker_with_the_fewest() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let gateway = node.pod("gateway", &["10.9.0.2"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::start(Some(server.netns()), "10.9.0.1:80", vec![Echo])?;
    for shared in [false, true] {
        let mut fields = exact();
        // One socket for all workers, or one for each.
        fields["enable_reuse_port"] = json!(!shared);
        let config = Config::new().listener("0.0.0.0:8080", fields, &tcp_proxy("foo", json!({}))).cluster(
            "foo",
            &["10.9.0.1:80"],
            json!({}),
        );
        let setup = Setup::new(&config.to_string()).netns(gateway.netns()).concurrency(WORKERS);
        let mut proxy = setup.start()?;
        assert_balanced(&client, "10.9.0.2:8080", &proxy, "0.0.0.0_8080")?;
        assert!(proxy.stop()?.success());
    }
    Ok(())
}

#[test]
fn captured_connections_of_a_service_go_to_the_worker_with_the_fewest() -> Result<()> {
    let mut fields = exact();
    fields["bind_to_port"] = json!(false);
    captured(Config::new().listener(SERVICE, fields, &tcp_proxy("foo", json!({}))))
}

#[test]
fn captured_connections_that_are_handed_on_go_to_the_worker_with_the_fewest() -> Result<()> {
    let mut fields = exact();
    fields["name"] = json!("virtualOutbound");
    fields["use_original_dst"] = json!(true);
    captured(Config::new().service(SERVICE, "foo").listener(
        "0.0.0.0:15001",
        fields,
        &tcp_proxy("BlackHoleCluster", json!({})),
    ))
}
