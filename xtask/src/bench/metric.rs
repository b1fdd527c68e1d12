//! The figures of a workload.

use std::fmt;

use serde::{Deserialize, Serialize};

use super::workload::Workload;

/// One figure.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Metric {
    Rate,
    /// Bytes beside the requests of a mixed load.
    BulkRate,
    /// CPU that the scheduler has charged to the proxy, per unit of work.
    ProxyCpu,
    /// Of that, with `--profile`: sending, and splicing into a socket.
    SendCpu,
    /// Receiving, and splicing from a socket.
    ReceiveCpu,
    /// connect(2).
    OpenCpu,
    /// accept(2).
    AcceptCpu,
    /// FINs, and closing sockets.
    EndCpu,
    /// Going to sleep, and other tasks' turns.
    SwitchCpu,
    /// Everything else in the kernel.
    OtherKernelCpu,
    /// Outside of the kernel.
    UserCpu,
    /// The same of clients and servers.
    LoadCpu,
    /// What the whole machine was busy with, per unit of work.
    MachineCpu,
    P50,
    P99,
    P999,
    /// Resident memory of a proxy that has just started.
    RssStart,
    RssPerConnection,
    /// Kernel memory (unreclaimable slab) of the machine: sockets of clients and servers are in it too.
    SlabPerConnection,
    /// CPU of a proxy with idle connections only.
    IdleCpu,
    /// Time in the programs of interception, whoever ran them: those of the proxy's own sockets count too.
    InterceptCpu,
    /// The part of it in the connect(2) and getpeername(2) of those who are captured.
    ConnectCpu,
    /// How often they ran for each captured connection.
    InterceptRuns,
    /// The same for connections of pods that are not captured.
    ForeignRuns,
}

impl Metric {
    /// Its name in bench.json.
    pub(super) fn id(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::BulkRate => "bulk_rate",
            Self::ProxyCpu => "proxy_cpu",
            Self::SendCpu => "send_cpu",
            Self::ReceiveCpu => "receive_cpu",
            Self::OpenCpu => "open_cpu",
            Self::AcceptCpu => "accept_cpu",
            Self::EndCpu => "end_cpu",
            Self::SwitchCpu => "switch_cpu",
            Self::OtherKernelCpu => "other_kernel_cpu",
            Self::UserCpu => "user_cpu",
            Self::LoadCpu => "load_cpu",
            Self::MachineCpu => "machine_cpu",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::P999 => "p999",
            Self::RssStart => "rss_start",
            Self::RssPerConnection => "rss_per_connection",
            Self::SlabPerConnection => "slab_per_connection",
            Self::IdleCpu => "idle_cpu",
            Self::InterceptCpu => "intercept_cpu",
            Self::ConnectCpu => "connect_cpu",
            Self::InterceptRuns => "intercept_runs",
            Self::ForeignRuns => "foreign_runs",
        }
    }

    /// For people.
    pub(super) fn title(self) -> &'static str {
        match self {
            Self::Rate => "rate",
            Self::BulkRate => "bulk throughput",
            Self::ProxyCpu => "proxy CPU",
            Self::SendCpu => "of which sending",
            Self::ReceiveCpu => "receiving",
            Self::OpenCpu => "connect(2)",
            Self::AcceptCpu => "accept(2)",
            Self::EndCpu => "FINs and closing",
            Self::SwitchCpu => "task switches",
            Self::OtherKernelCpu => "the rest of the kernel",
            Self::UserCpu => "user space",
            Self::LoadCpu => "clients' and servers' CPU",
            Self::MachineCpu => "machine CPU",
            Self::P50 => "p50",
            Self::P99 => "p99",
            Self::P999 => "p99.9",
            Self::RssStart => "RSS at start",
            Self::RssPerConnection => "RSS per connection",
            Self::SlabPerConnection => "kernel memory per connection",
            Self::IdleCpu => "CPU",
            Self::InterceptCpu => "CPU in eBPF programs",
            Self::ConnectCpu => "of which in connect(2)",
            Self::InterceptRuns => "program runs",
            Self::ForeignRuns => "program runs of others",
        }
    }

    /// The unit that its figures of this workload have.
    pub(super) fn unit(self, workload: Workload) -> String {
        let unit = workload.unit();
        match self {
            Self::Rate if unit == "GiB" => "GiB/s".to_owned(),
            Self::Rate => format!("{unit}s/s"),
            Self::BulkRate => "GiB/s".to_owned(),
            Self::ProxyCpu
            | Self::SendCpu
            | Self::ReceiveCpu
            | Self::OpenCpu
            | Self::AcceptCpu
            | Self::EndCpu
            | Self::SwitchCpu
            | Self::OtherKernelCpu
            | Self::UserCpu
            | Self::LoadCpu
            | Self::MachineCpu => {
                if unit == "GiB" {
                    "s/GiB".to_owned()
                } else {
                    format!("µs/{unit}")
                }
            }
            Self::InterceptCpu | Self::ConnectCpu => format!("µs/{unit}"),
            Self::P50 | Self::P99 | Self::P999 => "µs".to_owned(),
            Self::RssStart => "MB".to_owned(),
            Self::RssPerConnection | Self::SlabPerConnection => "B".to_owned(),
            Self::IdleCpu => "ms/s".to_owned(),
            Self::InterceptRuns | Self::ForeignRuns => format!("runs/{unit}"),
        }
    }

    pub(super) fn lower_is_better(self) -> bool {
        !matches!(self, Self::Rate | Self::BulkRate)
    }
}

impl fmt::Display for Metric {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.id())
    }
}
