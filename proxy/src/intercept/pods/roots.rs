//! The cgroups that everything below belongs to: those that were configured, and every kubepods subtree when none was.
//! One may be removed and made again, or appear late.

use std::io;
use std::path::{Path, PathBuf};

use super::actor::Actor;
use crate::intercept::error::InterceptError;
use crate::sys::cgroup;

/// The directories, and what is there now.
#[derive(Debug)]
pub(super) struct Roots {
    roots: Vec<Root>,
    /// Also every kubepods subtree below this mount.
    discover_below: Option<PathBuf>,
}

#[derive(Debug)]
struct Root {
    path: PathBuf,
    /// Of the directory that the programs are attached to.
    id: Option<u64>,
}

impl Roots {
    /// The programs are attached to these already.
    pub(super) fn new(paths: &[PathBuf], discover_below: Option<PathBuf>) -> Self {
        let root = |path: &PathBuf| Root { path: path.clone(), id: cgroup::id(path).ok() };
        Self { roots: paths.iter().map(root).collect(), discover_below }
    }

    pub(super) fn paths(&self) -> Vec<PathBuf> {
        self.roots.iter().map(|root| root.path.clone()).collect()
    }

    pub(super) fn covers(&self, cgroup: &Path) -> bool {
        self.roots.iter().any(|root| cgroup.starts_with(&root.path))
    }

    /// Whether something that happened to this directory, which is not below a root, may have to do with one.
    pub(super) fn concerns(&self, directory: &Path) -> bool {
        self.discover_below.is_some() && cgroup::is_kubepods(directory)
            || self.roots.iter().any(|root| root.path.starts_with(directory))
    }

    /// Directories in which a root may appear, so far as they exist: to be watched.
    pub(super) fn above(&self) -> Vec<PathBuf> {
        let parent =
            |root: &Root| root.path.ancestors().skip(1).find(|path| path.is_dir()).map(Path::to_owned);
        let mut above: Vec<_> = self.roots.iter().filter_map(parent).collect();
        if let Some(mount) = &self.discover_below {
            // Where kubelets make theirs: at the top, or in a slice at the top.
            above.extend(
                cgroup::children(mount).unwrap_or_default().into_iter().filter(|path| !self.covers(path)),
            );
            above.push(mount.clone());
        }
        above.sort();
        above.dedup();
        above
    }

    /// Subtrees that are not known yet.
    fn undiscovered(&self) -> io::Result<Vec<PathBuf>> {
        let Some(mount) = &self.discover_below else { return Ok(Vec::new()) };
        let mut found = cgroup::kubepods(mount)?;
        found.retain(|path| !self.covers(path));
        Ok(found)
    }

    /// Roots that are there and not what the programs are attached to.
    fn changed(&self) -> Vec<(PathBuf, u64)> {
        let now = |root: &Root| {
            Some((root.path.clone(), cgroup::id(&root.path).ok()?)).filter(|(_, id)| root.id != Some(*id))
        };
        self.roots.iter().filter_map(now).collect()
    }
}

impl Actor {
    /// Attaches the programs to roots that have appeared, or were removed and made again. Which ones.
    pub(super) fn check_roots(&mut self) -> Vec<PathBuf> {
        // The watch comes first, so that what is made after the look makes an event.
        for directory in self.roots.above() {
            self.watch.add_above(&directory);
        }
        let new = self.roots.undiscovered().unwrap_or_else(|error| {
            tracing::warn!(%error, "can't look for new kubepods cgroups");
            Vec::new()
        });
        let changed = self.roots.changed();
        if (new.is_empty() && changed.is_empty()) || self.superseded {
            return Vec::new();
        }
        let attached = self.interceptor().attach_to_new(&new);
        match attached {
            Ok(_) => {}
            Err(InterceptError::Superseded(_)) => {
                self.be_superseded();
                return Vec::new();
            }
            Err(error) => {
                tracing::error!(%error, "a cgroup has appeared and can't be attached to; trying again");
                return Vec::new();
            }
        }
        let appeared: Vec<_> =
            changed.iter().map(|(path, _)| path.clone()).chain(new.iter().cloned()).collect();
        for path in &appeared {
            tracing::info!("intercepting connects from cgroup {}, which is new", path.display());
        }
        for (path, id) in changed {
            if let Some(root) = self.roots.roots.iter_mut().find(|root| root.path == path) {
                root.id = Some(id);
            }
        }
        let found = new.into_iter().map(|path| Root { id: cgroup::id(&path).ok(), path });
        self.roots.roots.extend(found);
        appeared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn roots_that_appear_change_and_go() {
        let dir = tempfile::tempdir().unwrap();
        let configured = dir.path().join("a/b");
        std::fs::create_dir_all(&configured).unwrap();
        let roots = Roots::new(std::slice::from_ref(&configured), None);
        assert!(roots.changed().is_empty());
        assert!(roots.covers(&configured.join("c")) && !roots.covers(&dir.path().join("a")));
        assert_eq!(roots.above(), [dir.path().join("a")]);
        // Made again: another directory by the same name. (One in its place keeps the old inode number away.)
        std::fs::remove_dir(&configured).unwrap();
        assert!(roots.changed().is_empty(), "nothing is there to be attached to");
        std::fs::write(dir.path().join("in-its-place"), "").unwrap();
        std::fs::create_dir(&configured).unwrap();
        assert_eq!(roots.changed().len(), usize::from(cgroup::id(&configured).ok() != roots.roots[0].id));
        std::fs::remove_dir_all(dir.path().join("a")).unwrap();
        assert_eq!(roots.above(), [dir.path()]);
        assert!(roots.concerns(&dir.path().join("a")) && !roots.concerns(&dir.path().join("x")));
    }

    #[test]
    fn kubepods_are_discovered() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir_all(dir.path().join("system.slice")).unwrap();
        let mut roots = Roots::new(&[], Some(dir.path().to_owned()));
        assert!(roots.undiscovered().unwrap().is_empty());
        assert_eq!(roots.above(), [dir.path().to_owned(), dir.path().join("system.slice")]);
        let kubepods = dir.path().join("kubepods.slice");
        assert!(roots.concerns(&kubepods));
        std::fs::create_dir(&kubepods).unwrap();
        assert_eq!(roots.undiscovered().unwrap(), std::slice::from_ref(&kubepods));
        roots.roots.push(Root { id: cgroup::id(&kubepods).ok(), path: kubepods });
        assert!(roots.undiscovered().unwrap().is_empty() && roots.changed().is_empty());
    }
}
