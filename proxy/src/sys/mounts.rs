//! Where file systems are mounted: cgroup2 and bpffs.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt;
use std::path::{Path, PathBuf};

use nix::mount::MsFlags;

/// One line of `/proc/self/mounts`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Mount {
    /// Where it is.
    pub path: PathBuf,
    /// `cgroup2`, `bpf`, …
    pub fs_type: String,
    /// Whether it is mounted read-only.
    pub read_only: bool,
}

/// The mounts that the process sees, in mount order (a later one hides an earlier one at the same path).
pub fn mounts() -> io::Result<Vec<Mount>> {
    Ok(parse(&std::fs::read("/proc/self/mounts")?))
}

/// Mount points of this file system type. Paths that a later mount of another type hides are left out.
pub fn of_type(fs_type: &str) -> io::Result<Vec<PathBuf>> {
    let all = mounts()?;
    let visible = |i: usize, mount: &Mount| !all[i + 1..].iter().any(|later| later.path == mount.path);
    let wanted = all.iter().enumerate().filter(|(i, mount)| mount.fs_type == fs_type && visible(*i, mount));
    Ok(wanted.map(|(_, mount)| mount.path.clone()).collect())
}

/// Where cgroup v2 is mounted; `None` when it is not. `/sys/fs/cgroup` and `/sys/fs/cgroup/unified` come first when
/// there are several.
pub fn cgroup2() -> io::Result<Option<PathBuf>> {
    let mut found = of_type("cgroup2")?;
    found.sort_by_key(|path| !path.starts_with("/sys/fs/cgroup"));
    Ok(found.into_iter().next())
}

/// Whether `path` lies on a bpffs.
pub fn is_on_bpffs(path: &Path) -> io::Result<bool> {
    Ok(nix::sys::statfs::statfs(path)?.filesystem_type() == nix::sys::statfs::BPF_FS_MAGIC)
}

/// Whether `path` lies on a cgroup v2 hierarchy.
pub fn is_on_cgroup2(path: &Path) -> io::Result<bool> {
    Ok(nix::sys::statfs::statfs(path)?.filesystem_type() == nix::sys::statfs::CGROUP2_SUPER_MAGIC)
}

/// Mounts a bpffs at `path` unless there is one. Needs CAP_SYS_ADMIN. Tells whether it mounted.
pub fn ensure_bpffs(path: &Path) -> io::Result<bool> {
    if is_on_bpffs(path)? {
        return Ok(false);
    }
    let flags = MsFlags::MS_NOSUID | MsFlags::MS_NODEV | MsFlags::MS_NOEXEC;
    nix::mount::mount(Some("bpf"), path, Some("bpf"), flags, Some("mode=700"))?;
    Ok(true)
}

fn parse(text: &[u8]) -> Vec<Mount> {
    text.split(|&b| b == b'\n')
        .filter_map(|line| {
            let mut fields = line.split(|&b| b == b' ');
            let (_device, path) = (fields.next()?, fields.next()?);
            let fs_type = String::from_utf8_lossy(fields.next()?).into_owned();
            let read_only = fields.next()?.split(|&b| b == b',').any(|option| option == b"ro");
            Some(Mount { path: PathBuf::from(OsString::from_vec(unescape(path))), fs_type, read_only })
        })
        .collect()
}

/// The kernel writes space, tab, newline and backslash of a path as three octal digits.
fn unescape(field: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((&first, tail)) = rest.split_first() {
        if let (b'\\', [a @ b'0'..=b'3', b @ b'0'..=b'7', c @ b'0'..=b'7', after @ ..]) = (first, tail) {
            out.push((a - b'0') << 6 | (b - b'0') << 3 | (c - b'0'));
            rest = after;
        } else {
            out.push(first);
            rest = tail;
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_parsed_with_escapes() {
        let got = parse(
            b"tmpfs /sys/fs/cgroup tmpfs rw,mode=755 0 0\ncgroup2 /mnt/a\\040b\\134c cgroup2 ro,nosuid 0 0\n\nbroken\n",
        );
        assert_eq!(got.len(), 2);
        assert_eq!(got[1].path, Path::new("/mnt/a b\\c"));
        assert!(got[1].read_only && !got[0].read_only);
        assert_eq!(got[1].fs_type, "cgroup2");
        assert_eq!(unescape(b"\\9\\04"), b"\\9\\04");
    }

    #[test]
    fn this_machine_has_proc_and_cgroup2() {
        assert!(of_type("proc").unwrap().contains(&PathBuf::from("/proc")));
        let cgroup2 = cgroup2().unwrap().expect("these tests need a cgroup2 mount");
        assert!(is_on_cgroup2(&cgroup2).unwrap());
        assert!(!is_on_cgroup2(Path::new("/proc")).unwrap());
        assert!(!is_on_bpffs(Path::new("/proc")).unwrap());
    }
}
