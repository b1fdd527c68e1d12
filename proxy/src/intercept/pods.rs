//! Pods: network namespaces that have processes in the configured cgroups.
//!
//! One thread ([`Pods`]) finds them, opens capture listeners inside each, hands these to the workers by
//! [`PodEvent`]s, and only then enrols the namespace. The other way round when the last process is gone: the
//! enrolment first, then the listeners, then the last descriptor of the namespace, so that it can die.
//!
//! It sleeps until inotify reports a cgroup, the eBPF programs report a connect from a namespace that is not
//! enrolled, a namespace reports that its addresses have changed, or a timer of its own is due. A full walk is the safety net, so rarely that it costs at most half a
//! percent of one CPU.

use std::fmt;
use std::io::{self, Write as _};
use std::net::{Ipv4Addr, Ipv6Addr};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use socket2::Socket;

use super::error::InterceptError;
use super::maps::Events;
use super::original_dst::OriginalDstReader;
use super::programs::Interceptor;
use crate::sys::netns::{NetNs, NetNsId};

mod actor;
mod changes;
mod enrol;
mod listen;
mod roots;
mod table;
mod watch;

/// A pod: one network namespace whose connections are captured.
#[derive(Debug)]
pub struct Pod {
    /// For logs and stats: the Kubernetes uid (`pod<uid>`) if the cgroup path has one, else the path below the
    /// configured cgroup, else `host`.
    pub name: Arc<str>,
    /// The cgroup in which it was found first.
    pub cgroup: PathBuf,
    /// Where its capture listeners listen, on `lo`.
    pub capture_port: u16,
    /// Its namespace; kept open until the last connection has gone.
    netns: Arc<NetNs>,
    /// Whether this is the namespace that tidegate runs in.
    host: bool,
}

impl Pod {
    /// What to pass to [`crate::sys::netns::with_socket_namespace`] for an upstream socket of this pod; `None` is
    /// the host.
    pub fn socket_namespace(&self) -> Option<&Arc<NetNs>> {
        (!self.host).then_some(&self.netns)
    }

    /// Its namespace.
    pub fn netns(&self) -> &Arc<NetNs> {
        &self.netns
    }

    /// Whether it is not a pod but the host's own namespace.
    pub fn is_host(&self) -> bool {
        self.host
    }
}

impl fmt::Display for Pod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name)
    }
}

/// What belongs to a capture socket: whose it is, and how to ask where an accepted connection was meant to go.
#[derive(Debug)]
pub struct Capture {
    /// Whose connections arrive here.
    pub pod: Arc<Pod>,
    /// Reads the original destination of an accepted connection.
    pub original_dst: OriginalDstReader,
}

/// What the workers have to do.
#[derive(Debug)]
pub enum PodEvent {
    /// Accept on these sockets, one for each worker. They listen already.
    Enrolled {
        /// The pod.
        capture: Arc<Capture>,
        /// As many as [`PodSettings::sockets_per_pod`].
        sockets: Vec<Socket>,
    },
    /// Close the pod's sockets, [`crate::sys::netns::leave`] its namespace on each worker, and end its connections
    /// before long: until then they keep its network alive.
    Gone {
        /// The same as at enrolment.
        capture: Arc<Capture>,
    },
}

/// Receives events, on the pods thread. It must not wait for the main thread.
pub type OnPod = Box<dyn FnMut(PodEvent) + Send>;

/// What to watch.
#[derive(Clone, Debug)]
pub struct PodSettings {
    /// cgroup v2 directories; everything below belongs to them. The programs are attached to them already.
    pub cgroups: Vec<PathBuf>,
    /// Whether kubepods subtrees that appear later belong to them, too.
    pub discover: bool,
    /// Whether some of these cgroups are of the host, so that our own network namespace is enrolled from the start.
    /// Otherwise it is enrolled as excluded, and connects from it are counted as such.
    pub host_namespace: bool,
    /// Wanted port of the capture listeners.
    pub capture_port: u16,
    /// How many capture sockets each pod gets: the number of workers.
    pub sockets_per_pod: usize,
    /// Full walks are at least this far apart, and farther if one takes long. [`WALK_INTERVAL`].
    pub walk_interval: Duration,
}

/// The usual time between full walks. They only find what makes no event: a process that changes its namespace long
/// after it entered its cgroup and doesn't connect, or leaves one behind.
pub const WALK_INTERVAL: Duration = Duration::from_secs(10);

/// What is known about one namespace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct PodStatus {
    /// [`Pod::name`].
    pub name: Arc<str>,
    /// Identity of the namespace.
    pub netns: NetNsId,
    /// Its cookie.
    pub netns_cookie: u64,
    /// What it is to us.
    pub state: PodState,
}

/// What a namespace is to us.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum PodState {
    /// Its connections are captured.
    Enrolled {
        /// Port of the capture listeners.
        capture_port: u16,
        /// Source of its IPv4 connections.
        v4: Option<Ipv4Addr>,
        /// Source of its IPv6 connections.
        v6: Option<Ipv6Addr>,
    },
    /// Known and left alone.
    Excluded,
    /// It can't be enrolled yet; tried again.
    Waiting {
        /// Why.
        reason: String,
    },
}

/// All namespaces that are known, shared with whoever shows them.
type Board = Arc<Mutex<std::collections::BTreeMap<NetNsId, PodStatus>>>;

/// The thread that finds and enrols pods. Dropping it ends the thread and leaves the enrolments alone.
#[derive(Debug)]
pub struct Pods {
    commands: Sender<actor::Command>,
    /// A byte wakes the thread; so does closing it.
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
    board: Board,
}

impl Pods {
    /// Starts the thread and returns after the first walk: every pod that is there now has been enrolled, or is
    /// waiting for a stated reason. Enrolments of a former process whose pods are gone have been removed.
    pub fn start(
        settings: PodSettings,
        interceptor: Arc<Mutex<Interceptor>>,
        events: Option<Events>,
        on_pod: OnPod,
    ) -> Result<Self, InterceptError> {
        let failed = |source: io::Error| InterceptError::Pods { source };
        let (commands, inbox) = channel();
        let (wake, woken) = UnixStream::pair().map_err(failed)?;
        woken.set_nonblocking(true).map_err(failed)?;
        let board = Board::default();
        let (ready, is_ready) = channel();
        let parts =
            actor::Parts { settings, interceptor, events, on_pod, inbox, woken, board: Arc::clone(&board) };
        let thread =
            std::thread::Builder::new().name("pods".into()).spawn(move || match actor::Actor::new(parts) {
                Ok(mut actor) => {
                    let _ = ready.send(actor.first_walk());
                    actor.run();
                }
                Err(error) => drop(ready.send(Err(error))),
            });
        let this = Self { commands, wake, thread: Some(thread.map_err(failed)?), board };
        match is_ready.recv() {
            Ok(result) => result.map(|()| this),
            Err(_) => {
                Err(failed(io::Error::other("the pods thread ended at once; its panic message says why")))
            }
        }
    }

    /// Every namespace that is known, in the order of [`NetNsId`].
    pub fn status(&self) -> Vec<PodStatus> {
        self.board.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect()
    }

    /// Whether the thread is alive: it never ends by itself.
    pub fn is_running(&self) -> bool {
        self.thread.as_ref().is_some_and(|thread| !thread.is_finished())
    }

    /// Forgets every pod (enrolment, then [`PodEvent::Gone`]) and ends the thread. Enrolments that a successor has
    /// taken over are not touched.
    pub fn stop(mut self) {
        self.end(actor::Command::ForgetAll);
    }

    fn end(&mut self, command: actor::Command) {
        let Some(thread) = self.thread.take() else { return };
        let _ = self.commands.send(command);
        if let Err(error) = self.wake.write_all(&[1]) {
            tracing::error!(%error, "can't wake the pods thread");
            return;
        }
        if thread.join().is_err() {
            tracing::error!("the pods thread panicked");
        }
    }
}

impl Drop for Pods {
    fn drop(&mut self) {
        self.end(actor::Command::End);
    }
}

/// A name for the pod of this cgroup: its Kubernetes uid if the path has one, else the path below the root.
fn name_of(cgroup: &Path, roots: &[PathBuf]) -> Arc<str> {
    let uid = cgroup.components().find_map(|component| {
        // `pod<uid>`, or `kubepods-burstable-pod<uid>.slice` with `_` for `-`.
        let name = component.as_os_str().to_str()?;
        let name = name.strip_suffix(".slice").unwrap_or(name);
        let uid = &name[name.rfind("pod")? + 3..];
        let plain = uid.bytes().all(|byte| byte.is_ascii_hexdigit() || matches!(byte, b'-' | b'_'));
        (uid.len() >= 32 && plain).then(|| format!("pod{}", uid.replace('_', "-")))
    });
    let relative = || {
        let root = roots.iter().find(|root| cgroup.starts_with(root))?;
        let below = cgroup.strip_prefix(root).ok()?;
        let shown = if below.as_os_str().is_empty() { Path::new(root.file_name()?) } else { below };
        Some(shown.display().to_string())
    };
    uid.or_else(relative).unwrap_or_else(|| cgroup.display().to_string()).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let roots = [PathBuf::from("/sys/fs/cgroup/kubepods.slice"), PathBuf::from("/sys/fs/cgroup/mine")];
        for (cgroup, name) in [
            (
                "/sys/fs/cgroup/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod0c5e9a3e_7f0b_4d5c_9a6d_2f1b8e7c4d3a.slice/cri-containerd-abc.scope",
                "pod0c5e9a3e-7f0b-4d5c-9a6d-2f1b8e7c4d3a",
            ),
            (
                "/sys/fs/cgroup/kubepods/besteffort/pod0c5e9a3e-7f0b-4d5c-9a6d-2f1b8e7c4d3a/c1",
                "pod0c5e9a3e-7f0b-4d5c-9a6d-2f1b8e7c4d3a",
            ),
            ("/sys/fs/cgroup/mine/client", "client"),
            ("/sys/fs/cgroup/mine/podman-1/ctr", "podman-1/ctr"),
            ("/sys/fs/cgroup/mine", "mine"),
            ("/elsewhere", "/elsewhere"),
        ] {
            assert_eq!(&*name_of(Path::new(cgroup), &roots), name);
        }
    }
}
