//! Receiving without a wait before it: the kernel puts what comes into buffers of the ring.

use std::io;
use std::task::{Context, Poll, ready as ready_or_pending};

use super::super::bytes::{Bytes, Received};
use super::super::{Engine, engine, ring};
use super::{File, Source};

/// Whether [`Source::poll_receive`] may be used.
pub fn can_receive() -> bool {
    engine() == Engine::IoUring && ring::with(ring::Driver::has_buffers)
}

impl<F: File> Source<F> {
    /// The next bytes of the stream, without a system call for them: the kernel receives into buffers that it takes
    /// when something has come. Must not be mixed with other ways to receive, until it was
    /// [`Received::Stopped`]. Only where [`can_receive`].
    ///
    /// # Errors
    /// Those of recv(2). The bytes that came before have been reported before.
    pub fn poll_receive(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<Received>> {
        if self.stopped && self.receiving.is_none() {
            self.stopped = false;
            return Poll::Ready(Ok(Received::Stopped));
        }
        let fd = self.file.as_fd();
        loop {
            let once = !self.has_received;
            let received = ring::with(|driver| driver.poll_receive(&mut self.receiving, fd, once, cx));
            let end = match ready_or_pending!(received) {
                ring::Received::Buffer(buffer, len) => {
                    self.has_received = true;
                    return Poll::Ready(Ok(Received::Bytes(Bytes::new(buffer, len))));
                }
                ring::Received::End(end) => end,
            };
            let stopped = std::mem::take(&mut self.stopped);
            return Poll::Ready(match end {
                0 => Ok(Received::End),
                1.. if stopped => Ok(Received::Stopped),
                1.. => continue,
                end if [libc::ENOBUFS, libc::ECANCELED, libc::EAGAIN, libc::EINTR].contains(&-end) => {
                    Ok(Received::Stopped)
                }
                end => Err(io::Error::from_raw_os_error(-end)),
            });
        }
    }

    /// Has more received while what was is still on its way: the end of the connection is noticed then, without a wait
    /// for that alone. Not after [`Source::stop_receiving`].
    pub fn receive_on(&mut self, cx: &Context<'_>) {
        ring::with(|driver| driver.receive_on(&mut self.receiving, self.file.as_fd(), cx));
    }

    /// Whether the ring receives, or has something that is still to be had: the end of the connection is too.
    pub fn is_receiving(&self) -> bool {
        !self.receiving.is_none()
    }

    /// Has nothing more received through the ring. What has been is still to be had from [`Source::poll_receive`],
    /// then [`Received::Stopped`].
    pub fn stop_receiving(&mut self) {
        if !std::mem::replace(&mut self.stopped, true) {
            ring::with(|driver| driver.stop(&self.receiving));
        }
    }

    /// Whether [`Source::poll_receive`] has something, or would tell that nothing more comes.
    pub fn has_more(&self) -> bool {
        self.stopped || ring::with(|driver| driver.has_more(&self.receiving))
    }

    /// Whether that was asked for, and [`Received::Stopped`] is still to come.
    pub fn is_stopping(&self) -> bool {
        self.stopped
    }

    /// As [`Source::stop_receiving`], and makes sure that everything the kernel has received by now is at hand.
    pub fn settle_receiving(&mut self) {
        if !self.receiving.is_none() {
            self.stop_receiving();
            ring::with(|driver| driver.settle(&self.receiving));
        }
    }
}
