//! Attach points: cgroup v2 directories.

use std::fs::File;
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use nix::sys::statfs::{CGROUP2_SUPER_MAGIC, fstatfs};

use super::error::InterceptError;

/// An open cgroup v2 directory.
#[derive(Debug)]
pub(super) struct Cgroup {
    /// Resolved path.
    pub(super) path: PathBuf,
    /// The kernel's id of it: the inode number.
    pub(super) id: u64,
    /// Keeps it open, for attaching.
    pub(super) dir: File,
}

impl Cgroup {
    /// Opens `path`, which must be in a cgroup v2 hierarchy.
    pub(super) fn open(path: &Path) -> Result<Self, InterceptError> {
        Self::try_open(path).map_err(|source| InterceptError::Cgroup { path: path.into(), source })
    }

    fn try_open(path: &Path) -> io::Result<Self> {
        let path = path.canonicalize()?;
        let dir = File::open(&path)?;
        if fstatfs(&dir)?.filesystem_type() != CGROUP2_SUPER_MAGIC {
            return Err(io::Error::new(io::ErrorKind::InvalidInput, "not on a cgroup2 mount"));
        }
        let id = dir.metadata()?.ino();
        Ok(Self { path, id, dir })
    }
}

/// Drops directories that lie below another one (or are named twice): a program runs once for each ancestor that it
/// is attached to, and must run only once per call.
pub(super) fn outermost(mut cgroups: Vec<Cgroup>) -> Vec<Cgroup> {
    cgroups.sort_by(|a, b| a.path.cmp(&b.path));
    let mut kept: Vec<Cgroup> = Vec::new();
    for cgroup in cgroups {
        if !covers(&kept, &cgroup.path) {
            kept.push(cgroup);
        }
    }
    kept
}

/// Whether `path` is one of `cgroups` or below one.
pub(super) fn covers(cgroups: &[Cgroup], path: &Path) -> bool {
    cgroups.iter().any(|cgroup| path.starts_with(&cgroup.path))
}

/// The mount point of the cgroup v2 hierarchy: `/sys/fs/cgroup`, or `/sys/fs/cgroup/unified` on hybrid systems.
pub fn mount_point() -> io::Result<PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mounts")?;
    mounts
        .lines()
        .find_map(|line| {
            let mut fields = line.split(' ').skip(1);
            let (path, kind) = (fields.next()?, fields.next()?);
            (kind == "cgroup2").then(|| PathBuf::from(unescape(path)))
        })
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup2 file system in /proc/self/mounts"))
}

/// The cgroup v2 directory of this process.
pub fn own() -> io::Result<PathBuf> {
    let text = std::fs::read_to_string("/proc/self/cgroup")?;
    let path = text
        .lines()
        .find_map(|line| line.strip_prefix("0::"))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no cgroup v2 entry in /proc/self/cgroup"))?;
    Ok(mount_point()?.join(path.trim_start_matches('/')))
}

/// Undoes the octal escapes of /proc/mounts (`\040` is a blank).
pub(super) fn unescape(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text;
    while let Some(at) = rest.find('\\') {
        out.push_str(&rest[..at]);
        rest = &rest[at + 1..];
        if let Some(byte) = rest.get(..3).and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            out.push(char::from(byte));
            rest = &rest[3..];
        } else {
            out.push('\\');
        }
    }
    out + rest
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cgroups(paths: &[&str]) -> Vec<Cgroup> {
        let dir = || File::open("/").unwrap();
        paths.iter().map(|path| Cgroup { path: path.into(), id: 0, dir: dir() }).collect()
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
    fn mount_paths_are_unescaped() {
        assert_eq!(unescape(r"/a\040b\134c"), r"/a b\c");
        assert_eq!(unescape(r"/a\"), r"/a\");
    }

    #[test]
    fn a_directory_elsewhere_is_refused() {
        let error = Cgroup::open(Path::new("/proc")).unwrap_err();
        assert!(error.to_string().contains("/proc is not a cgroup v2 directory"), "{error}");
    }
}
