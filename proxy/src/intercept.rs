//! Interception: which connections of which pods go to the proxy, and how they get there.
//!
//! [`Interception`] is the whole of it for the main thread: it loads and attaches the eBPF programs
//! ([`programs::Interceptor`]), finds and enrols pods ([`pods::Pods`], a thread of its own), and applies what a
//! configuration wants captured ([`destinations::Destinations`]). Workers get [`Capture`] with each capture socket,
//! and [`OwnSockets`].
//!
//! Order at the start: programs, capture listeners, enrolments, rules. At a stop: rules, handshakes in flight,
//! enrolments, capture listeners, programs. So nothing is captured that nobody serves.
#![allow(unsafe_code)] // bpf(2), in `bpf` only

use std::collections::HashMap;
use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidegate_common::{Destination, Enrolment, Reason, RuleValue, Verdict};

use crate::config::bootstrap;
use crate::sys::{cgroup as cgroups, mounts};

pub mod audit;
mod bpf;
mod bpffs;
pub mod cgroup;
pub mod destinations;
pub mod error;
pub mod flows;
mod links;
pub mod maps;
pub mod original_dst;
pub mod pods;
pub mod programs;
pub mod tables;

pub use bpffs::default_pin_dir;
pub use destinations::Destinations;
pub use error::InterceptError;
pub use links::Standing;
pub use pods::{Capture, OnPod, Pod, PodEvent, PodState, PodStatus};
pub use programs::{Detached, EbpfLog};

/// Port of the capture listeners where nothing else is wanted.
pub const CAPTURE_PORT: u16 = 15001;

/// How long a stop gives handshakes that have begun. On one machine they take microseconds.
const HANDSHAKE_GRACE: Duration = Duration::from_millis(20);
/// And at most those that are known to be in flight: one whose process is stopped by a debugger may never end.
const IN_FLIGHT_GRACE: Duration = Duration::from_millis(500);

/// How to start.
#[derive(Clone, Debug, Default)]
pub struct Settings {
    /// What to intercept.
    pub wanted: bootstrap::Interception,
    /// How many workers there are: each pod gets as many capture sockets.
    pub workers: usize,
    /// Connections may go straight to endpoints, as [`tables::Tables`] say.
    pub kernel_path: bool,
    /// Compile the programs' debug lines in ([`Interception::take_log`]).
    pub debug: bool,
}

/// A running interception. Dropping it leaves everything attached (for a successor, or `tidegate cleanup`);
/// [`Self::stop`] removes it.
#[derive(Debug)]
pub struct Interception {
    pods: pods::Pods,
    interceptor: Arc<Mutex<programs::Interceptor>>,
    own_sockets: OwnSockets,
    attach_points: Vec<PathBuf>,
    namespaces: flows::Namespaces,
}

/// See [`Interception::hold`].
#[derive(Debug)]
#[must_use = "others can take over when it is dropped"]
pub struct Hold(#[expect(dead_code, reason = "closing it ends the lock")] File);

/// What the admin server shows.
#[derive(Clone, Debug)]
pub struct Status {
    /// Every namespace that is known.
    pub pods: Vec<PodStatus>,
    /// Every counter, in the order of [`Reason::ALL`].
    pub counters: Vec<(Reason, u64)>,
    /// Handshakes in flight.
    pub in_flight: usize,
    /// Whose programs run. Broken too when the pods thread has ended.
    pub standing: Standing,
}

impl Interception {
    /// Loads and attaches the programs, and enrols every pod that is there. Nothing is captured before
    /// [`Self::apply`] (except what a predecessor captures already).
    ///
    /// `on_pod` runs on the pods thread, and for the first pods before this returns.
    ///
    /// Fails with [`InterceptError::NoCgroup`] when no cgroup is configured and there is no kubepods subtree; else
    /// with what the kernel or the machine lacks. The proxy can go on without interception then.
    pub fn start(settings: &Settings, mut on_pod: OnPod) -> Result<Self, InterceptError> {
        let wanted = &settings.wanted;
        let Places { pods, host, discover } = Places::of(wanted)?;
        let host_namespace = !host.is_empty();
        let mut options = programs::Options::new(pods)?;
        options.host_cgroups = host;
        options.debug = settings.debug;
        options.fail_mode = match wanted.fail_mode {
            bootstrap::FailMode::Open => tidegate_common::FailMode::Open,
            bootstrap::FailMode::Closed => tidegate_common::FailMode::Closed,
        };
        options.excluded.clone_from(&wanted.exclude.cidrs);
        if let Some(pin_dir) = &wanted.pin_path {
            options.pin_dir.clone_from(pin_dir);
        }
        let sizes = &mut options.sizes;
        if settings.kernel_path {
            let (wanted, default) = (wanted.kernel_path, tables::TableSizes::ON);
            // Entry 0 of each table is not used.
            let entries = |wanted: Option<u32>, default: u32| wanted.map_or(default, |entries| entries + 1);
            sizes.tables = tables::TableSizes {
                services: entries(wanted.services, default.services),
                clusters: entries(wanted.clusters, default.clusters),
                hosts: entries(wanted.hosts, default.hosts),
                arena: wanted.balancing_words.unwrap_or(default.arena),
                ..default
            };
        }
        sizes.in_flight = wanted.in_flight_capacity.unwrap_or(sizes.in_flight);
        sizes.destinations = wanted.destination_capacity.unwrap_or(sizes.destinations);
        sizes.namespaces = wanted.namespace_capacity.unwrap_or(sizes.namespaces);
        let mut interceptor = programs::Interceptor::load(&options)?;
        let events = interceptor.take_events();
        let own_sockets =
            OwnSockets(interceptor.covers_own_cgroup().then(|| interceptor.own_socket_marker()));
        let attach_points = interceptor.attach_points().to_vec();
        let interceptor = Arc::new(Mutex::new(interceptor));
        let pod_settings = pods::PodSettings {
            cgroups: attach_points.clone(),
            discover,
            host_namespace,
            capture_port: wanted.capture_port.unwrap_or(CAPTURE_PORT),
            sockets_per_pod: settings.workers.max(1),
            walk_interval: pods::WALK_INTERVAL,
        };
        let namespaces = flows::Namespaces::default();
        let known = namespaces.clone();
        let note = Box::new(move |event| {
            known.note(&event);
            on_pod(event);
        });
        let pods = pods::Pods::start(pod_settings, Arc::clone(&interceptor), events, note)?;
        Ok(Self { pods, interceptor, own_sockets, attach_points, namespaces })
    }

    /// Makes the kernel capture exactly this. The workers must have the listeners already (publish first).
    pub fn apply(&self, destinations: &Destinations) -> Result<(), InterceptError> {
        let mut interceptor = self.interceptor();
        interceptor.set_destinations(&destinations.kernel_rules())?;
        interceptor.set_default_verdict(destinations.everything_else.verdict())
    }

    /// The tables of the kernel path.
    pub fn tables(&self) -> Arc<tables::Tables> {
        self.interceptor().tables()
    }

    /// Connections of the kernel path that have ended. Once; then it belongs to whoever took it.
    pub fn take_flow_events(&self) -> Option<tables::FlowEvents> {
        self.interceptor().take_flow_events()
    }

    /// Ends connections of the kernel path.
    pub fn flow_sockets(&self) -> flows::FlowSockets {
        let interceptor = self.interceptor();
        flows::FlowSockets {
            map: interceptor.flow_map(),
            namespaces: self.namespaces.clone(),
            tables: interceptor.tables(),
        }
    }

    /// How workers keep their own upstream sockets from being captured.
    pub fn own_sockets(&self) -> OwnSockets {
        self.own_sockets.clone()
    }

    /// Where the programs are attached.
    pub fn attach_points(&self) -> &[PathBuf] {
        &self.attach_points
    }

    /// Ids of the programs, for `bpftool prog`.
    pub fn program_ids(&self) -> Vec<u32> {
        self.interceptor().program_ids()
    }

    /// The programs' debug lines, when they were asked for. Once.
    pub fn take_log(&self) -> Option<EbpfLog> {
        self.interceptor().take_log()
    }

    /// A look at everything.
    pub fn status(&self) -> Result<Status, InterceptError> {
        let interceptor = self.interceptor();
        Ok(Status {
            pods: self.pods.status(),
            counters: interceptor.counters()?,
            in_flight: interceptor.in_flight_len()?,
            standing: match interceptor.standing() {
                Standing::Current if !self.pods.is_running() => Standing::Broken,
                standing => standing,
            },
        })
    }

    /// What the kernel's map of namespaces holds, by netns cookie.
    pub fn enrolments(&self) -> Result<HashMap<u64, Enrolment>, InterceptError> {
        self.interceptor().enrolments()
    }

    /// Keeps other processes from taking over as long as the result lives, which must not be long: the tables of the kernel path
    /// are this process's to change meanwhile. Rules and enrolments must not be changed by then: that would wait for ever.
    ///
    /// Errors: [`InterceptError::Superseded`] when somebody has taken over; what keeps it from opening the pin directory.
    pub fn hold(&self) -> Result<Hold, InterceptError> {
        self.interceptor().lock_current().map(Hold)
    }

    /// Whether another process has taken over; then this one has only to drain.
    pub fn is_superseded(&self) -> bool {
        self.interceptor().is_superseded()
    }

    /// Ends the interception and removes everything, unless a successor has taken over. New connections pass
    /// untouched from here on; connections that are established stay. Every pod is reported as gone: the workers
    /// take what waits in the accept queues and close the capture sockets.
    pub fn stop(self) -> Result<Detached, InterceptError> {
        self.capture_nothing();
        let Self { pods, interceptor, .. } = self;
        pods.stop();
        match Arc::into_inner(interceptor) {
            Some(interceptor) => interceptor.into_inner().unwrap_or_else(PoisonError::into_inner).detach(),
            None => {
                Err(InterceptError::Pods { source: io::Error::other("the pods thread is still at work") })
            }
        }
    }

    /// Ends the interception, except that connections go on to be balanced in the kernel as the tables say now: until
    /// another process takes over, or `tidegate cleanup`. Captured connections are served to their end by the workers.
    pub fn keep_kernel_path(self, destinations: &Destinations) {
        let mut balanced = destinations.kernel_rules();
        balanced.retain(|_, rule| rule.verdict == Verdict::Balance);
        self.reduce_rules(&balanced);
    }

    /// Removes the rules, then waits for the handshakes that they have begun.
    fn capture_nothing(&self) {
        self.reduce_rules(&HashMap::new());
    }

    fn reduce_rules(&self, rest: &HashMap<Destination, RuleValue>) {
        let cleared = {
            let mut interceptor = self.interceptor();
            interceptor.set_default_verdict(Verdict::Leave).and_then(|()| interceptor.set_destinations(rest))
        };
        match cleared {
            Err(InterceptError::Superseded(_)) => return,
            Err(error) => tracing::warn!(%error, "can't remove the rules before detaching"),
            Ok(_) => {}
        }
        let deadline = Instant::now() + IN_FLIGHT_GRACE;
        std::thread::sleep(HANDSHAKE_GRACE);
        while self.interceptor().in_flight_len().is_ok_and(|len| len > 0) && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(2));
        }
    }

    fn interceptor(&self) -> MutexGuard<'_, programs::Interceptor> {
        self.interceptor.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Keeps the process's own upstream sockets from being captured. The default does nothing: for a process that
/// intercepts nothing, or whose cgroup is not intercepted.
#[derive(Clone, Debug, Default)]
pub struct OwnSockets(Option<original_dst::OwnSocketMarker>);

impl OwnSockets {
    /// Call it before connect(2). At most one system call.
    pub fn mark(&self, socket: impl AsFd) -> io::Result<()> {
        match &self.0 {
            Some(marker) => marker.mark(socket.as_fd()),
            None => Ok(()),
        }
    }
}

impl fmt::Debug for programs::Interceptor {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Interceptor").field("attach_points", &self.attach_points()).finish_non_exhaustive()
    }
}

/// Whether this machine has a kubepods subtree by now: for a proxy that found none at its start.
pub fn has_kubepods() -> bool {
    mounts::cgroup2()
        .ok()
        .flatten()
        .is_some_and(|mount| cgroups::kubepods(&mount).is_ok_and(|found| !found.is_empty()))
}

/// Where to attach.
struct Places {
    pods: Vec<PathBuf>,
    host: Vec<PathBuf>,
    /// The kubepods subtrees: more may appear.
    discover: bool,
}

impl Places {
    /// The configured directories (relative ones are below the cgroup2 mount), or the kubepods subtrees.
    fn of(wanted: &bootstrap::Interception) -> Result<Self, InterceptError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| InterceptError::Cgroup { path, source }
        };
        let mount = mounts::cgroup2()
            .map_err(failed(Path::new("/proc/self/mounts")))?
            .ok_or(InterceptError::NoCgroup)?;
        let below = |paths: &[PathBuf]| paths.iter().map(|path| mount.join(path)).collect::<Vec<_>>();
        let (mut pods, mut host) = (below(&wanted.cgroups), below(&wanted.host_cgroups));
        let discover = pods.is_empty() && host.is_empty();
        if discover {
            pods = cgroups::kubepods(&mount).map_err(failed(&mount))?;
        }
        if wanted.host_namespace {
            host.append(&mut pods);
        }
        Ok(Self { pods, host, discover })
    }
}
