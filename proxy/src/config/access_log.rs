//! Access loggers, their filters and formats, as configured. The format itself is parsed in
//! `crate::access_log`.

use std::path::PathBuf;

use crate::response_flag::ResponseFlags;

/// One configured access log.
#[derive(Clone, Debug, PartialEq)]
pub struct AccessLog {
    /// Where entries go.
    pub sink: Sink,
    /// Which entries are written; `None`: all.
    pub filter: Option<Filter>,
    /// How an entry looks.
    pub format: Format,
}

/// Where entries go. Loggers with the same sink share one file.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum Sink {
    /// A file, appended to; reopened on SIGUSR1 and `/reopen_logs`.
    File(PathBuf),
    /// Standard output.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Which entries are written.
#[derive(Clone, Debug, PartialEq)]
pub enum Filter {
    /// Any of these flags is set; an empty set: any flag at all.
    ResponseFlag(ResponseFlags),
    /// Entries of these types (`TcpConnectionEnd`, …), or of all others.
    LogType {
        /// Names of access log types.
        types: Vec<String>,
        /// The named types are left out instead.
        exclude: bool,
    },
    /// Connections that lasted at least (or `op`) so many milliseconds.
    Duration {
        /// `EQ`, `GE` or `LE`.
        op: ComparisonOp,
        /// Milliseconds.
        value: u64,
    },
    /// A share of connections.
    Runtime {
        /// Of `denominator`.
        numerator: u32,
        /// 100, 10,000 or 1,000,000.
        denominator: u32,
    },
    /// All of them.
    And(Vec<Filter>),
    /// At least one of them.
    Or(Vec<Filter>),
}

/// `ComparisonFilter.Op`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ComparisonOp {
    /// Equal.
    Eq,
    /// Greater or equal.
    Ge,
    /// Less or equal.
    Le,
    /// Not equal.
    Ne,
}

/// How an entry looks.
#[derive(Clone, Debug, PartialEq)]
pub enum Format {
    /// Envoy's default text format.
    Default,
    /// A format string; a trailing line break is part of it.
    Text {
        /// The format string.
        format: String,
        /// Empty values print nothing instead of `-`.
        omit_empty_values: bool,
    },
    /// JSON, one object per line.
    Json {
        /// The object; strings in it are format strings.
        format: serde_json::Value,
        /// Empty values are left out.
        omit_empty_values: bool,
    },
}
