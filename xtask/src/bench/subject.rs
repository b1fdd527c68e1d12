//! The proxies that are compared, each between servers of its own.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tidegate_tests::config::Config;
use tidegate_tests::load::{self, Server};
use tidegate_tests::run::TempDir;

use super::process;

/// How long a proxy may take to serve.
const PATIENCE: Duration = Duration::from_secs(20);

/// More connections than any measurement opens, and few enough for HAProxy to start where 20,000 files may be open.
const CONNECTIONS: u32 = 6_000;

/// Who is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Kind {
    Tidegate,
    Envoy,
    /// As it comes.
    Haproxy,
    /// With the best tuning for bulk: forced splice, pipes of 1 MiB.
    HaproxySplice,
    /// No proxy.
    Direct,
}

impl Kind {
    pub(super) const ALL: [Self; 5] =
        [Self::Tidegate, Self::Envoy, Self::Haproxy, Self::HaproxySplice, Self::Direct];
    pub(super) const PROXIES: [Self; 4] = [Self::Tidegate, Self::Envoy, Self::Haproxy, Self::HaproxySplice];

    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tidegate => "tidegate",
            Self::Envoy => "Envoy",
            Self::Haproxy => "HAProxy",
            Self::HaproxySplice => "HAProxy splice",
            Self::Direct => "direct",
        }
    }

    /// Ports of its own: connections that were closed linger on the addresses that they had, and whoever shares
    /// them has to search longer for a free one.
    fn address(self, offset: u16) -> SocketAddr {
        SocketAddr::from((Ipv4Addr::LOCALHOST, 20_000 + 10 * self as u16 + offset))
    }
}

/// Where the programs are, and how they are started.
#[derive(Debug)]
pub(super) struct Programs {
    pub(super) tidegate: PathBuf,
    pub(super) envoy: PathBuf,
    pub(super) haproxy: PathBuf,
    /// On CPU 0 only.
    pub(super) pin: bool,
}

/// A running proxy (or none) between clients and servers. Ends on drop.
#[derive(Debug)]
pub(super) struct Subject {
    kind: Kind,
    child: Option<Child>,
    dir: TempDir,
    servers: [Server; 2],
}

impl Subject {
    /// Starts it and waits until it serves.
    pub(super) fn start(programs: &Programs, kind: Kind) -> Result<Self> {
        let servers = [Server::echo(kind.address(2))?, Server::source(kind.address(3))?];
        let dir = TempDir::new("bench")?;
        let child = spawn(programs, kind, dir.path()).with_context(|| format!("start {}", kind.name()))?;
        let mut subject = Self { kind, child, dir, servers };
        subject.wait()?;
        Ok(subject)
    }

    pub(super) fn kind(&self) -> Kind {
        self.kind
    }

    /// Where clients reach the echo server.
    pub(super) fn echo(&self) -> SocketAddr {
        if self.child.is_some() { self.kind.address(0) } else { self.servers[0].address() }
    }

    /// Where clients reach the server of endless data.
    pub(super) fn source(&self) -> SocketAddr {
        if self.child.is_some() { self.kind.address(1) } else { self.servers[1].address() }
    }

    pub(super) fn pid(&self) -> Option<u32> {
        self.child.as_ref().map(Child::id)
    }

    /// CPU time of the proxy so far; none without one.
    pub(super) fn cpu_ns(&self) -> Result<Option<u64>> {
        self.pid().map(process::cpu_ns).transpose()
    }

    fn wait(&mut self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let Err(error) = load::idle(self.echo(), 1) else { return Ok(()) };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose()).transpose()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                bail!("{} does not serve ({error:#}); its output:\n{log}", self.kind.name());
            }
            sleep(Duration::from_millis(50));
        }
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

fn spawn(programs: &Programs, kind: Kind, dir: &Path) -> Result<Option<Child>> {
    let (program, config, arguments) = match kind {
        Kind::Direct => return Ok(None),
        Kind::Tidegate => {
            (&programs.tidegate, envoy_config(kind), &["--no-interception", "--concurrency", "1", "-c"][..])
        }
        Kind::Envoy => {
            (&programs.envoy, envoy_config(kind), &["--disable-hot-restart", "--concurrency", "1", "-c"][..])
        }
        Kind::Haproxy | Kind::HaproxySplice => (&programs.haproxy, haproxy_config(kind), &["-db", "-f"][..]),
    };
    let path = dir.join(if config.starts_with('{') { "config.json" } else { "config.cfg" });
    fs::write(&path, config)?;
    let mut command = if programs.pin {
        let mut command = Command::new("taskset");
        command.args(["--cpu-list", "0"]).arg(program);
        command
    } else {
        Command::new(program)
    };
    let log = File::create(dir.join("log"))?;
    let child = command
        .args(arguments)
        .arg(path)
        .stdin(Stdio::null())
        .stdout(log.try_clone()?)
        .stderr(log)
        .spawn()
        .with_context(|| format!("run {}", program.display()))?;
    Ok(Some(child))
}

/// Without access logs; with stats and the admin server, which Envoy always has.
fn envoy_config(kind: Kind) -> String {
    let limits =
        json!({"thresholds": [{"max_connections": CONNECTIONS, "max_pending_requests": CONNECTIONS}]});
    let mut config = Config::new();
    for (name, front, back) in [("echo", 0, 2), ("source", 1, 3)] {
        let back = kind.address(back).to_string();
        config = config
            .listener(&kind.address(front).to_string(), json!({"name": name}), &tcp_proxy(name))
            .cluster(name, &[&back], json!({"circuit_breakers": limits}));
    }
    config.to_string()
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
    }})
}

fn haproxy_config(kind: Kind) -> String {
    let (global, defaults) = match kind {
        Kind::HaproxySplice => {
            ("    tune.pipesize 1048576\n", "    option splice-request\n    option splice-response\n")
        }
        _ => ("", ""),
    };
    let mut config = format!(
        "global\n    nbthread 1\n    maxconn {CONNECTIONS}\n{global}\
         defaults\n    mode tcp\n    maxconn {CONNECTIONS}\n    timeout connect 5s\n    timeout client 1h\n    \
         timeout server 1h\n{defaults}"
    );
    for (name, front, back) in [("echo", 0, 2), ("source", 1, 3)] {
        let (front, back) = (kind.address(front), kind.address(back));
        let _ = write!(config, "listen {name}\n    bind {front}\n    server {name} {back}\n");
    }
    config
}
