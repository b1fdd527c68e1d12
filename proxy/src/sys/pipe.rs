//! Pipes as buffers for splice(2).

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

/// A nonblocking pipe.
#[derive(Debug)]
pub struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
    /// In bytes, as the kernel granted it.
    capacity: usize,
}

impl Pipe {
    /// A pipe of `wanted` bytes, or of as much as the kernel grants: half, a quarter, … down to its default.
    ///
    /// An unprivileged process is refused more than `/proc/sys/fs/pipe-max-size` for one pipe, and its user
    /// more than `pipe-user-pages-soft` in total; past that, a pipe may hold as little as 2 pages. So look at
    /// [`Pipe::capacity`]. Fails with `EMFILE`, `ENFILE` or `ENOMEM` when there is no pipe at all.
    pub fn new(wanted: usize) -> io::Result<Self> {
        let mut ends = [-1; 2];
        // SAFETY: `ends` has room for the two descriptors that the call stores.
        let result = unsafe { libc::pipe2(ends.as_mut_ptr(), libc::O_NONBLOCK | libc::O_CLOEXEC) };
        if result < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the call succeeded, so both are open and nobody else owns them.
        let (read, write) = unsafe { (OwnedFd::from_raw_fd(ends[0]), OwnedFd::from_raw_fd(ends[1])) };
        let mut size = wanted;
        let mut capacity = capacity(write.as_fd(), libc::F_GETPIPE_SZ, 0)?;
        while capacity < size {
            match self::capacity(write.as_fd(), libc::F_SETPIPE_SZ, size) {
                Ok(granted) => capacity = granted,
                Err(_) => size /= 2,
            }
        }
        Ok(Self { read, write, capacity })
    }

    /// How many bytes it holds at most, in bytes. Small fragments fill it earlier: it has one slot per page.
    pub fn capacity(&self) -> usize {
        self.capacity
    }

    /// How many bytes it holds now.
    pub fn len(&self) -> io::Result<usize> {
        let mut bytes: libc::c_int = 0;
        // SAFETY: FIONREAD stores one int, and `bytes` is one.
        let result = unsafe { libc::ioctl(self.read.as_raw_fd(), libc::FIONREAD, &raw mut bytes) };
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(bytes as usize) }
    }

    /// Whether it holds no byte.
    pub fn is_empty(&self) -> io::Result<bool> {
        Ok(self.len()? == 0)
    }

    /// Takes bytes out into `buffer`. `WouldBlock` when it is empty.
    pub fn read(&self, buffer: &mut [u8]) -> io::Result<usize> {
        // SAFETY: `buffer` is writable for its whole length.
        let n = unsafe { libc::read(self.read.as_raw_fd(), buffer.as_mut_ptr().cast(), buffer.len()) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }

    /// The end that is read from.
    pub fn reader(&self) -> BorrowedFd<'_> {
        self.read.as_fd()
    }

    /// The end that is written to.
    pub fn writer(&self) -> BorrowedFd<'_> {
        self.write.as_fd()
    }
}

fn capacity(pipe: BorrowedFd<'_>, command: libc::c_int, size: usize) -> io::Result<usize> {
    // SAFETY: both pipe size commands take one int and store nothing.
    let granted = unsafe { libc::fcntl(pipe.as_raw_fd(), command, size as libc::c_int) };
    usize::try_from(granted).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn takes_what_the_kernel_grants() {
        let pipe = Pipe::new(1 << 20).unwrap();
        assert!(pipe.capacity() >= 2 * 4096);
        assert!(pipe.is_empty().unwrap());
        let huge = Pipe::new(1 << 30).unwrap();
        assert!(huge.capacity() >= pipe.capacity(), "asking for more never gives less");
    }

    #[test]
    fn reads_what_was_written() {
        let pipe = Pipe::new(4096).unwrap();
        nix::unistd::write(pipe.writer(), b"abc").unwrap();
        assert_eq!(pipe.len().unwrap(), 3);
        let mut buffer = [0; 8];
        assert_eq!(pipe.read(&mut buffer).unwrap(), 3);
        assert_eq!(pipe.read(&mut buffer).unwrap_err().kind(), io::ErrorKind::WouldBlock);
    }
}
