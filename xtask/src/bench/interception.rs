//! What interception costs those who connect: the kernel's own account of the time that eBPF programs take.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::metric::Metric;
use super::site::Site;
use super::subject::{Running, Subject};
use super::workload::{Workload, job};

/// While it is 1, the kernel notes how long programs run. The whole machine's.
const SWITCH: &str = "/proc/sys/kernel/bpf_stats_enabled";

/// How long the proxy is given to end the last of the captured connections.
const SETTLE: Duration = Duration::from_millis(300);

/// Turns the kernel's notes on; as before on drop.
struct Noting {
    before: String,
}

impl Noting {
    fn start() -> Result<Self> {
        let before = fs::read_to_string(SWITCH).with_context(|| format!("read {SWITCH}"))?;
        fs::write(SWITCH, "1").with_context(|| format!("write to {SWITCH}"))?;
        Ok(Self { before })
    }
}

impl Drop for Noting {
    fn drop(&mut self) {
        let _ = fs::write(SWITCH, self.before.trim());
    }
}

/// Time and number of runs of all programs that a process holds.
fn programs(pid: u32) -> Result<(u64, u64)> {
    let dir = format!("/proc/{pid}/fdinfo");
    let mut programs = BTreeMap::new();
    for file in fs::read_dir(&dir).with_context(|| dir.clone())?.flatten() {
        // Connections come and go.
        let Ok(text) = fs::read_to_string(file.path()) else { continue };
        if let Some((id, time, runs)) = program(&text) {
            programs.insert(id, (time, runs));
        }
    }
    ensure!(!programs.is_empty(), "process {pid} has no eBPF programs: nothing is intercepted");
    Ok(programs.values().fold((0, 0), |(a, b), (time, runs)| (a + time, b + runs)))
}

/// Id, nanoseconds and runs, from the fdinfo of a program.
fn program(fdinfo: &str) -> Option<(u64, u64, u64)> {
    let field = |name: &str| {
        let line = fdinfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    Some((field("prog_id:")?, field("run_time_ns:")?, field("run_cnt:")?))
}

/// Short connections of captured clients, then of clients in a cgroup that is not covered.
pub(super) fn measure(site: &mut Site, running: &Running, duration: Duration) -> Result<Vec<(Metric, f64)>> {
    let pid = *running.pids().first().context("interception needs a proxy")?;
    let work = Workload::Short.work().context("short connections are work")?;
    let _noting = Noting::start()?;
    let mut job = job(running, work, duration);
    // Everything counts: what the programs did during the warm-up too.
    job.warm_up = Duration::ZERO;
    let before = programs(pid)?;
    let measured = site.agent(running.subject()).run(&job)?;
    let after = programs(pid)?;
    let connections = measured.requests as f64;
    let took = (after.0 - before.0) as f64 / 1e3 / connections;
    let own_runs = (after.1 - before.1) as f64 / connections;
    ensure!(after.1 > before.1, "captured connections ran no program");

    sleep(SETTLE);
    let backs = site.backs(running.subject());
    (job.echo, job.bulk, job.proxy) = (backs.echo, backs.bulk, Vec::new());
    let before = programs(pid)?;
    let measured = site.agent(Subject::DIRECT).run(&job)?;
    let after = programs(pid)?;
    let runs = (after.1 - before.1) as f64 / measured.requests as f64;
    Ok(vec![(Metric::InterceptCpu, took), (Metric::InterceptRuns, own_runs), (Metric::ForeignRuns, runs)])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_among_descriptors() {
        let text =
            "pos:\t0\nprog_type:\t18\nprog_jited:\t1\nprog_id:\t28531\nrun_time_ns:\t1500\nrun_cnt:\t3\n";
        assert_eq!(program(text), Some((28531, 1500, 3)));
        assert_eq!(program("link_type:\tcgroup\nprog_id:\t28537\n"), None, "a link counts nothing");
    }
}
