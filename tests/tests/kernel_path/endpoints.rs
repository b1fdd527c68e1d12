//! The kernel path follows the endpoints of its clusters: those that come and go, and those that health checks find.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::config::{Config, load_assignment};
use tidegate_tests::node::{Node, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{PATIENCE, Proxy};
use tidegate_tests::upstream::Upstream;

use crate::{data_path, same_on_both_paths};

const SERVICE: &str = "172.16.0.1:50001";
const BOTH: [&str; 2] = ["10.9.0.1:80", "10.9.0.1:81"];

/// `fields`, and endpoints from a file.
pub(super) fn eds(mut fields: Value) -> Value {
    fields["type"] = json!("EDS");
    fields["load_assignment"] = json!(null);
    fields["eds_cluster_config"] = json!({"eds_config": {
        "path_config_source": {"path": "@DIR@/eds.json"}, "resource_api_version": "V3",
        "initial_fetch_timeout": "0.1s",
    }});
    fields
}

/// The file.
pub(super) struct Eds<'a> {
    proxy: &'a Proxy,
    clusters: &'a [&'a str],
    version: u64,
}

impl<'a> Eds<'a> {
    pub(super) fn new(proxy: &'a Proxy, clusters: &'a [&'a str]) -> Self {
        Self { proxy, clusters, version: 0 }
    }

    /// These are the endpoints of each cluster from now on.
    fn push(&mut self, endpoints: &[&str]) -> Result<()> {
        self.version += 1;
        let resource = |cluster: &&str| {
            let mut resource = load_assignment(cluster, endpoints);
            resource["@type"] = json!("type.googleapis.com/envoy.config.endpoint.v3.ClusterLoadAssignment");
            resource
        };
        let resources: Vec<_> = self.clusters.iter().map(resource).collect();
        let response = json!({"version_info": self.version.to_string(), "resources": resources});
        std::fs::write(self.proxy.path("eds.new"), response.to_string())?;
        std::fs::rename(self.proxy.path("eds.new"), self.proxy.path("eds.json"))?;
        Ok(())
    }

    /// The same, and waits until they are in force.
    pub(super) fn apply(&mut self, endpoints: &[&str]) -> Result<()> {
        self.push(endpoints)?;
        for cluster in self.clusters {
            let version = tidegate::stats::version_hash(&self.version.to_string());
            self.proxy.wait_stat(&format!("cluster.{cluster}.version"), |it| it == version)?;
            let healthy = endpoints.len() as u64;
            self.proxy.wait_stat(&format!("cluster.{cluster}.membership_healthy"), |it| it == healthy)?;
        }
        // The kernel's tables follow in the main thread's next turn.
        std::thread::sleep(Duration::from_millis(5));
        Ok(())
    }
}

fn wait_for(done: impl Fn() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !done() {
        ensure!(begin.elapsed() < PATIENCE, "it does not happen");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A connection to a service, and the name of the endpoint that it is at.
pub(super) fn connect(client: &Pod, service: &str) -> Result<(TcpStream, String)> {
    let mut stream = client.connect(service)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let mut name = [0; 2];
    stream.read_exact(&mut name)?;
    Ok((stream, String::from_utf8_lossy(&name[..1]).into_owned()))
}

/// One connection to each endpoint of a service, by name.
fn one_to_each(client: &Pod, service: &str) -> Result<[TcpStream; 2]> {
    let (mut a, mut b) = (None, None);
    for _ in 0..10 {
        let (stream, name) = connect(client, service)?;
        match &*name {
            "a" => a = a.or(Some(stream)),
            _ => b = b.or(Some(stream)),
        }
        if let (Some(_), Some(_)) = (&a, &b) {
            break;
        }
    }
    Ok([a.context("none to a")?, b.context("none to b")?])
}

/// What a read fails with.
pub(super) fn read_error(mut stream: &TcpStream) -> Option<ErrorKind> {
    stream.read(&mut [0]).err().map(|error| error.kind())
}

/// Still there, and quiet.
pub(super) fn is_open(stream: &TcpStream) -> Result<bool> {
    stream.set_nonblocking(true)?;
    Ok(read_error(stream) == Some(ErrorKind::WouldBlock))
}

#[test]
fn connections_to_a_removed_endpoint_are_reset_and_no_others() -> Result<()> {
    const PROXIED: &str = "172.16.0.2:50001";
    let policy =
        json!({"@type": "type.googleapis.com/tidegate.cluster.v1.EndpointRemoval", "action": "RESET"});
    let with_policy = |mode: &str| {
        let mut fields = data_path(mode);
        fields["metadata"]["typed_filter_metadata"]["tidegate.endpoint_removal"] = policy.clone();
        eds(fields)
    };
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let config = Config::new()
        .service(SERVICE, "foo")
        .cluster("foo", &[], with_policy("KERNEL"))
        .service(PROXIED, "bar")
        .cluster("bar", &[], with_policy("PROXY"));
    let proxy = node.proxy(&config).start()?;
    let mut eds = Eds::new(&proxy, &["foo", "bar"]);
    eds.apply(&BOTH)?;
    let upstream = |port: usize, name: &str| Upstream::identify(Some(server.netns()), BOTH[port], name);
    let (_a, b) = (upstream(0, "a")?, upstream(1, "b")?);

    let [to_a, to_b] = one_to_each(&client, SERVICE)?;
    let [_proxied_to_a, proxied_to_b] = one_to_each(&client, PROXIED)?;
    let direct = client.connect(BOTH[1])?;
    wait_for(|| b.accepted().contains(&direct.local_addr().unwrap_or(([0; 4], 0).into())))?;
    direct.set_read_timeout(Some(PATIENCE))?;
    (&direct).read_exact(&mut [0; 2])?;
    eds.apply(&BOTH[..1])?;
    assert_eq!(read_error(&to_b), Some(ErrorKind::ConnectionAborted));
    assert_eq!(read_error(&proxied_to_b), Some(ErrorKind::ConnectionReset));
    assert!(is_open(&to_a)?, "its endpoint is there");
    assert!(is_open(&direct)?, "tidegate has nothing to do with it");
    // Others have ended before: those that were one too many to the same endpoint.
    let lines = proxy.lines("access.log", "details=endpoint_removed", 2)?;
    let line = |service: &str| lines.iter().find(|line| field(line, "dlocal") == service).context("no line");
    let (kernel, proxied) = (line(SERVICE)?, line(PROXIED)?);
    let named = |line: &str| {
        same_on_both_paths(line).iter().map(|value| value.replace("bar", "foo")).collect::<Vec<_>>()
    };
    assert_eq!(named(kernel), named(proxied), "{kernel}\n{proxied}");
    proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == 1)?;
    // Others have ended by a FIN of the client's. Not of the endpoint's, and neither has it reset this one.
    assert_eq!(proxy.stat("cluster.foo.upstream_cx_destroy_remote")?, 0);
    Ok(())
}

/// An endpoint that a health check finds unhealthy is not chosen, and its connections are reset if the cluster wants that.
#[test]
fn health_checks_decide_for_the_kernel_too() -> Result<()> {
    let mut fields = data_path("KERNEL");
    fields["close_connections_on_host_health_failure"] = json!(true);
    fields["health_checks"] = json!([{"timeout": "1s", "interval": "0.05s", "no_traffic_interval": "0.05s",
        "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {}}]);
    let endpoint = |port: u16| {
        let address = json!({"socket_address": {"address": "10.9.0.1", "port_value": port}});
        json!({"endpoint": {"address": address, "health_check_config": {"port_value": port + 10}}})
    };
    fields["load_assignment"] =
        json!({"cluster_name": "foo", "endpoints": [{"lb_endpoints": [endpoint(80), endpoint(81)]}]});
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let listen =
        |port: u16, name: &str| Upstream::identify(Some(server.netns()), &format!("10.9.0.1:{port}"), name);
    let (_a, _b, _a_lives, b_lives) = (listen(80, "a")?, listen(81, "b")?, listen(90, "")?, listen(91, "")?);
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &[], fields);
    // In the router's namespace: health checks have to reach the pods.
    let proxy = node.proxy(&config).netns(node.network.router()).start()?;
    let healthy = |count: u64| proxy.wait_stat("cluster.foo.membership_healthy", |it| it == count);
    healthy(2)?;
    let [to_a, to_b] = one_to_each(&client, SERVICE)?;
    drop(b_lives);
    healthy(1)?;
    assert_eq!(read_error(&to_b), Some(ErrorKind::ConnectionAborted));
    for _ in 0..8 {
        assert_eq!(connect(&client, SERVICE)?.1, "a");
    }
    assert!(is_open(&to_a)?);
    let _b_lives = listen(91, "")?;
    healthy(2)?;
    wait_for(|| one_to_each(&client, SERVICE).is_ok())
}
