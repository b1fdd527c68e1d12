//! Processes by an identity that is never used twice: a pid is given away again, a pid with its start time is not.

use std::fmt;
use std::io;
use std::os::fd::{AsFd as _, AsRawFd as _, FromRawFd as _, OwnedFd};
use std::os::linux::fs::MetadataExt as _;
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use nix::sys::signal::Signal;

/// Names one process of this boot, for ever.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ProcessId {
    /// Process id, in the pid namespace below.
    pub pid: u32,
    /// When it started, clock ticks since boot.
    pub start_time: u64,
    /// Inode of its pid namespace.
    pub pid_namespace: u64,
    /// `/proc/sys/kernel/random/boot_id`.
    pub boot_id: String,
}

impl ProcessId {
    /// This process.
    pub fn own() -> io::Result<Self> {
        let pid = std::process::id();
        Ok(Self {
            pid,
            start_time: start_time(pid)?,
            pid_namespace: own_pid_namespace()?,
            boot_id: boot_id()?,
        })
    }

    /// The process, if it is alive. `Unsupported` when it belongs to another pid namespace, where nothing can be
    /// said about it.
    pub fn find(&self) -> io::Result<Option<Process>> {
        if self.boot_id != boot_id()? {
            return Ok(None);
        }
        if self.pid_namespace != own_pid_namespace()? {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "it runs in another pid namespace"));
        }
        let Some(handle) = pidfd_open(self.pid)? else { return Ok(None) };
        // The handle is of whoever has the pid now. If the start time is right it is the one; and it stays so.
        match start_time(self.pid) {
            Ok(start_time) if start_time == self.start_time => {
                let process = Process { handle };
                Ok((!process.has_ended()).then_some(process))
            }
            _ => Ok(None),
        }
    }
}

/// One line: `<pid> <start time> <pid namespace> <boot id>`.
impl fmt::Display for ProcessId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} {} {}", self.pid, self.start_time, self.pid_namespace, self.boot_id)
    }
}

impl std::str::FromStr for ProcessId {
    type Err = io::Error;

    fn from_str(line: &str) -> io::Result<Self> {
        let mut fields = line.split_whitespace();
        let mut read = || {
            let (pid, start_time) = (fields.next()?.parse().ok()?, fields.next()?.parse().ok()?);
            let (pid_namespace, boot_id) = (fields.next()?.parse().ok()?, fields.next()?.to_owned());
            Some(Self { pid, start_time, pid_namespace, boot_id })
        };
        read().ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, "not a process record"))
    }
}

/// A handle of a process (pidfd): it never comes to mean another one.
#[derive(Debug)]
pub struct Process {
    handle: OwnedFd,
}

impl Process {
    /// Sends a signal. Nothing happens when the process has ended.
    pub fn signal(&self, signal: Signal) -> io::Result<()> {
        let none = std::ptr::null::<libc::siginfo_t>();
        // SAFETY: a null siginfo is allowed; no other pointers.
        let result = unsafe {
            libc::syscall(
                libc::SYS_pidfd_send_signal,
                self.handle.as_raw_fd(),
                signal as libc::c_int,
                none,
                0,
            )
        };
        match result {
            0 => Ok(()),
            _ => match io::Error::last_os_error() {
                error if error.raw_os_error() == Some(libc::ESRCH) => Ok(()),
                error => Err(error),
            },
        }
    }

    /// Whether it has ended (a zombie has).
    pub fn has_ended(&self) -> bool {
        self.wait(Duration::ZERO)
    }

    /// Waits for its end at most so long; whether it has ended.
    pub fn wait(&self, limit: Duration) -> bool {
        let millis = i32::try_from(limit.as_millis()).unwrap_or(i32::MAX);
        let mut fds = [PollFd::new(self.handle.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::try_from(millis).unwrap_or(PollTimeout::MAX)), Ok(1))
    }
}

fn pidfd_open(pid: u32) -> io::Result<Option<OwnedFd>> {
    // SAFETY: no pointers.
    let fd = unsafe { libc::syscall(libc::SYS_pidfd_open, pid as libc::pid_t, 0) };
    if fd >= 0 {
        // SAFETY: the kernel just gave us this descriptor (close-on-exec), nobody else has it.
        return Ok(Some(unsafe { OwnedFd::from_raw_fd(fd as i32) }));
    }
    match io::Error::last_os_error() {
        // EINVAL: the id of a thread that is not a process, or no id at all.
        error if matches!(error.raw_os_error(), Some(libc::ESRCH | libc::EINVAL)) => Ok(None),
        error => Err(error),
    }
}

fn start_time(pid: u32) -> io::Result<u64> {
    stat_field(pid, 22)
}

/// The parent of a process; 0 when that is outside our pid namespace.
pub fn parent(pid: u32) -> io::Result<u32> {
    stat_field(pid, 4)
}

/// A field of `/proc/PID/stat`, counted from 1 as in proc(5), from 4 on. The name in field 2 may hold anything, so the
/// others are counted from its `)`.
fn stat_field<T: std::str::FromStr>(pid: u32, number: usize) -> io::Result<T> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let after_name = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    after_name.split_whitespace().nth(number - 3).and_then(|field| field.parse().ok()).ok_or_else(|| {
        io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat has no field {number}"))
    })
}

fn own_pid_namespace() -> io::Result<u64> {
    Ok(std::fs::metadata("/proc/self/ns/pid")?.st_ino())
}

fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;
    use std::process::Command;

    use super::*;

    #[test]
    fn a_process_is_found_signalled_and_seen_to_end() {
        let own = ProcessId::own().unwrap();
        assert!(own.find().unwrap().is_some());
        assert_eq!(own.to_string().parse::<ProcessId>().unwrap(), own);

        let mut child = Command::new("sleep").arg("60").spawn().unwrap();
        let id = ProcessId { pid: child.id(), start_time: start_time(child.id()).unwrap(), ..own.clone() };
        let process = id.find().unwrap().expect("alive");
        assert_eq!(parent(child.id()).unwrap(), own.pid);
        assert!(!process.has_ended());
        process.signal(Signal::SIGTERM).unwrap();
        assert!(process.wait(Duration::from_mins(1)));
        // Not yet reaped: a zombie keeps its pid and start time.
        assert!(id.find().unwrap().is_none());
        assert_eq!(child.wait().unwrap().signal(), Some(libc::SIGTERM));
        process.signal(Signal::SIGTERM).unwrap();
        assert!(id.find().unwrap().is_none());
    }

    #[test]
    fn a_recycled_pid_is_another_process() {
        let own = ProcessId::own().unwrap();
        let earlier = ProcessId { start_time: own.start_time - 1, ..own.clone() };
        assert!(earlier.find().unwrap().is_none());
        let before_reboot = ProcessId { boot_id: "another".into(), ..own.clone() };
        assert!(before_reboot.find().unwrap().is_none());
        let elsewhere = ProcessId { pid_namespace: 1, ..own };
        assert_eq!(elsewhere.find().unwrap_err().kind(), io::ErrorKind::Unsupported);
    }

    #[test]
    fn what_is_no_record_is_refused() {
        for bad in ["", "1", "1 2 3", "x 1 2 y", "-1 1 2 y"] {
            assert!(bad.parse::<ProcessId>().is_err(), "{bad:?}");
        }
    }
}
