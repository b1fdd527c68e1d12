//! Where clients, proxies and servers run.

use std::fmt;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use clap::ValueEnum;
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::{Deserialize, Serialize};
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::load::account;
use tidegate_tests::load::agent::Agent;
use tidegate_tests::netns::Netns;
use tidegate_tests::network::Network;
use tidegate_tests::pod::Pod;

use super::running::{Fronts, Running};
use super::subject::{ENDPOINTS, Subject, Way};

/// How clients, proxies and servers are connected.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub(super) enum Topology {
    /// One network namespace, 127.0.0.1.
    Loopback,
    /// Three network namespaces and veth pairs between them; clients that are captured are in a pod.
    Veth,
}

impl fmt::Display for Topology {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Loopback => "loopback",
            Self::Veth => "veth",
        })
    }
}

/// Which CPUs things run on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Placement {
    /// Where the scheduler puts them.
    Free,
    /// The proxy has the first CPU for its own, clients and servers the others.
    Pinned,
    /// Everything on the first CPU: what it costs in all, without waiting for another CPU to wake.
    OneCpu,
}

impl Placement {
    pub(super) const ALL: [Self; 3] = [Self::Free, Self::Pinned, Self::OneCpu];

    /// What follows the name of a workload.
    pub(super) fn suffix(self) -> &'static str {
        match self {
            Self::Free => "",
            Self::Pinned => "@pinned",
            Self::OneCpu => "@one-cpu",
        }
    }
}

/// The four ports of a subject at one side.
#[derive(Clone, Copy, Debug)]
pub(super) struct Ports(u16);

impl Ports {
    /// Below those that connections come from.
    pub(super) fn of(number: u16) -> Self {
        Self(2000 + 10 * number)
    }

    pub(super) fn at(self, fronts: IpAddr, offset: u16) -> Fronts {
        let port = |index| SocketAddr::new(fronts, self.0 + offset + index);
        Fronts { echo: port(0), bulk: port(1), iperf3: port(2), http: port(3) }
    }
}

/// Where iperf3 and the HTTP server listen.
pub(super) const IPERF3_PORT: u16 = 1990;
pub(super) const HTTP_PORT: u16 = 1991;

const SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// Its other addresses follow this one.
const OTHER_SERVERS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
const PROXY: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 254);
/// Nobody has it: only a captured connection gets anywhere.
const SERVICE: Ipv4Addr = Ipv4Addr::new(172, 16, 0, 1);

/// So many addresses of the servers, the first of which is given.
pub(super) fn servers(first: IpAddr, count: u32) -> Vec<IpAddr> {
    let others = (1..count).map(|number| Ipv4Addr::from(u32::from(OTHER_SERVERS) + number).into());
    std::iter::once(first).chain(others).collect()
}

/// The namespaces, and the clients in them.
#[derive(Debug)]
pub(super) struct Site {
    topology: Topology,
    clients: Agent,
    /// A pod for each subject that captures its clients: they would compete for one.
    captured: Vec<Captured>,
    shape: Shape,
    cpus: Vec<usize>,
    congestion_control: String,
    /// Of what runs in no pod: whatever ends this process, its programs are found and ended.
    cgroup: Cgroup,
}

#[derive(Debug)]
enum Shape {
    Loopback(Netns),
    Veth(Box<Veth>),
}

#[derive(Debug)]
struct Veth {
    network: Network,
    client: Pod,
    server: Pod,
}

#[derive(Debug)]
struct Captured {
    subject: Subject,
    clients: Agent,
    pod: Pod,
}

impl Captured {
    fn start(network: &Network, subject: Subject, number: usize) -> Result<Self> {
        let pod = network.pod("captured", &[&format!("10.0.1.{}", number + 1)])?;
        if subject.way == Way::Redirect {
            pod.netns().nft(&format!(
                "table ip sidecar {{ chain out {{ type nat hook output priority -100; \
                 ip daddr {SERVICE} meta l4proto tcp redirect; }}\n}}"
            ))?;
        }
        Ok(Self { subject, clients: Agent::start(pod.command("env"))?, pod })
    }
}

impl Site {
    /// Makes them, with a pod for each of the subjects that capture.
    pub(super) fn new(topology: Topology, capturing: &[Subject]) -> Result<Self> {
        let cgroup = Cgroup::new("bench")?;
        let mut captured = Vec::new();
        let (shape, clients) = match topology {
            Topology::Loopback => {
                ensure!(capturing.is_empty(), "interception needs --topology veth");
                let netns = Netns::new("bench")?;
                let clients = Agent::start(inside(&netns, &cgroup))?;
                (Shape::Loopback(netns), clients)
            }
            Topology::Veth => {
                let network = Network::new()?;
                // A connect to the service before anybody captures it fails at once instead of getting no answer.
                network
                    .router()
                    .ip(&format!("addr add {PROXY}/32 dev lo\nroute add unreachable {SERVICE}/32"))?;
                let client = network.pod("client", &["10.0.0.1"])?;
                let addresses: Vec<_> =
                    servers(SERVER.into(), ENDPOINTS).into_iter().map(|ip| ip.to_string()).collect();
                let addresses: Vec<_> = addresses.iter().map(String::as_str).collect();
                let server = network.pod("server", &addresses)?;
                for (number, subject) in capturing.iter().enumerate() {
                    captured.push(Captured::start(&network, *subject, number)?);
                }
                let clients = Agent::start(client.command("env"))?;
                (Shape::Veth(Box::new(Veth { network, client, server })), clients)
            }
        };
        let allowed = sched_getaffinity(Pid::from_raw(0))?;
        let cpus = (0..CpuSet::count()).filter(|&cpu| allowed.is_set(cpu) == Ok(true)).collect();
        let mut site =
            Self { topology, clients, captured, shape, cpus, congestion_control: String::new(), cgroup };
        site.congestion_control = site.tune()?;
        Ok(site)
    }

    /// Settings that hold for all alike; says which congestion control it is.
    fn tune(&self) -> Result<String> {
        let mut used = "";
        for netns in self.namespaces() {
            // Many short connections: ports may be used again after a second, also other than over loopback.
            netns.sysctl("net.ipv4.tcp_tw_reuse", "1")?;
            netns.sysctl("net.ipv4.ip_local_port_range", "10000 65000")?;
            // The machine's default may pace (bbr), which costs timers and measures them.
            let allowed = ["cubic", "reno"]
                .into_iter()
                .find(|name| netns.sysctl("net.ipv4.tcp_congestion_control", name).is_ok());
            used = allowed.context("neither cubic nor reno may be used in a network namespace")?;
        }
        Ok(used.to_owned())
    }

    fn namespaces(&self) -> Vec<&Netns> {
        let mut namespaces: Vec<_> = self.captured.iter().map(|captured| captured.pod.netns()).collect();
        match &self.shape {
            Shape::Loopback(netns) => namespaces.push(netns),
            Shape::Veth(veth) => {
                namespaces.extend([veth.network.router(), veth.client.netns(), veth.server.netns()]);
            }
        }
        namespaces
    }

    pub(super) fn congestion_control(&self) -> &str {
        &self.congestion_control
    }

    /// Where the proxies are.
    pub(super) fn proxy_netns(&self) -> &Netns {
        match &self.shape {
            Shape::Loopback(netns) => netns,
            Shape::Veth(veth) => veth.network.router(),
        }
    }

    /// A command where the proxy of a subject is; a program is still to be added.
    pub(super) fn proxy_command(&self, subject: Subject) -> Command {
        match self.captured(subject) {
            Some(captured) if subject.way == Way::Redirect => captured.pod.command("env"),
            _ => inside(self.proxy_netns(), &self.cgroup),
        }
    }

    /// A command where the servers are.
    pub(super) fn server_command(&self) -> Command {
        match &self.shape {
            Shape::Loopback(netns) => inside(netns, &self.cgroup),
            Shape::Veth(veth) => veth.server.command("env"),
        }
    }

    /// A command where the clients of a subject are.
    pub(super) fn client_command(&self, subject: Subject) -> Command {
        match (&self.shape, self.captured(subject)) {
            (_, Some(captured)) => captured.pod.command("env"),
            (Shape::Loopback(netns), None) => inside(netns, &self.cgroup),
            (Shape::Veth(veth), None) => veth.client.command("env"),
        }
    }

    fn captured(&self, subject: Subject) -> Option<&Captured> {
        self.captured.iter().find(|captured| captured.subject == subject)
    }

    /// The clients of a subject.
    pub(super) fn agent(&mut self, subject: Subject) -> &mut Agent {
        let captured = self.captured.iter_mut().find(|captured| captured.subject == subject);
        captured.map_or(&mut self.clients, |captured| &mut captured.clients)
    }

    /// The cgroup of the pod whose connections a subject captures.
    pub(super) fn captured_cgroup(&self, subject: Subject) -> Option<&Path> {
        self.captured(subject).map(|captured| captured.pod.cgroup().path())
    }

    /// Where the servers of a subject are.
    pub(super) fn backs(&self, subject: Subject) -> Fronts {
        let ip = IpAddr::V4(self.server());
        let own = subject.ports().at(ip, 4);
        Fronts { iperf3: SocketAddr::new(ip, IPERF3_PORT), http: SocketAddr::new(ip, HTTP_PORT), ..own }
    }

    /// The servers' address.
    pub(super) fn server(&self) -> Ipv4Addr {
        match self.topology {
            Topology::Loopback => Ipv4Addr::LOCALHOST,
            Topology::Veth => SERVER,
        }
    }

    /// Where clients reach a proxy.
    pub(super) fn fronts(&self, subject: Subject) -> Fronts {
        let ip = match self.topology {
            Topology::Loopback => Ipv4Addr::LOCALHOST,
            Topology::Veth if subject.is_captured() => SERVICE,
            Topology::Veth => PROXY,
        };
        subject.ports().at(ip.into(), 0)
    }

    /// Where the proxy of a subject listens.
    pub(super) fn binds(&self, subject: Subject) -> Fronts {
        match subject.way {
            // That is where REDIRECT sends what comes from the same namespace, to the port that was meant.
            Way::Redirect => subject.ports().at(Ipv4Addr::LOCALHOST.into(), 0),
            _ => self.fronts(subject),
        }
    }

    /// Puts a subject, its servers and its clients where they belong.
    pub(super) fn place(&mut self, running: &Running, placement: Placement) -> Result<()> {
        let first = &self.cpus[..1];
        let (proxy, others) = match placement {
            Placement::Free => (&self.cpus[..], &self.cpus[..]),
            Placement::OneCpu => (first, first),
            Placement::Pinned => {
                ensure!(self.cpus.len() > 1, "pinning the proxy to a CPU of its own needs two");
                (first, &self.cpus[1..])
            }
        };
        let (proxy, others) = (set(proxy)?, set(others)?);
        for pid in running.pids() {
            run_on(*pid, &proxy)?;
        }
        run_on(running.servers().pid(), &others)?;
        let agent = self.agent(running.subject()).pid();
        run_on(agent, &others)
    }
}

/// A command in a namespace and a cgroup; a program is still to be added.
fn inside(netns: &Netns, cgroup: &Cgroup) -> Command {
    let mut command = netns.command("sh");
    command.args(["-c", r#"echo 0 > "$0" && exec "$@""#]).arg(cgroup.path().join("cgroup.procs"));
    command
}

fn set(cpus: &[usize]) -> Result<CpuSet> {
    let mut set = CpuSet::new();
    for cpu in cpus {
        set.set(*cpu)?;
    }
    Ok(set)
}

/// All threads of a process, and those that they start.
fn run_on(pid: u32, cpus: &CpuSet) -> Result<()> {
    for tid in account::threads(pid)? {
        // One that ends meanwhile needs no CPU.
        let _ = sched_setaffinity(Pid::from_raw(i32::try_from(tid)?), cpus);
    }
    Ok(())
}
