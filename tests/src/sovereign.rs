//! sovereign: a control plane that others wrote. REST only; Python templates make the resources at every request.

use std::fs::{self, File};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::{Child, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::proxy::PATIENCE;
use crate::run::TempDir;
use crate::tool;

/// What sovereign is asked for. Others are 404.
const TYPES: [&str; 3] = ["clusters", "endpoints", "listeners"];

/// A running sovereign. It ends with all its workers on drop.
#[derive(Debug)]
pub struct Sovereign {
    child: Child,
    address: SocketAddr,
    /// Its workers outlive a killed master: this ends them.
    _cgroup: Cgroup,
    dir: TempDir,
}

impl Sovereign {
    /// Starts it inside `netns` on this port of 127.0.0.1. Each of `templates` is the Python source that makes the
    /// resources of clusters, endpoints and listeners: `def call(**kwargs)` gives a list. It may read files of `DIR`.
    pub fn start(netns: &Netns, port: u16, templates: [&str; 3]) -> Result<Self> {
        let program = tool::sovereign()?;
        let dir = TempDir::new("sovereign")?;
        let mut specifications = Vec::new();
        for (kind, template) in TYPES.iter().zip(templates) {
            let path = dir.path().join(format!("{kind}.py"));
            let place = format!("DIR = {:?}\n", dir.path().display().to_string());
            fs::write(&path, place + template)?;
            specifications.push(json!({"type": kind, "spec": {"protocol": "python", "path": path}}));
        }
        let config = json!({
            "templates": {"default": specifications},
            "sources": [{"type": "inline", "config": {"instances": [{"name": "x", "service_clusters": ["*"]}]}}],
        });
        let path = dir.path().join("sovereign.yaml"); // JSON is YAML
        fs::write(&path, config.to_string())?;
        let cgroup = Cgroup::new("sovereign")?;
        let log = File::create(dir.path().join("log"))?;
        let child = netns
            .command("sh")
            .args(["-c", r#"echo 0 > "$0" && exec "$@""#])
            .arg(cgroup.path().join("cgroup.procs"))
            .arg(program)
            .env("SOVEREIGN_CONFIG", format!("file://{}", path.display()))
            .env("SOVEREIGN_HOST", "127.0.0.1")
            .env("SOVEREIGN_PORT", port.to_string())
            .env("SOVEREIGN_WORKERS", "1")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start sovereign")?;
        let address = SocketAddr::from(([127, 0, 0, 1], port));
        let mut this = Self { child, address, _cgroup: cgroup, dir };
        this.wait(netns)?;
        Ok(this)
    }

    fn wait(&mut self, netns: &Netns) -> Result<()> {
        // Python starts slowly on a busy machine.
        let deadline = Instant::now() + PATIENCE * 3;
        while netns.enter(|| TcpStream::connect(self.address))?.is_err() {
            if let Some(status) = self.child.try_wait()? {
                bail!("sovereign ended: {status}\n{}", self.log());
            }
            ensure!(Instant::now() < deadline, "sovereign does not listen:\n{}", self.log());
            sleep(Duration::from_millis(50));
        }
        Ok(())
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Everything it printed.
    pub fn log(&self) -> String {
        fs::read_to_string(self.dir.path().join("log")).unwrap_or_default()
    }

    /// Replaces a file of `DIR`.
    pub fn write(&self, name: &str, content: &Value) -> Result<()> {
        crate::control_plane::write_atomically(&self.dir.path().join(name), content.to_string().as_bytes())
    }
}

impl Drop for Sovereign {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            eprintln!("log of sovereign:\n{}", self.log());
        }
    }
}

/// A Python string literal.
pub fn python(path: &Path) -> String {
    format!("{:?}", path.display().to_string())
}
