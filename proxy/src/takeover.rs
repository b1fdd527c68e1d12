//! One tidegate after another: the state directory says which process serves, and a second start takes over from it
//! without a gap.
//!
//! The new process prepares everything, replaces the predecessor's eBPF programs and enrolments, serves, and only
//! then tells the predecessor to drain and exit. The predecessor recognises that it has been superseded and leaves
//! the pins alone. A predecessor that can't be told (it runs in another pid namespace) notices by itself: see
//! [`crate::intercept::audit::Health::Superseded`].
//!
//! Only processes that intercept share a state directory: others may run side by side, and don't claim it.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::signal::Signal;

use crate::args::StateArgs;
use crate::intercept::default_pin_dir;
use crate::sys::process::{Process, ProcessId};

/// Where the state directory is unless somebody chose another one. Gone after a reboot, as the process is.
pub const DEFAULT_STATE_DIR: &str = "/run/tidegate";

/// How long a start waits for another one that is under way.
const START_LIMIT: Duration = Duration::from_secs(30);

const LOCK: &str = "lock";
const RECORD: &str = "process";

/// What outlives a process, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StatePaths {
    /// Links and maps, below a bpffs.
    pub pin_dir: PathBuf,
    /// Lock and process record.
    pub state_dir: PathBuf,
}

impl From<StateArgs> for StatePaths {
    fn from(args: StateArgs) -> Self {
        let StateArgs { pin_path, state_dir } = args;
        Self {
            pin_dir: pin_path.unwrap_or_else(default_pin_dir),
            state_dir: state_dir.unwrap_or_else(|| DEFAULT_STATE_DIR.into()),
        }
    }
}

/// Why a process can't take its place.
#[derive(Debug, thiserror::Error)]
pub enum TakeoverError {
    /// A file operation failed.
    #[error("{action} {}: {source}; choose another directory with --state-dir", path.display())]
    File {
        /// What was tried.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// The kernel's answer.
        source: io::Error,
    },
    /// Another process has been starting for too long.
    #[error(
        "another tidegate process has been starting with {} for {} s; end it, or choose another --state-dir",
        .0.display(), START_LIMIT.as_secs()
    )]
    Starting(PathBuf),
}

impl TakeoverError {
    fn file(action: &'static str, path: impl Into<PathBuf>) -> impl FnOnce(io::Error) -> Self {
        let path = path.into();
        move |source| Self::File { action, path, source }
    }
}

/// Who serves, as the record says.
#[derive(Debug)]
pub enum Recorded {
    /// Nobody: there is no record, or its process has ended.
    Nobody,
    /// A live process.
    Alive(ProcessId, Process),
    /// A process that nothing can be said about, and why.
    Unknown(String),
}

/// Reads the record of a state directory. Fine when there is none.
pub fn recorded(state_dir: &Path) -> Recorded {
    let text = match fs::read_to_string(state_dir.join(RECORD)) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Recorded::Nobody,
        Err(error) => return Recorded::Unknown(error.to_string()),
    };
    let found = text.parse::<ProcessId>().and_then(|id| Ok((id.find()?, id)));
    match found {
        Ok((Some(process), id)) => Recorded::Alive(id, process),
        Ok((None, _)) => Recorded::Nobody,
        Err(error) => Recorded::Unknown(error.to_string()),
    }
}

/// A start that is under way. Others wait.
#[derive(Debug)]
pub struct Starting {
    state_dir: PathBuf,
    predecessor: Recorded,
    /// Held until the start is finished or given up.
    _lock: File,
}

impl Starting {
    /// Claims the state directory, which is created when missing, and looks who serves.
    pub fn claim(state_dir: &Path) -> Result<Self, TakeoverError> {
        let mut builder = DirBuilder::new();
        builder
            .recursive(true)
            .mode(0o700)
            .create(state_dir)
            .map_err(TakeoverError::file("creating", state_dir))?;
        let lock = lock(state_dir)?;
        Ok(Self { state_dir: state_dir.to_owned(), predecessor: recorded(state_dir), _lock: lock })
    }

    /// Who serves until [`Self::finish`].
    pub fn predecessor(&self) -> &Recorded {
        &self.predecessor
    }

    /// From here on this process serves: writes the record, then tells the predecessor to drain and exit (SIGTERM).
    /// A predecessor that can't be told is a warning in the log.
    pub fn finish(self) -> Result<Record, TakeoverError> {
        let path = self.state_dir.join(RECORD);
        let own = ProcessId::own().map_err(TakeoverError::file("reading", "/proc/self/stat"))?;
        write_record(&path, &own).map_err(TakeoverError::file("writing", &path))?;
        match &self.predecessor {
            Recorded::Nobody => {}
            Recorded::Alive(id, process) => match process.signal(Signal::SIGTERM) {
                Ok(()) => tracing::info!(pid = id.pid, "took over; the former process drains and exits"),
                Err(error) => {
                    tracing::warn!(%error, pid = id.pid, "took over; can't tell the former process");
                }
            },
            Recorded::Unknown(reason) => tracing::warn!(
                %reason, record = %path.display(),
                "can't tell whether a former process is alive; if it intercepts, it will notice and drain"
            ),
        }
        Ok(Record { state_dir: self.state_dir, own })
    }
}

/// This process serves, or did until another one took over.
#[derive(Debug)]
pub struct Record {
    state_dir: PathBuf,
    own: ProcessId,
}

impl Record {
    /// Removes the record, unless a successor has written its own. For the end of the process.
    pub fn remove(self) -> Result<(), TakeoverError> {
        let _lock = lock(&self.state_dir)?;
        let path = self.state_dir.join(RECORD);
        let ours = fs::read_to_string(&path)
            .is_ok_and(|text| text.parse().is_ok_and(|id: ProcessId| id == self.own));
        if ours { fs::remove_file(&path).map_err(TakeoverError::file("removing", path)) } else { Ok(()) }
    }
}

/// Removes lock and record of a process that has ended, and the directory if nothing else is in it. Whether there
/// was a record.
pub(crate) fn remove_state(state_dir: &Path) -> Result<bool, TakeoverError> {
    if !state_dir.exists() {
        return Ok(false);
    }
    let _lock = lock(state_dir)?;
    let mut had_record = false;
    for name in [RECORD, LOCK] {
        match fs::remove_file(state_dir.join(name)) {
            Ok(()) => had_record |= name == RECORD,
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(TakeoverError::file("removing", state_dir.join(name))(error)),
        }
    }
    // Somebody else's files stay.
    let _ = fs::remove_dir(state_dir);
    Ok(had_record)
}

/// In one step: nobody reads half a record.
fn write_record(path: &Path, own: &ProcessId) -> io::Result<()> {
    let unfinished = path.with_extension("new");
    let mut file =
        OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&unfinished)?;
    writeln!(file, "{own}")?;
    fs::rename(&unfinished, path)
}

fn lock(state_dir: &Path) -> Result<File, TakeoverError> {
    let path = state_dir.join(LOCK);
    let begin = Instant::now();
    loop {
        let opened = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path);
        let file = opened.map_err(TakeoverError::file("opening", &path))?;
        match file.try_lock() {
            // It may have been removed by a cleanup while we waited; then others lock another file.
            Ok(()) if is_same_file(&file, &path) => return Ok(file),
            Ok(()) => {}
            Err(TryLockError::WouldBlock) if begin.elapsed() < START_LIMIT => {
                std::thread::sleep(Duration::from_millis(20));
            }
            Err(TryLockError::WouldBlock) => return Err(TakeoverError::Starting(state_dir.into())),
            Err(TryLockError::Error(source)) => return Err(TakeoverError::file("locking", path)(source)),
        }
    }
}

fn is_same_file(file: &File, path: &Path) -> bool {
    use std::os::linux::fs::MetadataExt as _;
    match (file.metadata(), fs::metadata(path)) {
        (Ok(opened), Ok(named)) => opened.st_ino() == named.st_ino() && opened.st_dev() == named.st_dev(),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    /// Writes the record that `pid` would have written.
    fn pose_as(state_dir: &Path, pid: u32) -> ProcessId {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
        let start_time =
            stat.rsplit_once(')').unwrap().1.split_whitespace().nth(19).unwrap().parse().unwrap();
        let id = ProcessId { pid, start_time, ..ProcessId::own().unwrap() };
        write_record(&state_dir.join(RECORD), &id).unwrap();
        id
    }

    #[test]
    fn a_predecessor_is_told_to_end_and_leaves_the_record_alone() {
        let dir = tempfile::tempdir().unwrap();
        let mut old = Command::new("sleep").arg("60").spawn().unwrap();
        let old_id = pose_as(dir.path(), old.id());
        let starting = Starting::claim(dir.path()).unwrap();
        assert!(matches!(starting.predecessor(), Recorded::Alive(id, _) if *id == old_id));
        assert!(old.try_wait().unwrap().is_none(), "not before the successor serves");
        let record = starting.finish().unwrap();
        assert_eq!(old.wait().unwrap().signal(), Some(libc::SIGTERM));

        // What the old one would do at its end.
        Record { state_dir: dir.path().into(), own: old_id }.remove().unwrap();
        assert!(matches!(recorded(dir.path()), Recorded::Alive(id, _) if id.pid == std::process::id()));
        record.remove().unwrap();
        assert!(matches!(recorded(dir.path()), Recorded::Nobody));
        assert!(!remove_state(dir.path()).unwrap());
        assert!(!dir.path().exists());
    }

    #[test]
    fn a_recycled_pid_is_not_told_anything() {
        let dir = tempfile::tempdir().unwrap();
        let mut bystander = Command::new("sleep").arg("60").spawn().unwrap();
        let mut id = pose_as(dir.path(), bystander.id());
        id.start_time -= 1;
        write_record(&dir.path().join(RECORD), &id).unwrap();
        let starting = Starting::claim(dir.path()).unwrap();
        assert!(matches!(starting.predecessor(), Recorded::Nobody));
        starting.finish().unwrap();
        assert!(bystander.try_wait().unwrap().is_none());
        bystander.kill().unwrap();
        bystander.wait().unwrap();
    }

    #[test]
    fn starts_wait_for_each_other() {
        let dir = tempfile::tempdir().unwrap();
        let first = Starting::claim(dir.path()).unwrap();
        let path = dir.path().to_owned();
        let second = std::thread::spawn(move || Starting::claim(&path).map(drop));
        assert!(File::open(dir.path().join(LOCK)).unwrap().try_lock().is_err());
        drop(first);
        second.join().unwrap().unwrap();
    }

    #[test]
    fn an_unreadable_record_is_said() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join(RECORD), "nonsense").unwrap();
        assert!(
            matches!(recorded(dir.path()), Recorded::Unknown(reason) if reason == "not a process record")
        );
        let error = Starting::claim(&dir.path().join(RECORD)).unwrap_err().to_string();
        assert!(error.contains("--state-dir") && error.contains(RECORD), "{error}");
    }
}
