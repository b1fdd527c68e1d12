//! cgroup v2 directories for pods and proxies.

use std::fs;
use std::path::{Path, PathBuf};
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::run;

/// A cgroup v2 directory; on drop its processes are killed and the subtree is removed.
#[derive(Debug)]
pub struct Cgroup {
    path: PathBuf,
}

impl Cgroup {
    /// Makes a directory of this run directly below the cgroup v2 mount.
    pub fn new(kind: &str) -> Result<Self> {
        run::prepare()?;
        let mount = mount_point().context("no cgroup2 mount: mount -t cgroup2 none /sys/fs/cgroup")?;
        Self::at(mount.join(run::unique(kind)))
    }

    /// Makes a child.
    pub fn child(&self, name: &str) -> Result<Self> {
        Self::below(&self.path, name)
    }

    /// Makes a child of `parent`.
    pub fn below(parent: &Path, name: &str) -> Result<Self> {
        Self::at(parent.join(name))
    }

    fn at(path: PathBuf) -> Result<Self> {
        fs::create_dir(&path).with_context(|| format!("create cgroup {}", path.display()))?;
        Ok(Self { path })
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its path below the cgroup v2 mount, as /proc/PID/cgroup spells it.
    pub fn relative(&self) -> String {
        let mount = mount_point().unwrap_or_default();
        format!("/{}", self.path.strip_prefix(mount).unwrap_or(&self.path).display())
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        remove_tree(&self.path);
        // A container runtime makes the same path in every v1 hierarchy.
        for hierarchy in hierarchies() {
            let twin = hierarchy.join(self.relative().trim_start_matches('/'));
            if twin.exists() {
                remove_tree(&twin);
            }
        }
    }
}

/// Where every cgroup hierarchy is mounted, of v1 and v2.
pub(crate) fn hierarchies() -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap_or_default();
    let mount = |line: &str| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        matches!(kind, "cgroup" | "cgroup2").then(|| PathBuf::from(path))
    };
    mounts.lines().filter_map(mount).collect()
}

/// Where cgroup v2 is mounted: /sys/fs/cgroup, or below it on machines that still have v1 too.
pub fn mount_point() -> Option<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").ok()?;
    mounts.lines().find_map(|line| {
        let mut fields = line.split(' ').skip(1);
        let (path, kind) = (fields.next()?, fields.next()?);
        (kind == "cgroup2").then(|| PathBuf::from(path))
    })
}

/// Kills what runs in the subtree and removes it, deepest directory first.
pub fn remove_tree(dir: &Path) {
    let _ = fs::write(dir.join("cgroup.kill"), "1");
    let mut children: Vec<_> = fs::read_dir(dir).into_iter().flatten().flatten().collect();
    children.retain(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir()));
    for child in children {
        remove_tree(&child.path());
    }
    // Killed processes leave the cgroup when they have been torn down, not when they are killed.
    for _ in 0..200 {
        match fs::remove_dir(dir) {
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {
                sleep(Duration::from_millis(10));
            }
            _ => return,
        }
    }
}
