//! A ring of our own: what is submitted, what completes, and whom that wakes.
//!
//! The ring is entered once per turn of the executor: everything that was submitted goes in, everything that has
//! completed comes out. With `DEFER_TASKRUN` the kernel does its share of the work then, on this thread, and never
//! interrupts it.
//!
//! Each operation has a slot, whose number is its `user_data`. A slot lives until the kernel's last completion for it,
//! also when nobody wants the result any more: so a number never names two operations at once, and an operation is
//! cancelled by its number, which costs the kernel a lookup. (Cancelling by descriptor makes it walk every operation
//! that is pending.)

use std::cell::{Cell, RefCell, RefMut};
use std::collections::VecDeque;
use std::io;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Waker};
use std::time::{Duration, Instant};

use io_uring::squeue::Entry;
use io_uring::types::{SubmitArgs, Timespec};
use io_uring::{IoUring, cqueue};

use super::buffers::{self, Buffers};
use super::executor::{self, Remote};
use super::timers::Timers;
use super::{COMPLETIONS, SUBMISSIONS};
use crate::pages::Pages;

mod busy_poll;
mod operations;

use busy_poll::BusyPoll;
use operations::poll_entry;

/// `user_data` of what nobody waits for.
const IGNORED: u64 = u64::MAX;
/// `user_data` of the wait for wakers on other threads.
const REMOTE: u64 = u64::MAX - 1;
/// No buffer.
const NONE: u16 = u16::MAX;
/// Of `io_uring_enter`: also run the work that the kernel has put off.
const GETEVENTS: u32 = 1;

thread_local! {
    /// The driver of the executor that is running on this thread.
    static DRIVER: RefCell<Option<Rc<Driver>>> = const { RefCell::new(None) };
}

/// Calls `f` with the running driver.
pub(super) fn with<T>(f: impl FnOnce(&Driver) -> T) -> T {
    try_with(f).expect("waits need uring::start")
}

/// The same, unless none is running.
pub(super) fn try_with<T>(f: impl FnOnce(&Driver) -> T) -> Option<T> {
    DRIVER.try_with(|driver| driver.borrow().as_deref().map(f)).ok().flatten()
}

/// Names an operation; [`Key::default`] names none.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Key(u32);

impl Default for Key {
    fn default() -> Self {
        Self(u32::MAX)
    }
}

impl Key {
    pub(super) fn is_none(&self) -> bool {
        self.0 == u32::MAX
    }
}

/// One operation, from its submission to its last completion.
#[derive(Debug)]
struct Slot {
    waker: Option<Waker>,
    /// Events that a watch has seen since somebody looked.
    edges: u16,
    /// Buffers with received bytes, in order (see [`Driver::received`]).
    first: u16,
    last: u16,
    /// The result of its last completion, once that [has come](Self::end).
    result: i32,
    ended: bool,
    /// Of a send: its bytes, and that its slot is removed with the list of sends; else 0.
    length: u16,
    /// Nobody wants the result.
    abandoned: bool,
    /// Of a wait [for bulk](Driver::set_bulk).
    bulk: bool,
    /// How many entries had been submitted before it.
    before: u64,
}

/// A buffer that has come back from the kernel.
#[derive(Clone, Copy, Debug)]
struct Arrived {
    len: u16,
    /// The next one of the same operation.
    next: u16,
}

/// What [`Driver::poll_receive`] finds.
#[derive(Debug)]
pub(super) enum Received {
    /// A buffer with bytes: its number and their count. The caller recycles it.
    Buffer(u16, usize),
    /// The operation has ended with this result: 0 is the peer's FIN, below is an errno, above is neither.
    End(i32),
}

pub(super) struct Driver {
    ring: RefCell<IoUring>,
    /// After the ring: the kernel knows its memory. None: the kernel refused it.
    buffers: Option<Buffers>,
    slots: RefCell<Pages<Slot>>,
    /// What has arrived in each buffer.
    arrived: RefCell<Vec<Arrived>>,
    timers: RefCell<Timers>,
    /// Sends whose end is not known yet (see [`Driver::send`]).
    sends: RefCell<Vec<u32>>,
    /// Entries that did not fit into the submission queue.
    backlog: RefCell<VecDeque<Entry>>,
    /// Entries ever pushed, and ever taken by the kernel.
    pushed: Cell<u64>,
    taken: Cell<u64>,
    remote: Arc<Remote>,
    /// Wakers on other threads have woken tasks.
    remote_woken: Cell<bool>,
    hurry: Cell<bool>,
    bulk: Cell<bool>,
    busy_poll: RefCell<BusyPoll>,
    offers_cpu_always: Cell<bool>,
}

impl Driver {
    pub(super) fn new(ring: IoUring, remote: Arc<Remote>) -> Self {
        let buffers = Buffers::register(&ring)
            .inspect_err(|error| tracing::debug!(%error, "no buffer ring: small messages are copied"))
            .ok();
        let driver = Self {
            arrived: RefCell::new(vec![Arrived { len: 0, next: NONE }; buffers::COUNT.into()]),
            ring: RefCell::new(ring),
            buffers,
            slots: RefCell::default(),
            timers: RefCell::default(),
            sends: RefCell::default(),
            backlog: RefCell::default(),
            pushed: Cell::new(0),
            taken: Cell::new(0),
            remote,
            remote_woken: Cell::new(false),
            hurry: Cell::new(false),
            bulk: Cell::new(false),
            busy_poll: RefCell::default(),
            offers_cpu_always: Cell::new(false),
        };
        driver.watch_remote();
        driver
    }

    /// Makes it the running one of this thread until the guard is dropped.
    pub(super) fn enter(self: &Rc<Self>) -> Entered {
        let before = DRIVER.replace(Some(Rc::clone(self)));
        assert!(before.is_none(), "a runtime is running on this thread already");
        Entered
    }

    /// How other threads reach the executor.
    pub(super) fn remote(&self) -> &Arc<Remote> {
        &self.remote
    }

    pub(super) fn timers(&self) -> RefMut<'_, Timers> {
        self.timers.borrow_mut()
    }

    /// Whether bytes can be received into buffers of the kernel's choice.
    pub(super) fn has_buffers(&self) -> bool {
        self.buffers.is_some()
    }

    fn begin(&self, entry: Entry) -> Key {
        let slot = Slot {
            waker: None,
            edges: 0,
            first: NONE,
            last: NONE,
            result: 0,
            ended: false,
            length: 0,
            abandoned: false,
            bulk: self.bulk.get(),
            before: self.pushed.get(),
        };
        let key = self.slots.borrow_mut().insert(slot);
        self.push(entry.user_data(u64::from(key)));
        Key(key)
    }

    /// Submits with the next turn, or at once when the queue is full.
    fn push(&self, entry: Entry) {
        self.pushed.set(self.pushed.get() + 1);
        if self.backlog.borrow().is_empty() && self.push_now(&entry) {
            return;
        }
        self.submit();
        if !(self.backlog.borrow().is_empty() && self.push_now(&entry)) {
            self.backlog.borrow_mut().push_back(entry);
        }
    }

    fn push_now(&self, entry: &Entry) -> bool {
        // SAFETY: a poll or a cancellation refers to no memory; a receive only to the registered buffers, and a send to
        // one of them, which outlive the ring. A buffer that is sent is not recycled before the kernel has taken the
        // entry, and a descriptor is not closed before that: `abandon` waits for it.
        unsafe { self.ring.borrow_mut().submission().push(entry).is_ok() }
    }

    /// Hands over what was pushed.
    fn submit(&self) {
        self.fill();
        let result = self.ring.borrow().submit();
        self.count_taken();
        match result {
            Ok(_) => {}
            // Completions have to be taken first, or memory is short for the moment.
            Err(error) if is_passing(&error) => self.complete_all(),
            Err(error) => panic!("io_uring takes nothing more: {error}"),
        }
    }

    /// Moves the backlog into the submission queue, as far as it fits.
    fn fill(&self) {
        let mut backlog = self.backlog.borrow_mut();
        while let Some(entry) = backlog.pop_front() {
            if !self.push_now(&entry) {
                backlog.push_front(entry);
                break;
            }
        }
    }

    fn count_taken(&self) {
        let waiting = self.ring.borrow_mut().submission().len() + self.backlog.borrow().len();
        self.taken.set(self.pushed.get() - waiting as u64);
    }

    /// Enters the ring: hands over what was submitted, waits for a completion or a timer if `wait`, and wakes whom
    /// completions and timers concern. True if wakers on other threads have woken tasks meanwhile.
    pub(super) fn turn(&self, wait: bool) -> io::Result<bool> {
        self.fill();
        if wait && !self.hurry.take() {
            self.wait()?;
        } else {
            self.enter_ring(false)?;
        }
        self.count_taken();
        self.complete_all();
        self.settle_sends();
        self.fire_timers();
        Ok(self.remote_woken.take())
    }

    /// Whether small messages wait to be sent, or the kernel has something to tell.
    pub(super) fn is_urgent(&self) -> bool {
        let mut ring = self.ring.borrow_mut();
        let queue = ring.submission();
        queue.taskrun() || queue.cq_overflow() || !self.sends.borrow().is_empty()
    }

    /// Whether operations that begin now are for bulk: whom their ends wake runs behind others.
    pub(super) fn set_bulk(&self, bulk: bool) {
        self.bulk.set(bulk);
    }

    /// Whether the CPU is offered after each megabyte of bulk, also where there is nothing else.
    pub(super) fn offer_cpu_always(&self, always: bool) {
        self.offers_cpu_always.set(always);
    }

    pub(super) fn offers_cpu_always(&self) -> bool {
        self.offers_cpu_always.get()
    }

    /// How long to look for the next message before going to sleep, where that may save time; zero: not at all.
    pub(super) fn set_busy_poll(&self, window: Duration) {
        self.busy_poll.borrow_mut().set_window(window);
    }

    /// Waits, and learns how long that takes.
    fn wait(&self) -> io::Result<()> {
        if !self.busy_poll.borrow_mut().begins() {
            return self.enter_ring(true);
        }
        let began = Instant::now();
        let mut found = false;
        if self.busy_poll.borrow().is_due(began) {
            self.enter_ring(false)?;
            found = self.look(began);
        }
        self.enter_ring(!found)?;
        self.busy_poll.borrow_mut().waited(began.elapsed());
        Ok(())
    }

    /// Looks for completions, instead of being woken for them. True if there are some, or a timer is due.
    fn look(&self, began: Instant) -> bool {
        let (mut ring, mut busy_poll) = (self.ring.borrow_mut(), self.busy_poll.borrow_mut());
        let timer = self.timers.borrow().next();
        let mut before = began;
        loop {
            let queue = ring.submission();
            let deferred = queue.taskrun() || queue.cq_overflow();
            drop(queue);
            if deferred || !ring.completion().is_empty() {
                return true;
            }
            std::thread::yield_now();
            let now = Instant::now();
            if timer.is_some_and(|timer| timer <= now) {
                return true;
            }
            if !busy_poll.goes_on(began, before, now) {
                return false;
            }
            before = now;
        }
    }

    fn enter_ring(&self, wait: bool) -> io::Result<()> {
        let mut ring = self.ring.borrow_mut();
        if wait && self.sends.borrow().len() == 1 && !ring.submission().is_empty() {
            // Whom the send wakes may run when this system call ends, and have answered before the next one: then there
            // is nothing to sleep for.
            match ring.submit() {
                Err(error) if !is_passing(&error) => return Err(error),
                _ => {}
            }
        }
        let queue = ring.submission();
        let (len, deferred) = (queue.len(), queue.taskrun() || queue.cq_overflow());
        drop(queue);
        let wait = wait && ring.completion().is_empty();
        let submitter = ring.submitter();
        let next = if wait { self.timers.borrow().next() } else { None };
        let result = match next {
            _ if !wait && len == 0 && !deferred => return Ok(()),
            // SAFETY: no argument is passed; the entries are sound (see `push_now`).
            _ if !wait => unsafe { submitter.enter::<libc::sigset_t>(len as u32, 0, GETEVENTS, None) },
            None => submitter.submit_and_wait(1),
            Some(at) => {
                let timespec = timespec(at.saturating_duration_since(Instant::now()));
                submitter.submit_with_args(1, &SubmitArgs::new().timespec(&timespec))
            }
        };
        match result {
            Err(error) if !is_passing(&error) => Err(error),
            _ => Ok(()),
        }
    }

    fn complete_all(&self) {
        let mut ring = self.ring.borrow_mut();
        for entry in ring.completion() {
            self.complete(&entry);
        }
    }

    fn complete(&self, entry: &cqueue::Entry) {
        let (result, more) = (entry.result(), cqueue::more(entry.flags()));
        match entry.user_data() {
            IGNORED => return,
            REMOTE => {
                self.remote_woken.set(true);
                if !more {
                    // Into the backlog: the ring is being read.
                    self.pushed.set(self.pushed.get() + 1);
                    self.backlog.borrow_mut().push_back(self.remote_entry());
                }
                return;
            }
            _ => {}
        }
        let mut slots = self.slots.borrow_mut();
        let Some(slot) = slots.get_mut(entry.user_data() as u32) else { return };
        if let Some(id) = cqueue::buffer_select(entry.flags()) {
            match u16::try_from(result) {
                Ok(len) if len > 0 && !slot.abandoned => self.received(slot, id, len),
                _ => self.recycle(id),
            }
        } else if result == -libc::ENOBUFS {
            self.buffers.as_ref().into_iter().for_each(Buffers::grow);
        } else if result > 0 {
            slot.edges |= result as u16; // poll(2) knows no others
        }
        if !more {
            slot.end_with(result);
            if slot.length != 0 {
                return; // `settle_sends` follows
            }
            if slot.abandoned {
                slots.remove(entry.user_data() as u32);
                return;
            }
        }
        let Some(waker) = &slot.waker else { return };
        self.busy_poll.borrow_mut().wakes(waker.data().addr(), slot.bulk);
        if slot.bulk {
            executor::wake_for_bulk(waker);
        } else {
            waker.wake_by_ref();
        }
    }

    fn received(&self, slot: &mut Slot, id: u16, len: u16) {
        let mut arrived = self.arrived.borrow_mut();
        arrived[usize::from(id)] = Arrived { len, next: NONE };
        if slot.first == NONE {
            slot.first = id;
        } else {
            arrived[usize::from(slot.last)].next = id;
        }
        slot.last = id;
    }

    fn fire_timers(&self) {
        if self.timers.borrow().next().is_none() {
            return;
        }
        let now = Instant::now();
        loop {
            let fired = self.timers.borrow_mut().fire(now);
            match fired {
                Some(waker) => waker.wake(),
                None => return,
            }
        }
    }

    /// Operations that the kernel has not ended yet.
    pub(super) fn is_idle(&self) -> bool {
        self.slots.borrow().is_empty()
    }

    fn remote_entry(&self) -> Entry {
        poll_entry(self.remote.event(), libc::POLLIN, true).user_data(REMOTE)
    }

    fn watch_remote(&self) {
        self.push(self.remote_entry());
    }
}

impl Slot {
    /// The result of its last completion.
    fn end(&self) -> Option<i32> {
        self.ended.then_some(self.result)
    }

    fn end_with(&mut self, result: i32) {
        (self.result, self.ended) = (result, true);
    }

    fn wake(&mut self, cx: &Context<'_>) {
        match &mut self.waker {
            Some(waker) => waker.clone_from(cx.waker()),
            None => self.waker = Some(cx.waker().clone()),
        }
    }
}

/// While it lives, its driver is the running one.
#[derive(Debug)]
pub(super) struct Entered;

impl Drop for Entered {
    fn drop(&mut self) {
        DRIVER.set(None);
    }
}

/// A ring with everything that is used here: Linux 6.1.
pub(super) fn build(entries: u32) -> io::Result<IoUring> {
    IoUring::builder()
        .setup_single_issuer()
        .setup_defer_taskrun()
        .setup_taskrun_flag()
        .setup_submit_all()
        .setup_cqsize(if entries == SUBMISSIONS { COMPLETIONS } else { 2 * entries })
        .build(entries)
}

fn timespec(duration: Duration) -> Timespec {
    Timespec::new().sec(duration.as_secs()).nsec(duration.subsec_nanos())
}

/// Nothing is wrong: time is up, a signal came, or completions have to be taken first.
fn is_passing(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::ETIME | libc::EINTR | libc::EBUSY | libc::EAGAIN))
}
