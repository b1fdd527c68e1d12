//! Runs tasks on one thread, around a ring.

use std::cell::{Cell, RefCell};
use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsFd, BorrowedFd};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::{Pin, pin};
use std::rc::Rc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Wake, Waker};
use std::time::{Duration, Instant};

use async_task::{Runnable, Task};
use nix::sys::eventfd::{EfdFlags, EventFd};

use super::courtesy::Courtesy;
use super::ring::Driver;
use crate::pages::Pages;

/// Tasks that run before the ring is entered again. More would delay what has arrived meanwhile, fewer would enter
/// it more often.
const ROUND: usize = 256;
/// How long the end of a runtime waits for the kernel to let go of what was cancelled.
const FAREWELL: Duration = Duration::from_secs(1);

thread_local! {
    /// Which executor is running on this thread; 0 is none.
    static CURRENT: Cell<u64> = const { Cell::new(0) };
    /// Its tasks that are to run.
    static READY: RefCell<VecDeque<Runnable>> = const { RefCell::new(VecDeque::new()) };
    /// Those of them that move bulk: one runs after each round of the others.
    static BULK: RefCell<VecDeque<Runnable>> = const { RefCell::new(VecDeque::new()) };
    /// Whom a wake-up puts there.
    static WAKES_BULK: Cell<bool> = const { Cell::new(false) };
    /// All its tasks.
    static TASKS: RefCell<Pages<Option<Task<()>>>> = const { RefCell::new(Pages::new()) };
}

/// What wakers on other threads reach of an executor.
#[derive(Debug)]
pub(super) struct Remote {
    id: u64,
    /// Tasks woken by other threads. Locked only when that happens.
    woken: Mutex<Vec<Runnable>>,
    /// Written to when `woken` stops being empty; never read.
    event: EventFd,
}

impl Remote {
    pub(super) fn new() -> io::Result<Arc<Self>> {
        static IDS: AtomicU64 = AtomicU64::new(1);
        let flags = EfdFlags::EFD_CLOEXEC | EfdFlags::EFD_NONBLOCK;
        let event = EventFd::from_value_and_flags(0, flags)?;
        let id = IDS.fetch_add(1, Ordering::Relaxed);
        Ok(Arc::new(Self { id, woken: Mutex::default(), event }))
    }

    pub(super) fn event(&self) -> BorrowedFd<'_> {
        self.event.as_fd()
    }

    fn is_current(&self) -> bool {
        CURRENT.try_with(Cell::get) == Ok(self.id)
    }

    fn schedule(&self, task: Runnable) {
        if self.is_current() {
            let queue = if WAKES_BULK.get() { &BULK } else { &READY };
            queue.with_borrow_mut(|queue| queue.push_back(task));
            return;
        }
        let mut woken = self.woken.lock().unwrap_or_else(PoisonError::into_inner);
        woken.push(task);
        let first = woken.len() == 1;
        drop(woken);
        if first {
            self.notify();
        }
    }

    fn notify(&self) {
        // Fails only when the counter is full, and then the executor has been notified for sure.
        let _ = self.event.write(1);
    }

    fn take(&self) -> Vec<Runnable> {
        std::mem::take(&mut self.woken.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// Wakes the future that [`run`] was called with.
#[derive(Debug)]
struct Main {
    woken: AtomicBool,
    remote: Arc<Remote>,
}

impl Wake for Main {
    fn wake(self: Arc<Self>) {
        self.wake_by_ref();
    }

    fn wake_by_ref(self: &Arc<Self>) {
        if !self.woken.swap(true, Ordering::AcqRel) && !self.remote.is_current() {
            self.remote.notify();
        }
    }
}

/// Runs `future` and everything that it spawns. Tasks that are left when it completes are dropped.
pub(super) fn run<F: Future>(driver: &Rc<Driver>, future: F) -> io::Result<F::Output> {
    let _entered = driver.enter();
    let remote = driver.remote();
    CURRENT.set(remote.id);
    // Before `_entered`: what is dropped cancels its operations.
    let farewell = Farewell { driver, remote };
    let mut future = pin!(future);
    let main = Arc::new(Main { woken: AtomicBool::new(true), remote: Arc::clone(remote) });
    let waker = Waker::from(Arc::clone(&main));
    let mut courtesy = Courtesy::new(Instant::now());
    // Whether there were others beside bulk since the CPU was last offered.
    let mut others = false;
    let output = loop {
        // Tasks first: `future` may look at what they have done.
        others |= run_ready(ROUND);
        if main.woken.swap(false, Ordering::AcqRel)
            && let Poll::Ready(output) = future.as_mut().poll(&mut Context::from_waker(&waker))
        {
            break output;
        }
        if BULK.with_borrow(|bulk| !bulk.is_empty()) {
            // Small messages wait for one megabyte of bulk, not for one of each connection: what has come during the last one is
            // given on, and goes out, before the next.
            for _ in 0..2 {
                if !driver.is_urgent() {
                    break;
                }
                if driver.turn(false)? {
                    take_remote(remote);
                }
                others |= run_ready(ROUND);
            }
            if let Some(task) = BULK.with_borrow_mut(VecDeque::pop_front) {
                run_task(task);
                // Whom the others have given something may have more to say, and a small message may be on its way.
                if std::mem::take(&mut others) || driver.offers_cpu_always() {
                    courtesy.offer();
                }
            }
            continue;
        }
        let idle = READY.with_borrow(VecDeque::is_empty) && !main.woken.load(Ordering::Acquire);
        if driver.turn(idle)? {
            take_remote(remote);
        }
    };
    drop(farewell);
    Ok(output)
}

/// Spawns a task on the executor that is running on this thread.
pub(super) fn spawn(remote: &Arc<Remote>, future: impl Future<Output = ()> + 'static) {
    let key = TASKS.with_borrow_mut(|tasks| tasks.insert(None));
    let future = Spawned { future, _forget: Forget(key) };
    let remote = Arc::clone(remote);
    let (runnable, task) = async_task::spawn_local(future, move |task| remote.schedule(task));
    TASKS.with_borrow_mut(|tasks| tasks[key] = Some(task));
    runnable.schedule();
}

/// A task's future. (An async block around another one would take twice its size.)
struct Spawned<F> {
    future: F,
    _forget: Forget,
}

impl<F: Future<Output = ()>> Future for Spawned<F> {
    type Output = ();

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        // SAFETY: `future` is moved by nobody: there is no other access to the field, and no `Drop` of this type.
        unsafe { self.map_unchecked_mut(|this| &mut this.future) }.poll(cx)
    }
}

/// Takes a task out of the executor's when its future is gone.
struct Forget(u32);

impl Drop for Forget {
    fn drop(&mut self) {
        let task = TASKS.with_borrow_mut(|tasks| tasks.try_remove(self.0));
        if let Some(Some(task)) = task {
            task.detach();
        }
    }
}

/// Whether there was any.
fn run_ready(most: usize) -> bool {
    for ran in 0..most {
        let Some(task) = READY.with_borrow_mut(VecDeque::pop_front) else { return ran > 0 };
        run_task(task);
    }
    true
}

fn run_task(task: Runnable) {
    // A bug in one task must not end the others; the panic's message has been printed. What it was working on is dropped
    // with it.
    let _ = catch_unwind(AssertUnwindSafe(|| task.run()));
}

/// Wakes a task of this thread that is to run behind others.
pub(super) fn wake_for_bulk(waker: &Waker) {
    WAKES_BULK.set(true);
    waker.wake_by_ref();
    WAKES_BULK.set(false);
}

fn take_remote(remote: &Remote) {
    let woken = remote.take();
    READY.with_borrow_mut(|ready| ready.extend(woken));
}

/// Ends the executor, also after a panic.
struct Farewell<'a> {
    driver: &'a Driver,
    remote: &'a Remote,
}

impl Drop for Farewell<'_> {
    fn drop(&mut self) {
        // A task that is dropped may wake others, and those may spawn.
        loop {
            let tasks: Vec<_> =
                TASKS.with_borrow_mut(|tasks| tasks.iter_mut().filter_map(Option::take).collect());
            take_remote(self.remote);
            READY.with_borrow_mut(|ready| ready.append(&mut BULK.take()));
            if tasks.is_empty() && READY.with_borrow(VecDeque::is_empty) {
                break;
            }
            drop(tasks); // cancels them: each runs once more, to drop its future
            run_ready(usize::MAX);
        }
        let until = Instant::now() + FAREWELL;
        while !self.driver.is_idle() && Instant::now() < until {
            let key = self.driver.timers().insert(until, Waker::noop());
            let turned = self.driver.turn(true);
            self.driver.timers().remove(key);
            if turned.is_err() {
                break;
            }
        }
        CURRENT.set(0);
    }
}
