//! A table in whose entries two count: the programs what takes the kernel path, the agent what goes through the proxy.

use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::sync::atomic::AtomicU64;
use std::sync::atomic::Ordering::{Relaxed, SeqCst};

use tidegate_common::{ClusterState, HostState, Tally};

use crate::intercept::bpf::Mapped;

/// The table of clusters, or that of hosts. Several processes may have it in their memory; the counts of the proxy's connections are
/// those of one of them, its owner.
#[derive(Debug)]
pub struct Counts {
    pub(super) memory: Mapped,
    layout: Layout,
    entries: u32,
    /// The number of this process; never 0.
    number: u64,
}

/// Where things are in an entry, words.
#[derive(Clone, Copy, Debug)]
pub(super) struct Layout {
    pub(super) words: usize,
    proxied: usize,
    active: usize,
}

impl Layout {
    pub(super) const CLUSTERS: Self = Self {
        words: size_of::<ClusterState>() / 8,
        proxied: offset_of!(ClusterState, proxied) / 8,
        active: (offset_of!(ClusterState, tally) + offset_of!(Tally, active)) / 8,
    };
    pub(super) const HOSTS: Self = Self {
        words: size_of::<HostState>() / 8,
        proxied: offset_of!(HostState, proxied) / 8,
        active: (offset_of!(HostState, tally) + offset_of!(Tally, active)) / 8,
    };
}

/// Entry that nobody uses: its word of proxied connections is the number of the owner.
const OWNER: u32 = 0;

impl Counts {
    pub(super) fn new(map: BorrowedFd<'_>, layout: Layout, entries: u32) -> io::Result<Self> {
        let memory = Mapped::new(map, entries as usize * layout.words)?;
        Ok(Self { memory, layout, entries, number: fastrand::u64(1..) })
    }

    /// From here on the counts are this process's. Those of a predecessor are gone: it stops to write them, and its connections do
    /// not count any more.
    pub(super) fn own(&self) {
        self.store(OWNER, self.number);
        self.forget();
    }

    /// The counts are nobody's, unless they are another process's by now. [`Self::forget`] them when workers that are just writing
    /// have ended.
    pub(super) fn disown(&self) -> bool {
        self.proxied_word(OWNER)
            .is_some_and(|owner| owner.compare_exchange(self.number, 0, SeqCst, Relaxed).is_ok())
    }

    /// Sets all counts to 0.
    pub(super) fn forget(&self) {
        // Most are 0 already.
        (1..self.entries).filter(|index| self.proxied(*index) != 0).for_each(|index| self.store(index, 0));
    }

    /// Whether no process owns the counts.
    pub(super) fn is_nobodys(&self) -> bool {
        self.proxied(OWNER) == 0
    }

    /// Connections through the proxy, as the programs see them now.
    pub fn proxied(&self, index: u32) -> u64 {
        self.proxied_word(index).map_or(0, |word| word.load(Relaxed))
    }

    /// Tells the programs how many connections there are through the proxy. Does nothing if the counts are another process's.
    pub fn set_proxied(&self, index: u32, count: u64) {
        if self.is_own() {
            self.store(index, count);
        }
    }

    /// Connections of the kernel path that count now; 0 if the counts are another process's, who may have given the entry to
    /// somebody else.
    pub fn active(&self, index: u32) -> u64 {
        let word = self.memory.word(index as usize * self.layout.words + self.layout.active);
        word.filter(|_| self.is_own()).map_or(0, |word| word.load(Relaxed))
    }

    fn is_own(&self) -> bool {
        self.proxied(OWNER) == self.number
    }

    /// In the one order of all operations like this: see [`crate::cluster::shared_count`].
    fn store(&self, index: u32, count: u64) {
        if let Some(word) = self.proxied_word(index) {
            word.store(count, SeqCst);
        }
    }

    fn proxied_word(&self, index: u32) -> Option<&AtomicU64> {
        self.memory.word(index as usize * self.layout.words + self.layout.proxied)
    }

    /// As if the programs had counted so many.
    #[cfg(test)]
    pub(crate) fn set_active(&self, index: u32, count: u64) {
        let word = self.memory.word(index as usize * self.layout.words + self.layout.active);
        word.unwrap().store(count, Relaxed);
    }

    /// As if a worker of another process, which was held up since it was replaced, were writing.
    #[cfg(test)]
    pub(crate) fn stray(&self, index: u32, count: u64) {
        self.store(index, count);
    }
}

#[cfg(test)]
mod tests {
    use crate::intercept::tables::tests::Memory;

    #[test]
    fn a_predecessor_s_counts_are_gone_and_it_writes_no_more() {
        let memory = Memory::new();
        let (old, new) = (memory.tables(), memory.tables());
        old.own();
        old.hosts().set_proxied(3, 7);
        old.hosts().set_active(3, 5);
        assert_eq!((old.host(3).proxied, old.hosts().active(3)), (7, 5));
        new.own();
        assert_eq!(new.host(3).proxied, 0);
        old.hosts().set_proxied(3, 6);
        assert_eq!((new.host(3).proxied, old.hosts().active(3)), (0, 0));
        new.hosts().set_proxied(3, 1);
        assert!(!old.disown());
        old.forget_if_nobodys();
        assert_eq!((new.host(3).proxied, new.hosts().active(3)), (1, 5), "the successor's");
        assert_eq!(new.host(3).tally.active, 5, "the programs' counts are nobody's to change");
    }

    #[test]
    fn who_leaves_leaves_nothing() {
        let memory = Memory::new();
        let tables = memory.tables();
        tables.own();
        tables.clusters().set_proxied(1, 4);
        tables.hosts().set_proxied(2, 4);
        assert!(tables.disown());
        tables.hosts().set_proxied(2, 3);
        assert_eq!(tables.host(2).proxied, 4, "the number stays until all workers have heard of it");
        tables.forget_if_nobodys();
        assert_eq!((tables.cluster(1).proxied, tables.host(2).proxied), (0, 0));
    }

    #[test]
    fn what_is_beyond_the_end_is_nothing() {
        let tables = Memory::new().tables();
        tables.own();
        let beyond = tables.sizes().clusters;
        tables.clusters().set_proxied(beyond, 1);
        assert_eq!((tables.clusters().proxied(beyond), tables.clusters().active(beyond)), (0, 0));
    }
}
