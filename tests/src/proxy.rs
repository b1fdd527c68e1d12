//! A running proxy: tidegate, or the real Envoy for comparison.

use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::admin::Admin;
use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::program;
use crate::run::{self, TempDir};

/// How long a proxy may take to become ready, to stop, or to show what a test waits for.
pub const PATIENCE: Duration = Duration::from_mins(1);

/// Which program.
#[derive(Clone, Debug)]
pub enum Engine {
    /// The tidegate of this build.
    Tidegate,
    /// An Envoy, for parity and for tests of the tests.
    Envoy(PathBuf),
}

/// How to start a proxy.
#[derive(Clone, Debug)]
pub struct Setup {
    engine: Engine,
    config: String,
    args: Vec<String>,
    concurrency: u32,
    netns: Option<Netns>,
    cgroups: Vec<(&'static str, PathBuf)>,
    discover: bool,
    wrapper: Vec<String>,
    program: Option<PathBuf>,
    cgroup: Option<PathBuf>,
    pins: Option<PathBuf>,
    state: Option<PathBuf>,
}

impl Setup {
    /// tidegate with this configuration. `@DIR@` in it becomes the proxy's own directory; an `admin` section
    /// is added unless there is one. `TIDEGATE_TEST_ENVOY=/path/to/envoy` runs Envoy instead, to test a test.
    pub fn new(config: &str) -> Self {
        let engine = match std::env::var_os("TIDEGATE_TEST_ENVOY") {
            Some(path) => Engine::Envoy(path.into()),
            None => Engine::Tidegate,
        };
        Self {
            engine,
            config: config.to_owned(),
            args: Vec::new(),
            concurrency: 2,
            netns: None,
            cgroups: Vec::new(),
            discover: false,
            wrapper: Vec::new(),
            program: None,
            cgroup: None,
            pins: None,
            state: None,
        }
    }

    /// Another program.
    #[must_use]
    pub fn engine(mut self, engine: Engine) -> Self {
        self.engine = engine;
        self
    }

    /// This tidegate instead of the one of this build.
    #[must_use]
    pub fn program(mut self, path: &Path) -> Self {
        self.program = Some(path.to_path_buf());
        self
    }

    /// Another configuration.
    #[must_use]
    pub fn config(mut self, config: &str) -> Self {
        config.clone_into(&mut self.config);
        self
    }

    /// More arguments.
    #[must_use]
    pub fn args<'a>(mut self, args: impl IntoIterator<Item = &'a str>) -> Self {
        self.args.extend(args.into_iter().map(str::to_owned));
        self
    }

    /// Worker threads; 2 unless said otherwise.
    #[must_use]
    pub fn concurrency(mut self, workers: u32) -> Self {
        self.concurrency = workers;
        self
    }

    /// Run inside a namespace.
    #[must_use]
    pub fn netns(mut self, netns: &Netns) -> Self {
        self.netns = Some(netns.clone());
        self
    }

    /// Intercept the pods below this cgroup.
    #[must_use]
    pub fn pods(mut self, cgroup: &Path) -> Self {
        self.cgroups.push(("--pod-cgroup", cgroup.to_path_buf()));
        self
    }

    /// Intercept all processes of this cgroup, those in the proxy's own network namespace included.
    #[must_use]
    pub fn processes(mut self, cgroup: &Path) -> Self {
        self.cgroups.push(("--intercept-cgroup", cgroup.to_path_buf()));
        self
    }

    /// Intercept the kubepods subtrees of the machine, when there are any.
    #[must_use]
    pub fn kubepods(mut self) -> Self {
        self.discover = true;
        self
    }

    /// Start through another program (`setpriv …`).
    #[must_use]
    pub fn wrapper(mut self, wrapper: &[&str]) -> Self {
        self.wrapper = wrapper.iter().map(|&word| word.to_owned()).collect();
        self
    }

    /// Run in a child of this cgroup.
    #[must_use]
    pub fn cgroup(mut self, cgroup: &Cgroup) -> Self {
        self.cgroup = Some(cgroup.path().to_path_buf());
        self
    }

    /// Use the pins and the state of a proxy that runs, or ran: the second one takes over.
    #[must_use]
    pub fn succeed(mut self, other: &Proxy) -> Self {
        self.pins = Some(other.pins.clone());
        self.state = Some(other.state.clone());
        self
    }

    /// Starts it and waits until it is ready.
    pub fn start(&self) -> Result<Proxy> {
        let mut proxy = self.spawn()?;
        proxy.wait_ready()?;
        Ok(proxy)
    }

    /// Starts it and does not wait.
    pub fn spawn(&self) -> Result<Proxy> {
        run::prepare()?;
        let dir = TempDir::new("proxy")?;
        let cgroup = match &self.cgroup {
            Some(parent) => Cgroup::below(parent, &run::unique("proxy"))?,
            None => Cgroup::new("proxy")?,
        };
        let config = self.write_config(dir.path())?;
        let pins = self.pins.clone().unwrap_or_else(|| Path::new(run::BPFFS).join(run::unique("pins")));
        let state = self.state.clone().unwrap_or_else(|| dir.path().join("state"));
        // Appended to: an access log on /dev/stdout opens the same file again.
        let log = File::options().create(true).append(true).open(dir.path().join("proxy.log"))?;
        let mut command = match &self.netns {
            Some(netns) => netns.command("sh"),
            None => Command::new("sh"),
        };
        command
            .args(["-c", r#"echo 0 > "$0" && exec "$@""#])
            .arg(cgroup.path().join("cgroup.procs"))
            .args(&self.wrapper);
        match &self.engine {
            Engine::Tidegate => {
                match &self.program {
                    Some(path) => command.arg(path),
                    None => command.arg(program::built("tidegate")?),
                };
                // A test that could not intercept must fail, not pass by luck.
                let intercepts = !self.cgroups.is_empty();
                if intercepts {
                    command.arg("--require-interception");
                } else if !self.discover {
                    command.arg("--no-interception");
                }
                for (flag, cgroup) in &self.cgroups {
                    command.arg(flag).arg(cgroup);
                }
                command.arg("--pin-path").arg(&pins).arg("--state-dir").arg(&state);
            }
            Engine::Envoy(path) => {
                ensure!(self.cgroups.is_empty(), "Envoy does not intercept");
                command.arg(path).args(["--disable-hot-restart", "-l", "warning"]);
            }
        }
        let child = command
            .arg("-c")
            .arg(&config)
            .args(["--concurrency", &self.concurrency.to_string(), "--file-flush-interval-msec", "50"])
            .arg("--admin-address-path")
            .arg(dir.path().join("admin"))
            .args(&self.args)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .context("start the proxy")?;
        let admin = Admin { address: SocketAddr::from(([127, 0, 0, 1], 0)), netns: self.netns.clone() };
        Ok(Proxy { child, status: None, admin, pins, state, cgroup, dir })
    }

    fn write_config(&self, dir: &Path) -> Result<PathBuf> {
        let mut config = self.config.replace("@DIR@", &dir.display().to_string());
        if !config.lines().any(|line| line.starts_with("admin:") || line.starts_with("  \"admin\":")) {
            config.insert_str(0, "admin: {address: {socket_address: {address: 127.0.0.1, port_value: 0}}}\n");
        }
        let path = dir.join("envoy.yaml");
        fs::write(&path, config)?;
        Ok(path)
    }
}

/// A running proxy. On drop it is killed, and its pins and files are removed.
#[derive(Debug)]
pub struct Proxy {
    child: Child,
    status: Option<ExitStatus>,
    admin: Admin,
    pins: PathBuf,
    state: PathBuf,
    cgroup: Cgroup,
    dir: TempDir,
}

impl Proxy {
    /// Waits for `/ready` to say so.
    pub fn wait_ready(&mut self) -> Result<()> {
        self.wait_for_ready("ready", |status| status == 200)
    }

    /// Waits until its admin server answers, ready or not.
    pub fn wait_answering(&mut self) -> Result<()> {
        self.wait_for_ready("answering", |_| true)
    }

    fn wait_for_ready(&mut self, what: &str, wanted: impl Fn(u16) -> bool) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(status) = self.child.try_wait()? {
                self.status = Some(status);
                bail!("the proxy ended before it was ready: {status}\n{}", self.log_tail());
            }
            if let Some(address) = self.admin_address() {
                self.admin.address = address;
                if self.admin.read("/ready").is_ok_and(|response| wanted(response.status)) {
                    return Ok(());
                }
            }
            ensure!(
                Instant::now() < deadline,
                "the proxy is not {what} after {PATIENCE:?}:\n{}",
                self.log_tail()
            );
            sleep(Duration::from_millis(20));
        }
    }

    fn admin_address(&self) -> Option<SocketAddr> {
        fs::read_to_string(self.dir.path().join("admin")).ok()?.trim().parse().ok()
    }

    /// Its admin server.
    pub fn admin(&self) -> &Admin {
        &self.admin
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The cgroup it runs in.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// Its pin directory.
    pub fn pins(&self) -> &Path {
        &self.pins
    }

    /// A file in its directory (`@DIR@`); empty when there is none.
    pub fn file(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_default()
    }

    /// Path of a file in its directory.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Everything it printed.
    pub fn log(&self) -> String {
        self.file("proxy.log")
    }

    /// The last lines of [`Self::log`].
    pub fn log_tail(&self) -> String {
        let log = self.log();
        let lines: Vec<_> = log.lines().collect();
        lines[lines.len().saturating_sub(30)..].join("\n")
    }

    /// Waits until `name` in its directory has `count` lines that contain `text`, and gives them.
    pub fn lines(&self, name: &str, text: &str, count: usize) -> Result<Vec<String>> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let content = self.file(name);
            let lines: Vec<_> =
                content.lines().filter(|line| line.contains(text)).map(str::to_owned).collect();
            if lines.len() >= count {
                return Ok(lines);
            }
            ensure!(
                Instant::now() < deadline,
                "{name} has {} of {count} lines with {text:?}:\n{content}\nlog:\n{}",
                lines.len(),
                self.log_tail()
            );
            sleep(Duration::from_millis(20));
        }
    }

    /// A counter or gauge.
    pub fn stat(&self, name: &str) -> Result<u64> {
        self.admin.stat(name)
    }

    /// Waits until a counter or gauge is as wanted.
    pub fn wait_stat(&self, name: &str, wanted: impl Fn(u64) -> bool) -> Result<u64> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let value = self.stat(name)?;
            if wanted(value) {
                return Ok(value);
            }
            ensure!(Instant::now() < deadline, "{name} stayed {value}\nlog:\n{}", self.log_tail());
            sleep(Duration::from_millis(20));
        }
    }

    /// Sends a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        Ok(kill(Pid::from_raw(i32::try_from(self.child.id())?), signal)?)
    }

    /// Waits for its end.
    pub fn wait(&mut self) -> Result<ExitStatus> {
        let deadline = Instant::now() + PATIENCE;
        while self.status.is_none() {
            self.status = self.child.try_wait()?;
            ensure!(Instant::now() < deadline, "the proxy did not end:\n{}", self.log());
            sleep(Duration::from_millis(10));
        }
        self.status.context("no status")
    }

    /// SIGTERM, then waits for its end.
    pub fn stop(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGTERM)?;
        self.wait()
    }

    /// SIGKILL: it leaves behind whatever it had pinned.
    pub fn kill(&mut self) -> Result<ExitStatus> {
        self.signal(Signal::SIGKILL)?;
        self.wait()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        if self.status.is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
        if std::thread::panicking() {
            eprintln!("log of the proxy:\n{}", self.log());
        }
        let _ = fs::remove_dir_all(&self.pins);
    }
}
