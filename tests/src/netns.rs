//! Named network namespaces.

use std::fs::File;
use std::io::Write;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::thread::{self, JoinHandle};

use anyhow::{Context, Result, ensure};
use nix::sched::{CloneFlags, setns};

use crate::run;

/// A network namespace of this run with its loopback up and no way out; deleted when the last clone is gone.
#[derive(Clone, Debug)]
pub struct Netns {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    name: String,
    file: File,
}

impl Netns {
    /// Makes a namespace; `kind` shows in its name.
    pub fn new(kind: &str) -> Result<Self> {
        run::prepare()?;
        let name = run::unique(kind);
        {
            // The first `ip netns add` of a machine mounts /run/netns, and two at once mount it twice.
            let _lock = run::lock()?;
            let status = Command::new("ip")
                .args(["netns", "add", &name])
                .status()
                .context("run `ip` (Debian: apt-get install iproute2)")?;
            ensure!(status.success(), "ip netns add {name}: {status}");
        }
        let file = File::open(format!("/run/netns/{name}")).context("open the new namespace")?;
        let netns = Self { inner: Arc::new(Inner { name, file }) };
        netns.ip("link set lo up")?;
        Ok(netns)
    }

    /// Its name, as `ip netns` shows it.
    pub fn name(&self) -> &str {
        &self.inner.name
    }

    /// Its file, for `nsenter --net=`.
    pub fn path(&self) -> PathBuf {
        PathBuf::from(format!("/run/netns/{}", self.inner.name))
    }

    /// Runs `ip` commands inside, one a line.
    pub fn ip(&self, batch: &str) -> Result<()> {
        ip_batch(&["-n", &self.inner.name], batch)
    }

    /// Runs `f` on a thread inside the namespace and waits for it.
    pub fn enter<T: Send>(&self, f: impl FnOnce() -> T + Send) -> Result<T> {
        thread::scope(|scope| {
            let thread = scope.spawn(|| -> Result<T> {
                setns(&self.inner.file, CloneFlags::CLONE_NEWNET).context("setns")?;
                Ok(f())
            });
            thread.join().map_err(|_| anyhow::anyhow!("the thread inside {} panicked", self.inner.name))?
        })
    }

    /// Starts a thread inside the namespace.
    pub fn spawn<T: Send + 'static>(&self, f: impl FnOnce() -> T + Send + 'static) -> Result<JoinHandle<T>> {
        let file = self.inner.file.try_clone()?;
        let (entered, wait) = std::sync::mpsc::channel();
        let thread = thread::spawn(move || {
            let outcome = setns(&file, CloneFlags::CLONE_NEWNET);
            let _ = entered.send(outcome);
            f()
        });
        wait.recv().context("the thread ended")?.context("setns")?;
        Ok(thread)
    }

    /// A command that runs inside the namespace (and, unlike under `ip netns exec`, still sees /sys/fs/bpf).
    pub fn command(&self, program: &str) -> Command {
        let mut command = Command::new("nsenter");
        command.arg(format!("--net={}", self.path().display())).arg("--").arg(program);
        command
    }

    /// Sets a sysctl of the namespace: `net.ipv4.tcp_syncookies`, `2`.
    pub fn sysctl(&self, key: &str, value: &str) -> Result<()> {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        self.enter(|| std::fs::write(&path, value).with_context(|| format!("write {value} to {path}")))?
    }

    /// Loads an nftables ruleset inside the namespace.
    pub fn nft(&self, ruleset: &str) -> Result<()> {
        let mut child = self
            .command("nft")
            .args(["-f", "-"])
            .stdin(Stdio::piped())
            .spawn()
            .context("run `nft` (Debian: apt-get install nftables)")?;
        child.stdin.take().context("no stdin")?.write_all(ruleset.as_bytes())?;
        let status = child.wait()?;
        ensure!(status.success(), "nft: {status}\n{ruleset}");
        Ok(())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        let _ = Command::new("ip").args(["netns", "del", &self.name]).status();
    }
}

/// Runs `ip ARGS -batch -`.
pub(crate) fn ip_batch(args: &[&str], batch: &str) -> Result<()> {
    let mut child = Command::new("ip")
        .args(args)
        .args(["-batch", "-"])
        .stdin(Stdio::piped())
        .spawn()
        .context("run `ip` (Debian: apt-get install iproute2)")?;
    child.stdin.take().context("no stdin")?.write_all(batch.as_bytes())?;
    let status = child.wait()?;
    ensure!(status.success(), "ip {args:?}: {status}\n{batch}");
    Ok(())
}
