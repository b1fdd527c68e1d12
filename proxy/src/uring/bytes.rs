//! Bytes that the ring has received, and those that it sends.

use std::fmt;
use std::io;
use std::marker::PhantomData;
use std::os::fd::BorrowedFd;
use std::task::{Context, Poll, ready};

use super::ring::Key;
use super::{Engine, buffers, engine, ring};

/// What [`super::Source::poll_receive`] has.
#[derive(Debug)]
pub enum Received {
    /// Bytes that the peer has sent.
    Bytes(Bytes),
    /// The peer's FIN.
    End,
    /// Nothing more comes this way: it was [stopped](super::Source::stop_receiving), or there is no buffer left. The rest of
    /// the stream is in the socket.
    Stopped,
}

/// Bytes in a buffer of the ring, which goes back when this is dropped.
pub struct Bytes {
    buffer: u16,
    len: u16,
}

/// Bytes on their way into a socket. They go with the next turn of the executor, together with all others: that is one
/// system call, and the peers that it wakes find more to do at once.
#[derive(Debug)]
pub struct Sending<'fd> {
    key: Key,
    bytes: Bytes,
    /// Must stay open.
    _fd: PhantomData<BorrowedFd<'fd>>,
}

impl Sending<'_> {
    /// Ready when it is over, with the bytes that the socket has taken; fewer than there were if it was full. The
    /// task may be woken only when something else happens: say [`hurry_sends`] if it has to go on.
    ///
    /// # Errors
    /// Those of send(2); none was taken then.
    pub fn poll(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let result = ready!(ring::with(|driver| driver.poll_end(&mut self.key, cx)));
        Poll::Ready(usize::try_from(result).map_err(|_| io::Error::from_raw_os_error(-result)))
    }

    /// What is sent.
    pub fn bytes(&self) -> &Bytes {
        &self.bytes
    }
}

impl Drop for Sending<'_> {
    fn drop(&mut self) {
        // Before the buffer goes back.
        ring::try_with(|driver| driver.abandon(&mut self.key));
    }
}

/// Has the tasks of all [`Sending`]s woken as soon as these are over.
pub fn hurry_sends() {
    ring::with(ring::Driver::hurry);
}

/// Makes sure that everything [`Bytes::send`] was called for is over.
pub fn flush_sends() {
    if engine() == Engine::IoUring {
        // If that fails the next turn of the executor does too, and ends it.
        ring::with(|driver| drop(driver.reap()));
    }
}

impl Bytes {
    /// Of a buffer that has come back with so many.
    pub(super) fn new(buffer: u16, len: usize) -> Self {
        debug_assert!(len <= buffers::SIZE);
        Self { buffer, len: len as u16 }
    }

    /// Whether they fill their buffer: more has probably come.
    pub fn is_full(&self) -> bool {
        self.len() == buffers::SIZE
    }

    /// Their count.
    pub fn len(&self) -> usize {
        self.len.into()
    }

    /// Sends them.
    pub fn send(self, to: BorrowedFd<'_>) -> Sending<'_> {
        let key = ring::with(|driver| driver.send(self.buffer, self.len(), to));
        Sending { key, bytes: self, _fd: PhantomData }
    }

    /// Never.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Calls `f` with them.
    pub fn with<T>(&self, f: impl FnOnce(&[u8]) -> T) -> T {
        ring::with(|driver| f(driver.bytes(self.buffer, self.len())))
    }
}

impl Drop for Bytes {
    fn drop(&mut self) {
        // Without a running driver the buffers are gone.
        ring::try_with(|driver| driver.recycle(self.buffer));
    }
}

impl fmt::Debug for Bytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} bytes in buffer {}", self.len, self.buffer)
    }
}
