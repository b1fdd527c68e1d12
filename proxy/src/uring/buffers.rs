//! Buffers that the kernel takes when bytes arrive: no idle connection owns one.

use std::cell::Cell;
use std::io;
use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::IoUring;
use io_uring::types::BufRingEntry;
use nix::sys::mman::{MapFlags, ProtFlags, mmap_anonymous, munmap};

/// Their number; a power of two. A few wake-ups' worth: what arrives is given back at once.
pub(super) const COUNT: u16 = 512;
/// How many there are before more were missed. The kernel uses all in turn, so those that are not needed would take memory
/// and the place of something else in the processor's caches.
const AT_FIRST: u16 = 64;
/// Bytes of each. A message that fills it is moved in another way. The kernel fills 32 for one socket before it looks at
/// others, and may come back to it in the same turn: only their number bounds what one connection gets at once.
pub(super) const SIZE: usize = 2048;
/// Their group; a ring has only this one.
pub(super) const GROUP: u16 = 0;

/// The buffers of one ring. Must be dropped after it.
#[derive(Debug)]
pub(super) struct Buffers {
    /// What the kernel takes from: `COUNT` entries of 16 bytes.
    entries: NonNull<BufRingEntry>,
    /// `COUNT` buffers of `SIZE` bytes. Pages that were never used take no memory, so it is mapped: the allocator would
    /// write zeros.
    bytes: NonNull<u8>,
    /// Those that the kernel was ever given.
    given: Cell<u16>,
    tail: Cell<u16>,
}

/// Bytes of the entries, and of the buffers.
const ENTRIES: NonZeroUsize = NonZeroUsize::new(COUNT as usize * size_of::<BufRingEntry>()).unwrap();
const BYTES: NonZeroUsize = NonZeroUsize::new(COUNT as usize * SIZE).unwrap();

impl Buffers {
    /// Makes them, and gives the first to the kernel. Linux 5.19.
    pub(super) fn register(ring: &IoUring) -> io::Result<Self> {
        let entries = map(ENTRIES)?.cast::<BufRingEntry>();
        let bytes = map(BYTES).inspect_err(|_| unmap(entries.cast(), ENTRIES))?;
        let buffers = Self { entries, bytes, given: Cell::new(0), tail: Cell::new(0) };
        buffers.give(AT_FIRST);
        let address = buffers.entries.as_ptr() as u64;
        // SAFETY: `COUNT` entries (those above the tail are not looked at), on pages of their own; they live until the ring is gone, because
        // `Driver` declares, and so drops, the ring first.
        unsafe { ring.submitter().register_buf_ring(address, COUNT, GROUP)? };
        buffers.publish();
        Ok(buffers)
    }

    /// The kernel has missed some: gives it as many again as it has.
    pub(super) fn grow(&self) {
        self.give(self.given.get());
        self.publish();
    }

    fn give(&self, more: u16) {
        let given = self.given.get();
        let now = (given + more).min(COUNT);
        (given..now).for_each(|id| self.write(id));
        self.given.set(now);
    }

    /// The first `len` bytes of a buffer.
    ///
    /// # Safety
    /// The kernel has given `id` back with at least `len` bytes, and it was not [recycled](Self::recycle) since.
    pub(super) unsafe fn bytes(&self, id: u16, len: usize) -> &[u8] {
        debug_assert!(id < COUNT && len <= SIZE);
        // SAFETY: inside of the mapping, initialized (mapped memory is zero at first), and the kernel doesn't write to
        // what it has given back.
        unsafe { std::slice::from_raw_parts(self.bytes.as_ptr().add(usize::from(id) * SIZE), len) }
    }

    /// Gives a buffer to the kernel again. Once for each time that it came back.
    pub(super) fn recycle(&self, id: u16) {
        self.write(id);
        self.publish();
    }

    fn write(&self, id: u16) {
        let tail = self.tail.get();
        // SAFETY: inside of the allocation. The kernel reads entries up to the published tail, which is not this
        // one yet; there are as many entries as buffers, so it has taken this one before.
        let entry = unsafe { &mut *self.entries.as_ptr().add(usize::from(tail % COUNT)) };
        // SAFETY: inside of the allocation.
        entry.set_addr(unsafe { self.bytes.as_ptr().add(usize::from(id) * SIZE) } as u64);
        entry.set_len(SIZE as u32);
        entry.set_bid(id);
        self.tail.set(tail.wrapping_add(1));
    }

    fn publish(&self) {
        // SAFETY: the address of the first entry, which is initialized.
        let tail = unsafe { BufRingEntry::tail(self.entries.as_ptr()) };
        // SAFETY: two aligned bytes that live as long as the entries; the kernel reads them atomically, and
        // nobody but this thread writes them.
        unsafe { AtomicU16::from_ptr(tail.cast_mut()) }.store(self.tail.get(), Ordering::Release);
    }
}

impl Drop for Buffers {
    fn drop(&mut self) {
        unmap(self.entries.cast(), ENTRIES);
        unmap(self.bytes, BYTES);
    }
}

fn map(bytes: NonZeroUsize) -> io::Result<NonNull<u8>> {
    let protection = ProtFlags::PROT_READ | ProtFlags::PROT_WRITE;
    // SAFETY: new memory at an address of the kernel's choice touches nothing that exists.
    Ok(unsafe { mmap_anonymous(None, bytes, protection, MapFlags::MAP_PRIVATE)? }.cast())
}

/// Of what [`map`] made. Nobody may look at it any more, the ring that knew it included.
fn unmap(start: NonNull<u8>, bytes: NonZeroUsize) {
    // SAFETY: mapped with this length, and unmapped once: by the drop of its only owner, or before there was one.
    // Only a wrong address would be an error.
    let _ = unsafe { munmap(start.cast(), bytes.get()) };
}
