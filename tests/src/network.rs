//! A small cluster network: pods round one router that knows nothing else.

use std::net::IpAddr;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, ensure};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::pod::Pod;

/// A router namespace and the cgroup under which its pods live. Every pod sends everything to the router,
/// the router drops what is not addressed to a pod: no packet can leave the machine, and a service address
/// such as 172.16.0.1 leads nowhere unless something intercepts it.
#[derive(Debug)]
pub struct Network {
    router: Netns,
    links: AtomicU32,
    /// Pods' cgroups are children of this one; shared so that two networks can form one node.
    pods: Arc<Cgroup>,
}

/// The router's address on every link.
const GATEWAY_V4: &str = "169.254.1.1";
const GATEWAY_V6: &str = "fe80::1";

impl Network {
    /// An empty network with a cgroup of its own.
    pub fn new() -> Result<Self> {
        Self::below(Cgroup::new("pods")?)
    }

    /// An empty network whose pods live in this cgroup.
    pub fn below(pods: Cgroup) -> Result<Self> {
        Self::with_pods(Arc::new(pods))
    }

    /// A second network whose pods live in the same cgroup subtree: two tenants that may reuse addresses.
    pub fn beside(&self) -> Result<Self> {
        Self::with_pods(self.pods.clone())
    }

    fn with_pods(pods: Arc<Cgroup>) -> Result<Self> {
        let router = Netns::new("router")?;
        router.sysctl("net.ipv4.ip_forward", "1")?;
        router.sysctl("net.ipv6.conf.all.forwarding", "1")?;
        router.ip("route add blackhole 0.0.0.0/0\nroute add blackhole ::/0\n")?;
        Ok(Self { router, links: AtomicU32::new(0), pods })
    }

    /// The cgroup subtree that holds the pods: what tidegate is told to intercept.
    pub fn cgroup(&self) -> &Arc<Cgroup> {
        &self.pods
    }

    /// The router, to reach pods from outside.
    pub fn router(&self) -> &Netns {
        &self.router
    }

    /// Starts a pod with these addresses.
    pub fn pod(&self, name: &str, addresses: &[&str]) -> Result<Pod> {
        let netns = Netns::new(name)?;
        self.connect(&["-n", netns.name()], netns.name(), addresses)?;
        let cgroup = self.pods.child(&format!("pod-{}", netns.name()))?;
        Pod::start(netns, cgroup, addresses)
    }

    /// Gives the network namespace of a process (a container's, say) a link to the router.
    pub fn connect_process(&self, pid: u32, addresses: &[&str]) -> Result<()> {
        let alias = crate::run::unique("ctr");
        let status = Command::new("ip").args(["netns", "attach", &alias, &pid.to_string()]).status()?;
        ensure!(status.success(), "ip netns attach {alias} {pid}: {status}");
        let outcome = self.connect(&["-n", &alias], &alias, addresses);
        let _ = Command::new("ip").args(["netns", "del", &alias]).status();
        outcome
    }

    fn connect(&self, inside: &[&str], netns: &str, addresses: &[&str]) -> Result<()> {
        let link = format!("pod{}", self.links.fetch_add(1, Ordering::Relaxed));
        self.router.ip(&format!("link add {link} type veth peer name eth0 netns {netns}"))?;
        let mut router = vec![
            format!("addr add {GATEWAY_V4}/32 dev {link}"),
            format!("addr add {GATEWAY_V6}/64 dev {link} nodad"),
            format!("link set {link} up"),
        ];
        let mut pod = vec!["link set lo up".to_owned(), "link set eth0 up".to_owned()];
        for address in addresses {
            let ip: IpAddr = address.parse().with_context(|| format!("address {address}"))?;
            let length = if ip.is_ipv4() { 32 } else { 128 };
            let gateway = if ip.is_ipv4() { GATEWAY_V4 } else { GATEWAY_V6 };
            let flags = if ip.is_ipv4() { "" } else { "nodad" };
            router.push(format!("route add {ip}/{length} dev {link}"));
            pod.push(format!("addr add {ip}/{length} dev eth0 {flags}"));
            pod.push(format!("route replace default via {gateway} dev eth0 onlink"));
        }
        crate::netns::ip_batch(inside, &pod.join("\n"))?;
        self.router.ip(&router.join("\n"))
    }
}
