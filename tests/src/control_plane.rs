//! A control plane: gRPC (ADS and a stream per kind, state of the world and incremental) and REST, on one port.
//!
//! Two ways to use it. [`ControlPlane`] is scripted: a test takes each stream and poll that a client opens, reads every
//! request in order, and answers with whatever it likes, be it wrong. [`Snapshot`] answers by itself, correctly, from
//! the resources it is given, for tests that don't care about the protocol.

mod kind;
mod mailbox;
pub mod resource;
mod server;
mod snapshot;
mod tls;

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use hyper::header::HeaderMap;
use prost::Message;
use serde_json::Value;
use tidegate_api::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse,
    Resource as WrappedResource,
};
use tidegate_api::wkt::{Any, Duration as ProtoDuration};
use tokio::sync::{mpsc, oneshot};

use crate::netns::Netns;
use crate::script::GUARD;
use mailbox::Mailbox;
use server::{Handler, Listener, NewPoll, NewStream, Out, Reply, Server};

pub use kind::{Kind, Method, Served};
pub use server::Request;
pub use snapshot::{Answer, Changes, Snapshot};
pub use tls::{Authority, Identity};

/// The socket of a control plane, which it can give up and take again.
#[derive(Debug)]
struct Endpoint {
    address: SocketAddr,
    /// Listens there instead: a path, or `@` and a name.
    pipe: Option<String>,
    netns: Option<Netns>,
    tls: Option<Identity>,
    server: Option<Server>,
}

impl Endpoint {
    fn start(netns: Option<&Netns>, tls: Option<Identity>, handler: Arc<dyn Handler>) -> Result<Self> {
        let address = SocketAddr::from(([127, 0, 0, 1], 0));
        let mut this = Self { address, pipe: None, netns: netns.cloned(), tls, server: None };
        this.restart(handler)?;
        Ok(this)
    }

    fn start_on(
        pipe: &str,
        netns: Option<&Netns>,
        tls: Option<Identity>,
        handler: Arc<dyn Handler>,
    ) -> Result<Self> {
        let address = SocketAddr::from(([0; 4], 0));
        let mut this =
            Self { address, pipe: Some(pipe.to_owned()), netns: netns.cloned(), tls, server: None };
        this.restart(handler)?;
        Ok(this)
    }

    fn restart(&mut self, handler: Arc<dyn Handler>) -> Result<()> {
        self.server = None;
        let listener = match self.pipe.clone() {
            Some(pipe) => self.listen_on(&pipe)?,
            None => self.listen()?,
        };
        let acceptor = self.tls.as_ref().map(Identity::acceptor).transpose()?;
        self.server = Some(Server::start(listener, acceptor, handler)?);
        Ok(())
    }

    fn listen_on(&self, pipe: &str) -> Result<Listener> {
        let bind = || match pipe.strip_prefix('@') {
            Some(name) => UnixListener::bind_addr(&UnixAddr::from_abstract_name(name)?),
            None => {
                // What the one before has left there.
                let _ = std::fs::remove_file(pipe);
                UnixListener::bind(pipe)
            }
        };
        let listener = match &self.netns {
            Some(netns) => netns.enter(bind)?,
            None => bind(),
        };
        Ok(Listener::Unix(listener.with_context(|| format!("listen on {pipe}"))?))
    }

    fn listen(&mut self) -> Result<Listener> {
        let address = self.address;
        // With SO_REUSEADDR, as std has it. A client that connects while nobody listens may have got this port for its
        // own end, and then talks to itself until it notices.
        let deadline = Instant::now() + GUARD;
        let bind = move || loop {
            match TcpListener::bind(address) {
                Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                    std::thread::sleep(Duration::from_millis(10));
                }
                bound => break bound,
            }
        };
        let listener = match &self.netns {
            Some(netns) => netns.enter(bind)?,
            None => bind(),
        }
        .with_context(|| format!("listen on {address}"))?;
        self.address = listener.local_addr()?;
        Ok(Listener::Tcp(listener))
    }
}

/// A scripted control plane; stops on drop.
#[derive(Debug)]
pub struct ControlPlane {
    endpoint: Endpoint,
    calls: Arc<Calls>,
}

#[derive(Debug, Default)]
struct Calls {
    streams: Mailbox<Stream>,
    polls: Mailbox<Poll>,
}

impl Handler for Calls {
    fn stream(self: Arc<Self>, new: NewStream) {
        let requests: Arc<Mailbox<Option<Request>>> = Arc::default();
        let NewStream { method, headers, certificate, out, requests: mut incoming } = new;
        self.streams.push(Stream { method, headers, certificate, requests: requests.clone(), out });
        let requests = EndsWithNone(requests);
        tokio::spawn(async move {
            while let Some(request) = incoming.recv().await {
                requests.0.push(Some(request));
            }
        });
    }

    fn poll(self: Arc<Self>, new: NewPoll) {
        let NewPoll { kind, headers, peer, certificate, request, json, reply } = new;
        self.polls.push(Poll { kind, headers, peer, certificate, request, json, reply });
    }
}

/// However the task ends that has it (the whole server may go), the reader is told.
struct EndsWithNone(Arc<Mailbox<Option<Request>>>);

impl Drop for EndsWithNone {
    fn drop(&mut self) {
        self.0.push(None);
    }
}

impl ControlPlane {
    /// Listens on a port of its own of 127.0.0.1 inside `netns` (none: where the caller is).
    pub fn start(netns: Option<&Netns>) -> Result<Self> {
        Self::start_with(netns, None)
    }

    /// The same behind TLS.
    pub fn start_tls(netns: Option<&Netns>, identity: Identity) -> Result<Self> {
        Self::start_with(netns, Some(identity))
    }

    fn start_with(netns: Option<&Netns>, tls: Option<Identity>) -> Result<Self> {
        let calls: Arc<Calls> = Arc::default();
        Ok(Self { endpoint: Endpoint::start(netns, tls, calls.clone())?, calls })
    }

    /// Listens on a Unix domain socket: a path, or `@` and a name that is one inside `netns`.
    pub fn start_on(pipe: &str, netns: Option<&Netns>, tls: Option<Identity>) -> Result<Self> {
        let calls: Arc<Calls> = Arc::default();
        Ok(Self { endpoint: Endpoint::start_on(pipe, netns, tls, calls.clone())?, calls })
    }

    /// Where it listens; unspecified on a Unix domain socket.
    pub fn address(&self) -> SocketAddr {
        self.endpoint.address
    }

    /// The next stream of this method that a client has opened, or will.
    pub fn stream(&self, method: Method) -> Result<Stream> {
        let what = format!("stream to {}", method.path());
        self.calls.streams.take(&what, |stream| stream.method == method)
    }

    /// The streams that were opened and not taken.
    pub fn untaken_streams(&self) -> Vec<Stream> {
        self.calls.streams.take_all()
    }

    /// The next poll of this kind.
    pub fn poll(&self, kind: Kind) -> Result<Poll> {
        self.calls.polls.take(&format!("poll of {kind:?}"), |poll| poll.kind == kind)
    }

    /// The next poll of any kind.
    pub fn any_poll(&self) -> Result<Poll> {
        self.calls.polls.take("poll", |_| true)
    }

    /// GOAWAY on every connection; what is open goes on.
    pub fn go_away(&self) {
        if let Some(server) = &self.endpoint.server {
            server.go_away();
        }
    }

    /// Closes everything: connects are refused from now on.
    pub fn stop(&mut self) {
        self.endpoint.server = None;
    }

    /// Closes everything and listens again on the same port.
    pub fn restart(&mut self) -> Result<()> {
        self.endpoint.restart(self.calls.clone())
    }
}

/// A stream that a client opened. Dropped, it ends with UNAVAILABLE.
#[derive(Debug)]
pub struct Stream {
    /// What the client called.
    pub method: Method,
    /// With which header fields.
    pub headers: HeaderMap,
    /// The certificate that it showed, encoded; none without TLS, or when it has none.
    pub certificate: Option<Vec<u8>>,
    requests: Arc<Mailbox<Option<Request>>>,
    out: mpsc::UnboundedSender<Out>,
}

impl Stream {
    /// The next request of a state-of-the-world stream, whatever its kind.
    pub fn request(&self) -> Result<DiscoveryRequest> {
        match self.requests.take("request", |_| true)? {
            Some(Request::Sotw(request)) => Ok(*request),
            other => bail!("expected a DiscoveryRequest, got {other:?}"),
        }
    }

    /// The next request of this kind; those of other kinds stay where they are.
    pub fn request_for(&self, kind: Kind) -> Result<DiscoveryRequest> {
        match self.next_for(kind)? {
            Some(Request::Sotw(request)) => Ok(*request),
            other => bail!("expected a DiscoveryRequest for {kind:?}, got {other:?}"),
        }
    }

    /// The next request of an incremental stream, whatever its kind.
    pub fn delta_request(&self) -> Result<DeltaDiscoveryRequest> {
        match self.requests.take("request", |_| true)? {
            Some(Request::Delta(request)) => Ok(*request),
            other => bail!("expected a DeltaDiscoveryRequest, got {other:?}"),
        }
    }

    /// The same, for a client that may take so long.
    pub fn delta_request_within(&self, patience: Duration) -> Result<DeltaDiscoveryRequest> {
        match self.requests.take_within(patience, "request", |_| true)? {
            Some(Request::Delta(request)) => Ok(*request),
            other => bail!("expected a DeltaDiscoveryRequest, got {other:?}"),
        }
    }

    /// The next request of this kind; those of other kinds stay where they are.
    pub fn delta_request_for(&self, kind: Kind) -> Result<DeltaDiscoveryRequest> {
        match self.next_for(kind)? {
            Some(Request::Delta(request)) => Ok(*request),
            other => bail!("expected a DeltaDiscoveryRequest for {kind:?}, got {other:?}"),
        }
    }

    /// The end of the stream counts as every kind's.
    fn next_for(&self, kind: Kind) -> Result<Option<Request>> {
        let type_url = kind.type_url();
        self.requests.take(&format!("request for {kind:?}"), |request| {
            request.as_ref().is_none_or(|request| request.type_url() == type_url)
        })
    }

    /// What has come and was not read.
    pub fn unread(&self) -> Vec<Request> {
        self.requests.take_all().into_iter().flatten().collect()
    }

    /// Waits until the client closes the stream, or its connection ends.
    pub fn ended(&self) -> Result<()> {
        self.requests.take("end of the stream", Option::is_none).map(drop)
    }

    /// Sends a response.
    pub fn send(&self, response: &DiscoveryResponse) {
        let _ = self.out.send(Out::Message(response.encode_to_vec()));
    }

    /// Sends an incremental response.
    pub fn send_delta(&self, response: &DeltaDiscoveryResponse) {
        let _ = self.out.send(Out::Message(response.encode_to_vec()));
    }

    /// Sends a gRPC message of these bytes, whatever they are.
    pub fn send_message(&self, bytes: &[u8]) {
        let _ = self.out.send(Out::Message(bytes.to_vec()));
    }

    /// Sends these bytes without a gRPC frame round them.
    pub fn send_raw(&self, bytes: &[u8]) {
        let _ = self.out.send(Out::Raw(bytes.to_vec()));
    }

    /// Ends the stream with a gRPC status.
    pub fn finish(&self, status: u32, message: &str) {
        let _ = self.out.send(Out::Finish(status, message.to_owned()));
    }

    /// RST_STREAM.
    pub fn reset(&self) {
        let _ = self.out.send(Out::Reset);
    }
}

/// A poll that waits for its answer. Dropped, its connection is closed without one.
#[derive(Debug)]
pub struct Poll {
    /// What is asked for.
    pub kind: Kind,
    /// Header fields.
    pub headers: HeaderMap,
    /// The client's address: tells connections apart.
    pub peer: SocketAddr,
    /// The certificate that it showed, encoded; none without TLS, or when it has none.
    pub certificate: Option<Vec<u8>>,
    /// The request.
    pub request: DiscoveryRequest,
    /// The same as it was written.
    pub json: Value,
    reply: oneshot::Sender<Reply>,
}

impl Poll {
    /// Answers with any status and body.
    pub fn answer(self, status: u16, body: &[u8]) {
        let _ = self.reply.send(Reply { status, body: body.to_vec() });
    }

    /// 200 with a `DiscoveryResponse`.
    pub fn answer_with(self, response: &DiscoveryResponse) -> Result<()> {
        let body = serde_json::to_vec(&resource::to_json(response)?)?;
        self.answer(200, &body);
        Ok(())
    }
}

/// A state-of-the-world response of one kind.
pub fn response(kind: Kind, version: &str, nonce: &str, resources: Vec<Any>) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: version.to_owned(),
        resources,
        type_url: kind.type_url(),
        nonce: nonce.to_owned(),
        ..Default::default()
    }
}

/// An incremental response of one kind.
pub fn delta_response(
    kind: Kind,
    nonce: &str,
    resources: Vec<WrappedResource>,
    removed: &[&str],
) -> DeltaDiscoveryResponse {
    DeltaDiscoveryResponse {
        system_version_info: nonce.to_owned(),
        resources,
        type_url: kind.type_url(),
        removed_resources: removed.iter().map(|&name| name.to_owned()).collect(),
        nonce: nonce.to_owned(),
        ..Default::default()
    }
}

/// A resource with its name and version, as incremental responses carry it.
pub fn wrapped<M: Served>(version: &str, message: &M) -> WrappedResource {
    WrappedResource {
        name: message.resource_name().to_owned(),
        version: version.to_owned(),
        resource: Some(message.packed()),
        ..Default::default()
    }
}

/// A resource that ends after so many milliseconds unless it is sent again; without `resource` a heartbeat.
pub fn with_ttl(name: &str, version: &str, resource: Option<Any>, milliseconds: u32) -> WrappedResource {
    let (seconds, rest) = (milliseconds / 1000, milliseconds % 1000);
    WrappedResource {
        name: name.to_owned(),
        version: version.to_owned(),
        resource,
        ttl: Some(ProtoDuration {
            seconds: i64::from(seconds),
            nanos: i32::try_from(rest * 1_000_000).unwrap_or_default(),
        }),
        ..Default::default()
    }
}

/// An `Any` of this kind whose bytes are no message.
pub fn undecodable(kind: Kind) -> Any {
    Any { type_url: kind.type_url(), value: vec![0xff; 16] }
}

/// The wrapper as a member of a state-of-the-world response.
pub fn packed_wrapper(resource: &WrappedResource) -> Any {
    use prost::Name;
    Any { type_url: WrappedResource::type_url(), value: resource.encode_to_vec() }
}

/// A file next to others, replaced by rename as configuration on disk is.
pub fn write_atomically(path: &std::path::Path, content: &[u8]) -> Result<()> {
    let mut temporary = PathBuf::from(path);
    temporary.set_extension("new");
    std::fs::write(&temporary, content)?;
    std::fs::rename(&temporary, path).with_context(|| format!("replace {}", path.display()))
}
