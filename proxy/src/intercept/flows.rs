//! Sockets of applications that are connected straight to an endpoint, and their end.
//!
//! They are found by what the programs have left on them ([`Flow`]), in the network namespaces of the pods: nobody else's
//! socket is ever touched.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd as _, OwnedFd};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tidegate_common::{Flow, Phase};

use super::bpf;
use super::pods::PodEvent;
use super::tables::Tables;
use crate::sys::netns::NetNs;
use crate::sys::socket_diag::{Connection, SocketDiag};

/// The namespaces of enrolled pods, by cookie. All clones are one.
#[derive(Clone, Debug, Default)]
pub(super) struct Namespaces(Arc<Mutex<BTreeMap<u64, Arc<NetNs>>>>);

impl Namespaces {
    /// A pod came, or is gone.
    pub(super) fn note(&self, event: &PodEvent) {
        match event {
            PodEvent::Enrolled { capture, .. } => {
                let namespace = capture.pod.netns();
                self.lock().insert(namespace.cookie(), Arc::clone(namespace));
            }
            PodEvent::Gone { capture } => {
                self.lock().remove(&capture.pod.netns().cookie());
            }
        }
    }

    fn all(&self) -> Vec<Arc<NetNs>> {
        self.lock().values().cloned().collect()
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Arc<NetNs>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Finds and ends them. For a thread that may wait: it moves through the namespaces.
#[derive(Clone, Debug)]
pub struct FlowSockets {
    pub(super) map: Arc<OwnedFd>,
    pub(super) namespaces: Namespaces,
    pub(super) tables: Arc<Tables>,
}

/// A host of the kernel path.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FlowHost {
    /// Where it is.
    pub address: SocketAddr,
    /// Index of its cluster.
    pub cluster: u32,
    /// Its own index.
    pub host: u32,
}

/// A connection that is about to be ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct FlowId {
    /// Namespace of the application.
    pub netns_cookie: u64,
    /// Its address.
    pub client: SocketAddr,
    /// The address of the endpoint.
    pub endpoint: SocketAddr,
}

impl FlowSockets {
    /// Ends every connection to this host, with a RST to the endpoint and ECONNABORTED to the application, and returns how
    /// many there were. `note` hears of each before it ends, with true; and once more, with false, if it had ended by itself.
    ///
    /// Errors: what keeps it from looking into a namespace, or from ending a connection ([`SocketDiag::destroy`]). The
    /// other namespaces are done first.
    pub fn end(&self, host: FlowHost, mut note: impl FnMut(FlowId, bool)) -> io::Result<usize> {
        let (mut ended, mut failed) = (0, None);
        for namespace in self.namespaces.all() {
            match self.end_in(&namespace, host, &mut note) {
                Ok(count) => ended += count,
                Err(error) => failed = Some(error),
            }
        }
        failed.map_or(Ok(ended), Err)
    }

    fn end_in(
        &self,
        namespace: &NetNs,
        host: FlowHost,
        note: &mut impl FnMut(FlowId, bool),
    ) -> io::Result<usize> {
        let diag = {
            let _inside = namespace.enter()?;
            SocketDiag::open()?
        };
        let connections = diag.connections_to(host.address, Some(self.map.as_fd()))?;
        let mut ended = 0;
        for connection in connections.iter().filter(|connection| self.is_to(connection, host)) {
            let flow = FlowId {
                netns_cookie: namespace.cookie(),
                client: connection.local,
                endpoint: connection.remote,
            };
            note(flow, true);
            let ending = self.tables.ending(connection.cookie());
            let destroyed = diag.destroy(connection);
            drop(ending);
            if destroyed? {
                ended += 1;
            } else {
                note(flow, false);
            }
        }
        Ok(ended)
    }

    /// Whether the programs sent it there, for this cluster.
    fn is_to(&self, connection: &Connection, host: FlowHost) -> bool {
        // In this order: a storage may be of an earlier connection of the socket.
        let stored = || connection.stored.as_deref().and_then(bpf::read::<Flow>);
        self.tables.flow(connection.cookie()).or_else(stored).is_some_and(|flow| {
            let is_open = flow.phase == Phase::Connecting as u16 || flow.phase == Phase::Established as u16;
            is_open && (flow.cluster, flow.host) == (host.cluster, host.host)
        })
    }
}
