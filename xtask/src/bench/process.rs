//! What the kernel says about a process.

use std::fs;

use anyhow::{Context, Result};

/// CPU time that the scheduler has charged to all threads of a process, in nanoseconds. Threads that have ended are
/// missing; the proxies that are measured end none.
pub(super) fn cpu_ns(pid: u32) -> Result<u64> {
    let tasks = format!("/proc/{pid}/task");
    let mut sum = 0;
    for task in fs::read_dir(&tasks).with_context(|| format!("the proxy has ended: {tasks}"))? {
        let path = task?.path().join("schedstat");
        // A thread that ends between the two calls; io_uring's helpers do.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let ran = text.split_whitespace().next().and_then(|ran| ran.parse::<u64>().ok());
        sum += ran.with_context(|| format!("{} holds {text:?}", path.display()))?;
    }
    Ok(sum)
}

/// Resident memory in bytes (`VmRSS`): code and shared pages included, as operators see it.
pub(super) fn rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("the proxy has ended: {path}"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("VmRSS: {line}"))?;
    Ok(kib << 10)
}
