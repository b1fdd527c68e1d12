//! Moving bytes through a pipe, without a copy.

use std::io;
use std::os::fd::BorrowedFd;

use super::resources::PooledPipe;
use crate::sys::splice;

/// Takes up to `window` bytes into an empty pipe. 0 is the source's FIN; `WouldBlock` is an empty source.
pub(super) fn fill(pipe: &mut PooledPipe<'_>, source: BorrowedFd<'_>, window: usize) -> io::Result<usize> {
    debug_assert_eq!(pipe.held(), 0, "with bytes in the pipe WouldBlock would be ambiguous");
    add(pipe, source, window)
}

/// Takes more into a pipe that may hold something, up to `window` bytes in all. 0 is the source's FIN; `WouldBlock` is
/// an empty source, or a pipe without a free slot.
pub(super) fn add(pipe: &mut PooledPipe<'_>, source: BorrowedFd<'_>, window: usize) -> io::Result<usize> {
    debug_assert!(pipe.held() < window, "to ask for nothing would look like a FIN");
    let n = splice::into_pipe(source, pipe.pipe(), window - pipe.held())?;
    pipe.set_held(pipe.held() + n);
    Ok(n)
}

/// Gives as much of what the pipe holds as the destination takes; `WouldBlock` is a full destination.
pub(super) fn drain(pipe: &mut PooledPipe<'_>, destination: BorrowedFd<'_>) -> io::Result<usize> {
    debug_assert_ne!(pipe.held(), 0, "with an empty pipe WouldBlock would be ambiguous");
    let n = splice::out_of_pipe(pipe.pipe(), destination, pipe.held())?;
    pipe.set_held(pipe.held() - n);
    Ok(n)
}

/// Takes everything out of the pipe, for a destination that can't be spliced to.
pub(super) fn take(pipe: &mut PooledPipe<'_>) -> io::Result<Vec<u8>> {
    let mut bytes = vec![0; pipe.held()];
    let mut taken = 0;
    while taken < bytes.len() {
        match pipe.pipe().read(&mut bytes[taken..])? {
            0 => return Err(io::ErrorKind::UnexpectedEof.into()),
            n => taken += n,
        }
        pipe.set_held(bytes.len() - taken);
    }
    Ok(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pump::Resources;

    #[test]
    fn everything_comes_out_of_the_pipe_in_order() {
        let resources = Resources::default();
        let mut pipe = resources.pipe().unwrap();
        let bytes: Vec<u8> = (0..100_000_u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(nix::unistd::write(pipe.pipe().writer(), &bytes).unwrap(), bytes.len());
        pipe.set_held(bytes.len());
        assert_eq!(take(&mut pipe).unwrap(), bytes);
        drop(pipe);
        assert_eq!(resources.spare_pipes(), 1);
    }
}
