//! `exact_balance`: connections go to the worker that has the fewest, whichever has accepted them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How many connections each worker has, or is about to be given.
#[derive(Debug)]
pub struct Balance(Box<[AtomicU32]>);

impl Balance {
    /// Nobody has any.
    pub fn new(workers: usize) -> Self {
        Self((0..workers).map(|_| AtomicU32::new(0)).collect())
    }

    /// Takes a place at the worker that has the fewest connections: at `here` where that has no more than others.
    pub fn choose(self: &Arc<Self>, here: usize) -> Place {
        loop {
            let counts = || self.0.iter().map(|count| count.load(Ordering::Relaxed)).enumerate();
            let Some((worker, count)) = counts().min_by_key(|(worker, count)| (*count, *worker != here))
            else {
                return self.add(here);
            };
            let count_of = &self.0[worker];
            // Not if another worker has just given it one: then it need not be the one with the fewest.
            let (relaxed, next) = (Ordering::Relaxed, count.wrapping_add(1));
            if count_of.compare_exchange(count, next, relaxed, relaxed).is_ok() {
                return Place { balance: Some(Arc::clone(self)), worker };
            }
        }
    }

    /// A place at this worker, whatever it has.
    pub fn add(self: &Arc<Self>, worker: usize) -> Place {
        if let Some(count) = self.0.get(worker) {
            count.fetch_add(1, Ordering::Relaxed);
        }
        Place { balance: Some(Arc::clone(self)), worker }
    }

    /// Gives back what [`Place::keep`] has left.
    pub fn release(&self, worker: usize) {
        if let Some(count) = self.0.get(worker) {
            count.fetch_sub(1, Ordering::Relaxed);
        }
    }
}

/// A connection's place at a worker, given back on drop.
#[derive(Debug)]
#[must_use = "the place is given back when this is dropped"]
pub struct Place {
    /// None: it was kept.
    balance: Option<Arc<Balance>>,
    worker: usize,
}

impl Place {
    /// At which worker.
    pub fn worker(&self) -> usize {
        self.worker
    }

    /// Whether it was taken here.
    pub fn is_of(&self, balance: &Arc<Balance>) -> bool {
        self.balance.as_ref().is_some_and(|own| Arc::ptr_eq(own, balance))
    }

    /// Leaves it taken, for [`Balance::release`].
    pub fn keep(mut self) {
        self.balance = None;
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Some(balance) = &self.balance {
            balance.release(self.worker);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(balance: &Balance) -> Vec<u32> {
        balance.0.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }

    #[test]
    fn the_worker_with_the_fewest_gets_the_next() {
        let balance = Arc::new(Balance::new(3));
        let mut places: Vec<_> = (0..6).map(|_| balance.choose(1)).collect();
        let workers: Vec<_> = places.iter().map(Place::worker).collect();
        assert_eq!(workers, [1, 0, 2, 1, 0, 2], "at home where nobody has fewer");
        drop(places.remove(5));
        assert_eq!(balance.choose(0).worker(), 2, "the one that lost one");
        assert_eq!(counts(&balance), [2, 2, 1], "and that one was given back");
        let kept = places.remove(0);
        assert!(kept.is_of(&balance) && !kept.is_of(&Arc::new(Balance::new(3))));
        kept.keep();
        drop(places);
        assert_eq!(counts(&balance), [0, 1, 0]);
        balance.release(1);
        assert_eq!(counts(&balance), [0, 0, 0]);
    }

    #[test]
    fn several_workers_at_once_balance_exactly() {
        let balance = Arc::new(Balance::new(4));
        std::thread::scope(|scope| {
            for here in 0..4 {
                let balance = &balance;
                // All of them accept, mostly two of them.
                let count = if here < 2 { 1990 } else { 10 };
                scope.spawn(move || (0..count).for_each(|_| balance.choose(here).keep()));
            }
        });
        assert_eq!(counts(&balance), [1000; 4]);
    }
}
