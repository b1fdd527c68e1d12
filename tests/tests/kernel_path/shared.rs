//! A cluster that is used on both paths has one limit, and each of its hosts one load.

use std::io::{ErrorKind, Read as _};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use nix::sys::signal::Signal;
use serde_json::{Value, json};
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::{Node, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{PATIENCE, Proxy};
use tidegate_tests::upstream::Upstream;

use crate::endpoints::connect;
use crate::{data_path, with_on_exit};

const KERNEL: &str = "172.16.0.1:50001";
const PROXIED: &str = "172.16.0.2:50001";

/// A listener for each path, both with cluster `foo`.
fn config(endpoints: &[&str], fields: Value) -> Config {
    let mut cluster = data_path("KERNEL");
    tidegate_tests::config::merge(&mut cluster, fields);
    // More than one attempt takes a proxy.
    let filter = tcp_proxy("foo", json!({"max_connect_attempts": 2}));
    Config::new()
        .service(KERNEL, "foo")
        .listener(PROXIED, json!({"bind_to_port": false}), &filter)
        .cluster("foo", endpoints, cluster)
}

/// At most three connections.
fn three() -> Config {
    config(&["10.9.0.1:80"], json!({"circuit_breakers": {"thresholds": [{"max_connections": 3}]}}))
}

struct Lab {
    client: Pod,
    server: Pod,
    node: Node,
}

impl Lab {
    fn new() -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9"])?;
        let server = node.pod("server", &["10.9.0.1"])?;
        Ok(Self { client, server, node })
    }

    fn upstream(&self, port: u16, name: &str) -> Result<Upstream> {
        Upstream::identify(Some(self.server.netns()), &format!("10.9.0.1:{port}"), name)
    }

    /// A connection that has arrived at the endpoint.
    fn connect(&self, service: &str) -> Result<TcpStream> {
        let (stream, name) =
            connect(&self.client, service).with_context(|| format!("connect to {service}"))?;
        ensure!(name == "a", "{service}: {name}");
        Ok(stream)
    }

    /// The same, as soon as there is a place for it: one that was closed counts until both sides have closed it.
    fn connect_soon(&self, service: &str) -> Result<TcpStream> {
        let begin = Instant::now();
        loop {
            match self.connect(service) {
                Err(error) if begin.elapsed() > PATIENCE => return Err(error),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
                connected => return connected,
            }
        }
    }

    /// Both paths refuse: connect(2) on the one, the proxy on the other.
    fn is_full(&self) -> Result<()> {
        let refused = self.client.connect(KERNEL).err().map(|error| error.kind());
        ensure!(refused == Some(ErrorKind::ConnectionRefused), "the kernel path: {refused:?}");
        let mut stream = self.client.connect(PROXIED)?;
        stream.set_read_timeout(Some(PATIENCE))?;
        let read = stream.read(&mut [0; 2]).map_err(|error| error.kind());
        ensure!(matches!(read, Ok(0) | Err(ErrorKind::ConnectionReset)), "the proxy: {read:?}");
        Ok(())
    }
}

fn paths(proxy: &Proxy) -> Result<()> {
    let listeners = proxy.admin().read("/listeners")?.body;
    ensure!(listeners.contains("172.16.0.1_50001::data_path::kernel\n"), "{listeners}");
    ensure!(
        listeners.contains("172.16.0.2_50001::data_path::proxy::tcp_proxy.max_connect_att"),
        "{listeners}"
    );
    Ok(())
}

#[test]
fn both_paths_have_one_limit() -> Result<()> {
    let lab = Lab::new()?;
    let proxy = lab.node.proxy(&three()).start()?;
    let _upstream = lab.upstream(80, "a")?;
    paths(&proxy)?;
    let mut proxied = vec![lab.connect(PROXIED)?, lab.connect(PROXIED)?];
    let kernel = lab.connect(KERNEL)?;
    lab.is_full()?;
    for service in [KERNEL, PROXIED] {
        let line = proxy.lines("access.log", &format!("dlocal={service}"), 1)?.remove(0);
        assert_eq!((field(&line, "flags"), field(&line, "up")), ("UO", "-"), "{line}");
    }
    proxy.wait_stat("cluster.foo.circuit_breakers.default.cx_open", |value| value == 1)?;
    proxy.wait_stat("cluster.foo.upstream_cx_overflow", |value| value == 2)?;
    proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == 3)?;

    // A place that one path gives back is the other's.
    drop(kernel);
    proxied.push(lab.connect_soon(PROXIED)?);
    lab.is_full()?;
    proxied.pop();
    proxied.pop();
    let kernel = [lab.connect_soon(KERNEL)?, lab.connect_soon(KERNEL)?];
    lab.is_full()?;
    drop((proxied, kernel));
    proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == 0)?;
    proxy.wait_stat("cluster.foo.circuit_breakers.default.cx_open", |value| value == 0)?;
    let _all = [lab.connect_soon(KERNEL)?, lab.connect(KERNEL)?, lab.connect(KERNEL)?];
    lab.is_full()
}

#[test]
fn connections_that_die_with_the_process_are_not_counted() -> Result<()> {
    let lab = Lab::new()?;
    let setup = lab.node.proxy(&Config::new()).config(&with_on_exit(&three(), "KEEP"));
    let mut proxy = setup.start()?;
    let _upstream = lab.upstream(80, "a")?;
    let proxied = [lab.connect(PROXIED)?, lab.connect(PROXIED)?];
    let kernel = lab.connect(KERNEL)?;
    lab.is_full()?;
    proxy.kill()?;
    // That of the kernel path has survived.
    let more = [lab.connect(KERNEL)?, lab.connect(KERNEL)?];
    let refused = lab.client.connect(KERNEL).err().map(|error| error.kind());
    ensure!(refused == Some(ErrorKind::ConnectionRefused), "{refused:?}");
    let successor = setup.clone().succeed(&proxy).start()?;
    paths(&successor)?;
    lab.is_full()?;
    drop((proxied, kernel));
    let _another = lab.connect_soon(PROXIED)?;
    lab.is_full()?;
    drop(more);
    let _last = [lab.connect_soon(KERNEL)?, lab.connect_soon(PROXIED)?];
    lab.is_full()
}

#[test]
fn connections_that_drain_are_not_counted() -> Result<()> {
    let lab = Lab::new()?;
    let setup = lab.node.proxy(&Config::new()).config(&with_on_exit(&three(), "KEEP"));
    let mut former = setup.start()?;
    let _upstream = lab.upstream(80, "a")?;
    let draining = [lab.connect(PROXIED)?, lab.connect(PROXIED)?];
    let _kernel = lab.connect(KERNEL)?;
    lab.is_full()?;
    let mut successor = setup.clone().succeed(&former).start()?;
    let mut more = vec![lab.connect(KERNEL)?, lab.connect(PROXIED)?];
    lab.is_full()?;
    // They end; that changes nothing for the successor.
    drop(draining);
    ensure!(former.wait()?.success());
    lab.is_full()?;
    // The last one stops: nobody counts what goes through it any more, and the kernel path goes on.
    successor.signal(Signal::SIGTERM)?;
    more.push(lab.connect_soon(KERNEL)?);
    let refused = lab.client.connect(KERNEL).err().map(|error| error.kind());
    ensure!(refused == Some(ErrorKind::ConnectionRefused), "{refused:?}");
    drop(more);
    ensure!(successor.wait()?.success());
    Ok(())
}

/// Twenty connections that end at once go to the host with the lower load, except those few whose eight draws are all the other.
#[test]
fn both_paths_see_one_load() -> Result<()> {
    let endpoints = ["10.9.0.1:80", "10.9.0.1:81"];
    let fields = json!({"lb_policy": "LEAST_REQUEST", "least_request_lb_config": {"choice_count": 8}});
    for (loading, other) in [(PROXIED, KERNEL), (KERNEL, PROXIED)] {
        let lab = Lab::new()?;
        let proxy = lab.node.proxy(&config(&endpoints, fields.clone())).start()?;
        let _upstreams = [lab.upstream(80, "a")?, lab.upstream(81, "b")?];
        paths(&proxy)?;
        let mut to_a = Vec::new();
        let mut to_b = Vec::new();
        for _ in 0..20 {
            let (stream, name) = connect(&lab.client, loading)?;
            if name == "a" { to_a.push(stream) } else { to_b.push(stream) }
        }
        ensure!(to_a.len().abs_diff(to_b.len()) <= 6, "{} and {}", to_a.len(), to_b.len());
        drop(to_b);
        proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == to_a.len() as u64)?;
        let mut misled = 0;
        for _ in 0..20 {
            let (_stream, name) = connect(&lab.client, other)?;
            misled += u32::from(name == "a");
        }
        ensure!(misled <= 3, "{misled} of 20 by {other} went to the host that is loaded through {loading}");
    }
    Ok(())
}
