//! A count that both paths share: connections of a cluster, or to one of its hosts.
//!
//! What goes through the proxy is counted here, by every worker. If a listener on the kernel path leads to the same cluster, there is
//! an entry of the programs' tables for it: then the programs are told of each change, and what they count is seen here at once.
//! The number is stored there, never added, so that a process that dies or is replaced leaves nothing that could not be put right.

use std::sync::atomic::Ordering::{Relaxed, SeqCst};
use std::sync::atomic::{AtomicU32, AtomicU64};
use std::sync::{Arc, OnceLock};

use crate::intercept::tables::Counts;

/// Connections that count on both paths. Changed by every worker, attached and detached by the main thread.
#[derive(Debug, Default)]
pub struct SharedCount {
    /// Those through the proxy.
    proxied: AtomicU64,
    /// Index of the entry; 0: there is none, and nobody else counts.
    entry: AtomicU32,
    /// The table that the entry is in: the process has one. Empty before the first entry.
    table: OnceLock<Arc<Counts>>,
}

impl SharedCount {
    /// Those through the proxy.
    pub fn proxied(&self) -> u64 {
        self.proxied.load(Relaxed)
    }

    /// Those on both paths, now.
    pub fn total(&self) -> u64 {
        self.proxied().saturating_add(self.on_kernel_path())
    }

    /// One more through the proxy.
    pub(super) fn add(&self) {
        self.proxied.fetch_add(1, SeqCst);
        self.tell();
    }

    /// The same, if there are fewer than `max` on both paths. Returns whether there were. Workers together never exceed it; a worker and
    /// a connect(2) that take the last place in the same moment may.
    pub(super) fn add_below(&self, max: u64) -> bool {
        let others = self.on_kernel_path();
        let raise = |count: u64| (count.saturating_add(others) < max).then(|| count + 1);
        let added = self.proxied.fetch_update(SeqCst, Relaxed, raise).is_ok();
        if added {
            self.tell();
        }
        added
    }

    /// One through the proxy has ended.
    pub(super) fn subtract(&self) {
        self.proxied.fetch_sub(1, SeqCst);
        self.tell();
    }

    /// It has this entry from now on.
    pub(crate) fn attach(&self, table: &Arc<Counts>, entry: u32) {
        if Arc::ptr_eq(self.table.get_or_init(|| Arc::clone(table)), table) {
            self.entry.store(entry, SeqCst);
            self.write(entry);
        }
    }

    /// It has none any more. A worker that is held up may still write to it: it is not to be given to anybody for a while.
    pub(crate) fn detach(&self) {
        self.entry.store(0, SeqCst);
    }

    /// Tells the programs once more, if what they see is something else: another process may have written it in the moment that it
    /// was replaced.
    pub(crate) fn restore(&self) {
        let entry = self.entry.load(SeqCst);
        if let Some(table) = self.table.get()
            && entry != 0
            && table.proxied(entry) != self.proxied.load(SeqCst)
        {
            self.write(entry);
        }
    }

    fn on_kernel_path(&self) -> u64 {
        match self.entry.load(Relaxed) {
            0 => 0,
            entry => self.table.get().map_or(0, |table| table.active(entry)),
        }
    }

    /// After each change. It is sequentially consistent with changes and with `attach`: either the entry is seen here, or the change is
    /// seen there.
    fn tell(&self) {
        let entry = self.entry.load(SeqCst);
        if entry != 0 {
            self.write(entry);
        }
    }

    #[inline(never)]
    fn write(&self, entry: u32) {
        let Some(table) = self.table.get() else { return };
        loop {
            let count = self.proxied.load(SeqCst);
            table.set_proxied(entry, count);
            // So whoever writes last has written the last number, whatever the order in which workers change and write it: one that
            // changes it after this look writes after it, too.
            if self.proxied.load(SeqCst) == count {
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::intercept::tables::tests::Memory;

    #[test]
    fn both_paths_see_each_other_s_connections_at_once() {
        let tables = Memory::new().tables();
        tables.own();
        let count = SharedCount::default();
        count.add();
        count.attach(tables.clusters(), 2);
        assert_eq!(tables.cluster(2).proxied, 1, "what was there before");
        count.add();
        assert_eq!(tables.cluster(2).proxied, 2);
        tables.clusters().set_active(2, 5);
        assert_eq!((count.proxied(), count.total()), (2, 7));
        count.subtract();
        assert_eq!((tables.cluster(2).proxied, count.total()), (1, 6));
    }

    #[test]
    fn a_limit_is_one_for_both_paths() {
        let tables = Memory::new().tables();
        tables.own();
        let count = SharedCount::default();
        count.attach(tables.clusters(), 1);
        tables.clusters().set_active(1, 1);
        assert!(count.add_below(3) && count.add_below(3) && !count.add_below(3));
        assert_eq!(tables.cluster(1).proxied, 2);
        tables.clusters().set_active(1, 0);
        assert!(count.add_below(3) && !count.add_below(3));
        tables.clusters().set_active(1, 9);
        assert!(!count.add_below(3), "a limit that was lowered");
        tables.clusters().set_active(1, 0);
        count.subtract();
        assert!(count.add_below(3));
    }

    #[test]
    fn an_entry_that_was_given_back_is_not_written() {
        let tables = Memory::new().tables();
        tables.own();
        let count = SharedCount::default();
        count.attach(tables.hosts(), 1);
        count.add();
        count.detach();
        tables.clear_host(1);
        tables.hosts().set_active(1, 4);
        count.add();
        count.restore();
        assert_eq!((tables.host(1).proxied, count.total()), (0, 2));
        count.attach(tables.hosts(), 3);
        assert_eq!((tables.host(1).proxied, tables.host(3).proxied), (0, 2));
    }

    #[test]
    fn what_a_predecessor_wrote_is_put_right_and_a_successor_s_is_left() {
        let memory = Memory::new();
        let (old, new) = (memory.tables(), memory.tables());
        old.own();
        let before = SharedCount::default();
        before.attach(old.hosts(), 1);
        before.add();
        new.own();
        let count = SharedCount::default();
        count.attach(new.hosts(), 1);
        old.hosts().stray(1, 1);
        count.restore();
        assert_eq!(new.host(1).proxied, 0);
        before.subtract();
        before.add();
        before.restore();
        new.hosts().set_active(1, 2);
        assert_eq!((new.host(1).proxied, before.total(), count.total()), (0, 1, 2));
    }

    #[test]
    fn workers_that_write_at_one_moment_leave_the_last_number() {
        let tables = Memory::new().tables();
        tables.own();
        let count = SharedCount::default();
        count.attach(tables.hosts(), 1);
        for round in 0..200 {
            std::thread::scope(|scope| {
                for _ in 0..4 {
                    scope.spawn(|| {
                        for _ in 0..50 {
                            count.add();
                            count.add();
                            count.subtract();
                        }
                    });
                }
                if round % 2 == 1 {
                    // Nothing is missed by who comes and goes meanwhile.
                    count.detach();
                    count.attach(tables.hosts(), 1);
                }
            });
            assert_eq!(tables.host(1).proxied, count.proxied(), "round {round}");
        }
        assert_eq!(count.proxied(), 200 * 4 * 50);
    }
}
