//! Who is compared, and how each is started.

use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::config::Config;
use tidegate_tests::load::{account, server};
use tidegate_tests::run::{self, TempDir};

use super::site::{Ports, Site};
use super::tools::Programs;

/// How long a proxy may take to serve.
const PATIENCE: Duration = Duration::from_secs(20);

/// More connections than HAProxy can have beside a pipe for each fourth of them, where 20,000 files may be open.
const MANY: usize = 6000;

/// Forced, not `splice-auto`.
const SPLICE: &str = "    option splice-request\n    option splice-response\n";

/// A program, as it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Program {
    Tidegate,
    /// Another tidegate (`--tidegate-base`).
    Base,
    Envoy,
    /// As it comes.
    Haproxy,
    /// With the best tuning for bulk: forced splice, pipes of 1 MiB.
    HaproxySplice,
    Nginx,
    /// No proxy.
    Direct,
}

impl Program {
    pub(super) const ALL: [Self; 7] = [
        Self::Tidegate,
        Self::Base,
        Self::Envoy,
        Self::Haproxy,
        Self::HaproxySplice,
        Self::Nginx,
        Self::Direct,
    ];

    fn name(self) -> &'static str {
        match self {
            Self::Tidegate => "tidegate",
            Self::Base => "base",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx",
            Self::Direct => "direct",
        }
    }

    pub(super) fn is_tidegate(self) -> bool {
        matches!(self, Self::Tidegate | Self::Base)
    }
}

/// A program and what it does beside proxying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Subject {
    pub(super) program: Program,
    /// Writes an access log to a file in memory.
    pub(super) log: bool,
    /// Its clients are captured by eBPF instead of connecting to its address.
    pub(super) intercept: bool,
}

impl Subject {
    pub(super) const TIDEGATE: Self = Self::plain(Program::Tidegate);
    pub(super) const ENVOY: Self = Self::plain(Program::Envoy);
    pub(super) const HAPROXY: Self = Self::plain(Program::Haproxy);
    pub(super) const NGINX: Self = Self::plain(Program::Nginx);
    pub(super) const DIRECT: Self = Self::plain(Program::Direct);
    pub(super) const INTERCEPT: Self = Self { program: Program::Tidegate, log: false, intercept: true };

    pub(super) const fn plain(program: Program) -> Self {
        Self { program, log: false, intercept: false }
    }

    /// The same with an access log.
    pub(super) const fn logging(self) -> Self {
        Self { log: true, ..self }
    }

    /// Ports of its own: connections that were closed linger on the addresses that they had, and whoever shares
    /// them has to search longer for a free one.
    fn number(self) -> u16 {
        self.program as u16 * 4 + u16::from(self.log) * 2 + u16::from(self.intercept)
    }

    pub(super) fn ports(self) -> Ports {
        Ports::of(self.number())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = if self.log { "+log" } else { "" };
        let intercept = if self.intercept { "+intercept" } else { "" };
        f.pad(&format!("{}{intercept}{log}", self.program.name()))
    }
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('+');
        let name = words.next().unwrap_or_default();
        let program = Program::ALL.into_iter().find(|program| program.name() == name).ok_or_else(|| {
            let names: Vec<_> = Program::ALL.iter().map(|program| program.name()).collect();
            format!(
                "no such subject; there are {}, with +log (not direct) or +intercept (tidegate)",
                names.join(", ")
            )
        })?;
        let mut subject = Self::plain(program);
        for word in words {
            match word {
                "log" if program != Program::Direct => subject.log = true,
                "intercept" if program.is_tidegate() => subject.intercept = true,
                _ => return Err(format!("{name} can't be measured with +{word}")),
            }
        }
        Ok(subject)
    }
}

/// A running proxy (or none) between clients and servers. Ends on drop.
#[derive(Debug)]
pub(super) struct Running {
    subject: Subject,
    child: Option<Child>,
    /// The proxy's processes: nginx has two.
    pids: Vec<u32>,
    dir: TempDir,
    /// In memory.
    log_dir: Option<TempDir>,
    servers: server::Process,
    fronts: Fronts,
    pins: Option<PathBuf>,
    /// Of a proxy that intercepts: its programs also see the sockets of its own cgroup, which must not be everybody's.
    cgroup: Option<Cgroup>,
}

/// Where clients reach the servers, through the proxy if there is one.
#[derive(Clone, Copy, Debug)]
pub(super) struct Fronts {
    pub(super) echo: SocketAddr,
    pub(super) bulk: SocketAddr,
    pub(super) iperf3: SocketAddr,
    pub(super) http: SocketAddr,
}

impl Running {
    /// Starts it and waits until it serves.
    pub(super) fn start(
        programs: &Programs,
        site: &mut Site,
        subject: Subject,
        connections: usize,
    ) -> Result<Self> {
        let dir = TempDir::new("bench")?;
        let backs = site.backs(subject);
        let servers = server::Process::start(
            site.server_command(),
            server::Addresses { echo: backs.echo, bulk: backs.bulk },
            dir.path(),
        )?;
        let log_dir = if subject.log { Some(TempDir::in_memory("bench")?) } else { None };
        let fronts = if subject.program == Program::Direct { backs } else { site.fronts(subject) };
        let pins = subject.intercept.then(|| Path::new(run::BPFFS).join(run::unique("pins")));
        let cgroup = if subject.intercept { Some(Cgroup::new("proxy")?) } else { None };
        let mut running =
            Self { subject, child: None, pids: Vec::new(), dir, log_dir, servers, fronts, pins, cgroup };
        running.spawn(programs, site, &backs, connections).with_context(|| format!("start {subject}"))?;
        running.wait(site)?;
        if let Some(child) = &running.child {
            running.pids = vec![child.id()];
            running.pids.extend(account::children(child.id())?);
        }
        Ok(running)
    }

    pub(super) fn subject(&self) -> Subject {
        self.subject
    }

    pub(super) fn fronts(&self) -> &Fronts {
        &self.fronts
    }

    pub(super) fn servers(&self) -> &server::Process {
        &self.servers
    }

    /// The processes of the proxy; none without one.
    pub(super) fn pids(&self) -> &[u32] {
        &self.pids
    }

    /// CPU time of the proxy so far.
    pub(super) fn cpu_ns(&self) -> Result<u64> {
        self.pids.iter().map(|pid| account::cpu_ns(*pid)).sum()
    }

    /// Resident bytes of the proxy.
    pub(super) fn rss(&self) -> Result<u64> {
        self.pids.iter().map(|pid| account::rss(*pid)).sum()
    }

    /// Lets go of what was logged so far; fails when a log that should be written is not.
    pub(super) fn empty_log(&self) -> Result<u64> {
        let Some(dir) = &self.log_dir else { return Ok(0) };
        let file = File::options().write(true).open(dir.path().join("access.log"))?;
        let length = file.metadata()?.len();
        file.set_len(0)?;
        Ok(length)
    }

    fn wait(&mut self, site: &mut Site) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        let agent = site.agent(self.subject);
        loop {
            let outcome = agent.hold(self.fronts.echo, 1);
            agent.release()?;
            let Err(error) = outcome else { return Ok(()) };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose()).transpose()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                bail!("{} does not serve ({error:#}); its output:\n{log}", self.subject);
            }
            sleep(Duration::from_millis(50));
        }
    }

    fn spawn(&mut self, programs: &Programs, site: &Site, backs: &Fronts, connections: usize) -> Result<()> {
        let subject = self.subject;
        let log = self.log_dir.as_ref().map(|dir| dir.path().join("access.log"));
        let (links, dir) = (Links::new(&self.fronts, backs), self.dir.path());
        let (program, config, arguments) = match subject.program {
            Program::Direct => return Ok(()),
            Program::Tidegate | Program::Base => {
                let config = envoy_config(&links, subject.intercept, log.as_deref(), connections);
                let program =
                    if subject.program == Program::Base { &programs.base } else { &programs.tidegate };
                (program, config, ["--concurrency", "1", "-c"].as_slice())
            }
            Program::Envoy => (
                &programs.envoy,
                envoy_config(&links, false, log.as_deref(), connections),
                ["--disable-hot-restart", "--concurrency", "1", "-c"].as_slice(),
            ),
            Program::Haproxy | Program::HaproxySplice => (
                &programs.haproxy,
                haproxy_config(&links, subject, dir, connections),
                ["-db", "-f"].as_slice(),
            ),
            Program::Nginx => (
                &programs.nginx,
                nginx_config(&links, log.as_deref(), dir, connections),
                ["-e", "stderr", "-c"].as_slice(),
            ),
        };
        let path = dir.join(if config.starts_with('{') { "config.json" } else { "config.cfg" });
        fs::write(&path, config)?;
        let mut command = site.proxy_command();
        if let Some(cgroup) = &self.cgroup {
            command
                .args(["sh", "-c", r#"echo 0 > "$0" && exec "$@""#])
                .arg(cgroup.path().join("cgroup.procs"));
        }
        command.arg(program);
        if subject.program.is_tidegate() {
            self.interception(&mut command, site)?;
        }
        let output = File::create(dir.join("log"))?;
        let haproxy = matches!(subject.program, Program::Haproxy | Program::HaproxySplice);
        let stdout = match &log {
            // HAProxy can write an access log to standard output, and to no file.
            Some(path) if haproxy => File::options().create(true).append(true).open(path)?,
            _ => output.try_clone()?,
        };
        let child = command
            .args(arguments)
            .arg(path)
            .stdin(Stdio::null())
            .stdout(stdout)
            .stderr(output)
            .spawn()
            .with_context(|| format!("run {}", program.display()))?;
        self.child = Some(child);
        Ok(())
    }

    fn interception(&self, command: &mut Command, site: &Site) -> Result<()> {
        let Some(pins) = &self.pins else {
            command.arg("--no-interception");
            return Ok(());
        };
        let cgroup = site.captured_cgroup(self.subject).context("interception needs --topology veth")?;
        command
            .args(["--require-interception", "--pod-cgroup"])
            .arg(cgroup)
            .arg("--pin-path")
            .arg(pins)
            .arg("--state-dir")
            .arg(self.dir.path().join("state"));
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        if let Some(child) = &mut self.child {
            // nginx's worker ends when its master is told to.
            for pid in self.pids.iter().skip(1) {
                let _ = nix::sys::signal::kill(
                    nix::unistd::Pid::from_raw(*pid as i32),
                    nix::sys::signal::Signal::SIGKILL,
                );
            }
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(pins) = &self.pins {
            let _ = fs::remove_dir_all(pins);
        }
    }
}

/// What a proxy connects: name, front, back.
struct Links([(&'static str, SocketAddr, SocketAddr); 4]);

impl Links {
    fn new(fronts: &Fronts, backs: &Fronts) -> Self {
        Self([
            ("echo", fronts.echo, backs.echo),
            ("bulk", fronts.bulk, backs.bulk),
            ("iperf3", fronts.iperf3, backs.iperf3),
            ("http", fronts.http, backs.http),
        ])
    }
}

/// With stats and the admin server, which Envoy always has; the log is in Envoy's own format.
fn envoy_config(links: &Links, captured: bool, log: Option<&Path>, connections: usize) -> String {
    let limits =
        json!({"thresholds": [{"max_connections": connections, "max_pending_requests": connections}]});
    let mut config = Config::new();
    for (name, front, back) in &links.0 {
        let mut fields = json!({"name": name});
        if captured {
            fields["bind_to_port"] = json!(false);
        }
        config = config.listener(&front.to_string(), fields, &tcp_proxy(name, log)).cluster(
            name,
            &[&back.to_string()],
            json!({"circuit_breakers": limits}),
        );
    }
    config.to_string()
}

fn tcp_proxy(cluster: &str, log: Option<&Path>) -> Value {
    let logs: Vec<_> = log
        .map(|path| {
            json!({"name": "envoy.access_loggers.file", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
            }})
        })
        .into_iter()
        .collect();
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
        "access_log": logs,
    }})
}

/// Stats are always counted; the socket is where they are asked for.
fn haproxy_config(links: &Links, subject: Subject, dir: &Path, connections: usize) -> String {
    let (global, mut defaults) = match subject.program {
        // A quarter of the connections may have pipes, and a pipe is two files: of thousands they would be too many.
        Program::HaproxySplice if connections > MANY => {
            ("    tune.pipesize 1048576\n    maxpipes 250\n", SPLICE.to_owned())
        }
        Program::HaproxySplice => ("    tune.pipesize 1048576\n", SPLICE.to_owned()),
        _ => ("", String::new()),
    };
    if subject.log {
        defaults += "    log stdout format raw local0 info\n    option tcplog\n";
    }
    let mut config = format!(
        "global\n    nbthread 1\n    maxconn {connections}\n    stats socket {}\n{global}\
         defaults\n    mode tcp\n    maxconn {connections}\n    timeout connect 5s\n    timeout client 1h\n    \
         timeout server 1h\n{defaults}",
        dir.join("stats.sock").display(),
    );
    for (name, front, back) in &links.0 {
        let _ = write!(config, "listen {name}\n    bind {front}\n    server {name} {back}\n");
    }
    config
}

/// One worker; buffers of the default size. The log is buffered, as those of the others are.
fn nginx_config(links: &Links, log: Option<&Path>, dir: &Path, connections: usize) -> String {
    // Room for both ends of each is taken at start.
    let room = 2 * connections + 100;
    let log = match log {
        Some(path) => format!("access_log {} tcp buffer=64k flush=1s", path.display()),
        None => "access_log off".to_owned(),
    };
    let mut config = format!(
        "load_module {};\nworker_processes 1;\ndaemon off;\npid {}/nginx.pid;\n\
         events {{ worker_connections {room}; }}\n\
         stream {{\n    log_format tcp '$remote_addr [$time_local] $protocol $status $bytes_sent $bytes_received \
         $session_time \"$upstream_addr\" $upstream_bytes_sent $upstream_bytes_received $upstream_connect_time';\n    \
         {log};\n    proxy_timeout 1h;\n",
        super::tools::NGINX_STREAM,
        dir.display(),
    );
    for (_, front, back) in &links.0 {
        let _ = writeln!(config, "    server {{ listen {front}; proxy_pass {back}; }}");
    }
    config + "}\n"
}

/// A subject that writes a log must have written one.
pub(super) fn check_log(running: &Running, requests: u64) -> Result<()> {
    let written = running.empty_log()?;
    ensure!(!running.subject.log || written > 0 || requests == 0, "{} wrote no access log", running.subject);
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_what_they_say() {
        let mut numbers = BTreeSet::new();
        for name in
            ["tidegate", "base", "envoy+log", "haproxy-splice", "nginx", "direct", "tidegate+intercept"]
        {
            let subject: Subject = name.parse().expect("a subject");
            assert_eq!(subject.to_string(), name);
            assert!(numbers.insert(subject.number()), "{name} has ports of its own");
        }
        let both: Subject = "tidegate+log+intercept".parse().expect("a subject");
        assert!(both.log && both.intercept);
        for wrong in ["direct+log", "envoy+intercept", "enovy", "", "nginx+"] {
            assert!(wrong.parse::<Subject>().is_err(), "{wrong}");
        }
    }
}
