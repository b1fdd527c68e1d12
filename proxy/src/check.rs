//! `tidegate check`: what this machine offers. One line for each thing that tidegate needs: OK, WARN (something is
//! missing or slower) or FAIL (interception does not work), and what to do.

use std::fmt;
use std::fs;
use std::io;
use std::path::Path;
use std::process::ExitCode;

use caps::{CapSet, Capability};
use nix::sys::resource::{Resource, getrlimit};

use crate::intercept::{self, programs};
use crate::sys::{cgroup, mounts};
use crate::takeover::{Recorded, StatePaths, recorded};
use crate::uring::{self, Engine};

/// How a check went.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Outcome {
    /// As it should be.
    Ok,
    /// Works, but less well, or only in part.
    Warn,
    /// Interception does not work.
    Fail,
}

/// One line.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// How it went.
    pub outcome: Outcome,
    /// What was looked at.
    pub what: &'static str,
    /// What was found.
    pub found: String,
    /// What to do; empty when all is well.
    pub remedy: String,
}

/// All lines.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// In the order of the checks.
    pub lines: Vec<Line>,
}

/// Checks everything. Changes nothing on the machine; programs are loaded for a moment and attached nowhere.
pub fn run(paths: &StatePaths) -> Report {
    let mut report = Report::default();
    kernel(&mut report);
    btf(&mut report);
    capabilities(&mut report);
    cgroup2(&mut report);
    own_cgroup(&mut report);
    bpffs(&mut report, &paths.pin_dir);
    trial_load(&mut report);
    processes(&mut report);
    inotify(&mut report);
    io_uring(&mut report);
    pipes(&mut report);
    open_files(&mut report);
    left_overs(&mut report, paths);
    report
}

impl Report {
    /// The worst outcome.
    pub fn worst(&self) -> Outcome {
        self.lines.iter().map(|line| line.outcome).max().unwrap_or(Outcome::Ok)
    }

    /// Prints it to standard output. 1 when a line says FAIL, else 0.
    pub fn print(&self) -> ExitCode {
        println!("{self}");
        if self.worst() == Outcome::Fail { ExitCode::FAILURE } else { ExitCode::SUCCESS }
    }

    fn ok(&mut self, what: &'static str, found: impl Into<String>) {
        self.lines.push(Line { outcome: Outcome::Ok, what, found: found.into(), remedy: String::new() });
    }

    fn warn(&mut self, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.lines.push(Line { outcome: Outcome::Warn, what, found: found.into(), remedy: remedy.into() });
    }

    fn fail(&mut self, what: &'static str, found: impl Into<String>, remedy: impl Into<String>) {
        self.lines.push(Line { outcome: Outcome::Fail, what, found: found.into(), remedy: remedy.into() });
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for Line { outcome, what, found, remedy } in &self.lines {
            let outcome = match outcome {
                Outcome::Ok => "OK",
                Outcome::Warn => "WARN",
                Outcome::Fail => "FAIL",
            };
            write!(f, "{outcome:<5} {what}: {found}")?;
            if remedy.is_empty() { writeln!(f)? } else { writeln!(f, "\n      -> {remedy}")? }
        }
        match self.worst() {
            Outcome::Ok => f.write_str("Everything is there."),
            Outcome::Warn => f.write_str("Interception works; see WARN."),
            Outcome::Fail => f.write_str(
                "Interception does not work here; see FAIL. Bound listeners, iptables REDIRECT and TPROXY do.",
            ),
        }
    }
}

/// Oldest kernel with `bpf_get_netns_cookie` in sockops and connect hooks.
const KERNEL: (u32, u32) = (5, 15);
/// First kernel with `bpf_set_retval`.
const KERNEL_ERRNO: (u32, u32) = (5, 18);

fn kernel(report: &mut Report) {
    let release = nix::sys::utsname::uname().map(|name| name.release().to_string_lossy().into_owned());
    let release = release.unwrap_or_default();
    match version(&release) {
        Some(found) if found >= KERNEL_ERRNO => report.ok("kernel", release),
        Some(found) if found >= KERNEL => report.warn(
            "kernel",
            release,
            "works; a refused connect gets EPERM instead of its own errno before 5.18",
        ),
        Some(_) => report.fail("kernel", release, "interception needs Linux 5.15 or newer"),
        None => report.warn(
            "kernel",
            format!("'{release}'"),
            "can't tell the version; Linux 5.15 or newer is needed",
        ),
    }
}

/// Major and minor of a release such as `6.1.0-18-amd64`.
fn version(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn btf(report: &mut Report) {
    if Path::new("/sys/kernel/btf/vmlinux").exists() {
        report.ok("BTF", "/sys/kernel/btf/vmlinux");
    } else {
        report.warn(
            "BTF",
            "the kernel has none",
            "the trial load below decides; distributions' kernels have it (CONFIG_DEBUG_INFO_BTF=y)",
        );
    }
}

/// What each capability is for. `CAP_SYS_ADMIN` stands in for `CAP_BPF`.
const CAPABILITIES: [(Capability, Outcome, &str); 6] = [
    (Capability::CAP_BPF, Outcome::Fail, "load eBPF programs and read their maps"),
    (Capability::CAP_NET_ADMIN, Outcome::Fail, "attach them to cgroups; IP_TRANSPARENT (TPROXY)"),
    (Capability::CAP_SYS_ADMIN, Outcome::Fail, "enter the pods' network namespaces (setns)"),
    (Capability::CAP_SYS_PTRACE, Outcome::Fail, "open /proc/PID/ns/net of other users' processes"),
    (
        Capability::CAP_SYS_RESOURCE,
        Outcome::Warn,
        "raise the limit of open files, and pipes above the soft limit",
    ),
    (Capability::CAP_NET_RAW, Outcome::Ok, "nothing: a stand-in for CAP_NET_ADMIN with IP_TRANSPARENT"),
];

fn capabilities(report: &mut Report) {
    let held = match caps::read(None, CapSet::Effective) {
        Ok(held) => held,
        Err(error) => return report.warn("capabilities", error.to_string(), "is /proc mounted?"),
    };
    for (capability, without, purpose) in CAPABILITIES {
        let admin = capability == Capability::CAP_BPF && held.contains(&Capability::CAP_SYS_ADMIN);
        let outcome = if held.contains(&capability) || admin { Outcome::Ok } else { without };
        let (found, remedy) = if held.contains(&capability) {
            (format!("{capability} is held ({purpose})"), String::new())
        } else {
            let remedy = format!(
                "run as root, or add {capability} (securityContext.capabilities, AmbientCapabilities=)"
            );
            (
                format!("{capability} is missing ({purpose})"),
                if outcome == Outcome::Ok { String::new() } else { remedy },
            )
        };
        report.lines.push(Line { outcome, what: "capability", found, remedy });
    }
}

fn cgroup2(report: &mut Report) {
    let mount = match mounts::cgroup2() {
        Ok(Some(mount)) => mount,
        Ok(None) => {
            return report.fail("cgroup v2", "not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified");
        }
        Err(error) => return report.fail("cgroup v2", error.to_string(), "is /proc mounted?"),
    };
    match cgroup::kubepods(&mount) {
        Ok(found) if found.is_empty() => report.warn(
            "cgroup v2",
            format!("{}, without a kubepods subtree", mount.display()),
            "nothing is intercepted unless asked for: --pod-cgroup DIR, or --intercept-cgroup DIR on a laptop",
        ),
        Ok(found) => {
            let found: Vec<_> = found.iter().map(|path| path.display().to_string()).collect();
            report.ok("cgroup v2", format!("pods in {}", found.join(", ")));
        }
        Err(error) => report.fail("cgroup v2", format!("{}: {error}", mount.display()), "is it readable?"),
    }
}

fn own_cgroup(report: &mut Report) {
    match intercept::cgroup::own() {
        Ok(_) if intercept::cgroup::own_is_root() => report.warn(
            "own cgroup",
            "this process is in the root of cgroup v2",
            "a tidegate that is started there costs every TCP connection of the machine some CPU: \
             give it a cgroup of its own, as a systemd unit or a pod has (or: mkdir DIR, echo $$ > DIR/cgroup.procs)",
        ),
        Ok(path) => report.ok("own cgroup", path.display().to_string()),
        Err(error) => report.fail("own cgroup", error.to_string(), "is cgroup v2 mounted, and /proc?"),
    }
}

fn bpffs(report: &mut Report, pin_dir: &Path) {
    let existing = pin_dir.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    match mounts::is_on_bpffs(existing) {
        Ok(true) => report.ok("bpffs", format!("{} can hold pins", pin_dir.display())),
        Ok(false) if pin_dir.starts_with("/sys/fs/bpf") => report.warn(
            "bpffs",
            "not mounted at /sys/fs/bpf",
            "tidegate mounts it when it starts, if it may; for good: mount -t bpf bpf /sys/fs/bpf",
        ),
        Ok(false) => report.fail(
            "bpffs",
            format!("{} is not on a bpffs", pin_dir.display()),
            "choose a --pin-path below one (grep bpf /proc/mounts)",
        ),
        Err(error) => {
            report.fail("bpffs", format!("{}: {error}", existing.display()), "choose another --pin-path");
        }
    }
}

fn trial_load(report: &mut Report) {
    match programs::trial() {
        Ok(()) => report.ok("eBPF programs", "the kernel accepts all of them"),
        Err(error) => {
            report.fail("eBPF programs", error.to_string(), "see the lines above for what is missing");
        }
    }
}

/// Inode of the initial pid namespace, a constant of the kernel.
const INITIAL_PID_NAMESPACE: &str = "pid:[4026531836]";

fn processes(report: &mut Report) {
    match fs::read_link("/proc/self/ns/pid") {
        Ok(own) if own.as_os_str() == INITIAL_PID_NAMESPACE => {
            report.ok("processes", "in the host's pid namespace: those of all pods are visible");
        }
        Ok(own) => report.warn(
            "processes",
            format!("in pid namespace {}", own.display()),
            "pods' processes may not be visible; in Kubernetes set hostPID: true",
        ),
        Err(error) => report.warn("processes", error.to_string(), "is /proc mounted?"),
    }
}

/// Enough for 4,000 cgroups, at two watches each.
const WATCHES: u64 = 8192;

fn inotify(report: &mut Report) {
    match number("/proc/sys/fs/inotify/max_user_watches") {
        Ok(watches) if watches >= WATCHES => report.ok("inotify", format!("{watches} watches")),
        Ok(watches) => report.warn(
            "inotify",
            format!("{watches} watches"),
            "pods beyond that are found late; sysctl fs.inotify.max_user_watches=65536",
        ),
        Err(error) => report.warn("inotify", error.to_string(), "pods are found by rescans only"),
    }
}

fn io_uring(report: &mut Report) {
    let disabled = match number("/proc/sys/kernel/io_uring_disabled") {
        Ok(1) => " (kernel.io_uring_disabled is 1)",
        Ok(2) => " (kernel.io_uring_disabled is 2)",
        _ => "",
    };
    match uring::best() {
        (Engine::IoUring, _) => report.ok("io_uring", "a ring was set up"),
        (engine, None) => report.warn(
            "io_uring",
            "not with everything that the workers use",
            format!("{engine} is used instead, at more CPU per request; Linux 6.1"),
        ),
        (engine, Some(error)) => report.warn(
            "io_uring",
            format!("{error}{disabled}"),
            format!(
                "{engine} is used instead; sysctl kernel.io_uring_disabled=0, a seccomp profile that allows io_uring, \
                 Linux 6.1"
            ),
        ),
    }
}

/// Size of a pipe for bulk data, bytes.
const PIPE_SIZE: u64 = 1 << 20;

fn pipes(report: &mut Report) {
    let soft_limit = number("/proc/sys/fs/pipe-user-pages-soft").unwrap_or(0);
    match number("/proc/sys/fs/pipe-max-size") {
        Ok(size) if size >= PIPE_SIZE => report
            .ok("pipes", format!("of up to {} KiB, {soft_limit} pages without CAP_SYS_RESOURCE", size >> 10)),
        Ok(size) => report.warn(
            "pipes",
            format!("of up to {} KiB", size >> 10),
            "bulk data costs more CPU; sysctl fs.pipe-max-size=1048576",
        ),
        Err(error) => report.warn("pipes", error.to_string(), "is /proc mounted?"),
    }
}

/// For 30,000 connections, at two descriptors each.
const OPEN_FILES: u64 = 65_536;

fn open_files(report: &mut Report) {
    match getrlimit(Resource::RLIMIT_NOFILE) {
        Ok((_, hard)) if hard >= OPEN_FILES => report.ok("open files", format!("up to {hard}")),
        Ok((_, hard)) => report.warn(
            "open files",
            format!("up to {hard}"),
            "a connection takes two; raise the hard limit (LimitNOFILE=1048576, ulimit -Hn)",
        ),
        Err(errno) => report.warn("open files", errno.to_string(), "raise the limit (ulimit -Hn)"),
    }
    if let Ok((soft, _)) = getrlimit(Resource::RLIMIT_MEMLOCK) {
        // eBPF is not counted since 5.11, io_uring not since 5.12.
        let soft = if soft == u64::MAX { "unlimited".to_owned() } else { format!("{} KiB", soft >> 10) };
        report.ok("locked memory", format!("{soft}; nothing is counted against it"));
    }
}

fn left_overs(report: &mut Report, paths: &StatePaths) {
    match (recorded(&paths.state_dir), paths.pin_dir.exists()) {
        (Recorded::Alive(id, _), _) => {
            report.ok("other processes", format!("tidegate runs as process {}; a second start takes over", id.pid));
        }
        (Recorded::Unknown(reason), _) => report.warn(
            "other processes",
            format!("{}: {reason}", paths.state_dir.display()),
            "a process there can't be told to end when another one takes over",
        ),
        (Recorded::Nobody, true) => report.warn(
            "other processes",
            format!("none, but there are pins in {}", paths.pin_dir.display()),
            "left by a killed process unless one runs with another --state-dir; start tidegate, or `tidegate cleanup`",
        ),
        (Recorded::Nobody, false) => report.ok("other processes", "none, and nothing left behind"),
    }
}

fn number(path: &str) -> io::Result<u64> {
    let text =
        fs::read_to_string(path).map_err(|error| io::Error::new(error.kind(), format!("{path}: {error}")))?;
    text.trim().parse().map_err(|_| io::Error::other(format!("{path}: not a number")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions() {
        for (release, found) in [
            ("6.1.0-18-amd64", Some((6, 1))),
            ("5.15.0+", Some((5, 15))),
            ("6.18", Some((6, 18))),
            ("7", None),
            ("linux", None),
        ] {
            assert_eq!(version(release), found, "{release}");
        }
    }

    #[test]
    fn this_machine_passes() {
        let dir = tempfile::tempdir().unwrap();
        let paths = StatePaths { pin_dir: "/sys/fs/bpf/tidegate-check".into(), state_dir: dir.path().into() };
        let report = run(&paths);
        let text = report.to_string();
        let failed: Vec<_> = report.lines.iter().filter(|line| line.outcome == Outcome::Fail).collect();
        assert!(failed.is_empty(), "the tests need root and a current kernel:\n{text}");
        assert!(
            report.lines.iter().all(|line| line.remedy.is_empty() == (line.outcome == Outcome::Ok)),
            "{text}"
        );
        assert!(text.contains("OK    eBPF programs: the kernel accepts all of them\n"), "{text}");
    }

    #[test]
    fn what_is_missing_is_said_with_a_remedy() {
        let mut report = Report::default();
        bpffs(&mut report, Path::new("/proc/pins"));
        assert_eq!(report.worst(), Outcome::Fail);
        assert_eq!(report.print(), ExitCode::FAILURE);
        let text = report.to_string();
        assert!(
            text.starts_with("FAIL  bpffs: /proc/pins is not on a bpffs\n      -> choose a --pin-path"),
            "{text}"
        );
    }
}
