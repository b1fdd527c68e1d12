//! Connections of the kernel path to endpoints that are gone end as the policy of their cluster says
//! ([`crate::cluster::removal`]). Their sockets are the applications': the kernel ends them, with a RST.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tidegate_common::FlowEvent;

use crate::cluster::host::Host;
use crate::cluster::removal::{Loss, Reason};
use crate::intercept::flows::{FlowHost, FlowId, FlowSockets};
use crate::intercept::tables::Tables;

/// A connect that was choosing while the endpoint was removed may come up after the first look. So there are some more,
/// while anybody is connected.
const LOOKS: u32 = 20;
const BETWEEN_LOOKS: Duration = Duration::from_millis(50);

/// A record that has not come after this time was lost.
const PATIENCE: Duration = Duration::from_secs(10);

/// Why connections were ended, until their records arrive. All clones are one.
#[derive(Clone, Debug, Default)]
pub struct Reasons(Arc<Mutex<HashMap<FlowId, (Reason, Instant)>>>);

impl Reasons {
    fn note(&self, flow: FlowId, reason: Reason) {
        self.lock().insert(flow, (reason, Instant::now()));
    }

    fn forget(&self, flow: &FlowId) {
        self.lock().remove(flow);
    }

    fn sweep(&self) {
        self.lock().retain(|_, (_, since)| since.elapsed() < PATIENCE);
    }

    /// Why the connection of this record was ended, if it was.
    pub(super) fn take(&self, event: &FlowEvent) -> Option<Reason> {
        let mut reasons = self.lock();
        if reasons.is_empty() {
            return None;
        }
        let reason = reasons.remove(&FlowId {
            netns_cookie: event.netns_cookie,
            client: (event.client.to_ip(), event.client_port).into(),
            endpoint: (event.endpoint.to_ip(), event.endpoint_port).into(),
        });
        reason.map(|(reason, _)| reason)
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, HashMap<FlowId, (Reason, Instant)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Hosts whose connections are to end.
#[derive(Debug)]
pub struct Doomed {
    /// Name of their cluster.
    pub cluster: Arc<str>,
    /// Why.
    pub loss: Loss,
    /// Who, and their entries in the tables.
    pub hosts: Vec<(Arc<Host>, FlowHost)>,
}

/// Ends them. Waits, and moves through network namespaces: for a thread of its own.
pub fn end(doomed: &Doomed, sockets: &FlowSockets, tables: &Tables, reasons: &Reasons) {
    let Doomed { cluster, loss, hosts } = doomed;
    reasons.sweep();
    let mut ended = 0;
    for look in 0..LOOKS {
        let left = hosts.iter().filter(|(host, at)| {
            // One that may be used again, or is in panic, has new connections: those are not meant.
            let is_gone = look == 0 || (loss.reason == Reason::Removed && host.lost().is_some());
            is_gone && tables.host(at.host).tally.active != 0
        });
        let mut any = false;
        for (_, host) in left {
            any = true;
            let note = |flow: FlowId, ends: bool| {
                if ends {
                    reasons.note(flow, loss.reason);
                } else {
                    reasons.forget(&flow);
                }
            };
            match sockets.end(*host, note) {
                Ok(count) => ended += count,
                Err(error) => {
                    tracing::warn!(
                        %cluster, endpoint = %host.address, %error,
                        "connections to an endpoint that is gone can't be ended"
                    );
                    return;
                }
            }
        }
        // One that has chosen and not sent its SYN yet does not count as connected.
        if !any && (look > 0 || loss.reason != Reason::Removed) {
            break;
        }
        std::thread::sleep(BETWEEN_LOOKS);
    }
    tracing::debug!(%cluster, reason = loss.reason.name(), "{ended} connections of the kernel path were ended");
}
