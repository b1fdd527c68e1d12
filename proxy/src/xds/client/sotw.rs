//! State of the world: each response has everything that was asked for (of LDS and CDS: everything there is), each
//! request all names.

use std::collections::{BTreeMap, HashSet, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_api::core::Node;
use tidegate_api::discovery::{DiscoveryRequest, DiscoveryResponse};
use tidegate_api::wkt::Any;

use super::Ask;
use super::backoff::{Bucket, REJECTIONS};
use super::protocol::{
    Delivery, Next, ORDER, Once, Outcome, Problems, Protocol, Received, ResponseId, WRAPPER, error_detail,
    name_of, ttl, unwrap,
};
use super::ttl::Timers;
use crate::config::config_source::ApiSource;
use crate::xds::{Change, Kind, Resource, Verdict, Wanted};

/// The protocol's state for one source.
#[derive(Debug)]
pub(super) struct Sotw {
    node: Rc<Node>,
    /// Only the first request of a stream has the node.
    node_once: bool,
    node_sent: bool,
    open: bool,
    kinds: BTreeMap<Kind, State>,
    /// Kinds that may have something to send, longest waiting first.
    ready: VecDeque<Kind>,
    /// `rate_limit_settings`
    requests: Option<Bucket>,
    next_number: u64,
}

#[derive(Debug)]
struct State {
    wanted: Wanted,
    /// `version_info` of the newest response that was accepted.
    version: String,
    /// Which response that was.
    accepted: u64,
    /// Nonce of the response that was answered last on this stream, and which that was.
    nonce: String,
    answered: u64,
    /// This stream has asked for this kind.
    requested: bool,
    /// It has asked for names, so that no names means none, not all.
    named: bool,
    /// The server does not know of what is wanted now.
    changed: bool,
    /// Answers that are to be sent.
    answers: VecDeque<Answer>,
    /// Responses that the store has not judged yet.
    judging: Vec<Judging>,
    timers: Timers,
    rejections: Bucket,
}

#[derive(Debug)]
struct Answer {
    number: u64,
    nonce: String,
    version: String,
    error: Option<String>,
}

/// A response that the store looks at.
#[derive(Debug)]
struct Judging {
    number: u64,
    version: String,
    /// None: its stream is gone, nobody waits for an answer.
    nonce: Option<String>,
    received: Instant,
    refused: Option<String>,
    /// Of every resource, where timers are involved: its time to live.
    ttls: Vec<(Arc<str>, Option<Duration>)>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            wanted: Wanted::default(),
            version: String::new(),
            accepted: 0,
            nonce: String::new(),
            answered: 0,
            requested: false,
            named: false,
            changed: false,
            answers: VecDeque::new(),
            judging: Vec::new(),
            timers: Timers::default(),
            rejections: Bucket::new(REJECTIONS),
        }
    }
}

impl Sotw {
    pub(super) fn new(node: Rc<Node>, source: &ApiSource) -> Self {
        Self {
            node,
            node_once: source.set_node_on_first_message_only,
            node_sent: false,
            open: false,
            kinds: BTreeMap::new(),
            ready: VecDeque::new(),
            requests: source.rate_limit.map(Bucket::new),
            next_number: 1,
        }
    }

    fn mark_ready(&mut self, kind: Kind) {
        if !self.ready.contains(&kind) {
            self.ready.push_back(kind);
        }
    }

    fn answer(&mut self, kind: Kind, answer: Answer) {
        if let Some(state) = self.kinds.get_mut(&kind) {
            state.answers.push_back(answer);
            self.mark_ready(kind);
        }
    }
}

impl State {
    /// Whether something can be sent now.
    fn pending(&mut self, now: Instant) -> Pending {
        match self.answers.front() {
            Some(answer) if answer.error.is_some() => {
                self.rejections.ready_at(now).map_or(Pending::Yes, Pending::At)
            }
            Some(_) => Pending::Yes,
            // A request with the nonce of a response would answer it: the change waits for the verdict. As the request
            // that carries the answer has all names, it is not sent again.
            None if self.changed && (!self.requested || self.judging.iter().all(|it| it.nonce.is_none())) => {
                Pending::Yes
            }
            None => Pending::No,
        }
    }

    /// The names of a request.
    fn names(&mut self) -> Vec<String> {
        let Wanted { wildcard, names } = &self.wanted;
        // Without names "everything" is said by silence, unless names were sent before.
        let star = *wildcard && (self.named || !names.is_empty());
        let mut list = Vec::with_capacity(names.len() + usize::from(star));
        if star {
            list.push("*".to_owned());
        }
        list.extend(names.iter().map(|name| (**name).to_owned()));
        self.named |= !list.is_empty();
        list
    }

    fn request(&mut self, kind: Kind) -> DiscoveryRequest {
        let answer = self.answers.pop_front();
        if let Some(answer) = &answer {
            if answer.error.is_some() {
                self.rejections.take();
            }
            if answer.number > self.answered {
                self.answered = answer.number;
                self.nonce.clone_from(&answer.nonce);
            }
        }
        self.requested = true;
        self.changed = false;
        let (version_info, response_nonce, error) = match answer {
            Some(answer) => (answer.version, answer.nonce, answer.error),
            None => (self.version.clone(), self.nonce.clone(), None),
        };
        DiscoveryRequest {
            version_info,
            node: None,
            resource_names: self.names(),
            resource_locators: vec![],
            type_url: kind.type_url().to_owned(),
            response_nonce,
            error_detail: error.map(|text| error_detail(&text)),
        }
    }

    fn is_wanted(&self, name: &str) -> bool {
        self.wanted.wildcard || self.wanted.names.contains(name)
    }

    /// Takes over a change of what is wanted. Whether the server has to know.
    fn ask(&mut self, ask: Ask) -> bool {
        match &ask {
            Ask::Replace(wanted) if *wanted == self.wanted => return false,
            Ask::Add(name) if self.wanted.names.contains(name) => return false,
            Ask::Remove(name) => {
                if !self.wanted.names.contains(name) {
                    return false;
                }
                if !self.wanted.wildcard {
                    self.timers.remove(name);
                }
            }
            _ => {}
        }
        let replaced = matches!(ask, Ask::Replace(_));
        let was_empty = self.wanted.is_empty();
        self.wanted.apply(ask);
        if was_empty && !self.wanted.is_empty() {
            // What it stood for is forgotten: with it, a server might think that we have what we ask for.
            self.version.clear();
        }
        if replaced && !self.wanted.wildcard {
            let names = &self.wanted.names;
            self.timers.retain(|name| names.contains(name));
        }
        if self.wanted.is_empty() {
            self.timers = Timers::default();
            // Nothing on this stream, or everything by silence: there are no words to end that.
            return self.requested && self.named;
        }
        true
    }

    /// Sorts out what is in a response.
    fn sort(&self, kind: Kind, resources: Vec<Any>) -> Result<Sorted, String> {
        let mut problems = Problems::default();
        let mut once = Once::default();
        let mut sorted = Sorted::default();
        for (index, any) in resources.into_iter().enumerate() {
            let one = match One::read(kind, any) {
                Ok(one) => one,
                Err(reason) => {
                    problems.add(format_args!("resources[{index}]: {reason}"));
                    continue;
                }
            };
            if let Err(reason) = once.note(&one.name) {
                problems.add(reason);
            } else if self.is_wanted(&one.name) {
                sorted.take(one);
            }
        }
        match problems.into_text() {
            Some(text) => Err(text),
            None => Ok(sorted),
        }
    }
}

/// What a response has of interest.
#[derive(Default)]
struct Sorted {
    resources: Vec<Resource>,
    unchanged: Vec<Arc<str>>,
    ttls: Vec<(Arc<str>, Option<Duration>)>,
}

impl Sorted {
    fn take(&mut self, one: One) {
        let One { name, wrapped, version, body, ttl } = one;
        match body {
            Some(body) => self.resources.push(Resource {
                name: wrapped.then(|| Arc::clone(&name)),
                version,
                body,
                unknown_fields: vec![],
            }),
            None => self.unchanged.push(Arc::clone(&name)),
        }
        self.ttls.push((name, ttl));
    }
}

/// One resource of a response, checked.
struct One {
    name: Arc<str>,
    wrapped: bool,
    version: String,
    /// None: a heartbeat.
    body: Option<Any>,
    ttl: Option<Duration>,
}

impl One {
    fn read(kind: Kind, any: Any) -> Result<Self, String> {
        if any.type_url != WRAPPER {
            let name = name_of(&any, kind).map_err(|fault| fault.to_string())?;
            return Ok(Self { name, wrapped: false, version: String::new(), body: Some(any), ttl: None });
        }
        let wrapper = unwrap(&any).map_err(|fault| fault.to_string())?;
        let mut name: Arc<str> = wrapper.name.into();
        if let Some(body) = &wrapper.resource {
            let own = name_of(body, kind).map_err(|fault| format!("{name:?}: {fault}"))?;
            if name.is_empty() {
                name = own;
            } else if name != own {
                return Err(format!("{name:?}: the resource calls itself {own:?}"));
            }
        } else if name.is_empty() {
            return Err("a Resource without a name and a body".to_owned());
        }
        let (version, body) = (wrapper.version, wrapper.resource);
        Ok(Self { name, wrapped: true, version, body, ttl: ttl(wrapper.ttl) })
    }
}

enum Pending {
    Yes,
    At(Instant),
    No,
}

impl Protocol for Sotw {
    type Request = DiscoveryRequest;
    type Response = DiscoveryResponse;

    fn ask(&mut self, kind: Kind, ask: Ask) {
        let state = self.kinds.entry(kind).or_default();
        if state.ask(ask) {
            state.changed = true;
            self.mark_ready(kind);
        } else if state.wanted.is_empty() {
            state.changed = false;
        }
    }

    fn kinds(&self) -> Vec<Kind> {
        ORDER
            .into_iter()
            .filter(|kind| self.kinds.get(kind).is_some_and(|state| !state.wanted.is_empty()))
            .collect()
    }

    fn opened(&mut self) {
        self.closed();
        self.open = true;
        for kind in self.kinds() {
            if let Some(state) = self.kinds.get_mut(&kind) {
                state.changed = true;
            }
            self.mark_ready(kind);
        }
    }

    fn closed(&mut self) {
        self.open = false;
        self.node_sent = false;
        self.ready.clear();
        for state in self.kinds.values_mut() {
            state.nonce.clear();
            state.requested = false;
            state.named = false;
            state.changed = false;
            state.answers.clear();
            state.judging.iter_mut().for_each(|judging| judging.nonce = None);
        }
    }

    fn next(&mut self, now: Instant) -> Next<DiscoveryRequest> {
        let mut first: Option<Instant> = None;
        for _ in 0..if self.open { self.ready.len() } else { 0 } {
            let Some(kind) = self.ready.pop_front() else { break };
            let Some(state) = self.kinds.get_mut(&kind) else { continue };
            match state.pending(now) {
                Pending::No => continue,
                Pending::At(at) => {
                    first = Some(first.map_or(at, |first| first.min(at)));
                    self.ready.push_back(kind);
                    continue;
                }
                Pending::Yes => {}
            }
            if let Some(at) = self.requests.as_mut().and_then(|bucket| bucket.ready_at(now)) {
                self.ready.push_front(kind);
                return Next::Wait(at);
            }
            self.requests.iter_mut().for_each(Bucket::take);
            let mut request = state.request(kind);
            if !(self.node_once && self.node_sent) {
                request.node = Some((*self.node).clone());
                self.node_sent = true;
            }
            if !matches!(state.pending(now), Pending::No) {
                self.ready.push_back(kind);
            }
            return Next::Send(request);
        }
        first.map_or(Next::Idle, Next::Wait)
    }

    fn receive(&mut self, response: DiscoveryResponse, now: Instant) -> Received {
        let DiscoveryResponse {
            version_info: version,
            resources,
            canary: _,
            type_url,
            nonce,
            control_plane: _,
            resource_errors: _,
        } = response;
        let subscription = Kind::of(&type_url).and_then(|kind| Some((kind, self.kinds.get_mut(&kind)?)));
        let Some((kind, state)) = subscription.filter(|(_, state)| state.requested) else {
            return Received::Ignored(format!("a response of type {type_url:?}, which was not asked for"));
        };
        let number = self.next_number;
        self.next_number += 1;
        if state.wanted.is_empty() {
            self.answer(kind, Answer { number, nonce, version, error: None });
            return Received::Done;
        }
        let Sorted { resources, unchanged, mut ttls } = match state.sort(kind, resources) {
            Ok(sorted) => sorted,
            Err(reason) => {
                let old = state.version.clone();
                self.answer(kind, Answer { number, nonce, version: old, error: Some(reason.clone()) });
                return Received::Rejected { kind, version, reason };
            }
        };
        if resources.is_empty() && !unchanged.is_empty() {
            // Heartbeats only: this is no state of the world.
            for (name, ttl) in &ttls {
                state.timers.set(name, *ttl, now);
            }
            state.version.clone_from(&version);
            state.accepted = number;
            self.answer(kind, Answer { number, nonce, version, error: None });
            return Received::Done;
        }
        if state.timers.is_empty() && ttls.iter().all(|(_, ttl)| ttl.is_none()) {
            ttls = Vec::new();
        }
        state.judging.push(Judging {
            number,
            version: version.clone(),
            nonce: Some(nonce),
            received: now,
            refused: None,
            ttls,
        });
        Received::Deliver(Delivery {
            id: ResponseId { kind, number },
            change: Change::State { version, resources, unreadable: vec![], unchanged },
            refused: None,
        })
    }

    fn judged(&mut self, id: ResponseId, verdict: Verdict) {
        let Some(state) = self.kinds.get_mut(&id.kind) else { return };
        let Some(at) = state.judging.iter().position(|judging| judging.number == id.number) else { return };
        let Judging { number, version, nonce, received, refused, ttls } = state.judging.remove(at);
        let outcome = Outcome::new(verdict, refused);
        if outcome.anything_applied() && !state.wanted.is_empty() {
            if id.kind.lists_everything() && !state.timers.is_empty() {
                let listed: HashSet<&str> = ttls.iter().map(|(name, _)| &**name).collect();
                state.timers.retain(|name| listed.contains(name));
            }
            for (name, ttl) in &ttls {
                if outcome.applied(name) && state.is_wanted(name) {
                    state.timers.set(name, *ttl, received);
                }
            }
        }
        let accepted = outcome.error.is_none();
        if accepted && number > state.accepted && !state.wanted.is_empty() {
            state.version.clone_from(&version);
            state.accepted = number;
        }
        let version = if accepted { version } else { state.version.clone() };
        match nonce {
            Some(nonce) => self.answer(id.kind, Answer { number, nonce, version, error: outcome.error }),
            None => self.mark_ready(id.kind),
        }
    }

    fn pending(&self) -> usize {
        self.ready.len()
    }

    fn unanswered(&self) -> usize {
        self.kinds.values().map(|state| state.judging.len() + state.answers.len()).sum()
    }

    fn expires_at(&self) -> Option<Instant> {
        self.kinds.values().filter_map(|state| state.timers.first()).min()
    }

    fn expire(&mut self, now: Instant) -> Vec<(Kind, Vec<Arc<str>>)> {
        let expired = self.kinds.iter_mut().map(|(kind, state)| (*kind, state.timers.expire(now)));
        expired.filter(|(_, names)| !names.is_empty()).collect()
    }

    fn identifier(response: &DiscoveryResponse) -> Option<&str> {
        response.control_plane.as_ref().map(|plane| &*plane.identifier).filter(|name| !name.is_empty())
    }

    fn method(kind: Option<Kind>) -> &'static str {
        match kind {
            None => "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources",
            Some(Kind::Listener) => "/envoy.service.listener.v3.ListenerDiscoveryService/StreamListeners",
            Some(Kind::RouteConfiguration) => "/envoy.service.route.v3.RouteDiscoveryService/StreamRoutes",
            // There is no such service: the server will say so. The conversion warns of it.
            Some(Kind::VirtualHost) => {
                "/envoy.service.route.v3.VirtualHostDiscoveryService/StreamVirtualHosts"
            }
            Some(Kind::Cluster) => "/envoy.service.cluster.v3.ClusterDiscoveryService/StreamClusters",
            Some(Kind::ClusterLoadAssignment) => {
                "/envoy.service.endpoint.v3.EndpointDiscoveryService/StreamEndpoints"
            }
            Some(Kind::Secret) => "/envoy.service.secret.v3.SecretDiscoveryService/StreamSecrets",
        }
    }
}

#[cfg(test)]
#[path = "sotw/tests.rs"]
mod tests;
