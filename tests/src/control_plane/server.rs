//! The transport: HTTP/1.1 and HTTP/2 on one port, gRPC framing by hand, so that a test can also send what a gRPC
//! library would not.

use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context as TaskContext, Poll as TaskPoll};
use std::thread::JoinHandle;

use anyhow::{Context, Result, ensure};
use http_body_util::{BodyExt, Either, Full};
use hyper::body::{Body, Bytes, Frame, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderMap, HeaderValue};
use hyper::{Response, StatusCode, http};
use hyper_util::rt::{TokioExecutor, TokioIo};
use hyper_util::server::conn::auto;
use prost::Message;
use serde_json::Value;
use tidegate_api::discovery::{DeltaDiscoveryRequest, DiscoveryRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{mpsc, oneshot, watch};

use super::kind::{Kind, Method};
use super::resource::from_json;

/// What a client sends on a stream.
#[derive(Clone, Debug, PartialEq)]
pub enum Request {
    /// State of the world.
    Sotw(Box<DiscoveryRequest>),
    /// Incremental.
    Delta(Box<DeltaDiscoveryRequest>),
}

impl Request {
    /// Its `type_url`.
    pub fn type_url(&self) -> &str {
        match self {
            Self::Sotw(request) => &request.type_url,
            Self::Delta(request) => &request.type_url,
        }
    }
}

/// What goes to a client on a stream.
#[derive(Debug)]
pub(super) enum Out {
    /// A message, framed here.
    Message(Vec<u8>),
    /// These bytes as they are.
    Raw(Vec<u8>),
    /// The end, with a gRPC status.
    Finish(u32, String),
    /// RST_STREAM.
    Reset,
}

/// A new stream.
#[derive(Debug)]
pub(super) struct NewStream {
    pub(super) method: Method,
    pub(super) headers: HeaderMap,
    /// The client's, encoded.
    pub(super) certificate: Option<Vec<u8>>,
    /// Ends when the client closes the stream, or its connection ends.
    pub(super) requests: mpsc::UnboundedReceiver<Request>,
    /// Dropped: the stream ends with UNAVAILABLE.
    pub(super) out: mpsc::UnboundedSender<Out>,
}

/// A poll.
#[derive(Debug)]
pub(super) struct NewPoll {
    pub(super) kind: Kind,
    pub(super) headers: HeaderMap,
    /// The peer's address: tells connections apart.
    pub(super) peer: SocketAddr,
    /// The client's, encoded.
    pub(super) certificate: Option<Vec<u8>>,
    pub(super) request: DiscoveryRequest,
    /// The same as it was written.
    pub(super) json: Value,
    /// Dropped: the connection is closed without an answer.
    pub(super) reply: oneshot::Sender<Reply>,
}

/// The answer to a poll.
#[derive(Debug)]
pub(super) struct Reply {
    pub(super) status: u16,
    pub(super) body: Vec<u8>,
}

/// Decides what clients get. Called on the server's thread, inside its runtime.
pub(super) trait Handler: Send + Sync + 'static {
    fn stream(self: Arc<Self>, stream: NewStream);
    fn poll(self: Arc<Self>, poll: NewPoll);
}

/// A running server. Its connections end when it is dropped.
#[derive(Debug)]
pub(super) struct Server {
    stop: Option<oneshot::Sender<()>>,
    drain: watch::Sender<bool>,
    thread: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves on a bound socket.
    pub(super) fn start(
        listener: Listener,
        tls: Option<super::tls::Acceptor>,
        handler: Arc<dyn Handler>,
    ) -> Result<Self> {
        listener.set_nonblocking()?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (stop, stopped) = oneshot::channel();
        let (drain, draining) = watch::channel(false);
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                let Ok(listener) = listener.into_acceptor() else { return };
                tokio::select! {
                    () = accept(listener, tls, handler, draining) => {}
                    _ = stopped => {}
                }
            });
            runtime.shutdown_background();
        });
        Ok(Self { stop: Some(stop), drain, thread: Some(thread) })
    }

    /// GOAWAY on every connection: no new streams there.
    pub(super) fn go_away(&self) {
        let _ = self.drain.send(true);
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// A bound socket.
#[derive(Debug)]
pub(super) enum Listener {
    Tcp(std::net::TcpListener),
    Unix(std::os::unix::net::UnixListener),
}

impl Listener {
    fn set_nonblocking(&self) -> std::io::Result<()> {
        match self {
            Self::Tcp(listener) => listener.set_nonblocking(true),
            Self::Unix(listener) => listener.set_nonblocking(true),
        }
    }

    /// The same within a runtime.
    fn into_acceptor(self) -> std::io::Result<Acceptor> {
        Ok(match self {
            Self::Tcp(listener) => Acceptor::Tcp(tokio::net::TcpListener::from_std(listener)?),
            Self::Unix(listener) => Acceptor::Unix(tokio::net::UnixListener::from_std(listener)?),
        })
    }
}

enum Acceptor {
    Tcp(tokio::net::TcpListener),
    Unix(tokio::net::UnixListener),
}

trait Stream: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Stream for T {}

impl Acceptor {
    /// A connection, and the address of its other end (unspecified on a Unix domain socket).
    async fn accept(&self) -> std::io::Result<(Box<dyn Stream>, SocketAddr)> {
        match self {
            Self::Tcp(listener) => {
                let (stream, peer) = listener.accept().await?;
                let _ = stream.set_nodelay(true);
                Ok((Box::new(stream), peer))
            }
            Self::Unix(listener) => {
                let (stream, _) = listener.accept().await?;
                Ok((Box::new(stream), SocketAddr::from(([0; 4], 0))))
            }
        }
    }
}

async fn accept(
    listener: Acceptor,
    tls: Option<super::tls::Acceptor>,
    handler: Arc<dyn Handler>,
    draining: watch::Receiver<bool>,
) {
    loop {
        let Ok((stream, peer)) = listener.accept().await else { continue };
        let (handler, draining, tls) = (handler.clone(), draining.clone(), tls.clone());
        tokio::spawn(async move {
            match tls {
                None => connection(stream, Client { peer, certificate: None }, handler, draining).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(stream).await {
                        let shown = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
                        let certificate = shown.map(|certificate| certificate.to_vec());
                        connection(stream, Client { peer, certificate }, handler, draining).await;
                    }
                }
            }
        });
    }
}

/// Who has connected.
#[derive(Clone, Debug)]
struct Client {
    peer: SocketAddr,
    certificate: Option<Vec<u8>>,
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin + 'static>(
    stream: S,
    client: Client,
    handler: Arc<dyn Handler>,
    mut draining: watch::Receiver<bool>,
) {
    let service = hyper::service::service_fn(move |request| serve(request, client.clone(), handler.clone()));
    let builder = auto::Builder::new(TokioExecutor::new());
    let connection = builder.serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = connection.as_mut() => return,
        _ = draining.wait_for(|draining| *draining) => connection.as_mut().graceful_shutdown(),
    }
    let _ = connection.await;
}

type Answer = Response<Either<Full<Bytes>, GrpcBody>>;

/// An error closes the connection without an answer.
async fn serve(
    request: http::Request<Incoming>,
    client: Client,
    handler: Arc<dyn Handler>,
) -> Result<Answer, std::io::Error> {
    let path = request.uri().path().to_owned();
    if let Some(method) = Method::of(&path) {
        return Ok(open(request, method, client, handler));
    }
    let Some(kind) = Kind::ALL.into_iter().find(|kind| kind.rest_path() == Some(&path)) else {
        return Ok(plain(404, format!("no {path}").into_bytes()));
    };
    let headers = request.headers().clone();
    let body = request.into_body().collect().await.map_err(std::io::Error::other)?.to_bytes();
    let parsed = serde_json::from_slice(&body)
        .map_err(anyhow::Error::from)
        .and_then(|json| Ok((from_json::<DiscoveryRequest>(&json)?, json)));
    let (request, json) = match parsed {
        Ok(parsed) => parsed,
        Err(error) => return Ok(plain(400, format!("{error:#}").into_bytes())),
    };
    let (reply, answer) = oneshot::channel();
    let Client { peer, certificate } = client;
    handler.poll(NewPoll { kind, headers, peer, certificate, request, json, reply });
    let reply = answer.await.map_err(std::io::Error::other)?;
    Ok(plain(reply.status, reply.body))
}

fn plain(status: u16, body: Vec<u8>) -> Answer {
    let mut response = Response::new(Either::Left(Full::new(Bytes::from(body))));
    *response.status_mut() = StatusCode::from_u16(status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

fn open(
    request: http::Request<Incoming>,
    method: Method,
    client: Client,
    handler: Arc<dyn Handler>,
) -> Answer {
    let headers = request.headers().clone();
    let (sender, requests) = mpsc::unbounded_channel();
    let (out, body) = mpsc::unbounded_channel();
    tokio::spawn(read(request.into_body(), method.delta, sender));
    handler.stream(NewStream { method, headers, certificate: client.certificate, requests, out });
    let mut response = Response::new(Either::Right(GrpcBody { out: body, ended: false }));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/grpc"));
    response
}

/// Takes a stream's body apart. Ends with the stream, or at the first thing that is not gRPC.
async fn read(mut body: Incoming, delta: bool, requests: mpsc::UnboundedSender<Request>) {
    let mut buffer = Vec::new();
    while let Some(Ok(frame)) = body.frame().await {
        buffer.extend_from_slice(frame.data_ref().map_or(&[][..], |data| data));
        loop {
            match next_message(&mut buffer, delta) {
                Ok(Some(request)) => {
                    if requests.send(request).is_err() {
                        return;
                    }
                }
                Ok(None) => break,
                Err(error) => {
                    eprintln!("control plane: a client sent {error:#}");
                    return;
                }
            }
        }
    }
}

/// The first whole message of the buffer: a flag, four bytes of length, the message.
fn next_message(buffer: &mut Vec<u8>, delta: bool) -> Result<Option<Request>> {
    let Some((&[compressed, a, b, c, d], rest)) = buffer.split_first_chunk::<5>() else { return Ok(None) };
    ensure!(compressed == 0, "a compressed message");
    let length = u32::from_be_bytes([a, b, c, d]) as usize;
    let Some(message) = rest.get(..length) else { return Ok(None) };
    let request = if delta {
        Request::Delta(Box::new(DeltaDiscoveryRequest::decode(message).context("no DeltaDiscoveryRequest")?))
    } else {
        Request::Sotw(Box::new(DiscoveryRequest::decode(message).context("no DiscoveryRequest")?))
    };
    buffer.drain(..5 + length);
    Ok(Some(request))
}

/// The body of a stream.
#[derive(Debug)]
struct GrpcBody {
    out: mpsc::UnboundedReceiver<Out>,
    ended: bool,
}

impl Body for GrpcBody {
    type Data = Bytes;
    type Error = std::io::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> TaskPoll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.ended {
            return TaskPoll::Ready(None);
        }
        let unavailable = || Out::Finish(14, "the control plane dropped the stream".to_owned());
        let out = match self.out.poll_recv(context) {
            TaskPoll::Pending => return TaskPoll::Pending,
            TaskPoll::Ready(out) => out.unwrap_or_else(unavailable),
        };
        TaskPoll::Ready(Some(match out {
            Out::Message(message) => Ok(Frame::data(framed(&message))),
            Out::Raw(bytes) => Ok(Frame::data(Bytes::from(bytes))),
            Out::Finish(status, message) => {
                self.ended = true;
                Ok(Frame::trailers(trailers(status, &message)))
            }
            Out::Reset => {
                self.ended = true;
                Err(std::io::Error::other("reset by the test"))
            }
        }))
    }
}

fn framed(message: &[u8]) -> Bytes {
    let mut frame = Vec::with_capacity(5 + message.len());
    frame.push(0);
    frame.extend_from_slice(&u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes());
    frame.extend_from_slice(message);
    Bytes::from(frame)
}

fn trailers(status: u32, message: &str) -> HeaderMap {
    let mut trailers = HeaderMap::new();
    trailers.insert("grpc-status", HeaderValue::from(status));
    if let Ok(message) = HeaderValue::from_str(message) {
        trailers.insert("grpc-message", message);
    }
    trailers
}
