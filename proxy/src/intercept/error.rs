//! What can go wrong between the agent and the kernel.

use std::io;
use std::path::PathBuf;

use aya::EbpfError;
use aya::maps::MapError;
use aya::programs::ProgramError;

/// An interception error. Each message says what, where and the remedy.
#[derive(Debug, thiserror::Error)]
pub enum InterceptError {
    /// There is no BPF file system to pin into, and mounting one failed.
    #[error(
        "no BPF file system at {}: {source}; mount one with `mount -t bpf bpf /sys/fs/bpf` \
         (`ip netns exec` hides it: use `nsenter --net=` instead)", path.display()
    )]
    BpfFs {
        /// Where it was looked for.
        path: PathBuf,
        /// Why mounting it failed.
        source: io::Error,
    },
    /// The pin directory is on another kind of file system.
    #[error("{} is not on a BPF file system; choose a directory below one (see `grep bpf /proc/mounts`)", .0.display())]
    NotBpfFs(PathBuf),
    /// A file operation below the pin directory failed.
    #[error("{action} {}: {source}", path.display())]
    Pin {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A path that was to be an attach point isn't one.
    #[error(
        "{} is not a cgroup v2 directory: {source}; see `grep cgroup2 /proc/mounts` for where the hierarchy is",
        path.display()
    )]
    Cgroup {
        /// The path as configured.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// A cgroup of the host inside one of pods.
    #[error(
        "the host's processes in {} can't be captured while {} around it is for pods; name a smaller --pod-cgroup, or \
         name both as --intercept-cgroup", host.display(), pods.display()
    )]
    HostBelowPods {
        /// The inner one.
        host: PathBuf,
        /// The outer one.
        pods: PathBuf,
    },
    /// No attach point was given.
    #[error("no cgroup to intercept; name at least one cgroup v2 directory")]
    NoCgroup,
    /// The kernel refused the object or one of its maps.
    #[error(
        "the kernel refused the eBPF object: {0}; tidegate needs Linux 5.15 and CAP_BPF + CAP_NET_ADMIN (or root)"
    )]
    Load(#[source] Box<EbpfError>),
    /// The kernel refused one program.
    #[error("the kernel refused the eBPF program {program}: {source}")]
    Program {
        /// Its name.
        program: &'static str,
        /// The verifier's answer.
        source: Box<ProgramError>,
    },
    /// The object lacks something: it was not built from this source.
    #[error("the eBPF object has no {0}; rebuild it with `cargo xtask build-ebpf`")]
    NotInObject(&'static str),
    /// Attaching failed.
    #[error("attaching {program} to {}: {source}", cgroup.display())]
    Attach {
        /// Its name.
        program: &'static str,
        /// The attach point.
        cgroup: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// A map operation failed.
    #[error("map {map}: {source}")]
    Map {
        /// Its name.
        map: &'static str,
        /// The kernel's answer.
        source: Box<MapError>,
    },
    /// A map has no room left.
    #[error("map {map} is full ({capacity} entries); raise its size")]
    Full {
        /// Its name.
        map: &'static str,
        /// Its size, entries.
        capacity: u32,
    },
    /// The thread that finds pods can't start.
    #[error("can't watch for pods: {source}")]
    Pods {
        /// What it lacks.
        source: io::Error,
    },
    /// Another process has taken the interception over.
    #[error("another tidegate process has taken over the interception at {}", .0.display())]
    Superseded(PathBuf),
    /// Another process is at work.
    #[error("a running tidegate process holds {}; stop it first", .0.display())]
    InUse(PathBuf),
}

impl InterceptError {
    /// Stable name, for metrics.
    pub const fn label(&self) -> &'static str {
        match self {
            Self::BpfFs { .. } | Self::NotBpfFs(_) => "bpffs",
            Self::Pin { .. } => "pin",
            Self::Cgroup { .. } | Self::HostBelowPods { .. } | Self::NoCgroup => "cgroup",
            Self::Load(_) | Self::NotInObject(_) => "load",
            Self::Program { .. } => "program",
            Self::Attach { .. } => "attach",
            Self::Map { .. } => "map",
            Self::Full { .. } => "full",
            Self::Pods { .. } => "pods",
            Self::Superseded(_) => "superseded",
            Self::InUse(_) => "in_use",
        }
    }

    /// Adapter for `map_err` round loading.
    pub(super) fn load(source: EbpfError) -> Self {
        Self::Load(Box::new(source))
    }

    /// Adapter for `map_err` round a file operation.
    pub(super) fn pin(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::Pin { action, path, source }
    }

    /// Adapter for `map_err` round a map operation.
    pub(super) fn map(map: &'static str) -> impl FnOnce(MapError) -> Self {
        move |source| Self::Map { map, source: Box::new(source) }
    }
}
