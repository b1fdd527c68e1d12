//! A proxy that takes its configuration from the control plane.

use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use tidegate_tests::admin::Admin;
use tidegate_tests::config::{self, socket_address, tcp_proxy};
use tidegate_tests::control_plane::resource::Transport;
use tidegate_tests::run::TempDir;

use super::plane::Plane;
use super::world::PROBE;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Tidegate,
    Envoy,
}

impl Kind {
    pub(super) const ALL: [Self; 2] = [Self::Tidegate, Self::Envoy];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tidegate => "tidegate",
            Self::Envoy => "Envoy",
        }
    }
}

/// A running proxy; ends on drop.
#[derive(Debug)]
pub(super) struct Node {
    child: Child,
    dir: TempDir,
    /// Its listener that leads to the echo server.
    pub(super) echo: SocketAddr,
    /// Its listener that leads to the cluster whose endpoint moves.
    pub(super) probe: SocketAddr,
    admin: Admin,
}

impl Node {
    pub(super) fn start(kind: Kind, program: &Path, plane: &Plane<'_>) -> Result<Self> {
        let dir = TempDir::new("bench-xds")?;
        let path = dir.path().join("bootstrap.json");
        fs::write(&path, bootstrap(plane).to_string())?;
        let log = File::create(dir.path().join("log"))?;
        let mut command = Command::new(program);
        match kind {
            Kind::Tidegate => command.arg("--no-interception"),
            Kind::Envoy => command.arg("--disable-hot-restart"),
        };
        let child = command
            .args(["--concurrency", "1", "--log-level", "warn", "-c"])
            .arg(path)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("run {}", program.display()))?;
        let admin = Admin { address: address(2), netns: None };
        Ok(Self { child, dir, echo: address(0), probe: address(1), admin })
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    pub(super) fn is_ready(&self) -> bool {
        self.admin.read("/ready").is_ok_and(|response| response.status == 200)
    }

    /// The end of its output, for errors.
    pub(super) fn log(&self) -> String {
        let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
        let start = log.char_indices().nth_back(4_000).map_or(0, |(at, _)| at);
        format!("output of the proxy: {}", &log[start..])
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn address(offset: u16) -> SocketAddr {
    SocketAddr::from((Ipv4Addr::LOCALHOST, 22_000 + offset))
}

fn bootstrap(plane: &Plane<'_>) -> Value {
    let mut bootstrap = Transport::DeltaAds.bootstrap(plane.address());
    let quiet = json!({"access_log": []});
    let listener = |at: SocketAddr, cluster: &str| {
        config::listener(&at.to_string(), json!({"name": cluster}), &tcp_proxy(cluster, quiet.clone()))
    };
    let limits = json!({"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]});
    let echo = config::cluster("echo", &[&plane.echo().to_string()], json!({"circuit_breakers": limits}));
    bootstrap["admin"]["address"] = socket_address(&address(2).to_string());
    bootstrap["static_resources"]["listeners"] =
        json!([listener(address(0), "echo"), listener(address(1), PROBE)]);
    if let Some(clusters) = bootstrap["static_resources"]["clusters"].as_array_mut() {
        clusters.push(echo);
    }
    bootstrap
}
