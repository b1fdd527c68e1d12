//! Who is compared, and how each is started.

use std::collections::BTreeSet;
use std::fmt::{self, Write as _};
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::str::FromStr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use tidegate_tests::admin::Admin;
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::config::Config;
use tidegate_tests::load::{account, server};
use tidegate_tests::run::{self, TempDir};

use super::site::{self, Ports, Site};
use super::tools::Programs;

/// How long a proxy may take to serve.
const PATIENCE: Duration = Duration::from_mins(1);

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

/// How connections come to a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Way {
    /// Clients connect to its address.
    Address,
    /// Clients are captured by eBPF.
    Intercept,
    /// Not at all: eBPF connects clients to the servers.
    Kernel,
    /// The same, where there are [`MANY_SERVICES`] with [`ENDPOINTS`] endpoints each.
    KernelMany,
}

impl Way {
    const ALL: [Self; 4] = [Self::Address, Self::Intercept, Self::Kernel, Self::KernelMany];

    /// What follows the name of a program.
    fn word(self) -> Option<&'static str> {
        match self {
            Self::Address => None,
            Self::Intercept => Some("intercept"),
            Self::Kernel => Some("kernel"),
            Self::KernelMany => Some("kernel-many"),
        }
    }

    fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel | Self::KernelMany)
    }
}

/// Services of [`Way::KernelMany`].
const MANY_SERVICES: u32 = 10_000;

/// Endpoints of each of them, and addresses of the servers on veth.
pub(super) const ENDPOINTS: u32 = 10;

/// A program and what it does beside proxying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Subject {
    pub(super) program: Program,
    /// Writes an access log to a file in memory.
    pub(super) log: bool,
    pub(super) way: Way,
}

impl Subject {
    pub(super) const TIDEGATE: Self = Self::plain(Program::Tidegate);
    pub(super) const ENVOY: Self = Self::plain(Program::Envoy);
    pub(super) const HAPROXY: Self = Self::plain(Program::Haproxy);
    pub(super) const NGINX: Self = Self::plain(Program::Nginx);
    pub(super) const DIRECT: Self = Self::plain(Program::Direct);
    pub(super) const HAPROXY_SPLICE: Self = Self::plain(Program::HaproxySplice);
    pub(super) const INTERCEPT: Self = Self { way: Way::Intercept, ..Self::TIDEGATE };
    pub(super) const KERNEL: Self = Self { way: Way::Kernel, ..Self::TIDEGATE };
    pub(super) const KERNEL_MANY: Self = Self { way: Way::KernelMany, ..Self::TIDEGATE };

    pub(super) const fn plain(program: Program) -> Self {
        Self { program, log: false, way: Way::Address }
    }

    /// Whether its clients are in a pod where eBPF programs see their connect(2).
    pub(super) fn is_captured(self) -> bool {
        self.way != Way::Address
    }

    /// The same with an access log.
    pub(super) const fn logging(self) -> Self {
        Self { log: true, ..self }
    }

    /// Ports of its own: connections that were closed linger on the addresses that they had, and whoever shares
    /// them has to search longer for a free one.
    fn number(self) -> u16 {
        self.program as u16 * 8 + u16::from(self.log) * 4 + self.way as u16
    }

    pub(super) fn ports(self) -> Ports {
        Ports::of(self.number())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = if self.log { "+log" } else { "" };
        let way = self.way.word().map_or_else(String::new, |word| format!("+{word}"));
        f.pad(&format!("{}{way}{log}", self.program.name()))
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
                "no such subject; there are {}, with +log (not direct) or +intercept, +kernel, +kernel-many (tidegate)",
                names.join(", ")
            )
        })?;
        let mut subject = Self::plain(program);
        for word in words {
            let way = Way::ALL.into_iter().find(|way| way.word() == Some(word));
            match (word, way) {
                ("log", _) if program != Program::Direct => subject.log = true,
                (_, Some(way)) if program.is_tidegate() && !subject.is_captured() => subject.way = way,
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
            if subject.way == Way::KernelMany { everywhere(&backs) } else { server_addresses(&backs) },
            dir.path(),
        )?;
        let log_dir = if subject.log { Some(TempDir::in_memory("bench")?) } else { None };
        let fronts = if subject.program == Program::Direct { backs } else { site.fronts(subject) };
        let pins = subject.is_captured().then(|| Path::new(run::BPFFS).join(run::unique("pins")));
        let cgroup = if subject.is_captured() { Some(Cgroup::new("proxy")?) } else { None };
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
        loop {
            let agent = site.agent(self.subject);
            let outcome = agent.hold(self.fronts.echo, 1);
            agent.release()?;
            let Err(error) = outcome.and_then(|()| self.check_data_path(site)) else { return Ok(()) };
            let ended = self.child.as_mut().and_then(|child| child.try_wait().transpose()).transpose()?;
            if ended.is_some() || Instant::now() > deadline {
                let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
                bail!("{} does not serve ({error:#}); its output:\n{log}", self.subject);
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// Fails while a listener of a subject on the kernel path is not there: the proxy would be measured.
    fn check_data_path(&self, site: &Site) -> Result<()> {
        if !self.subject.way.is_kernel() {
            return Ok(());
        }
        let path = self.admin_address_path();
        let address = fs::read_to_string(&path).with_context(|| format!("read {}", path.display()))?;
        let address =
            address.trim().parse().with_context(|| format!("{} holds {address:?}", path.display()))?;
        let admin = Admin { address, netns: Some(site.proxy_netns().clone()) };
        let listing = admin.read("/listeners")?.body;
        let others = off_kernel_path(&listing);
        ensure!(
            others.is_empty(),
            "{} of its listeners are not on the kernel path: {}",
            others.len(),
            others.iter().take(3).map(String::as_str).collect::<Vec<_>>().join("; ")
        );
        Ok(())
    }

    fn admin_address_path(&self) -> PathBuf {
        self.dir.path().join("admin")
    }

    fn spawn(&mut self, programs: &Programs, site: &Site, backs: &Fronts, connections: usize) -> Result<()> {
        let subject = self.subject;
        let log = self.log_dir.as_ref().map(|dir| dir.path().join("access.log"));
        let (links, dir) = (Links::new(&self.fronts, backs), self.dir.path());
        let (program, config, arguments) = match subject.program {
            Program::Direct => return Ok(()),
            Program::Tidegate | Program::Base => {
                let config = envoy_config(&links, subject.way, log.as_deref(), connections);
                let program =
                    if subject.program == Program::Base { &programs.base } else { &programs.tidegate };
                (program, config, ["--concurrency", "1", "-c"].as_slice())
            }
            Program::Envoy => (
                &programs.envoy,
                envoy_config(&links, Way::Address, log.as_deref(), connections),
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
            .arg(self.dir.path().join("state"))
            .arg("--admin-address-path")
            .arg(self.admin_address_path());
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

fn server_addresses(backs: &Fronts) -> server::Addresses {
    server::Addresses { echo: backs.echo, bulk: backs.bulk }
}

/// On all addresses of the servers.
fn everywhere(backs: &Fronts) -> server::Addresses {
    let any = |address: SocketAddr| SocketAddr::from((Ipv4Addr::UNSPECIFIED, address.port()));
    server::Addresses { echo: any(backs.echo), bulk: any(backs.bulk) }
}

/// The listeners of `/listeners` that are not on the kernel path, with the reasons. A listing without listeners is one.
fn off_kernel_path(listing: &str) -> Vec<String> {
    let names: BTreeSet<_> = listing.lines().filter_map(|line| Some(line.split_once("::")?.0)).collect();
    if names.is_empty() {
        return vec!["there are none".to_owned()];
    }
    let lines: BTreeSet<_> = listing.lines().collect();
    let off = names.into_iter().filter(|name| !lines.contains(format!("{name}::data_path::kernel").as_str()));
    let reasons = |name: &str| -> String {
        let prefix = format!("{name}::data_path::");
        let reasons: Vec<_> = lines.iter().filter_map(|line| line.strip_prefix(prefix.as_str())).collect();
        format!(
            "{name} ({})",
            if reasons.is_empty() { "no data_path".to_owned() } else { reasons.join(", ") }
        )
    };
    off.map(reasons).collect()
}

/// With stats and the admin server, which Envoy always has; the log is in Envoy's own format.
fn envoy_config(links: &Links, way: Way, log: Option<&Path>, connections: usize) -> String {
    let limits =
        json!({"thresholds": [{"max_connections": connections, "max_pending_requests": connections}]});
    let mut config = Config::new();
    for (name, front, back) in &links.0 {
        let mut fields = json!({"name": name});
        if way != Way::Address {
            fields["bind_to_port"] = json!(false);
        }
        let mut cluster = json!({"circuit_breakers": limits});
        if way.is_kernel() {
            cluster["metadata"] = on_kernel_path();
        }
        // The tools' own servers have one address.
        let endpoints =
            if way == Way::KernelMany && matches!(*name, "echo" | "bulk") { ENDPOINTS } else { 1 };
        let endpoints: Vec<_> = site::servers(back.ip(), endpoints)
            .into_iter()
            .map(|ip| SocketAddr::new(ip, back.port()).to_string())
            .collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        config = config
            .listener(&front.to_string(), fields, &tcp_proxy(name, log))
            .cluster(name, &endpoints, cluster);
    }
    if way != Way::KernelMany {
        return config.to_string();
    }
    let mut config: Value = serde_json::from_str(&other_services(config).to_string()).unwrap_or_default();
    config["bootstrap_extensions"] = json!([large_tables()]);
    config.to_string()
}

/// Room for [`MANY_SERVICES`], and the others.
fn large_tables() -> Value {
    let services = MANY_SERVICES + 100;
    let hosts = services * ENDPOINTS;
    json!({"name": "tidegate.bootstrap.interception", "typed_config": {
        "@type": "type.googleapis.com/tidegate.bootstrap.v1.Interception",
        "map_sizes": {
            "services": services, "clusters": services, "hosts": hosts, "balancing_words": 16 * hosts,
        },
    }})
}

/// Metadata of a cluster.
fn on_kernel_path() -> Value {
    json!({"typed_filter_metadata": {"tidegate.data_path": {
        "@type": "type.googleapis.com/tidegate.cluster.v1.DataPath",
        "mode": "KERNEL",
    }}})
}

/// Services that nobody uses. Nothing has their addresses.
fn other_services(mut config: Config) -> Config {
    let (services, endpoints) = (Ipv4Addr::new(172, 17, 0, 0), Ipv4Addr::new(10, 128, 0, 0));
    let at = |base: Ipv4Addr, number: u32| format!("{}:80", Ipv4Addr::from(u32::from(base) + number));
    for service in 1..MANY_SERVICES {
        let name = format!("other-{service}");
        let own: Vec<_> = (0..ENDPOINTS).map(|number| at(endpoints, service * ENDPOINTS + number)).collect();
        let own: Vec<_> = own.iter().map(String::as_str).collect();
        config = config
            .listener(
                &at(services, service),
                json!({"name": name, "bind_to_port": false}),
                &tcp_proxy(&name, None),
            )
            .cluster(&name, &own, json!({"metadata": on_kernel_path()}));
    }
    config
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
    use super::*;

    #[test]
    fn names_are_what_they_say() {
        let mut numbers = BTreeSet::new();
        for name in [
            "tidegate",
            "base",
            "envoy+log",
            "haproxy-splice",
            "nginx",
            "direct",
            "tidegate+intercept",
            "tidegate+kernel",
            "tidegate+kernel+log",
            "tidegate+kernel-many",
        ] {
            let subject: Subject = name.parse().expect("a subject");
            assert_eq!(subject.to_string(), name);
            assert!(numbers.insert(subject.number()), "{name} has ports of its own");
        }
        let both: Subject = "tidegate+log+intercept".parse().expect("a subject");
        assert!(both.log && both.is_captured());
        for wrong in [
            "direct+log",
            "envoy+intercept",
            "haproxy+kernel",
            "tidegate+kernel+intercept",
            "enovy",
            "",
            "nginx+",
        ] {
            assert!(wrong.parse::<Subject>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn a_listener_with_the_proxy_is_noticed() {
        let on = "a::172.16.0.1:1\na::data_path::kernel\n";
        assert_eq!(off_kernel_path(on), Vec::<String>::new());
        let off = format!("{on}b::172.16.0.1:2\nb::data_path::proxy::why\nc::172.16.0.1:3\n");
        assert_eq!(off_kernel_path(&off), ["b (proxy::why)", "c (no data_path)"]);
        assert_eq!(off_kernel_path(""), ["there are none"]);
    }

    #[test]
    fn only_the_kernel_path_is_asked_for_by_clusters() {
        let fronts = Ports::of(1).at("172.16.0.1".parse().expect("an address"), 0);
        let backs = Ports::of(1).at("10.0.0.2".parse().expect("an address"), 4);
        let config = |way| -> Value {
            let text = envoy_config(&Links::new(&fronts, &backs), way, None, 10);
            serde_json::from_str(&text).expect("JSON")
        };
        let clusters = |config: &Value| config["static_resources"]["clusters"].as_array().map_or(0, Vec::len);
        let intercept = config(Way::Intercept);
        assert!(!intercept.to_string().contains("data_path"));
        let mut kernel = config(Way::Kernel);
        for cluster in kernel["static_resources"]["clusters"].as_array_mut().expect("clusters") {
            assert_eq!(
                cluster.as_object_mut().expect("a cluster").remove("metadata"),
                Some(on_kernel_path())
            );
        }
        assert_eq!(kernel, intercept, "the same otherwise");
        let many = config(Way::KernelMany);
        assert_eq!(clusters(&many), clusters(&intercept) + MANY_SERVICES as usize - 1);
        let endpoints =
            &many["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"];
        assert_eq!(endpoints.as_array().map(Vec::len), Some(ENDPOINTS as usize));
    }
}
