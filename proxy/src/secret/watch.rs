//! Tells when files of secrets were replaced.
//!
//! As Envoy, it looks at renames only: a file that is written in place may be seen half written. Every rename in the
//! directory of a file counts, so that the swapped `..data` of a mounted Kubernetes Secret does.

use std::collections::{BTreeSet, HashMap};
use std::hash::Hash;
use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};
use tokio::io::unix::AsyncFd;
use tokio::time::Instant;

/// Certificate and key are renamed one after the other: what comes within this time is looked at together.
const SETTLE: Duration = Duration::from_millis(50);

/// How often a directory is looked for that is not there.
const RETRY: Duration = Duration::from_secs(1);

/// Watches directories for whoever reads files in them, known by an `I`. All share one inotify instance, of which a
/// user has only a few.
#[derive(Debug)]
pub struct Watcher<I> {
    inotify: Option<AsyncFd<Inotify>>,
    directories: HashMap<PathBuf, Directory<I>>,
    /// Whose files may have been replaced, and from when on that is told.
    changed: BTreeSet<I>,
    due: Option<Instant>,
    /// When missing directories are looked for again.
    retry: Option<Instant>,
}

#[derive(Debug)]
struct Directory<I> {
    /// None: it is not there.
    watch: Option<WatchDescriptor>,
    readers: BTreeSet<I>,
}

impl<I> Default for Watcher<I> {
    fn default() -> Self {
        Self { inotify: None, directories: HashMap::new(), changed: BTreeSet::new(), due: None, retry: None }
    }
}

impl<I: Clone + Ord + Hash> Watcher<I> {
    /// From now on this reader has its files in these directories. Call it before the files are read, so that no change
    /// falls between.
    pub fn set(&mut self, reader: &I, directories: Vec<PathBuf>) {
        self.remove(reader, |path| !directories.iter().any(|kept| kept == path));
        for path in directories {
            let directory = self
                .directories
                .entry(path)
                .or_insert_with(|| Directory { watch: None, readers: BTreeSet::new() });
            directory.readers.insert(reader.clone());
        }
        self.watch_missing();
    }

    /// This reader is gone.
    pub fn forget(&mut self, reader: &I) {
        self.remove(reader, |_| true);
        self.changed.remove(reader);
    }

    fn remove(&mut self, reader: &I, from: impl Fn(&Path) -> bool) {
        let inotify = &self.inotify;
        self.directories.retain(|path, directory| {
            if from(path) {
                directory.readers.remove(reader);
            }
            if directory.readers.is_empty()
                && let (Some(inotify), Some(watch)) = (inotify, directory.watch.take())
            {
                inotify.get_ref().watches().remove(watch).ok(); // gone already, perhaps
            }
            !directory.readers.is_empty()
        });
    }

    /// Watches what is not watched yet. Gives the readers of those that came.
    fn watch_missing(&mut self) -> BTreeSet<I> {
        let mut came = BTreeSet::new();
        for (path, directory) in &mut self.directories {
            if directory.watch.is_some() {
                continue;
            }
            match watch(&mut self.inotify, path) {
                Ok(watch) => {
                    directory.watch = Some(watch);
                    came.extend(directory.readers.iter().cloned());
                }
                Err(error) => {
                    tracing::debug!(directory = %path.display(), %error, "the directory can't be watched");
                }
            }
        }
        let missing = self.directories.values().any(|directory| directory.watch.is_none());
        self.retry = missing.then(|| Instant::now() + RETRY);
        came
    }

    /// Waits until files may have been replaced, and tells whose. Nothing is lost when it is dropped before.
    pub async fn changed(&mut self) -> BTreeSet<I> {
        loop {
            if self.due.is_some_and(|due| due <= Instant::now()) {
                self.due = None;
                return std::mem::take(&mut self.changed);
            }
            let timer = match (self.due, self.retry) {
                (Some(due), Some(retry)) => Some(due.min(retry)),
                (due, retry) => due.or(retry),
            };
            tokio::select! {
                happened = happened(self.inotify.as_mut()) => self.note(&happened),
                () = until(timer) => {
                    let came = self.watch_missing();
                    self.later(came);
                }
            }
        }
    }

    fn later(&mut self, readers: BTreeSet<I>) {
        if !readers.is_empty() {
            self.changed.extend(readers);
            self.due.get_or_insert_with(|| Instant::now() + SETTLE);
        }
    }

    fn note(&mut self, happened: &Happened) {
        let mut readers = BTreeSet::new();
        for directory in self.directories.values_mut() {
            let Some(watch) = &directory.watch else { continue };
            let gone = happened.gone.contains(watch);
            if happened.everything || gone || happened.renamed.contains(watch) {
                readers.extend(directory.readers.iter().cloned());
            }
            if gone {
                directory.watch = None;
            }
        }
        // Another directory may have come in the place of one that is gone.
        self.watch_missing();
        self.later(readers);
    }
}

fn watch(inotify: &mut Option<AsyncFd<Inotify>>, path: &Path) -> io::Result<WatchDescriptor> {
    let inotify = match inotify {
        Some(inotify) => inotify,
        None => inotify.insert(readiness(Inotify::init()?)?),
    };
    let mask = WatchMask::MOVED_TO | WatchMask::DELETE_SELF | WatchMask::MOVE_SELF | WatchMask::ONLYDIR;
    inotify.get_ref().watches().add(path, mask)
}

/// What replaces this constructor is unsafe, for types that may close or change their descriptor: an `Inotify` has one
/// from its first day to its last.
#[allow(deprecated)]
fn readiness(inotify: Inotify) -> io::Result<AsyncFd<Inotify>> {
    AsyncFd::new(inotify)
}

async fn until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at).await,
        None => std::future::pending().await,
    }
}

#[derive(Debug, Default)]
struct Happened {
    renamed: Vec<WatchDescriptor>,
    gone: Vec<WatchDescriptor>,
    /// Events were lost.
    everything: bool,
}

async fn happened(inotify: Option<&mut AsyncFd<Inotify>>) -> Happened {
    let Some(inotify) = inotify else { return std::future::pending().await };
    let mut happened = Happened::default();
    let Ok(mut ready) = inotify.readable_mut().await else {
        return std::future::pending().await; // the runtime is going away
    };
    let mut buffer = [0; 4096];
    loop {
        let events = match ready.get_inner_mut().read_events(&mut buffer) {
            Ok(events) => events,
            Err(error) => {
                happened.everything |= error.kind() != io::ErrorKind::WouldBlock;
                ready.clear_ready();
                return happened;
            }
        };
        let gone = EventMask::DELETE_SELF | EventMask::MOVE_SELF | EventMask::IGNORED | EventMask::UNMOUNT;
        for event in events {
            if event.mask.contains(EventMask::Q_OVERFLOW) {
                happened.everything = true;
            } else if event.mask.intersects(gone) {
                happened.gone.push(event.wd);
            } else {
                happened.renamed.push(event.wd);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;

    use super::*;

    async fn told(watcher: &mut Watcher<&'static str>) -> Vec<&'static str> {
        let changed = tokio::time::timeout(Duration::from_secs(20), watcher.changed()).await;
        changed.expect("the change is never told").into_iter().collect()
    }

    #[tokio::test]
    async fn renames_are_told_to_those_who_read_there_once() {
        let root = tempfile::tempdir().unwrap();
        let (a, b) = (root.path().join("a"), root.path().join("b"));
        fs::create_dir(&a).unwrap();
        fs::create_dir(&b).unwrap();
        let mut watcher = Watcher::default();
        watcher.set(&"one", vec![a.clone()]);
        watcher.set(&"two", vec![a.clone(), b.clone()]);
        watcher.set(&"three", vec![b.clone()]);
        for name in ["key", "chain"] {
            fs::write(a.join("new"), name).unwrap();
            fs::rename(a.join("new"), a.join(name)).unwrap();
        }
        assert_eq!(told(&mut watcher).await, ["one", "two"]);
        watcher.forget(&"two");
        watcher.set(&"one", vec![]);
        fs::rename(a.join("key"), a.join("key2")).unwrap();
        fs::rename(a.join("key2"), b.join("key")).unwrap();
        assert_eq!(told(&mut watcher).await, ["three"], "nobody reads in a any more");
    }

    #[tokio::test]
    async fn a_kubernetes_secret_is_swapped_by_a_link() {
        let root = tempfile::tempdir().unwrap();
        let link = |target: &str, name: &str| {
            std::os::unix::fs::symlink(target, root.path().join(name)).unwrap();
        };
        fs::create_dir(root.path().join("1")).unwrap();
        fs::create_dir(root.path().join("2")).unwrap();
        link("1", "..data");
        link("..data/tls.crt", "tls.crt");
        let mut watcher = Watcher::default();
        watcher.set(&"s", vec![root.path().to_owned()]);
        link("2", "..data_tmp");
        fs::rename(root.path().join("..data_tmp"), root.path().join("..data")).unwrap();
        assert_eq!(told(&mut watcher).await, ["s"]);
    }

    #[tokio::test]
    async fn a_directory_may_come_later_and_go_and_come_back() {
        let root = tempfile::tempdir().unwrap();
        let dir = root.path().join("later");
        let mut watcher = Watcher::default();
        watcher.set(&"s", vec![dir.clone()]);
        for _ in 0..2 {
            fs::create_dir(&dir).unwrap();
            assert_eq!(told(&mut watcher).await, ["s"]);
            fs::remove_dir(&dir).unwrap();
            assert_eq!(told(&mut watcher).await, ["s"]);
        }
    }
}
