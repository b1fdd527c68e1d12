//! A queue between the server's thread and a test.

use std::collections::VecDeque;
use std::fmt;
use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use crate::script::GUARD;

/// A queue whose reader waits for what it wants and leaves the rest in its order.
#[derive(Debug)]
pub(super) struct Mailbox<T> {
    queue: Mutex<VecDeque<T>>,
    arrived: Condvar,
}

impl<T> Default for Mailbox<T> {
    fn default() -> Self {
        Self { queue: Mutex::default(), arrived: Condvar::new() }
    }
}

impl<T: fmt::Debug> Mailbox<T> {
    /// Appends.
    pub(super) fn push(&self, item: T) {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).push_back(item);
        self.arrived.notify_all();
    }

    /// Takes the first one that is wanted. `what` names it in the error when it does not come.
    pub(super) fn take(&self, what: &str, wanted: impl Fn(&T) -> bool) -> Result<T> {
        self.take_within(GUARD, what, wanted)
    }

    /// The same with a time of the caller's.
    pub(super) fn take_within(
        &self,
        patience: Duration,
        what: &str,
        wanted: impl Fn(&T) -> bool,
    ) -> Result<T> {
        let deadline = Instant::now() + patience;
        let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            if let Some(at) = queue.iter().position(&wanted) {
                return Ok(queue.remove(at).expect("found under the same lock"));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                bail!("no {what} came; there is {queue:#?}");
            }
            queue = self.arrived.wait_timeout(queue, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Everything that is there now.
    pub(super) fn take_all(&self) -> Vec<T> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).drain(..).collect()
    }
}
