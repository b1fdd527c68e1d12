//! Times to live: resources that are gone when the server does not say in time that they are not.

use std::collections::{BTreeSet, HashMap};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Longest time to live that is told apart from for ever: ten years.
const FOREVER: Duration = Duration::from_hours(10 * 365 * 24);

/// The timers of one kind of resource.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_name: HashMap<Arc<str>, Instant>,
    by_time: BTreeSet<(Instant, Arc<str>)>,
}

impl Timers {
    pub(super) fn is_empty(&self) -> bool {
        self.by_name.is_empty()
    }

    /// Starts a timer again, or ends it (`None`).
    pub(super) fn set(&mut self, name: &Arc<str>, ttl: Option<Duration>, now: Instant) {
        self.remove(name);
        if let Some(at) = ttl.filter(|ttl| *ttl < FOREVER).and_then(|ttl| now.checked_add(ttl)) {
            self.by_name.insert(Arc::clone(name), at);
            self.by_time.insert((at, Arc::clone(name)));
        }
    }

    pub(super) fn remove(&mut self, name: &str) {
        if let Some((name, at)) = self.by_name.remove_entry(name) {
            self.by_time.remove(&(at, name));
        }
    }

    /// Keeps the timers of these names.
    pub(super) fn retain(&mut self, mut keep: impl FnMut(&str) -> bool) {
        self.by_time.retain(|(_, name)| keep(name));
        let by_time = &self.by_time;
        self.by_name.retain(|name, at| by_time.contains(&(*at, Arc::clone(name))));
    }

    /// When the first one runs out.
    pub(super) fn first(&self) -> Option<Instant> {
        self.by_time.first().map(|(at, _)| *at)
    }

    /// Names whose timer has run out; they have none any more.
    pub(super) fn expire(&mut self, now: Instant) -> Vec<Arc<str>> {
        let mut expired = Vec::new();
        while self.by_time.first().is_some_and(|(at, _)| *at <= now) {
            if let Some((_, name)) = self.by_time.pop_first() {
                self.by_name.remove(&name);
                expired.push(name);
            }
        }
        expired
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn timers_restart_end_and_run_out() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let ttl = |seconds| Some(Duration::from_secs(seconds));
        let [a, b, c]: [Arc<str>; 3] = ["a".into(), "b".into(), "c".into()];
        let mut timers = Timers::default();
        timers.set(&a, ttl(5), start);
        timers.set(&b, ttl(10), start);
        timers.set(&c, ttl(3), start);
        timers.set(&c, None, at(1));
        assert_eq!(timers.first(), Some(at(5)));
        timers.set(&a, ttl(5), at(4));
        assert_eq!(timers.expire(at(8)), Vec::<Arc<str>>::new());
        assert_eq!(timers.expire(at(9)), [Arc::clone(&a)]);
        timers.set(&a, ttl(50), at(9));
        timers.retain(|name| name == "a");
        assert_eq!(timers.expire(at(20)), Vec::<Arc<str>>::new());
        timers.remove("a");
        assert!(timers.is_empty() && timers.first().is_none());
        timers.set(&a, Some(Duration::MAX), start);
        assert!(timers.is_empty(), "for ever needs no timer");
    }
}
