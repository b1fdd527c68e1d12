use super::*;
use crate::cluster::circuit_breaker::Permit;
use crate::intercept::tables::tests::Memory;
use crate::kernel_path::predicate::tests::{self, clear};

/// Listener `l` leads to cluster `c` with one host.
fn snapshot() -> Snapshot {
    tests::snapshot(&clear())
}

fn manager(tables: &Arc<Tables>) -> Manager {
    Manager::new(Arc::clone(tables), Board::default(), Stats::new(1), DataPath::Auto).0
}

/// So long after now that entries which part now are somebody else's.
fn later(keeps: u32) -> Instant {
    Instant::now() + KEEP * keeps + Duration::from_millis(1)
}

fn permit(snapshot: &Snapshot) -> Option<Permit> {
    snapshot.cluster("c")?.breaker().connection()
}

fn host(snapshot: &Snapshot) -> Arc<Host> {
    Arc::clone(&snapshot.cluster("c").unwrap().endpoints()[0].host)
}

#[test]
fn a_cluster_on_both_paths_has_one_count() {
    let tables = Memory::new().tables();
    let snapshot = snapshot();
    let before = (permit(&snapshot).unwrap(), host(&snapshot).connecting());
    let mut manager = manager(&tables);
    manager.apply(&snapshot);
    let target = &manager.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1));
    let another = (permit(&snapshot).unwrap(), host(&snapshot).connecting());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (2, 2));
    tables.hosts().set_active(entry, 5);
    assert_eq!(host(&snapshot).load(), 7);
    drop((before, another));
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0));
}

#[test]
fn what_a_predecessor_counted_is_gone() {
    let memory = Memory::new();
    let former = memory.tables();
    let mut predecessor = manager(&former);
    let snapshot_of_former = snapshot();
    predecessor.apply(&snapshot_of_former);
    let draining = (permit(&snapshot_of_former), host(&snapshot_of_former).connecting());
    let target = &predecessor.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    assert_eq!((former.cluster(cluster).proxied, former.host(entry).proxied), (1, 1));

    let tables = memory.tables();
    let mut manager = manager(&tables);
    // Already before the configuration is there: what is in force counts on.
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0));
    let snapshot = snapshot();
    manager.apply(&snapshot);
    assert_eq!(manager.targets["c"].index, cluster);
    let _active = host(&snapshot).connecting();
    drop(draining);
    predecessor.observe();
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 1));
    // What it was just writing is put right, also where nothing happens.
    former.hosts().stray(entry, 9);
    former.clusters().stray(cluster, 9);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (9, 9));
    (0..=RARELY).for_each(|_| manager.observe());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 1));
}

#[test]
fn an_entry_is_given_back_when_nobody_can_write_to_it() {
    let tables = Memory::new().tables();
    let snapshot = snapshot();
    let mut manager = manager(&tables);
    manager.apply(&snapshot);
    let target = &manager.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    let _proxied = (permit(&snapshot), host(&snapshot).connecting());
    tables.clusters().set_active(cluster, 1);
    tables.hosts().set_active(entry, 1);

    // The kernel path has lost its listener, and keeps a connection: the limit stays one.
    manager.apply(&Snapshot::default());
    manager.sweep_at(later(1));
    assert_eq!(host(&snapshot).load(), 2);
    let more = permit(&snapshot);
    assert_eq!(tables.cluster(cluster).proxied, 2);
    drop(more);

    // The connection has ended: they part, and the entries rest.
    tables.clusters().set_active(cluster, 0);
    tables.hosts().set_active(entry, 0);
    manager.sweep_at(later(1));
    assert!(manager.targets.contains_key("c"));
    let more = (permit(&snapshot), host(&snapshot).connecting());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1), "as they were");
    assert!(manager.is_untidy());
    manager.sweep_at(later(3));
    assert!(manager.targets.is_empty() && !manager.is_untidy());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0));
    drop(more);
    (0..=RARELY).for_each(|_| manager.observe());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0));

    // It comes back.
    manager.apply(&snapshot);
    manager.sweep_at(later(6));
    assert!(!manager.is_untidy(), "nothing is gone");
    let target = &manager.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1));
}

#[test]
fn one_that_comes_back_before_its_entry_is_given_away_has_it_again() {
    let tables = Memory::new().tables();
    let snapshot = snapshot();
    let mut manager = manager(&tables);
    manager.apply(&snapshot);
    let target = &manager.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    manager.apply(&Snapshot::default());
    manager.sweep_at(Instant::now());
    let _proxied = (permit(&snapshot), host(&snapshot).connecting());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0), "parted");
    manager.apply(&snapshot);
    assert_eq!(manager.targets["c"].index, cluster);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1));
    manager.sweep_at(later(3));
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1), "not gone");
}

#[test]
fn a_cluster_that_was_removed_and_made_again_counts_anew() {
    let tables = Memory::new().tables();
    let (first, second) = (snapshot(), snapshot());
    let mut manager = manager(&tables);
    manager.apply(&first);
    let target = &manager.targets["c"];
    let (cluster, entry) = (target.index, target.hosts.values().next().unwrap().index);
    let former = (permit(&first), permit(&first), host(&first).connecting());
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (2, 1));
    manager.apply(&Snapshot::default());
    manager.apply(&second);
    assert_eq!(manager.targets["c"].index, cluster);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (0, 0));
    let _proxied = (permit(&second), host(&second).connecting());
    drop(former);
    assert_eq!((tables.cluster(cluster).proxied, tables.host(entry).proxied), (1, 1));
}
