//! What the connections of one worker share: a scratch buffer, and pipes within a budget.

use std::cell::{Cell, RefCell};
use std::time::Duration;

use super::SCRATCH;
use super::nearby::Nearby;
use crate::sys::clock;
use crate::sys::pipe::Pipe;

/// A pipe smaller than this is not worth a splice; copying is as good.
const SMALLEST: usize = SCRATCH;
/// Empty pipes kept for later (an empty pipe of 1 MiB takes 16 KiB of kernel memory and two descriptors).
const SPARE: usize = 64;
/// After the kernel has refused a pipe, it is not asked again for so long.
const RETRY: Duration = Duration::from_secs(1);

/// How many pipes one worker may have, and of what size.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PipeBudget {
    /// Pipes at most; only a direction that holds bytes has one. Past it, directions copy.
    pub pipes: usize,
    /// Bytes per pipe; the kernel may grant less (`fs.pipe-max-size`, `fs.pipe-user-pages-soft`).
    pub bytes: usize,
}

impl Default for PipeBudget {
    fn default() -> Self {
        Self { pipes: 256, bytes: 1 << 20 }
    }
}

/// Owned by a worker for its life; connections borrow it.
#[derive(Debug)]
pub struct Resources {
    /// Never holds bytes across a wait.
    pub(super) scratch: RefCell<Box<[u8]>>,
    budget: PipeBudget,
    #[expect(clippy::vec_box, reason = "they are handed out boxed, and would be boxed anew each time")]
    spare: RefCell<Vec<Box<Filled>>>,
    /// Pipes that exist, spare ones included.
    pipes: Cell<usize>,
    /// Pipes that were ever made.
    created: Cell<u64>,
    /// When the kernel may be asked for a pipe again.
    retry_at: Cell<Duration>,
    refused: Cell<u64>,
    pub(super) nearby: Nearby,
}

impl Default for Resources {
    fn default() -> Self {
        Self::new(PipeBudget::default())
    }
}

impl Resources {
    /// Makes no pipe yet.
    pub fn new(budget: PipeBudget) -> Self {
        Self {
            scratch: RefCell::new(vec![0; SCRATCH].into_boxed_slice()),
            budget,
            spare: RefCell::default(),
            pipes: Cell::new(0),
            created: Cell::new(0),
            retry_at: Cell::new(Duration::ZERO),
            refused: Cell::new(0),
            nearby: Nearby::new(),
        }
    }

    /// Pipes that exist now, spare ones included.
    pub fn pipes(&self) -> usize {
        self.pipes.get()
    }

    /// Empty pipes that wait to be used.
    pub fn spare_pipes(&self) -> usize {
        self.spare.borrow().len()
    }

    /// Pipes that were ever made.
    pub fn created_pipes(&self) -> u64 {
        self.created.get()
    }

    /// How often a direction had to copy because there was no pipe: the budget was spent, or the kernel refused.
    pub fn refused_pipes(&self) -> u64 {
        self.refused.get()
    }

    /// An empty pipe, unless the budget is spent or the kernel refuses one.
    pub(super) fn pipe(&self) -> Option<PooledPipe<'_>> {
        let pipe = self.spare.borrow_mut().pop().or_else(|| self.new_pipe());
        if pipe.is_none() {
            self.refused.set(self.refused.get() + 1);
        }
        pipe.map(|pipe| PooledPipe { filled: Some(pipe), pool: self })
    }

    fn new_pipe(&self) -> Option<Box<Filled>> {
        if self.pipes.get() >= self.budget.pipes {
            return None;
        }
        // Without the wait, a refusal would cost system calls on every read.
        let now = clock::coarse();
        if now < self.retry_at.get() {
            return None;
        }
        match Pipe::new(self.budget.bytes) {
            Ok(pipe) if pipe.capacity() >= SMALLEST.min(self.budget.bytes) => {
                self.pipes.set(self.pipes.get() + 1);
                self.created.set(self.created.get() + 1);
                Some(Box::new(Filled { pipe, held: 0 }))
            }
            _ => {
                self.retry_at.set(now + RETRY);
                None
            }
        }
    }

    fn take_back(&self, filled: Box<Filled>) {
        let mut spare = self.spare.borrow_mut();
        // A pipe that holds bytes would give them to another connection.
        if filled.held == 0 && spare.len() < SPARE {
            spare.push(filled);
        } else {
            self.pipes.set(self.pipes.get() - 1);
        }
    }
}

/// A pipe in use. Goes back to the pool when it is dropped empty, and is closed when it still holds bytes.
#[derive(Debug)]
pub(super) struct PooledPipe<'a> {
    /// None only while it is dropped.
    filled: Option<Box<Filled>>,
    pool: &'a Resources,
}

/// A pipe and what is in it. Boxed, because most directions have none.
#[derive(Debug)]
struct Filled {
    pipe: Pipe,
    held: usize,
}

impl PooledPipe<'_> {
    pub(super) fn pipe(&self) -> &Pipe {
        &self.filled().pipe
    }

    /// Bytes in it.
    pub(super) fn held(&self) -> usize {
        self.filled().held
    }

    /// Notes how many bytes are in it. Whoever moves some has to.
    pub(super) fn set_held(&mut self, held: usize) {
        self.filled.as_mut().expect("taken only by drop").held = held;
    }

    fn filled(&self) -> &Filled {
        self.filled.as_ref().expect("taken only by drop")
    }
}

impl Drop for PooledPipe<'_> {
    fn drop(&mut self) {
        if let Some(filled) = self.filled.take() {
            debug_assert_eq!(filled.pipe.len().ok(), Some(filled.held));
            self.pool.take_back(filled);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pools_empty_pipes_and_closes_the_others() {
        let resources = Resources::default();
        let mut dirty = resources.pipe().unwrap();
        nix::unistd::write(dirty.pipe().writer(), b"left over").unwrap();
        dirty.set_held(9);
        let clean = resources.pipe().unwrap();
        assert_eq!((resources.pipes(), resources.spare_pipes()), (2, 0));
        drop(clean);
        drop(dirty);
        assert_eq!((resources.pipes(), resources.spare_pipes()), (1, 1));
        assert!(resources.pipe().unwrap().pipe().is_empty().unwrap());
        assert_eq!(resources.created_pipes(), 2);
    }

    #[test]
    fn keeps_to_its_budget() {
        let resources = Resources::new(PipeBudget { pipes: 1, bytes: 1 << 16 });
        let only = resources.pipe().unwrap();
        assert!(resources.pipe().is_none());
        assert_eq!(resources.refused_pipes(), 1);
        drop(only);
        assert!(resources.pipe().is_some());
    }

    #[test]
    fn a_refusal_is_remembered_for_a_while() {
        let resources = Resources::default();
        resources.retry_at.set(clock::coarse() + RETRY);
        assert!(resources.pipe().is_none());
        resources.retry_at.set(clock::coarse());
        assert!(resources.pipe().is_some());
    }
}
