//! inotify on a cgroup subtree: which cgroups deserve a look.
//!
//! Two watches for each cgroup: its directory (cgroups made and removed in it, processes moved by a write to
//! `cgroup.procs`) and its `cgroup.events` (the first process, by whatever means, and the end of the last one).

use std::collections::{BTreeMap, HashMap, HashSet};
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};

use inotify::{EventMask, Inotify, WatchDescriptor, WatchMask};

/// The watches of all cgroups.
#[derive(Debug)]
pub(super) struct Watch {
    inotify: Inotify,
    paths: HashMap<WatchDescriptor, PathBuf>,
    of_cgroup: BTreeMap<PathBuf, Watched>,
    /// Directories outside the watched subtrees, in which one may appear.
    above: HashMap<WatchDescriptor, PathBuf>,
    buffer: Vec<u8>,
    /// Said once.
    exhausted: bool,
}

#[derive(Debug)]
struct Watched {
    directory: WatchDescriptor,
    events: Option<WatchDescriptor>,
}

/// What happened since the last look.
#[derive(Debug, Default)]
pub(super) struct Happened {
    /// Cgroups to look at, new ones among them.
    pub(super) changed: HashSet<PathBuf>,
    /// Cgroups that are gone: to be forgotten first. One may be in `changed` too, made again by the same name.
    pub(super) removed: HashSet<PathBuf>,
    /// Directories that were made or removed in those above the watched subtrees.
    pub(super) above: HashSet<PathBuf>,
    /// Events were lost: look at everything.
    pub(super) overflow: bool,
}

impl Watch {
    pub(super) fn new() -> io::Result<Self> {
        Ok(Self {
            inotify: Inotify::init()?,
            paths: HashMap::new(),
            of_cgroup: BTreeMap::new(),
            above: HashMap::new(),
            buffer: vec![0; 16 * 1024],
            exhausted: false,
        })
    }

    /// Whether every cgroup could be watched; otherwise changes are only seen by rescans.
    pub(super) fn is_complete(&self) -> bool {
        !self.exhausted
    }

    /// Watches a cgroup from now on; nothing happens when it is watched already. A cgroup that is removed meanwhile
    /// is no error.
    pub(super) fn add(&mut self, cgroup: &Path) {
        if self.of_cgroup.contains_key(cgroup) {
            return;
        }
        let mask = WatchMask::CREATE
            | WatchMask::DELETE
            | WatchMask::MODIFY
            | WatchMask::DELETE_SELF
            | WatchMask::ONLYDIR;
        let Some(directory) = self.add_watch(cgroup, mask, cgroup) else { return };
        let events = self.add_watch(&cgroup.join("cgroup.events"), WatchMask::MODIFY, cgroup);
        self.of_cgroup.insert(cgroup.to_owned(), Watched { directory, events });
    }

    /// Reports what is made and removed in a directory that belongs to no watched cgroup. Call it again when the
    /// directory may have been removed and made again.
    pub(super) fn add_above(&mut self, directory: &Path) {
        let mask = WatchMask::CREATE | WatchMask::DELETE | WatchMask::ONLYDIR;
        // Whatever the error is, roots are looked at by every walk, too.
        let Ok(descriptor) = self.inotify.watches().add(directory, mask) else { return };
        // Another descriptor by the same name is of a directory that was removed.
        let stale = self.above.extract_if(|other, path| path == directory && *other != descriptor);
        for (stale, _) in stale {
            let _ = self.inotify.watches().remove(stale);
        }
        self.above.insert(descriptor, directory.to_owned());
    }

    fn add_watch(&mut self, path: &Path, mask: WatchMask, cgroup: &Path) -> Option<WatchDescriptor> {
        match self.inotify.watches().add(path, mask) {
            Ok(descriptor) => {
                self.paths.insert(descriptor.clone(), cgroup.to_owned());
                Some(descriptor)
            }
            Err(error) => {
                if error.raw_os_error() == Some(libc::ENOSPC) && !self.exhausted {
                    self.exhausted = true;
                    tracing::warn!(
                        cgroup = %cgroup.display(),
                        "fs.inotify.max_user_watches is used up: new pods are found by rescans and at their first \
                         connect only; raise it (sysctl fs.inotify.max_user_watches)"
                    );
                }
                None
            }
        }
    }

    /// Forgets a removed cgroup and everything below it. The `cgroup.events` watch would keep its inode otherwise.
    pub(super) fn remove(&mut self, cgroup: &Path) {
        // Paths are ordered by component: what lies below follows at once.
        let from_here = self.of_cgroup.range(cgroup.to_owned()..);
        let below: Vec<_> =
            from_here.map(|(path, _)| path.clone()).take_while(|path| path.starts_with(cgroup)).collect();
        for path in below {
            let Some(watched) = self.of_cgroup.remove(&path) else { continue };
            for descriptor in [Some(watched.directory), watched.events].into_iter().flatten() {
                self.paths.remove(&descriptor);
                // The kernel has removed the directory's already.
                let _ = self.inotify.watches().remove(descriptor);
            }
        }
    }

    /// Takes everything that waits. Never blocks.
    pub(super) fn drain(&mut self) -> Happened {
        let mut happened = Happened::default();
        loop {
            let events = match self.inotify.read_events(&mut self.buffer) {
                Ok(events) => events,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                Err(error) => {
                    tracing::warn!(%error, "reading inotify events failed; rescanning");
                    happened.overflow = true;
                    break;
                }
            };
            let mut any = false;
            for event in events {
                any = true;
                if event.mask.contains(EventMask::Q_OVERFLOW) {
                    happened.overflow = true;
                }
                if let Some(directory) = self.above.get(&event.wd) {
                    let child = event.name.map(|name| directory.join(name));
                    // A cgroup that is removed says nothing itself; the directory that it was in does.
                    if event.mask.contains(EventMask::DELETE) {
                        happened.removed.extend(child.clone());
                    }
                    happened.above.extend(child);
                    if event.mask.contains(EventMask::IGNORED) {
                        self.above.remove(&event.wd);
                    }
                    continue;
                }
                let Some(cgroup) = self.paths.get(&event.wd) else { continue };
                let child = event
                    .name
                    .filter(|_| event.mask.contains(EventMask::ISDIR))
                    .map(|name| cgroup.join(name));
                match child {
                    Some(child) if event.mask.contains(EventMask::DELETE) => {
                        happened.changed.remove(&child);
                        happened.removed.insert(child);
                    }
                    Some(child) => {
                        happened.changed.insert(child);
                    }
                    None if event.mask.intersects(EventMask::DELETE_SELF | EventMask::IGNORED) => {
                        happened.removed.insert(cgroup.clone());
                    }
                    None => {
                        happened.changed.insert(cgroup.clone());
                    }
                }
            }
            if !any {
                break;
            }
        }
        happened
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.inotify.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::sys::cgroup::testing::TestCgroup;

    /// Drains until `done`; events of the kernel's workers come a little later than what caused them.
    fn drain_until(watch: &mut Watch, done: impl Fn(&Happened) -> bool) -> Happened {
        let mut all = Happened::default();
        for _ in 0..1000 {
            let more = watch.drain();
            all.changed.extend(more.changed);
            all.removed.extend(more.removed);
            all.above.extend(more.above);
            all.overflow |= more.overflow;
            if done(&all) {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        all
    }

    #[test]
    fn cgroups_made_filled_emptied_and_removed_make_events() {
        let cgroup = TestCgroup::new("watch");
        let mut watch = Watch::new().unwrap();
        watch.add(&cgroup.0);
        let child = cgroup.child("child");
        let seen = drain_until(&mut watch, |seen| seen.changed.contains(&child));
        assert!(seen.changed.contains(&child), "{seen:?}");
        watch.add(&child);
        watch.add(&child);
        assert_eq!((watch.of_cgroup.len(), watch.paths.len()), (2, 4));
        drain_until(&mut watch, |_| true);

        let script = r#"echo 0 > "$0" && exec sleep 60"#;
        let mut process =
            Command::new("sh").args(["-c", script]).arg(child.join("cgroup.procs")).spawn().unwrap();
        let seen = drain_until(&mut watch, |seen| seen.changed.contains(&child));
        assert!(seen.changed.contains(&child), "{seen:?}");
        // The shell's opening of the file was seen, perhaps, and not yet what it writes.
        let populated = || std::fs::read_to_string(child.join("cgroup.events")).unwrap();
        while !populated().contains("populated 1") {
            std::thread::yield_now();
        }
        // The kernel holds a second event back for up to 10 ms.
        std::thread::sleep(std::time::Duration::from_millis(50));
        drain_until(&mut watch, |_| true);
        process.kill().unwrap();
        process.wait().unwrap();
        let seen = drain_until(&mut watch, |seen| seen.changed.contains(&child));
        assert!(seen.changed.contains(&child), "nobody writes a file when the last process ends: {seen:?}");

        // Removed, and made again by the same name before anybody looks.
        while std::fs::remove_dir(&child).is_err() {}
        std::fs::create_dir(&child).unwrap();
        let seen =
            drain_until(&mut watch, |seen| seen.removed.contains(&child) && seen.changed.contains(&child));
        assert!(seen.removed.contains(&child) && seen.changed.contains(&child), "{seen:?}");
        watch.remove(&child);
        assert_eq!((watch.of_cgroup.len(), watch.paths.len()), (1, 2));
        watch.add(&child);
        assert_eq!(watch.paths.len(), 4);
        watch.remove(&cgroup.0);
        assert_eq!((watch.of_cgroup.len(), watch.paths.len()), (0, 0));
    }

    #[test]
    fn what_appears_above_is_reported() {
        let cgroup = TestCgroup::new("above");
        let mut watch = Watch::new().unwrap();
        watch.add_above(&cgroup.0);
        watch.add_above(&cgroup.0);
        assert_eq!(watch.above.len(), 1);
        let child = cgroup.child("child");
        let seen = drain_until(&mut watch, |seen| seen.above.contains(&child));
        assert!(seen.above.contains(&child) && seen.changed.is_empty(), "{seen:?}");
        std::fs::remove_dir(&child).unwrap();
        let seen = drain_until(&mut watch, |seen| seen.removed.contains(&child));
        assert!(seen.removed.contains(&child), "{seen:?}");
        std::fs::remove_dir(&cgroup.0).unwrap();
        std::fs::create_dir(&cgroup.0).unwrap();
        watch.add_above(&cgroup.0);
        assert_eq!(watch.above.len(), 1);
        let child = cgroup.child("again");
        let seen = drain_until(&mut watch, |seen| seen.above.contains(&child));
        assert!(seen.above.contains(&child), "{seen:?}");
    }

    #[test]
    fn a_cgroup_that_is_gone_is_no_error() {
        let mut watch = Watch::new().unwrap();
        watch.add(Path::new("/sys/fs/cgroup/none-of-this-name"));
        assert!(watch.of_cgroup.is_empty() && watch.is_complete());
    }
}
