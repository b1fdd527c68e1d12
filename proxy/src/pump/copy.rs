//! Moving bytes through the worker's scratch buffer.

use std::io;
use std::os::fd::BorrowedFd;

use crate::sys::socket;

/// What did not fit into the destination: the only buffer a connection ever owns, and only until it is gone.
#[derive(Debug, Default)]
pub(super) struct Leftover(Option<Box<Rest>>);

#[derive(Debug)]
struct Rest {
    bytes: Vec<u8>,
    sent: usize,
}

impl Leftover {
    /// Of bytes, of which there are some.
    pub(super) fn new(bytes: Vec<u8>) -> Self {
        Self(Some(Box::new(Rest { bytes, sent: 0 })))
    }

    /// Takes more bytes, to be sent after the others.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        match &mut self.0 {
            Some(rest) => rest.bytes.extend_from_slice(bytes),
            None => *self = Self::new(bytes.to_vec()),
        }
    }

    /// Sends as much as is taken; gives the buffer back when it is empty.
    pub(super) fn send(&mut self, destination: BorrowedFd<'_>) -> io::Result<usize> {
        let Some(rest) = &mut self.0 else { return Ok(0) };
        let n = socket::send(destination, &rest.bytes[rest.sent..])?;
        rest.sent += n;
        if rest.sent == rest.bytes.len() {
            self.0 = None;
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
    let (sent, leftover) = give(&scratch[..received], destination);
    Ok(Copied { received, sent, leftover })
}

/// Sends on what was received: how much was taken, or why nothing could be, and the rest.
pub(super) fn give(bytes: &[u8], destination: BorrowedFd<'_>) -> (io::Result<usize>, Leftover) {
    let sent = match socket::send(destination, bytes) {
        Err(e) if e.kind() == io::ErrorKind::WouldBlock => Ok(0),
        sent => sent,
    };
    let leftover = match &sent {
        Ok(n) if *n < bytes.len() => Leftover::new(bytes[*n..].to_vec()),
        _ => Leftover::default(),
    };
    (sent, leftover)
}
