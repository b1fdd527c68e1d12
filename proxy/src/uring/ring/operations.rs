//! What sources ask of the ring: waits, receives, sends, and their end.

use std::io;
use std::os::fd::{AsRawFd as _, BorrowedFd};
use std::task::{Context, Poll};

use io_uring::opcode;
use io_uring::squeue::{Entry, Flags};
use io_uring::types::Fd;

use super::{Driver, IGNORED, Key, NONE, Received, Slot};
use crate::uring::buffers;

impl Driver {
    /// Waits once for `events`; begins when `key` names nothing yet. Ready with events or a negated errno.
    pub(in crate::uring) fn poll_once(
        &self,
        key: &mut Key,
        fd: BorrowedFd<'_>,
        events: libc::c_short,
        cx: &Context<'_>,
    ) -> Poll<i32> {
        if key.is_none() {
            *key = self.begin(poll_entry(fd, events, false));
        }
        self.poll_end(key, cx)
    }

    /// Whether anything has happened on `fd` since the last call, at least what is asked for by `events`. It is asked
    /// for once and reported again and again, each time it happens anew.
    pub(in crate::uring) fn poll_watch(
        &self,
        key: &mut Key,
        fd: BorrowedFd<'_>,
        events: libc::c_short,
        cx: &Context<'_>,
    ) -> io::Result<bool> {
        if key.is_none() {
            *key = self.begin(poll_entry(fd, events, true));
        }
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key.0];
        let happened = std::mem::take(&mut slot.edges) != 0;
        match slot.end() {
            // Ended by the kernel: begins again next time. An end with events was counted among the edges.
            Some(result) => {
                slots.remove(key.0);
                *key = Key::default();
                if result < 0 { Err(io::Error::from_raw_os_error(-result)) } else { Ok(true) }
            }
            None => {
                slot.wake(cx);
                Ok(happened)
            }
        }
    }

    /// Receives into buffers until the stream ends or fails, or until it is [stopped](Self::stop); with `once`, into
    /// one buffer. Begins when `key` names nothing yet.
    pub(in crate::uring) fn poll_receive(
        &self,
        key: &mut Key,
        fd: BorrowedFd<'_>,
        once: bool,
        cx: &Context<'_>,
    ) -> Poll<Received> {
        if key.is_none() {
            *key = self.begin(receive_entry(fd, once));
        }
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key.0];
        if slot.first != NONE {
            let id = slot.first;
            let arrived = self.arrived.borrow()[usize::from(id)];
            slot.first = arrived.next;
            return Poll::Ready(Received::Buffer(id, arrived.len.into()));
        }
        drop(slots);
        self.poll_end(key, cx).map(Received::End)
    }

    /// Goes on receiving, where nothing is received at the moment and the stream has not ended.
    pub(in crate::uring) fn receive_on(&self, key: &mut Key, fd: BorrowedFd<'_>, cx: &Context<'_>) {
        if !key.is_none() {
            let mut slots = self.slots.borrow_mut();
            let slot = &slots[key.0];
            // Into one buffer, and somebody has it.
            if !(slot.ended && slot.result > 0 && slot.first == NONE) {
                return;
            }
            slots.remove(key.0);
        }
        *key = self.begin(receive_entry(fd, false));
        self.slots.borrow_mut()[key.0].wake(cx);
    }

    /// Sends what is in a buffer that has come back, with the next turn. It is done then, as far as it goes without
    /// waiting: the kernel reports only what went wrong, and the turn itself that nothing did. That turn may wait for
    /// something else first, unless somebody is in a [hurry](Self::hurry): mostly nobody needs to know.
    ///
    /// The caller must neither recycle the buffer nor close the descriptor before the end, or before it has
    /// [abandoned](Self::abandon) the operation.
    pub(in crate::uring) fn send(&self, id: u16, len: usize, fd: BorrowedFd<'_>) -> Key {
        let bytes = self.bytes(id, len);
        // All or nothing, as far as `SKIP_SUCCESS` is concerned.
        let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL | libc::MSG_WAITALL;
        let entry = opcode::Send::new(Fd(fd.as_raw_fd()), bytes.as_ptr(), len as u32).flags(flags).build();
        let key = self.begin(entry.flags(Flags::SKIP_SUCCESS));
        self.slots.borrow_mut()[key.0].length = len as u16; // of one buffer
        self.sends.borrow_mut().push(key.0);
        key
    }

    /// Makes the next turn end without a wait, so that the ends of its sends become known.
    pub(in crate::uring) fn hurry(&self) {
        self.hurry.set(true);
    }

    /// Whether a receive has more at hand, or has ended.
    pub(in crate::uring) fn has_more(&self, key: &Key) -> bool {
        !key.is_none() && {
            let slot = &self.slots.borrow()[key.0];
            slot.first != NONE || slot.ended
        }
    }

    /// The end of an operation, with its result; of a send: how many bytes went, or a negated errno.
    pub(in crate::uring) fn poll_end(&self, key: &mut Key, cx: &Context<'_>) -> Poll<i32> {
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key.0];
        match slot.end() {
            Some(result) => {
                slots.remove(key.0);
                *key = Key::default();
                Poll::Ready(result)
            }
            None => {
                slot.wake(cx);
                Poll::Pending
            }
        }
    }

    /// Ends the sends that the kernel has taken and said nothing about.
    pub(super) fn settle_sends(&self) {
        if self.sends.borrow().is_empty() {
            return;
        }
        // What went wrong may be among the completions that did not fit into the queue.
        if self.ring.borrow_mut().submission().cq_overflow() {
            self.hurry();
            return;
        }
        let (mut sends, mut slots) = (self.sends.borrow_mut(), self.slots.borrow_mut());
        let taken = self.taken.get();
        sends.retain(|key| {
            let slot = &mut slots[*key];
            if slot.before >= taken {
                return true;
            }
            if !slot.ended {
                slot.end_with(slot.length.into());
            }
            if slot.abandoned {
                slots.remove(*key);
            } else if let Some(waker) = &slot.waker {
                waker.wake_by_ref();
            }
            false
        });
    }

    /// What is in a buffer that has come back.
    pub(in crate::uring) fn bytes(&self, id: u16, len: usize) -> &[u8] {
        let buffers = self.buffers.as_ref().expect("a buffer has come back");
        // SAFETY: `id` and `len` are from `Received::Buffer`, whose receiver recycles it once, at the end.
        unsafe { buffers.bytes(id, len) }
    }

    /// Gives a buffer back to the kernel.
    pub(in crate::uring) fn recycle(&self, id: u16) {
        self.buffers.as_ref().expect("a buffer has come back").recycle(id);
    }

    /// Cancels an operation, whose end is still to be awaited.
    pub(in crate::uring) fn stop(&self, key: &Key) {
        if !key.is_none() && !self.slots.borrow()[key.0].ended {
            self.cancel(key);
        }
    }

    fn cancel(&self, key: &Key) {
        let entry = opcode::AsyncCancel::new(u64::from(key.0)).build().flags(Flags::SKIP_SUCCESS);
        self.push(entry.user_data(IGNORED));
    }

    /// Waits for the end of an operation that was [stopped](Self::stop). The kernel needs one turn for that; a second
    /// is for completions that did not fit into the queue.
    pub(in crate::uring) fn settle(&self, key: &Key) {
        for _ in 0..4 {
            if self.slots.borrow()[key.0].ended || self.reap().is_err() {
                return;
            }
        }
    }

    /// Enters the ring without a wait, in the middle of a turn.
    pub(in crate::uring) fn reap(&self) -> io::Result<()> {
        self.fill();
        self.enter_ring(false)?;
        self.count_taken();
        self.complete_all();
        self.settle_sends();
        Ok(())
    }

    /// Cancels an operation that nobody waits for any more. Its descriptor may be closed then.
    pub(in crate::uring) fn abandon(&self, key: &mut Key) {
        if key.is_none() {
            return;
        }
        let key = std::mem::take(key);
        let mut slots = self.slots.borrow_mut();
        let slot = &mut slots[key.0];
        slot.waker = None;
        slot.abandoned = true;
        self.discard(slot);
        let (is_send, before, ended) = (slot.length != 0, slot.before, slot.ended);
        if ended {
            slots.remove(key.0);
            return;
        }
        drop(slots);
        if !is_send {
            self.cancel(&key);
        }
        // The kernel looks the descriptor up when it takes the entry. By then it could be another file's, and a
        // buffer somebody else's.
        while before >= self.taken.get() {
            self.submit();
        }
    }

    /// Gives the buffers of a slot back.
    fn discard(&self, slot: &mut Slot) {
        while slot.first != NONE {
            let id = slot.first;
            slot.first = self.arrived.borrow()[usize::from(id)].next;
            self.recycle(id);
        }
    }
}

pub(super) fn poll_entry(fd: BorrowedFd<'_>, events: libc::c_short, multi: bool) -> Entry {
    let events = u32::from(events.cast_unsigned());
    opcode::PollAdd::new(Fd(fd.as_raw_fd()), events).multi(multi).build()
}

fn receive_entry(fd: BorrowedFd<'_>, once: bool) -> Entry {
    let fd = Fd(fd.as_raw_fd());
    if once {
        let entry =
            opcode::Recv::new(fd, std::ptr::null_mut(), buffers::SIZE as u32).buf_group(buffers::GROUP);
        entry.build().flags(Flags::BUFFER_SELECT)
    } else {
        opcode::RecvMulti::new(fd, buffers::GROUP).build()
    }
}
