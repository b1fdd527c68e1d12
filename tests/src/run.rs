//! Names of one run, and the removal of what dead runs left behind.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Once;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, Result, bail};
use nix::fcntl::{Flock, FlockArg};

use crate::cgroup;

/// First part of every name that the fixtures give to something that outlives a process.
const PREFIX: &str = "tgt-";

/// Where pin directories are made.
pub const BPFFS: &str = "/sys/fs/bpf";

/// Where files in memory are made.
const MEMORY: &str = "/dev/shm";

/// A name that no other live process uses: `tgt-<pid>-<start time>-<count>-<kind>`.
pub fn unique(kind: &str) -> String {
    static COUNT: AtomicU32 = AtomicU32::new(0);
    format!("{}-{}-{kind}", id(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// `tgt-<pid>-<start time>` of this process.
pub fn id() -> String {
    let pid = std::process::id();
    format!("{PREFIX}{pid}-{}", start_time(pid).unwrap_or_default())
}

/// Prepares the machine once per process: root, bpffs, nothing left of dead runs.
pub fn prepare() -> Result<()> {
    static ONCE: Once = Once::new();
    if !nix::unistd::geteuid().is_root() {
        bail!("network namespaces need root: run `cargo xtask test`, which asks for it by sudo");
    }
    let mut outcome = Ok(());
    ONCE.call_once(|| outcome = lock().and_then(|_lock| mount_bpffs()).and_then(|()| sweep()));
    outcome
}

/// Serialises what the kernel or iproute2 can't do in parallel (first mount of /run/netns, sweeping).
pub(crate) fn lock() -> Result<Flock<fs::File>> {
    let path = "/run/tidegate-tests.lock";
    let file = fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).context(path)?;
    Flock::lock(file, FlockArg::LockExclusive).map_err(|(_, errno)| anyhow::anyhow!("lock {path}: {errno}"))
}

/// Removes the namespaces, cgroups with their processes, pins and directories whose maker is gone.
pub fn sweep() -> Result<()> {
    remove_all(maker_is_dead)
}

/// Removes everything that this process has made: for a process that is about to end without running its
/// destructors. What can't be removed is left to the next [`sweep`].
pub fn remove_own() {
    let own = format!("{}-", id());
    let _ = remove_all(|name| name.starts_with(&own));
}

fn remove_all(doomed: impl Fn(&str) -> bool) -> Result<()> {
    for root in cgroup::hierarchies() {
        for dir in entries(&root, &doomed) {
            cgroup::remove_tree(&dir);
        }
    }
    for path in entries(Path::new("/run/netns"), &doomed) {
        let name = path.file_name().unwrap_or_default();
        let _ = Command::new("ip").args(["netns", "del"]).arg(name).status();
    }
    for dir in [Path::new(BPFFS), Path::new(MEMORY), &std::env::temp_dir()] {
        for path in entries(dir, &doomed) {
            fs::remove_dir_all(&path).with_context(|| format!("remove {}", path.display()))?;
        }
    }
    Ok(())
}

/// A directory for files, removed on drop.
#[derive(Debug)]
pub struct TempDir(PathBuf);

impl TempDir {
    /// Makes it below the system's temporary directory.
    pub fn new(kind: &str) -> Result<Self> {
        Self::at(std::env::temp_dir().join(unique(kind)))
    }

    /// Makes it on a tmpfs: what is written there costs no disk.
    pub fn in_memory(kind: &str) -> Result<Self> {
        Self::at(Path::new(MEMORY).join(unique(kind)))
    }

    fn at(path: PathBuf) -> Result<Self> {
        fs::create_dir_all(&path).with_context(|| format!("create {}", path.display()))?;
        Ok(Self(path))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TempDir {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn mount_bpffs() -> Result<()> {
    let mounts = fs::read_to_string("/proc/self/mounts")?;
    if mounts.lines().any(|line| line.split(' ').nth(1) == Some(BPFFS)) {
        return Ok(());
    }
    let status = Command::new("mount").args(["-t", "bpf", "bpf", BPFFS]).status()?;
    anyhow::ensure!(status.success(), "mount -t bpf bpf {BPFFS}: {status}");
    Ok(())
}

fn entries(dir: &Path, wanted: impl Fn(&str) -> bool) -> Vec<PathBuf> {
    let Ok(entries) = fs::read_dir(dir) else { return Vec::new() };
    entries
        .flatten()
        .filter(|entry| entry.file_name().to_str().is_some_and(&wanted))
        .map(|entry| entry.path())
        .collect()
}

/// Whether the name is one of ours and its maker no longer runs (a reused pid has another start time).
pub fn maker_is_dead(name: &str) -> bool {
    let Some(rest) = name.strip_prefix(PREFIX) else { return false };
    let mut parts = rest.split('-');
    let (Some(pid), Some(start)) = (parts.next(), parts.next()) else { return false };
    let (Ok(pid), Ok(start)) = (pid.parse(), start.parse()) else { return false };
    start_time(pid) != Some(start)
}

/// Start time of a process in clock ticks since boot: field 22 of /proc/PID/stat.
fn start_time(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let after_name = stat.rsplit_once(')')?.1;
    after_name.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_names_of_dead_makers_are_swept() {
        assert!(!maker_is_dead(&unique("x")), "this process lives");
        assert!(maker_is_dead("tgt-1-0-0-x"), "pid 1 did not start at tick 0 of this run");
        assert!(!maker_is_dead("docker-1234"));
        assert!(!maker_is_dead("tgt-notes"));
    }
}
