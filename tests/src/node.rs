//! A node: a network of pods, and the namespace that the proxy runs in.

use std::net::SocketAddr;

use anyhow::{Context, Result};
use serde_json::{Value, json};

use crate::client::{self, Outcome};
use crate::config::{Config, tcp_proxy};
use crate::netns::Netns;
use crate::network::Network;
use crate::pod::Pod;
use crate::proxy::{Proxy, Setup};
use crate::script::{Step, Transcript};
use crate::upstream::Upstream;

/// A node without a proxy yet.
#[derive(Debug)]
pub struct Node {
    /// Where the pods are.
    pub network: Network,
    /// The node's own network namespace.
    pub netns: Netns,
}

impl Node {
    /// An empty node.
    pub fn new() -> Result<Self> {
        Ok(Self { network: Network::new()?, netns: Netns::new("node")? })
    }

    /// Starts a pod.
    pub fn pod(&self, name: &str, addresses: &[&str]) -> Result<Pod> {
        self.network.pod(name, addresses)
    }

    /// A proxy that intercepts the node's pods.
    pub fn proxy(&self, config: &Config) -> Setup {
        Setup::new(&config.to_string()).netns(&self.netns).pods(self.network.cgroup().path())
    }
}

/// One service, one client pod, one server pod, and a proxy between them.
///
/// Under `TIDEGATE_TEST_ENVOY` an Envoy that owns the service's address stands in for interception, so that the
/// expectations of a test can be held against Envoy.
#[derive(Debug)]
pub struct Service {
    /// The proxy.
    pub proxy: Proxy,
    /// Where clients run.
    pub client: Pod,
    /// Where the upstream listens.
    pub server: Pod,
    /// The only endpoint.
    pub upstream: Upstream,
    /// Everything else.
    pub node: Node,
}

impl Service {
    /// The address that the client connects to.
    pub const ADDRESS: &str = "172.16.0.1:50001";
    /// The cluster's only endpoint.
    pub const ENDPOINT: &str = "10.9.0.1:80";
    /// The cluster.
    pub const CLUSTER: &str = "outbound|50001|v1|foo-service.foo.svc.cluster.local";

    /// An upstream that runs these steps on every connection.
    pub fn start(upstream: &[Step]) -> Result<Self> {
        Self::with_tcp_proxy(upstream, json!({}))
    }

    /// The same, with more fields for the tcp_proxy.
    pub fn with_tcp_proxy(upstream: &[Step], fields: Value) -> Result<Self> {
        let steps = upstream.to_vec();
        Self::serving(fields, move |stream| crate::script::run(stream, &steps))
    }

    /// An upstream that runs `serve` on every connection.
    pub fn serving(
        fields: Value,
        serve: impl Fn(std::net::TcpStream) -> Transcript + Clone + Send + 'static,
    ) -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9"])?;
        let server = node.pod("server", &["10.9.0.1"])?;
        let upstream = Upstream::start_with(Some(server.netns()), Self::ENDPOINT, serve)?;
        let config = Config::new().cluster(Self::CLUSTER, &[Self::ENDPOINT], json!({}));
        let filter = tcp_proxy(Self::CLUSTER, fields);
        let proxy = if std::env::var_os("TIDEGATE_TEST_ENVOY").is_some() {
            client.netns().ip("addr add 172.16.0.1/32 dev lo")?;
            let config = config.listener(Self::ADDRESS, json!({}), &filter);
            Setup::new(&config.to_string()).netns(client.netns()).start()?
        } else {
            node.proxy(&config.listener(Self::ADDRESS, json!({"bind_to_port": false}), &filter)).start()?
        };
        Ok(Self { proxy, client, server, upstream, node })
    }

    /// Connects from the client pod and runs the steps.
    pub fn talk(&self, steps: &[Step]) -> Result<Transcript> {
        match client::run(self.client.connect(Self::ADDRESS), steps) {
            Outcome::Connected(transcript) => Ok(transcript),
            Outcome::NotConnected(errno) => anyhow::bail!("connect: {errno}\n{}", self.proxy.log_tail()),
        }
    }

    /// The access log line of the only connection so far.
    pub fn log_line(&self) -> Result<String> {
        self.proxy.lines("access.log", "", 1)?.pop().context("no line")
    }
}

/// The value of `name=value` in an access log line.
pub fn field<'a>(line: &'a str, name: &str) -> &'a str {
    let start = format!("{name}=");
    line.split(' ').find_map(|word| word.strip_prefix(start.as_str())).unwrap_or("(no such field)")
}

/// The same as a socket address.
pub fn address_field(line: &str, name: &str) -> Result<SocketAddr> {
    field(line, name).parse().with_context(|| format!("{name} in {line}"))
}
