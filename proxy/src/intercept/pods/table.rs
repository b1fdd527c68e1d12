//! Which cgroup has processes of which network namespace. Pure bookkeeping.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;
use std::path::{Path, PathBuf};

/// Cgroups and the namespaces (`N`) of their processes.
#[derive(Debug)]
pub(super) struct Table<N> {
    by_cgroup: HashMap<PathBuf, HashSet<N>>,
    /// In how many cgroups each namespace is. Never 0.
    cgroups_of: HashMap<N, usize>,
}

/// What a look at one cgroup changed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Change<N> {
    /// Namespaces that were in no cgroup before.
    pub(super) appeared: Vec<N>,
    /// Namespaces that are in no cgroup any more.
    pub(super) vanished: Vec<N>,
}

impl<N> Default for Table<N> {
    fn default() -> Self {
        Self { by_cgroup: HashMap::new(), cgroups_of: HashMap::new() }
    }
}

impl<N: Copy + Eq + Hash + Ord> Table<N> {
    /// The processes of `cgroup` are now in exactly these namespaces.
    pub(super) fn set(&mut self, cgroup: &Path, namespaces: HashSet<N>) -> Change<N> {
        let before = self.by_cgroup.remove(cgroup).unwrap_or_default();
        let mut change = Change { appeared: Vec::new(), vanished: Vec::new() };
        for added in namespaces.difference(&before) {
            let count = self.cgroups_of.entry(*added).or_insert(0);
            *count += 1;
            if *count == 1 {
                change.appeared.push(*added);
            }
        }
        for removed in before.difference(&namespaces) {
            if let Some(count) = self.cgroups_of.get_mut(removed) {
                *count -= 1;
                if *count == 0 {
                    self.cgroups_of.remove(removed);
                    change.vanished.push(*removed);
                }
            }
        }
        if !namespaces.is_empty() {
            self.by_cgroup.insert(cgroup.to_owned(), namespaces);
        }
        change.appeared.sort_unstable();
        change.vanished.sort_unstable();
        change
    }

    /// Whether some cgroup has a process in it.
    pub(super) fn is_present(&self, namespace: N) -> bool {
        self.cgroups_of.contains_key(&namespace)
    }

    /// Cgroups with processes that are not in `walked`: they have been removed.
    pub(super) fn others(&self, walked: &HashSet<PathBuf>) -> Vec<PathBuf> {
        self.by_cgroup.keys().filter(|cgroup| !walked.contains(*cgroup)).cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn set(namespaces: &[u8]) -> HashSet<u8> {
        namespaces.iter().copied().collect()
    }

    #[test]
    fn a_namespace_lives_while_any_cgroup_has_it() {
        let mut table = Table::default();
        let (a, b) = (Path::new("a"), Path::new("b"));
        assert_eq!(table.set(a, set(&[1, 2])), Change { appeared: vec![1, 2], vanished: vec![] });
        assert_eq!(table.set(b, set(&[2])), Change { appeared: vec![], vanished: vec![] });
        assert_eq!(table.set(a, set(&[])), Change { appeared: vec![], vanished: vec![1] });
        assert!(table.is_present(2) && !table.is_present(1));
        assert_eq!(table.others(&HashSet::new()), [PathBuf::from("b")]);
        assert_eq!(table.set(b, set(&[3])), Change { appeared: vec![3], vanished: vec![2] });
        assert_eq!(table.set(b, set(&[])), Change { appeared: vec![], vanished: vec![3] });
        assert!(table.by_cgroup.is_empty() && table.cgroups_of.is_empty());
    }

    proptest! {
        #[test]
        fn appeared_and_vanished_follow_the_naive_union(steps in prop::collection::vec((0_u8..4, prop::collection::hash_set(0_u8..5, 0..4)), 0..40)) {
            let mut table = Table::default();
            let mut naive: HashMap<u8, HashSet<u8>> = HashMap::new();
            for (cgroup, namespaces) in steps {
                let union = |naive: &HashMap<u8, HashSet<u8>>| naive.values().flatten().copied().collect::<HashSet<_>>();
                let before = union(&naive);
                naive.insert(cgroup, namespaces.clone());
                let after = union(&naive);
                let change = table.set(Path::new(&cgroup.to_string()), namespaces);
                prop_assert_eq!(change.appeared.into_iter().collect::<HashSet<_>>(), &after - &before);
                prop_assert_eq!(change.vanished.into_iter().collect::<HashSet<_>>(), &before - &after);
                for namespace in 0..5 {
                    prop_assert_eq!(table.is_present(namespace), after.contains(&namespace));
                }
            }
        }
    }
}
