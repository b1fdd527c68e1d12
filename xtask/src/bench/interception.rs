//! What interception costs those who connect: the kernel's own account of the time that eBPF programs take.

use std::collections::BTreeMap;
use std::fs;
use std::thread::sleep;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::metric::Metric;
use super::running::Running;
use super::site::Site;
use super::subject::Subject;
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

/// What programs have done since they were loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
struct Ran {
    nanoseconds: u64,
    /// Those of them in connect(2) and getpeername(2).
    connecting: u64,
    runs: u64,
}

impl Ran {
    fn since(self, before: Self) -> Self {
        Self {
            nanoseconds: self.nanoseconds - before.nanoseconds,
            connecting: self.connecting - before.connecting,
            runs: self.runs - before.runs,
        }
    }
}

/// `BPF_PROG_TYPE_CGROUP_SOCK_ADDR`, as fdinfo shows it.
const SOCK_ADDR: u64 = 18;

/// All programs that a process holds.
fn programs(pid: u32) -> Result<Ran> {
    let dir = format!("/proc/{pid}/fdinfo");
    let mut programs = BTreeMap::new();
    for file in fs::read_dir(&dir).with_context(|| dir.clone())?.flatten() {
        // Connections come and go.
        let Ok(text) = fs::read_to_string(file.path()) else { continue };
        programs.extend(program(&text));
    }
    ensure!(!programs.is_empty(), "process {pid} has no eBPF programs: nothing is intercepted");
    Ok(programs.values().fold(Ran::default(), |sum: Ran, ran| Ran {
        nanoseconds: sum.nanoseconds + ran.nanoseconds,
        connecting: sum.connecting + ran.connecting,
        runs: sum.runs + ran.runs,
    }))
}

/// Id and account, from the fdinfo of a program.
fn program(fdinfo: &str) -> Option<(u64, Ran)> {
    let field = |name: &str| {
        let line = fdinfo.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().parse::<u64>().ok()
    };
    let (nanoseconds, runs) = (field("run_time_ns:")?, field("run_cnt:")?);
    let connecting = if field("prog_type:")? == SOCK_ADDR { nanoseconds } else { 0 };
    Some((field("prog_id:")?, Ran { nanoseconds, connecting, runs }))
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
    let own = programs(pid)?.since(before);
    let connections = measured.requests as f64;
    ensure!(own.runs > 0, "captured connections ran no program");

    sleep(SETTLE);
    let backs = site.backs(running.subject());
    (job.echo, job.bulk, job.proxy) = (backs.echo, backs.bulk, Vec::new());
    let before = programs(pid)?;
    let measured = site.agent(Subject::DIRECT).run(&job)?;
    let foreign = programs(pid)?.since(before);
    Ok(vec![
        (Metric::InterceptCpu, own.nanoseconds as f64 / 1e3 / connections),
        (Metric::ConnectCpu, own.connecting as f64 / 1e3 / connections),
        (Metric::InterceptRuns, own.runs as f64 / connections),
        (Metric::ForeignRuns, foreign.runs as f64 / measured.requests as f64),
    ])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn programs_among_descriptors() {
        let text =
            "pos:\t0\nprog_type:\t18\nprog_jited:\t1\nprog_id:\t28531\nrun_time_ns:\t1500\nrun_cnt:\t3\n";
        assert_eq!(program(text), Some((28531, Ran { nanoseconds: 1500, connecting: 1500, runs: 3 })));
        let events = text.replace("prog_type:\t18", "prog_type:\t13");
        assert_eq!(program(&events).map(|(_, ran)| ran.connecting), Some(0));
        assert_eq!(program("link_type:\tcgroup\nprog_id:\t28537\n"), None, "a link counts nothing");
    }
}
