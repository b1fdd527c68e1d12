//! Enrolling one namespace, keeping its record true, and forgetting it.

use std::io;
use std::net::SocketAddr;
use std::os::fd::AsFd as _;
use std::sync::{Arc, MutexGuard, PoisonError};
use std::time::Duration;

use tidegate_common::Enrolment;

use super::actor::{Actor, Known, RETRY_FIRST, RETRY_LAST, State, Timer};
use super::listen::{self, Network};
use super::{Capture, Pod, PodEvent, PodState, PodStatus};
use crate::cluster::hashing;
use crate::intercept::error::InterceptError;
use crate::intercept::programs::Interceptor;
use crate::sys::netns::NetNsId;

/// Why a namespace can't be enrolled now.
#[derive(Debug, thiserror::Error)]
pub(super) enum EnrolError {
    #[error("its loopback interface is down (`ip link set lo up` inside the pod)")]
    LoopbackDown,
    #[error("{what}: {source}")]
    Io { what: &'static str, source: io::Error },
    #[error(transparent)]
    Kernel(#[from] InterceptError),
}

impl EnrolError {
    fn io(what: &'static str) -> impl FnOnce(io::Error) -> Self {
        move |source| Self::Io { what, source }
    }
}

impl Actor {
    pub(super) fn interceptor(&self) -> MutexGuard<'_, Interceptor> {
        // A panic elsewhere leaves nothing half done that a later call would trip over: each call is one step.
        self.parts.interceptor.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something has changed in this namespace.
    pub(super) fn look_inside(&mut self, id: NetNsId) {
        match self.known.get(&id).map(|known| &known.state) {
            Some(State::Waiting { .. }) => self.enrol(id),
            Some(State::Enrolled { .. }) => self.refresh(id),
            _ => {}
        }
    }

    /// Sets the retry timer of a namespace, unless it is set.
    fn retry_after(&mut self, wait: Duration, id: NetNsId) {
        if let Some(known) = self.known.get_mut(&id)
            && !std::mem::replace(&mut known.retrying, true)
        {
            self.after(wait, Timer::Retry(id));
        }
    }

    /// The retry timer of this namespace is due.
    pub(super) fn retry(&mut self, id: NetNsId) {
        let Some(known) = self.known.get_mut(&id) else { return };
        known.retrying = false;
        match self.known.get(&id).map(|known| &known.state) {
            Some(State::Waiting { .. }) => self.enrol(id),
            Some(State::Enrolled { network, .. }) if network.source.is_empty() => self.refresh(id),
            _ => {}
        }
    }

    /// Enrols a namespace that waits for it, or says why not and sets a timer.
    pub(super) fn enrol(&mut self, id: NetNsId) {
        let Some(known) = self.known.get(&id) else { return };
        let State::Waiting { attempts } = known.state else { return };
        let name = Arc::clone(&known.name);
        if self.superseded {
            return;
        }
        match self.open_and_enrol(id) {
            Ok(state) => {
                let lacks_address =
                    matches!(&state, State::Enrolled { network, .. } if network.source.is_empty());
                self.set_state(id, state);
                if lacks_address {
                    self.retry_after(RETRY_FIRST, id);
                }
            }
            Err(EnrolError::Kernel(InterceptError::Superseded(_))) => self.be_superseded(),
            Err(error) => {
                if attempts == 0 {
                    tracing::warn!(%error, pod = %name, netns = id.inode, "not captured yet; trying again");
                }
                self.set_state(id, State::Waiting { attempts: attempts + 1 });
                if let Some(known) = self.known.get(&id) {
                    self.show(known, PodState::Waiting { reason: error.to_string() });
                }
                self.retry_after(backoff(attempts), id);
            }
        }
    }

    fn open_and_enrol(&mut self, id: NetNsId) -> Result<State, EnrolError> {
        let Some(known) = self.known.get(&id) else { return Ok(State::Waiting { attempts: 0 }) };
        let (wanted, count) = (self.parts.settings.capture_port, self.parts.settings.sockets_per_pod);
        let inside = known.netns.enter().map_err(EnrolError::io("entering its network namespace"))?;
        // Before the look, so that what changes after it is heard.
        if let Err(error) = self.changes.listen_here(id) {
            tracing::warn!(%error, pod = %known.name, "can't hear of changes in a pod: a new address is seen late");
        }
        let network = listen::network().map_err(EnrolError::io("listing its interfaces"))?;
        if !network.loopback_up {
            return Err(EnrolError::LoopbackDown);
        }
        let (sockets, capture_port) = listen::capture_listeners(wanted, count)
            .map_err(EnrolError::io("opening capture listeners in it"))?;
        drop(inside);
        let marker = self.interceptor().own_socket_marker();
        sockets
            .iter()
            .try_for_each(|socket| marker.mark_listener(socket.as_fd()))
            .map_err(EnrolError::io("marking capture listeners"))?;

        let pod = Arc::new(Pod {
            name: Arc::clone(&known.name),
            cgroup: known.cgroup.clone(),
            capture_port,
            netns: Arc::clone(&known.netns),
            host: id == self.own,
        });
        let capture = Arc::new(Capture { pod, original_dst: self.interceptor().original_dst_reader() });
        // The workers have the sockets before the first connection can be sent there.
        (self.parts.on_pod)(PodEvent::Enrolled { capture: Arc::clone(&capture), sockets });
        if let Err(error) = self.write_record(&capture.pod, network) {
            (self.parts.on_pod)(PodEvent::Gone { capture });
            return Err(error.into());
        }
        let note = if capture_port == wanted { "" } else { " (the wanted port is taken there)" };
        let (v4, v6) = (network.source.v4, network.source.v6);
        tracing::info!(pod = %capture.pod, netns = id.inode, capture_port, ?v4, ?v6, "pod captured{note}");
        Ok(State::Enrolled { capture, network, attempts: 0 })
    }

    fn write_record(&self, pod: &Pod, network: Network) -> Result<(), InterceptError> {
        let record = Enrolment::captured(pod.capture_port, network.source.v4, network.source.v6)
            .hashed(|ip| hashing::of_source(SocketAddr::new(ip, 0)));
        let record = if network.keeps_syn { record } else { record.carried_by_map() };
        let record = if pod.host { record.of_host() } else { record };
        self.interceptor().enrol(pod.netns.cookie(), record)
    }

    /// Another process enrols now. What was handed to our workers stays with them until the process has drained.
    pub(super) fn be_superseded(&mut self) {
        if !self.superseded {
            self.superseded = true;
            tracing::info!("another tidegate process has taken over the pods");
        }
    }

    /// Looks at the network of every pod again.
    pub(super) fn refresh_all(&mut self) {
        let enrolled = self.known.iter().filter(|(_, known)| matches!(known.state, State::Enrolled { .. }));
        for id in enrolled.map(|(id, _)| *id).collect::<Vec<_>>() {
            self.refresh(id);
        }
    }

    /// Looks at the network of an enrolled pod again.
    pub(super) fn refresh(&mut self, id: NetNsId) {
        if self.superseded {
            return;
        }
        let Some(known) = self.known.get(&id) else { return };
        let State::Enrolled { capture, network: before, attempts } = &known.state else { return };
        let (capture, before, attempts) = (Arc::clone(capture), *before, *attempts);
        let now = match known.netns.enter().and_then(|_inside| listen::network()) {
            Ok(now) => now,
            Err(error) => {
                tracing::warn!(%error, pod = %known.name, "can't look at a pod's addresses");
                before
            }
        };
        if now != before {
            match self.write_record(&capture.pod, now) {
                Ok(()) => {
                    let (v4, v6) = (now.source.v4, now.source.v6);
                    tracing::info!(pod = %known.name, ?v4, ?v6, now.keeps_syn, "pod's network changed");
                }
                Err(InterceptError::Superseded(_)) => return self.be_superseded(),
                Err(error) => {
                    tracing::warn!(%error, pod = %known.name, "can't update a pod's record; trying again");
                    return self.retry_after(backoff(attempts), id);
                }
            }
        }
        let missing = now.source.is_empty();
        self.set_state(
            id,
            State::Enrolled { capture, network: now, attempts: attempts + u32::from(missing) },
        );
        if missing {
            self.retry_after(backoff(attempts), id);
        }
    }

    /// No process is in this namespace any more.
    pub(super) fn forget(&mut self, id: NetNsId) {
        if matches!(self.known.get(&id), None | Some(Known { state: State::Excluded, .. })) {
            return;
        }
        let Some(known) = self.known.remove(&id) else { return };
        self.changes.forget(id);
        if let State::Enrolled { capture, .. } = known.state {
            let forgotten = self.interceptor().forget(known.netns.cookie());
            match forgotten {
                Ok(_) => {}
                Err(InterceptError::Superseded(_)) => self.superseded = true,
                Err(error) => tracing::warn!(%error, pod = %known.name, "can't remove a pod's enrolment"),
            }
            tracing::info!(pod = %known.name, netns = id.inode, "pod gone");
            (self.parts.on_pod)(PodEvent::Gone { capture });
        }
        // Last: who sees it gone finds nothing of it.
        self.parts.board.lock().unwrap_or_else(PoisonError::into_inner).remove(&id);
    }

    /// Forgets every pod, and then those that are merely known.
    pub(super) fn forget_all(&mut self) {
        for id in self.known.keys().copied().collect::<Vec<_>>() {
            self.forget(id);
        }
        for (id, known) in std::mem::take(&mut self.known) {
            if let Err(error) = self.interceptor().forget(known.netns.cookie())
                && !matches!(error, InterceptError::Superseded(_))
            {
                tracing::warn!(%error, netns = id.inode, "can't remove an enrolment");
            }
        }
        self.parts.board.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    fn set_state(&mut self, id: NetNsId, state: State) {
        let Some(known) = self.known.get_mut(&id) else { return };
        known.state = state;
        let Some(known) = self.known.get(&id) else { return };
        if let State::Enrolled { capture, network, .. } = &known.state {
            let (capture_port, source) = (capture.pod.capture_port, network.source);
            self.show(known, PodState::Enrolled { capture_port, v4: source.v4, v6: source.v6 });
        }
    }

    /// Puts it on the board.
    pub(super) fn show(&self, known: &Known, state: PodState) {
        let netns = known.netns.id();
        let status =
            PodStatus { name: Arc::clone(&known.name), netns, netns_cookie: known.netns.cookie(), state };
        self.parts.board.lock().unwrap_or_else(PoisonError::into_inner).insert(netns, status);
    }
}

fn backoff(attempts: u32) -> Duration {
    RETRY_LAST.min(RETRY_FIRST * 2_u32.pow(attempts.min(16)))
}
