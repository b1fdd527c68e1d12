//! Typed access to every map of the eBPF object, and their life in the pin directory.

use std::collections::HashMap as StdHashMap;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};
use std::path::Path;
use std::sync::Arc;

use aya::Ebpf;
use aya::maps::lpm_trie::{Key, LpmTrie};
use aya::maps::{Array, HashMap, Map, MapData, MapError, MapInfo, RingBuf, SkStorage};
use tidegate_common::{
    Addr, ClusterState, Destination, EVENTS_BYTES, Enrolment, Flow, FlowKey, FlowSlot, HostState, InFlight,
    MAX_DESTINATIONS, MAX_IN_FLIGHT, MAX_NAMESPACES, NotEnrolled, OriginalDst, Reason, RuleValue,
    ServiceState, Settings, Verdict, map,
};

use super::bpf;
use super::error::InterceptError;
use super::tables::{FlowEvents, TableSizes, Tables};
use crate::config::listener::Cidr;

/// Sizes of the maps, entries. A map that a former process pinned with another size is replaced, contents kept.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct MapSizes {
    /// Handshakes in progress on the node at one time that the map carries. Default 8,192. Memory is taken up front, 120
    /// bytes each.
    pub in_flight: u32,
    /// Enrolled network namespaces. Default 4,096.
    pub namespaces: u32,
    /// Destinations with a rule. Default 65,536.
    pub destinations: u32,
    /// Announcements that wait to be read, bytes: a power of two and a multiple of the page size; 32 bytes each.
    /// Default 65,536.
    pub events: u32,
    /// Of the kernel path. Default: off.
    pub tables: TableSizes,
}

impl Default for MapSizes {
    fn default() -> Self {
        Self {
            in_flight: MAX_IN_FLIGHT,
            namespaces: MAX_NAMESPACES,
            destinations: MAX_DESTINATIONS,
            events: EVENTS_BYTES,
            tables: TableSizes::OFF,
        }
    }
}

/// Shape of a pinned map: what must agree before it is reused.
struct Shape {
    name: &'static str,
    key_size: usize,
    value_size: usize,
    /// 0 for SK_STORAGE.
    max_entries: u32,
}

impl MapSizes {
    /// The maps that are pinned. The rest (events, logs) belongs to one process.
    fn pinned(self) -> [Shape; 13] {
        let shape =
            |name, key_size, value_size, max_entries| Shape { name, key_size, value_size, max_entries };
        [
            shape(map::ORIGINAL_DST, 4, size_of::<OriginalDst>(), 0),
            shape(map::OWN_SOCKET, 4, 4, 0),
            shape(map::IN_FLIGHT, size_of::<FlowKey>(), size_of::<InFlight>(), self.in_flight),
            shape(map::NAMESPACES, 8, size_of::<Enrolment>(), self.namespaces),
            shape(map::DESTINATIONS, size_of::<Destination>(), 4, self.destinations),
            shape(map::SETTINGS, 4, size_of::<Settings>(), 1),
            shape(map::COUNTERS, 4, 8, Reason::COUNT as u32),
            shape(map::FLOWS, 4, size_of::<Flow>(), 0),
            shape(map::FLOW_SLOTS, 4, size_of::<FlowSlot>(), self.tables.flow_slots),
            shape(map::SERVICES, 4, size_of::<ServiceState>(), self.tables.services),
            shape(map::CLUSTERS, 4, size_of::<ClusterState>(), self.tables.clusters),
            shape(map::HOSTS, 4, size_of::<HostState>(), self.tables.hosts),
            shape(map::ARENA, 4, 8, self.tables.arena),
        ]
    }

    /// Names of the maps that are pinned.
    pub(super) fn pinned_names(self) -> [&'static str; 13] {
        self.pinned().map(|shape| shape.name)
    }

    /// Unpins maps of another shape, so that loading makes new ones. The programs that use them keep them until
    /// they are replaced. What they hold is returned, to go into the new ones.
    pub(super) fn unpin_misfits(self, dir: &Path) -> Result<Salvage, InterceptError> {
        let mut salvage = Salvage::default();
        for shape in self.pinned() {
            let path = dir.join(shape.name);
            if !path.exists() {
                continue;
            }
            let fits = MapInfo::from_pin(&path).is_ok_and(|info| {
                info.key_size() as usize == shape.key_size
                    && info.value_size() as usize == shape.value_size
                    && info.max_entries() == shape.max_entries
            });
            if fits {
                continue;
            }
            // A map whose key or value differs too can't be read; then its contents are set anew by the agent.
            match shape.name {
                map::NAMESPACES => salvage.namespaces = contents(&path),
                map::DESTINATIONS => salvage.destinations = contents(&path),
                map::IN_FLIGHT => salvage.in_flight = contents(&path),
                map::SERVICES | map::CLUSTERS | map::HOSTS | map::ARENA | map::FLOWS | map::FLOW_SLOTS => {
                    salvage.lost_tables = true;
                }
                _ => {}
            }
            fs::remove_file(&path).map_err(InterceptError::pin("removing", &path))?;
        }
        Ok(salvage)
    }
}

/// Contents of maps that had to be replaced.
#[derive(Default)]
pub(super) struct Salvage {
    namespaces: Vec<(u64, Enrolment)>,
    destinations: Vec<(Destination, u32)>,
    in_flight: Vec<(FlowKey, InFlight)>,
    /// Tables of the kernel path are empty now.
    lost_tables: bool,
}

fn contents<K: aya::Pod, V: aya::Pod>(path: &Path) -> Vec<(K, V)> {
    let Ok(data) = MapData::from_pin(path) else { return Vec::new() };
    let Ok(map) = HashMap::<_, K, V>::try_from(Map::HashMap(data)) else { return Vec::new() };
    map.iter().filter_map(Result::ok).collect()
}

/// Every map, typed.
pub(super) struct Maps {
    pub(super) namespaces: HashMap<MapData, u64, Enrolment>,
    pub(super) destinations: HashMap<MapData, Destination, u32>,
    pub(super) in_flight: HashMap<MapData, FlowKey, InFlight>,
    pub(super) settings: Array<MapData, Settings>,
    /// Read by [`bpf::per_cpu_sums`]: aya would take a system call for each.
    counters: MapData,
    pub(super) original_dst: Storage<OriginalDst>,
    pub(super) own_socket: Storage<u32>,
    pub(super) tables: Arc<Tables>,
    pub(super) flow_events: Option<FlowEvents>,
    pub(super) flows: Storage<Flow>,
    pub(super) sizes: MapSizes,
}

impl Maps {
    /// Takes them out of the loaded object.
    pub(super) fn take(ebpf: &mut Ebpf, sizes: MapSizes, salvage: Salvage) -> Result<Self, InterceptError> {
        let mut this = Self {
            namespaces: take(ebpf, map::NAMESPACES)?,
            destinations: take(ebpf, map::DESTINATIONS)?,
            in_flight: take(ebpf, map::IN_FLIGHT)?,
            settings: take(ebpf, map::SETTINGS)?,
            counters: per_cpu_words(ebpf, map::COUNTERS)?,
            original_dst: storage(ebpf, map::ORIGINAL_DST)?,
            own_socket: storage(ebpf, map::OWN_SOCKET)?,
            tables: Arc::new(Tables::take(ebpf, sizes.tables)?),
            flow_events: Some(FlowEvents::take(ebpf)?),
            flows: storage(ebpf, map::FLOWS)?,
            sizes,
        };
        for (cookie, enrolment) in salvage.namespaces {
            insert(&mut this.namespaces, map::NAMESPACES, sizes.namespaces, cookie, enrolment)?;
        }
        for (destination, verdict) in salvage.destinations {
            insert(&mut this.destinations, map::DESTINATIONS, sizes.destinations, destination, verdict)?;
        }
        for (flow, original_dst) in salvage.in_flight {
            insert(&mut this.in_flight, map::IN_FLIGHT, sizes.in_flight, flow, original_dst)?;
        }
        if salvage.lost_tables {
            this.capture_what_was_balanced()?;
        }
        Ok(this)
    }

    /// Rules of the kernel path lead nowhere without its tables. Until this process has rules of its own, those connections
    /// go to the proxy, which serves the same listeners.
    fn capture_what_was_balanced(&mut self) -> Result<(), InterceptError> {
        let is_balanced =
            |raw: &u32| RuleValue::decode(*raw).is_some_and(|rule| rule.verdict == Verdict::Balance);
        let capture = RuleValue::from(Verdict::Capture).encode();
        for (destination, _) in self.destinations()?.into_iter().filter(|(_, raw)| is_balanced(raw)) {
            insert(&mut self.destinations, map::DESTINATIONS, self.sizes.destinations, destination, capture)?;
        }
        Ok(())
    }

    /// What the destinations map holds.
    pub(super) fn destinations(&self) -> Result<StdHashMap<Destination, u32>, InterceptError> {
        self.destinations.iter().collect::<Result<_, _>>().map_err(InterceptError::map(map::DESTINATIONS))
    }

    /// What the namespaces map holds.
    pub(super) fn namespaces(&self) -> Result<StdHashMap<u64, Enrolment>, InterceptError> {
        self.namespaces.iter().collect::<Result<_, _>>().map_err(InterceptError::map(map::NAMESPACES))
    }

    /// Every counter, summed over CPUs.
    pub(super) fn counters(&self) -> Result<Vec<(Reason, u64)>, InterceptError> {
        let sums = bpf::per_cpu_sums(self.counters.fd().as_fd(), Reason::COUNT)
            .map_err(|source| InterceptError::map(map::COUNTERS)(MapError::IoError(source)))?;
        let sum = |reason: Reason| sums.get(reason as usize).copied().unwrap_or(0);
        Ok(Reason::ALL.iter().map(|reason| (*reason, sum(*reason))).collect())
    }
}

/// Fills the table of excluded networks, before the programs are attached.
pub(super) fn exclude(ebpf: &mut Ebpf, networks: &[Cidr]) -> Result<(), InterceptError> {
    // Not taken: the programs are loaded with its descriptor's number.
    let map = ebpf.map_mut(map::EXCLUDED).ok_or(InterceptError::NotInObject(map::EXCLUDED))?;
    let mut map: LpmTrie<&mut MapData, [u32; 5], u8> =
        map.try_into().map_err(InterceptError::map(map::EXCLUDED))?;
    for network in networks {
        let bits = Addr::PREFIX_KEY_HEAD + u32::from(network.prefix_len);
        map.insert(&Key::new(bits, Addr::from(network.address).prefix_key()), 1, 0)
            .map_err(InterceptError::map(map::EXCLUDED))?;
    }
    Ok(())
}

/// Inserts or replaces, with an error that says what to raise.
pub(super) fn insert<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    capacity: u32,
    key: K,
    value: V,
) -> Result<(), InterceptError> {
    match map.insert(key, value, 0) {
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::E2BIG) => {
            Err(InterceptError::Full { map: name, capacity })
        }
        other => other.map_err(InterceptError::map(name)),
    }
}

/// Removes; false when there was none.
pub(super) fn remove<K: aya::Pod, V: aya::Pod>(
    map: &mut HashMap<MapData, K, V>,
    name: &'static str,
    key: &K,
) -> Result<bool, InterceptError> {
    match map.remove(key) {
        Ok(()) => Ok(true),
        Err(MapError::KeyNotFound) => Ok(false),
        Err(MapError::SyscallError(error)) if error.io_error.raw_os_error() == Some(libc::ENOENT) => {
            Ok(false)
        }
        Err(error) => Err(InterceptError::map(name)(error)),
    }
}

pub(super) fn take<M>(ebpf: &mut Ebpf, name: &'static str) -> Result<M, InterceptError>
where
    M: TryFrom<Map, Error = MapError>,
{
    let map = ebpf.take_map(name).ok_or(InterceptError::NotInObject(name))?;
    M::try_from(map).map_err(InterceptError::map(name))
}

/// A per-CPU array of words.
fn per_cpu_words(ebpf: &mut Ebpf, name: &'static str) -> Result<MapData, InterceptError> {
    match ebpf.take_map(name) {
        Some(Map::PerCpuArray(data)) => Ok(data),
        _ => Err(InterceptError::NotInObject(name)),
    }
}

/// A socket storage.
pub(super) struct Storage<V: aya::Pod> {
    /// For workers; [`super::bpf`] relies on its values being `V`, which `map` has checked.
    pub(super) fd: Arc<OwnedFd>,
    /// The programs are loaded with this descriptor's number in their instructions: it must stay open till then.
    _map: SkStorage<MapData, V>,
}

fn storage<V: aya::Pod>(ebpf: &mut Ebpf, name: &'static str) -> Result<Storage<V>, InterceptError> {
    let Some(Map::SkStorage(data)) = ebpf.take_map(name) else {
        return Err(InterceptError::NotInObject(name));
    };
    let fd = data.fd().as_fd().try_clone_to_owned().map_err(InterceptError::pin("duplicating", name))?;
    let map = SkStorage::try_from(Map::SkStorage(data)).map_err(InterceptError::map(name))?;
    Ok(Storage { fd: Arc::new(fd), _map: map })
}

/// Connects from namespaces that the agent doesn't know. Poll its descriptor for readability, then drain.
pub struct Events {
    ring: RingBuf<MapData>,
}

impl Events {
    pub(super) fn take(ebpf: &mut Ebpf) -> Result<Self, InterceptError> {
        Ok(Self { ring: take(ebpf, map::EVENTS)? })
    }

    /// The next event, if one waits. Never blocks.
    pub fn pop(&mut self) -> Option<NotEnrolled> {
        loop {
            let item = self.ring.next()?;
            if let Some(event) = bpf::read(&item) {
                return Some(event);
            }
        }
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.ring.as_fd()
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.ring.as_fd().as_raw_fd()
    }
}
