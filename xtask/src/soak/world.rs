//! The node that is soaked: pods, services, servers, and a control plane that is two files.

use std::fs::File;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tidegate_tests::config::{self, Config, tcp_proxy};
use tidegate_tests::load::agent::Agent;
use tidegate_tests::load::server;
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::Proxy;
use tidegate_tests::run::TempDir;

/// Addresses that are captured.
pub(super) const ECHO: &str = "172.16.0.1:7000";
pub(super) const BULK: &str = "172.16.0.1:7001";
pub(super) const SCRIPTS: &str = "172.16.0.1:7002";
/// Nobody listens at its endpoint.
pub(super) const REFUSED: &str = "172.16.0.1:7003";
/// Its cluster has none.
pub(super) const EMPTY: &str = "172.16.0.1:7004";

/// Where servers are, which is not captured.
const ECHO_SERVER: &str = "10.9.0.1:80";
const BULK_SERVER: &str = "10.9.0.1:81";
pub(super) const SCRIPTS_SERVER: &str = "10.9.0.1:82";
/// Nobody listens there.
pub(super) const NOBODY: &str = "10.9.0.1:83";

/// Load generators in the client pod.
const AGENTS: usize = 4;

/// Everything that runs. Dropped in this order: clients before the proxy, the proxy before its pods.
pub(super) struct World {
    pub(super) agents: Vec<Agent>,
    pub(super) proxy: Proxy,
    pub(super) servers: server::Process,
    pub(super) client: Pod,
    pub(super) server: Pod,
    pub(super) node: Node,
    /// The next seed of a random script.
    pub(super) seed: AtomicU64,
    /// Pods that have come and gone.
    pub(super) pods: AtomicU64,
    /// Of the control plane.
    version: AtomicU64,
    _dir: TempDir,
}

impl World {
    pub(super) fn start(tidegate: &Path, seed: u64) -> Result<Self> {
        let dir = TempDir::new("soak")?;
        let node = Node::new()?;
        let client = node.pod("client", &["10.9.0.9"])?;
        let server = node.pod("server", &["10.9.0.1"])?;
        for pod in [&client, &server] {
            // Many short connections: ports may be used again after a second.
            pod.netns().sysctl("net.ipv4.tcp_tw_reuse", "1")?;
            pod.netns().sysctl("net.ipv4.ip_local_port_range", "10000 65000")?;
        }
        // `env` is there to have its arguments run.
        let addresses = server::Addresses { echo: ECHO_SERVER.parse()?, bulk: BULK_SERVER.parse()? };
        let servers = server::Process::start(server.command("env"), addresses, dir.path())?;
        // Listeners that an update removes are kept so long. With the usual 600 s memory would grow for ten minutes, and
        // then stay.
        let setup = node.proxy(&Config::new()).config(&configuration()?).args(["--drain-time-s", "2"]);
        let proxy = setup.program(tidegate).start()?;
        let agents = (0..AGENTS).map(|_| Agent::start(client.command("env"))).collect::<Result<_>>()?;
        let world = Self {
            agents,
            proxy,
            servers,
            client,
            server,
            node,
            seed: AtomicU64::new(seed),
            pods: AtomicU64::new(0),
            version: AtomicU64::new(0),
            _dir: dir,
        };
        world.update()?;
        Ok(world)
    }

    /// The control plane has another set of listeners and clusters: each update adds some and removes some.
    pub(super) fn update(&self) -> Result<()> {
        let version = self.version.fetch_add(1, Ordering::Relaxed) + 1;
        let numbers = || (0..12).filter(move |number| !(number + version).is_multiple_of(3));
        let clusters = numbers().map(|number| {
            // Endpoints come and go, too.
            let port = 1000 + (version + number) % 5;
            typed(
                "cluster",
                "Cluster",
                config::cluster(&name(number), &[&format!("10.9.0.1:{port}")], json!({})),
            )
        });
        let listeners = numbers().map(|number| {
            let address = format!("172.16.1.{number}:8000");
            let filter = tcp_proxy(&name(number), json!({}));
            typed("listener", "Listener", config::listener(&address, json!({"bind_to_port": false}), &filter))
        });
        self.push("cds.json", version, &clusters.collect::<Vec<_>>())?;
        self.push("lds.json", version, &listeners.collect::<Vec<_>>())
    }

    fn push(&self, file: &str, version: u64, resources: &[Value]) -> Result<()> {
        let response = json!({"version_info": version.to_string(), "resources": resources}).to_string();
        let path = self.proxy.path(file);
        let dir = path.parent().unwrap_or(Path::new("/")).display().to_string();
        std::fs::write(path.with_extension("new"), response.replace("@DIR@", &dir))?;
        std::fs::rename(path.with_extension("new"), &path).with_context(|| format!("rename to {file}"))
    }

    /// The access log of a round is of no use after it.
    pub(super) fn empty_log(&self) -> Result<()> {
        let path = self.proxy.path("access.log");
        if path.exists() {
            File::options().write(true).open(path)?.set_len(0)?;
        }
        Ok(())
    }

    /// A captured address.
    pub(super) fn address(text: &str) -> Result<SocketAddr> {
        text.parse().with_context(|| text.to_owned())
    }
}

fn name(number: u64) -> String {
    format!("dynamic-{number}")
}

fn typed(package: &str, message: &str, resource: Value) -> Value {
    let mut typed = json!({"@type": format!("type.googleapis.com/envoy.config.{package}.v3.{message}")});
    config::merge(&mut typed, resource);
    typed
}

fn configuration() -> Result<String> {
    // A machine that others keep busy may take its time: nobody shall be reset for that.
    let patient = json!({"connect_timeout": "15s"});
    let mut many = patient.clone();
    many["circuit_breakers"] =
        json!({"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]});
    let config = Config::new()
        .service(ECHO, "echo")
        .cluster("echo", &[ECHO_SERVER], many.clone())
        .service(BULK, "bulk")
        .cluster("bulk", &[BULK_SERVER], many)
        .service(SCRIPTS, "scripts")
        .cluster("scripts", &[SCRIPTS_SERVER], patient)
        .service(REFUSED, "refused")
        .cluster("refused", &[NOBODY], json!({}))
        .service(EMPTY, "empty")
        .cluster("empty", &[], json!({}));
    let mut config: Value = serde_json::from_str(&config.to_string())?;
    let source = |file: &str| {
        json!({
            "path_config_source": {"path": format!("@DIR@/{file}")}, "resource_api_version": "V3",
            // The files come when the proxy has a directory.
            "initial_fetch_timeout": "0.1s",
        })
    };
    config["dynamic_resources"] = json!({"lds_config": source("lds.json"), "cds_config": source("cds.json")});
    Ok(format!("{config:#}"))
}
