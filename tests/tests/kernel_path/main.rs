//! The kernel path by the whole proxy: the client's own socket at an endpoint, and what the log, the stats and the admin
//! server say of it.

mod churn;
mod endpoints;
mod ends;
mod hashing;
mod ipv6;
mod life;
mod log;
mod shared;
mod slots;
mod sources;

use std::net::SocketAddr;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::{Node, address_field, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::Proxy;
use tidegate_tests::script::{self, End, Step, write};
use tidegate_tests::upstream::Upstream;

/// `metadata` of a cluster.
fn data_path(mode: &str) -> Value {
    let ours = json!({"@type": "type.googleapis.com/tidegate.cluster.v1.DataPath", "mode": mode});
    json!({"metadata": {"typed_filter_metadata": {"tidegate.data_path": ours}}})
}

/// The same with what becomes of the kernel path when the process stops.
fn with_on_exit(config: &Config, on_exit: &str) -> String {
    let mut config: Value = serde_json::from_str(&config.to_string()).unwrap_or_default();
    config["bootstrap_extensions"] = json!([{
        "name": "tidegate.bootstrap.interception",
        "typed_config": {
            "@type": "type.googleapis.com/tidegate.bootstrap.v1.Interception", "on_exit": on_exit},
    }]);
    format!("{config:#}")
}

/// A node with a client and a server.
struct Lab {
    proxy: Proxy,
    client: Pod,
    server: Pod,
    node: Node,
}

impl Lab {
    fn start(config: &Config) -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9", "fd00:9::9", "fd00:9::a"])?;
        let server = node.pod("server", &["10.9.0.1", "fd00:9::1"])?;
        let proxy = node.proxy(config).start()?;
        Ok(Self { proxy, client, server, node })
    }

    /// Connects, sends, half-closes, and reads to the end. What `getsockname` said, and what was received.
    fn talk(&self, service: &str) -> Result<(SocketAddr, String)> {
        let stream = self.client.connect(service).with_context(|| format!("connect to {service}"))?;
        let local = stream.local_addr()?;
        ensure!(stream.peer_addr()? == service.parse()?, "getpeername: {}", stream.peer_addr()?);
        let seen = script::run(stream, &[write("hello"), Step::ShutdownWrite, Step::ReadToEnd]);
        ensure!(seen.end == End::Fin, "{seen:?}");
        Ok((local, seen.text()))
    }

    fn refused(&self, service: &str, errno: &str) -> Result<()> {
        let outcome = client::run(self.client.connect(service), &[]);
        ensure!(outcome == Outcome::NotConnected(errno.into()), "{service}: {outcome:?}");
        Ok(())
    }

    /// What `/listeners` says of the way that a listener takes.
    fn data_path(&self, listener: &str) -> Result<Vec<String>> {
        let text = self.proxy.admin().read("/listeners")?.body;
        let start = format!("{listener}::data_path::");
        Ok(text.lines().filter_map(|line| line.strip_prefix(&start)).map(str::to_owned).collect())
    }

    fn line(&self, service: &str) -> Result<String> {
        Ok(self.proxy.lines("access.log", &format!("dlocal={service}"), 1)?.remove(0))
    }
}

/// Fields of the log that are the same whichever way a connection took.
fn same_on_both_paths(line: &str) -> Vec<&str> {
    [
        "flags", "details", "rx", "tx", "up", "clu", "chain", "route", "attempts", "closed", "upclosed",
        "dnclose", "upclose",
    ]
    .map(|name| field(line, name))
    .into()
}

#[test]
fn the_client_s_own_socket_is_at_the_endpoint() -> Result<()> {
    const KERNEL: &str = "172.16.0.1:50001";
    const PROXY: &str = "172.16.0.2:50001";
    const RETRIES: &str = "172.16.0.3:50001";
    let config = Config::new()
        .service(KERNEL, "foo")
        .service(PROXY, "bar")
        .listener(
            RETRIES,
            json!({"bind_to_port": false}),
            &tcp_proxy("foo", json!({"max_connect_attempts": 2})),
        )
        .cluster("foo", &["10.9.0.1:80"], data_path("KERNEL"))
        .cluster("bar", &["10.9.0.1:80"], data_path("PROXY"));
    let lab = Lab::start(&config)?;
    let upstream = Upstream::identify(Some(lab.server.netns()), "10.9.0.1:80", "one")?;

    let (local, text) = lab.talk(KERNEL)?;
    assert_eq!(text, "one\nhello");
    assert_eq!(upstream.served()?.peer, local, "no proxy in between");
    let (local_of_proxied, text) = lab.talk(PROXY)?;
    assert_eq!(text, "one\nhello");
    assert_ne!(upstream.served()?.peer, local_of_proxied, "a socket of the proxy");
    let (local_of_retries, _) = lab.talk(RETRIES)?;
    assert_ne!(upstream.served()?.peer, local_of_retries, "a socket of the proxy");

    assert_eq!(lab.data_path("172.16.0.1_50001")?, ["kernel"]);
    assert_eq!(lab.data_path("172.16.0.2_50001")?, Vec::<String>::new());
    let reasons = lab.data_path("172.16.0.3_50001")?;
    let [reason] = &reasons[..] else { panic!("{reasons:?}") };
    assert!(reason.starts_with("proxy::tcp_proxy.max_connect_attempts is 2"), "{reason}");

    let (kernel, proxied) = (lab.line(KERNEL)?, lab.line(PROXY)?);
    let named = |line: &str| {
        same_on_both_paths(line).iter().map(|value| value.replace("bar", "foo")).collect::<Vec<_>>()
    };
    assert_eq!(named(&kernel), named(&proxied), "{kernel}\n{proxied}");
    assert_eq!((field(&kernel, "rx"), field(&kernel, "tx")), ("5", "9"), "{kernel}");
    assert_eq!(address_field(&kernel, "dremote")?, local, "{kernel}");
    assert_eq!(address_field(&kernel, "uplocal")?, local, "{kernel}");

    for name in [
        "cluster.foo.upstream_cx_total",
        "tcp.foo.downstream_cx_total",
        "listener.172.16.0.1_50001.downstream_cx_total",
    ] {
        let expected = if name.contains("listener") { 1 } else { 2 };
        lab.proxy.wait_stat(name, |value| value == expected).with_context(|| name.to_owned())?;
    }
    for (name, expected) in [
        ("cluster.foo.upstream_cx_active", 0),
        ("cluster.foo.upstream_cx_rx_bytes_total", 18),
        ("cluster.foo.upstream_cx_tx_bytes_total", 10),
    ] {
        lab.proxy.wait_stat(name, |value| value == expected).with_context(|| name.to_owned())?;
    }
    Ok(())
}

#[test]
fn connect_says_what_went_wrong() -> Result<()> {
    const DEAD: &str = "172.16.0.1:50001";
    const EMPTY: &str = "172.16.0.2:50001";
    const FULL: &str = "172.16.0.3:50001";
    const DEAD_BEHIND_PROXY: &str = "172.16.0.4:50001";
    let mut full = data_path("KERNEL");
    full["circuit_breakers"] = json!({"thresholds": [{"max_connections": 1}]});
    let config = Config::new()
        .service(DEAD, "dead")
        .cluster("dead", &["10.9.0.1:81"], data_path("KERNEL"))
        .service(DEAD_BEHIND_PROXY, "proxied")
        .cluster("proxied", &["10.9.0.1:81"], json!({}))
        .service(EMPTY, "empty")
        .cluster("empty", &[], data_path("KERNEL"))
        .service(FULL, "full")
        .cluster("full", &["10.9.0.1:80"], full);
    let lab = Lab::start(&config)?;
    let _upstream = Upstream::echo(Some(lab.server.netns()), "10.9.0.1:80")?;
    for listener in ["172.16.0.1_50001", "172.16.0.2_50001", "172.16.0.3_50001"] {
        assert_eq!(lab.data_path(listener)?, ["kernel"], "{listener}");
    }

    lab.refused(DEAD, "ECONNREFUSED")?;
    lab.refused(EMPTY, "EHOSTUNREACH")?;
    let first = lab.client.connect(FULL)?;
    lab.refused(FULL, "ECONNREFUSED")?;
    for (service, flags, upstream) in [(DEAD, "UF,URX", "10.9.0.1:81"), (EMPTY, "UH", "-"), (FULL, "UO", "-")]
    {
        let line = lab.line(service)?;
        assert_eq!((field(&line, "flags"), field(&line, "up")), (flags, upstream), "{line}");
    }
    let connected = client::run(lab.client.connect(DEAD_BEHIND_PROXY), &[Step::ReadToEnd]);
    ensure!(matches!(connected, Outcome::Connected(_)), "{connected:?}");
    let (kernel, proxied) = (lab.line(DEAD)?, lab.line(DEAD_BEHIND_PROXY)?);
    for name in ["flags", "fail", "rx", "tx", "up", "attempts", "closed", "dnclose", "upclose"] {
        assert_eq!(field(&kernel, name), field(&proxied, name), "{name}\n{kernel}\n{proxied}");
    }
    drop(first);
    // It counts until both sides have closed it.
    lab.proxy.lines("access.log", &format!("dlocal={FULL}"), 2)?;
    lab.talk(FULL)?;
    for name in
        ["dead.upstream_cx_connect_fail", "empty.upstream_cx_none_healthy", "full.upstream_cx_overflow"]
    {
        lab.proxy.wait_stat(&format!("cluster.{name}"), |value| value == 1).context(name)?;
    }
    Ok(())
}

/// An endpoint that refuses is not chosen any more; load goes by weight to those that are left.
#[test]
fn weights_and_ejection() -> Result<()> {
    const SERVICE: &str = "172.16.0.1:50001";
    let endpoint = |port: u16, weight: u32| {
        let address = json!({"socket_address": {"address": "10.9.0.1", "port_value": port}});
        json!({"endpoint": {"address": address}, "load_balancing_weight": weight})
    };
    let mut fields = data_path("KERNEL");
    fields["load_assignment"] = json!({"cluster_name": "foo", "endpoints": [
        {"lb_endpoints": [endpoint(80, 3), endpoint(81, 1), endpoint(82, 1)]}]});
    fields["outlier_detection"] = json!({"consecutive_5xx": 1, "enforcing_consecutive_5xx": 100,
        "interval": "3600s", "base_ejection_time": "3600s", "max_ejection_percent": 50});
    let lab = Lab::start(&Config::new().service(SERVICE, "foo").cluster("foo", &[], fields))?;
    let upstreams =
        [80, 81].map(|port| Upstream::echo(Some(lab.server.netns()), &format!("10.9.0.1:{port}")));
    let [heavy, light] = upstreams;
    let (heavy, light) = (heavy?, light?);
    assert_eq!(lab.data_path("172.16.0.1_50001")?, ["kernel"]);
    // Port 82 refuses: at the latest when each of the five shares was drawn.
    let failed = (0..40).take_while(|_| lab.talk(SERVICE).is_ok()).count() < 40;
    assert!(failed, "10.9.0.1:82 was never chosen");
    lab.proxy.wait_stat("cluster.foo.outlier_detection.ejections_active", |value| value == 1)?;
    lab.proxy.wait_stat("cluster.foo.membership_healthy", |value| value == 2)?;
    let before = [heavy.accepted().len(), light.accepted().len()];
    for _ in 0..40 {
        lab.talk(SERVICE)?;
    }
    let [heavy, light] = [heavy.accepted().len() - before[0], light.accepted().len() - before[1]];
    assert_eq!(heavy + light, 40);
    assert!(heavy.abs_diff(30) <= 3, "{heavy} and {light}, not 30 and 10");
    Ok(())
}
