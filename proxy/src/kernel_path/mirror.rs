//! What the programs count, in the stats of Envoy's names: each look adds what is new.

use tidegate_common::Tally;

use super::ChainPlan;
use crate::cluster::Cluster;
use crate::cluster::host::Host;
use crate::cluster::outlier::Outcome;

/// What was added to the stats already. It begins at nothing, also for entries that a former process has counted in: so
/// the counters of a successor go on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Seen {
    tally: Tally,
    ended: u64,
    ended_established: u64,
    open: u64,
}

/// What is new since the last look.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct News {
    /// Counters of the tally; `active` is not one.
    pub(super) tally: Tally,
    /// Sockets that were counted as active and are no more.
    pub(super) ended: u64,
    /// Of those, the ones that were established.
    pub(super) ended_established: u64,
    /// Change of the gauge of active connections.
    pub(super) active: i64,
    /// Change of the gauge of established ones.
    pub(super) open: i64,
}

impl Seen {
    /// Compares, and remembers.
    pub(super) fn news(&mut self, now: Tally) -> News {
        // Fields are read one after the other while programs count, so that sums may be off for a moment: what is
        // derived never goes back, and catches up.
        let ended = now.attempts.saturating_sub(now.active).max(self.ended);
        let ended_established = ended.saturating_sub(now.failed).max(self.ended_established);
        let open = now.established.saturating_sub(ended_established).min(now.active);
        let new = |field: fn(&Tally) -> u64| field(&now).saturating_sub(field(&self.tally));
        let news = News {
            tally: Tally {
                attempts: new(|tally| tally.attempts),
                active: 0,
                established: new(|tally| tally.established),
                failed: new(|tally| tally.failed),
                timed_out: new(|tally| tally.timed_out),
                abandoned: new(|tally| tally.abandoned),
                closed_by_client: new(|tally| tally.closed_by_client),
                closed_by_endpoint: new(|tally| tally.closed_by_endpoint),
                sent: new(|tally| tally.sent),
                received: new(|tally| tally.received),
                no_host: new(|tally| tally.no_host),
                overflow: new(|tally| tally.overflow),
                panics: new(|tally| tally.panics),
            },
            ended: ended - self.ended,
            ended_established: ended_established - self.ended_established,
            active: now.active as i64 - self.tally.active as i64,
            open: open as i64 - self.open as i64,
        };
        *self = Self { tally: now, ended, ended_established, open };
        news
    }
}

impl News {
    pub(super) fn is_nothing(&self) -> bool {
        *self == Self::default()
    }

    /// Into `listener.*` and `tcp.*`.
    pub(super) fn of_service(&self, plan: &ChainPlan) {
        if self.is_nothing() {
            return;
        }
        let new = &self.tally;
        let (listener, tcp) = (&plan.listener.stats, &plan.proxy.stats);
        let refused = new.no_host + new.overflow;
        listener.downstream_cx_total().add(new.attempts + refused);
        listener.downstream_cx_destroy().add(self.ended + refused);
        change(listener.downstream_cx_active(), self.active);
        tcp.downstream_cx_total().add(new.attempts + refused);
        tcp.downstream_cx_rx_bytes_total().add(new.sent);
        tcp.downstream_cx_tx_bytes_total().add(new.received);
    }

    /// Into `cluster.*`.
    pub(super) fn of_cluster(&self, cluster: &Cluster) {
        if self.is_nothing() {
            return;
        }
        let (new, stats) = (&self.tally, cluster.stats());
        let remote = new.closed_by_endpoint.min(self.ended_established);
        let local = self.ended_established - remote;
        let failed_remote = new.failed.saturating_sub(new.timed_out + new.abandoned);
        stats.upstream_cx_total().add(new.attempts);
        change(stats.upstream_cx_active(), self.active);
        stats.upstream_cx_connect_fail().add(new.failed);
        stats.upstream_cx_connect_timeout().add(new.timed_out);
        // As after the one attempt of a tcp_proxy.
        stats.upstream_cx_connect_attempts_exceeded().add(new.failed - new.abandoned.min(new.failed));
        stats.upstream_cx_overflow().add(new.overflow);
        stats.upstream_cx_none_healthy().add(new.no_host);
        stats.lb_healthy_panic().add(new.panics);
        stats.upstream_cx_destroy().add(self.ended);
        stats.upstream_cx_destroy_remote().add(remote + failed_remote);
        stats.upstream_cx_destroy_local().add(local + new.failed - failed_remote);
        stats.upstream_cx_destroy_with_active_rq().add(self.ended_established);
        stats.upstream_cx_destroy_remote_with_active_rq().add(remote);
        stats.upstream_cx_destroy_local_with_active_rq().add(local);
        stats.upstream_rq_total().add(new.established);
        change(stats.upstream_rq_active(), self.open);
        stats.upstream_rq_pending_total().add(new.attempts);
        change(stats.upstream_rq_pending_active(), self.active - self.open);
        stats.upstream_rq_pending_failure_eject().add(new.failed - new.abandoned.min(new.failed));
        stats.upstream_rq_cancelled().add(new.abandoned);
        stats.upstream_cx_tx_bytes_total().add(new.sent);
        stats.upstream_cx_rx_bytes_total().add(new.received);
    }

    /// Into the live state of a host, and to outlier detection.
    pub(super) fn of_host(&self, host: &Host, cluster: &Cluster) {
        if self.is_nothing() {
            return;
        }
        let new = &self.tally;
        host.add(new.attempts, new.established, new.failed, self.active, self.open);
        let Some(detector) = cluster.outlier() else { return };
        let failed = new.failed.saturating_sub(new.timed_out + new.abandoned);
        for outcome in interleaved(new.established, failed, new.timed_out) {
            detector.note(host, outcome);
        }
    }
}

/// Outcomes of which only the numbers are known, as evenly mixed as they can be: a row of failures must not look longer
/// than it was.
fn interleaved(connected: u64, failed: u64, timed_out: u64) -> impl Iterator<Item = Outcome> {
    let failures = failed + timed_out;
    let total = connected + failures;
    (0..total).map(move |i| {
        let failures_before =
            |i: u64| (u128::from(i) * u128::from(failures) / u128::from(total.max(1))) as u64;
        let nth = failures_before(i);
        if failures_before(i + 1) == nth {
            Outcome::Connected
        } else if nth < timed_out {
            Outcome::TimedOut
        } else {
            Outcome::Failed
        }
    })
}

fn change(gauge: crate::stats::Gauge<'_>, by: i64) {
    if by < 0 { gauge.sub(by.unsigned_abs()) } else { gauge.add(by.unsigned_abs()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_event_is_added_once() {
        let mut seen = Seen::default();
        let now = Tally { attempts: 5, active: 2, established: 4, failed: 1, ..Tally::default() };
        let news = seen.news(now);
        assert_eq!((news.tally.attempts, news.ended, news.ended_established), (5, 3, 2));
        assert_eq!((news.active, news.open), (2, 2));
        assert!(seen.news(now).is_nothing());
        let news = seen.news(Tally { active: 0, ..now });
        assert_eq!((news.ended, news.ended_established, news.active, news.open), (2, 2, -2, -2));
    }

    #[test]
    fn a_torn_look_is_made_good_by_the_next() {
        let mut seen = Seen::default();
        // Over, and not yet known to have failed.
        let first = seen.news(Tally { attempts: 1, ..Tally::default() });
        let second = seen.news(Tally { attempts: 1, failed: 1, ..Tally::default() });
        let third = seen.news(Tally { attempts: 2, failed: 1, established: 1, ..Tally::default() });
        let all = [first, second, third];
        assert_eq!(all.map(|news| news.ended).iter().sum::<u64>(), 2);
        assert_eq!(all.map(|news| news.ended_established).iter().sum::<u64>(), 1);
        assert_eq!(all.map(|news| news.open).iter().sum::<i64>(), 0);
    }

    #[test]
    fn failures_are_spread_among_successes() {
        let row =
            |connected, failed, timed_out| interleaved(connected, failed, timed_out).collect::<Vec<_>>();
        assert_eq!(row(0, 2, 0), [Outcome::Failed; 2]);
        assert_eq!(row(0, 0, 0), []);
        let mixed = row(50, 49, 1);
        assert_eq!(mixed.len(), 100);
        assert_eq!(mixed.iter().filter(|it| **it == Outcome::Connected).count(), 50);
        assert!(mixed.chunks(2).all(|pair| pair.contains(&Outcome::Connected)));
    }
}
