//! The interception's counters and health as stats, and an eye on what somebody else may have changed.

use super::{InterceptError, Interception, PodState, Standing, Status};
use crate::stats::Stats;

/// What a look found; the main thread acts on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Health {
    /// Every program is attached where it should be, and is ours.
    Good,
    /// Another process has taken over: drain and end.
    Superseded,
    /// A link is gone, or its cgroup is, or the pods thread has ended: pods may be by-passing the proxy.
    Broken,
}

/// Looks at an interception now and then.
#[derive(Debug, Default)]
pub struct Audit {
    last: Option<Health>,
}

impl Audit {
    /// Puts every counter and gauge into `stats` (`tidegate.intercept.*`) and says how things are. Logs a change
    /// for the worse, and one for the better.
    ///
    /// Costs a system call for each link, one for all counters, and a walk over the in-flight map.
    pub fn look(&mut self, interception: &Interception, stats: &Stats) -> Health {
        let health = match interception.status() {
            Ok(status) => {
                publish(&status, stats);
                match status.standing {
                    Standing::Current => Health::Good,
                    Standing::Superseded => Health::Superseded,
                    Standing::Broken => Health::Broken,
                }
            }
            Err(error) => {
                self.say_unreadable(&error);
                Health::Broken
            }
        };
        stats.set_intercept_gauge("healthy", u64::from(health == Health::Good));
        self.say(health);
        health
    }

    fn say_unreadable(&self, error: &InterceptError) {
        if self.last != Some(Health::Broken) {
            tracing::error!(%error, "can't read the interception's maps");
        }
    }

    fn say(&mut self, health: Health) {
        if self.last == Some(health) {
            return;
        }
        match health {
            Health::Good if self.last.is_some() => tracing::info!("interception is in order again"),
            Health::Good => {}
            Health::Superseded => tracing::info!("another tidegate process has taken over the interception"),
            Health::Broken => tracing::error!(
                "interception is broken: a configured cgroup was removed (it is attached to again when it is made \
                 again), or somebody detached a link, and pods may by-pass the proxy: then restart tidegate \
                 (`bpftool cgroup tree` shows what is attached)"
            ),
        }
        self.last = Some(health);
    }
}

fn publish(status: &Status, stats: &Stats) {
    for (reason, total) in &status.counters {
        stats.set_intercept_counter(reason.label(), *total);
    }
    let count =
        |wanted: fn(&PodState) -> bool| status.pods.iter().filter(|pod| wanted(&pod.state)).count() as u64;
    stats.set_intercept_gauge("pods_enrolled", count(|state| matches!(state, PodState::Enrolled { .. })));
    stats.set_intercept_gauge("pods_waiting", count(|state| matches!(state, PodState::Waiting { .. })));
    stats.set_intercept_gauge("in_flight_handshakes", status.in_flight as u64);
}
