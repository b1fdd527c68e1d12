//! The interception as the main thread sees it: load, attach, pin, rules, enrolment, counters, detach.

use std::collections::HashMap;
use std::fs::File;
use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use aya::programs::ProgramType;
use aya::sys::{BpfHelper, is_helper_supported};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader};
use aya_log::EbpfLogger;
use tidegate_common::{
    Destination, Enrolment, FailMode, Place, Reason, RuleValue, Settings, Verdict, global, map,
};

use super::bpffs::{PinDir, default_pin_dir, remove_dir_with_files};
use super::cgroup::{self, Cgroup, check_places, covers, outermost};
use super::error::InterceptError;
use super::links::{self, Links, Points, Standing, detach_all};
use super::maps::{self, Events, MapSizes, Maps};
use super::original_dst::{OriginalDstReader, OwnSocketMarker};
use super::tables::{FlowEvents, TableSizes, Tables};
use crate::config::listener::Cidr;

/// The compiled programs; `cargo xtask build-ebpf` makes it.
static OBJECT: &[u8] = aya::include_bytes_aligned!("../../../proxy-ebpf/prebuilt/tidegate.o");

/// The eBPF half writes these log lines.
pub type EbpfLog = EbpfLogger<&'static dyn ::log::Log>;

/// How to load and attach.
#[derive(Clone, Debug)]
pub struct Options {
    /// Directory of pins, below a bpffs. Created when missing; the bpffs is mounted when it is missing.
    pub pin_dir: PathBuf,
    /// cgroup v2 directories whose processes (with everything below) are intercepted, those of the agent's own network
    /// namespace left out. One that lies below another is dropped.
    pub cgroups: Vec<PathBuf>,
    /// The same with those of the agent's own network namespace. None may lie below one of `cgroups`.
    pub host_cgroups: Vec<PathBuf>,
    /// The cgroup of this process, to which its accepted sockets belong; [`cgroup::own`] knows it.
    pub agent_cgroup: PathBuf,
    /// Sizes of the maps.
    pub sizes: MapSizes,
    /// Networks that only rules for a single address take: a wildcard or the default verdict leaves them alone.
    pub excluded: Vec<Cidr>,
    /// What a connect gets that should be captured and can't be.
    pub fail_mode: FailMode,
    /// Log each decision of the programs (see [`Interceptor::take_log`]). Off, the programs don't contain the lines.
    pub debug: bool,
}

impl Options {
    /// Defaults for these attach points. Fails when the process's own cgroup can't be found.
    pub fn new(cgroups: Vec<PathBuf>) -> Result<Self, InterceptError> {
        let agent_cgroup = cgroup::own()
            .map_err(|source| InterceptError::Cgroup { path: "/proc/self/cgroup".into(), source })?;
        Ok(Self {
            pin_dir: default_pin_dir(),
            cgroups,
            host_cgroups: Vec::new(),
            agent_cgroup,
            sizes: MapSizes::default(),
            excluded: Vec::new(),
            fail_mode: FailMode::default(),
            debug: false,
        })
    }
}

/// What [`Interceptor::detach`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Detached {
    /// Everything was ours and is gone.
    Removed,
    /// A successor has taken over; nothing was touched.
    Superseded,
}

/// What [`cleanup`] removed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cleaned {
    /// Links that were detached.
    pub links: usize,
    /// Map directories that were removed.
    pub map_dirs: usize,
}

/// The loaded and attached programs.
///
/// Dropping it leaves them attached (they are pinned), so that a restart or an upgrade has no gap;
/// [`Self::detach`] removes them. A method that changes something fails with [`InterceptError::Superseded`] once
/// another process has taken over.
pub struct Interceptor {
    // Holds the programs' and logs' descriptors.
    ebpf: Ebpf,
    maps: Maps,
    links: Links,
    dir: PinDir,
    events: Option<Events>,
    log: Option<EbpfLog>,
    settings: Settings,
    /// What the destinations map holds.
    destinations: HashMap<Destination, u32>,
    /// Wanted attach points. One that was removed stays here, to be attached to when it is made again.
    places: Vec<(PathBuf, Place)>,
    agent_cgroup: PathBuf,
    attach_points: Vec<PathBuf>,
    covers_own_cgroup: bool,
    /// "In use", until the process ends.
    _held: File,
}

impl Interceptor {
    /// Loads the programs, reuses the maps that a former process pinned (rules, enrolments and handshakes in flight
    /// stay), and attaches, replacing that process's programs one by one without a gap.
    pub fn load(options: &Options) -> Result<Self, InterceptError> {
        let of =
            |paths: &[PathBuf], place| paths.iter().map(|path| (path.clone(), place)).collect::<Vec<_>>();
        let mut places = of(&options.cgroups, Place::Pods);
        places.extend(of(&options.host_cgroups, Place::Host));
        let connect =
            places.iter().map(|(path, place)| Cgroup::open(path, *place)).collect::<Result<_, _>>()?;
        let AttachPoints { connect, tcp_events, covers_own_cgroup } =
            AttachPoints::of(connect, &options.agent_cgroup)?;

        let dir = PinDir::create(&options.pin_dir)?;
        let lock = dir.lock()?;
        let held = dir.hold()?;
        let (mut ebpf, mut maps) = load_object(options, &dir)?;
        maps::exclude(&mut ebpf, &options.excluded)?;
        let events = Events::take(&mut ebpf)?;
        let log = if options.debug { EbpfLogger::init(&mut ebpf).ok() } else { None };

        // The rules stay those of the predecessor until this process has its own.
        let catch_all = maps.settings.get(&0, 0).map_or(Verdict::Leave as u32, |settings| settings.catch_all);
        let settings = Settings { catch_all, fail_mode: options.fail_mode as u32 };
        maps.settings.set(0, settings, 0).map_err(InterceptError::map(map::SETTINGS))?;
        let destinations = maps.destinations()?;

        let kernel_path = has_kernel_path(options.sizes);
        let points = Points { connect: &connect, tcp_events: &tcp_events, kernel_path };
        let links = Links::attach(&mut ebpf, &dir, points)?;
        for other in dir.all_maps()? {
            if other != dir.maps() {
                remove_dir_with_files(&other)?;
            }
        }
        drop(lock);
        let attach_points: Vec<_> = connect.iter().map(|cgroup| cgroup.path.clone()).collect();
        Ok(Self {
            places: connect.into_iter().map(|cgroup| (cgroup.path, cgroup.place)).collect(),
            agent_cgroup: options.agent_cgroup.clone(),
            ebpf,
            maps,
            links,
            dir,
            events: Some(events),
            log,
            settings,
            destinations,
            attach_points,
            covers_own_cgroup,
            _held: held,
        })
    }

    /// Attaches to what has appeared: wanted cgroups that were removed and made again, and those of `more` (for pods)
    /// that are new. Whether there was any. What is not there is not waited for, and no error.
    pub fn attach_to_new(&mut self, more: &[PathBuf]) -> Result<bool, InterceptError> {
        let _lock = self.lock_current()?;
        for path in more {
            if !self.attach_points.iter().any(|root| path.starts_with(root)) {
                self.places.push((path.clone(), Place::Pods));
                self.attach_points.push(path.clone());
            }
        }
        let mut present = Vec::new();
        for (path, place) in &self.places {
            match Cgroup::open(path, *place) {
                Ok(cgroup) => present.push(cgroup),
                Err(InterceptError::Cgroup { source, .. }) if source.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        if present.is_empty() {
            return Ok(false);
        }
        let AttachPoints { connect, tcp_events, .. } = AttachPoints::of(present, &self.agent_cgroup)?;
        let kernel_path = has_kernel_path(self.maps.sizes);
        let points = Points { connect: &connect, tcp_events: &tcp_events, kernel_path };
        self.links.complete(&mut self.ebpf, &self.dir, points)
    }

    /// Makes the rules exactly `wanted`; what is right already is not touched. Rules are added before others are
    /// removed, so that no destination is without one in between. How many entries changed.
    pub fn set_destinations(
        &mut self,
        wanted: &HashMap<Destination, RuleValue>,
    ) -> Result<usize, InterceptError> {
        let _lock = self.lock_current()?;
        let mut changed = 0;
        for (destination, rule) in wanted {
            let raw = rule.encode();
            if self.destinations.get(destination) != Some(&raw) {
                let capacity = self.maps.sizes.destinations;
                maps::insert(&mut self.maps.destinations, map::DESTINATIONS, capacity, *destination, raw)?;
                self.destinations.insert(*destination, raw);
                changed += 1;
            }
        }
        let stale: Vec<_> =
            self.destinations.keys().filter(|key| !wanted.contains_key(key)).copied().collect();
        for destination in stale {
            maps::remove(&mut self.maps.destinations, map::DESTINATIONS, &destination)?;
            self.destinations.remove(&destination);
            changed += 1;
        }
        Ok(changed)
    }

    /// What happens to a destination that no rule names. [`Verdict::Leave`] until it is set for the first time.
    pub fn set_default_verdict(&mut self, verdict: Verdict) -> Result<(), InterceptError> {
        let _lock = self.lock_current()?;
        self.settings.catch_all = verdict as u32;
        self.maps.settings.set(0, self.settings, 0).map_err(InterceptError::map(map::SETTINGS))
    }

    /// Enrols a network namespace (by its cookie, SO_NETNS_COOKIE), or replaces its record. Its capture listener
    /// must be listening already, and be marked ([`OwnSocketMarker::mark_listener`]).
    pub fn enrol(&mut self, netns_cookie: u64, enrolment: Enrolment) -> Result<(), InterceptError> {
        let _lock = self.lock_current()?;
        let capacity = self.maps.sizes.namespaces;
        maps::insert(&mut self.maps.namespaces, map::NAMESPACES, capacity, netns_cookie, enrolment)
    }

    /// Forgets a network namespace; false when it was not enrolled.
    pub fn forget(&mut self, netns_cookie: u64) -> Result<bool, InterceptError> {
        let _lock = self.lock_current()?;
        maps::remove(&mut self.maps.namespaces, map::NAMESPACES, &netns_cookie)
    }

    /// All enrolments, also those that a predecessor left: whoever owns the enrolment forgets what is gone.
    pub fn enrolments(&self) -> Result<HashMap<u64, Enrolment>, InterceptError> {
        self.maps.namespaces()
    }

    /// Every counter, in the order of [`Reason::ALL`]. They go on counting over a takeover and start at 0 with the
    /// first process.
    pub fn counters(&self) -> Result<Vec<(Reason, u64)>, InterceptError> {
        self.maps.counters()
    }

    /// Handshakes that are in flight now. Walks the map: for tests and for a metric at scrape time.
    pub fn in_flight_len(&self) -> Result<usize, InterceptError> {
        let keys = self.maps.in_flight.keys();
        keys.collect::<Result<Vec<_>, _>>()
            .map(|keys| keys.len())
            .map_err(InterceptError::map(map::IN_FLIGHT))
    }

    /// Where the connect programs are attached.
    pub fn attach_points(&self) -> &[PathBuf] {
        &self.attach_points
    }

    /// Whether upstream sockets of this process must be marked ([`Self::own_socket_marker`]). A hook runs for the
    /// cgroup that a socket's creator was in: outside the attach points no hook sees them.
    pub fn covers_own_cgroup(&self) -> bool {
        self.covers_own_cgroup
    }

    /// A handle for a worker.
    pub fn original_dst_reader(&self) -> OriginalDstReader {
        OriginalDstReader::new(Arc::clone(&self.maps.original_dst.fd))
    }

    /// A handle for a worker.
    pub fn own_socket_marker(&self) -> OwnSocketMarker {
        OwnSocketMarker::new(Arc::clone(&self.maps.own_socket.fd))
    }

    /// Marks an upstream socket of this process as its own, see [`OwnSocketMarker::mark`].
    pub fn mark_own(&self, fd: BorrowedFd<'_>) -> std::io::Result<()> {
        self.own_socket_marker().mark(fd)
    }

    /// The tables of the kernel path.
    pub fn tables(&self) -> Arc<Tables> {
        Arc::clone(&self.maps.tables)
    }

    /// What the programs leave on sockets of the kernel path.
    pub(super) fn flow_map(&self) -> Arc<OwnedFd> {
        Arc::clone(&self.maps.flows.fd)
    }

    /// Connections of the kernel path that have ended. Once; then it belongs to whoever took it.
    pub fn take_flow_events(&mut self) -> Option<FlowEvents> {
        self.maps.flow_events.take()
    }

    /// Connects from namespaces that are not enrolled. Once; then it belongs to whoever took it.
    pub fn take_events(&mut self) -> Option<Events> {
        self.events.take()
    }

    /// The programs' debug lines, when [`Options::debug`] was on: poll its descriptor, then `flush()` writes them to
    /// the process's log. Once.
    pub fn take_log(&mut self) -> Option<EbpfLog> {
        self.log.take()
    }

    /// Whose programs run: what readiness may ask.
    pub fn standing(&self) -> Standing {
        self.links.standing()
    }

    /// Whether every program is attached where it should be, and is this process's.
    pub fn is_current(&self) -> bool {
        self.standing() == Standing::Current
    }

    /// Whether another process has taken over: the kernel runs its programs now.
    pub fn is_superseded(&self) -> bool {
        self.links.are_superseded()
    }

    /// Detaches and removes everything: unless a successor has taken over, who then owns all of it.
    pub fn detach(self) -> Result<Detached, InterceptError> {
        let _lock = self.dir.lock()?;
        if self.links.are_superseded() {
            return Ok(Detached::Superseded);
        }
        detach_all(&self.dir)?;
        self.dir.remove()?;
        Ok(Detached::Removed)
    }

    /// Ids of the loaded programs, for `bpftool prog`.
    pub fn program_ids(&self) -> Vec<u32> {
        self.ebpf.programs().filter_map(|(_, program)| program.info().ok()).map(|info| info.id()).collect()
    }

    /// The lock of the pin directory, if this process still owns what is in it: while it is open nobody takes over, and whoever
    /// asks for it once more waits.
    ///
    /// Errors: [`InterceptError::Superseded`]; what keeps it from opening the directory.
    pub(super) fn lock_current(&self) -> Result<File, InterceptError> {
        let lock = self.dir.lock()?;
        if self.links.are_superseded() {
            return Err(InterceptError::Superseded(self.dir.root().into()));
        }
        Ok(lock)
    }
}

/// Where which programs go.
struct AttachPoints {
    connect: Vec<Cgroup>,
    tcp_events: Vec<Cgroup>,
    covers_own_cgroup: bool,
}

impl AttachPoints {
    /// Fails when there is none.
    fn of(wanted: Vec<Cgroup>, agent_cgroup: &Path) -> Result<Self, InterceptError> {
        check_places(&wanted)?;
        let connect = outermost(wanted);
        if connect.is_empty() {
            return Err(InterceptError::NoCgroup);
        }
        let agent = Cgroup::open(agent_cgroup, Place::Pods)?;
        let covers_own_cgroup = covers(&connect, &agent.path);
        // Accepted sockets are the agent's: its cgroup needs tcp_events as well.
        let again = connect.iter().map(|cgroup| Cgroup::open(&cgroup.path, cgroup.place));
        let tcp_events = outermost(again.chain([Ok(agent)]).collect::<Result<_, _>>()?);
        Ok(Self { connect, tcp_events, covers_own_cgroup })
    }
}

/// Removes what a killed process left behind. Refuses while a process is at work there, unless `force`. Fine when
/// there is nothing.
pub fn cleanup(pin_dir: &Path, force: bool) -> Result<Cleaned, InterceptError> {
    if !pin_dir.exists() {
        return Ok(Cleaned::default());
    }
    let dir = PinDir::new(pin_dir);
    let _lock = dir.lock()?;
    if !force && dir.in_use()? {
        return Err(InterceptError::InUse(pin_dir.into()));
    }
    let map_dirs = dir.all_maps()?.len();
    let links = detach_all(&dir)?;
    dir.remove()?;
    Ok(Cleaned { links, map_dirs })
}

/// Loads the programs and throws them away again: whether this kernel takes them from this process. Nothing is
/// attached or pinned.
pub fn trial() -> Result<(), InterceptError> {
    let smallest = MapSizes { in_flight: 1, namespaces: 1, destinations: 1, ..MapSizes::default() };
    let globals = Globals { excludes: 1, kernel_path: 1, log_level: 0, ..Globals::of_kernel() };
    let mut ebpf = loader(smallest, &globals).load(OBJECT).map_err(InterceptError::load)?;
    links::programs(true).try_for_each(|program| links::load(&mut ebpf, program))
}

fn load_object(options: &Options, dir: &PinDir) -> Result<(Ebpf, Maps), InterceptError> {
    let sizes = options.sizes;
    let salvage = sizes.unpin_misfits(&dir.maps())?;
    let globals = Globals {
        excludes: u8::from(!options.excluded.is_empty()),
        kernel_path: u8::from(has_kernel_path(sizes)),
        log_level: if options.debug { aya_log::Level::Debug as u8 } else { 0 },
        ..Globals::of_kernel()
    };
    let mut loader = loader(sizes, &globals);
    let excluded = u32::try_from(options.excluded.len()).unwrap_or(u32::MAX).max(1);
    loader.map_max_entries(map::EXCLUDED, excluded);
    for name in sizes.pinned_names() {
        loader.map_pin_path(name, dir.maps().join(name));
    }
    let mut ebpf = loader.load(OBJECT).map_err(InterceptError::load)?;
    let maps = Maps::take(&mut ebpf, sizes, salvage)?;
    Ok((ebpf, maps))
}

/// Whether the programs contain the kernel path.
fn has_kernel_path(sizes: MapSizes) -> bool {
    sizes.tables != TableSizes::OFF
}

/// What is fixed when the object is loaded.
#[derive(Default)]
struct Globals {
    has_set_retval: u8,
    excludes: u8,
    kernel_path: u8,
    errors_purge: u8,
    log_level: u8,
}

impl Globals {
    /// What the kernel has; the rest is off.
    fn of_kernel() -> Self {
        Self {
            has_set_retval: has_set_retval(),
            errors_purge: u8::from(
                KernelVersion::current().is_ok_and(|version| version >= KernelVersion::new(6, 11, 0)),
            ),
            ..Self::default()
        }
    }
}

fn loader(sizes: MapSizes, globals: &Globals) -> EbpfLoader<'_> {
    let mut loader = EbpfLoader::new();
    loader
        .override_global(global::HAS_SET_RETVAL, &globals.has_set_retval, true)
        .override_global(global::EXCLUDES, &globals.excludes, true)
        .override_global(global::KERNEL_PATH, &globals.kernel_path, true)
        .override_global(global::ERRORS_PURGE, &globals.errors_purge, true)
        .override_global(aya_log::LEVEL, &globals.log_level, true)
        .map_max_entries(map::IN_FLIGHT, sizes.in_flight)
        .map_max_entries(map::NAMESPACES, sizes.namespaces)
        .map_max_entries(map::DESTINATIONS, sizes.destinations)
        .map_max_entries(map::EVENTS, sizes.events)
        .map_max_entries(map::SERVICES, sizes.tables.services)
        .map_max_entries(map::CLUSTERS, sizes.tables.clusters)
        .map_max_entries(map::HOSTS, sizes.tables.hosts)
        .map_max_entries(map::ARENA, sizes.tables.arena)
        .map_max_entries(map::FLOW_SLOTS, sizes.tables.flow_slots)
        .map_max_entries(map::FLOW_EVENTS, sizes.tables.events);
    loader
}

fn has_set_retval() -> u8 {
    let supported = is_helper_supported(ProgramType::CgroupSockAddr, BpfHelper::BPF_FUNC_set_retval);
    u8::from(supported.unwrap_or(false))
}

#[cfg(test)]
mod tests {
    use aya::programs::Program;

    use super::*;

    /// Needs root. With debug lines the programs are largest; on older kernels, or without the kernel path, other branches
    /// are live.
    #[test]
    fn the_verifier_takes_the_object_in_every_variant() {
        let variants =
            [(0, 0, 0), (1, 0, 0), (0, 1, 0), (1, 1, 0), (1, 0, 1), (1, 1, 1)].map(|(retval, path, log)| {
                let log_level = if log == 1 { aya_log::Level::Debug as u8 } else { 0 };
                Globals {
                    has_set_retval: retval,
                    excludes: log,
                    kernel_path: path,
                    errors_purge: retval,
                    log_level,
                }
            });
        for globals in variants {
            let mut ebpf = loader(MapSizes::default(), &globals).load(OBJECT).unwrap();
            let mut loaded = 0;
            for (name, program) in ebpf.programs_mut() {
                let result = match program {
                    Program::CgroupSock(program) => program.load(),
                    Program::CgroupSockAddr(program) => program.load(),
                    Program::SockOps(program) => program.load(),
                    other => panic!("{name}: {other:?}"),
                };
                result.unwrap_or_else(|error| panic!("{name}: {error:?}"));
                loaded += 1;
            }
            assert_eq!(loaded, 8);
        }
    }
}
