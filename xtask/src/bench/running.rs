//! A proxy as it is started and waited for, with the servers behind it.

mod config;

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use tidegate_tests::admin::Admin;
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::load::{account, server};
use tidegate_tests::run::{self, TempDir};

use self::config::Links;
use super::site::Site;
use super::subject::{Program, Subject, Way};
use super::tools::Programs;

/// How long a proxy may take to serve.
const PATIENCE: Duration = Duration::from_mins(1);

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
        let ebpf = subject.is_captured_by_ebpf();
        let pins = ebpf.then(|| Path::new(run::BPFFS).join(run::unique("pins")));
        let cgroup = if ebpf { Some(Cgroup::new("proxy")?) } else { None };
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
        let (links, dir) = (Links::new(&site.binds(subject), backs), self.dir.path());
        let (program, config, arguments) = match subject.program {
            Program::Direct => return Ok(()),
            Program::Tidegate | Program::Base => {
                let config = config::envoy(&links, subject.way, log.as_deref(), connections);
                let program =
                    if subject.program == Program::Base { &programs.base } else { &programs.tidegate };
                (program, config, ["--concurrency", "1", "-c"].as_slice())
            }
            Program::Envoy => (
                &programs.envoy,
                config::envoy(&links, Way::Address, log.as_deref(), connections),
                ["--disable-hot-restart", "--concurrency", "1", "-c"].as_slice(),
            ),
            Program::Haproxy | Program::HaproxySplice => (
                &programs.haproxy,
                config::haproxy(&links, subject, dir, connections),
                ["-db", "-f"].as_slice(),
            ),
            Program::Nginx => (
                &programs.nginx,
                config::nginx(&links, log.as_deref(), dir, connections),
                ["-e", "stderr", "-c"].as_slice(),
            ),
        };
        let path = dir.join(if config.starts_with('{') { "config.json" } else { "config.cfg" });
        fs::write(&path, config)?;
        let mut command = site.proxy_command(subject);
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
    fn a_listener_with_the_proxy_is_noticed() {
        let on = "a::172.16.0.1:1\na::data_path::kernel\n";
        assert_eq!(off_kernel_path(on), Vec::<String>::new());
        let off = format!("{on}b::172.16.0.1:2\nb::data_path::proxy::why\nc::172.16.0.1:3\n");
        assert_eq!(off_kernel_path(&off), ["b (proxy::why)", "c (no data_path)"]);
        assert_eq!(off_kernel_path(""), ["there are none"]);
    }
}
