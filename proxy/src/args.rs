//! The command line. Flags that Envoy has keep Envoy's names, units and defaults.

use std::fmt;
use std::path::PathBuf;
use std::time::Duration;

use clap::{Args as ClapArgs, Parser, Subcommand, ValueEnum};

/// Runs the proxy, or one of the operator's commands.
#[derive(Debug, Parser)]
#[command(
    name = "tidegate",
    version,
    about = "A node proxy for TCP: Envoy's configuration, eBPF interception, the least CPU that Linux allows",
    args_conflicts_with_subcommands = true
)]
pub struct Args {
    /// One of the operator's commands; without one the proxy is run.
    #[command(subcommand)]
    pub command: Option<Command>,
    /// Flags of the proxy.
    #[command(flatten)]
    pub serve: ServeArgs,
}

/// What to do instead of proxying.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Check what this machine offers: each line OK, WARN or FAIL with what to do.
    Check(StateArgs),
    /// Remove what a killed process left behind: links, maps, state files.
    Cleanup {
        /// Where the left-overs are.
        #[command(flatten)]
        state: StateArgs,
        /// Also when a live process owns them.
        #[arg(long)]
        force: bool,
    },
}

/// Where a running process keeps what outlives it.
#[derive(Clone, Debug, Default, ClapArgs)]
pub struct StateArgs {
    /// Pin directory of eBPF links and maps, below a bpffs mount [default: /sys/fs/bpf/tidegate]
    #[arg(long, value_name = "DIR")]
    pub pin_path: Option<PathBuf>,
    /// Directory of the lock and process record [default: /run/tidegate]
    #[arg(long, value_name = "DIR")]
    pub state_dir: Option<PathBuf>,
}

/// `--mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum Mode {
    /// Validate, then serve.
    #[default]
    Serve,
    /// Validate and exit: 0 with `configuration '…' OK`, or 1.
    Validate,
    /// Validate, initialise clusters, then exit.
    InitOnly,
}

/// `--log-level`: Envoy's names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum LogLevel {
    /// Everything.
    Trace,
    /// For developers.
    Debug,
    /// Start, stop, configuration.
    #[default]
    Info,
    /// Something to look at.
    #[value(alias = "warn")]
    Warning,
    /// Something failed.
    Error,
    /// The process can't go on.
    Critical,
    /// Nothing.
    Off,
}

impl fmt::Display for LogLevel {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Trace => "trace",
            Self::Debug => "debug",
            Self::Info => "info",
            Self::Warning => "warning",
            Self::Error => "error",
            Self::Critical => "critical",
            Self::Off => "off",
        })
    }
}

/// `--drain-strategy`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DrainStrategy {
    /// Over the drain time.
    #[default]
    Gradual,
    /// At once.
    Immediate,
}

/// `--fail-mode`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FailModeArg {
    /// Let connects pass that can't be intercepted, counted.
    Open,
    /// Refuse them, counted.
    Closed,
}

/// `--pump-mode`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum PumpMode {
    /// By what each direction does.
    #[default]
    Adaptive,
    /// Always through a buffer.
    Copy,
    /// Always through a pipe.
    Splice,
}

impl From<PumpMode> for crate::pump::Mode {
    fn from(mode: PumpMode) -> Self {
        match mode {
            PumpMode::Adaptive => Self::Adaptive,
            PumpMode::Copy => Self::CopyOnly,
            PumpMode::Splice => Self::SpliceOnly,
        }
    }
}

/// Flags of the proxy.
#[derive(Clone, Debug, ClapArgs)]
pub struct ServeArgs {
    /// Bootstrap configuration: .yaml, .yml or .json
    #[arg(short = 'c', long, value_name = "FILE")]
    pub config_path: Option<PathBuf>,
    /// Inline YAML, merged over the file
    #[arg(long, value_name = "YAML")]
    pub config_yaml: Option<String>,
    /// serve, validate, or init_only
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub mode: Mode,
    /// Worker threads [default: one per hardware thread]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(0..=1024))]
    pub concurrency: Option<u32>,
    /// Count the threads of this process's cpuset instead of the machine's
    #[arg(long)]
    pub cpuset_threads: bool,

    /// Log level
    #[arg(short = 'l', long, value_enum, default_value_t, value_name = "LEVEL")]
    pub log_level: LogLevel,
    /// Levels by component, for example `intercept:debug,pump:trace`
    #[arg(long, value_name = "LIST", default_value = "")]
    pub component_log_level: String,
    /// Log to a file instead of stderr; reopened on SIGUSR1
    #[arg(long, value_name = "FILE")]
    pub log_path: Option<PathBuf>,

    /// node.id
    #[arg(long, value_name = "ID", default_value = "")]
    pub service_node: String,
    /// node.cluster
    #[arg(long, value_name = "NAME", default_value = "")]
    pub service_cluster: String,
    /// node.locality.zone
    #[arg(long, value_name = "ZONE", default_value = "")]
    pub service_zone: String,

    /// Keep the last accepted resources of control planes in this directory, for starts without a control plane
    #[arg(long, value_name = "DIR")]
    pub xds_cache: Option<PathBuf>,

    /// How long connections may drain after SIGTERM or a listener's removal, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    pub drain_time_s: u64,
    /// gradual or immediate
    #[arg(long, value_enum, default_value_t, value_name = "STRATEGY")]
    pub drain_strategy: DrainStrategy,
    /// How long a replaced process may live on, seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    pub parent_shutdown_time_s: u64,

    /// Write the admin server's address to this file
    #[arg(long, value_name = "FILE")]
    pub admin_address_path: Option<PathBuf>,
    /// Access logs are flushed so often, milliseconds
    #[arg(long, value_name = "MS", default_value_t = 10_000, value_parser = clap::value_parser!(u64).range(1..))]
    pub file_flush_interval_msec: u64,
    /// … or when so much is buffered, KiB
    #[arg(long, value_name = "KB", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=65_536))]
    pub file_flush_min_size_kb: u64,
    /// Warn about unknown fields in static configuration instead of refusing them
    #[arg(long)]
    pub allow_unknown_static_fields: bool,
    /// Refuse unknown fields in dynamic configuration instead of warning
    #[arg(long)]
    pub reject_unknown_dynamic_fields: bool,
    /// Don't warn about unknown fields in dynamic configuration
    #[arg(long)]
    pub ignore_unknown_dynamic_fields: bool,

    /// Intercept processes in this cgroup v2 directory, those of the host's network namespace included; absolute, or
    /// below the cgroup2 mount; repeatable
    #[arg(long, value_name = "DIR")]
    pub intercept_cgroup: Vec<PathBuf>,
    /// Intercept pods in this cgroup v2 subtree, host-network pods left out; repeatable [default: the kubepods subtree, if there is one]
    #[arg(long, value_name = "DIR")]
    pub pod_cgroup: Vec<PathBuf>,
    /// Don't intercept at all: serve bound listeners, iptables REDIRECT and TPROXY
    #[arg(long, conflicts_with_all = ["intercept_cgroup", "pod_cgroup", "require_interception"])]
    pub no_interception: bool,
    /// Exit with an error when interception can't be set up, instead of serving without it
    #[arg(long)]
    pub require_interception: bool,
    /// What a connect gets that can't be intercepted
    #[arg(long, value_enum, value_name = "MODE")]
    pub fail_mode: Option<FailModeArg>,
    /// Port of the capture listeners inside each pod [default: 15001, or a free one where that is taken]
    #[arg(long, value_name = "PORT", value_parser = clap::value_parser!(u16).range(1..))]
    pub capture_port: Option<u16>,
    /// Where links, maps and the process record are kept
    #[command(flatten)]
    pub state: StateArgs,
    /// Log the eBPF programs' decisions (debug level of component `ebpf`); costs CPU per connect
    #[arg(long)]
    pub ebpf_log: bool,

    /// How long a worker looks for the next message before it sleeps, while all messages are one connection's, come in
    /// quick succession, and nobody else wants the CPU, microseconds; 0: never. With io_uring only
    #[arg(long, value_name = "US", default_value_t = 50, value_parser = clap::value_parser!(u64).range(0..=1000))]
    pub busy_poll_us: u64,
    /// How bytes are moved, to compare the data paths with each other; not for operation
    #[arg(long, value_enum, default_value_t, value_name = "MODE", hide = true)]
    pub pump_mode: PumpMode,

    /// Envoy flags without a meaning here: accepted, with a warning
    #[command(flatten)]
    pub inert: InertArgs,
}

/// Flags of Envoy that have no effect here. They are accepted so that command lines carry over, each with a
/// warning that names it.
#[derive(Clone, Debug, Default, ClapArgs)]
#[command(next_help_heading = "Envoy flags accepted without effect")]
pub struct InertArgs {
    /// Hot restart base id
    #[arg(long, value_name = "N")]
    pub base_id: Option<u32>,
    /// Hot restart epoch
    #[arg(long, value_name = "N")]
    pub restart_epoch: Option<u32>,
    /// No hot restart
    #[arg(long)]
    pub disable_hot_restart: bool,
    /// Hot restart socket
    #[arg(long, value_name = "PATH")]
    pub socket_path: Option<String>,
    /// Hot restart socket mode
    #[arg(long, value_name = "MODE")]
    pub socket_mode: Option<String>,
    /// Log format
    #[arg(long, value_name = "FORMAT")]
    pub log_format: Option<String>,
    /// Escape log lines
    #[arg(long)]
    pub log_format_escaped: bool,
    /// Default IP version of unspecified addresses
    #[arg(long, value_name = "VERSION")]
    pub local_address_ip_version: Option<String>,
    /// Extensions to disable
    #[arg(long, value_name = "LIST")]
    pub disable_extensions: Option<String>,
    /// Extra stats tag
    #[arg(long, value_name = "TAG:VALUE")]
    pub stats_tag: Vec<String>,
    /// Core dumps
    #[arg(long)]
    pub enable_core_dump: bool,
    /// Deprecation logs
    #[arg(long)]
    pub skip_deprecated_logs: bool,
    /// Fine-grained logging
    #[arg(long)]
    pub enable_fine_grain_logging: bool,
    /// Bootstrap version
    #[arg(long, value_name = "N")]
    pub bootstrap_version: Option<u32>,
}

impl InertArgs {
    /// The flags that were given, as written on the command line. `--disable-hot-restart` is not among them:
    /// it asks for what is the case.
    pub fn given(&self) -> Vec<&'static str> {
        [
            (self.base_id.is_some(), "--base-id"),
            (self.restart_epoch.is_some_and(|epoch| epoch > 0), "--restart-epoch"),
            (self.socket_path.is_some(), "--socket-path"),
            (self.socket_mode.is_some(), "--socket-mode"),
            (self.log_format.is_some(), "--log-format"),
            (self.log_format_escaped, "--log-format-escaped"),
            (self.local_address_ip_version.is_some(), "--local-address-ip-version"),
            (self.disable_extensions.is_some(), "--disable-extensions"),
            (!self.stats_tag.is_empty(), "--stats-tag"),
            (self.enable_core_dump, "--enable-core-dump"),
            (self.skip_deprecated_logs, "--skip-deprecated-logs"),
            (self.enable_fine_grain_logging, "--enable-fine-grain-logging"),
            (self.bootstrap_version.is_some_and(|version| version != 3), "--bootstrap-version"),
        ]
        .into_iter()
        .filter_map(|(given, flag)| given.then_some(flag))
        .collect()
    }
}

impl ServeArgs {
    /// How many workers to start.
    pub fn workers(&self) -> usize {
        match self.concurrency {
            Some(n) => (n as usize).max(1), // Envoy takes 0 as 1
            // available_parallelism counts the cpuset; Envoy's default is the machine's hardware threads, which
            // would only add workers that can't run at the same time.
            None => std::thread::available_parallelism().map_or(1, std::num::NonZero::get),
        }
    }

    /// `--drain-time-s`.
    pub fn drain_time(&self) -> Duration {
        Duration::from_secs(self.drain_time_s)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn envoys_spellings_parse() {
        let args = Args::try_parse_from([
            "tidegate",
            "-c",
            "envoy.yaml",
            "--concurrency",
            "2",
            "-l",
            "warning",
            "--drain-time-s",
            "5",
            "--service-node",
            "n",
            "--service-cluster",
            "c",
            "--mode",
            "validate",
            "--disable-hot-restart",
            "--file-flush-interval-msec",
            "100",
            "--base-id",
            "3",
            "--log-path",
            "/tmp/x",
        ])
        .unwrap();
        assert_eq!(args.serve.workers(), 2);
        assert_eq!(args.serve.mode, Mode::Validate);
        assert_eq!(args.serve.drain_time(), Duration::from_secs(5));
        assert_eq!(args.serve.inert.given(), ["--base-id"]);
    }

    #[test]
    fn commands_and_flags_of_the_proxy_do_not_mix() {
        assert!(Args::try_parse_from(["tidegate", "check"]).is_ok());
        assert!(Args::try_parse_from(["tidegate", "-c", "x", "check"]).is_err());
    }

    #[test]
    fn nonsense_is_refused() {
        for bad in [
            "--concurrency=x",
            "--capture-port=0",
            "--file-flush-interval-msec=0",
            "--mode=run",
            "--busy-poll-us=1001",
        ] {
            assert!(Args::try_parse_from(["tidegate", bad]).is_err(), "{bad}");
        }
    }
}
