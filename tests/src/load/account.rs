//! What the kernel says about processes and the machine.

use std::fs;

use anyhow::{Context, Result};

/// CPU time that the scheduler has charged to all threads of a process, in nanoseconds. Threads that have ended are
/// missing; the proxies that are measured end none.
pub fn cpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for tid in threads(pid)? {
        let path = format!("/proc/{pid}/task/{tid}/schedstat");
        // A thread that ends between the two calls; io_uring's helpers do.
        let Ok(text) = fs::read_to_string(&path) else { continue };
        let ran = text.split_whitespace().next().and_then(|ran| ran.parse::<u64>().ok());
        sum += ran.with_context(|| format!("{path} holds {text:?}"))?;
    }
    Ok(sum)
}

/// The threads of a process.
pub fn threads(pid: u32) -> Result<Vec<u32>> {
    let tasks = format!("/proc/{pid}/task");
    let tasks = fs::read_dir(&tasks).with_context(|| format!("the process has ended: {tasks}"))?;
    Ok(tasks.flatten().filter_map(|task| task.file_name().to_str()?.parse().ok()).collect())
}

/// The children of a process.
pub fn children(pid: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for tid in threads(pid)? {
        let path = format!("/proc/{pid}/task/{tid}/children");
        let text = fs::read_to_string(&path).with_context(|| path.clone())?;
        children.extend(text.split_whitespace().filter_map(|pid| pid.parse::<u32>().ok()));
    }
    Ok(children)
}

/// Resident memory in bytes (`VmRSS`): code and shared pages included, as operators see it.
pub fn rss(pid: u32) -> Result<u64> {
    let path = format!("/proc/{pid}/status");
    let status = fs::read_to_string(&path).with_context(|| format!("the process has ended: {path}"))?;
    kib(&status, "VmRSS:").with_context(|| path.clone())
}

/// Unreclaimable slab memory of the whole machine in bytes: sockets, files, pipes, poll entries.
pub fn slab_unreclaimable() -> Result<u64> {
    kib(&fs::read_to_string("/proc/meminfo")?, "SUnreclaim:").context("/proc/meminfo")
}

fn kib(text: &str, name: &str) -> Result<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    let kib: u64 = line.trim().trim_end_matches(" kB").parse().with_context(|| format!("{name} {line}"))?;
    Ok(kib << 10)
}

/// CPU time that was not idle since boot, of all CPUs, in nanoseconds; steal included, as it is not ours to give. In
/// steps of 10 ms.
pub fn machine_busy_ns() -> Result<u64> {
    let stat = fs::read_to_string("/proc/stat")?;
    busy_ticks(&stat).map(|ticks| ticks * 10_000_000).context("/proc/stat has no line for all CPUs")
}

/// Fields of the first line: user, nice, system, idle, iowait, irq, softirq, steal, guest, guest_nice (the last two are
/// in user and nice already).
fn busy_ticks(stat: &str) -> Option<u64> {
    let fields: Vec<u64> =
        stat.lines().next()?.strip_prefix("cpu ")?.split_whitespace().map_while(|f| f.parse().ok()).collect();
    let [user, nice, system, _idle, _iowait, irq, softirq, steal, ..] = fields[..] else { return None };
    Some(user + nice + system + irq + softirq + steal)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_busy() {
        assert_eq!(busy_ticks("cpu  1 2 4 1000 2000 8 16 32 5000 6000\ncpu0 1\n"), Some(63));
        assert_eq!(busy_ticks("intr 1"), None);
    }

    #[test]
    fn this_process() {
        let own = std::process::id();
        let before = cpu_ns(own).expect("it runs");
        let until = std::time::Instant::now() + std::time::Duration::from_millis(30);
        while std::time::Instant::now() < until {}
        assert!(cpu_ns(own).expect("it runs") > before);
        assert!(rss(own).expect("it runs") > 1 << 20);
        assert!(threads(own).expect("it runs").contains(&own));
        assert!(slab_unreclaimable().expect("Linux says") > 0);
        assert!(machine_busy_ns().expect("Linux says") > 0);
    }
}
