//! What a proxy holds: read from /proc, its cgroup, its pinned maps and its stats.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use tidegate_tests::admin::Admin;
use tidegate_tests::load::account;
use tidegate_tests::proxy::Proxy;

/// A quantity: its name, how much it may grow over a run, and how it is printed.
#[derive(Clone, Copy, Debug)]
pub(super) struct Quantity {
    pub(super) name: &'static str,
    /// In its own unit. Infinite: shown, not judged.
    pub(super) bound: f64,
    /// Bytes are printed in MiB.
    pub(super) bytes: bool,
}

/// Not a single one more.
const NONE: f64 = 0.5;

const MIB: f64 = 1_048_576.0;

/// What is sampled. Every proxy has them all, but for the kernel memory of its cgroup.
pub(super) const QUANTITIES: [Quantity; 8] = [
    // Where the allocator puts what lives long is not the same after each round.
    Quantity { name: "rss", bound: 2.0 * MIB, bytes: true },
    Quantity { name: "files", bound: NONE, bytes: false },
    // The pool keeps pipes for the next burst, as many as the last ones needed at the same time.
    Quantity { name: "pipes", bound: 16.0, bytes: false },
    // A helper lives on for seconds after its work.
    Quantity { name: "threads", bound: 1.5, bytes: false },
    Quantity { name: "map entries", bound: NONE, bytes: false },
    Quantity { name: "eBPF objects", bound: NONE, bytes: false },
    Quantity { name: "cgroup slab", bound: 2.0 * MIB, bytes: true },
    // Of the whole machine: everybody else's too.
    Quantity { name: "machine slab", bound: f64::INFINITY, bytes: true },
];

/// A sample: quantities by name.
pub(super) type Sample = BTreeMap<&'static str, f64>;

/// Reads everything.
pub(super) fn take(proxy: &Proxy) -> Result<Sample> {
    let pid = proxy.pid();
    let files = Files::of(pid)?;
    let mut sample = Sample::from([
        ("rss", account::rss(pid)? as f64),
        ("files", files.others as f64),
        ("pipes", files.pipes as f64),
        ("threads", account::threads(pid)?.len() as f64),
        ("map entries", map_entries(proxy.pins())? as f64),
        ("eBPF objects", files.ebpf as f64),
        ("machine slab", account::slab_unreclaimable()? as f64),
    ]);
    // Only where the memory controller is one of cgroup v2.
    if let Ok(memory) = fs::read_to_string(proxy.cgroup().path().join("memory.stat")) {
        let slab = memory.lines().find_map(|line| line.strip_prefix("slab "));
        sample.insert("cgroup slab", slab.context("memory.stat has no slab")?.trim().parse()?);
    }
    Ok(sample)
}

/// Open files by kind.
#[derive(Debug, Default, PartialEq, Eq)]
struct Files {
    pipes: usize,
    ebpf: usize,
    /// Sockets, rings, logs, epolls, namespaces.
    others: usize,
}

impl Files {
    fn of(pid: u32) -> Result<Self> {
        let dir = format!("/proc/{pid}/fd");
        let mut files = Self::default();
        for file in fs::read_dir(&dir).with_context(|| format!("the process has ended: {dir}"))? {
            // One that is closed meanwhile.
            let Ok(target) = fs::read_link(file?.path()) else { continue };
            files.add(&target.to_string_lossy());
        }
        Ok(files)
    }

    fn add(&mut self, target: &str) {
        if target.starts_with("pipe:") {
            self.pipes += 1;
        } else if target.starts_with("anon_inode:bpf") {
            self.ebpf += 1;
        } else {
            self.others += 1;
        }
    }
}

/// Entries of all pinned hash maps: handshakes in flight, namespaces, destinations.
fn map_entries(pins: &Path) -> Result<usize> {
    let mut entries = 0;
    let mut maps = 0;
    for path in files_below(pins)? {
        let dump = Command::new("bpftool").args(["-j", "map", "dump", "pinned"]).arg(&path).output();
        let dump = dump.context("run bpftool (Debian: apt-get install bpftool)")?;
        // Links and programs are pinned too, and some maps can't be listed.
        let Ok(serde_json::Value::Array(listed)) = serde_json::from_slice(&dump.stdout) else { continue };
        if !dump.status.success() {
            continue;
        }
        maps += 1;
        entries += listed.len();
    }
    ensure!(maps > 0, "no map is pinned below {}", pins.display());
    Ok(entries)
}

fn files_below(dir: &Path) -> Result<Vec<std::path::PathBuf>> {
    let mut files = Vec::new();
    for entry in fs::read_dir(dir).with_context(|| format!("read {}", dir.display()))? {
        let path = entry?.path();
        if path.is_dir() { files.extend(files_below(&path)?) } else { files.push(path) }
    }
    Ok(files)
}

/// Gauges that are not zero although nobody does anything.
pub(super) fn raised_gauges(admin: &Admin) -> Result<Vec<String>> {
    let stats = admin.read("/stats")?.body;
    Ok(raised(&stats))
}

/// The gauges of what is going on, by the end of their names.
const GAUGES: [&str; 9] = [
    ".downstream_cx_active",
    ".downstream_pre_cx_active",
    ".upstream_cx_active",
    ".upstream_rq_active",
    ".upstream_rq_pending_active",
    ".upstream_flush_active",
    ".downstream_cx_rx_bytes_buffered",
    ".downstream_cx_tx_bytes_buffered",
    "tidegate.pump.pipes_in_use",
];

fn raised(stats: &str) -> Vec<String> {
    let is_gauge = |name: &str| {
        // The request for the stats is one of the admin server's own.
        !name.starts_with("http.admin.")
            && !name.starts_with("listener.admin.")
            && GAUGES.iter().any(|gauge| name.ends_with(gauge))
    };
    let lines = stats.lines().filter_map(|line| line.rsplit_once(": "));
    lines
        .filter(|(name, value)| is_gauge(name) && *value != "0")
        .map(|(name, value)| format!("{name} {value}"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_have_kinds() {
        let mut files = Files::default();
        for target in
            ["pipe:[1]", "socket:[2]", "anon_inode:[io_uring]", "anon_inode:bpf-map", "/x/access.log"]
        {
            files.add(target);
        }
        assert_eq!(files, Files { pipes: 1, ebpf: 1, others: 3 });
    }

    #[test]
    fn gauges_that_stay_up_are_named() {
        let stats = "http.admin.downstream_cx_active: 1\nlistener.admin.downstream_cx_active: 1\n\
                     tcp.foo.upstream_flush_active: 0\ncluster.foo.upstream_cx_active: 2\n\
                     cluster.foo.upstream_cx_total: 9\ntidegate.pump.pipes_pooled: 7\n";
        assert_eq!(raised(stats), ["cluster.foo.upstream_cx_active 2"]);
    }
}
