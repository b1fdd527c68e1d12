//! Where entries go: per-worker buffers, one bounded queue, one writer thread.

use std::cell::RefCell;
use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::{self, ErrorKind, Write};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::mpsc::{self, Receiver, SyncSender, TrySendError};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::{Duration, Instant};

use crate::config::access_log::Sink;
use crate::stats::{AccessLogStats, FilesystemStats, Stats};

use super::AccessLogError;

/// Full buffers that may wait for the writer thread. With 64 KiB each that is 8 MiB.
const QUEUE_LENGTH: usize = 128;

/// A worker keeps at most so many bytes per file while the queue is full. Then entries are dropped.
const MAX_BUFFER: usize = 1 << 20;

/// When buffers are handed over.
#[derive(Clone, Copy, Debug)]
pub struct FlushSettings {
    /// `--file-flush-interval-msec`: how often a worker calls [`flush_worker`].
    pub interval: Duration,
    /// `--file-flush-min-size-kb`, in bytes: a buffer this full is handed over at once.
    pub min_size: usize,
}

impl Default for FlushSettings {
    fn default() -> Self {
        Self { interval: Duration::from_secs(10), min_size: 64 << 10 }
    }
}

/// The files of all access logs, and the thread that writes them. Cheap to clone.
#[derive(Clone, Debug)]
pub struct Registry(Arc<Shared>);

#[derive(Debug)]
struct Shared {
    settings: FlushSettings,
    filesystem: FilesystemStats,
    stats: AccessLogStats,
    queue: SyncSender<Job>,
    files: Mutex<HashMap<Sink, Weak<LogFile>>>,
    /// Goes up with every [`Registry::reopen`]; the writer reopens what is older.
    generation: AtomicU64,
}

enum Job {
    Write(Arc<LogFile>, Vec<u8>),
    Reopen,
    /// Answers when everything before it is written.
    Flush(SyncSender<()>),
}

/// One file; shared by all loggers that name it.
#[derive(Debug)]
pub(super) struct LogFile {
    sink: Sink,
    shared: Arc<Shared>,
    /// Locked by the writer thread only.
    target: Mutex<Target>,
}

/// A log of events that are rare: outlier detection, health checks. Cheap to clone.
#[derive(Clone, Debug)]
pub struct EventFile(Arc<LogFile>);

impl EventFile {
    /// Appends a line and hands it to the writer thread. Never blocks.
    pub fn write_line(&self, line: &str) {
        self.0.append(|out| {
            out.extend_from_slice(line.as_bytes());
            out.push(b'\n');
        });
        flush_worker();
    }
}

#[derive(Debug)]
struct Target {
    /// None for stdout and stderr.
    file: Option<File>,
    generation: u64,
    /// The last write failed: the failure was reported.
    failing: bool,
}

impl Registry {
    /// Starts the writer thread. It ends with the last clone and the last log.
    pub fn start(stats: &Stats, settings: FlushSettings) -> io::Result<Self> {
        let (queue, jobs) = mpsc::sync_channel(QUEUE_LENGTH);
        let shared = Arc::new(Shared {
            settings,
            filesystem: stats.filesystem().clone(),
            stats: stats.access_log().clone(),
            queue,
            files: Mutex::default(),
            generation: AtomicU64::new(0),
        });
        let weak = Arc::downgrade(&shared);
        std::thread::Builder::new().name("access-log".into()).spawn(move || write_all(&jobs, &weak))?;
        Ok(Self(shared))
    }

    /// When buffers are handed over.
    pub fn settings(&self) -> FlushSettings {
        self.0.settings
    }

    /// A file of lines about rare events, each of which is written at once.
    pub fn open_events(&self, path: &Path) -> Result<EventFile, AccessLogError> {
        self.open(&Sink::File(path.into())).map(EventFile)
    }

    /// The file for a sink; loggers with the same sink share it.
    pub(super) fn open(&self, sink: &Sink) -> Result<Arc<LogFile>, AccessLogError> {
        let sink = match sink {
            Sink::File(path) if path == Path::new("/dev/stdout") => Sink::Stdout,
            Sink::File(path) if path == Path::new("/dev/stderr") => Sink::Stderr,
            other => other.clone(),
        };
        let mut files = lock(&self.0.files);
        files.retain(|_, file| file.strong_count() > 0);
        if let Some(file) = files.get(&sink).and_then(Weak::upgrade) {
            return Ok(file);
        }
        let file = match &sink {
            Sink::File(path) => {
                Some(open(path).map_err(|source| AccessLogError::Open { path: path.clone(), source })?)
            }
            Sink::Stdout | Sink::Stderr => None,
        };
        let target = Mutex::new(Target { file, generation: self.0.generation.load(Relaxed), failing: false });
        let file = Arc::new(LogFile { sink: sink.clone(), shared: Arc::clone(&self.0), target });
        self.0.stats.files().inc();
        files.insert(sink, Arc::downgrade(&file));
        Ok(file)
    }

    /// Opens every file again by its path (SIGUSR1, `/reopen_logs`), for log rotation. Entries that were handed
    /// over before may still go to the old file or already to the new one; none is lost.
    pub fn reopen(&self) {
        self.0.generation.fetch_add(1, Relaxed);
        // With a full queue the writer is at work and will see the new generation.
        let _ = self.0.queue.try_send(Job::Reopen);
    }

    /// Waits until everything that workers handed over is written. False when that took longer than `timeout`.
    /// Call [`flush_worker`] on every worker before.
    pub fn flush(&self, timeout: Duration) -> bool {
        let deadline = Instant::now() + timeout;
        flush_worker();
        let (done, answer) = mpsc::sync_channel(1);
        let mut job = Job::Flush(done);
        loop {
            match self.0.queue.try_send(job) {
                Ok(()) => break,
                Err(TrySendError::Full(back)) if Instant::now() < deadline => job = back,
                Err(_) => return false,
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        answer.recv_timeout(deadline.saturating_duration_since(Instant::now())).is_ok()
    }
}

fn open(path: &Path) -> io::Result<File> {
    // For reading too: a FIFO then opens without waiting for a reader, as in Envoy.
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    match options.clone().read(true).open(path) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => options.open(path),
        result => result,
    }
}

impl Drop for LogFile {
    fn drop(&mut self) {
        self.shared.stats.files().dec();
    }
}

impl LogFile {
    /// Lets `format` append an entry to this thread's buffer, and hands the buffer over when it is full.
    pub(super) fn append(self: &Arc<Self>, format: impl FnOnce(&mut Vec<u8>)) {
        BUFFERS.with_borrow_mut(|buffers| {
            let buffer = buffers.of(self);
            let stats = &self.shared.stats;
            if buffer.data.len() >= MAX_BUFFER.max(self.shared.settings.min_size) && !buffer.hand_over() {
                stats.entries_dropped().inc();
                return;
            }
            let before = buffer.data.len();
            format(&mut buffer.data);
            let added = (buffer.data.len() - before) as u64;
            stats.entries_written().inc();
            self.shared.filesystem.write_buffered().inc();
            self.shared.filesystem.write_total_buffered().add(added);
            if buffer.data.len() >= self.shared.settings.min_size {
                buffer.hand_over();
            }
        });
    }

    /// Writes a buffer. Runs on the writer thread.
    fn write(&self, data: &[u8]) {
        let mut target = lock(&self.target);
        self.reopen_if_old(&mut target);
        let result = match (&self.sink, &mut target.file) {
            // Through the locks that the process log uses too, so that lines stay whole.
            (Sink::Stdout, _) => write_and_flush(&mut io::stdout().lock(), data),
            (Sink::Stderr, _) => write_and_flush(&mut io::stderr().lock(), data),
            (Sink::File(_), Some(file)) => file.write_all(data),
            (Sink::File(_), None) => Err(ErrorKind::NotFound.into()),
        };
        let shared = &self.shared;
        shared.filesystem.write_total_buffered().sub(data.len() as u64);
        match result {
            Ok(()) => {
                target.failing = false;
                shared.filesystem.write_completed().inc();
            }
            Err(error) => {
                shared.filesystem.write_failed().inc();
                shared.stats.bytes_lost().add(data.len() as u64);
                if !target.failing {
                    tracing::warn!(sink = ?self.sink, %error, "can't write access log: entries are lost until this ends");
                }
                target.failing = true;
            }
        }
    }

    fn reopen_if_old(&self, target: &mut Target) {
        let generation = self.shared.generation.load(Relaxed);
        if target.generation == generation {
            return;
        }
        target.generation = generation;
        let Sink::File(path) = &self.sink else { return };
        match open(path) {
            Ok(file) => {
                target.file = Some(file);
                self.shared.stats.reopened().inc();
            }
            Err(error) => {
                // Better the old file than none.
                self.shared.filesystem.reopen_failed().inc();
                tracing::warn!(path = %path.display(), %error, "can't reopen access log: the old file stays in use");
            }
        }
    }
}

fn write_and_flush(stream: &mut impl Write, data: &[u8]) -> io::Result<()> {
    stream.write_all(data)?;
    stream.flush()
}

/// The writer thread.
fn write_all(jobs: &Receiver<Job>, shared: &Weak<Shared>) {
    // Ends when the last sender, in `shared`, is gone.
    while let Ok(job) = jobs.recv() {
        match job {
            Job::Write(file, data) => file.write(&data),
            Job::Reopen => {
                let Some(shared) = shared.upgrade() else { return };
                let files: Vec<_> = lock(&shared.files).values().filter_map(Weak::upgrade).collect();
                for file in files {
                    file.reopen_if_old(&mut lock(&file.target));
                }
            }
            Job::Flush(done) => {
                let _ = done.try_send(());
            }
        }
    }
}

/// What a thread has formatted and not handed over yet, per file.
struct Buffer {
    file: Arc<LogFile>,
    data: Vec<u8>,
}

impl Buffer {
    /// Gives the data to the writer thread; false, and nothing lost, when its queue is full.
    fn hand_over(&mut self) -> bool {
        if self.data.is_empty() {
            return true;
        }
        let job = Job::Write(Arc::clone(&self.file), std::mem::take(&mut self.data));
        match self.file.shared.queue.try_send(job) {
            Ok(()) => true,
            Err(
                TrySendError::Full(Job::Write(_, data)) | TrySendError::Disconnected(Job::Write(_, data)),
            ) => {
                self.data = data;
                false
            }
            Err(_) => false,
        }
    }
}

#[derive(Default)]
struct Buffers(Vec<Buffer>);

impl Buffers {
    fn of(&mut self, file: &Arc<LogFile>) -> &mut Buffer {
        let at = self.0.iter().position(|buffer| Arc::ptr_eq(&buffer.file, file)).unwrap_or_else(|| {
            self.0.push(Buffer { file: Arc::clone(file), data: Vec::new() });
            self.0.len() - 1
        });
        &mut self.0[at]
    }

    /// Hands everything over. What is empty is forgotten, so that a file closes with its last logger.
    fn flush(&mut self) {
        self.0.retain_mut(|buffer| {
            if !buffer.data.is_empty() {
                buffer.file.shared.stats.flushes().inc();
                buffer.file.shared.filesystem.flushed_by_timer().inc();
            }
            !buffer.hand_over()
        });
    }
}

impl Drop for Buffers {
    /// A thread that ends: its last entries, with a little patience.
    fn drop(&mut self) {
        for _ in 0..100 {
            self.flush();
            if self.0.is_empty() {
                return;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        for buffer in &self.0 {
            buffer.file.shared.stats.bytes_lost().add(buffer.data.len() as u64);
        }
    }
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// Hands this thread's buffers to the writer thread. A worker calls it every [`FlushSettings::interval`] and
/// before it ends. Never blocks.
pub fn flush_worker() {
    BUFFERS.with_borrow_mut(Buffers::flush);
}

/// What is guarded is consistent after every statement, so a panic while one was locked spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
