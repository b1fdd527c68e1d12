//! What the main thread does now and then, and when somebody asks for stats: it brings them up to date, and looks whether all is as
//! it should be.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc::UnboundedReceiver;
use tokio::time::{Instant, sleep_until};

use super::Proxy;
use super::admin_state::{Answer, Running};
use crate::intercept::audit::{Audit, Health};

/// How often, while connections go through workers or the configuration changes.
const INTERVAL: Duration = Duration::from_secs(1);

/// The same while neither happens: as often as Envoy flushes its stats by default (`stats_flush_interval`).
const QUIET_INTERVAL: Duration = Duration::from_secs(5);

/// How often unused hosts of ORIGINAL_DST clusters are looked for; each cluster's `cleanup_interval` decides.
const SWEEP_INTERVAL: Duration = Duration::from_secs(5);

/// When to look.
#[derive(Debug)]
pub(super) struct Looks {
    audit: Audit,
    last: Instant,
    next: Instant,
    swept: Instant,
}

impl Default for Looks {
    /// At once.
    fn default() -> Self {
        let now = Instant::now();
        Self { audit: Audit::default(), last: now, next: now, swept: now }
    }
}

impl Looks {
    /// Something has changed.
    pub(super) fn soon(&mut self) {
        self.next = self.next.min(Instant::now() + INTERVAL);
    }

    /// Completes when it is time, or when somebody has asked, and returns who. What is lost when it is dropped is asked for again.
    pub(super) async fn wanted(&self, asked: &mut UnboundedReceiver<Answer>) -> Vec<Answer> {
        tokio::select! {
            () = sleep_until(self.next) => Vec::new(),
            // `Running` keeps the sender.
            Some(first) = asked.recv() => {
                let mut answers = vec![first];
                while let Ok(answer) = asked.try_recv() {
                    answers.push(answer);
                }
                answers
            }
        }
    }
}

impl Proxy {
    /// Looks. True: another process has taken over.
    pub(super) fn look(&mut self, looks: &mut Looks, state: &Running) -> bool {
        let now = Instant::now();
        let health = self.interception.as_ref().map(|it| looks.audit.look(it, &self.stats));
        let superseded = health == Some(Health::Superseded);
        self.count_kernel_path(superseded);
        let busy = state.tick(now - looks.last);
        self.store.save();
        let not_served = self.shared.not_served.load(Ordering::Relaxed);
        self.stats.set_intercept_counter("not_served_reset", not_served);
        self.look_for_kubepods();
        if now - looks.swept >= SWEEP_INTERVAL {
            looks.swept = now;
            self.shared.publisher.sweep();
            self.snapshot().clusters().for_each(|cluster| cluster.sweep());
        }
        looks.last = now;
        looks.next = now + if busy { INTERVAL } else { QUIET_INTERVAL };
        superseded
    }
}
