//! Changes of the configuration, put in force.

use std::collections::HashSet;
use std::sync::Arc;

use super::Proxy;
use super::admin_state::Running;
use super::kernel_path::{KernelPath, Losses};
use crate::cluster::removal::Lost;
use crate::intercept::destinations::{BLACK_HOLE, is_black_hole};
use crate::stats::{SharedGauge, Stats};
use crate::worker::{self, Handle, Role, SocketId};
use crate::xds::store::{Bound, Changes, Draining, Happened};

/// Events of control planes that are handled before what they change is published. Enough that the work for each
/// publication is small beside them, few enough that signals are heard.
const EVENTS_AT_ONCE: usize = 256;

impl Proxy {
    /// Lets the workers accept.
    pub(super) fn accept(&mut self, state: &Running) {
        self.accepting = true;
        for bound in std::mem::take(&mut self.waiting) {
            self.listen(bound, state);
        }
        self.stats.listener_manager().workers_started().set(1);
    }

    fn listen(&mut self, bound: Bound, state: &Running) {
        if !self.accepting {
            self.waiting.push(bound);
            return;
        }
        let Bound { listener, direction, sockets } = bound;
        for (index, (worker, sockets)) in self.workers.iter().zip(sockets).enumerate() {
            for socket in sockets {
                self.sockets += 1;
                let id = SocketId::Bound(self.sockets);
                state.bound(index, id, direction);
                self.bound.entry(Arc::clone(&listener)).or_default().push((index, id));
                worker.send(worker::Command::Listen(id, socket, Role::Bound(Arc::clone(&listener))));
            }
        }
    }

    fn close(&mut self, listener: &str, state: &Running) {
        self.waiting.retain(|bound| *bound.listener != *listener);
        for (worker, id) in self.bound.remove(listener).unwrap_or_default() {
            state.unbound(id);
            self.workers[worker].send(worker::Command::Close(id));
        }
    }

    /// The configuration changes, perhaps.
    pub(super) fn take(&mut self, happened: Happened, state: &Running) {
        let mut changes = self.store.handle(happened);
        // A control plane that sends thousands of resources one by one does not make us publish as often.
        for _ in 0..EVENTS_AT_ONCE {
            let Some(happened) = self.store.try_next() else { break };
            changes.absorb(self.store.handle(happened));
        }
        self.apply(changes, state);
    }

    /// Puts a change of the configuration in force. A destination is captured when there is somebody who serves it,
    /// and served until it is captured no longer.
    pub(super) fn apply(&mut self, changes: Changes, state: &Running) {
        if changes.is_empty() {
            return;
        }
        let Changes { clusters, clusters_gone, listeners, close, listen, released, draining, lost } = changes;
        if clusters || listeners {
            self.shared.publisher.publish(self.store.snapshot(&released));
            self.update_kernel_path();
        }
        for listener in close {
            self.close(&listener, state);
        }
        for bound in listen {
            self.listen(bound, state);
        }
        let refuses =
            self.snapshot().cluster(BLACK_HOLE).is_some_and(|cluster| is_black_hole(cluster.config()));
        let refused_before = std::mem::replace(&mut self.black_hole, refuses);
        if listeners || refuses != refused_before || (clusters && self.kernel_path.is_some()) {
            self.apply_rules();
        }
        if !released.is_empty() {
            self.shared.publisher.publish(self.store.snapshot(&[]));
        }
        if clusters_gone {
            self.tell(|| worker::Command::ForgetClusters);
        }
        for draining in draining {
            self.end_later(draining);
        }
        for lost in lost {
            self.end_hosts(lost);
        }
    }

    /// The kernel's rules follow the configuration.
    pub(super) fn apply_rules(&mut self) {
        let Some(interception) = &self.interception else { return };
        match interception.apply(&self.destinations()) {
            Ok(()) => self.settle_kernel_path(),
            Err(error) => tracing::error!(%error, "the kernel's rules can't follow the configuration"),
        }
    }

    /// Connections to endpoints that are gone end, by the policy of their cluster.
    fn end_hosts(&self, lost: Lost) {
        let workers: Vec<_> = self.workers.iter().map(Handle::sender).collect();
        let flows = self.kernel_path.as_ref().map(KernelPath::losses);
        tracing::debug!(
            cluster = %lost.cluster,
            reason = lost.loss.reason.name(),
            "connections to {} endpoints end in {:?}", lost.len(), lost.deadline
        );
        tokio::task::spawn_local(async move {
            tokio::time::sleep(lost.deadline).await;
            let (loss, cluster) = (lost.loss, Arc::clone(&lost.cluster));
            let hosts: Arc<[_]> = lost.take().into();
            if hosts.is_empty() {
                return;
            }
            for worker in &workers {
                worker.send(worker::Command::EndHosts(Arc::clone(&hosts), loss));
            }
            if let Some(flows) = flows {
                // Nobody listens any more when the process ends.
                let _ = flows.send(Losses { cluster, loss, hosts });
            }
        });
    }

    /// Connections of chains that are gone end when the drain time has passed.
    fn end_later(&self, draining: Draining) {
        let Draining { listener, whole, chains } = draining;
        let (workers, stats) =
            (self.workers.iter().map(Handle::sender).collect::<Vec<_>>(), Arc::clone(&self.stats));
        let drain_time = self.args.drain_time();
        // Only this thread changes these gauges.
        fn gauge(stats: &Stats, whole: bool) -> SharedGauge<'_> {
            let stats = stats.listener_manager();
            if whole { stats.total_listeners_draining() } else { stats.total_filter_chains_draining() }
        }
        gauge(&stats, whole).set(gauge(&stats, whole).value() + 1);
        tracing::debug!(%listener, "{} filter chains drain for {} s", chains.len(), drain_time.as_secs());
        tokio::task::spawn_local(async move {
            tokio::time::sleep(drain_time).await;
            for chain in &chains {
                chain.end();
            }
            let ids = Arc::new(chains.iter().map(|chain| chain.id).collect::<HashSet<_>>());
            for worker in &workers {
                worker.send(worker::Command::EndChains(Arc::clone(&ids)));
            }
            gauge(&stats, whole).set(gauge(&stats, whole).value().saturating_sub(1));
        });
    }
}
