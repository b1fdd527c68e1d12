//! The interception alone, on a real kernel: the test takes the part of the workers.
#![allow(dead_code, missing_docs, unreachable_pub, reason = "shared by test programs that each use a part")]

use std::collections::HashMap;
use std::io;
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use socket2::Socket;
use tidegate::config::bootstrap;
use tidegate::intercept::destinations::{Destinations, EverythingElse, Rule};
use tidegate::intercept::{Capture, Interception, PodEvent, PodState, PodStatus, Settings, programs};
use tidegate_common::{Reason, Verdict};
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::run;

pub const SERVICE: &str = "172.16.0.1:50001";
pub const SERVICE_V6: &str = "[fd00:16::1]:50001";

/// Two capture sockets for each pod, as for two workers.
const WORKERS: usize = 2;

/// Only keeps a broken test from hanging.
const LIMIT: Duration = Duration::from_secs(30);

pub type Captures = Arc<Mutex<HashMap<u64, (Arc<Capture>, Vec<Socket>)>>>;

/// An interception, and what its workers would hold.
pub struct Agent {
    pub interception: Interception,
    pub captures: Captures,
}

/// A pin directory; on drop what is attached there is detached, whoever left it.
pub struct Pins(PathBuf);

pub fn pin_dir() -> Pins {
    Pins(Path::new(run::BPFFS).join(run::unique("pins")))
}

impl Deref for Pins {
    type Target = Path;

    fn deref(&self) -> &Path {
        &self.0
    }
}

impl Drop for Pins {
    fn drop(&mut self) {
        if let Err(error) = programs::cleanup(&self.0, true) {
            eprintln!("left behind: {}: {error}", self.0.display());
        }
    }
}

pub fn wanted(cgroup: &Cgroup, pins: &Path) -> bootstrap::Interception {
    bootstrap::Interception {
        cgroups: vec![cgroup.path().to_owned()],
        pin_path: Some(pins.to_owned()),
        ..Default::default()
    }
}

impl Agent {
    pub fn start(cgroup: &Cgroup, pins: &Path) -> Result<Self> {
        Self::start_with(wanted(cgroup, pins))
    }

    pub fn start_with(wanted: bootstrap::Interception) -> Result<Self> {
        let captures = Captures::default();
        let held = Arc::clone(&captures);
        let on_pod = move |event| match event {
            PodEvent::Enrolled { capture, sockets } => {
                assert_eq!(sockets.len(), WORKERS);
                let before = held.lock().unwrap().insert(capture.pod.netns().cookie(), (capture, sockets));
                assert!(before.is_none(), "enrolled twice");
            }
            PodEvent::Gone { capture } => {
                let before = held.lock().unwrap().remove(&capture.pod.netns().cookie());
                assert!(before.is_some(), "gone without having been enrolled");
            }
        };
        let settings = Settings { wanted, workers: WORKERS, kernel_path: false, debug: false };
        let interception = Interception::start(&settings, Box::new(on_pod))?;
        let agent = Self { interception, captures };
        agent.apply(&[SERVICE, SERVICE_V6])?;
        Ok(agent)
    }

    pub fn apply(&self, captured: &[&str]) -> Result<()> {
        let rule = |address: &&str| {
            let rule = Rule { verdict: Verdict::Capture, service: 0, listener: "service".into() };
            (address.parse().unwrap(), rule)
        };
        let rules = captured.iter().map(rule).collect();
        Ok(self.interception.apply(&Destinations { rules, everything_else: EverythingElse::Passes })?)
    }

    pub fn pods(&self) -> Vec<PodStatus> {
        let mut pods = self.interception.status().unwrap().pods;
        pods.retain(|pod| pod.state != PodState::Excluded);
        pods
    }

    pub fn wait_for(&self, what: &str, done: impl Fn(&[PodStatus]) -> bool) -> Result<()> {
        wait(what, || done(&self.pods())).with_context(|| format!("{:?}", self.pods()))
    }

    pub fn wait_for_enrolled(&self, count: usize) -> Result<()> {
        let enrolled = |pod: &&PodStatus| matches!(pod.state, PodState::Enrolled { .. });
        self.wait_for("enrolled pods", |pods| {
            pods.len() == count && pods.iter().filter(enrolled).count() == count
        })
    }

    pub fn count(&self, reason: Reason) -> u64 {
        self.interception.status().unwrap().counters[reason as usize].1
    }

    /// The next captured connection: whose, from where, where to.
    pub fn accept(&self) -> Result<(Arc<Capture>, SocketAddr, Option<SocketAddr>)> {
        let begin = Instant::now();
        while begin.elapsed() < LIMIT {
            for (capture, sockets) in self.captures.lock().unwrap().values() {
                for socket in sockets {
                    match socket.accept() {
                        Ok((accepted, peer)) => {
                            let peer = peer.as_socket().context("no peer address")?;
                            let peer = SocketAddr::new(peer.ip().to_canonical(), peer.port());
                            let original = capture.original_dst.read(std::os::fd::AsFd::as_fd(&accepted))?;
                            return Ok((Arc::clone(capture), peer, original));
                        }
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                        Err(error) => return Err(error.into()),
                    }
                }
            }
            sleep(Duration::from_millis(1));
        }
        anyhow::bail!("no connection was captured")
    }

    /// The connection of `client` to `to` is captured, and everybody sees the right addresses.
    pub fn expect_captured(
        &self,
        client: io::Result<TcpStream>,
        to: &str,
        from: &str,
    ) -> Result<Arc<Capture>> {
        let client = client.with_context(|| format!("connect to {to}"))?;
        let (capture, peer, original) = self.accept()?;
        assert_eq!(original, Some(to.parse()?));
        assert_eq!(peer, client.local_addr()?);
        assert_eq!(peer.ip().to_string(), from);
        assert_eq!(client.peer_addr()?, to.parse()?);
        Ok(capture)
    }
}

pub fn wait(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let begin = Instant::now();
    while !done() {
        ensure!(begin.elapsed() < LIMIT, "waited in vain for {what}");
        sleep(Duration::from_millis(2));
    }
    Ok(())
}
