//! The only builder of submission queue entries.

use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use io_uring::{cqueue, opcode, types};
use tokio_uring::{InFlightOneshot, OneshotOutputTransform, UnsubmittedOneshot};

/// A poll on its way. Its output is the events, or a negated errno.
pub(super) type Poll = InFlightOneshot<(), Events>;

pub(super) struct Events;

impl OneshotOutputTransform for Events {
    type Output = i32;
    type StoredData = ();

    fn transform_oneshot_output(self, (): (), cqe: cqueue::Entry) -> i32 {
        cqe.result()
    }
}

/// Waits once until one of `events` holds; the kernel adds `POLLERR`, `POLLHUP` and `POLLRDHUP`.
/// Must be called in a running io_uring runtime.
pub(super) fn poll(fd: BorrowedFd<'_>, events: libc::c_short) -> Poll {
    let events = u32::from(events.cast_unsigned());
    let entry = opcode::PollAdd::new(types::Fd(fd.as_raw_fd()), events).build();
    UnsubmittedOneshot::new((), Events, entry).submit()
}

/// Holds a descriptor open until the operation that names it has completed.
struct Hold;

impl OneshotOutputTransform for Hold {
    type Output = ();
    type StoredData = Option<OwnedFd>;

    fn transform_oneshot_output(self, _: Option<OwnedFd>, _: cqueue::Entry) {}
}

/// Cancels every poll on the file of `fd`; each completes with `ECANCELED`. Other waits on the same file
/// see that too, and must start again. Must be called in a running io_uring runtime.
pub(super) fn cancel(fd: BorrowedFd<'_>) {
    // The entry reaches the kernel when the thread parks. By then the caller's descriptor may be closed, or
    // be another file's; the duplicate is neither. Without one (EMFILE) the caller's own is the best there is.
    let duplicate = fd.try_clone_to_owned().ok();
    let raw = duplicate.as_ref().map_or(fd.as_raw_fd(), AsRawFd::as_raw_fd);
    let entry = opcode::AsyncCancel2::new(types::CancelBuilder::fd(types::Fd(raw)).all()).build();
    drop(UnsubmittedOneshot::new(duplicate, Hold, entry).submit());
}
