//! One pinned link per program and attach point.

use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::fs::{DirEntryExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};
use std::{fs, io};

use aya::Ebpf;
use aya::programs::links::FdLink;
use aya::programs::{CgroupAttachMode, CgroupSock, CgroupSockAddr, Program, ProgramError, SockOps};

use tidegate_common::Place;

use super::bpf;
use super::bpffs::{PinDir, entries, name};
use super::cgroup::Cgroup;
use super::error::InterceptError;

/// The programs that decide about connects: name of the link, and which program it runs at an attach point for pods and
/// at one for the host.
const CONNECTS: [(&str, &str, &str); 4] = [
    ("connect4", "connect4", "connect4_host"),
    ("connect6", "connect6", "connect6_host"),
    ("getpeername4", "getpeername4", "getpeername4"),
    ("getpeername6", "getpeername6", "getpeername6"),
];
/// Every program there is, but for [`SOCK_RELEASE`].
const PROGRAMS: [&str; 7] =
    ["connect4", "connect6", "connect4_host", "connect6_host", "getpeername4", "getpeername6", TCP_EVENTS];
/// The program that carries the original destination; attached where pods are and where the agent is.
pub(super) const TCP_EVENTS: &str = "tcp_events";
/// The program that hears of closed sockets; attached where connects are decided, if there is a kernel path.
pub(super) const SOCK_RELEASE: &str = "sock_release";

/// A link of ours.
struct Link {
    /// Of its attach point.
    cgroup: PathBuf,
    pin: PathBuf,
    program_id: u32,
    fd: OwnedFd,
}

/// All links of this process.
pub(super) struct Links {
    links: Vec<Link>,
}

impl Links {
    /// Attaches every program, one at a time; a link that a former process pinned gets the new program in its place.
    /// Call it with the pin directory locked.
    ///
    /// What a takeover means for a connection that is under way:
    ///
    /// - An attach point that both processes have: its links change programs in one step each, and old and new programs
    ///   use the same pinned maps. It doesn't matter which of them sees which event of a connection.
    /// - A new attach point: tcp_events comes first, so that nothing is captured whose destination would not be carried;
    ///   sock_release before connects, so that it hears of each that is balanced.
    /// - An attach point that is no longer wanted goes last. Where it lies above or below a new one, programs run twice
    ///   for a moment: the second connect program finds the capture port as destination and takes the original one away,
    ///   so that these few connections are reset, and counted as `no_original_destination`. None passes by. That the
    ///   second tcp_events finds nothing left to carry does no harm.
    /// - A predecessor in another cgroup keeps its own tcp_events and sock_release until it ends: connections go to its
    ///   listeners until the pods are enrolled anew, and without that link they would arrive there without their original
    ///   destination; what is on the kernel path is counted there still.
    ///   If a third process starts in that cgroup meanwhile, both run there, which does no harm either.
    pub(super) fn attach(ebpf: &mut Ebpf, dir: &PinDir, points: Points<'_>) -> Result<Self, InterceptError> {
        for program in programs(points.kernel_path) {
            load(ebpf, program)?;
        }
        let mut links = Vec::new();
        for (name, program, cgroup) in points.wanted() {
            links.push(Link::establish(ebpf, &dir.links(), name, program, cgroup)?);
        }
        let this = Self { links };
        for pin in entries(&dir.links())? {
            if this.links.iter().any(|link| link.pin == pin) {
                continue;
            }
            if hears_elsewhere(&pin, points.tcp_events) {
                // Not detached: it lives as long as the predecessor holds it, which for a dead one is no longer.
                fs::remove_file(&pin).map_err(InterceptError::pin("removing", &pin))?;
            } else {
                detach_pin(&pin)?;
            }
        }
        Ok(this)
    }

    /// Attaches where a link is missing: at a cgroup that has appeared, or was removed and made again (its link died with
    /// it). Whether there was any. Call it with the pin directory locked.
    pub(super) fn complete(
        &mut self,
        ebpf: &mut Ebpf,
        dir: &PinDir,
        points: Points<'_>,
    ) -> Result<bool, InterceptError> {
        let mut any = false;
        for (name, program, cgroup) in points.wanted() {
            let pin = dir.links().join(pin_name(name, cgroup));
            if self.links.iter().any(|link| link.pin == pin && link.is_attached()) {
                continue;
            }
            any = true;
            let of_former = |link: &Link| link.cgroup == cgroup.path && name_of_pin(&link.pin) == Some(name);
            for link in self.links.extract_if(.., |link| of_former(link)) {
                detach_pin(&link.pin)?;
            }
            self.links.push(Link::establish(ebpf, &dir.links(), name, program, cgroup)?);
        }
        Ok(any)
    }

    /// One system call for each link.
    pub(super) fn standing(&self) -> Standing {
        let mut standing = Standing::Current;
        for link in &self.links {
            match bpf::link_info(link.fd.as_fd()) {
                Ok(info) if info.program_id != link.program_id => return Standing::Superseded,
                Ok(info) if info.cgroup_id != 0 => {}
                Ok(_) | Err(_) => standing = Standing::Broken,
            }
        }
        standing
    }

    /// Whether another process's program runs on any of them.
    pub(super) fn are_superseded(&self) -> bool {
        self.standing() == Standing::Superseded
    }
}

/// Whose programs run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Standing {
    /// This process's, wherever they should.
    Current,
    /// Another process's, on at least one link: it has taken over.
    Superseded,
    /// This process's, but a link is gone, or its cgroup.
    Broken,
}

impl Link {
    fn establish(
        ebpf: &mut Ebpf,
        dir: &Path,
        name: &'static str,
        program: &'static str,
        cgroup: &Cgroup,
    ) -> Result<Self, InterceptError> {
        let refused = |source| InterceptError::Attach { program, cgroup: cgroup.path.clone(), source };
        let pin = dir.join(pin_name(name, cgroup));
        let program_fd = fd_of(ebpf, program)?;
        if pin.exists() {
            // The id in the name is not enough: the cgroup of that link may have died, and its id with it.
            let fd = bpf::open_pinned(&pin).map_err(InterceptError::pin("opening", &pin))?;
            let alive = bpf::link_info(fd.as_fd()).is_ok_and(|info| info.cgroup_id == cgroup.id);
            if alive && bpf::link_update(fd.as_fd(), program_fd.as_fd()).is_ok() {
                let program_id = bpf::link_info(fd.as_fd()).map_err(refused)?.program_id;
                return Ok(Self { cgroup: cgroup.path.clone(), pin, program_id, fd });
            }
            detach_pin(&pin)?;
        }
        attach(ebpf, program, cgroup)?
            .pin(&pin)
            .map_err(|error| InterceptError::pin("pinning", &pin)(io::Error::other(error)))?;
        let fd = bpf::open_pinned(&pin).map_err(InterceptError::pin("opening", &pin))?;
        let program_id = bpf::link_info(fd.as_fd()).map_err(refused)?.program_id;
        Ok(Self { cgroup: cgroup.path.clone(), pin, program_id, fd })
    }

    fn is_attached(&self) -> bool {
        bpf::link_info(self.fd.as_fd())
            .is_ok_and(|info| info.program_id == self.program_id && info.cgroup_id != 0)
    }
}

/// Which programs are attached where.
#[derive(Clone, Copy)]
pub(super) struct Points<'a> {
    /// Where connects are decided.
    pub(super) connect: &'a [Cgroup],
    /// Where [`TCP_EVENTS`] is.
    pub(super) tcp_events: &'a [Cgroup],
    /// Whether [`SOCK_RELEASE`] is attached.
    pub(super) kernel_path: bool,
}

impl<'a> Points<'a> {
    /// Every link that is needed: its name, its program, its cgroup. tcp_events first: what is captured without it would be
    /// reset.
    fn wanted(self) -> impl Iterator<Item = (&'static str, &'static str, &'a Cgroup)> {
        let Self { connect, tcp_events, kernel_path } = self;
        let events = tcp_events.iter().map(|cgroup| (TCP_EVENTS, TCP_EVENTS, cgroup));
        let releases = connect.iter().filter(move |_| kernel_path);
        let releases = releases.map(|cgroup| (SOCK_RELEASE, SOCK_RELEASE, cgroup));
        events.chain(releases).chain(CONNECTS.into_iter().flat_map(move |(name, pods, host)| {
            connect
                .iter()
                .map(move |cgroup| (name, if cgroup.place == Place::Host { host } else { pods }, cgroup))
        }))
    }
}

/// Names of the programs, with the kernel path or without.
pub(super) fn programs(kernel_path: bool) -> impl Iterator<Item = &'static str> {
    PROGRAMS.into_iter().chain(kernel_path.then_some(SOCK_RELEASE))
}

/// Both kinds of an attach point have the same name, so that a successor that sees it as the other kind changes the
/// program in place.
fn pin_name(name: &str, cgroup: &Cgroup) -> String {
    format!("{name}-{:x}", cgroup.id)
}

/// Whether the link of this name decides nothing.
fn hears(name: &str) -> bool {
    name == TCP_EVENTS || name == SOCK_RELEASE
}

fn name_of_pin(pin: &Path) -> Option<&str> {
    name(pin).rsplit_once('-').map(|(name, _)| name)
}

/// Whether the pin is of a link that only hears of sockets, and whose cgroup shares none with those of `cgroups`.
fn hears_elsewhere(pin: &Path, cgroups: &[Cgroup]) -> bool {
    let parts = name(pin).rsplit_once('-').filter(|(name, _)| hears(name));
    let id = parts.and_then(|(_, id)| u64::from_str_radix(id, 16).ok());
    id.is_some_and(|id| {
        !cgroups.iter().any(|cgroup| is_above(id, &cgroup.path) || is_within(id, &cgroup.path))
    })
}

/// Whether the cgroup with this id is `path` or an ancestor of it. A cgroup's id is its directory's inode number.
fn is_above(id: u64, path: &Path) -> bool {
    path.ancestors().any(|dir| fs::metadata(dir).is_ok_and(|metadata| metadata.ino() == id))
}

/// Whether the cgroup with this id is below `path`.
fn is_within(id: u64, path: &Path) -> bool {
    fs::read_dir(path).into_iter().flatten().flatten().any(|entry| {
        entry.file_type().is_ok_and(|kind| kind.is_dir())
            && (entry.ino() == id || is_within(id, &entry.path()))
    })
}

/// Detaches and unpins a link, whoever holds it. A pin that can't be opened as one is only removed.
pub(super) fn detach_pin(pin: &Path) -> Result<(), InterceptError> {
    if let Ok(fd) = bpf::open_pinned(pin) {
        // ENOLINK: its cgroup has gone already.
        let _ = bpf::link_detach(fd.as_fd());
    }
    fs::remove_file(pin).map_err(InterceptError::pin("removing", pin))
}

/// Detaches and unpins every link in `dir`; how many there were.
pub(super) fn detach_all(dir: &PinDir) -> Result<usize, InterceptError> {
    let mut pins = entries(&dir.links())?;
    // The programs that capture first: what was captured before can still be carried.
    pins.sort_by_key(|pin| name_of_pin(pin).is_some_and(hears));
    for pin in &pins {
        detach_pin(pin)?;
    }
    Ok(pins.len())
}

fn program<'a>(ebpf: &'a mut Ebpf, name: &'static str) -> Result<&'a mut Program, InterceptError> {
    ebpf.program_mut(name).ok_or(InterceptError::NotInObject(name))
}

/// Has the verifier check one program.
pub(super) fn load(ebpf: &mut Ebpf, name: &'static str) -> Result<(), InterceptError> {
    let loaded = match program(ebpf, name)? {
        Program::CgroupSock(program) => program.load(),
        Program::CgroupSockAddr(program) => program.load(),
        Program::SockOps(program) => program.load(),
        _ => return Err(InterceptError::NotInObject(name)),
    };
    loaded.map_err(|source| InterceptError::Program { program: name, source: Box::new(source) })
}

fn fd_of(ebpf: &mut Ebpf, name: &'static str) -> Result<OwnedFd, InterceptError> {
    let error = |source| InterceptError::Program { program: name, source: Box::new(source) };
    let program = program(ebpf, name)?;
    let fd = program.fd().map_err(error)?;
    fd.as_fd().try_clone_to_owned().map_err(|source| error(ProgramError::IOError(source)))
}

fn attach(ebpf: &mut Ebpf, name: &'static str, cgroup: &Cgroup) -> Result<FdLink, InterceptError> {
    let attached = match program(ebpf, name)? {
        Program::CgroupSock(program) => sock_link(program, cgroup),
        Program::CgroupSockAddr(program) => sock_addr_link(program, cgroup),
        Program::SockOps(program) => sock_ops_link(program, cgroup),
        _ => return Err(InterceptError::NotInObject(name)),
    };
    attached.map_err(|error| InterceptError::Attach {
        program: name,
        cgroup: cgroup.path.clone(),
        source: match error {
            ProgramError::SyscallError(error) => error.io_error,
            error => io::Error::other(error),
        },
    })
}

// "Single" means no flags, which is all that links take: they always share the cgroup with other programs (systemd's,
// Cilium's) and with those of ancestors.
fn sock_link(program: &mut CgroupSock, cgroup: &Cgroup) -> Result<FdLink, ProgramError> {
    let id = program.attach(&cgroup.dir, CgroupAttachMode::Single)?;
    FdLink::try_from(program.take_link(id)?).map_err(|error| ProgramError::IOError(io::Error::other(error)))
}

fn sock_addr_link(program: &mut CgroupSockAddr, cgroup: &Cgroup) -> Result<FdLink, ProgramError> {
    let id = program.attach(&cgroup.dir, CgroupAttachMode::Single)?;
    FdLink::try_from(program.take_link(id)?).map_err(|error| ProgramError::IOError(io::Error::other(error)))
}

fn sock_ops_link(program: &mut SockOps, cgroup: &Cgroup) -> Result<FdLink, ProgramError> {
    let id = program.attach(&cgroup.dir, CgroupAttachMode::Single)?;
    FdLink::try_from(program.take_link(id)?).map_err(|error| ProgramError::IOError(io::Error::other(error)))
}
