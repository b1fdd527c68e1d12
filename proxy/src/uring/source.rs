//! Waiting for one file, in as many ways at once as a task needs.

use std::fmt;
use std::future::poll_fn;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::pin::Pin;
use std::task::{Context, Poll, ready as ready_or_pending};

use socket2::Socket;
use tokio::io::unix::{AsyncFd, AsyncFdReadyGuard};

use super::{Engine, RUNNING, op};
use crate::sys::socket;

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
/// [`super::reset`] has completed its waits, [`Source::release`] saves that.
pub struct Source<F: File> {
    /// epoll's registration: always with [`Engine::Epoll`]; with io_uring only once a wait is needed that
    /// the peer's FIN would spoil. Declared before the file, because it must go first.
    epoll: Option<Box<AsyncFd<Registered>>>,
    file: F,
    readable: Option<op::Poll>,
    writable: Option<op::Poll>,
    hang_up: Option<op::Poll>,
    /// io_uring has reported the peer's FIN where only something else was asked for.
    fin_spoils: bool,
}

/// A wait for the end of a connection between two owners. It holds the file: give it to [`Source::adopt`].
#[must_use]
pub struct PendingHangUp(op::Poll);

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

type EdgePoll = for<'a> fn(
    &'a AsyncFd<Registered>,
    &mut Context<'_>,
) -> Poll<io::Result<AsyncFdReadyGuard<'a, Registered>>>;

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
        Self { epoll: None, file, readable: None, writable: None, hang_up: None, fin_spoils: false }
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
        self.readable.is_some() || self.writable.is_some() || self.hang_up.is_some()
    }

    /// Waits for [`Interest::Readable`]. Must be called in a running runtime, as the other waits.
    pub fn poll_readable(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        const EVENTS: libc::c_short = libc::POLLIN | libc::POLLRDHUP;
        if engine() == Engine::Epoll {
            return self.poll_epoll(AsyncFd::poll_read_ready, EVENTS, cx);
        }
        poll_ring(&mut self.readable, self.file.as_fd(), EVENTS, cx)
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
        if engine() == Engine::IoUring && !self.fin_spoils {
            let readiness =
                ready_or_pending!(poll_ring(&mut self.writable, self.file.as_fd(), libc::POLLOUT, cx))?;
            if readiness.is_writable() {
                return Poll::Ready(Ok(readiness));
            }
            self.fin_spoils = true;
        }
        self.poll_epoll(AsyncFd::poll_write_ready, libc::POLLOUT, cx)
    }

    /// Waits for [`Interest::HangUp`].
    pub fn poll_hang_up(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Readiness>> {
        if engine() == Engine::IoUring && !self.fin_spoils {
            let readiness = ready_or_pending!(poll_ring(&mut self.hang_up, self.file.as_fd(), 0, cx))?;
            if readiness.is_hung_up() {
                return Poll::Ready(Ok(readiness));
            }
            self.fin_spoils = true;
        }
        // epoll has no wait for the hang-up alone; "writable" is the next best: it is edge-triggered and rare.
        self.poll_epoll(AsyncFd::poll_write_ready, 0, cx)
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
    /// [adopt](Self::adopt). Cancelling it would have the kernel look at every wait of the worker.
    pub fn take_hang_up(&mut self) -> Option<PendingHangUp> {
        self.hang_up.take().map(PendingHangUp)
    }

    /// Goes on with a wait that another source of the same file had begun.
    pub fn adopt(&mut self, pending: Option<PendingHangUp>) {
        self.hang_up = pending.map(|pending| pending.0);
    }

    /// Forgets its waits without cancelling them: they have completed, as far as the kernel is concerned.
    pub fn release(&mut self) {
        self.readable = None;
        self.writable = None;
        self.hang_up = None;
    }

    /// epoll tells edges, and tokio remembers them; only the file itself knows what holds now.
    fn poll_epoll(
        &mut self,
        poll_edge: EdgePoll,
        events: libc::c_short,
        cx: &mut Context<'_>,
    ) -> Poll<io::Result<Readiness>> {
        loop {
            // In this order: an edge after the look would be remembered, and wake the task.
            let edge = match poll_edge(self.epoll()?, cx) {
                Poll::Ready(guard) => {
                    guard?.clear_ready();
                    true
                }
                Poll::Pending => false,
            };
            let now = socket::events_now(self.file.as_fd(), events);
            if now != 0 {
                return Poll::Ready(Ok(Readiness(now)));
            }
            if !edge {
                return Poll::Pending;
            }
        }
    }

    fn epoll(&mut self) -> io::Result<&AsyncFd<Registered>> {
        if self.epoll.is_none() {
            let registered = Registered(self.file.as_fd().as_raw_fd());
            let interest = match engine() {
                Engine::Epoll => tokio::io::Interest::READABLE | tokio::io::Interest::WRITABLE,
                Engine::IoUring => tokio::io::Interest::WRITABLE,
            };
            // SAFETY: a `File` keeps the descriptor open, and the same, as long as it lives; it is a field
            // of this struct that is dropped after the registration, and nothing takes it out.
            let registered = unsafe { AsyncFd::register_with_interest(registered, interest)? };
            self.epoll = Some(Box::new(registered));
        }
        Ok(self.epoll.as_ref().expect("set above"))
    }
}

impl<F: File> Drop for Source<F> {
    fn drop(&mut self) {
        // Outside of a runtime its end is under way, which cancels everything that is left and waits for it.
        if self.is_pending() && RUNNING.get() == Some(Engine::IoUring) {
            op::cancel(self.file.as_fd());
        }
    }
}

impl<F: File + fmt::Debug> fmt::Debug for Source<F> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Source")
            .field("file", &self.file)
            .field("readable", &self.readable.is_some())
            .field("writable", &self.writable.is_some())
            .field("hang_up", &self.hang_up.is_some())
            .field("epoll", &self.epoll.is_some())
            .finish_non_exhaustive()
    }
}

/// One wait that nobody else shares. Dropping it cancels it.
pub async fn ready(fd: BorrowedFd<'_>, interest: Interest) -> io::Result<Readiness> {
    let mut source = Source::new(fd);
    poll_fn(|cx| source.poll(interest, cx)).await
}

fn engine() -> Engine {
    RUNNING.get().expect("waits need uring::start")
}

fn poll_ring(
    slot: &mut Option<op::Poll>,
    fd: BorrowedFd<'_>,
    events: libc::c_short,
    cx: &mut Context<'_>,
) -> Poll<io::Result<Readiness>> {
    loop {
        let poll = slot.get_or_insert_with(|| op::poll(fd, events));
        let result = ready_or_pending!(Future::poll(Pin::new(poll), cx));
        *slot = None;
        match result {
            // Another wait on the same file was cancelled; this one was not meant.
            result if result == -libc::ECANCELED => {}
            result if result < 0 => return Poll::Ready(Err(io::Error::from_raw_os_error(-result))),
            events => return Poll::Ready(Ok(Readiness(events as libc::c_short))),
        }
    }
}
