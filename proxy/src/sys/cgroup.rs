//! cgroup v2 directories: where Kubernetes keeps its pods, which processes are in one, which one a process is in.

use std::io;
use std::os::linux::fs::MetadataExt;
use std::path::{Component, Path, PathBuf};

/// How deep below the mount the kubepods subtree is looked for: kind nests it under
/// `kubelet.slice/kubelet-kubepods.slice`, others under a slice of the distribution.
const KUBEPODS_DEPTH: usize = 4;

/// The id that the eBPF programs see (`bpf_get_current_cgroup_id`): the inode number of the directory.
pub fn id(directory: &Path) -> io::Result<u64> {
    Ok(std::fs::metadata(directory)?.st_ino())
}

/// Processes of this cgroup itself, not of its children. A process that is not visible in our pid namespace is
/// listed by the kernel as 0 and left out here. Fails with `NotFound` when the cgroup has been removed.
pub fn processes(directory: &Path) -> io::Result<Vec<u32>> {
    match std::fs::read_to_string(directory.join("cgroup.procs")) {
        Ok(text) => Ok(text.lines().filter_map(|line| line.parse().ok()).filter(|pid| *pid != 0).collect()),
        // A threaded cgroup: its processes are listed by the threaded domain above it.
        Err(error) if error.raw_os_error() == Some(libc::EOPNOTSUPP) => Ok(Vec::new()),
        Err(error) => Err(gone_is_not_found(error)),
    }
}

/// Child cgroups. Fails with `NotFound` when the cgroup has been removed.
pub fn children(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).map_err(gone_is_not_found)? {
        let entry = entry.map_err(gone_is_not_found)?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            found.push(entry.path());
        }
    }
    Ok(found)
}

/// The directory of the cgroup that a process is in, below `mount` (a cgroup2 mount point). `None` when the process
/// is gone, or its cgroup is not below what is mounted there (another cgroup namespace).
pub fn of_process(pid: u32, mount: &Path) -> Option<PathBuf> {
    let text = std::fs::read_to_string(format!("/proc/{pid}/cgroup")).ok()?;
    let path = Path::new(text.lines().find_map(|line| line.strip_prefix("0::/"))?);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_)));
    // A removed cgroup is shown with this suffix.
    (plain && !path.as_os_str().as_encoded_bytes().ends_with(b" (deleted)")).then(|| mount.join(path))
}

/// Whether a directory is the root of the hierarchy: only the root has no type.
pub fn is_root(directory: &Path) -> bool {
    directory.join("cgroup.procs").exists() && !directory.join("cgroup.type").exists()
}

/// The subtrees in which a kubelet keeps its pods, whatever its cgroup driver: `kubepods`, `kubepods.slice`,
/// `…-kubepods.slice`. None is inside another one. Empty on a machine without Kubernetes.
pub fn kubepods(mount: &Path) -> io::Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut level = vec![mount.to_owned()];
    for _ in 0..KUBEPODS_DEPTH {
        let mut next = Vec::new();
        for directory in level {
            match children(&directory) {
                Ok(all) => next.extend(all),
                Err(error) if error.kind() == io::ErrorKind::NotFound && directory != mount => {}
                Err(error) => return Err(error),
            }
        }
        let (mut pods, others) = next.into_iter().partition(|path: &PathBuf| is_kubepods(path));
        found.append(&mut pods);
        level = others;
    }
    found.sort();
    Ok(found)
}

/// Whether a directory has the name of a kubepods subtree.
pub fn is_kubepods(path: &Path) -> bool {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    let name = name.strip_suffix(".slice").unwrap_or(name);
    name == "kubepods" || name.ends_with("-kubepods")
}

/// Reading a file of a removed cgroup that was opened before says ENODEV.
fn gone_is_not_found(error: io::Error) -> io::Error {
    if error.raw_os_error() == Some(libc::ENODEV) { io::ErrorKind::NotFound.into() } else { error }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A cgroup of this test, removed (with its children) at the end. Its processes must have ended.
    pub(crate) struct TestCgroup(pub(crate) PathBuf);

    impl TestCgroup {
        pub(crate) fn new(name: &str) -> Self {
            let mount = crate::sys::mounts::cgroup2().unwrap().expect("these tests need a cgroup2 mount");
            let path = mount.join(format!("tidegate-test-{}-{name}", std::process::id()));
            std::fs::create_dir(&path).expect("these tests need root (mkdir in cgroup2)");
            Self(path)
        }

        pub(crate) fn child(&self, name: &str) -> PathBuf {
            let path = self.0.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        }
    }

    impl Drop for TestCgroup {
        fn drop(&mut self) {
            fn remove(path: &Path) {
                for child in children(path).unwrap_or_default() {
                    remove(&child);
                }
                // The kernel needs a moment after the last process was reaped.
                for _ in 0..200 {
                    if !path.exists() || std::fs::remove_dir(path).is_ok() {
                        return;
                    }
                    std::thread::sleep(std::time::Duration::from_millis(10));
                }
                eprintln!("left behind: {}", path.display());
            }
            remove(&self.0);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::process::{Command, Stdio};

    use super::testing::TestCgroup;
    use super::*;

    #[test]
    fn processes_are_listed_where_they_are() {
        let cgroup = TestCgroup::new("list");
        let inner = cgroup.child("a/b");
        assert_eq!(children(&cgroup.0).unwrap(), [cgroup.0.join("a")]);
        let mut process = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep(1)");
        std::fs::write(inner.join("cgroup.procs"), process.id().to_string()).unwrap();
        assert_eq!(processes(&inner).unwrap(), [process.id()]);
        assert_eq!(processes(&cgroup.0).unwrap(), [0; 0]);
        let mount = crate::sys::mounts::cgroup2().unwrap().unwrap();
        assert_eq!(of_process(process.id(), &mount), Some(inner.clone()));
        assert!(id(&inner).unwrap() > 1);
        assert!(is_root(&mount) && !is_root(&inner) && !is_root(Path::new("/proc")));
        process.kill().unwrap();
        process.wait().unwrap();
        assert_eq!(of_process(process.id(), &mount), None);
        drop(cgroup);
        assert_eq!(processes(&inner).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(children(&inner).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn kubepods_is_found_under_any_driver() {
        let dir = tempfile::tempdir().unwrap();
        for path in [
            "kubepods/besteffort/podx",
            "kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice",
            "system.slice/kubelet.service",
            "docker/abc/kubelet/kubepods",
            "notkubepods",
        ] {
            std::fs::create_dir_all(dir.path().join(path)).unwrap();
        }
        let found = kubepods(dir.path()).unwrap();
        let relative: Vec<_> =
            found.iter().map(|path| path.strip_prefix(dir.path()).unwrap().to_str().unwrap()).collect();
        assert_eq!(
            relative,
            ["docker/abc/kubelet/kubepods", "kubelet.slice/kubelet-kubepods.slice", "kubepods"]
        );
        assert!(kubepods(&dir.path().join("system.slice")).unwrap().is_empty());
        assert!(kubepods(&dir.path().join("none")).is_err());
    }
}
