//! The pin directory: where links and maps outlive a process, and how two processes share it.
//!
//! `<pin_dir>/links/<program>-<cgroup id>` and `<pin_dir>/maps-v<layout version>/<MAP>`. An exclusive lock on
//! `<pin_dir>` covers each change; a shared one on `<pin_dir>/links` is held by every process that is at work.

use std::fs::{self, DirBuilder, File, TryLockError};
use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use tidegate_common::LAYOUT_VERSION;

use super::error::InterceptError;
use crate::sys::mounts;

/// Where a bpffs belongs.
const BPF_FS: &str = "/sys/fs/bpf";

/// A pin directory.
#[derive(Clone, Debug)]
pub(super) struct PinDir {
    root: PathBuf,
}

impl PinDir {
    /// An existing or future directory; nothing is touched.
    pub(super) fn new(root: &Path) -> Self {
        Self { root: root.into() }
    }

    /// Creates it, and mounts a bpffs for it when it belongs to [`BPF_FS`] and none is there.
    pub(super) fn create(root: &Path) -> Result<Self, InterceptError> {
        if root.starts_with(BPF_FS) {
            mounts::ensure_bpffs(Path::new(BPF_FS))
                .map_err(|source| InterceptError::BpfFs { path: BPF_FS.into(), source })?;
        }
        let existing = root.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
        if !mounts::is_on_bpffs(existing).unwrap_or_default() {
            return Err(InterceptError::NotBpfFs(root.into()));
        }
        let this = Self::new(root);
        for dir in [this.root.clone(), this.links(), this.maps()] {
            DirBuilder::new()
                .recursive(true)
                .mode(0o700)
                .create(&dir)
                .map_err(InterceptError::pin("creating", &dir))?;
        }
        Ok(this)
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    /// Where links are pinned.
    pub(super) fn links(&self) -> PathBuf {
        self.root.join("links")
    }

    /// Where maps of this layout are pinned.
    pub(super) fn maps(&self) -> PathBuf {
        self.root.join(format!("maps-v{LAYOUT_VERSION}"))
    }

    /// Every directory of maps, of any layout.
    pub(super) fn all_maps(&self) -> Result<Vec<PathBuf>, InterceptError> {
        let dirs = entries(&self.root)?;
        Ok(dirs.into_iter().filter(|path| name(path).starts_with("maps-v")).collect())
    }

    /// Waits for the exclusive right to change pins. Held only for milliseconds by anybody.
    pub(super) fn lock(&self) -> Result<File, InterceptError> {
        let locking = InterceptError::pin("locking", &self.root);
        File::open(&self.root).and_then(|dir| dir.lock().map(|()| dir)).map_err(locking)
    }

    /// Says "a process is at work here" until the file is closed.
    pub(super) fn hold(&self) -> Result<File, InterceptError> {
        let path = self.links();
        let locking = InterceptError::pin("locking", &path);
        File::open(&path).and_then(|dir| dir.lock_shared().map(|()| dir)).map_err(locking)
    }

    /// Whether some process is at work here.
    pub(super) fn in_use(&self) -> Result<bool, InterceptError> {
        let path = self.links();
        let dir = match File::open(&path) {
            Ok(dir) => dir,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(InterceptError::pin("opening", path)(error)),
        };
        match dir.try_lock() {
            Ok(()) => Ok(false),
            Err(TryLockError::WouldBlock) => Ok(true),
            Err(TryLockError::Error(error)) => Err(InterceptError::pin("locking", path)(error)),
        }
    }

    /// Removes what is left of it, files first. Everything in it is ours by name.
    pub(super) fn remove(&self) -> Result<(), InterceptError> {
        for dir in self.all_maps()?.into_iter().chain([self.links()]) {
            remove_dir_with_files(&dir)?;
        }
        absent_is_fine(fs::remove_dir(&self.root)).map_err(InterceptError::pin("removing", &self.root))
    }
}

/// Removes a directory of pins.
pub(super) fn remove_dir_with_files(dir: &Path) -> Result<(), InterceptError> {
    for path in entries(dir)? {
        absent_is_fine(fs::remove_file(&path)).map_err(InterceptError::pin("removing", &path))?;
    }
    absent_is_fine(fs::remove_dir(dir)).map_err(InterceptError::pin("removing", dir))
}

/// Paths in a directory, in order; none when there is no such directory.
pub(super) fn entries(dir: &Path) -> Result<Vec<PathBuf>, InterceptError> {
    let listing = || InterceptError::pin("listing", dir);
    let read = match fs::read_dir(dir) {
        Ok(read) => read,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(listing()(error)),
    };
    let mut paths =
        read.map(|entry| entry.map(|e| e.path())).collect::<io::Result<Vec<_>>>().map_err(listing())?;
    paths.sort();
    Ok(paths)
}

/// File name as text; pins have plain names.
pub(super) fn name(path: &Path) -> &str {
    path.file_name().and_then(|name| name.to_str()).unwrap_or_default()
}

/// The pin directory where nobody chose one: below `/sys/fs/bpf`, or below the first bpffs of /proc/mounts when that
/// is somewhere else.
pub fn default_pin_dir() -> PathBuf {
    let mut found = mounts::of_type("bpf").unwrap_or_default().into_iter();
    let first = found.next();
    let standard = Path::new(BPF_FS);
    let base = match first {
        Some(first) if first != standard && !found.any(|path| path == standard) => first,
        _ => standard.into(),
    };
    base.join("tidegate")
}

fn absent_is_fine(result: io::Result<()>) -> io::Result<()> {
    match result {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        other => other,
    }
}
