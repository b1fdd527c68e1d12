//! Moving bytes through the worker's scratch buffer.

use std::io;
use std::os::fd::BorrowedFd;

use crate::sys::socket;

/// What did not fit into the destination: the only buffer a connection ever owns, and only until it is gone.
#[derive(Debug, Default)]
pub(super) struct Leftover {
    bytes: Vec<u8>,
    sent: usize,
}

impl Leftover {
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self { bytes, sent: 0 }
    }

    /// Sends as much as is taken; gives the buffer back when it is empty.
    pub(super) fn send(&mut self, destination: BorrowedFd<'_>) -> io::Result<usize> {
        let n = socket::send(destination, &self.bytes[self.sent..])?;
        self.sent += n;
        if self.sent == self.bytes.len() {
            *self = Self::default();
        }
        Ok(n)
    }
}

/// What one step from source to destination did.
pub(super) struct Copied {
    /// Bytes taken; 0 is the source's FIN.
    pub(super) received: usize,
    /// Bytes given, or why none could be.
    pub(super) sent: io::Result<usize>,
    /// The difference.
    pub(super) leftover: Leftover,
}

/// Receives into `scratch` and sends it on. Fails only if receiving does.
pub(super) fn step(
    scratch: &mut [u8],
    source: BorrowedFd<'_>,
    destination: BorrowedFd<'_>,
) -> io::Result<Copied> {
    let received = socket::receive(source, scratch)?;
    if received == 0 {
        return Ok(Copied { received, sent: Ok(0), leftover: Leftover::default() });
    }
    let sent = match socket::send(destination, &scratch[..received]) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        sent => sent,
    };
    let leftover = match &sent {
        Ok(n) if *n < received => Leftover::new(scratch[*n..received].to_vec()),
        _ => Leftover::default(),
    };
    Ok(Copied { received, sent, leftover })
}
