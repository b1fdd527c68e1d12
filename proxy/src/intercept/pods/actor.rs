//! The pods thread: sleeps, hears, looks at cgroups, keeps the table. What it does about a namespace is in `enrol`.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};
use std::io;
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, TryRecvError};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use tidegate_common::{Enrolment, NotEnrolled};

use super::changes::Changes;
use super::listen::Network;
use super::roots::Roots;
use super::table::Table;
use super::watch::Watch;
use super::{Board, Capture, OnPod, PodSettings, PodState, name_of};
use crate::intercept::error::InterceptError;
use crate::intercept::maps::Events;
use crate::intercept::programs::Interceptor;
use crate::sys::netns::{NetNs, NetNsId};
use crate::sys::{cgroup, mounts, process};

/// A namespace without processes is forgotten after this time: long enough for a process to move between two
/// cgroups, which looks like leaving one first.
const FORGET_AFTER: Duration = Duration::from_millis(100);

/// A cgroup with processes in the host's namespace, or in that of a container runtime, is looked at again after these
/// times. A runtime moves its first process into the cgroup, and into its namespace a moment later; only the first makes
/// an event.
const SETTLING: [Duration; 5] = [
    Duration::from_millis(5),
    Duration::from_millis(20),
    Duration::from_millis(80),
    Duration::from_millis(320),
    Duration::from_millis(1280),
];

/// So long after the first sign of a change in a namespace it is looked at: configuring an interface takes several steps.
/// A namespace whose routes change all the time is looked at no more often than after the second time.
const CHANGE_SETTLES: Duration = Duration::from_millis(2);
const CHANGE_INTERVAL: Duration = Duration::from_millis(100);

/// Bounds of the time until something that failed in one namespace is tried again; it doubles in between.
pub(super) const RETRY_FIRST: Duration = Duration::from_millis(20);
pub(super) const RETRY_LAST: Duration = Duration::from_secs(5);

/// How far up a process's ancestors are looked at: more than a runtime has between itself and its first process.
const ANCESTORS: usize = 8;

/// Full walks come so often at the least while cgroups can't all be watched …
const WALK_INTERVAL_UNWATCHED: Duration = Duration::from_secs(2);
/// … but are never closer than so many times what one takes: half a percent of a CPU.
const WALK_SHARE: u32 = 200;
/// A walk that was asked for (a connect from a namespace that nobody finds) waits this long after the last one.
const WALK_ON_DEMAND: Duration = Duration::from_millis(500);

/// What the main thread asks for.
#[derive(Debug)]
pub(super) enum Command {
    /// Forget every pod, then end.
    ForgetAll,
    /// End at once.
    End,
}

/// What the actor is made of.
pub(super) struct Parts {
    pub(super) settings: PodSettings,
    pub(super) interceptor: Arc<Mutex<Interceptor>>,
    pub(super) events: Option<Events>,
    pub(super) on_pod: OnPod,
    pub(super) inbox: Receiver<Command>,
    /// Readable when there is something in `inbox`.
    pub(super) woken: UnixStream,
    pub(super) board: Board,
}

pub(super) struct Actor {
    pub(super) parts: Parts,
    /// Where cgroup2 is mounted.
    pub(super) mount: PathBuf,
    /// The namespace that we run in.
    pub(super) own: NetNsId,
    pub(super) roots: Roots,
    pub(super) watch: Watch,
    pub(super) changes: Changes,
    pub(super) table: Table<NetNsId>,
    /// Every namespace that is known, kept open so that its id stays its own.
    pub(super) known: HashMap<NetNsId, Known>,
    pub(super) timers: BinaryHeap<Reverse<(Instant, Timer)>>,
    pub(super) last_walk: Instant,
    pub(super) next_walk: Instant,
    /// A successor enrols now; we only look on.
    pub(super) superseded: bool,
    /// Said once: /proc/PID/ns can't be read.
    pub(super) said_denied: bool,
}

pub(super) struct Known {
    pub(super) netns: Arc<NetNs>,
    pub(super) name: Arc<str>,
    pub(super) cgroup: PathBuf,
    pub(super) state: State,
    /// A [`Timer::Retry`] is set: never two at a time.
    pub(super) retrying: bool,
    /// When it was looked at for a change, or will be.
    pub(super) look_at: Option<Instant>,
    /// Since when it has no process.
    pub(super) empty_since: Option<Instant>,
}

pub(super) enum State {
    /// Left alone, whether processes come or go.
    Excluded,
    /// Tried again at a timer.
    Waiting { attempts: u32 },
    /// Captured.
    Enrolled { capture: Arc<Capture>, network: Network, attempts: u32 },
}

#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    /// Look at a cgroup again; the number counts down [`SETTLING`].
    Look(PathBuf, usize),
    /// Enrol a namespace, or complete its addresses.
    Retry(NetNsId),
    /// Something has changed in a namespace.
    Change(NetNsId),
    /// Forget a namespace unless it has processes again.
    Forget(NetNsId),
}

impl Actor {
    pub(super) fn new(parts: Parts) -> Result<Self, InterceptError> {
        let failed = |source| InterceptError::Pods { source };
        let mount = mounts::cgroup2().map_err(failed)?.ok_or(InterceptError::NoCgroup)?;
        let own = Arc::new(NetNs::current().map_err(failed)?);
        let now = Instant::now();
        let discover_below = parts.settings.discover.then(|| mount.clone());
        let mut actor = Self {
            roots: Roots::new(&parts.settings.cgroups, discover_below),
            changes: Changes::default(),
            parts,
            mount,
            own: own.id(),
            watch: Watch::new().map_err(failed)?,
            table: Table::default(),
            known: HashMap::new(),
            timers: BinaryHeap::new(),
            last_walk: now,
            next_walk: now,
            superseded: false,
            said_denied: false,
        };
        actor.meet_the_host(own)?;
        Ok(actor)
    }

    /// Our own namespace is captured from the start if processes of the host are wanted: the first connect of a process
    /// that nobody has seen must not pass. Otherwise it is excluded, and so is that of process 1, which is the host's
    /// when we run in a pod of our own.
    fn meet_the_host(&mut self, own: Arc<NetNs>) -> Result<(), InterceptError> {
        let init = NetNs::of_process(1).map(Arc::new).ok().filter(|init| init.id() != own.id());
        let captured = self.parts.settings.host_namespace;
        for (netns, captured) in [(own, captured)].into_iter().chain(init.map(|init| (init, false))) {
            let id = netns.id();
            let state = if captured { State::Waiting { attempts: 0 } } else { State::Excluded };
            let known = Known {
                name: "host".into(),
                cgroup: self.mount.clone(),
                netns,
                state,
                retrying: false,
                look_at: None,
                empty_since: None,
            };
            if !captured {
                self.interceptor().enrol(known.netns.cookie(), Enrolment::excluded())?;
                self.show(&known, PodState::Excluded);
            }
            self.known.insert(id, known);
            if captured {
                self.enrol(id);
            }
        }
        Ok(())
    }

    /// Finds what is there, then removes the enrolments of a former process whose namespaces are not.
    pub(super) fn first_walk(&mut self) -> Result<(), InterceptError> {
        self.walk();
        let mut interceptor = self.interceptor();
        let ours: HashSet<u64> = self.known.values().map(|known| known.netns.cookie()).collect();
        for cookie in interceptor.enrolments()?.into_keys().filter(|cookie| !ours.contains(cookie)) {
            interceptor.forget(cookie)?;
        }
        Ok(())
    }

    /// Until the main thread says to end.
    pub(super) fn run(&mut self) {
        loop {
            self.sleep();
            match self.parts.inbox.try_recv() {
                Ok(Command::ForgetAll) => return self.forget_all(),
                Ok(Command::End) | Err(TryRecvError::Disconnected) => return,
                Err(TryRecvError::Empty) => {}
            }
            self.hear_inotify();
            self.hear_connects();
            self.hear_changes();
            self.fire_timers();
            if Instant::now() >= self.next_walk {
                self.walk();
            }
        }
    }

    fn sleep(&self) {
        let next_timer = self.timers.peek().map_or(self.next_walk, |Reverse((at, _))| *at);
        let wait = next_timer.min(self.next_walk).saturating_duration_since(Instant::now());
        // Rounded up, so that the timer is due when poll returns.
        let millis = u16::try_from(wait.as_micros().div_ceil(1000)).unwrap_or(u16::MAX);
        let mut fds = vec![
            PollFd::new(self.parts.woken.as_fd(), PollFlags::POLLIN),
            PollFd::new(self.watch.as_fd(), PollFlags::POLLIN),
        ];
        fds.extend(self.parts.events.iter().map(|events| PollFd::new(events.as_fd(), PollFlags::POLLIN)));
        fds.extend(self.changes.descriptors().map(|socket| PollFd::new(socket, PollFlags::POLLIN)));
        if let Err(errno) = poll(&mut fds, PollTimeout::from(millis))
            && errno != nix::Error::EINTR
        {
            tracing::error!(%errno, "poll failed in the pods thread");
            std::thread::sleep(RETRY_FIRST);
        }
    }

    fn hear_inotify(&mut self) {
        let happened = self.watch.drain();
        for cgroup in &happened.removed {
            self.watch.remove(cgroup);
            self.set_namespaces(cgroup, HashSet::new());
        }
        let concerns_roots = |path: &PathBuf| self.roots.concerns(path);
        if happened.above.iter().any(concerns_roots) || happened.removed.iter().any(concerns_roots) {
            for root in self.check_roots() {
                self.look_below(&root, &mut HashSet::new());
            }
        }
        for cgroup in happened.changed {
            self.look_below(&cgroup, &mut HashSet::new());
        }
        if happened.overflow {
            self.next_walk = Instant::now();
        }
    }

    /// Connects from namespaces that are not enrolled.
    fn hear_connects(&mut self) {
        while let Some(event) = self.parts.events.as_mut().and_then(Events::pop) {
            self.hear_connect(event);
        }
    }

    fn hear_connect(&mut self, event: NotEnrolled) {
        let is_known = |known: &Known| known.netns.cookie() == event.netns_cookie;
        if let Some((id, _)) = self.known.iter().find(|(_, known)| is_known(known)) {
            return self.refresh(*id);
        }
        let cgroup = cgroup::of_process(event.tgid, &self.mount);
        if let Some(cgroup) = cgroup.filter(|cgroup| self.is_ours(cgroup)) {
            // What connects is no runtime's helper.
            self.look(&cgroup, SETTLING.len());
        }
        if !self.known.values().any(is_known) {
            // The process has gone, or is numbered otherwise where we are.
            tracing::debug!(?event, "a connect from a namespace that was not found; walking");
            self.next_walk = self.next_walk.min(self.last_walk + WALK_ON_DEMAND);
        }
    }

    /// An address, an interface or a route of a pod has changed.
    fn hear_changes(&mut self) {
        let now = Instant::now();
        for id in self.changes.drain() {
            let Some(known) = self.known.get_mut(&id) else { continue };
            if known.look_at.is_some_and(|at| at > now) {
                continue;
            }
            let earliest = known.look_at.map_or(now, |last| last + CHANGE_INTERVAL);
            let at = earliest.max(now + CHANGE_SETTLES);
            known.look_at = Some(at);
            self.timers.push(Reverse((at, Timer::Change(id))));
        }
    }

    fn fire_timers(&mut self) {
        while let Some(Reverse((at, _))) = self.timers.peek()
            && *at <= Instant::now()
        {
            match self.timers.pop() {
                Some(Reverse((_, Timer::Look(cgroup, step)))) => self.look(&cgroup, step),
                Some(Reverse((_, Timer::Retry(id)))) => self.retry(id),
                Some(Reverse((_, Timer::Change(id)))) => self.look_inside(id),
                // The host stays, whether or not one of its processes is there at the moment.
                Some(Reverse((_, Timer::Forget(id)))) if id != self.own && self.is_empty_for_long(id) => {
                    self.forget(id);
                }
                _ => {}
            }
        }
    }

    /// A namespace whose processes come and go has several timers: those of earlier ends don't count.
    fn is_empty_for_long(&self, id: NetNsId) -> bool {
        let since = self.known.get(&id).and_then(|known| known.empty_since);
        !self.table.is_present(id) && since.is_some_and(|since| since.elapsed() >= FORGET_AFTER)
    }

    pub(super) fn after(&mut self, wait: Duration, timer: Timer) {
        self.timers.push(Reverse((Instant::now() + wait, timer)));
    }

    /// Looks at every cgroup.
    fn walk(&mut self) {
        let begin = Instant::now();
        self.refresh_all();
        self.check_roots();
        let mut walked = HashSet::new();
        for root in self.roots.paths() {
            self.look_below(&root, &mut walked);
        }
        for removed in self.table.others(&walked) {
            self.watch.remove(&removed);
            self.set_namespaces(&removed, HashSet::new());
        }
        self.last_walk = Instant::now();
        let wanted = self.parts.settings.walk_interval;
        let least = if self.watch.is_complete() { wanted } else { wanted.min(WALK_INTERVAL_UNWATCHED) };
        self.next_walk = self.last_walk + least.max(begin.elapsed() * WALK_SHARE);
    }

    fn is_ours(&self, cgroup: &Path) -> bool {
        self.roots.covers(cgroup)
    }

    /// Looks at a cgroup and everything below it.
    fn look_below(&mut self, cgroup: &Path, walked: &mut HashSet<PathBuf>) {
        let mut left = vec![cgroup.to_owned()];
        while let Some(cgroup) = left.pop() {
            // The watch comes first, so that what is made after the look makes an event.
            self.look(&cgroup, 0);
            match cgroup::children(&cgroup) {
                Ok(children) => left.extend(children),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => tracing::warn!(%error, cgroup = %cgroup.display(), "can't list a cgroup"),
            }
            walked.insert(cgroup);
        }
    }

    /// Looks at the processes of one cgroup. `step` says how often it has been looked at for settling.
    fn look(&mut self, cgroup: &Path, step: usize) {
        self.watch.add(cgroup);
        let processes = match cgroup::processes(cgroup) {
            Ok(processes) => processes,
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    tracing::warn!(%error, cgroup = %cgroup.display(), "can't list the processes of a cgroup");
                }
                Vec::new()
            }
        };
        let (mut namespaces, mut in_transit) = (HashSet::new(), false);
        for pid in processes {
            match NetNsId::of_process(pid) {
                Ok(id) if self.known.contains_key(&id) => drop(namespaces.insert(id)),
                Ok(id) if step < SETTLING.len() && self.is_in_transit(pid, id) => in_transit = true,
                Ok(_) => namespaces.extend(self.meet(pid, cgroup)),
                Err(error) => self.process_is_unreadable(pid, &error),
            }
        }
        let unsettled = in_transit || namespaces.contains(&self.own);
        self.set_namespaces(cgroup, namespaces);
        if unsettled && let Some(wait) = SETTLING.get(step) {
            self.after(*wait, Timer::Look(cgroup.to_owned(), step + 1));
        }
    }

    /// Whether a process is on its way into a pod. A container runtime starts it in its own namespace, which need not be
    /// ours: until it has entered the pod's, one of its ancestors is in the same one and in no pod's cgroup. Without this
    /// the runtime's namespace would be enrolled as the pod for a moment, and the pod's own only later.
    fn is_in_transit(&self, pid: u32, id: NetNsId) -> bool {
        let mut pid = pid;
        for _ in 0..ANCESTORS {
            match process::parent(pid) {
                Ok(parent) if NetNsId::of_process(parent).is_ok_and(|of_parent| of_parent == id) => {
                    pid = parent;
                }
                _ => return false,
            }
            if !cgroup::of_process(pid, &self.mount).is_some_and(|cgroup| self.is_ours(&cgroup)) {
                return true;
            }
        }
        false
    }

    /// A process in a namespace that is not known: opens it. The process may have ended or moved on meanwhile.
    fn meet(&mut self, pid: u32, cgroup: &Path) -> Option<NetNsId> {
        let netns = match NetNs::of_process(pid) {
            Ok(netns) => Arc::new(netns),
            Err(error) => {
                self.process_is_unreadable(pid, &error);
                return None;
            }
        };
        let id = netns.id();
        self.known.entry(id).or_insert_with(|| Known {
            netns,
            name: name_of(cgroup, &self.roots.paths()),
            cgroup: cgroup.to_owned(),
            state: State::Waiting { attempts: 0 },
            retrying: false,
            look_at: None,
            empty_since: None,
        });
        Some(id)
    }

    fn process_is_unreadable(&mut self, pid: u32, error: &io::Error) {
        let gone = error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ESRCH);
        if gone || self.said_denied {
            return;
        }
        self.said_denied = true;
        tracing::warn!(
            %error, pid,
            "can't open the network namespace of a process: its pod is not captured; tidegate needs CAP_SYS_PTRACE \
             and CAP_SYS_ADMIN for that"
        );
    }

    fn set_namespaces(&mut self, cgroup: &Path, namespaces: HashSet<NetNsId>) {
        let change = self.table.set(cgroup, namespaces);
        for id in change.appeared {
            // Excluded, or back before it was forgotten: nothing to do.
            if matches!(self.known.get(&id), Some(Known { state: State::Waiting { attempts: 0 }, .. })) {
                self.enrol(id);
            }
        }
        for id in change.vanished {
            if let Some(known) = self.known.get_mut(&id) {
                known.empty_since = Some(Instant::now());
            }
            self.after(FORGET_AFTER, Timer::Forget(id));
        }
    }
}
