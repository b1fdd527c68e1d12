//! A control plane that answers by itself.

use std::collections::hash_map::DefaultHasher;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{Hash, Hasher};
use std::net::SocketAddr;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use anyhow::{Result, ensure};
use prost::Message;
use tidegate_api::discovery::{DeltaDiscoveryRequest, DiscoveryRequest, DiscoveryResponse};
use tidegate_api::wkt::Any;
use tokio::sync::{mpsc, watch};

use super::kind::{Kind, Served};
use super::server::{Handler, NewPoll, NewStream, Out, Reply, Request};
use super::{Endpoint, Identity, WrappedResource, delta_response, resource, response};
use crate::netns::Netns;
use crate::script::GUARD;

/// A control plane that serves the resources it is given by every protocol at once; stops on drop. It sends what
/// changed as soon as it changes, without waiting for earlier responses to be acknowledged, kind after kind in the
/// order of [`Kind::ALL`].
#[derive(Debug)]
pub struct Snapshot {
    endpoint: Endpoint,
    state: Arc<State>,
}

/// A client's answer to a response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Answer {
    /// Of which kind.
    pub kind: Kind,
    /// State of the kind that the response carried: counts the changes.
    pub version: u64,
    /// None: ACK. Else the text of the NACK; empty over REST, where a client can't say.
    pub error: Option<String>,
}

#[derive(Debug)]
struct State {
    inner: Mutex<Inner>,
    answered: Condvar,
    changed: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Inner {
    /// Counts the changes of all kinds.
    version: u64,
    resources: BTreeMap<Kind, BTreeMap<String, Versioned>>,
    /// Version of the last change of each kind.
    versions: BTreeMap<Kind, u64>,
    answers: Vec<Answer>,
    requests: Vec<Request>,
    /// Hash and version of what was served last over REST.
    polled: BTreeMap<Kind, (String, u64)>,
}

#[derive(Clone, Debug)]
struct Versioned {
    version: u64,
    body: Any,
}

/// Changes that become visible at once.
#[derive(Debug)]
pub struct Changes<'a>(&'a mut Inner);

impl Changes<'_> {
    /// Adds or replaces a resource.
    pub fn set<M: Served>(&mut self, message: &M) {
        self.set_packed(M::KIND, message.resource_name(), message.packed());
    }

    /// Adds or replaces a resource, whatever is in the `Any`.
    pub fn set_packed(&mut self, kind: Kind, name: &str, body: Any) {
        let version = self.0.bump(kind);
        self.0.resources.entry(kind).or_default().insert(name.to_owned(), Versioned { version, body });
    }

    /// Removes a resource.
    pub fn remove(&mut self, kind: Kind, name: &str) {
        self.0.bump(kind);
        self.0.resources.entry(kind).or_default().remove(name);
    }
}

impl Inner {
    fn bump(&mut self, kind: Kind) -> u64 {
        self.version += 1;
        self.versions.insert(kind, self.version);
        self.version
    }

    fn version(&self, kind: Kind) -> u64 {
        self.versions.get(&kind).copied().unwrap_or_default()
    }

    /// What of a kind a client gets that wants everything, or these names.
    fn relevant(&self, kind: Kind, wildcard: bool, names: &BTreeSet<String>) -> BTreeMap<String, Versioned> {
        let all = self.resources.get(&kind).into_iter().flatten();
        all.filter(|(name, _)| wildcard || names.contains(*name))
            .map(|(name, resource)| (name.clone(), resource.clone()))
            .collect()
    }
}

impl State {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn answer(&self, answer: Answer) {
        self.lock().answers.push(answer);
        self.answered.notify_all();
    }
}

impl Snapshot {
    /// Listens on a port of its own of 127.0.0.1 inside `netns` (none: where the caller is).
    pub fn start(netns: Option<&Netns>) -> Result<Self> {
        Self::start_with(netns, None)
    }

    /// The same behind TLS.
    pub fn start_tls(netns: Option<&Netns>, identity: Identity) -> Result<Self> {
        Self::start_with(netns, Some(identity))
    }

    fn start_with(netns: Option<&Netns>, tls: Option<Identity>) -> Result<Self> {
        let state = Arc::new(State {
            inner: Mutex::default(),
            answered: Condvar::new(),
            changed: watch::Sender::new(()),
        });
        Ok(Self { endpoint: Endpoint::start(netns, tls, state.clone())?, state })
    }

    /// Where it listens.
    pub fn address(&self) -> SocketAddr {
        self.endpoint.address
    }

    /// Makes several changes at once.
    pub fn update(&self, change: impl FnOnce(&mut Changes<'_>)) {
        change(&mut Changes(&mut self.state.lock()));
        self.state.changed.send_replace(());
    }

    /// Adds or replaces a resource.
    pub fn set<M: Served>(&self, message: &M) {
        self.update(|changes| changes.set(message));
    }

    /// Removes a resource.
    pub fn remove(&self, kind: Kind, name: &str) {
        self.update(|changes| changes.remove(kind, name));
    }

    /// Waits until a client has accepted the present state of this kind.
    pub fn accepted(&self, kind: Kind) -> Result<()> {
        let answer = self.answer(kind)?;
        ensure!(answer.error.is_none(), "{kind:?} was rejected: {answer:?}");
        Ok(())
    }

    /// Waits until a client has rejected the present state of this kind, and gives the reason.
    pub fn rejected(&self, kind: Kind) -> Result<String> {
        let answer = self.answer(kind)?;
        answer.error.ok_or_else(|| anyhow::anyhow!("{kind:?} was accepted"))
    }

    /// Waits for the answer to the present state of this kind.
    fn answer(&self, kind: Kind) -> Result<Answer> {
        let deadline = Instant::now() + GUARD;
        let mut inner = self.state.lock();
        loop {
            let version = inner.version(kind);
            let found = inner.answers.iter().rev().find(|answer| answer.kind == kind);
            if let Some(found) = found.filter(|answer| answer.version >= version) {
                return Ok(found.clone());
            }
            let left = deadline.saturating_duration_since(Instant::now());
            ensure!(
                !left.is_zero(),
                "no answer to version {version} of {kind:?}; answers: {:#?}",
                inner.answers
            );
            inner = self.state.answered.wait_timeout(inner, left).unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    /// Every answer so far.
    pub fn answers(&self) -> Vec<Answer> {
        self.state.lock().answers.clone()
    }

    /// Every request so far, on all streams, and every poll.
    pub fn requests(&self) -> Vec<Request> {
        self.state.lock().requests.clone()
    }

    /// Closes everything: connects are refused from now on.
    pub fn stop(&mut self) {
        self.endpoint.server = None;
    }

    /// Closes everything and listens again on the same port.
    pub fn restart(&mut self) -> Result<()> {
        self.state.lock().polled.clear();
        self.endpoint.restart(self.state.clone())
    }
}

impl Handler for State {
    fn stream(self: Arc<Self>, mut new: NewStream) {
        let mut changed = self.changed.subscribe();
        let mut session =
            Session { state: self, only: new.method.kind, out: new.out, subscriptions: BTreeMap::new() };
        tokio::spawn(async move {
            loop {
                tokio::select! {
                    request = new.requests.recv() => match request {
                        Some(request) => session.on_request(request),
                        None => return,
                    },
                    changed = changed.changed() => match changed {
                        Ok(()) => session.on_change(),
                        Err(_) => return,
                    },
                }
            }
        });
    }

    fn poll(self: Arc<Self>, new: NewPoll) {
        let kind = new.kind;
        let names: BTreeSet<String> = new.request.resource_names.iter().cloned().collect();
        let (reply, answer) = {
            let mut inner = self.lock();
            let relevant = inner.relevant(kind, names.is_empty(), &names);
            let hash = hash(&relevant);
            let answer = inner.polled.get(&kind).map(|(served, version)| {
                let accepted = *served == new.request.version_info;
                Answer { kind, version: *version, error: (!accepted).then(String::new) }
            });
            inner.requests.push(Request::Sotw(Box::new(new.request.clone())));
            let version = inner.version(kind);
            inner.polled.insert(kind, (hash.clone(), version));
            if hash == new.request.version_info {
                (Reply { status: 304, body: Vec::new() }, answer)
            } else {
                let bodies = relevant.into_values().map(|resource| resource.body).collect();
                (json_reply(&response(kind, &hash, "", bodies)), answer)
            }
        };
        if let Some(answer) = answer {
            self.answer(answer);
        }
        let _ = new.reply.send(reply);
    }
}

fn json_reply(response: &DiscoveryResponse) -> Reply {
    let body = resource::to_json(response).and_then(|json| Ok(serde_json::to_vec(&json)?));
    match body {
        Ok(body) => Reply { status: 200, body },
        Err(error) => Reply { status: 500, body: format!("{error:#}").into_bytes() },
    }
}

fn hash(resources: &BTreeMap<String, Versioned>) -> String {
    let mut hasher = DefaultHasher::new();
    for (name, resource) in resources {
        (name, resource.version).hash(&mut hasher);
    }
    format!("{:016x}", hasher.finish())
}

/// One stream.
struct Session {
    state: Arc<State>,
    /// The only kind of this stream; none: ADS.
    only: Option<Kind>,
    out: mpsc::UnboundedSender<Out>,
    subscriptions: BTreeMap<Kind, Subscription>,
}

#[derive(Default)]
struct Subscription {
    delta: bool,
    wildcard: bool,
    names: BTreeSet<String>,
    /// Nonces are counted up; 0: nothing was sent.
    nonce: u64,
    /// Version of each response by its nonce.
    outstanding: BTreeMap<String, u64>,
    /// What the client has, as far as it was sent on this stream (or named at its start).
    sent: BTreeMap<String, u64>,
}

impl Session {
    fn on_request(&mut self, request: Request) {
        self.state.lock().requests.push(request.clone());
        let Some(kind) =
            Kind::of(request.type_url()).filter(|kind| self.only.is_none_or(|only| only == *kind))
        else {
            let message = format!("this stream does not serve {:?}", request.type_url());
            let _ = self.out.send(Out::Finish(3, message));
            return;
        };
        let first = !self.subscriptions.contains_key(&kind);
        let subscription = self.subscriptions.entry(kind).or_default();
        let (answer, asked) = match request {
            Request::Sotw(request) => subscription.sotw(kind, &request, first),
            Request::Delta(request) => subscription.delta(kind, &request, first),
        };
        if let Some(answer) = answer {
            self.state.answer(answer);
        }
        if asked {
            self.send(kind, first);
        }
    }

    fn on_change(&mut self) {
        for kind in Kind::ALL {
            if self.subscriptions.contains_key(&kind) {
                self.send(kind, false);
            }
        }
    }

    /// Sends what the client has not got. The first response to a wildcard is sent even when it is empty.
    fn send(&mut self, kind: Kind, first: bool) {
        let Some(subscription) = self.subscriptions.get_mut(&kind) else { return };
        let (relevant, version) = {
            let inner = self.state.lock();
            (inner.relevant(kind, subscription.wildcard, &subscription.names), inner.version(kind))
        };
        let have: BTreeMap<String, u64> =
            relevant.iter().map(|(name, resource)| (name.clone(), resource.version)).collect();
        let must = first && subscription.wildcard;
        if have == subscription.sent && !must {
            return;
        }
        let lists_everything = matches!(kind, Kind::Listener | Kind::Cluster);
        if !subscription.delta && !lists_everything && relevant.is_empty() {
            return; // not known here: nothing to say
        }
        subscription.nonce += 1;
        let nonce = format!("{kind:?}-{}", subscription.nonce);
        subscription.outstanding.insert(nonce.clone(), version);
        let message = if subscription.delta {
            let gone: Vec<String> =
                subscription.sent.keys().filter(|name| !have.contains_key(*name)).cloned().collect();
            let news = relevant
                .into_iter()
                .filter(|(name, resource)| subscription.sent.get(name) != Some(&resource.version))
                .map(|(name, resource)| WrappedResource {
                    name,
                    version: resource.version.to_string(),
                    resource: Some(resource.body),
                    ..Default::default()
                })
                .collect();
            let gone: Vec<&str> = gone.iter().map(String::as_str).collect();
            delta_response(kind, &nonce, news, &gone).encode_to_vec()
        } else {
            let bodies = relevant.into_values().map(|resource| resource.body).collect();
            response(kind, &version.to_string(), &nonce, bodies).encode_to_vec()
        };
        subscription.sent = have;
        let _ = self.out.send(Out::Message(message));
    }
}

impl Subscription {
    /// The answer in the request, and whether it asks for something.
    fn sotw(&mut self, kind: Kind, request: &DiscoveryRequest, first: bool) -> (Option<Answer>, bool) {
        if !request.response_nonce.is_empty() && request.response_nonce != format!("{kind:?}-{}", self.nonce)
        {
            // Overtaken by a newer response; the client's answer to that one has its names again. An answer it is.
            return (self.answered(kind, &request.response_nonce, request.error_detail.as_ref()), false);
        }
        let answer = self.answered(kind, &request.response_nonce, request.error_detail.as_ref());
        let names: BTreeSet<String> = request.resource_names.iter().cloned().collect();
        let had_names = !self.names.is_empty();
        self.wildcard = names.contains("*")
            || (names.is_empty() && !had_names && matches!(kind, Kind::Listener | Kind::Cluster));
        let changed = names != self.names;
        if changed {
            // A new subscription gets everything that it names.
            self.sent.clear();
        }
        self.names = names;
        (answer, first || (changed && (self.wildcard || !self.names.is_empty())))
    }

    fn delta(&mut self, kind: Kind, request: &DeltaDiscoveryRequest, first: bool) -> (Option<Answer>, bool) {
        let answer = self.answered(kind, &request.response_nonce, request.error_detail.as_ref());
        self.delta = true;
        if first {
            self.wildcard = request.resource_names_subscribe.is_empty();
            let initial = request.initial_resource_versions.iter();
            self.sent =
                initial.map(|(name, version)| (name.clone(), version.parse().unwrap_or_default())).collect();
        }
        for name in &request.resource_names_subscribe {
            if name == "*" {
                self.wildcard = true;
            } else {
                self.names.insert(name.clone());
            }
        }
        for name in &request.resource_names_unsubscribe {
            if name == "*" {
                self.wildcard = false;
            } else {
                self.names.remove(name);
                self.sent.remove(name);
            }
        }
        let asks = first || !request.resource_names_subscribe.is_empty();
        (answer, asks)
    }

    fn answered(
        &mut self,
        kind: Kind,
        nonce: &str,
        error: Option<&tidegate_api::google::rpc::Status>,
    ) -> Option<Answer> {
        let version = self.outstanding.remove(nonce)?;
        Some(Answer { kind, version, error: error.map(|status| status.message.clone()) })
    }
}
