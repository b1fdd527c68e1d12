//! A pod: a network namespace, a cgroup, and a process that lives in both.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result};
use socket2::{Domain, Socket};

use crate::cgroup::Cgroup;
use crate::netns::Netns;
use crate::workload::{Connect, Workload};

/// A pod. Its sockets are made by its own process, so they belong to its cgroup and namespace; the test gets
/// a duplicate of the descriptor and uses it directly.
#[derive(Debug)]
pub struct Pod {
    workload: Workload,
    addresses: Vec<String>,
    cgroup: Cgroup,
    netns: Netns,
}

impl Pod {
    pub(crate) fn start(netns: Netns, cgroup: Cgroup, addresses: &[&str]) -> Result<Self> {
        let workload = Workload::start(command(&netns, cgroup.path(), &[]))?;
        let addresses = addresses.iter().map(|&address| address.to_owned()).collect();
        Ok(Self { workload, addresses, cgroup, netns })
    }

    /// The pod's network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The pod's cgroup.
    pub fn cgroup(&self) -> &Cgroup {
        &self.cgroup
    }

    /// The pod's addresses, as given.
    pub fn addresses(&self) -> &[String] {
        &self.addresses
    }

    /// Connects to `address` (`172.16.0.1:50001`) as a process of the pod does.
    pub fn connect(&self, address: &str) -> io::Result<TcpStream> {
        self.connect_with(&Connect::to(address))
    }

    /// Connects with options.
    pub fn connect_with(&self, connect: &Connect) -> io::Result<TcpStream> {
        self.workload.connect(connect)
    }

    /// An unconnected TCP socket of the pod.
    pub fn socket(&self, domain: Domain) -> io::Result<Socket> {
        self.workload.socket(domain)
    }

    /// A command that runs in the pod.
    pub fn command(&self, program: &str) -> Command {
        let mut command = command(&self.netns, self.cgroup.path(), &[]);
        command.arg(program);
        command
    }

    /// A second process of the pod, started through `wrapper` (`setpriv …`).
    pub fn workload_under(&self, wrapper: &[&str]) -> Result<Workload> {
        Workload::start(command(&self.netns, self.cgroup.path(), wrapper))
    }

    /// The first address with a port.
    pub fn address(&self, port: u16) -> SocketAddr {
        let ip = self.addresses[0].parse().expect("checked when the pod was linked to the router");
        SocketAddr::new(ip, port)
    }
}

/// `nsenter` into the namespace, then the cgroup, then `wrapper`; the program is still to be added.
fn command(netns: &Netns, cgroup: &Path, wrapper: &[&str]) -> Command {
    let mut command = netns.command("sh");
    command.args(["-c", r#"echo 0 > "$0" && exec "$@""#]).arg(cgroup.join("cgroup.procs")).args(wrapper);
    command
}

/// Moves a running process (a container's, say) into the cgroup.
pub fn adopt(cgroup: &Path, pid: u32) -> Result<()> {
    let path = cgroup.join("cgroup.procs");
    std::fs::write(&path, pid.to_string()).with_context(|| format!("write {pid} to {}", path.display()))
}
