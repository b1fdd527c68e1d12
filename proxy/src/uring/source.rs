//! Waiting for one file, in as many ways at once as a task needs.

mod receive;

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready as ready_or_pending};

use socket2::Socket;
use tokio::io::unix::AsyncFd;

use super::ring::Key;
use super::{Engine, RUNNING, engine, ring, tokio_op};
use crate::sys::socket;

pub use receive::can_receive;

/// What a wait is for. The end of the connection (RST, or FIN both ways) ends each of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interest {
    /// Something to read, a FIN included.
    Readable,
    /// Room to write.
    Writable,
    /// Only the end of the connection. The peer's FIN alone is not the end.
    HangUp,
}

/// What a wait found.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Readiness(libc::c_short);

impl Readiness {
    /// Something to read, a FIN included.
    pub fn is_readable(self) -> bool {
        self.0 & (libc::POLLIN | libc::POLLRDHUP) != 0 || self.is_hung_up()
    }

    /// Room to write, or an error to be had from writing.
    pub fn is_writable(self) -> bool {
        self.0 & libc::POLLOUT != 0 || self.is_hung_up()
    }

    /// The connection is over: reset, or FIN both ways.
    pub fn is_hung_up(self) -> bool {
        self.0 & (libc::POLLHUP | libc::POLLERR) != 0
    }
}

impl fmt::Debug for Readiness {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Readiness")
            .field("readable", &self.is_readable())
            .field("writable", &self.is_writable())
            .field("hung_up", &self.is_hung_up())
            .finish()
    }
}

/// A file that one task waits for. Waits stay pending between polls of the task, and across dropped futures.
///
/// A wait ends at once if what it waits for holds already. A finished wait is a hint: try the system call, and
/// expect `WouldBlock` again. Waiting for `Writable` and for `HangUp` at the same
/// time is redundant and not supported: `Writable` ends with a hang-up too.
///
/// Dropping it cancels what is pending (see the module's text). After [`super::close_gracefully`] or
/// [`super::reset`] has completed its waits, [`Source::release`] saves that where it can be saved.
pub struct Source<F: File> {
    /// Waits of the other engines. Declared before the file, because epoll's registration must go first.
    tokio: Option<Box<TokioWaits>>,
    file: F,
    readable: Key,
    writable: Key,
    hang_up: Key,
    /// Reports every change: for waits that the peer's FIN would spoil.
    watch: Key,
    receiving: Key,
    /// io_uring has reported the peer's FIN where only something else was asked for.
    fin_spoils: bool,
    /// No more is to be received through the ring than what is on its way.
    stopped: bool,
    /// Something was received through the ring. The first time it is into one buffer only: whoever begins with a lot
    /// shall not fill them all.
    has_received: bool,
}

#[derive(Default)]
struct TokioWaits {
    /// epoll's registration: always with [`Engine::Epoll`]; with [`Engine::TokioUring`] only once a wait is needed
    /// that the peer's FIN would spoil.
    epoll: Option<Box<AsyncFd<Registered>>>,
    readable: Option<tokio_op::Poll>,
    writable: Option<tokio_op::Poll>,
    hang_up: Option<tokio_op::Poll>,
}

/// A wait for the end of a connection between two owners. It holds the file: give it to [`Source::adopt`].
#[must_use]
pub struct PendingHangUp {
    wait: HangUpWait,
    fin_spoils: bool,
}

enum HangUpWait {
    Ring { once: Key, watch: Key },
    Tokio(Option<tokio_op::Poll>),
}

impl Drop for HangUpWait {
    fn drop(&mut self) {
        if let Self::Ring { once, watch } = self {
            ring::try_with(|driver| {
                driver.abandon(once);
                driver.abandon(watch);
            });
        }
    }
}

/// What may be waited for: types that name one and the same open descriptor as long as they live.
pub trait File: AsFd + sealed::Sealed {}

mod sealed {
    pub trait Sealed {}
}

impl File for Socket {}
impl sealed::Sealed for Socket {}
impl File for &Socket {}
impl sealed::Sealed for &Socket {}
impl File for BorrowedFd<'_> {}
impl sealed::Sealed for BorrowedFd<'_> {}

/// A descriptor in epoll's set; the [`Source`] that holds it has the file.
#[derive(Debug)]
struct Registered(RawFd);

impl AsRawFd for Registered {
    fn as_raw_fd(&self) -> RawFd {
        self.0
    }
}

impl<F: File> Source<F> {
    /// Nothing is submitted yet.
    pub fn new(file: F) -> Self {
        Self {
            tokio: None,
            file,
            readable: Key::default(),
            writable: Key::default(),
            hang_up: Key::default(),
            watch: Key::default(),
            receiving: Key::default(),
            fin_spoils: false,
            stopped: false,
            has_received: false,
        }
    }

    /// The file.
    pub fn file(&self) -> &F {
        &self.file
    }

    /// Its descriptor.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.file.as_fd()
    }

    /// Whether a wait is in the kernel's hands.
    pub fn is_pending(&self) -> bool {
        self.keys().iter().any(|key| !key.is_none())
            || self.tokio.as_ref().is_some_and(|waits| waits.is_pending())
    }

    /// Whether a wait is in the kernel's hands that only the end of the connection takes back cheaply: use
    /// [`super::close_gracefully`] before closing the file.
    pub fn needs_shutdown(&self) -> bool {
        self.tokio.as_ref().is_some_and(|waits| waits.is_pending())
    }

    fn keys(&self) -> [&Key; 5] {
        [&self.readable, &self.writable, &self.hang_up, &self.watch, &self.receiving]
    }

    /// Waits for [`Interest::Readable`]. Must be called in a running runtime, as the other waits.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        const EVENTS: libc::c_short = libc::POLLIN | libc::POLLRDHUP;
        match engine() {
            Engine::IoUring => poll_ring(&mut self.readable, self.file.as_fd(), EVENTS, cx),
            Engine::TokioUring => {
                let waits = self.tokio.get_or_insert_default();
                poll_tokio(&mut waits.readable, self.file.as_fd(), EVENTS, cx)
            }
            Engine::Epoll => self.poll_edges(EpollEdge::Readable, EVENTS, cx),
        }
    }

    /// Gives the other tasks their turn before more is read, although more is there. The task must return
    /// `Pending` after it. False: wait with [`Source::poll_readable`] first; true: read at the next poll.
    ///
    /// A wait for what is there already does it with io_uring. Waking the task would not: the ring would
    /// never be flushed.
    pub fn give_way(&mut self, cx: &mut Context<'_>) -> io::Result<bool> {
        match self.poll_readable(cx)? {
            Poll::Pending => Ok(false),
            Poll::Ready(_) => {
                cx.waker().wake_by_ref();
                Ok(true)
            }
        }
    }

    /// Waits for [`Interest::Writable`].
    pub fn poll_writable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        if engine() != Engine::Epoll && !self.fin_spoils {
            let fd = self.file.as_fd();
            let readiness = match engine() {
                Engine::IoUring => poll_ring(&mut self.writable, fd, libc::POLLOUT, cx),
                _ => {
                    let waits = self.tokio.get_or_insert_default();
                    poll_tokio(&mut waits.writable, fd, libc::POLLOUT, cx)
                }
            };
            let readiness = ready_or_pending!(readiness)?;
            if readiness.is_writable() {
                return Poll::Ready(Ok(readiness));
            }
            self.fin_spoils = true;
        }
        self.poll_edges(EpollEdge::Writable, libc::POLLOUT, cx)
    }

    /// Waits for [`Interest::HangUp`].
    pub fn poll_hang_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        if engine() != Engine::Epoll && !self.fin_spoils {
            let fd = self.file.as_fd();
            let readiness = match engine() {
                Engine::IoUring => poll_ring(&mut self.hang_up, fd, 0, cx),
                _ => poll_tokio(&mut self.tokio.get_or_insert_default().hang_up, fd, 0, cx),
            };
            let readiness = ready_or_pending!(readiness)?;
            if readiness.is_hung_up() {
                return Poll::Ready(Ok(readiness));
            }
            self.fin_spoils = true;
        }
        // epoll has no wait for the hang-up alone; "writable" is the next best: it is edge-triggered and rare.
        self.poll_edges(EpollEdge::Writable, 0, cx)
    }

    /// Waits for `interest`.
    pub fn poll(&mut self, interest: Interest, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        match interest {
            Interest::Readable => self.poll_readable(cx),
            Interest::Writable => self.poll_writable(cx),
            Interest::HangUp => self.poll_hang_up(cx),
        }
    }

    /// The peer's FIN has come, so later waits need not find out that it spoils them.
    pub fn peer_has_sent_fin(&mut self) {
        self.fin_spoils = true;
    }

    /// Gives up the wait for [`Interest::HangUp`], if there is one, for another source of the same file to
    /// [adopt](Self::adopt): it need not be cancelled and begun again.
    pub fn take_hang_up(&mut self) -> Option<PendingHangUp> {
        let wait = match &mut self.tokio {
            Some(waits) => HangUpWait::Tokio(Some(waits.hang_up.take()?)),
            None if self.hang_up.is_none() && self.watch.is_none() => return None,
            None => {
                let (once, watch) = (std::mem::take(&mut self.hang_up), std::mem::take(&mut self.watch));
                HangUpWait::Ring { once, watch }
            }
        };
        Some(PendingHangUp { wait, fin_spoils: self.fin_spoils })
    }

    /// Goes on with a wait that another source of the same file had begun.
    pub fn adopt(&mut self, pending: Option<PendingHangUp>) {
        let Some(PendingHangUp { mut wait, fin_spoils }) = pending else { return };
        self.fin_spoils = fin_spoils;
        match &mut wait {
            HangUpWait::Ring { once, watch } => {
                (self.hang_up, self.watch) = (std::mem::take(once), std::mem::take(watch));
            }
            HangUpWait::Tokio(poll) => self.tokio.get_or_insert_default().hang_up = poll.take(),
        }
    }

    /// Forgets its waits without cancelling them, where the kernel has completed them for good.
    pub fn release(&mut self) {
        if let Some(waits) = &mut self.tokio {
            (waits.readable, waits.writable, waits.hang_up) = (None, None, None);
        }
    }

    /// epoll tells edges, and tokio remembers them, as does a watch of the ring; only the file itself knows what
    /// holds now.
    fn poll_edges(
        &mut self,
        edge: EpollEdge,
        events: libc::c_short,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Readiness>> {
        loop {
            // In this order: an edge after the look would be remembered, and wake the task.
            let happened = self.poll_edge(edge, cx)?;
            if !happened && engine() == Engine::IoUring {
                return Poll::Pending; // what held when the watch began was the first edge
            }
            let now = socket::events_now(self.file.as_fd(), events);
            if now != 0 {
                return Poll::Ready(Ok(Readiness(now)));
            }
            if !happened {
                return Poll::Pending;
            }
        }
    }

    fn poll_edge(&mut self, edge: EpollEdge, cx: &mut Context<'_>) -> io::Result<bool> {
        if engine() == Engine::IoUring {
            let fd = self.file.as_fd();
            return ring::with(|driver| driver.poll_watch(&mut self.watch, fd, libc::POLLOUT, cx));
        }
        let epoll = self.epoll()?;
        let ready = match edge {
            EpollEdge::Readable => epoll.poll_read_ready(cx),
            EpollEdge::Writable => epoll.poll_write_ready(cx),
        };
        match ready {
            Poll::Ready(guard) => {
                guard?.clear_ready();
                Ok(true)
            }
            Poll::Pending => Ok(false),
        }
    }

    fn epoll(&mut self) -> io::Result<&AsyncFd<Registered>> {
        let waits = self.tokio.get_or_insert_default();
        if waits.epoll.is_none() {
            let registered = Registered(self.file.as_fd().as_raw_fd());
            let interest = match engine() {
                Engine::Epoll => tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE,
                Engine::IoUring | Engine::TokioUring => tokio::io::Interest::WRITABLE,
            };
            // SAFETY: a `File` keeps the descriptor open, and the same, as long as it lives; it is a field
            // of this struct that is dropped after the registration, and nothing takes it out.
            let registered = unsafe { AsyncFd::register_with_interest(registered, interest)? };
            waits.epoll = Some(Box::new(registered));
        }
        Ok(waits.epoll.as_ref().expect("set above"))
    }
}

#[derive(Clone, Copy)]
enum EpollEdge {
    Readable,
    Writable,
}

impl TokioWaits {
    fn is_pending(&self) -> bool {
        self.readable.is_some() || self.writable.is_some() || self.hang_up.is_some()
    }
}

impl<F: File> Drop for Source<F> {
    fn drop(&mut self) {
        match &self.tokio {
            // Outside of a runtime its end is under way, which cancels everything that is left and waits for it.
            Some(waits) if waits.is_pending() && RUNNING.get() == Some(Engine::TokioUring) => {
                tokio_op::cancel(self.file.as_fd());
            }
            Some(_) => {}
            None => {
                ring::try_with(|driver| {
                    for key in [
                        &mut self.readable,
                        &mut self.writable,
                        &mut self.hang_up,
                        &mut self.watch,
                        &mut self.receiving,
                    ] {
                        driver.abandon(key);
                    }
                });
            }
        }
    }
}

impl<F: File + fmt::Debug> fmt::Debug for Source<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("file", &self.file)
            .field("pending", &self.is_pending())
            .finish_non_exhaustive()
    }
}

/// One wait that nobody else shares. Dropping it cancels it.
pub async fn ready(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Readiness> {
    let mut source = Source::new(fd);
    poll_fn(|cx| source.poll(interest, cx)).await
}

fn poll_ring(
    key: &mut Key,
    fd: BorrowedFd<'_>,
    events: libc::c_short,
    cx: &Context<'_>,
) -> Poll<io::Result<Readiness>> {
    ring::with(|driver| driver.poll_once(key, fd, events, cx)).map(readiness)
}

fn poll_tokio(
    slot: &mut Option<tokio_op::Poll>,
    fd: BorrowedFd<'_>,
    events: libc::c_short,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Readiness>> {
    loop {
        let poll = slot.get_or_insert_with(|| tokio_op::poll(fd, events));
        let result = ready_or_pending!(Future::poll(Pin::new(poll), cx));
        *slot = None;
        // When another wait on the same file was cancelled, this one was not meant.
        if result != -libc::ECANCELED {
            return Poll::Ready(readiness(result));
        }
    }
}

fn readiness(result: i32) -> io::Result<Readiness> {
    if result < 0 {
        return Err(io::Error::from_raw_os_error(-result));
    }
    Ok(Readiness(result as libc::c_short))
}
