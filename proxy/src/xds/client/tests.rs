//! The whole client against a gRPC server in this process: streams, reconnects, TLS.

use std::convert::Infallible;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use hyper::server::conn::http2;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, SanType as RcgenName};
use tidegate_api::discovery::{
    DeltaDiscoveryRequest, DeltaDiscoveryResponse, DiscoveryRequest, DiscoveryResponse, Resource as Wrapper,
};
use tidegate_api::endpoint::{ClusterLoadAssignment, Endpoint, LbEndpoint, LocalityLbEndpoints, lb_endpoint};
use tidegate_api::wkt::Any;
use tokio::io::AsyncWriteExt;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, LocalSet, spawn_local};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::rustls;
use tokio_stream::wrappers::UnboundedReceiverStream;
use tonic::{Code, Status, Streaming};
use tonic_prost::ProstCodec;

use super::protocol::tests::{api, body, wanted};
use super::upstream::Upstream;
use super::*;
use crate::cluster::Cluster;
use crate::cluster::tests::config;
use crate::config::cluster::Discovery;
use crate::config::endpoint::EndpointAddress;
use crate::config::tls::{
    Certificate, DataSource, Provided, SanType, SecretSource, ServerNames, StringMatch, SubjectAltName,
    UpstreamTls, Validation,
};
use crate::secret::Credentials;
use crate::snapshot::{Publisher, Snapshot};
use crate::stats::Stats;
use crate::xds::{Change, Update, Verdict};

/// Only there so that a test that hangs ends.
const HANGING: Duration = Duration::from_mins(1);

fn run(test: impl Future<Output = ()>) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let bounded = async { tokio::time::timeout(HANGING, test).await.expect("not within a minute") };
    LocalSet::new().block_on(&runtime, bounded);
}

/// A call that a client made.
struct Call<Q, R> {
    path: String,
    authority: String,
    token: Option<String>,
    requests: Streaming<Q>,
    responses: mpsc::UnboundedSender<Result<R, Status>>,
}

impl<Q, R> Call<Q, R> {
    async fn request(&mut self) -> Q {
        self.requests.message().await.expect("a request").expect("the stream is open")
    }

    fn respond(&self, response: R) {
        self.responses.send(Ok(response)).unwrap();
    }

    /// Waits for the end of the client's side.
    async fn end(mut self) {
        while let Ok(Some(_)) = self.requests.message().await {}
    }
}

/// A gRPC server. Dropped, it takes its port and its connections with it.
struct Server<Q, R> {
    address: SocketAddr,
    calls: mpsc::UnboundedReceiver<Call<Q, R>>,
    /// Sends GOAWAY on every connection.
    goaway: watch::Sender<bool>,
    connections: Rc<AtomicUsize>,
    accepting: JoinHandle<()>,
}

impl<Q, R> Drop for Server<Q, R> {
    fn drop(&mut self) {
        self.accepting.abort();
    }
}

impl<Q, R> Server<Q, R>
where
    Q: Message + Default + 'static,
    R: Message + 'static,
{
    async fn start() -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), None).await
    }

    async fn start_at(address: SocketAddr, tls: Option<TlsAcceptor>) -> Self {
        let listener = TcpListener::bind(address).await.unwrap();
        let address = listener.local_addr().unwrap();
        let (sender, calls) = mpsc::unbounded_channel();
        let (goaway, shutdown) = watch::channel(false);
        let connections = Rc::new(AtomicUsize::new(0));
        let count = Rc::clone(&connections);
        let accepting = spawn_local(async move {
            let mut tasks = tokio::task::JoinSet::new();
            while let Ok((stream, _)) = listener.accept().await {
                count.fetch_add(1, Ordering::Relaxed);
                let (tls, sender, shutdown) = (tls.clone(), sender.clone(), shutdown.clone());
                tasks.spawn_local(async move {
                    match tls {
                        None => serve(stream, sender, shutdown).await,
                        Some(tls) => {
                            // A client that refuses the certificate ends here.
                            let Ok(stream) = tls.accept(stream).await else { return };
                            serve(stream, sender, shutdown).await;
                        }
                    }
                });
            }
        });
        Self { address, calls, goaway, connections, accepting }
    }

    async fn call(&mut self) -> Call<Q, R> {
        self.calls.recv().await.expect("the server runs")
    }
}

async fn serve<Q, R>(
    stream: impl AsyncRead + AsyncWrite + Unpin + 'static,
    calls: mpsc::UnboundedSender<Call<Q, R>>,
    mut shutdown: watch::Receiver<bool>,
) where
    Q: Message + Default + 'static,
    R: Message + 'static,
{
    let service = service_fn(move |request: http::Request<hyper::body::Incoming>| {
        let handler = Handler {
            path: request.uri().path().to_owned(),
            authority: request.uri().authority().map(ToString::to_string).unwrap_or_default(),
            calls: calls.clone(),
        };
        async move {
            let mut grpc = tonic::server::Grpc::new(ProstCodec::<R, Q>::default());
            Ok::<_, Infallible>(grpc.streaming(handler, request).await)
        }
    });
    let connection = http2::Builder::new(grpc::LocalExecutor).serve_connection(TokioIo::new(stream), service);
    let mut connection = std::pin::pin!(connection);
    tokio::select! {
        _ = &mut connection => return,
        _ = shutdown.wait_for(|it| *it) => connection.as_mut().graceful_shutdown(),
    }
    connection.await.ok();
}

struct Handler<Q, R> {
    path: String,
    authority: String,
    calls: mpsc::UnboundedSender<Call<Q, R>>,
}

impl<Q: Send + 'static, R: Send + 'static> tonic::server::StreamingService<Q> for Handler<Q, R> {
    type Response = R;
    type ResponseStream = UnboundedReceiverStream<Result<R, Status>>;
    type Future = std::future::Ready<Result<tonic::Response<Self::ResponseStream>, Status>>;

    fn call(&mut self, request: tonic::Request<Streaming<Q>>) -> Self::Future {
        let (responses, stream) = mpsc::unbounded_channel();
        let token = request.metadata().get("token").map(|value| value.to_str().unwrap().to_owned());
        let call = Call {
            path: self.path.clone(),
            authority: self.authority.clone(),
            token,
            requests: request.into_inner(),
            responses,
        };
        self.calls.send(call).ok();
        std::future::ready(Ok(tonic::Response::new(UnboundedReceiverStream::new(stream))))
    }
}

/// A cluster in force, without secrets to wait for.
fn build(config: crate::config::cluster::Cluster) -> Arc<Cluster> {
    let stats = Stats::new(1);
    let no_secret = |_: &SecretSource| unreachable!("the context names no secret");
    let credentials =
        config.tls.as_ref().map(|tls| Credentials::new(tls, stats.client_tls("xds"), no_secret));
    let cluster = Cluster::build_warming(Arc::new(config), &stats, None, credentials);
    cluster.announce();
    cluster
}

/// A client with a store that the test plays.
struct Bench {
    client: Option<Client>,
    events: mpsc::UnboundedReceiver<Event>,
    cluster: Arc<Cluster>,
    marked: Rc<AtomicUsize>,
}

impl Bench {
    fn new(address: SocketAddr, protocol: Protocol) -> Self {
        Self::with(address, &api(protocol), None)
    }

    fn with(address: SocketAddr, api: &ApiSource, tls: Option<UpstreamTls>) -> Self {
        let mut config = config("xds", Discovery::Static, &[EndpointAddress::Ip(address)]);
        config.tls = tls.map(Arc::new);
        let cluster = build(config);
        let publisher = Publisher::new(Snapshot::build(vec![], vec![Arc::clone(&cluster)]));
        let marked = Rc::new(AtomicUsize::new(0));
        let count = Rc::clone(&marked);
        let own = Box::new(move |_: &socket2::Socket| {
            count.fetch_add(1, Ordering::Relaxed);
            Ok(())
        });
        let (sender, events) = mpsc::unbounded_channel();
        let settings = Settings {
            node: core::Node { id: "me".into(), ..Default::default() },
            ads: Some(Arc::new(api.clone())),
        };
        let client = Client::new(settings, Rc::new(Upstream::new(publisher, own)), sender);
        Self { client: Some(client), events, cluster, marked }
    }

    fn want(&mut self, key: &Key, names: &[&str]) {
        self.client.as_mut().unwrap().want(key, wanted(names));
    }

    async fn event(&mut self) -> Event {
        self.events.recv().await.expect("the client lives")
    }

    async fn update(&mut self) -> Update {
        loop {
            match self.event().await {
                Event::Update(update) => return update,
                Event::Connected { .. } | Event::RateLimited { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }

    async fn failed(&mut self) -> String {
        loop {
            match self.event().await {
                Event::Failed { keys, reason } => {
                    assert!(!keys.is_empty());
                    return reason;
                }
                Event::Connected { .. } | Event::RateLimited { .. } => {}
                other => panic!("{other:?}"),
            }
        }
    }
}

fn ads(kind: Kind) -> Key {
    Key { source: Source::Ads, kind }
}

fn state(version: &str, kind: Kind, resources: Vec<Any>) -> DiscoveryResponse {
    DiscoveryResponse {
        version_info: version.into(),
        resources,
        type_url: kind.type_url().into(),
        nonce: format!("nonce of {version}"),
        control_plane: Some(core::ControlPlane { identifier: "the server".into() }),
        ..Default::default()
    }
}

type Sotw = Server<DiscoveryRequest, DiscoveryResponse>;
type Delta = Server<DeltaDiscoveryRequest, DeltaDiscoveryResponse>;

#[test]
fn state_of_the_world_over_ads() {
    run(async {
        let mut server = Sotw::start().await;
        let source = ApiSource {
            initial_metadata: vec![("token".into(), "secret".into())],
            ..api(Protocol::AggregatedGrpc)
        };
        let mut bench = Bench::with(server.address, &source, None);
        bench.want(&ads(Kind::Cluster), &["*"]);
        bench.want(&ads(Kind::ClusterLoadAssignment), &["a", "b"]);
        let mut call = server.call().await;
        assert_eq!(
            call.path,
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
        );
        assert_eq!((&*call.authority, call.token.as_deref()), ("xds", Some("secret")));
        let first = call.request().await;
        assert_eq!((&*first.type_url, first.node.unwrap().id), (Kind::Cluster.type_url(), "me".to_owned()));
        assert_eq!(call.request().await.resource_names, ["a", "b"]);
        assert!(
            matches!(bench.event().await, Event::Connected { identifier: None, keys } if keys.len() == 2)
        );

        call.respond(state("1", Kind::Cluster, vec![body(Kind::Cluster, "c")]));
        let event = bench.event().await;
        assert!(
            matches!(event, Event::Connected { identifier: Some(ref name), .. } if name == "the server"),
            "{event:?}"
        );
        let Update { key, change: Change::State { version, resources, .. }, verdict } = bench.update().await
        else {
            panic!("not a state");
        };
        assert_eq!((key, &*version, resources.len()), (ads(Kind::Cluster), "1", 1));
        verdict.send(Verdict::Accept).unwrap();
        let ack = call.request().await;
        assert_eq!((&*ack.version_info, &*ack.response_nonce), ("1", "nonce of 1"));

        let stats = bench.cluster.stats();
        assert_eq!((stats.upstream_cx_total().value(), stats.upstream_cx_active().value()), (1, 1));
        assert!(
            stats.upstream_cx_rx_bytes_total().value() > 0 && stats.upstream_cx_tx_bytes_total().value() > 0
        );
        assert_eq!(bench.marked.load(Ordering::Relaxed), 1, "marked before it connects");
        bench.client = None;
        call.end().await;
        while bench.cluster.stats().upstream_cx_active().value() > 0 {
            tokio::task::yield_now().await;
        }
    });
}

#[test]
fn incremental_over_ads() {
    run(async {
        let mut server = Delta::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedDeltaGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        assert_eq!(
            call.path,
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/DeltaAggregatedResources"
        );
        call.request().await;
        let resource = Some(body(Kind::Cluster, "a"));
        call.respond(DeltaDiscoveryResponse {
            type_url: Kind::Cluster.type_url().into(),
            resources: vec![Wrapper {
                name: "a".into(),
                version: "7".into(),
                resource,
                ..Default::default()
            }],
            nonce: "n".into(),
            ..Default::default()
        });
        let Update { change: Change::Delta { resources, .. }, verdict, .. } = bench.update().await else {
            panic!("not a delta");
        };
        assert_eq!(resources[0].name.as_deref(), Some("a"));
        verdict.send(Verdict::Accept).unwrap();
        assert_eq!(call.request().await.response_nonce, "n");
        // Several wishes of one turn are one request.
        let key = ads(Kind::ClusterLoadAssignment);
        for name in ["x", "y", "z"] {
            bench.client.as_mut().unwrap().add(&key, name.into());
        }
        assert_eq!(call.request().await.resource_names_subscribe, ["x", "y", "z"]);
        // p46, over a real reconnect.
        call.responses.send(Err(Status::unavailable("going down"))).unwrap();
        let reason = bench.failed().await;
        assert!(reason.contains("Unavailable: going down"), "{reason}");
        let mut call = server.call().await;
        let again = call.request().await;
        assert_eq!(again.initial_resource_versions.get("a").map(String::as_str), Some("7"));
        assert_eq!(call.request().await.resource_names_subscribe, ["x", "y", "z"]);
    });
}

#[test]
fn p43_p44_a_killed_server_is_found_again_and_asked_with_the_last_version() {
    run(async {
        let mut server = Sotw::start().await;
        let address = server.address;
        let mut bench = Bench::new(address, Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        call.request().await;
        call.respond(state("1", Kind::Cluster, vec![]));
        bench.update().await.verdict.send(Verdict::Accept).unwrap();
        call.request().await;
        drop((server, call));
        bench.failed().await;
        // Nobody is there now.
        let reason = bench.failed().await;
        assert!(reason.contains("Connection refused") && reason.contains(&address.to_string()), "{reason}");
        // A wish meanwhile goes out on the new stream.
        bench.want(&ads(Kind::Listener), &["*"]);
        let mut server = Sotw::start_at(address, None).await;
        let mut call = server.call().await;
        let request = call.request().await;
        assert_eq!((&*request.version_info, &*request.response_nonce), ("1", ""));
        assert_eq!(call.request().await.type_url, Kind::Listener.type_url());
        assert!(bench.cluster.stats().upstream_cx_connect_fail().value() >= 1);
    });
}

#[test]
fn p43_goaway_and_the_end_of_the_stream() {
    run(async {
        let mut server = Sotw::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        call.request().await;
        server.goaway.send(true).unwrap();
        // The stream goes on until the server ends it.
        call.respond(state("1", Kind::Cluster, vec![]));
        bench.update().await.verdict.send(Verdict::Accept).unwrap();
        assert_eq!(call.request().await.version_info, "1");
        server.goaway.send(false).unwrap();
        drop(call);
        bench.failed().await;
        let mut call = server.call().await;
        assert_eq!(call.request().await.version_info, "1");
        assert_eq!(server.connections.load(Ordering::Relaxed), 2);
    });
}

#[test]
fn what_is_not_grpc_fails_and_is_tried_again() {
    run(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let mut bench = Bench::new(listener.local_addr().unwrap(), Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        for _ in 0..2 {
            let (mut stream, _) = listener.accept().await.unwrap();
            stream.write_all(b"HTTP/1.1 400 Bad Request\r\ncontent-length: 0\r\n\r\n").await.unwrap();
            let reason = bench.failed().await;
            assert!(!reason.is_empty());
        }
    });
}

#[test]
fn a_response_that_is_no_message_ends_the_stream_only() {
    run(async {
        // Field 1 of a Duration is a number, of a DiscoveryResponse a text.
        let mut server = Server::<DiscoveryRequest, tidegate_api::wkt::Duration>::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        call.request().await;
        call.respond(tidegate_api::wkt::Duration { seconds: 5, nanos: 0 });
        let reason = bench.failed().await;
        assert!(reason.contains("decode") || reason.contains("wire type"), "{reason}");
        server.call().await.request().await;
    });
}

#[test]
fn each_kind_has_its_own_stream_and_service() {
    run(async {
        let mut server = Sotw::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedGrpc);
        let source = Source::Api(Arc::new(api(Protocol::Grpc)));
        let mut seen = Vec::new();
        for (kind, service) in [
            (Kind::Listener, "listener.v3.ListenerDiscoveryService/StreamListeners"),
            (Kind::Cluster, "cluster.v3.ClusterDiscoveryService/StreamClusters"),
            (Kind::RouteConfiguration, "route.v3.RouteDiscoveryService/StreamRoutes"),
            (Kind::ClusterLoadAssignment, "endpoint.v3.EndpointDiscoveryService/StreamEndpoints"),
            (Kind::Secret, "secret.v3.SecretDiscoveryService/StreamSecrets"),
        ] {
            let key = Key { source: source.clone(), kind };
            bench.want(&key, &["a"]);
            let mut call = server.call().await;
            assert_eq!(call.path, format!("/envoy.service.{service}"));
            assert_eq!(call.request().await.type_url, kind.type_url());
            seen.push((key, call));
        }
        // Nothing wanted: the stream ends. Wanted again: a new one.
        let (key, call) = seen.remove(0);
        bench.want(&key, &[]);
        call.end().await;
        bench.want(&key, &["b"]);
        assert_eq!(server.call().await.request().await.resource_names, ["b"]);
        // VHDS is incremental only.
        bench.want(&Key { source, kind: Kind::VirtualHost }, &["*"]);
        let reason = bench.failed().await;
        assert!(reason.contains("DELTA_GRPC"), "{reason}");
    });
}

#[test]
fn incremental_streams_of_one_kind() {
    run(async {
        let mut server = Delta::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedDeltaGrpc);
        let source = Source::Api(Arc::new(api(Protocol::DeltaGrpc)));
        for (kind, service) in [
            (Kind::Listener, "listener.v3.ListenerDiscoveryService/DeltaListeners"),
            (Kind::Cluster, "cluster.v3.ClusterDiscoveryService/DeltaClusters"),
            (Kind::RouteConfiguration, "route.v3.RouteDiscoveryService/DeltaRoutes"),
            (Kind::VirtualHost, "route.v3.VirtualHostDiscoveryService/DeltaVirtualHosts"),
            (Kind::ClusterLoadAssignment, "endpoint.v3.EndpointDiscoveryService/DeltaEndpoints"),
            (Kind::Secret, "secret.v3.SecretDiscoveryService/DeltaSecrets"),
        ] {
            bench.want(&Key { source: source.clone(), kind }, &["*"]);
            let mut call = server.call().await;
            assert_eq!(call.path, format!("/envoy.service.{service}"));
            assert_eq!(call.request().await.type_url, kind.type_url());
        }
    });
}

#[test]
fn a_hundred_thousand_endpoints_in_one_response() {
    run(async {
        let mut server = Sotw::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::ClusterLoadAssignment), &["a"]);
        let call = server.call().await;
        let endpoint = |n: u32| LbEndpoint {
            host_identifier: Some(lb_endpoint::HostIdentifier::Endpoint(Endpoint {
                hostname: format!("host number {n} has a name that takes some bytes"),
                ..Default::default()
            })),
            ..Default::default()
        };
        let assignment = ClusterLoadAssignment {
            cluster_name: "a".into(),
            endpoints: vec![LocalityLbEndpoints {
                lb_endpoints: (0..100_000).map(endpoint).collect(),
                ..Default::default()
            }],
            ..Default::default()
        };
        let value = assignment.encode_to_vec();
        assert!(value.len() > 4 << 20, "more than gRPC's default limit");
        let any = Any { type_url: Kind::ClusterLoadAssignment.type_url().into(), value };
        call.respond(state("1", Kind::ClusterLoadAssignment, vec![any.clone()]));
        let Change::State { resources, .. } = bench.update().await.change else { panic!("not a state") };
        assert_eq!(resources[0].body, any);
    });
}

#[test]
fn what_the_client_rejects_itself_is_told_to_store_and_server() {
    run(async {
        let mut server = Sotw::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        call.request().await;
        call.respond(state("1", Kind::Cluster, vec![body(Kind::Listener, "l")]));
        let nack = call.request().await;
        assert!(nack.error_detail.unwrap().message.contains("is not that of the response"));
        loop {
            match bench.event().await {
                Event::Rejected { key, version, .. } => {
                    assert_eq!((key.kind, &*version), (Kind::Cluster, "1"));
                    break;
                }
                Event::Connected { .. } | Event::RateLimited { .. } => {}
                other => panic!("{other:?}"),
            }
        }
        // A verdict that never comes, because its sender is gone, is a rejection.
        call.respond(state("2", Kind::Cluster, vec![]));
        drop(bench.update().await);
        assert!(call.request().await.error_detail.unwrap().message.contains("not looked at"));
    });
}

#[test]
fn p49_time_to_live_runs_out_even_without_a_stream() {
    run(async {
        let mut server = Delta::start().await;
        let mut bench = Bench::new(server.address, Protocol::AggregatedDeltaGrpc);
        bench.want(&ads(Kind::Cluster), &["*"]);
        let mut call = server.call().await;
        call.request().await;
        call.respond(DeltaDiscoveryResponse {
            type_url: Kind::Cluster.type_url().into(),
            resources: vec![Wrapper {
                name: "a".into(),
                version: "1".into(),
                resource: Some(body(Kind::Cluster, "a")),
                ttl: Some(tidegate_api::wkt::Duration { seconds: 1, nanos: 0 }),
                ..Default::default()
            }],
            nonce: "n".into(),
            ..Default::default()
        });
        bench.update().await.verdict.send(Verdict::Accept).unwrap();
        call.request().await;
        drop((call, server));
        loop {
            if let Event::Update(Update { change: Change::Expired(names), .. }) = bench.event().await {
                assert_eq!(names, ["a".into()]);
                break;
            }
        }
    });
}

#[test]
fn without_a_cluster_or_an_ads_config_the_store_hears_why() {
    run(async {
        let address = (Ipv4Addr::LOCALHOST, 1).into();
        let mut bench = Bench::with(
            address,
            &ApiSource { cluster: "nobody".into(), ..api(Protocol::AggregatedGrpc) },
            None,
        );
        bench.want(&ads(Kind::Cluster), &["*"]);
        let reason = bench.failed().await;
        assert!(reason.contains("there is no cluster \"nobody\""), "{reason}");
        let (sender, mut events) = mpsc::unbounded_channel();
        let publisher = Publisher::new(Snapshot::build(vec![], vec![]));
        let dialer = Rc::new(Upstream::new(publisher, Box::new(|_| Ok(()))));
        let mut client = Client::new(Settings { node: core::Node::default(), ads: None }, dialer, sender);
        client.want(&ads(Kind::Cluster), wanted(&["*"]));
        let event = events.recv().await.unwrap();
        assert!(
            matches!(event, Event::Failed { ref reason, .. } if reason.contains("ads_config")),
            "{event:?}"
        );
    });
}

/// A certificate authority of a test.
struct Authority {
    pem: String,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new() -> Self {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().unwrap();
        let pem = params.self_signed(&key).unwrap().pem();
        Self { pem, issuer: Issuer::new(params, key) }
    }

    /// A certificate and its key.
    fn issue(&self, names: Vec<RcgenName>) -> (rcgen::Certificate, KeyPair) {
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.subject_alt_names = names;
        let key = KeyPair::generate().unwrap();
        (params.signed_by(&key, &self.issuer).unwrap(), key)
    }

    /// A server that asks for certificates of this CA when `mutual`.
    fn acceptor(&self, names: Vec<RcgenName>, mutual: bool) -> TlsAcceptor {
        let (certificate, key) = self.issue(names);
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let builder = rustls::ServerConfig::builder_with_provider(Arc::clone(&provider))
            .with_safe_default_protocol_versions()
            .unwrap();
        let builder = if mutual {
            use rustls::pki_types::CertificateDer;
            use rustls::pki_types::pem::PemObject;
            let mut roots = rustls::RootCertStore::empty();
            roots.add(CertificateDer::from_pem_slice(self.pem.as_bytes()).unwrap()).unwrap();
            let verifier =
                rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider);
            builder.with_client_cert_verifier(verifier.build().unwrap())
        } else {
            builder.with_no_client_auth()
        };
        let key = rustls::pki_types::PrivateKeyDer::Pkcs8(key.serialize_der().into());
        let mut config = builder.with_single_cert(vec![certificate.der().clone()], key).unwrap();
        config.alpn_protocols = vec![b"h2".to_vec()];
        TlsAcceptor::from(Arc::new(config))
    }

    /// A client that trusts this CA.
    fn client(&self, sni: &str, server_names: ServerNames) -> UpstreamTls {
        let (names, auto_sni_san_validation) = match server_names {
            ServerNames::Any => (vec![], false),
            ServerNames::Sni => (vec![], true),
            ServerNames::Match(names) => (names, false),
        };
        let trusted_ca = Some(DataSource::Inline(self.pem.clone().into_bytes().into()));
        UpstreamTls {
            sni: Some(sni).filter(|sni| !sni.is_empty()).map(Arc::from),
            auto_sni_san_validation,
            certificate: None,
            validation: Validation { trusted_ca, names, ..Validation::default() },
            validation_secret: None,
            alpn_protocols: vec![],
            tls12: true,
            tls13: true,
        }
    }
}

fn dns(name: &str) -> RcgenName {
    RcgenName::DnsName(name.try_into().unwrap())
}

fn uri(name: &str) -> RcgenName {
    RcgenName::URI(name.try_into().unwrap())
}

fn matching(san_type: SanType, pattern: StringMatch) -> ServerNames {
    ServerNames::Match(vec![SubjectAltName { san_type, pattern, ignore_case: false }])
}

/// Whether a client gets through to a server, and why not.
async fn try_tls(acceptor: TlsAcceptor, tls: UpstreamTls) -> Result<(), String> {
    let mut server = Sotw::start_at((Ipv4Addr::LOCALHOST, 0).into(), Some(acceptor)).await;
    let mut bench = Bench::with(server.address, &api(Protocol::AggregatedGrpc), Some(tls));
    bench.want(&ads(Kind::Cluster), &["*"]);
    tokio::select! {
        mut call = server.call() => {
            call.request().await;
            Ok(())
        }
        reason = bench.failed() => Err(reason),
    }
}

#[test]
fn tls_servers_are_believed_when_ca_and_names_fit() {
    run(async {
        let ca = Authority::new();
        let spiffe = "spiffe://cluster.local/ns/istio-system/sa/istiod";
        let names = || {
            vec![
                dns("istiod.istio-system.svc"),
                dns("*.wild.test"),
                uri(spiffe),
                RcgenName::IpAddress([127, 0, 0, 1].into()),
            ]
        };
        let exact = |text: &str| StringMatch::Exact(text.into());
        for (sni, names_wanted) in [
            ("anything", ServerNames::Any),
            ("istiod.istio-system.svc", ServerNames::Sni),
            ("", ServerNames::Any),
            ("", matching(SanType::Dns, exact("istiod.istio-system.svc"))),
            ("", matching(SanType::Dns, exact("a.wild.test"))),
            ("x", matching(SanType::Dns, StringMatch::Suffix(".svc".into()))),
            ("x", matching(SanType::Uri, exact(spiffe))),
            ("x", matching(SanType::Uri, StringMatch::Prefix("spiffe://cluster.local/".into()))),
            ("x", matching(SanType::IpAddress, exact("127.0.0.1"))),
        ] {
            let tls = ca.client(sni, names_wanted.clone());
            assert_eq!(try_tls(ca.acceptor(names(), false), tls).await, Ok(()), "{sni:?} {names_wanted:?}");
        }
        for (sni, names_wanted) in [
            ("other.svc", ServerNames::Sni),
            ("x", matching(SanType::Dns, exact("other.svc"))),
            ("x", matching(SanType::Dns, exact(spiffe))),
            ("x", matching(SanType::Uri, exact("spiffe://cluster.local/ns/a/sa/b"))),
            ("x", matching(SanType::IpAddress, exact("127.0.0.2"))),
        ] {
            let tls = ca.client(sni, names_wanted.clone());
            let reason = try_tls(ca.acceptor(names(), false), tls).await.unwrap_err();
            assert!(reason.contains("TLS") && reason.contains("certificate"), "{names_wanted:?}: {reason}");
        }
    });
}

#[test]
fn tls_servers_of_another_ca_are_refused() {
    run(async {
        let (ca, other) = (Authority::new(), Authority::new());
        let tls = other.client("a", ServerNames::Any);
        let reason = try_tls(ca.acceptor(vec![dns("a")], false), tls).await.unwrap_err();
        assert!(reason.contains("certificate"), "{reason}");
        let trusting = |trusted_ca| {
            let validation = Validation { trusted_ca: Some(trusted_ca), ..Validation::default() };
            UpstreamTls { validation, ..ca.client("a", ServerNames::Any) }
        };
        let tls = trusting(DataSource::File("/nonexistent/ca.pem".into()));
        let reason = try_tls(ca.acceptor(vec![dns("a")], false), tls).await.unwrap_err();
        assert!(reason.contains("trusted_ca can't be read from /nonexistent/ca.pem"), "{reason}");
        let tls = trusting(DataSource::Inline(b"no certificate".as_slice().into()));
        let reason = try_tls(ca.acceptor(vec![dns("a")], false), tls).await.unwrap_err();
        assert!(reason.contains("there is no certificate in it"), "{reason}");
    });
}

#[test]
fn tls_servers_may_ask_who_we_are() {
    run(async {
        let ca = Authority::new();
        let (certificate, key) = ca.issue(vec![dns("client")]);
        let directory = tempfile::tempdir().unwrap();
        let [chain, private_key] = ["chain.pem", "key.pem"].map(|name| directory.path().join(name));
        std::fs::write(&chain, certificate.pem()).unwrap();
        std::fs::write(&private_key, key.serialize_pem()).unwrap();
        let certificate = Certificate {
            chain: DataSource::File(chain),
            private_key: DataSource::File(private_key),
            watched_directories: vec![],
        };
        for (tls12, tls13) in [(true, false), (false, true)] {
            let certificate = Some(Provided::Here(certificate.clone()));
            let tls = UpstreamTls { certificate, tls12, tls13, ..ca.client("a", ServerNames::Any) };
            assert_eq!(try_tls(ca.acceptor(vec![dns("a")], true), tls).await, Ok(()));
        }
        let tls = ca.client("a", ServerNames::Any);
        try_tls(ca.acceptor(vec![dns("a")], true), tls).await.unwrap_err();
    });
}

#[test]
fn a_server_that_never_answers_the_handshake_costs_connect_timeout() {
    run(async {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let tls = Authority::new().client("a", ServerNames::Any);
        let address = listener.local_addr().unwrap();
        let mut config = config("xds", Discovery::Static, &[EndpointAddress::Ip(address)]);
        config.tls = Some(Arc::new(tls));
        config.connect_timeout = Duration::from_millis(50);
        let cluster = build(config);
        let upstream =
            Upstream::new(Publisher::new(Snapshot::build(vec![], vec![cluster])), Box::new(|_| Ok(())));
        let dialing = upstream.dial("xds", Alpn::Http2);
        let (result, held): (_, TcpStream) =
            tokio::join!(dialing, async { listener.accept().await.unwrap().0 });
        let Err(error) = result else { panic!("connected") };
        assert!(error.to_string().contains("not connected within connect_timeout (50ms)"), "{error}");
        drop(held);
    });
}

#[test]
fn statuses_are_described_once() {
    assert_eq!(grpc::describe(&Status::new(Code::Unavailable, "x")), "Unavailable: x");
}
