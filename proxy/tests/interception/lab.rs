//! A small lab: cgroups, network namespaces, and helper processes that hand out sockets.
//!
//! A hook runs by the cgroup that a socket's creator was in. So a helper sits in a pod's cgroup and namespace, makes
//! sockets on request and passes their descriptors; the test does the rest itself.

use std::io::{self, IoSlice, IoSliceMut};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use nix::cmsg_space;
use nix::sys::socket::{
    AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockType, recvmsg, send, socketpair,
};
use nix::unistd::{ForkResult, Pid, fork};
use socket2::{Domain, SockAddr, Socket, Type};
use tidegate::intercept::cgroup;
use tidegate::intercept::error::InterceptError;
use tidegate::intercept::programs::{Cleaned, Interceptor, Options, cleanup};
use tidegate_common::{Enrolment, Reason};

/// Only guards against hanging.
pub(crate) const LONG: Duration = Duration::from_secs(20);
/// The pods' own addresses (every pod has the same: namespaces keep them apart).
pub(crate) const POD_V4: &str = "10.77.0.2";
pub(crate) const POD_V6: &str = "fd77::2";
/// Where capture listeners wait.
pub(crate) const CAPTURE_PORT: u16 = 15001;

/// One test's cgroups and pin directory; removed at the end, whatever happened.
pub(crate) struct Lab {
    pub(crate) pods: PathBuf,
    /// A cgroup of pods below `pods`, if there is a pod in it.
    below: PathBuf,
    pub(crate) agent: PathBuf,
    root: PathBuf,
    pub(crate) pin_dir: PathBuf,
}

impl Lab {
    pub(crate) fn new() -> Self {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let name = format!("tidegate-it-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let root = cgroup::mount_point().expect("a cgroup2 mount").join(&name);
        let (pods, agent) = (root.join("pods"), root.join("agent"));
        let below = pods.join("below");
        for dir in [&root, &pods, &agent] {
            std::fs::create_dir(dir).expect("root, to make cgroups");
        }
        Self { pods, below, agent, root, pin_dir: Path::new("/sys/fs/bpf").join(name) }
    }

    pub(crate) fn options(&self) -> Options {
        let mut options = Options::new(vec![self.pods.clone()]).unwrap();
        options.pin_dir.clone_from(&self.pin_dir);
        options.agent_cgroup.clone_from(&self.agent);
        // Room for a test, not for a node: the memory is taken up front.
        options.sizes.in_flight = 4_096;
        options.sizes.destinations = 1_024;
        options
    }

    pub(crate) fn load(&self) -> Interceptor {
        Interceptor::load(&self.options()).unwrap_or_else(|error| panic!("{error}: {error:?}"))
    }

    /// `cleanup` when the last process has gone. Another test's helper, just forked, may hold our files for a moment.
    pub(crate) fn clean_up(&self) -> Result<Cleaned, InterceptError> {
        let deadline = Instant::now() + LONG;
        loop {
            match cleanup(&self.pin_dir, false) {
                Err(InterceptError::InUse(_)) if Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }

    pub(crate) fn pod(&self) -> Pod {
        Pod::start(self, &self.pods)
    }

    /// In a cgroup below the one that programs are attached to. Once.
    pub(crate) fn pod_below(&self) -> Pod {
        std::fs::create_dir(&self.below).unwrap();
        Pod::start(self, &self.below)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = self.clean_up() {
            eprintln!("cleanup: {error}");
        }
        for dir in [&self.below, &self.pods, &self.agent, &self.root] {
            let deadline = Instant::now() + LONG;
            while std::fs::remove_dir(dir).is_err() && dir.exists() && Instant::now() < deadline {
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }
}

/// A process that makes sockets. Killed when dropped.
struct Helper {
    pid: Pid,
    line: OwnedFd,
}

impl Helper {
    /// Starts one in `cgroup`, in a new network namespace or in that of `netns`.
    fn start(cgroup: &Path, netns: Option<BorrowedFd<'_>>) -> Self {
        let _alone = alone();
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC).unwrap();
        let procs = std::fs::OpenOptions::new().write(true).open(cgroup.join("cgroup.procs")).unwrap();
        // SAFETY: the child only makes system calls, with descriptors and memory prepared before.
        match unsafe { fork() }.unwrap() {
            ForkResult::Child => {
                // SAFETY: as above; it never returns.
                unsafe { serve(procs.as_raw_fd(), netns.map(|fd| fd.as_raw_fd()), theirs.as_raw_fd()) }
            }
            ForkResult::Parent { child } => {
                let this = Self { pid: child, line: ours };
                drop(theirs);
                assert_eq!(this.receive().0, 0, "the helper's start (errno)");
                this
            }
        }
    }

    fn receive(&self) -> (u8, Option<OwnedFd>) {
        let mut byte = [0];
        let mut space = cmsg_space!(i32);
        let mut iov = [IoSliceMut::new(&mut byte)];
        let flags = MsgFlags::MSG_CMSG_CLOEXEC;
        let message = recvmsg::<()>(self.line.as_raw_fd(), &mut iov, Some(&mut space), flags).unwrap();
        assert_eq!(message.bytes, 1, "the helper is gone");
        let fd = message.cmsgs().unwrap().find_map(|c| match c {
            // SAFETY: the kernel just made this descriptor for us.
            ControlMessageOwned::ScmRights(fds) => fds.first().map(|fd| unsafe { OwnedFd::from_raw_fd(*fd) }),
            _ => None,
        });
        (byte[0], fd)
    }

    fn socket(&self, domain: Domain, kind: Type) -> Socket {
        let request = [i32::from(domain) as u8, i32::from(kind) as u8];
        send(self.line.as_raw_fd(), &request, MsgFlags::empty()).unwrap();
        let (errno, fd) = self.receive();
        let socket = Socket::from(fd.unwrap_or_else(|| panic!("socket: errno {errno}")));
        socket.set_read_timeout(Some(LONG)).unwrap();
        socket.set_write_timeout(Some(LONG)).unwrap();
        socket
    }

    fn netns(&self) -> std::fs::File {
        std::fs::File::open(format!("/proc/{}/ns/net", self.pid)).unwrap()
    }
}

impl Drop for Helper {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.pid, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.pid, None);
    }
}

/// The helper's life: enter, say so, then answer requests until the line closes.
///
/// # Safety
///
/// Runs in a forked child of a threaded process: nothing here may allocate or lock.
unsafe fn serve(procs: i32, netns: Option<i32>, line: i32) -> ! {
    // SAFETY: system calls on valid descriptors and stack memory.
    unsafe {
        let entered = match netns {
            Some(fd) => libc::setns(fd, libc::CLONE_NEWNET) == 0,
            None => libc::unshare(libc::CLONE_NEWNET) == 0,
        };
        let moved = libc::write(procs, c"0".as_ptr().cast(), 1) == 1;
        libc::dup2(line, 0);
        // Other tests' lines: they would never see their end.
        libc::syscall(libc::SYS_close_range, 1, u32::MAX, 0);
        reply(if entered && moved { 0 } else { *libc::__errno_location() as u8 }, None);
        let mut request = [0_u8; 2];
        while libc::recv(0, request.as_mut_ptr().cast(), 2, 0) == 2 {
            let fd = libc::socket(i32::from(request[0]), i32::from(request[1]) | libc::SOCK_CLOEXEC, 0);
            if fd < 0 {
                reply(*libc::__errno_location() as u8, None);
            } else {
                reply(0, Some(fd));
                libc::close(fd);
            }
        }
        libc::_exit(0)
    }
}

fn reply(byte: u8, fd: Option<i32>) {
    use nix::sys::socket::{ControlMessage, sendmsg};
    // nix allocates for control messages, which a forked child must not; hence by hand for a descriptor.
    let Some(fd) = fd else {
        let _ =
            sendmsg::<()>(0, &[IoSlice::new(&[byte])], &[] as &[ControlMessage<'_>], MsgFlags::empty(), None);
        return;
    };
    // SAFETY: a control buffer of exactly one descriptor, aligned as `cmsghdr`, on the stack.
    unsafe {
        let mut control = [0_u64; 4];
        let mut iov = libc::iovec { iov_base: (&raw const byte).cast_mut().cast(), iov_len: 1 };
        let mut message: libc::msghdr = std::mem::zeroed();
        message.msg_iov = &raw mut iov;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = libc::CMSG_SPACE(4) as usize;
        let header = libc::CMSG_FIRSTHDR(&raw const message);
        (*header).cmsg_level = libc::SOL_SOCKET;
        (*header).cmsg_type = libc::SCM_RIGHTS;
        (*header).cmsg_len = libc::CMSG_LEN(4) as usize;
        libc::CMSG_DATA(header).cast::<i32>().write_unaligned(fd);
        libc::sendmsg(0, &raw const message, 0);
    }
}

/// Every pod's record.
pub(crate) fn enrolment() -> Enrolment {
    Enrolment::captured(CAPTURE_PORT, Some(POD_V4.parse().unwrap()), Some(POD_V6.parse().unwrap()))
}

/// Its record for each way in which an original destination can be carried, and the counter of that.
pub(crate) fn carriers() -> [(Enrolment, &'static str); 2] {
    [(enrolment(), "in_syn"), (enrolment().carried_by_map(), "in_flight")]
}

/// A network namespace with processes in the pods' cgroup and in the agent's.
pub(crate) struct Pod {
    app: Helper,
    agent: Helper,
    pub(crate) cookie: u64,
}

impl Pod {
    fn start(lab: &Lab, cgroup: &Path) -> Self {
        let app = Helper::start(cgroup, None);
        let agent = Helper::start(&lab.agent, Some(app.netns().as_fd()));
        let mut this = Self { app, agent, cookie: 0 };
        this.cookie = netns_cookie(&this.app_socket(Domain::IPV4));
        // What isn't captured has nowhere to go and says so with an errno that nothing else here gives: EACCES.
        this.run(&format!(
            "ip link set lo up; ip link add eth0 type veth peer name eth1; ip link set eth1 up; ip addr add {POD_V4}/24 dev eth0; \
             ip addr add {POD_V6}/64 dev eth0 nodad; ip link set eth0 up; \
             ip route add prohibit default; ip -6 route add prohibit default metric 1; \
             for i in $(seq 400); do ip -6 route show table local | grep -q '^local {POD_V6} ' && exit; sleep 0.05; done; \
             echo 'the kernel has not made {POD_V6} local' >&2; exit 1"
        ));
        this
    }

    /// Runs shell commands in the pod's namespace (file systems stay the host's).
    pub(crate) fn run(&self, script: &str) -> String {
        let netns = format!("--net=/proc/{}/ns/net", self.app.pid);
        let output = Command::new("nsenter").args([&netns, "sh", "-ec", script]).output().unwrap();
        assert!(output.status.success(), "{script}: {}", String::from_utf8_lossy(&output.stderr));
        String::from_utf8(output.stdout).unwrap()
    }

    /// A TCP socket of the application.
    pub(crate) fn app_socket(&self, domain: Domain) -> Socket {
        self.app.socket(domain, Type::STREAM)
    }

    /// A UDP socket of the application.
    pub(crate) fn app_udp(&self) -> Socket {
        self.app.socket(Domain::IPV4, Type::DGRAM)
    }

    /// A TCP socket of the agent in the pod's namespace.
    pub(crate) fn agent_socket(&self, domain: Domain) -> Socket {
        self.agent.socket(domain, Type::STREAM)
    }

    /// A capture listener: dual stack.
    pub(crate) fn capture_listener(&self, interceptor: &Interceptor, port: u16, backlog: i32) -> Socket {
        let socket = self.agent_socket(Domain::IPV6);
        socket.set_only_v6(false).unwrap();
        socket.set_reuse_address(true).unwrap();
        socket.set_reuse_port(true).unwrap();
        socket.bind(&SockAddr::from(SocketAddr::new("::".parse().unwrap(), port))).unwrap();
        socket.listen(backlog).unwrap();
        interceptor.own_socket_marker().mark_listener(socket.as_fd()).unwrap();
        socket
    }

    /// A listener and an enrolment.
    pub(crate) fn capture(&self, interceptor: &mut Interceptor) -> Socket {
        self.capture_by(interceptor, enrolment())
    }

    /// A listener and this enrolment.
    pub(crate) fn capture_by(&self, interceptor: &mut Interceptor, enrolment: Enrolment) -> Socket {
        let listener = self.capture_listener(interceptor, CAPTURE_PORT, 128);
        interceptor.enrol(self.cookie, enrolment).unwrap();
        listener
    }

    /// Connects an application's socket; the socket's errno on failure.
    pub(crate) fn connect(&self, to: &str) -> Result<Socket, i32> {
        let to: SocketAddr = to.parse().unwrap();
        let socket = self.app_socket(Domain::for_address(to));
        connect(&socket, to).map(|()| socket)
    }
}

pub(crate) fn connect(socket: &Socket, to: SocketAddr) -> Result<(), i32> {
    socket.connect(&to.into()).map_err(|error| error.raw_os_error().unwrap_or(-1))
}

/// connect(AF_UNSPEC): the socket is as new, with a few exceptions.
pub(crate) fn disconnect(socket: &Socket) {
    let unspec = libc::sockaddr { sa_family: libc::AF_UNSPEC as u16, sa_data: [0; 14] };
    let length = size_of_val(&unspec) as u32;
    // SAFETY: a valid socket address of that length.
    let result = unsafe { libc::connect(socket.as_raw_fd(), &raw const unspec, length) };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
}

/// Closes with a RST.
pub(crate) fn reset(socket: Socket) {
    socket.set_linger(Some(Duration::ZERO)).unwrap();
    drop(socket);
}

/// A process that holds a socket, and nothing else, until it is killed.
pub(crate) struct Holder(Pid);

impl Holder {
    /// For one who is [`alone`].
    pub(crate) fn of(socket: &Socket) -> Self {
        let (ours, theirs) =
            socketpair(AddressFamily::Unix, SockType::Stream, None, SockFlag::SOCK_CLOEXEC).unwrap();
        // SAFETY: the child only makes system calls.
        match unsafe { fork() }.unwrap() {
            // SAFETY: as above. Other tests' files would never be closed.
            ForkResult::Child => unsafe {
                libc::dup2(socket.as_raw_fd(), 0);
                libc::dup2(theirs.as_raw_fd(), 1);
                libc::syscall(libc::SYS_close_range, 2, u32::MAX, 0);
                libc::close(1);
                loop {
                    libc::pause();
                }
            },
            ForkResult::Parent { child } => {
                drop(theirs);
                // Until it has closed its end.
                assert_eq!(nix::unistd::read(&ours, &mut [0]).unwrap(), 0);
                Self(child)
            }
        }
    }
}

/// While this is held, no process is forked that has the test's sockets for a moment: what is closed is closed.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    static ALONE: Mutex<()> = Mutex::new(());
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Drop for Holder {
    fn drop(&mut self) {
        let _ = nix::sys::signal::kill(self.0, nix::sys::signal::Signal::SIGKILL);
        let _ = nix::sys::wait::waitpid(self.0, None);
    }
}

pub(crate) fn accept(listener: &Socket) -> Socket {
    listener.accept().unwrap_or_else(|error| panic!("accept: {error}")).0
}

pub(crate) fn original_dst(interceptor: &Interceptor, accepted: &Socket) -> Option<SocketAddr> {
    interceptor.original_dst_reader().read(accepted.as_fd()).unwrap()
}

pub(crate) fn peer(socket: &Socket) -> SocketAddr {
    socket.peer_addr().unwrap().as_socket().unwrap()
}

pub(crate) fn local(socket: &Socket) -> SocketAddr {
    socket.local_addr().unwrap().as_socket().unwrap()
}

pub(crate) fn canonical(addr: SocketAddr) -> SocketAddr {
    SocketAddr::new(addr.ip().to_canonical(), addr.port())
}

pub(crate) fn pod_ip(v6: bool) -> IpAddr {
    if v6 { POD_V6 } else { POD_V4 }.parse().unwrap()
}

pub(crate) fn netns_cookie(socket: &Socket) -> u64 {
    const SO_NETNS_COOKIE: i32 = 71;
    let (mut cookie, mut length) = (0_u64, 8_u32);
    let fd = socket.as_raw_fd();
    // SAFETY: room for the eight bytes that this option has.
    let result = unsafe {
        libc::getsockopt(fd, libc::SOL_SOCKET, SO_NETNS_COOKIE, (&raw mut cookie).cast(), &raw mut length)
    };
    assert_eq!(result, 0, "{}", io::Error::last_os_error());
    cookie
}

/// One counter.
pub(crate) fn count(interceptor: &Interceptor, reason: Reason) -> u64 {
    interceptor.counters().unwrap()[reason as usize].1
}

/// The counters that aren't zero, for whole-picture assertions.
pub(crate) fn counts(interceptor: &Interceptor) -> Vec<(&'static str, u64)> {
    let all = interceptor.counters().unwrap();
    all.into_iter().filter(|(_, n)| *n > 0).map(|(reason, n)| (reason.label(), n)).collect()
}

/// Waits until nothing is in flight (closing a socket is partly asynchronous).
pub(crate) fn settled(interceptor: &Interceptor) {
    let deadline = Instant::now() + LONG;
    while interceptor.in_flight_len().unwrap() > 0 {
        assert!(Instant::now() < deadline, "{} entries stay in flight", interceptor.in_flight_len().unwrap());
        std::thread::sleep(Duration::from_millis(2));
    }
}
