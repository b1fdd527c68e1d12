//! Records of the kernel path: what becomes of those that find no room, and whom the others wake.

use std::time::Duration;

use tidegate_common::Reason;

use crate::kernel_path::{Path, SERVICE};
use crate::lab::*;

#[test]
fn records_without_room_are_counted_and_the_counters_stay_right() {
    const CONNECTS: usize = 100;
    let lab = Lab::new();
    // One page: 30 records.
    let mut path = Path::with_room_for_events(&lab, 4_096);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    path.endpoints(&[], 1024, 5_000);
    for _ in 0..CONNECTS {
        assert_eq!(pod.connect(SERVICE).unwrap_err(), libc::EHOSTUNREACH);
    }
    let read = std::iter::from_fn(|| path.events.pop()).count();
    assert!((1..CONNECTS).contains(&read), "{read}");
    let lost = (CONNECTS - read) as u64;
    let expected = [(Reason::NoHost.label(), CONNECTS as u64), (Reason::FlowEventLost.label(), lost)];
    let mut counted = counts(&path.interceptor);
    counted.sort_by_key(|(name, _)| *name != Reason::NoHost.label());
    assert_eq!(counted, expected);
    assert_eq!(path.tables.service(1).tally.no_host, CONNECTS as u64);
    // There is room again.
    assert!(pod.connect(SERVICE).is_err());
    assert!(path.events.pop().is_some());
}

#[test]
fn a_record_wakes_an_agent_that_sleeps() {
    let lab = Lab::new();
    let mut path = Path::with_room_for_events(&lab, 4_096);
    let pod = lab.pod();
    path.interceptor.enrol(pod.cookie, enrolment()).unwrap();
    path.endpoints(&[], 1024, 5_000);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let alarm = path.events.alarm().unwrap();
        for _ in 0..3 {
            path.tables.set_asleep(true);
            assert!(pod.connect(SERVICE).is_err());
            tokio::time::timeout(Duration::from_secs(10), alarm.ring()).await.expect("nobody woke us");
            // The agent is awake: the second one has nothing to do.
            assert!(pod.connect(SERVICE).is_err());
            assert_eq!(std::iter::from_fn(|| path.events.pop()).count(), 2);
        }
    });
}
