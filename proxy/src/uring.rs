//! The runtime of a worker, and waiting for sockets. The only place that names io-uring and tokio-uring.
//!
//! The seam is small on purpose: [`start`] a worker's runtime, [`spawn`] tasks, wait for a [`Source`] or for
//! [`time`], [`connect`], accept with an [`Acceptor`], and end a socket with [`close_gracefully`] or [`reset`].
//!
//! There are three engines. [`Engine::IoUring`] is a ring and an executor of our own (`ring`, `executor`): one system
//! call hands over and takes back whatever there is, and small messages are received into buffers of the ring. The
//! others are for kernels that don't have what it needs: tokio-uring, which waits for its ring with epoll and so
//! enters the kernel twice per turn, and plain epoll. docs/performance.md has the figures.
//!
//! What a wait finds is a hint, and the work is a nonblocking system call; only [`Source::poll_receive`] has the
//! kernel receive by itself.
//!
//! Two facts of io_uring shape this:
//! - **A pending operation holds its file.** Closing the descriptor ends neither: the peer sees nothing, the file
//!   leaks. So a [`Source`] that is dropped while it waits has its operations cancelled: by number, and with
//!   tokio-uring through a duplicate of the descriptor, which lives until the cancellation is through.
//! - **A poll always reports `EPOLLRDHUP`**, asked for or not. After the peer's FIN, a poll for "writable"
//!   completes at once for ever. So such waits ask for edges instead.
//!
//! A task must not wake itself in a loop (`yield_now`): tokio-uring's ring is flushed when the thread parks, and a
//! thread that always has something to do never parks. Wait for readiness instead.
#![allow(unsafe_code)]

mod buffers;
mod bytes;
mod courtesy;
mod executor;
mod ring;
mod source;
pub mod time;
mod timers;
mod tokio_op;

use std::cell::Cell;
use std::fmt;
use std::future::poll_fn;
use std::io;
use std::net::{Shutdown, SocketAddr};
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use socket2::{SockAddr, Socket};
use thiserror::Error;

use crate::sys::socket;

pub use bytes::{Bytes, Received, Sending, flush_sends, hurry_sends};
pub use source::{File, Interest, PendingHangUp, Readiness, Source, can_receive, ready};

/// Submission queue entries: how many waits are handed to the kernel at once before it must be entered early.
const SUBMISSIONS: u32 = 512;
/// Completion queue entries (16 bytes each). Past it the kernel keeps completions in a list: slower, not lost.
const COMPLETIONS: u32 = 4096;

/// What a worker waits with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Engine {
    /// io_uring, with a ring and an executor of our own; Linux 6.1 or newer.
    IoUring,
    /// io_uring through tokio-uring; Linux 5.19 or newer.
    TokioUring,
    /// epoll: for kernels and containers that have no io_uring. More memory per idle connection.
    Epoll,
}

impl fmt::Display for Engine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::IoUring => "io_uring",
            Self::TokioUring => "tokio-uring",
            Self::Epoll => "epoll",
        })
    }
}

/// Why there is no io_uring, or no runtime at all.
#[derive(Debug, Error)]
pub enum StartError {
    /// `EPERM`.
    #[error(
        "io_uring is forbidden here: kernel.io_uring_disabled is not 0 (`sysctl -w kernel.io_uring_disabled=0`), \
         or the container's seccomp profile blocks io_uring_setup (allow io_uring_setup, io_uring_enter and \
         io_uring_register)"
    )]
    Forbidden,
    /// `ENOSYS`, or not even the oldest flags that are needed.
    #[error("the kernel has no io_uring of Linux 5.19 or newer, or the container's seccomp profile hides it")]
    TooOld,
    /// `ENOMEM` or `EMFILE`.
    #[error("io_uring got no memory or descriptor: {0} (raise `ulimit -l` and `ulimit -n`)")]
    NoResources(#[source] io::Error),
    /// Anything else.
    #[error("can't start a worker's runtime: {0}")]
    Other(#[source] io::Error),
}

impl From<io::Error> for StartError {
    fn from(error: io::Error) -> Self {
        match error.raw_os_error() {
            Some(libc::EPERM | libc::EACCES) => Self::Forbidden,
            Some(libc::ENOSYS | libc::EINVAL) => Self::TooOld,
            Some(libc::ENOMEM | libc::EMFILE | libc::ENFILE) => Self::NoResources(error),
            _ => Self::Other(error),
        }
    }
}

thread_local! {
    /// The engine of the runtime whose future is running on this thread; none outside of one.
    static RUNNING: Cell<Option<Engine>> = const { Cell::new(None) };
}

/// The best engine that this process may use here, and why not a better one.
pub fn best() -> (Engine, Option<StartError>) {
    let Err(_) = ring::build(8) else { return (Engine::IoUring, None) };
    match with_flags(|builder| builder.build(8).map(drop)) {
        Ok(()) => (Engine::TokioUring, None),
        Err(error) => (Engine::Epoll, Some(error)),
    }
}

/// Runs `future` on this thread until it completes, in a runtime of its own, which has [`spawn`] and [`time`].
/// Tasks that are left are dropped at the end.
///
/// With tokio's engines `future` itself is polled whenever any task is woken, so let it only wait, and spawn what has
/// work to do.
///
/// # Errors
/// When there is no such runtime to be had. Also when the kernel refuses to go on with the ring, which is a bug.
pub fn start<F: Future>(engine: Engine, future: F) -> Result<F::Output, StartError> {
    let future = async {
        let _running = Running::enter(engine);
        future.await
    };
    match engine {
        Engine::IoUring => {
            let remote = executor::Remote::new().map_err(StartError::NoResources)?;
            let driver = Rc::new(ring::Driver::new(ring::build(SUBMISSIONS)?, remote));
            executor::run(&driver, future).map_err(StartError::Other)
        }
        Engine::TokioUring => {
            let runtime = with_flags(|flags| {
                let mut builder = tokio_uring::builder();
                builder.entries(SUBMISSIONS).uring_builder(flags.clone().setup_cqsize(COMPLETIONS));
                tokio_uring::Runtime::new(&builder)
            })?;
            Ok(runtime.block_on(future))
        }
        Engine::Epoll => {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
            let runtime = runtime.map_err(StartError::Other)?;
            Ok(tokio::task::LocalSet::new().block_on(&runtime, future))
        }
    }
}

/// Runs a task beside the others of this thread's runtime. It is dropped, wherever it is, when the runtime ends.
pub fn spawn(future: impl Future<Output = ()> + 'static) {
    match engine() {
        Engine::IoUring => ring::with(|driver| executor::spawn(driver.remote(), future)),
        Engine::TokioUring | Engine::Epoll => drop(tokio::task::spawn_local(future)),
    }
}

/// How long this thread's runtime looks for the next message before it sleeps, where messages have come in quick
/// succession for one task, and nobody else wants the CPU. Zero, with which a runtime starts: not at all. It matters with
/// [`Engine::IoUring`] only.
pub fn set_busy_poll(window: Duration) {
    if engine() == Engine::IoUring {
        ring::with(|driver| driver.set_busy_poll(window));
    }
}

/// Whether this thread's runtime offers its CPU to others after each megabyte of bulk; otherwise, as a runtime starts, only
/// where it gives on small messages in between. It matters with [`Engine::IoUring`] only.
pub fn offer_cpu_always(always: bool) {
    if engine() == Engine::IoUring {
        ring::with(|driver| driver.offer_cpu_always(always));
    }
}

/// Waits that the running task begins while this lives are for bulk. When they have ended, those who wait for small
/// messages go first: one task that moves bulk runs, and then they again.
#[must_use = "waits are for bulk while it lives"]
pub struct Bulk(());

impl Bulk {
    /// Must be made in a running runtime.
    pub fn begin() -> Self {
        Self::set(true);
        Self(())
    }

    fn set(bulk: bool) {
        if engine() == Engine::IoUring {
            ring::with(|driver| driver.set_bulk(bulk));
        }
    }
}

impl Drop for Bulk {
    fn drop(&mut self) {
        Self::set(false);
    }
}

fn engine() -> Engine {
    RUNNING.get().expect("waits need uring::start")
}

/// Tries the flags from best to oldest.
///
/// `COOP_TASKRUN` (5.19) saves an interrupt per completion and is required, as is cancelling by descriptor,
/// which came with it. `SINGLE_ISSUER` (6.0) saves locking. `DEFER_TASKRUN` would hang: tokio-uring waits for
/// the ring with epoll and never enters it to run deferred work.
fn with_flags<T>(mut attempt: impl FnMut(&mut io_uring::Builder) -> io::Result<T>) -> Result<T, StartError> {
    let best = attempt(io_uring::IoUring::builder().setup_coop_taskrun().setup_single_issuer());
    match best {
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {
            Ok(attempt(io_uring::IoUring::builder().setup_coop_taskrun())?)
        }
        result => Ok(result?),
    }
}

/// While it lives, waits may be submitted on this thread.
struct Running;

impl Running {
    fn enter(engine: Engine) -> Self {
        RUNNING.set(Some(engine));
        Self
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        RUNNING.set(None);
    }
}

/// Connects a nonblocking socket. Box this future: it is needed only at a connection's start.
///
/// Errors are those of connect(2): `ConnectionRefused`, `TimedOut`, … There is no timeout here; drop the
/// future to give up, then close the socket.
pub async fn connect(socket: &Socket, address: &SockAddr) -> io::Result<()> {
    if socket::connect(socket, address)? {
        return Ok(());
    }
    connected(socket.as_fd()).await
}

/// Waits for the end of a connect(2) that is under way. Errors as [`connect`].
pub async fn connected(socket: BorrowedFd<'_>) -> io::Result<()> {
    // An error is a hang-up to poll(2), too: nothing to ask for where there is none.
    if ready(socket, Interest::Writable).await?.is_hung_up()
        && let Some(error) = socket::error(socket)?
    {
        return Err(error);
    }
    Ok(())
}

/// A listening socket that is waited for.
#[derive(Debug)]
pub struct Acceptor {
    source: Source<Socket>,
    /// A connection is believed to wait. Without it, whatever else wakes the task would cost an accept4.
    waiting: bool,
}

impl Acceptor {
    /// Of a nonblocking listening socket.
    pub fn new(listener: Socket) -> Self {
        Self { source: Source::new(listener), waiting: true }
    }

    /// The listening socket.
    pub fn listener(&self) -> &Socket {
        self.source.file()
    }

    /// Ready with the next connection (nonblocking) and its peer's address. Several that wait are taken one
    /// after the other without a wait between. See [`socket::is_transient_accept_error`] for errors.
    pub fn poll_accept(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<(Socket, SocketAddr)>> {
        loop {
            if !self.waiting {
                ready!(self.source.poll_readable(cx))?;
                self.waiting = true;
            }
            match socket::accept(self.listener()) {
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => self.waiting = false,
                result => return Poll::Ready(result),
            }
        }
    }

    /// As [`Acceptor::poll_accept`]. May be dropped and called again: the wait goes on in between.
    pub async fn accept(&mut self) -> io::Result<(Socket, SocketAddr)> {
        poll_fn(|cx| self.poll_accept(cx)).await
    }
}

/// Sends a FIN after what was sent, and completes every wait on the socket, so that its [`Source`] may be
/// [released](Source::release) and the descriptor closed. Closing it with unread bytes still makes a RST, as always.
pub fn close_gracefully(socket: BorrowedFd<'_>) {
    // Only ENOTCONN is possible, and that is as good.
    let _ = socket::shutdown(socket, Shutdown::Both);
}

/// Sends a RST. True when that has completed every wait on the socket, so that its [`Source`] may be
/// [released](Source::release). Otherwise the kernel refused, and closing will send it: drop the [`Source`], which
/// cancels its waits, then close.
pub fn reset(socket: BorrowedFd<'_>) -> bool {
    if socket::disconnect(socket).is_ok() {
        return true;
    }
    // SO_LINGER can fail on no stream socket.
    let _ = socket::reset_on_close(socket);
    false
}

#[cfg(test)]
mod tests;
