//! Network namespaces: opening one, telling them apart, and creating sockets inside another one.
//!
//! A socket belongs for life to the network namespace that its creating *thread* was in at socket(2); accepted
//! sockets belong to their listener's. Reading, writing, polling, connecting and closing work from any thread in any
//! namespace, and so do io_uring operations, which act on the file. So only socket creation needs setns(2), and a
//! worker can serve all pods of a node.
//!
//! # Which thread is where
//! setns moves one thread. The only two ways to move in this crate are [`NetNs::enter`] (a guard, for a few steps in
//! another namespace) and [`with_socket_namespace`] (no way back by itself: the thread stays until somebody asks for
//! another namespace, so that consecutive upstream sockets of one pod cost no system call). Both keep a per-thread
//! record that changes only after setns succeeded, so it is never wrong. What follows for threads that use the
//! second:
//!
//! * they create *every* socket through it, the host's own too (`None`);
//! * they don't start threads, which would inherit their namespace (go [`home`] first);
//! * they don't read `/proc/thread-self/net`. `/proc/self/net`, files, DNS and logging don't depend on it: names are
//!   resolved on the main thread, which never moves;
//! * when a namespace is forgotten they call [`leave`], because a thread keeps the namespace that it is in alive.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::marker::PhantomData;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::linux::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use nix::sched::{CloneFlags, setns};

/// Tells live network namespaces apart. Unique only while the namespace lives: the kernel gives the inode number
/// away again. Whoever keeps an id keeps a [`NetNs`] (which keeps the namespace alive) beside it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NetNsId {
    /// Device number of nsfs.
    pub dev: u64,
    /// Inode number, as in `net:[4026531840]`.
    pub inode: u64,
}

impl NetNsId {
    /// Of the network namespace that a process is in, without opening it. Fails with `NotFound` when the process is
    /// gone, and for a zombie, which is in no namespace any more.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let meta = std::fs::metadata(format!("/proc/{pid}/ns/net"))?;
        Ok(Self { dev: meta.st_dev(), inode: meta.st_ino() })
    }
}

/// An open network namespace. It lives at least as long as this value.
#[derive(Debug)]
pub struct NetNs {
    file: File,
    id: NetNsId,
    cookie: u64,
}

impl NetNs {
    /// The namespace that the calling thread is in.
    pub fn current() -> io::Result<Self> {
        let (file, id) = open_file(HERE.as_ref())?;
        Ok(Self { file, id, cookie: cookie_here()? })
    }

    /// The namespace that a process is in now.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        Self::open(Path::new(&format!("/proc/{pid}/ns/net")))
    }

    /// From a path such as `/proc/PID/ns/net` or `/run/netns/NAME`. Needs CAP_SYS_ADMIN: the cookie can only be read
    /// from inside. Fails with `InvalidInput` when the path is no network namespace.
    pub fn open(path: &Path) -> io::Result<Self> {
        let (file, id) = open_file(path)?;
        let mut ns = Self { file, id, cookie: 0 };
        let inside = ns.enter().map_err(|error| match error.raw_os_error() {
            Some(libc::EINVAL) => io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("{} is no network namespace", path.display()),
            ),
            _ => error,
        })?;
        let cookie = cookie_here();
        drop(inside);
        ns.cookie = cookie?;
        Ok(ns)
    }

    /// What tells it from other live namespaces.
    pub fn id(&self) -> NetNsId {
        self.id
    }

    /// The kernel's cookie: never used twice since boot. The eBPF programs know namespaces by it.
    pub fn cookie(&self) -> u64 {
        self.cookie
    }

    /// Moves the calling thread into this namespace until the guard is dropped. Guards nest. A failure to get back
    /// ends the process.
    pub fn enter(&self) -> io::Result<Entered<'_>> {
        let before = THREAD.with_borrow_mut(|thread| {
            let here = thread.whereabouts()?;
            if here == self.id {
                return Ok(None);
            }
            let (file, _) = open_file(HERE.as_ref())?;
            thread.switch(self.id, self.as_fd())?;
            io::Result::Ok(Some((here, file)))
        })?;
        Ok(Entered { inside: self, before, not_send: PhantomData })
    }
}

impl AsFd for NetNs {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }
}

/// The calling thread is in another network namespace; dropping this moves it back.
#[must_use = "the thread goes back when this is dropped"]
pub struct Entered<'a> {
    inside: &'a NetNs,
    /// Where the thread was. `None`: in `inside` already.
    before: Option<(NetNsId, File)>,
    /// The guard is about this thread.
    not_send: PhantomData<*const ()>,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let (id, file) = match &self.before {
            Some((id, file)) => (*id, file.as_fd()),
            None => (self.inside.id, self.inside.as_fd()),
        };
        // setns to an open namespace that the thread was in a moment ago can fail for want of memory only. A thread
        // that went on in a pod's network would connect from there for others: worse than no process.
        for _ in 0..100 {
            if THREAD.with_borrow_mut(|thread| thread.switch(id, file)).is_ok() {
                return;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        eprintln!("tidegate: can't leave network namespace {:?}: ending the process", self.inside.id);
        std::process::abort();
    }
}

/// Runs `create` with the calling thread in `namespace` (`None`: the one that the thread started in) and leaves the
/// thread there. No system call when it is there already. See the module's rules.
///
/// Fails when setns does (CAP_SYS_ADMIN is missing); `create` has not run then.
pub fn with_socket_namespace<R>(
    namespace: Option<&Arc<NetNs>>,
    create: impl FnOnce() -> io::Result<R>,
) -> io::Result<R> {
    match namespace {
        Some(ns) => THREAD.with_borrow_mut(|thread| {
            thread.whereabouts()?;
            thread.switch(ns.id, ns.as_fd())
        })?,
        None => home()?,
    }
    create()
}

/// Moves the calling thread back into the namespace that it started in.
pub fn home() -> io::Result<()> {
    THREAD.with_borrow_mut(|thread| match &thread.home {
        Some((id, file)) if thread.current != Some(*id) => {
            setns(file, CloneFlags::CLONE_NEWNET)?;
            thread.current = Some(*id);
            Ok(())
        }
        _ => Ok(()),
    })
}

/// Moves the calling thread home if it is in `namespace`, so that it doesn't keep the namespace alive.
pub fn leave(namespace: &NetNs) -> io::Result<()> {
    if THREAD.with_borrow(|thread| thread.current == Some(namespace.id)) { home() } else { Ok(()) }
}

/// The calling thread's own path to its namespace.
const HERE: &str = "/proc/thread-self/ns/net";

/// What is known about the calling thread. Empty until it is first asked to move: other threads cost no file
/// descriptor.
struct Thread {
    /// Where it started.
    home: Option<(NetNsId, File)>,
    /// Where it is. Its id can't be given away: the thread keeps the namespace alive.
    current: Option<NetNsId>,
}

impl Thread {
    fn whereabouts(&mut self) -> io::Result<NetNsId> {
        if let Some(id) = self.current {
            return Ok(id);
        }
        let (file, id) = open_file(HERE.as_ref())?;
        self.home = Some((id, file));
        self.current = Some(id);
        Ok(id)
    }

    fn switch(&mut self, id: NetNsId, fd: BorrowedFd<'_>) -> io::Result<()> {
        if self.current == Some(id) {
            return Ok(());
        }
        setns(fd, CloneFlags::CLONE_NEWNET)?;
        self.current = Some(id);
        Ok(())
    }
}

thread_local! {
    static THREAD: RefCell<Thread> = const { RefCell::new(Thread { home: None, current: None }) };
}

fn open_file(path: &Path) -> io::Result<(File, NetNsId)> {
    let file = File::open(path)?;
    let meta = file.metadata()?;
    Ok((file, NetNsId { dev: meta.st_dev(), inode: meta.st_ino() }))
}

/// Cookie of the network namespace that the calling thread is in.
fn cookie_here() -> io::Result<u64> {
    // A unix socket has a network namespace too, and works where IPv4 or IPv6 is off.
    let socket = UnixDatagram::unbound()?;
    let mut cookie = 0_u64;
    let mut len = size_of::<u64>() as libc::socklen_t;
    // SAFETY: the pointers name a u64 and its length, both live across the call; the kernel writes at most `len`.
    let rc = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::SOL_SOCKET,
            libc::SO_NETNS_COOKIE,
            (&raw mut cookie).cast(),
            &raw mut len,
        )
    };
    if rc == 0 { Ok(cookie) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
pub(crate) mod testing {
    use super::*;

    /// A new network namespace that lives as long as the value. Its `lo` is down, as the kernel makes it.
    pub(crate) fn new_namespace() -> Arc<NetNs> {
        std::thread::spawn(|| {
            nix::sched::unshare(CloneFlags::CLONE_NEWNET)
                .expect("these tests need root (unshare CLONE_NEWNET)");
            Arc::new(NetNs::current().expect("own namespace"))
        })
        .join()
        .expect("unshare thread")
    }

    /// Where the thread really is, as the kernel says.
    pub(crate) fn really_in() -> NetNsId {
        open_file(HERE.as_ref()).unwrap().1
    }
}

#[cfg(test)]
mod tests {
    use std::net::{TcpListener, TcpStream};

    use super::testing::{new_namespace, really_in};
    use super::*;

    #[test]
    fn a_guard_moves_the_thread_and_back_even_on_panic() {
        let outside = really_in();
        let (a, b) = (new_namespace(), new_namespace());
        assert_ne!(a.id(), b.id());
        assert_ne!(a.cookie(), b.cookie());
        {
            let _in_a = a.enter().unwrap();
            assert_eq!(really_in(), a.id());
            assert_eq!(cookie_here().unwrap(), a.cookie());
            {
                let _in_b = b.enter().unwrap();
                assert_eq!(really_in(), b.id());
                let _again = b.enter().unwrap();
            }
            assert_eq!(really_in(), a.id());
        }
        assert_eq!(really_in(), outside);
        let panicked = std::panic::catch_unwind(|| {
            let _in_a = a.enter().unwrap();
            panic!("on purpose");
        });
        assert!(panicked.is_err());
        assert_eq!(really_in(), outside);
    }

    #[test]
    fn sockets_stay_where_they_were_made_and_the_thread_is_lazy() {
        let pod = new_namespace();
        let listen = |ns: Option<&Arc<NetNs>>| {
            with_socket_namespace(ns, || TcpListener::bind("0.0.0.0:0")).unwrap().local_addr().unwrap().port()
        };
        let outside = really_in();
        let inside = with_socket_namespace(Some(&pod), || TcpListener::bind("0.0.0.0:0")).unwrap();
        assert_eq!(really_in(), pod.id(), "no way back without need");
        let port = inside.local_addr().unwrap().port();
        // `lo` is down in there: connecting must fail with "unreachable", not find a listener of the host.
        let error =
            with_socket_namespace(Some(&pod), || TcpStream::connect(("127.0.0.1", port))).unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::ENETUNREACH));
        assert_ne!(listen(None), 0);
        assert_eq!(really_in(), outside);
        // A failing creation leaves a truthful record.
        let refused = with_socket_namespace(Some(&pod), || Err::<(), _>(io::Error::other("refused")));
        assert_eq!(refused.unwrap_err().to_string(), "refused");
        assert_eq!(really_in(), pod.id());
        leave(&new_namespace()).unwrap();
        assert_eq!(really_in(), pod.id());
        leave(&pod).unwrap();
        assert_eq!(really_in(), outside);
    }

    #[test]
    fn guards_and_lazy_moves_mix() {
        let outside = really_in();
        let (a, b) = (new_namespace(), new_namespace());
        with_socket_namespace(Some(&a), || Ok(())).unwrap();
        drop(b.enter().unwrap());
        assert_eq!(really_in(), a.id());
        {
            let _in_b = b.enter().unwrap();
            let again = b.enter().unwrap();
            with_socket_namespace(None, || Ok(())).unwrap();
            assert_eq!(really_in(), outside);
            drop(again);
            assert_eq!(really_in(), b.id());
            with_socket_namespace(None, || Ok(())).unwrap();
        }
        assert_eq!(really_in(), a.id());
        home().unwrap();
        assert_eq!(really_in(), outside);
    }

    #[test]
    fn what_is_no_network_namespace_is_refused() {
        for path in ["/proc/self/ns/uts", "/proc/self/stat"] {
            let error = NetNs::open(Path::new(path)).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput, "{path}: {error}");
            assert!(error.to_string().contains(path), "{error}");
        }
        assert_eq!(NetNs::of_process(u32::MAX).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert_eq!(NetNsId::of_process(std::process::id()).unwrap(), really_in());
    }
}
