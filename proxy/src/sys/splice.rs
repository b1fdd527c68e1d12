//! splice(2): pages move between a socket and a pipe without a copy through user space.
//!
//! A splice into a socket that is gone raises `SIGPIPE` (there is no flag against it, as `send` has). Rust's
//! runtime ignores that signal from the start of the process; keep it so.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;

use super::pipe::Pipe;

/// Moves up to `len` bytes from `source` into `pipe`. 0 means the end of the stream.
///
/// `WouldBlock` is ambiguous: the socket has nothing, or the pipe has no slot left. With an empty pipe it
/// can only be the socket.
pub fn into_pipe(source: BorrowedFd<'_>, pipe: &Pipe, len: usize) -> io::Result<usize> {
    splice(source, pipe.writer(), len)
}

/// Moves up to `len` bytes from `pipe` into `destination`; `len` is what the pipe holds, so that the kernel
/// never waits for more before it sends the tail.
///
/// `WouldBlock` means that the socket takes no more, as long as the pipe holds something. Less than `len` means
/// nothing by itself: a completion of this thread's io_uring counts as a pending signal, and stops the splice.
pub fn out_of_pipe(pipe: &Pipe, destination: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    splice(pipe.reader(), destination, len)
}

/// Whether the kernel can't splice on this kind of file at all, so that the bytes must be copied.
pub fn is_unsupported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EINVAL | libc::ENOSYS))
}

fn splice(from: BorrowedFd<'_>, to: BorrowedFd<'_>, len: usize) -> io::Result<usize> {
    // SAFETY: both descriptors are open for as long as they are borrowed; null offsets mean "no offset".
    let n = unsafe {
        libc::splice(
            from.as_raw_fd(),
            ptr::null_mut(),
            to.as_raw_fd(),
            ptr::null_mut(),
            len,
            libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE,
        )
    };
    usize::try_from(n).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream};
    use std::os::fd::AsFd;

    #[test]
    fn moves_bytes_and_sees_the_end() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let mut client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
        let (server, _) = listener.accept().unwrap();
        let pipe = Pipe::new(1 << 16).unwrap();
        client.write_all(b"hello").unwrap();
        assert_eq!(into_pipe(server.as_fd(), &pipe, 1 << 16).unwrap(), 5);
        assert_eq!(out_of_pipe(&pipe, server.as_fd(), 5).unwrap(), 5);
        client.read_exact(&mut [0; 5]).unwrap();
        client.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(into_pipe(server.as_fd(), &pipe, 1 << 16).unwrap(), 0);
    }

    #[test]
    fn files_that_cannot_be_spliced_are_told_apart() {
        let directory = tempfile::tempdir().unwrap();
        let file =
            std::fs::File::options().append(true).create(true).open(directory.path().join("log")).unwrap();
        let pipe = Pipe::new(1 << 16).unwrap();
        nix::unistd::write(pipe.writer(), b"abc").unwrap();
        let error = out_of_pipe(&pipe, file.as_fd(), 3).unwrap_err();
        assert!(is_unsupported(&error), "{error}");
    }
}
