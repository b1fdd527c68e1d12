//! Access logs: Envoy's formats, filters and files.
//!
//! Formats are parsed when a listener is built. A worker formats into its own buffer and hands full buffers to one
//! writer thread, so that no worker ever waits for a disk; what can't be taken is dropped and counted.

mod file;
mod filter;
mod format;
mod operator;
mod time;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Instant, SystemTime};

use hyper::{HeaderMap, Method, Uri, Version};

use crate::config::access_log as config;
use crate::connection::record::{LogType, Record};

use file::LogFile;
use filter::Matcher;
use format::Entry;
use operator::Operator;
use time::TimeFormat;

pub use file::{EventFile, FlushSettings, Registry, flush_worker};
pub use format::Formatter;

/// Why an access log can't be used.
#[derive(Debug, thiserror::Error)]
pub enum AccessLogError {
    /// The format string is malformed, or names an operator that does not exist or can't be served.
    #[error("access log format '{format}': {reason} at position {position}")]
    Format {
        /// The format string.
        format: String,
        /// Byte offset of the operator in it.
        position: usize,
        /// What is wrong with it.
        reason: String,
    },
    /// `log_type_filter` names a type that does not exist.
    #[error("access log filter: '{0}' is no access log type; TCP has {known}", known = LogType::NAMES.join(", "))]
    UnknownLogType(String),
    /// The file can't be opened.
    #[error("can't open access log '{}': {source}", path.display())]
    Open {
        /// Its path.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
}

/// As in JSON: UTC, in milliseconds.
pub(crate) fn timestamp(at: SystemTime) -> String {
    let mut out = Vec::new();
    TimeFormat::iso8601().write(at, &mut out);
    String::from_utf8_lossy(&out).into_owned()
}

/// Checks format and filter without opening anything (`--mode validate`).
pub fn validate(log: &config::AccessLog) -> Result<(), AccessLogError> {
    Formatter::parse(&log.format)?;
    log.filter.as_ref().map(Matcher::build).transpose()?;
    Ok(())
}

/// The names of the operators that a format prints, `UPSTREAM_HOST` for example; some perhaps more than once. It has to be
/// one that [`validate`] accepts.
pub fn operators(format: &config::Format) -> Vec<&str> {
    format::operators(format)
}

/// The access logs of a listener or of a `tcp_proxy` filter. Cheap to clone; shared by all workers.
#[derive(Clone, Debug, Default)]
pub struct AccessLogs {
    loggers: Arc<[Logger]>,
    wants_retransmitted: bool,
    wants_upstream_local_address: bool,
}

#[derive(Debug)]
struct Logger {
    filter: Option<Matcher>,
    formatter: Formatter,
    file: Arc<LogFile>,
}

/// A request and its response, as the admin server logs them.
#[derive(Debug)]
pub struct HttpExchange {
    /// `:method`.
    pub method: Method,
    /// `:path`, with its query.
    pub uri: Uri,
    /// Of the request.
    pub version: Version,
    /// Headers of the request.
    pub request: HeaderMap,
    /// `%RESPONSE_CODE%`.
    pub status: u16,
    /// Headers of the response.
    pub response: HeaderMap,
}

impl HttpExchange {
    /// `%PROTOCOL%`.
    pub fn protocol(&self) -> &'static str {
        if self.version == Version::HTTP_10 { "HTTP/1.0" } else { "HTTP/1.1" }
    }
}

/// The moment an entry is written.
#[derive(Clone, Copy, Debug)]
pub struct Now {
    /// Wall clock.
    pub wall: SystemTime,
    /// Monotonic clock.
    pub monotonic: Instant,
}

impl Now {
    /// This moment.
    pub fn read() -> Self {
        Self { wall: SystemTime::now(), monotonic: Instant::now() }
    }
}

impl AccessLogs {
    /// Parses the formats and opens the files. Called by the main thread.
    pub fn open(logs: &[config::AccessLog], registry: &Registry) -> Result<Self, AccessLogError> {
        let open = |log: &config::AccessLog| {
            Ok(Logger {
                filter: log.filter.as_ref().map(Matcher::build).transpose()?,
                formatter: Formatter::parse(&log.format)?,
                file: registry.open(&log.sink)?,
            })
        };
        let loggers = logs.iter().map(open).collect::<Result<Arc<[_]>, _>>()?;
        let prints = |what: fn(&Operator) -> bool| loggers.iter().any(|log| log.formatter.prints(what));
        Ok(Self {
            wants_retransmitted: prints(Operator::is_retransmitted),
            wants_upstream_local_address: prints(Operator::is_upstream_local_address),
            loggers,
        })
    }

    /// Whether there is nothing to write to.
    pub fn is_empty(&self) -> bool {
        self.loggers.is_empty()
    }

    /// Whether a format prints what was sent again, which costs a system call to know.
    pub fn wants_retransmitted(&self) -> bool {
        self.wants_retransmitted
    }

    /// Whether a format prints our own address of the upstream connection, which costs one too.
    pub fn wants_upstream_local_address(&self) -> bool {
        self.wants_upstream_local_address
    }

    /// Writes an entry to every log whose filter lets it pass. Never blocks.
    pub fn write(&self, record: &Record, log_type: LogType) {
        self.write_entry(record, log_type, None);
    }

    /// The same for a request of the admin server.
    pub fn write_http(&self, record: &Record, http: &HttpExchange) {
        self.write_entry(record, LogType::NotSet, Some(http));
    }

    fn write_entry(&self, record: &Record, log_type: LogType, http: Option<&HttpExchange>) {
        if self.is_empty() {
            return;
        }
        let now = Now::read();
        for log in &*self.loggers {
            if log.filter.as_ref().is_none_or(|filter| filter.passes(record, log_type, now)) {
                log.file.append(|out| log.formatter.print(Entry { record, log_type, http, now }, out));
            }
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::path::Path;
    use std::time::Duration;

    use super::*;
    use crate::config::access_log::{AccessLog, Filter, Format, Sink};
    use crate::connection::record::{CloseType, Details, Upstream};
    use crate::response_flag::{ResponseFlag, ResponseFlags};
    use crate::stats::Stats;

    /// The connection that Envoy logged in `testdata/envoy_access_log.txt`.
    pub(crate) fn record() -> Record {
        let addr = |s: &str| s.parse().unwrap();
        Record {
            id: 7,
            start_time: SystemTime::UNIX_EPOCH + Duration::new(1_795_313_120, 470_592_000),
            start: Instant::now(),
            duration: Some(Duration::from_micros(1_900)),
            downstream_remote: addr("127.0.0.1:46464"),
            downstream_direct_remote: addr("127.0.0.1:46464"),
            downstream_local: addr("127.0.0.1:15998"),
            downstream_direct_local: addr("127.0.0.1:15998"),
            listener: "lname".into(),
            filter_chain: "fc1".into(),
            cluster: Some("c".into()),
            upstream: Some(Upstream {
                address: addr("127.0.0.1:15997"),
                hostname: "hh".into(),
                local_address: Some(addr("127.0.0.1:53026")),
                connection_id: Some(1),
            }),
            attempts: 1,
            connect_begin: Some(Duration::from_micros(100)),
            connect_end: Some(Duration::from_micros(300)),
            flags: ResponseFlags::default(),
            downstream_close_type: CloseType::Normal,
            upstream_close_type: Some(CloseType::Normal),
            details: Some(Box::new(Details {
                cluster_alt_stat_name: Some("altc".into()),
                ..Details::default()
            })),
            bytes_received: 3,
            bytes_sent: 6,
            upstream_bytes_sent: 3,
            upstream_bytes_received: 6,
        }
    }

    fn log(path: &Path, format: &str) -> AccessLog {
        AccessLog {
            sink: Sink::File(path.into()),
            filter: None,
            format: Format::Text { format: format.into(), omit_empty_values: false },
        }
    }

    fn registry(stats: &Stats) -> Registry {
        Registry::start(stats, FlushSettings { min_size: 64 << 10, ..FlushSettings::default() }).unwrap()
    }

    #[test]
    fn entries_reach_the_file_at_flush_and_nothing_is_lost() {
        let dir = tempfile::tempdir().unwrap();
        let stats = Stats::new(2);
        let registry = registry(&stats);
        let path = dir.path().join("a.log");
        let logs = AccessLogs::open(&[log(&path, "%CONNECTION_ID% end\n")], &registry).unwrap();
        std::thread::scope(|scope| {
            for worker in 0..2 {
                let logs = logs.clone();
                scope.spawn(move || {
                    crate::stats::set_shard(worker);
                    let record = record();
                    (0..20_000).for_each(|_| logs.write(&record, LogType::TcpConnectionEnd));
                    flush_worker();
                });
            }
        });
        assert!(registry.flush(Duration::from_secs(20)));
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text.lines().count(), 40_000);
        assert!(text.lines().all(|line| line == "7 end"), "lines stay whole");
        assert_eq!(stats.access_log().entries_written().value(), 40_000);
        assert_eq!(stats.access_log().entries_dropped().value(), 0);
        assert_eq!(stats.filesystem().write_total_buffered().value(), 0);
    }

    #[test]
    fn a_thread_that_ends_hands_over_what_it_has() {
        let dir = tempfile::tempdir().unwrap();
        let stats = Stats::new(1);
        let registry = registry(&stats);
        let path = dir.path().join("a.log");
        let logs = AccessLogs::open(&[log(&path, "x\n")], &registry).unwrap();
        std::thread::spawn(move || logs.write(&record(), LogType::NotSet)).join().unwrap();
        assert!(registry.flush(Duration::from_secs(20)));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "x\n");
    }

    #[test]
    fn loggers_with_the_same_path_share_one_file_and_reopen_follows_rotation() {
        let dir = tempfile::tempdir().unwrap();
        let stats = Stats::new(1);
        let registry = registry(&stats);
        let path = dir.path().join("a.log");
        let logs = AccessLogs::open(&[log(&path, "1\n"), log(&path, "2\n")], &registry).unwrap();
        assert_eq!(stats.access_log().files().value(), 1);
        let write = || {
            logs.write(&record(), LogType::TcpConnectionEnd);
            flush_worker();
            assert!(registry.flush(Duration::from_secs(20)));
        };
        write();
        let rotated = dir.path().join("a.log.1");
        std::fs::rename(&path, &rotated).unwrap();
        registry.reopen();
        write();
        assert_eq!(std::fs::read_to_string(&rotated).unwrap(), "1\n2\n");
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "1\n2\n");
        drop(logs);
        registry.flush(Duration::from_secs(20));
        assert_eq!(stats.access_log().files().value(), 0, "the file closes with its last logger");
    }

    #[test]
    fn a_stuck_sink_drops_and_counts_but_never_blocks() {
        let dir = tempfile::tempdir().unwrap();
        let stats = Stats::new(1);
        let registry = registry(&stats);
        let path = dir.path().join("fifo");
        nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
        // Opened for both directions nobody has to read, and nobody does: the writer thread hangs.
        let line = "y".repeat(1000) + "\n";
        let logs = AccessLogs::open(&[log(&path, &line)], &registry).unwrap();
        let record = record();
        (0..60_000).for_each(|_| logs.write(&record, LogType::TcpConnectionEnd));
        flush_worker();
        let (written, dropped) =
            (stats.access_log().entries_written().value(), stats.access_log().entries_dropped().value());
        assert!(dropped > 0, "{written} {dropped}");
        assert_eq!(written + dropped, 60_000);
        assert!(!registry.flush(Duration::from_millis(50)), "a flush gives up in time");
        // Let the writer thread go.
        drop(logs);
        let mut fifo = std::fs::File::open(&path).unwrap();
        std::thread::spawn(move || std::io::copy(&mut fifo, &mut std::io::sink()));
        assert!(registry.flush(Duration::from_mins(1)));
    }

    #[test]
    fn the_filter_decides() {
        let dir = tempfile::tempdir().unwrap();
        let stats = Stats::new(1);
        let registry = registry(&stats);
        let path = dir.path().join("a.log");
        let filter = Filter::ResponseFlag(ResponseFlags::from_iter([ResponseFlag::NoRouteFound]));
        let logs =
            AccessLogs::open(&[AccessLog { filter: Some(filter), ..log(&path, "nr\n") }], &registry).unwrap();
        let mut record = record();
        logs.write(&record, LogType::NotSet);
        record.flags.set(ResponseFlag::NoRouteFound);
        logs.write(&record, LogType::NotSet);
        flush_worker();
        assert!(registry.flush(Duration::from_secs(20)));
        assert_eq!(std::fs::read_to_string(&path).unwrap(), "nr\n");
    }

    #[test]
    fn a_file_that_cannot_be_opened_is_a_clear_error() {
        let stats = Stats::new(1);
        let registry = registry(&stats);
        let error = AccessLogs::open(&[log(Path::new("/nonexistent/x.log"), "")], &registry).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("/nonexistent/x.log") && text.contains("No such file"), "{text}");
    }

    #[test]
    fn validate_opens_nothing() {
        validate(&log(Path::new("/nonexistent/x.log"), "%BYTES_SENT%")).unwrap();
        let error = validate(&log(Path::new("/nonexistent/x.log"), "ab %NOSUCH%")).unwrap_err();
        let text = error.to_string();
        assert!(text.contains("NOSUCH") && text.contains("position 3"), "{text}");
    }
}
