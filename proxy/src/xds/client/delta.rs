//! Incremental: responses have what changed and what is gone, requests what is wanted from now on and what no longer.

use std::collections::{BTreeMap, BTreeSet, HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tidegate_api::core::Node;
use tidegate_api::discovery::{DeltaDiscoveryRequest, DeltaDiscoveryResponse, Resource as Wrapper};

use super::Ask;
use super::backoff::{Bucket, REJECTIONS};
use super::protocol::{
    Delivery, Next, ORDER, Once, Outcome, Problems, Protocol, Received, ResponseId, error_detail, name_of,
    ttl,
};
use super::ttl::Timers;
use crate::config::config_source::ApiSource;
use crate::xds::{Change, Kind, Resource, Verdict, Wanted};

/// The protocol's state for one source.
#[derive(Debug)]
pub(super) struct Delta {
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
    /// Versions of the resources that were accepted and hold.
    versions: HashMap<Arc<str>, Arc<str>>,
    /// This stream has asked for this kind. The next three say what it has to be told since then.
    requested: bool,
    /// It was told that everything is wanted.
    told_wildcard: bool,
    /// Names to subscribe to, and whether the stream was told of them before.
    subscribe: BTreeMap<Arc<str>, bool>,
    /// Names that the stream was told of and that nobody wants any more.
    unsubscribe: BTreeSet<Arc<str>>,
    /// Answers that are to be sent.
    answers: VecDeque<Answer>,
    /// Responses that the store has not judged yet.
    judging: Vec<Judging>,
    timers: Timers,
    rejections: Bucket,
}

#[derive(Debug)]
struct Answer {
    nonce: String,
    error: Option<String>,
}

/// A response that the store looks at.
#[derive(Debug)]
struct Judging {
    number: u64,
    /// None: its stream is gone, nobody waits for an answer.
    nonce: Option<String>,
    received: Instant,
    refused: Option<String>,
    resources: Vec<Judged>,
    removed: Vec<Arc<str>>,
}

#[derive(Debug)]
struct Judged {
    name: Arc<str>,
    /// None: a heartbeat.
    version: Option<Arc<str>>,
    ttl: Option<Duration>,
}

impl Default for State {
    fn default() -> Self {
        Self {
            wanted: Wanted::default(),
            versions: HashMap::new(),
            requested: false,
            told_wildcard: false,
            subscribe: BTreeMap::new(),
            unsubscribe: BTreeSet::new(),
            answers: VecDeque::new(),
            judging: Vec::new(),
            timers: Timers::default(),
            rejections: Bucket::new(REJECTIONS),
        }
    }
}

impl Delta {
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

    fn answer(&mut self, kind: Kind, nonce: String, error: Option<String>) {
        if let Some(state) = self.kinds.get_mut(&kind) {
            state.answers.push_back(Answer { nonce, error });
            self.mark_ready(kind);
        }
    }
}

/// What a request is for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// The first one of its kind on a stream.
    First,
    Answer,
    /// To subscribe or unsubscribe.
    Change,
}

enum Pending {
    Yes(Purpose),
    At(Instant),
    No,
}

impl State {
    /// Whether something can be sent now, and what.
    fn pending(&mut self, now: Instant) -> Pending {
        if !self.requested {
            return if self.wanted.is_empty() { Pending::No } else { Pending::Yes(Purpose::First) };
        }
        let wait = match self.answers.front() {
            Some(answer) if answer.error.is_some() => self.rejections.ready_at(now),
            Some(_) => None,
            None if self.has_changes() => return Pending::Yes(Purpose::Change),
            None => return Pending::No,
        };
        match wait {
            None => Pending::Yes(Purpose::Answer),
            // A change is no answer: it need not wait for one.
            Some(_) if self.has_changes() => Pending::Yes(Purpose::Change),
            Some(at) => Pending::At(at),
        }
    }

    fn has_changes(&self) -> bool {
        self.told_wildcard != self.wanted.wildcard
            || !self.subscribe.is_empty()
            || !self.unsubscribe.is_empty()
    }

    fn request(&mut self, kind: Kind, purpose: Purpose) -> DeltaDiscoveryRequest {
        let mut request =
            DeltaDiscoveryRequest { type_url: kind.type_url().to_owned(), ..Default::default() };
        match purpose {
            Purpose::First => self.first(&mut request),
            Purpose::Change => self.change(&mut request),
            Purpose::Answer => {
                if let Some(Answer { nonce, error }) = self.answers.pop_front() {
                    if error.is_some() {
                        self.rejections.take();
                    }
                    request.response_nonce = nonce;
                    request.error_detail = error.map(|text| error_detail(&text));
                }
            }
        }
        request
    }

    fn first(&mut self, request: &mut DeltaDiscoveryRequest) {
        let Wanted { wildcard, names } = &self.wanted;
        // Without names "everything" is said by silence.
        if *wildcard && !names.is_empty() {
            request.resource_names_subscribe.push("*".to_owned());
        }
        request.resource_names_subscribe.extend(names.iter().map(|name| (**name).to_owned()));
        request.initial_resource_versions = self
            .versions
            .iter()
            .map(|(name, version)| ((**name).to_owned(), (**version).to_owned()))
            .collect();
        self.told_wildcard = *wildcard;
        self.requested = true;
        self.subscribe.clear();
        self.unsubscribe.clear();
    }

    fn change(&mut self, request: &mut DeltaDiscoveryRequest) {
        if self.told_wildcard != self.wanted.wildcard {
            let list = if self.wanted.wildcard {
                &mut request.resource_names_subscribe
            } else {
                &mut request.resource_names_unsubscribe
            };
            list.push("*".to_owned());
            self.told_wildcard = self.wanted.wildcard;
        }
        let subscribe = std::mem::take(&mut self.subscribe).into_keys();
        request.resource_names_subscribe.extend(subscribe.map(|name| (*name).to_owned()));
        let unsubscribe = std::mem::take(&mut self.unsubscribe).into_iter();
        request.resource_names_unsubscribe.extend(unsubscribe.map(|name| (*name).to_owned()));
    }

    fn is_wanted(&self, wrapper: &Wrapper) -> bool {
        let names = &self.wanted.names;
        self.wanted.wildcard
            || names.contains(&*wrapper.name)
            || wrapper.aliases.iter().any(|alias| names.contains(&**alias))
    }

    fn ask(&mut self, ask: Ask) {
        match ask {
            Ask::Add(name) => {
                if self.wanted.names.insert(Arc::clone(&name)) {
                    self.note_added(name);
                }
            }
            Ask::Remove(name) => {
                if self.wanted.names.remove(&name) {
                    self.note_removed(name);
                }
            }
            Ask::Refresh(name) => {
                if self.wanted.names.insert(Arc::clone(&name)) {
                    self.note_added(name);
                } else if self.requested {
                    self.subscribe.entry(name).or_insert(true);
                }
            }
            Ask::Replace(wanted) => self.replace(wanted),
        }
    }

    fn replace(&mut self, wanted: Wanted) {
        let old = std::mem::replace(&mut self.wanted, wanted);
        let added: Vec<_> = self.wanted.names.difference(&old.names).cloned().collect();
        for name in added {
            self.note_added(name);
        }
        let removed: Vec<_> = old.names.difference(&self.wanted.names).cloned().collect();
        for name in removed {
            self.note_removed(name);
        }
        if old.wildcard && !self.wanted.wildcard {
            let names = &self.wanted.names;
            self.versions.retain(|name, _| names.contains(name));
            self.timers.retain(|name| names.contains(name));
        }
    }

    fn note_added(&mut self, name: Arc<str>) {
        if self.requested {
            let told = self.unsubscribe.remove(&name);
            self.subscribe.insert(name, told);
        }
    }

    fn note_removed(&mut self, name: Arc<str>) {
        if !self.wanted.wildcard {
            self.versions.remove(&name);
            self.timers.remove(&name);
        }
        if self.requested && self.subscribe.remove(&name) != Some(false) {
            self.unsubscribe.insert(name);
        }
    }

    /// Whether the server may have sent this name and not taken it back.
    fn is_known(&self, name: &str) -> bool {
        self.versions.contains_key(name)
            || self.wanted.names.contains(name)
            || self.judging.iter().any(|judging| judging.resources.iter().any(|it| &*it.name == name))
    }

    /// Sorts out what is in a response. `Err`: it is to be thrown away.
    fn sort(&self, kind: Kind, resources: Vec<Wrapper>, removed: Vec<String>) -> Result<Sorted, String> {
        let mut fatal = Problems::default();
        let mut refused = Problems::default();
        let mut once = Once::default();
        let mut sorted = Sorted::default();
        for wrapper in resources {
            let name: Arc<str> = wrapper.name.as_str().into();
            if let Err(reason) = once.note(&name) {
                fatal.add(reason);
                continue;
            }
            if !self.is_wanted(&wrapper) {
                continue;
            }
            match self.read(kind, wrapper, &name) {
                Ok(one) => sorted.take(name, one),
                Err(Bad::Response(reason)) => fatal.add(format_args!("{name:?}: {reason}")),
                Err(Bad::Resource(reason)) => refused.add(format_args!("{name:?}: {reason}")),
            }
        }
        for name in removed {
            let name: Arc<str> = name.into();
            if once.contains(&name) {
                fatal.add(format_args!("{name:?} is both in resources and in removed_resources"));
            } else if self.is_known(&name) {
                sorted.removed.push(name);
            }
        }
        match fatal.into_text() {
            Some(text) => Err(text),
            None => Ok(Sorted { refused: refused.into_text(), ..sorted }),
        }
    }

    fn read(&self, kind: Kind, wrapper: Wrapper, name: &Arc<str>) -> Result<One, Bad> {
        let Wrapper { version, resource: body, ttl: time_to_live, .. } = wrapper;
        let ttl = ttl(time_to_live);
        if name.is_empty() {
            return Err(Bad::Resource("a resource without a name".to_owned()));
        }
        let Some(body) = body else {
            return if self.holds(name, &version) {
                Ok(One { resource: None, ttl })
            } else {
                Err(Bad::Resource(format!("it has no body, and version {version:?} of it is not held here")))
            };
        };
        let own = name_of(&body, kind).map_err(|fault| Bad::Response(fault.to_string()))?;
        // A virtual host is called `route configuration/name` outside; inside servers leave out the first part or not.
        let inner = match kind {
            Kind::VirtualHost => name.rsplit_once('/').map_or(&**name, |(_, name)| name),
            _ => name,
        };
        if own != *name && *own != *inner {
            return Err(Bad::Resource(format!("the resource calls itself {own:?}")));
        }
        let resource = Resource { name: Some(Arc::clone(name)), version, body, unknown_fields: vec![] };
        Ok(One { resource: Some(resource), ttl })
    }

    /// Whether a resource is held in this version, or is about to be. No version means any.
    fn holds(&self, name: &str, version: &str) -> bool {
        let same = |held: &str| version.is_empty() || held == version;
        self.versions.get(name).is_some_and(|held| same(held))
            || self
                .judging
                .iter()
                .flat_map(|judging| &judging.resources)
                .any(|it| &*it.name == name && it.version.as_deref().is_some_and(same))
    }

    fn apply(&mut self, judging: Judging, outcome: &Outcome) {
        let Judging { received, resources, removed, .. } = judging;
        for Judged { name, version, ttl } in resources {
            // What was unsubscribed meanwhile is forgotten; other names of a resource come with the wildcard only.
            if !outcome.applied(&name) || !(self.wanted.wildcard || self.wanted.names.contains(&name)) {
                continue;
            }
            self.timers.set(&name, ttl, received);
            if let Some(version) = version {
                self.versions.insert(name, version);
            }
        }
        for name in removed {
            self.versions.remove(&name);
            self.timers.remove(&name);
        }
    }
}

/// What a response has of interest.
#[derive(Default)]
struct Sorted {
    resources: Vec<Resource>,
    judged: Vec<Judged>,
    removed: Vec<Arc<str>>,
    refused: Option<String>,
}

impl Sorted {
    fn take(&mut self, name: Arc<str>, one: One) {
        let version = one.resource.as_ref().map(|resource| Arc::from(&*resource.version));
        self.resources.extend(one.resource);
        self.judged.push(Judged { name, version, ttl: one.ttl });
    }

    fn has_only_heartbeats(&self) -> bool {
        !self.judged.is_empty()
            && self.resources.is_empty()
            && self.removed.is_empty()
            && self.refused.is_none()
    }
}

/// One resource of a response, checked.
struct One {
    /// None: a heartbeat.
    resource: Option<Resource>,
    ttl: Option<Duration>,
}

/// How far a bad resource reaches.
enum Bad {
    /// As in Envoy, nothing of such a response counts.
    Response(String),
    Resource(String),
}

impl Protocol for Delta {
    type Request = DeltaDiscoveryRequest;
    type Response = DeltaDiscoveryResponse;

    fn ask(&mut self, kind: Kind, ask: Ask) {
        self.kinds.entry(kind).or_default().ask(ask);
        self.mark_ready(kind);
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
        self.ready.extend(ORDER.into_iter().filter(|kind| self.kinds.contains_key(kind)));
    }

    fn closed(&mut self) {
        self.open = false;
        self.node_sent = false;
        self.ready.clear();
        for state in self.kinds.values_mut() {
            state.requested = false;
            state.told_wildcard = false;
            state.subscribe.clear();
            state.unsubscribe.clear();
            state.answers.clear();
            state.judging.iter_mut().for_each(|judging| judging.nonce = None);
        }
    }

    fn next(&mut self, now: Instant) -> Next<DeltaDiscoveryRequest> {
        let mut first: Option<Instant> = None;
        for _ in 0..if self.open { self.ready.len() } else { 0 } {
            let Some(kind) = self.ready.pop_front() else { break };
            let Some(state) = self.kinds.get_mut(&kind) else { continue };
            let purpose = match state.pending(now) {
                Pending::No => continue,
                Pending::At(at) => {
                    first = Some(first.map_or(at, |first| first.min(at)));
                    self.ready.push_back(kind);
                    continue;
                }
                Pending::Yes(purpose) => purpose,
            };
            if let Some(at) = self.requests.as_mut().and_then(|bucket| bucket.ready_at(now)) {
                self.ready.push_front(kind);
                return Next::Wait(at);
            }
            self.requests.iter_mut().for_each(Bucket::take);
            let mut request = state.request(kind, purpose);
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

    fn receive(&mut self, response: DeltaDiscoveryResponse, now: Instant) -> Received {
        let DeltaDiscoveryResponse {
            system_version_info: version,
            resources,
            type_url,
            removed_resources,
            removed_resource_names: _,
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
            self.answer(kind, nonce, None);
            return Received::Done;
        }
        let sorted = match state.sort(kind, resources, removed_resources) {
            Ok(sorted) => sorted,
            Err(reason) => {
                self.answer(kind, nonce, Some(reason.clone()));
                return Received::Rejected { kind, version, reason };
            }
        };
        if sorted.has_only_heartbeats() {
            for Judged { name, ttl, .. } in &sorted.judged {
                state.timers.set(name, *ttl, now);
            }
            self.answer(kind, nonce, None);
            return Received::Done;
        }
        let Sorted { resources, judged, removed, refused } = sorted;
        state.judging.push(Judging {
            number,
            nonce: Some(nonce),
            received: now,
            refused: refused.clone(),
            resources: judged,
            removed: removed.clone(),
        });
        Received::Deliver(Delivery {
            id: ResponseId { kind, number },
            change: Change::Delta { version, resources, removed },
            refused,
        })
    }

    fn judged(&mut self, id: ResponseId, verdict: Verdict) {
        let Some(state) = self.kinds.get_mut(&id.kind) else { return };
        let Some(at) = state.judging.iter().position(|judging| judging.number == id.number) else { return };
        let mut judging = state.judging.remove(at);
        let outcome = Outcome::new(verdict, judging.refused.take());
        let nonce = judging.nonce.take();
        if outcome.anything_applied() {
            state.apply(judging, &outcome);
        }
        if let Some(nonce) = nonce {
            self.answer(id.kind, nonce, outcome.error);
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
        let mut expired = Vec::new();
        for (kind, state) in &mut self.kinds {
            let names = state.timers.expire(now);
            for name in &names {
                state.versions.remove(name);
            }
            if !names.is_empty() {
                expired.push((*kind, names));
            }
        }
        expired
    }

    fn identifier(response: &DeltaDiscoveryResponse) -> Option<&str> {
        response.control_plane.as_ref().map(|plane| &*plane.identifier).filter(|name| !name.is_empty())
    }

    fn method(kind: Option<Kind>) -> &'static str {
        match kind {
            None => "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources",
            Some(Kind::Listener) => "/envoy.service.listener.v3.ListenerDiscoveryService/DeltaListeners",
            Some(Kind::RouteConfiguration) => "/envoy.service.route.v3.RouteDiscoveryService/DeltaRoutes",
            Some(Kind::VirtualHost) => {
                "/envoy.service.route.v3.VirtualHostDiscoveryService/DeltaVirtualHosts"
            }
            Some(Kind::Cluster) => "/envoy.service.cluster.v3.ClusterDiscoveryService/DeltaClusters",
            Some(Kind::ClusterLoadAssignment) => {
                "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints"
            }
            Some(Kind::Secret) => "/envoy.service.secret.v3.SecretDiscoveryService/DeltaSecrets",
        }
    }
}

#[cfg(test)]
#[path = "delta/tests.rs"]
mod tests;
