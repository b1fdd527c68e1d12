//! One connection, from accept to its log line. [`serve`] is the walk; each step is a named function.

use std::future::poll_fn;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd};
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use socket2::Socket;

use crate::access_log::AccessLogs;
use crate::addr::OriginalDst;
use crate::cluster::connect::{self, UpstreamGuard};
use crate::config::listener::ListenerFilter;
use crate::drain::Open;
use crate::intercept::Capture;
use crate::listener::balance::{Balance, Place};
use crate::listener::filter::{self, Inspected};
use crate::listener::filter_chain::MatchInput;
use crate::listener::{Chain, HttpAsTcp, Listener, Service, TcpProxy};
use crate::pump::{Cause, Outcome, Side};
use crate::response_flag::ResponseFlag;
use crate::snapshot::Snapshot;
use crate::sys;
use crate::uring::{self, PendingHangUp, Source, spawn, time};
use crate::worker::Worker;

pub mod destination;
mod dial;
pub mod meter;
pub mod record;
mod relay;

use dial::Dial;
use record::{CloseType, Kept, LogType, Record, Retransmitted};
use relay::{Parked, Rare, relay};

/// How long an upstream is connected to before somebody looks whether the downstream is still there.
const WATCH_AFTER: Duration = Duration::from_millis(5);

/// What an accept loop hands over.
#[derive(Debug)]
pub struct Accepted {
    /// The nonblocking socket.
    pub socket: Socket,
    /// Who connected.
    pub peer: SocketAddr,
    /// The listener whose socket accepted it. None: a capture socket, and no listener has `use_original_dst`.
    pub listener: Option<Arc<Listener>>,
    /// Where it was captured; none for a bound listener.
    pub capture: Option<Arc<Capture>>,
    /// The configuration that decides who serves it. Let go once its upstream stands: an idle connection must not
    /// keep a configuration of long ago in memory.
    pub snapshot: Arc<Snapshot>,
}

/// An accepted connection of which is known where it belongs, before any worker has begun to serve it.
#[derive(Debug)]
pub struct Arrived {
    accepted: Accepted,
    /// The address that it was accepted at.
    local: SocketAddr,
    original_dst: Option<OriginalDst>,
    /// Who serves it first: that of `accepted`, or the owner of the original destination.
    listener: Arc<Listener>,
    /// Taken at the worker that is to serve it, where connections are balanced.
    place: Option<Place>,
}

/// Serves one connection until its upstream stands; a task of its own serves it from there to its end.
///
/// They are two tasks because most connections are idle most of the time: what they took to set up is freed.
pub fn serve(worker: Rc<Worker>, mut arrived: Arrived) -> impl Future<Output = ()> + 'static {
    let owner = arrived.accepted.capture.as_ref().map_or(0, |capture| capture.pod.netns().cookie());
    let open = worker.connections.open(owner);
    arrived.place = arrived.place.and_then(|place| open.keep(place));
    let (mut connection, snapshot) = Connection::begin(worker, arrived);
    async move {
        match connection.establish(snapshot, &open).await {
            Ok(established) => {
                if let Some(parked) = connection.park(established) {
                    open.prepare_next();
                    spawn(relay(parked, open));
                }
            }
            // It was never served: as in Envoy, no log has it.
            Err(EndedEarly::Overflow) => {}
            Err(ended) => {
                connection.note_early(&ended);
                connection.finish();
            }
        }
    }
}

impl Arrived {
    /// Looks at what was accepted. None: nobody serves it, and it was reset.
    pub fn look(worker: &Worker, mut accepted: Accepted) -> Option<Self> {
        let local = sys::socket::local_addr(&accepted.socket).ok()?; // fails only when the peer is gone already
        let (listener, capture) = (accepted.listener.take(), accepted.capture.as_deref());
        let restores =
            capture.is_some() || listener.as_ref().is_some_and(|listener| listener.restores_destination());
        let transparent = listener.as_ref().is_some_and(|listener| listener.config.transparent);
        let original_dst =
            restores.then(|| destination::restore(&accepted.socket, local, capture, transparent)).flatten();
        // Without a virtualOutbound listener a capture socket has no listener of its own: the owner of the
        // restored destination serves the connection from the start.
        let listener = listener.or_else(|| accepted.snapshot.owner(original_dst?.0).cloned());
        let Some(listener) = listener.filter(|_| capture.is_none() || original_dst.is_some()) else {
            worker.shared.not_served.fetch_add(1, Ordering::Relaxed);
            uring::reset(accepted.socket.as_fd());
            return None;
        };
        Some(Self { accepted, local, original_dst, listener, place: None })
    }

    /// Chooses the worker that is to serve it, where its listener wants connections balanced.
    pub fn choose_worker(&mut self, worker: &Worker) -> usize {
        let Some(balance) = self.balance(worker) else { return worker.index };
        let place = balance.choose(worker.index);
        let chosen = place.worker();
        self.place = Some(place);
        chosen
    }

    /// What decides is who will serve it. A listener that only hands connections on has none to count: what came through
    /// any of those is counted together.
    fn balance<'a>(&'a self, worker: &'a Worker) -> Option<&'a Arc<Balance>> {
        let Accepted { snapshot, capture, .. } = &self.accepted;
        if !snapshot.has_exact_balance() {
            return None;
        }
        let hands_on = self.listener.config.use_original_dst || capture.is_some();
        let owner =
            self.original_dst.filter(|_| hands_on).and_then(|destination| snapshot.owner(destination.0));
        match owner {
            Some(owner) if !Arc::ptr_eq(owner, &self.listener) => owner
                .balance()
                .or_else(|| self.listener.config.exact_balance.then_some(&worker.shared.handed_on)),
            _ => self.listener.balance(),
        }
    }
}

/// A connection while it is set up, and when it ends. Owned by its task.
struct Connection {
    worker: Rc<Worker>,
    downstream: Socket,
    capture: Option<Arc<Capture>>,
    original_dst: Option<OriginalDst>,
    /// Who serves it: first the listener that accepted it, then the one that it was handed to.
    listener: Arc<Listener>,
    /// Its place at this worker, until it is admitted.
    place: Option<Place>,
    /// Its place in the listener's counts; taken once the hand-off is decided.
    admission: Option<Admission>,
    /// The chain in charge, once one was found.
    chain: Option<Arc<Chain>>,
    /// The tcp_proxy in charge.
    proxy: Option<Arc<TcpProxy>>,
    record: Record,
}

/// Counts a connection while its listener serves it. All of it is given back when this is dropped.
struct Admission {
    worker: Rc<Worker>,
    listener: Arc<Listener>,
    /// Once it has a service. Of an HTTP listener, that counts it too.
    chain: Option<Arc<Chain>>,
}

impl Admission {
    /// None: the listener has reached its limit.
    fn new(worker: &Rc<Worker>, listener: &Arc<Listener>, place: Option<Place>) -> Option<Self> {
        if !listener.admit() {
            return None;
        }
        if let Some(balance) = listener.balance() {
            let place = place.filter(|place| place.is_of(balance));
            place.unwrap_or_else(|| balance.add(worker.index)).keep();
        }
        listener.stats.downstream_cx_active().inc();
        worker.shared.stats.server().total_connections().inc();
        Some(Self { worker: Rc::clone(worker), listener: Arc::clone(listener), chain: None })
    }

    fn serve(&mut self, chain: &Arc<Chain>) {
        if let Service::Http(http) = &chain.service {
            http.stats.downstream_cx_active().inc();
        }
        self.chain = Some(Arc::clone(chain));
    }

    fn http(&self) -> Option<&HttpAsTcp> {
        match &self.chain.as_ref()?.service {
            Service::Http(http) => Some(http),
            Service::Tcp(_) | Service::Nothing => None,
        }
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if let Some(http) = self.http() {
            http.stats.downstream_cx_active().dec();
        }
        self.worker.shared.stats.server().total_connections().dec();
        self.listener.stats.downstream_cx_active().dec();
        if let Some(balance) = self.listener.balance() {
            balance.release(self.worker.index);
        }
        self.listener.release();
    }
}

/// Both ends stand.
struct Established {
    upstream: Socket,
    guard: UpstreamGuard,
    /// A wait for the end of the downstream, if connecting took so long that one was begun.
    hang_up: Option<PendingHangUp>,
    proxy: Arc<TcpProxy>,
    deadline: Option<Instant>,
}

/// A connection that ended before its upstream stood.
#[derive(Debug)]
enum EndedEarly {
    /// The listener has reached its connection limit.
    Overflow,
    /// A listener filter ended it.
    Filter(filter::Ended),
    /// No filter chain matched, or no virtual host.
    NoRoute,
    /// The chain has no filters.
    NoFilters,
    /// No upstream; the record says why.
    NoUpstream(connect::Failure),
    /// The downstream went away while we were connecting.
    DownstreamGone,
    /// Its maximum duration passed while we were connecting.
    MaxDuration,
    /// It was told to end.
    Killed,
}

impl Connection {
    fn begin(worker: Rc<Worker>, arrived: Arrived) -> (Self, Arc<Snapshot>) {
        let Arrived { accepted, local, original_dst, listener, place } = arrived;
        let Accepted { socket, peer, capture, snapshot, .. } = accepted;
        let name = Arc::clone(&listener.config.name);
        let record = Record::new(worker.next_connection_id(), peer, local, original_dst, name);
        let connection = Self {
            worker,
            downstream: socket,
            capture,
            original_dst,
            listener,
            place,
            admission: None,
            chain: None,
            proxy: None,
            record,
        };
        (connection, snapshot)
    }

    /// Everything up to a connected upstream.
    async fn establish(&mut self, snapshot: Arc<Snapshot>, open: &Open) -> Result<Established, EndedEarly> {
        let mut inspected = Inspected::default();
        self.inspect(&mut inspected).await?;
        if self.hand_off(&snapshot) {
            self.inspect(&mut inspected).await?;
        }
        self.admit()?;
        self.find_chain(&inspected, open)?;
        let proxy = self.choose_proxy()?;
        self.start(&proxy);
        self.connect(proxy, &snapshot, open).await
    }

    /// Runs the listener filters of the listener in charge.
    async fn inspect(&mut self, inspected: &mut Inspected) -> Result<(), EndedEarly> {
        let config = Arc::clone(&self.listener.config);
        if config.listener_filters.iter().all(|filter| *filter == ListenerFilter::OriginalDst) {
            return Ok(());
        }
        let _pending = self.listener.stats.downstream_pre_cx_active().guard();
        let stats = &self.worker.shared.stats;
        filter::run(&self.downstream, &config, stats, inspected).await.map_err(EndedEarly::Filter)?;
        if let Some(source) = inspected.source {
            self.record.downstream_remote = source;
        }
        if let Some(destination) = inspected.destination {
            self.record.downstream_local = destination;
            self.original_dst = Some(OriginalDst(destination));
        }
        if inspected.timed_out {
            self.listener.stats.downstream_pre_cx_timeout().inc();
            inspected.timed_out = false;
        }
        if inspected.server_name.is_some() {
            self.record.details_mut().requested_server_name.clone_from(&inspected.server_name);
        }
        Ok(())
    }

    /// Hands the connection to the listener that owns its restored destination. Called once.
    fn hand_off(&mut self, snapshot: &Snapshot) -> bool {
        if !(self.listener.config.use_original_dst || self.capture.is_some()) {
            return false;
        }
        let Some(destination) = self.original_dst else { return false };
        match snapshot.owner(destination.0) {
            Some(owner) if !Arc::ptr_eq(owner, &self.listener) => {
                self.listener = Arc::clone(owner);
                self.record.listener = Arc::clone(&owner.config.name);
                true
            }
            _ => false,
        }
    }

    /// Takes the connection into the listener's counts.
    fn admit(&mut self) -> Result<(), EndedEarly> {
        let stats = &self.listener.stats;
        self.admission = Admission::new(&self.worker, &self.listener, self.place.take());
        if self.admission.is_none() {
            stats.downstream_cx_overflow().inc();
            return Err(EndedEarly::Overflow);
        }
        Ok(())
    }

    fn find_chain(&mut self, inspected: &Inspected, open: &Open) -> Result<(), EndedEarly> {
        let input = MatchInput {
            destination: self.record.downstream_local,
            source: self.record.downstream_remote,
            direct_source: self.record.downstream_direct_remote.ip(),
            transport_protocol: inspected.transport_protocol,
            server_name: inspected.server_name.as_deref().unwrap_or(""),
            application_protocols: &inspected.application_protocols,
        };
        let Some(chain) = self.listener.find_chain(&input) else {
            self.listener.stats.no_filter_chain_match().inc();
            self.record.flags.set(ResponseFlag::NoRouteFound);
            self.record.details_mut().response_code_details = Some("filter_chain_not_found");
            return Err(EndedEarly::NoRoute);
        };
        self.listener.stats.downstream_cx_total().inc();
        self.record.filter_chain = Arc::clone(&chain.config.name);
        self.chain = Some(Arc::clone(chain));
        open.set_chain(chain.id);
        if chain.has_ended() { Err(EndedEarly::Killed) } else { Ok(()) }
    }

    fn choose_proxy(&mut self) -> Result<Arc<TcpProxy>, EndedEarly> {
        let Some(chain) = &self.chain else { return Err(EndedEarly::NoFilters) };
        if let Some(admission) = &mut self.admission {
            admission.serve(chain);
        }
        match &chain.service {
            Service::Nothing => Err(EndedEarly::NoFilters),
            Service::Tcp(proxy) => Ok(Arc::clone(proxy)),
            Service::Http(http) => {
                http.stats.downstream_cx_total().inc();
                let Some((proxy, route)) = http.choose(self.record.downstream_local) else {
                    self.record.flags.set(ResponseFlag::NoRouteFound);
                    return Err(EndedEarly::NoRoute);
                };
                self.record.details_mut().route_name = Some(route);
                Ok(proxy)
            }
        }
    }

    /// The tcp_proxy takes over.
    fn start(&mut self, proxy: &Arc<TcpProxy>) {
        proxy.stats.downstream_cx_total().inc();
        self.proxy = Some(Arc::clone(proxy));
        self.record.upstream_close_type = Some(CloseType::Normal);
        if proxy.config.flush_access_log_on_start {
            proxy.access_log.write(&self.record, LogType::TcpConnectionStart);
        }
    }

    /// Connects to an upstream, unless the downstream leaves or time is up before that.
    async fn connect(
        &mut self,
        proxy: Arc<TcpProxy>,
        snapshot: &Snapshot,
        open: &Open,
    ) -> Result<Established, EndedEarly> {
        let deadline = max_duration(&proxy).map(|duration| self.record.start + duration);
        let dial = Dial {
            worker: &self.worker,
            snapshot,
            capture: self.capture.as_deref(),
            accepted_on: self.record.downstream_direct_local,
        };
        let mut downstream = Source::new(self.downstream.as_fd());
        let connecting = connect::connect(&dial, &proxy.config, self.original_dst, &mut self.record);
        let connected = tokio::select! {
            biased;
            connected = connecting => connected.map_err(EndedEarly::NoUpstream)?,
            _ = open.killed() => return Err(EndedEarly::Killed),
            () = until(deadline) => return Err(EndedEarly::MaxDuration),
            () = gone(&mut downstream) => return Err(EndedEarly::DownstreamGone),
        };
        let hang_up = downstream.take_hang_up();
        let (upstream, guard) = connected.into_parts();
        let wanted = |logs: &AccessLogs| logs.wants_upstream_local_address();
        if let Some(host) = &mut self.record.upstream
            && (wanted(&self.listener.access_log) || wanted(&proxy.access_log))
        {
            host.local_address = sys::socket::local_addr(&upstream).ok();
        }
        Ok(Established { upstream, guard, hang_up, proxy, deadline })
    }

    /// Both ends stand: leaves what is needed from here on. Not before the connection was admitted and has a chain.
    fn park(self, established: Established) -> Option<Parked> {
        let Established { upstream, guard, hang_up, proxy, deadline } = established;
        Some(Parked {
            downstream: self.downstream,
            upstream,
            guard,
            capture: self.capture,
            admission: self.admission?,
            proxy,
            kept: Kept::new(self.record),
            rare: (hang_up.is_some() || deadline.is_some()).then(|| Box::new(Rare { hang_up, deadline })),
        })
    }

    /// Writes down how an established connection ended.
    fn note(&mut self, outcome: Outcome, proxy: &TcpProxy) {
        self.record.downstream_close_type = outcome.downstream;
        // As in Envoy, a reset that we passed on to the upstream is not its own doing: Normal.
        let reset_by_upstream = outcome.upstream == CloseType::RemoteReset;
        self.record.upstream_close_type =
            Some(if reset_by_upstream { CloseType::RemoteReset } else { CloseType::Normal });
        match outcome.cause {
            Cause::Reset { by: Side::Upstream } if reset_by_upstream => {
                self.record.flags.set(ResponseFlag::UpstreamRemoteReset);
            }
            Cause::IdleTimeout => {
                proxy.stats.idle_timeout().inc();
                self.record.details_mut().downstream_local_close_reason =
                    Some("tcp_session_idle_timeout".into());
                self.record.details_mut().upstream_local_close_reason =
                    Some("tcp_session_idle_timeout".into());
            }
            Cause::MaxDuration => self.note_max_duration(),
            Cause::Finished { .. } | Cause::Reset { .. } | Cause::Error { .. } | Cause::Killed => {}
        }
    }

    fn note_max_duration(&mut self) {
        if let Some(proxy) = &self.proxy {
            proxy.stats.max_downstream_connection_duration().inc();
        }
        self.record.flags.set(ResponseFlag::DurationTimeout);
        self.record.details_mut().downstream_local_close_reason =
            Some("max_connection_duration_reached".into());
        self.record.details_mut().upstream_local_close_reason =
            Some("max_connection_duration_reached".into());
    }

    /// Writes down why there was no upstream. The downstream is closed as Linux does it: with a FIN, or with a RST
    /// when something was left unread; so does Envoy.
    fn note_early(&mut self, ended: &EndedEarly) {
        match ended {
            EndedEarly::Filter(ended) => ended.count(&self.listener.stats),
            EndedEarly::NoUpstream(connect::Failure::NoRoute) => {
                if let Some(proxy) = &self.proxy {
                    proxy.stats.downstream_cx_no_route().inc();
                }
            }
            EndedEarly::MaxDuration => self.note_max_duration(),
            EndedEarly::DownstreamGone => self.record.downstream_close_type = CloseType::RemoteReset,
            EndedEarly::NoFilters => {
                self.record.details_mut().downstream_local_close_reason = Some("no_filters".into());
            }
            EndedEarly::Overflow | EndedEarly::NoRoute | EndedEarly::NoUpstream(_) | EndedEarly::Killed => {}
        }
    }

    /// Counts and logs the connection. Called exactly once, at its end.
    fn finish(&mut self) {
        let duration = self.record.start.elapsed();
        self.record.duration = Some(duration);
        let wanted = self.listener.access_log.wants_retransmitted()
            || self.proxy.as_ref().is_some_and(|proxy| proxy.access_log.wants_retransmitted());
        if wanted && let Ok(measured) = sys::socket::measured(self.downstream.as_fd()) {
            self.record.details_mut().retransmitted = Retransmitted {
                bytes: measured.retransmitted_bytes,
                packets: measured.retransmitted_segments.into(),
            };
        }
        if self.admission.take().is_some() {
            self.listener.stats.downstream_cx_destroy().inc();
            self.listener.stats.downstream_cx_length_ms().record(duration.as_millis() as u64);
        }
        if let Some(proxy) = &self.proxy {
            proxy.access_log.write(&self.record, LogType::TcpConnectionEnd);
        }
        self.listener.access_log.write(&self.record, LogType::NotSet);
    }
}

/// `max_downstream_connection_duration` with its jitter.
fn max_duration(proxy: &TcpProxy) -> Option<Duration> {
    let duration = proxy.config.max_downstream_connection_duration?;
    let jitter = proxy.config.max_downstream_connection_duration_jitter_percentage.unwrap_or(0.0);
    Some(duration.mul_f64(1.0 + fastrand::f64() * jitter / 100.0))
}

/// The downstream is gone. Nobody looks before connecting takes long: what that costs is spent on every connection.
async fn gone(downstream: &mut Source<BorrowedFd<'_>>) {
    time::sleep(WATCH_AFTER).await;
    let _ = poll_fn(|cx| downstream.poll_hang_up(cx)).await;
}

async fn until(deadline: Option<Instant>) {
    match deadline {
        Some(deadline) => time::sleep_until(deadline).await,
        None => std::future::pending().await,
    }
}
