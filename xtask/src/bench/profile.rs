//! Where the CPU of a proxy goes: perf samples its processes while a workload runs.

use std::path::Path;
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tidegate_tests::run::TempDir;

use super::metric::Metric;

/// Samples in a second of CPU.
const FREQUENCY: &str = "1999";

/// What is looked for in the kernel, with everything that it calls: on loopback the kernel has the sender do the receiver's
/// share of TCP too. None of them calls another.
const PARTS: [(Metric, &[&str]); 6] = [
    (Metric::SendCpu, &["tcp_sendmsg"]),
    (Metric::ReceiveCpu, &["tcp_recvmsg", "tcp_splice_read"]),
    (Metric::OpenCpu, &["inet_stream_connect"]),
    (Metric::AcceptCpu, &["inet_accept"]),
    (Metric::EndCpu, &["inet_shutdown", "inet_release"]),
    (Metric::SwitchCpu, &["__schedule"]),
];

/// A perf that is recording. Ends on drop.
#[derive(Debug)]
pub(super) struct Profile {
    perf: Child,
    dir: TempDir,
}

impl Profile {
    /// Samples these processes from now on.
    pub(super) fn start(pids: &[u32]) -> Result<Self> {
        let pids: Vec<_> = pids.iter().map(u32::to_string).collect();
        let dir = TempDir::in_memory("perf")?;
        let perf = Command::new("perf")
            .args(["record", "-q", "-g", "--kernel-callchains", "-F", FREQUENCY, "-p", &pids.join(","), "-o"])
            .arg(dir.path().join("data"))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .context("run perf")?;
        Ok(Self { perf, dir })
    }

    /// Ends it: shares of what was sampled.
    pub(super) fn finish(mut self) -> Result<Shares> {
        kill(Pid::from_raw(self.perf.id().cast_signed()), Signal::SIGINT).context("end perf")?;
        self.perf.wait().context("wait for perf")?;
        Shares::read(&self.dir.path().join("data"))
    }
}

impl Drop for Profile {
    fn drop(&mut self) {
        // It has ended after `finish`.
        let _ = self.perf.kill();
        let _ = self.perf.wait();
    }
}

/// Which share of the samples each part has.
#[derive(Debug, PartialEq)]
pub(super) struct Shares(Vec<(Metric, f64)>);

impl Shares {
    fn read(data: &Path) -> Result<Self> {
        let output = Command::new("perf")
            .args([
                "report",
                "--stdio",
                "--children",
                "-g",
                "none",
                "-F",
                "overhead_children,overhead,sym",
                "-i",
            ])
            .arg(data)
            .output()
            .context("run perf report")?;
        ensure!(
            output.status.success(),
            "perf report: {} ({}). Does the kernel let root sample (kernel.perf_event_paranoid)?",
            String::from_utf8_lossy(&output.stderr).trim(),
            output.status
        );
        Self::parse(&String::from_utf8_lossy(&output.stdout))
    }

    /// From lines of `CHILDREN%  SELF%  [k] symbol`.
    fn parse(report: &str) -> Result<Self> {
        let mut shares: Vec<_> = PARTS.iter().map(|(metric, _)| (*metric, 0.0)).collect();
        let (mut user, mut total) = (0.0, 0.0);
        for line in report.lines() {
            let mut words = line.split_whitespace();
            let mut percent = || words.next()?.strip_suffix('%')?.parse::<f64>().ok();
            let (Some(inclusive), Some(own)) = (percent(), percent()) else { continue };
            let (Some(mode), Some(symbol)) = (words.next(), words.next()) else { continue };
            total += own;
            if mode != "[k]" {
                user += own;
            }
            for (share, (_, symbols)) in shares.iter_mut().zip(PARTS) {
                if mode == "[k]" && symbols.contains(&symbol) {
                    share.1 += inclusive / 100.0;
                }
            }
        }
        ensure!(total > 50.0, "perf has no samples of the proxy, or its report can't be read:\n{report}");
        let user = user / 100.0;
        let known: f64 = shares.iter().map(|(_, share)| share).sum();
        shares.extend([(Metric::OtherKernelCpu, (1.0 - known - user).max(0.0)), (Metric::UserCpu, user)]);
        Ok(Self(shares))
    }

    /// Of the proxy's CPU among these figures, what each part took.
    pub(super) fn of(&self, figures: &[(Metric, f64)]) -> Vec<(Metric, f64)> {
        let cpu = figures.iter().find(|(metric, _)| *metric == Metric::ProxyCpu);
        cpu.map_or_else(Vec::new, |(_, cpu)| {
            self.0.iter().map(|(part, share)| (*part, share * cpu)).collect()
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const REPORT: &str = "\
# To display the perf.data header info, please use --header/--header-only options.
#
# Children      Self  Symbol
    93.00%     1.00%  [k] do_syscall_64
    60.00%    50.00%  [k] tcp_sendmsg
    10.00%     6.00%  [k] tcp_recvmsg
     5.00%     5.00%  [k] tcp_splice_read
    20.00%    20.00%  [k] __schedule
     7.00%     4.00%  [.] tidegate::uring::start
     3.00%     3.00%  [.] tcp_sendmsg
";

    #[test]
    fn parts_are_inclusive_and_the_rest_is_named() {
        let figures = [(Metric::Rate, 5.0), (Metric::ProxyCpu, 10.0)];
        let parts = Shares::parse(REPORT).expect("a report").of(&figures);
        let part =
            |wanted| parts.iter().find(|(metric, _)| *metric == wanted).map(|(_, value)| value.round());
        assert_eq!(part(Metric::SendCpu), Some(6.0));
        assert_eq!(part(Metric::ReceiveCpu), Some(2.0)); // 1.5
        assert_eq!(part(Metric::SwitchCpu), Some(2.0));
        assert_eq!(part(Metric::OpenCpu), Some(0.0));
        assert_eq!(part(Metric::UserCpu), Some(1.0)); // .7
        let sum: f64 = parts.iter().map(|(_, value)| value).sum();
        assert!((sum - 10.2).abs() < 1e-9, "{sum}: the parts above are more than all");
        assert_eq!(Shares::parse(REPORT).expect("a report").of(&[(Metric::Rate, 5.0)]), []);
    }

    #[test]
    fn nothing_sampled_is_an_error() {
        for report in ["", "# Children\n", "    0.00%     0.00%  [k] tcp_sendmsg\n"] {
            assert!(Shares::parse(report).is_err(), "{report:?}");
        }
    }
}
