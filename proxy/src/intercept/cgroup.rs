//! Attach points: cgroup v2 directories.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use tidegate_common::Place;

use super::error::InterceptError;
use crate::sys::{self, mounts};

/// An open cgroup v2 directory.
#[derive(Debug)]
pub(super) struct Cgroup {
    /// Whose processes are there.
    pub(super) place: Place,
    /// Resolved path.
    pub(super) path: PathBuf,
    /// The kernel's id of it: the inode number.
    pub(super) id: u64,
    /// Keeps it open, for attaching.
    pub(super) dir: File,
}

impl Cgroup {
    /// Opens `path`, which must be in a cgroup v2 hierarchy.
    pub(super) fn open(path: &Path, place: Place) -> Result<Self, InterceptError> {
        Self::try_open(path, place).map_err(|source| InterceptError::Cgroup { path: path.into(), source })
    }

    fn try_open(path: &Path, place: Place) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let dir = File::open(&path)?;
        if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not on a cgroup2 mount"));
        }
        let id = dir.metadata()?.ino();
        Ok(Self { place, path, id, dir })
    }
}

/// Drops directories that lie below another one (or are named twice): a program runs once for each ancestor that it
/// is attached to, and must run only once per call. Of one directory that is named as both, the host's stays.
pub(super) fn outermost(mut cgroups: Vec<Cgroup>) -> Vec<Cgroup> {
    cgroups.sort_by(|a, b| a.path.cmp(&b.path).then((a.place == Place::Pods).cmp(&(b.place == Place::Pods))));
    let mut kept: Vec<Cgroup> = Vec::new();
    for cgroup in cgroups {
        if !covers(&kept, &cgroup.path) {
            kept.push(cgroup);
        }
    }
    kept
}

/// Refuses a cgroup of the host below one of pods: the programs of the outer one would run there, too, and leave the
/// host's own connections alone. (Pods below a cgroup of the host are fine: it captures both.)
pub(super) fn check_places(cgroups: &[Cgroup]) -> Result<(), InterceptError> {
    let of = |place| cgroups.iter().filter(move |cgroup| cgroup.place == place);
    for host in of(Place::Host) {
        if let Some(pods) =
            of(Place::Pods).find(|pods| host.path != pods.path && host.path.starts_with(&pods.path))
        {
            return Err(InterceptError::HostBelowPods { host: host.path.clone(), pods: pods.path.clone() });
        }
    }
    Ok(())
}

/// Whether `path` is one of `cgroups` or below one.
pub(super) fn covers(cgroups: &[Cgroup], path: &Path) -> bool {
    cgroups.iter().any(|cgroup| path.starts_with(&cgroup.path))
}

/// The mount point of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid systems.
pub fn mount_point() -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system in /proc/self/mounts");
    mounts::cgroup2()?.ok_or_else(missing)
}

/// The cgroup v2 directory of this process.
pub fn own() -> io::Result<PathBuf> {
    let missing = || io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 entry in /proc/self/cgroup");
    sys::cgroup::of_process(std::process::id(), &mount_point()?).ok_or_else(missing)
}

/// Whether this process is in the root cgroup: the program that watches its accepted sockets then also runs for the TCP
/// sockets of every other process.
pub fn own_is_root() -> bool {
    own().is_ok_and(|dir| sys::cgroup::is_root(&dir))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroups(paths: &[&str]) -> Vec<Cgroup> {
        let dir = || File::open("/").unwrap();
        paths.iter().map(|path| Cgroup { place: Place::Pods, path: path.into(), id: 0, dir: dir() }).collect()
    }

    #[test]
    fn nested_and_repeated_attach_points_are_dropped() {
        for (given, kept) in [
            (&["/c/a/b", "/c/a", "/c/ab"][..], &["/c/a", "/c/ab"][..]),
            (&["/c/a", "/c/a"], &["/c/a"]),
            (&["/c/x/y", "/c"], &["/c"]),
            (&["/c/b", "/c/a"], &["/c/a", "/c/b"]),
        ] {
            let got: Vec<_> = outermost(cgroups(given)).into_iter().map(|c| c.path).collect();
            assert_eq!(got, kept.iter().map(PathBuf::from).collect::<Vec<_>>());
        }
        assert!(covers(&cgroups(&["/c/a"]), Path::new("/c/a/b")));
        assert!(!covers(&cgroups(&["/c/a"]), Path::new("/c/ab")));
    }

    #[test]
    fn a_host_cgroup_may_hold_pods_and_not_the_other_way_round() {
        let named = |list: &[(&str, Place)]| {
            list.iter()
                .map(|(path, place)| Cgroup { place: *place, ..cgroups(&[*path]).remove(0) })
                .collect::<Vec<_>>()
        };
        let both = [("/c/a", Place::Pods), ("/c/a", Place::Host), ("/c", Place::Host), ("/d", Place::Pods)];
        check_places(&named(&both)).unwrap();
        assert_eq!(outermost(named(&both[..2]))[0].place, Place::Host);
        let error = check_places(&named(&[("/c/a", Place::Host), ("/c", Place::Pods)])).unwrap_err();
        assert!(error.to_string().contains("/c/a"), "{error}");
    }

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let error = Cgroup::open(Path::new("/proc"), Place::Pods).unwrap_err();
        assert!(error.to_string().contains("/proc is not a cgroup v2 directory"), "{error}");
    }
}
