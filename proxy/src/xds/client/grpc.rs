//! One gRPC stream, kept up for ever: connects, moves messages between the server, the protocol and the store, and
//! starts over after a failure.

use std::cell::OnceCell;
use std::future::{Future, poll_fn};
use std::pin::Pin;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use http::uri::PathAndQuery;
use hyper::body::Incoming;
use hyper::client::conn::http2::{Builder, SendRequest};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::sync::mpsc::error::TrySendError;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Status;
use tonic::body::Body;
use tonic::client::{Grpc, GrpcService};
use tonic::metadata::{AsciiMetadataKey, AsciiMetadataValue};
use tonic_prost::ProstCodec;

use super::backoff::Backoff;
use super::delta::Delta;
use super::protocol::{Delivery, Next, Protocol, Received, ResponseId};
use super::sotw::Sotw;
use super::{Alpn, Task, is_aggregated};
use crate::config::config_source::{ApiSource, Protocol as Variant, Source};
use crate::xds::{Change, Event, Key, Kind, Update, Verdict};

/// Largest response, bytes. 100,000 endpoints take some 10 MB; this keeps a length that is garbage from taking all
/// memory.
const MAX_RESPONSE: usize = 256 << 20;

/// HTTP/2 flow control windows, bytes: a large response must not crawl along at 64 KiB per round trip.
const STREAM_WINDOW: u32 = 4 << 20;
const CONNECTION_WINDOW: u32 = 8 << 20;

/// A PING after so long without a frame, and how long its answer may take. gRPC servers in Go close connections that
/// ping more often than every five minutes. TCP keepalive, which the dialer sets, finds dead peers sooner.
const PING_INTERVAL: Duration = Duration::from_secs(310);
const PING_TIMEOUT: Duration = Duration::from_secs(20);

/// Serves a source until nothing is wanted of it any more, or the client is gone.
pub(super) async fn run(api: Arc<ApiSource>, task: Task) {
    let node = Rc::clone(&task.node);
    match api.protocol {
        Variant::DeltaGrpc | Variant::AggregatedDeltaGrpc => {
            Driver::new(Delta::new(node, &api), api, task).run().await;
        }
        Variant::Grpc | Variant::AggregatedGrpc | Variant::Rest => {
            Driver::new(Sotw::new(node, &api), api, task).run().await;
        }
    }
}

struct Driver<P: Protocol> {
    protocol: P,
    api: Arc<ApiSource>,
    /// None: the stream is for all kinds.
    kind: Option<Kind>,
    source: Source,
    task: Task,
    verdicts: Verdicts,
    /// Until when requests wait for a token.
    waits: Option<Instant>,
    /// The operator knows that this stream's server sends what nobody asked for.
    complained: bool,
}

/// Why a stream ended.
enum End {
    /// Nobody wants anything of it, or the client is gone.
    Unwanted,
    Failed {
        reason: String,
        /// A response had come.
        answered: bool,
    },
}

impl<P: Protocol> Driver<P> {
    fn new(protocol: P, api: Arc<ApiSource>, task: Task) -> Self {
        let kind = (!is_aggregated(&api)).then_some(task.key.kind);
        let source = task.key.source.clone();
        Self {
            protocol,
            api,
            kind,
            source,
            task,
            verdicts: Verdicts::default(),
            waits: None,
            complained: false,
        }
    }

    async fn run(mut self) {
        let mut backoff = Backoff::default();
        loop {
            if !self.wait_until_wanted().await {
                return;
            }
            let end = self.stream().await;
            self.protocol.closed();
            if self.waits.take().is_some() {
                self.tell(Event::RateLimited { pending: 0 });
            }
            match end {
                End::Unwanted => return,
                End::Failed { reason, answered } => {
                    if answered {
                        backoff.reset();
                    }
                    tracing::debug!(server = %self.api.cluster, %reason, "xDS stream failed");
                    self.tell(Event::Failed { keys: self.keys(), reason });
                }
            }
            let wait = backoff.next(fastrand::f64());
            if self.attend(tokio::time::sleep(wait)).await.is_none() {
                return;
            }
        }
    }

    /// False: there will be nothing to do any more.
    async fn wait_until_wanted(&mut self) -> bool {
        self.take_asks();
        while self.protocol.kinds().is_empty() {
            // A stream of one kind is started again when it is wanted again. The aggregated one stays.
            if self.kind.is_some() {
                return false;
            }
            match self.task.asks.recv().await {
                Some((kind, ask)) => self.protocol.ask(kind, ask),
                None => return false,
            }
            self.take_asks();
        }
        true
    }

    /// One stream, from the first connect(2) to its end.
    async fn stream(&mut self) -> End {
        let failed = |reason: String| End::Failed { reason, answered: false };
        let dialer = Rc::clone(&self.task.dialer);
        let cluster = Arc::clone(&self.api.cluster);
        let connection = match self.attend(dialer.dial(&cluster, Alpn::Http2)).await {
            None => return End::Unwanted,
            Some(Err(error)) => return failed(error.to_string()),
            Some(Ok(connection)) => connection,
        };
        let handshake = Builder::new(LocalExecutor)
            .timer(TokioTimer::new())
            .initial_stream_window_size(STREAM_WINDOW)
            .initial_connection_window_size(CONNECTION_WINDOW)
            .keep_alive_interval(PING_INTERVAL)
            .keep_alive_timeout(PING_TIMEOUT)
            .handshake::<_, Body>(TokioIo::new(connection));
        let (sender, connection) = match self.attend(handshake).await {
            None => return End::Unwanted,
            Some(Err(error)) => return failed(format!("HTTP/2: {}", chain(&error))),
            Some(Ok(parts)) => parts,
        };
        let closed = Rc::new(OnceCell::new());
        let why = Rc::clone(&closed);
        let _connection = AbortOnDrop(tokio::task::spawn_local(async move {
            if let Err(error) = connection.await {
                why.set(chain(&error)).ok();
            }
        }));
        let end = self.exchange(Channel(sender)).await;
        match end {
            // What ended the connection says more than what the stream saw of it.
            End::Failed { reason, answered } => match closed.get() {
                Some(error) => End::Failed { reason: format!("{reason} ({error})"), answered },
                None => End::Failed { reason, answered },
            },
            End::Unwanted => End::Unwanted,
        }
    }

    /// Moves messages until the stream ends.
    async fn exchange(&mut self, channel: Channel) -> End {
        // One request waits at most: while the server doesn't read, changes gather in the protocol.
        let (requests, body) = mpsc::channel(1);
        let (sender, mut inbox) = mpsc::channel(1);
        let call = match self.call(channel, body) {
            Ok(call) => call,
            Err(reason) => return End::Failed { reason, answered: false },
        };
        let _reader = AbortOnDrop(tokio::task::spawn_local(call.read(sender)));
        self.protocol.opened();
        self.complained = false;
        let mut identifier = None;
        let mut answered = false;
        loop {
            self.take_asks();
            if self.kind.is_some() && self.protocol.kinds().is_empty() {
                return End::Unwanted;
            }
            let (wake, blocked) = self.send(&requests);
            tokio::select! {
                message = inbox.recv(), if !self.protocol.is_saturated() => match message {
                    Some(Inbound::Headers) => self.tell(Event::Connected { keys: self.keys(), identifier: None }),
                    Some(Inbound::Response(response)) => {
                        answered = true;
                        let name = P::identifier(&response);
                        if name.is_some() && name != identifier.as_deref() {
                            identifier = name.map(str::to_owned);
                            self.tell(Event::Connected { keys: self.keys(), identifier: identifier.clone() });
                        }
                        self.receive(response);
                    }
                    Some(Inbound::End(reason)) => return End::Failed { reason, answered },
                    None => return End::Failed { reason: "the stream ended".to_owned(), answered },
                },
                ask = self.task.asks.recv() => match ask {
                    Some((kind, ask)) => self.protocol.ask(kind, ask),
                    None => return End::Unwanted,
                },
                (id, verdict) = self.verdicts.next() => self.protocol.judged(id, verdict),
                () = sleep_until(wake) => self.expire(),
                _ = requests.reserve(), if blocked => {}
            }
        }
    }

    /// Sends what can be sent. Gives when to look again, and whether the server has yet to take the last request.
    fn send(&mut self, requests: &mpsc::Sender<P::Request>) -> (Option<Instant>, bool) {
        let expires = self.protocol.expires_at();
        loop {
            let permit = match requests.try_reserve() {
                Ok(permit) => permit,
                Err(TrySendError::Full(())) => return (expires, true),
                // The inbox says why.
                Err(TrySendError::Closed(())) => return (expires, false),
            };
            match self.protocol.next(Instant::now()) {
                Next::Send(request) => {
                    tracing::trace!(?request, "xDS request");
                    permit.send(request);
                }
                Next::Wait(at) => {
                    if self.waits.replace(at) != Some(at) {
                        self.tell(Event::RateLimited { pending: self.protocol.pending() });
                    }
                    return (Some(expires.map_or(at, |expires| expires.min(at))), false);
                }
                Next::Idle => {
                    if self.waits.take().is_some() {
                        self.tell(Event::RateLimited { pending: 0 });
                    }
                    return (expires, false);
                }
            }
        }
    }

    fn receive(&mut self, response: P::Response) {
        match self.protocol.receive(response, Instant::now()) {
            Received::Deliver(Delivery { id, change, refused }) => {
                let (verdict, receiver) = oneshot::channel();
                let key = self.key(id.kind);
                if let Some(reason) = refused {
                    let version = match &change {
                        Change::State { version, .. } | Change::Delta { version, .. } => version.clone(),
                        Change::Expired(_) => String::new(),
                    };
                    self.tell(Event::Rejected { key: key.clone(), version, reason });
                }
                self.verdicts.0.push((id, receiver));
                self.tell(Event::Update(Update { key, change, verdict }));
            }
            Received::Rejected { kind, version, reason } => {
                self.tell(Event::Rejected { key: self.key(kind), version, reason });
            }
            Received::Done => {}
            Received::Ignored(what) => {
                if !std::mem::replace(&mut self.complained, true) {
                    tracing::warn!(server = %self.api.cluster, "xDS: the server sent {what}; ignored");
                }
            }
        }
    }

    fn expire(&mut self) {
        for (kind, names) in self.protocol.expire(Instant::now()) {
            // Nobody waits for the verdict.
            let (verdict, _) = oneshot::channel();
            self.tell(Event::Update(Update { key: self.key(kind), change: Change::Expired(names), verdict }));
        }
    }

    /// Waits for something while there is no stream. None: the client is gone.
    async fn attend<T>(&mut self, future: impl Future<Output = T>) -> Option<T> {
        let mut future = std::pin::pin!(future);
        loop {
            let expires = self.protocol.expires_at();
            tokio::select! {
                done = &mut future => return Some(done),
                ask = self.task.asks.recv() => {
                    let (kind, ask) = ask?;
                    self.protocol.ask(kind, ask);
                }
                (id, verdict) = self.verdicts.next() => self.protocol.judged(id, verdict),
                () = sleep_until(expires) => self.expire(),
            }
        }
    }

    fn take_asks(&mut self) {
        while let Ok((kind, ask)) = self.task.asks.try_recv() {
            self.protocol.ask(kind, ask);
        }
    }

    fn call(&self, channel: Channel, body: mpsc::Receiver<P::Request>) -> Result<Call<P>, String> {
        let authority = self.api.authority.as_ref().unwrap_or(&self.api.cluster);
        let origin = http::Uri::builder()
            .scheme("http")
            .authority(authority_of(authority))
            .path_and_query("/")
            .build()
            .map_err(|error| format!("{authority:?} can't be the :authority of a call: {error}"))?;
        let mut request = tonic::Request::new(ReceiverStream::new(body));
        for (key, value) in &self.api.initial_metadata {
            let key: AsciiMetadataKey =
                key.parse().map_err(|error| format!("initial_metadata {key:?}: {error}"))?;
            let value: AsciiMetadataValue =
                value.parse().map_err(|error| format!("initial_metadata {key:?}: {error}"))?;
            request.metadata_mut().append(key, value);
        }
        Ok(Call {
            grpc: Grpc::with_origin(channel, origin).max_decoding_message_size(MAX_RESPONSE),
            path: PathAndQuery::from_static(P::method(self.kind)),
            request,
        })
    }

    fn tell(&self, event: Event) {
        // Without a store nobody listens, and the client is about to go too.
        self.task.events.send(event).ok();
    }

    fn key(&self, kind: Kind) -> Key {
        Key { source: self.source.clone(), kind }
    }

    fn keys(&self) -> Vec<Key> {
        self.protocol.kinds().into_iter().map(|kind| self.key(kind)).collect()
    }
}

/// An authority that HTTP allows: names of clusters have other characters too (`outbound|15010||istiod`).
fn authority_of(name: &str) -> String {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "-._~:[]".contains(c);
    name.chars().map(|c| if allowed(c) { c } else { '_' }).collect()
}

/// Waits for ever when there is no time to wait for.
async fn sleep_until(at: Option<Instant>) {
    match at {
        Some(at) => tokio::time::sleep_until(at.into()).await,
        None => std::future::pending().await,
    }
}

/// An error with everything behind it, each part once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(error) = source {
        let part = error.to_string();
        if !text.contains(&part) {
            text = format!("{text}: {part}");
        }
        source = error.source();
    }
    text
}

/// Verdicts that are waited for.
#[derive(Default)]
struct Verdicts(Vec<(ResponseId, oneshot::Receiver<Verdict>)>);

impl Verdicts {
    async fn next(&mut self) -> (ResponseId, Verdict) {
        poll_fn(|context| {
            for (index, (_, receiver)) in self.0.iter_mut().enumerate() {
                if let Poll::Ready(verdict) = Pin::new(receiver).poll(context) {
                    let (id, _) = self.0.remove(index);
                    let verdict = verdict.unwrap_or_else(|_| Verdict::Reject {
                        message: "the response was not looked at".to_owned(),
                        rejected: vec![],
                        nothing_applied: true,
                    });
                    return Poll::Ready((id, verdict));
                }
            }
            Poll::Pending
        })
        .await
    }
}

/// A call that is about to be made.
struct Call<P: Protocol> {
    grpc: Grpc<Channel>,
    path: PathAndQuery,
    request: tonic::Request<ReceiverStream<P::Request>>,
}

/// What comes from the server.
enum Inbound<R> {
    Headers,
    Response(R),
    End(String),
}

impl<P: Protocol> Call<P> {
    /// Makes the call and reads its responses. Ends with [`Inbound::End`].
    async fn read(self, inbox: mpsc::Sender<Inbound<P::Response>>) {
        let Self { mut grpc, path, request } = self;
        let codec = ProstCodec::<P::Request, P::Response>::default();
        let result = async {
            grpc.ready().await.map_err(|error| chain(&error))?;
            let response = grpc.streaming(request, path, codec).await.map_err(|status| describe(&status))?;
            inbox.send(Inbound::Headers).await.ok();
            let mut responses = response.into_inner();
            while let Some(response) = responses.message().await.map_err(|status| describe(&status))? {
                if inbox.send(Inbound::Response(response)).await.is_err() {
                    break;
                }
            }
            Ok::<_, String>("the server closed the stream".to_owned())
        };
        let (Ok(reason) | Err(reason)) = result.await;
        inbox.send(Inbound::End(reason)).await.ok();
    }
}

/// `UNAVAILABLE: text`
pub(super) fn describe(status: &Status) -> String {
    let code = format!("{:?}", status.code());
    let cause = std::error::Error::source(status).map(chain).unwrap_or_default();
    let text = if status.message().is_empty() { &cause } else { status.message() };
    if cause.is_empty() || text.contains(&cause) {
        format!("{code}: {text}")
    } else {
        format!("{code}: {text}: {cause}")
    }
}

/// An HTTP/2 connection, as tonic wants it.
struct Channel(SendRequest<Body>);

impl GrpcService<Body> for Channel {
    type ResponseBody = Incoming;
    type Error = hyper::Error;
    type Future = Pin<Box<dyn Future<Output = hyper::Result<http::Response<Incoming>>>>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<hyper::Result<()>> {
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<Body>) -> Self::Future {
        Box::pin(self.0.send_request(request))
    }
}

/// Runs HTTP/2's own tasks on the main thread.
#[derive(Clone, Copy)]
pub(super) struct LocalExecutor;

impl<F: Future + 'static> hyper::rt::Executor<F> for LocalExecutor
where
    F::Output: 'static,
{
    fn execute(&self, future: F) {
        tokio::task::spawn_local(future);
    }
}

struct AbortOnDrop(JoinHandle<()>);

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}
