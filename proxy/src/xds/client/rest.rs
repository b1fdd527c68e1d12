//! `api_type: REST`: `POST /v3/discovery:…` again and again, JSON both ways, HTTP/1.1 over one kept connection.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use http::{Method, Request, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::http1::{self, SendRequest};
use hyper_util::rt::TokioIo;
use serde_json::{Value as Json, json};
use tokio::time::Instant;

use super::json::{self, Content, Refusal};
use super::state::{Asked, State};
use super::{Alpn, Task};
use crate::config::config_source::ApiSource;
use crate::config::proto::{Format, Source, to_dynamic, to_json};
use crate::xds::Kind;

/// Largest response: some 500,000 endpoints.
const MAX_RESPONSE: usize = 128 << 20;

/// Of the body of a failure, so much is told.
const MAX_FAILURE_TEXT: usize = 256;

/// When something new is wanted, the next poll is not far: so long after the request, so that what is wanted at the
/// same time goes out together.
const SOON: Duration = Duration::from_millis(20);

/// Responses from this size on are read on another thread, not to hold up the main one.
const LARGE: usize = 64 << 10;

/// Polls until nothing is wanted any more.
pub(super) async fn run(source: Arc<ApiSource>, task: Task) {
    let Some(path) = path_of(task.key.kind) else {
        let reason = format!("{:?} can't be had over REST; use api_type DELTA_GRPC", task.key.kind);
        State::new(task).failed(reason);
        return;
    };
    let node = match to_dynamic(&*task.node) {
        Ok(node) => to_json(&node),
        Err(error) => {
            State::new(task).failed(format!("the node can't be written as JSON: {error}"));
            return;
        }
    };
    let url = format!("{}{path}", source.cluster);
    let poller = Poller { source, path, url: url.into(), node, state: State::new(task), connection: None };
    poller.run().await;
}

/// `google.api.http` of the services.
fn path_of(kind: Kind) -> Option<&'static str> {
    match kind {
        Kind::Listener => Some("/v3/discovery:listeners"),
        Kind::RouteConfiguration => Some("/v3/discovery:routes"),
        Kind::Cluster => Some("/v3/discovery:clusters"),
        Kind::ClusterLoadAssignment => Some("/v3/discovery:endpoints"),
        Kind::Secret => Some("/v3/discovery:secrets"),
        Kind::VirtualHost => None,
    }
}

struct Poller {
    source: Arc<ApiSource>,
    path: &'static str,
    /// What a response is called in errors: cluster and path.
    url: Arc<str>,
    node: Json,
    state: State,
    /// None before the first request, and after a failure.
    connection: Option<SendRequest<Full<Bytes>>>,
}

impl Poller {
    async fn run(mut self) {
        if self.state.next_ask().await == Asked::Nothing {
            return;
        }
        loop {
            self.poll().await;
            let mut next = Instant::now() + self.delay();
            loop {
                match self.state.wait(next).await {
                    None => break,
                    Some(Asked::Nothing) => return,
                    Some(Asked::Less) => {}
                    Some(Asked::More) => next = next.min(Instant::now() + SOON),
                }
            }
        }
    }

    /// From the end of one poll to the next: at least `refresh_delay`, on average half as much more.
    fn delay(&self) -> Duration {
        self.source.refresh_delay.mul_f64(1.0 + fastrand::f64())
    }

    async fn poll(&mut self) {
        let request = self.request();
        let answer = tokio::time::timeout(self.source.request_timeout, self.exchange(request)).await;
        match answer {
            Ok(Ok((StatusCode::OK, body))) => self.received(body).await,
            Ok(Ok((StatusCode::NOT_MODIFIED, _))) => self.state.succeeded(None),
            Ok(Ok((status, body))) => self.failed(&format!("HTTP status {status}{}", excerpt(&body))),
            Ok(Err(reason)) => self.failed(&reason),
            Err(_) => {
                let timeout = self.source.request_timeout;
                self.failed(&format!("no response within the request_timeout of {timeout:?}"));
            }
        }
    }

    fn failed(&mut self, reason: &str) {
        self.connection = None;
        self.state.failed(format!("{}: {reason}", self.url));
    }

    /// A `DiscoveryRequest`: no nonce, no error_detail. `version_info` says what was accepted of what is wanted, so it
    /// is left out as soon as more is wanted: a server that has nothing newer would keep the rest to itself.
    fn request(&self) -> Bytes {
        let mut request = json!({});
        if let Some(version) = self.state.version() {
            request["version_info"] = version.into();
        }
        request["node"] = self.node.clone();
        let wanted = self.state.wanted();
        if !wanted.wildcard {
            request["resource_names"] = wanted.names.iter().map(|name| Json::from(&**name)).collect();
        }
        request["type_url"] = self.state.kind().type_url().into();
        request.to_string().into()
    }

    /// One request and its response, on the kept connection if it still stands.
    async fn exchange(&mut self, body: Bytes) -> Result<(StatusCode, Bytes), String> {
        let kept = self.connection.take();
        if let Some(mut connection) = kept
            && connection.ready().await.is_ok()
        {
            match self.send(&mut connection, body.clone()).await {
                Ok(response) => return self.receive(connection, response).await,
                // The server may close an idle connection just when the request is on its way.
                Err(error) if error.is_canceled() || error.is_incomplete_message() || error.is_closed() => {}
                Err(error) => return Err(describe(&error)),
            }
        }
        let mut connection = self.connect().await?;
        let response = self.send(&mut connection, body).await.map_err(|error| describe(&error))?;
        self.receive(connection, response).await
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, String> {
        let dialer = self.state.dialer();
        let stream =
            dialer.dial(&self.source.cluster, Alpn::Http1).await.map_err(|error| error.to_string())?;
        let (sender, connection) =
            http1::handshake(TokioIo::new(stream)).await.map_err(|error| describe(&error))?;
        // Ends when the sender is dropped. Its errors come out of the request.
        tokio::task::spawn_local(async move { connection.await.ok() });
        Ok(sender)
    }

    async fn send(
        &self,
        connection: &mut SendRequest<Full<Bytes>>,
        body: Bytes,
    ) -> hyper::Result<http::Response<Incoming>> {
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = http::Uri::from_static(self.path);
        let headers = request.headers_mut();
        // As Envoy; a name that can't stand in a header field (it may hold anything) leaves it empty.
        let host = header::HeaderValue::from_str(&self.source.cluster);
        headers.insert(header::HOST, host.unwrap_or_else(|_| header::HeaderValue::from_static("")));
        headers.insert(header::CONTENT_TYPE, header::HeaderValue::from_static("application/json"));
        connection.send_request(request).await
    }

    async fn receive(
        &mut self,
        connection: SendRequest<Full<Bytes>>,
        response: http::Response<Incoming>,
    ) -> Result<(StatusCode, Bytes), String> {
        let status = response.status();
        let body = Limited::new(response.into_body(), MAX_RESPONSE);
        let body = body.collect().await.map_err(|error| {
            if error.is::<http_body_util::LengthLimitError>() {
                format!("the response is larger than {MAX_RESPONSE} bytes")
            } else {
                format!("the response broke off: {error}")
            }
        })?;
        self.connection = Some(connection);
        Ok((status, body.to_bytes()))
    }

    async fn received(&mut self, body: Bytes) {
        let mut hasher = DefaultHasher::new();
        body.hash(&mut hasher);
        let hash = hasher.finish();
        if self.state.has(hash) {
            self.state.succeeded(None);
            return;
        }
        match self.read(body).await {
            Ok(content) => self.state.deliver(content, Some(hash)),
            Err(Refusal::Rejected { version, reason }) => {
                self.state.succeeded(None);
                self.state.rejected(version, format!("{}: {reason}", self.url));
            }
            // The text has the URL already.
            Err(Refusal::Unreadable(reason)) => self.state.failed(reason),
        }
    }

    async fn read(&self, body: Bytes) -> Result<Content, Refusal> {
        let (url, kind) = (Arc::clone(&self.url), self.state.kind());
        let large = body.len() >= LARGE;
        let read = move || {
            let text = String::from_utf8(body.to_vec())
                .map_err(|error| Refusal::Unreadable(format!("{url}: not UTF-8: {error}")))?;
            json::from_text(&Source { name: url, text, format: Format::Json }, kind)
        };
        if !large {
            return read();
        }
        let done = tokio::task::spawn_blocking(read).await;
        done.unwrap_or_else(|error| Err(Refusal::Unreadable(format!("{}: {error}", self.url))))
    }
}

fn describe(error: &hyper::Error) -> String {
    use std::error::Error;
    match error.source() {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// The beginning of what the server has to say about a failure.
fn excerpt(body: &[u8]) -> String {
    let text = String::from_utf8_lossy(&body[..body.len().min(MAX_FAILURE_TEXT)]);
    let text = text.trim();
    if text.is_empty() { String::new() } else { format!(": {text:?}") }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};
    use std::collections::BTreeSet;
    use std::rc::Rc;

    use hyper::service::service_fn;
    use tokio::sync::{Mutex, mpsc, oneshot};

    use super::super::testing::{names, task, wildcard};
    use super::super::{Ask, DialError, Dialer, Dialing};
    use super::*;
    use crate::config::config_source::Protocol;
    use crate::xds::{Change, Event, Update, Verdict, Wanted};

    const REFRESH: Duration = Duration::from_secs(10);
    const TIMEOUT: Duration = Duration::from_secs(1);

    /// A server at the far end of a pipe.
    struct Server {
        polls: Mutex<mpsc::UnboundedReceiver<Poll>>,
        sender: mpsc::UnboundedSender<Poll>,
        dials: Cell<u32>,
        /// Dials fail.
        down: Cell<bool>,
        /// Ends the connections that stand.
        connections: RefCell<Vec<tokio::task::JoinHandle<()>>>,
    }

    #[derive(Debug)]
    struct Poll {
        at: Instant,
        path: String,
        host: String,
        body: Json,
        answer: oneshot::Sender<(u16, String)>,
    }

    impl Poll {
        fn answer(self, status: u16, body: impl Into<Body>) {
            self.answer.send((status, body.into().0)).unwrap();
        }
    }

    struct Body(String);

    impl From<&str> for Body {
        fn from(text: &str) -> Self {
            Self(text.to_owned())
        }
    }

    impl From<Json> for Body {
        fn from(json: Json) -> Self {
            Self(json.to_string())
        }
    }

    impl Server {
        fn new() -> Rc<Self> {
            let (sender, polls) = mpsc::unbounded_channel();
            Rc::new(Self {
                polls: Mutex::new(polls),
                sender,
                dials: Cell::new(0),
                down: Cell::new(false),
                connections: RefCell::default(),
            })
        }

        async fn poll(&self) -> Poll {
            self.polls.lock().await.recv().await.unwrap()
        }

        fn cut(&self) {
            self.connections.borrow_mut().drain(..).for_each(|connection| connection.abort());
        }
    }

    impl Dialer for Server {
        fn dial<'a>(&'a self, cluster: &'a str, alpn: Alpn) -> Dialing<'a> {
            assert_eq!((cluster, alpn), ("xds", Alpn::Http1));
            self.dials.set(self.dials.get() + 1);
            if self.down.get() {
                return Box::pin(async { Err(DialError::NoEndpoint("xds".into())) });
            }
            let (ours, theirs) = tokio::io::duplex(64 << 10);
            let polls = self.sender.clone();
            let service = service_fn(move |request: Request<Incoming>| {
                let polls = polls.clone();
                async move {
                    let (head, body) = request.into_parts();
                    assert_eq!(
                        (head.method, &head.headers["content-type"]),
                        (Method::POST, &"application/json".parse().unwrap())
                    );
                    let body = body.collect().await.unwrap().to_bytes();
                    let (answer, answered) = oneshot::channel();
                    let poll = Poll {
                        at: Instant::now(),
                        path: head.uri.path().into(),
                        host: head.headers["host"].to_str().unwrap().into(),
                        body: serde_json::from_slice(&body).unwrap(),
                        answer,
                    };
                    polls.send(poll).unwrap();
                    let (status, body) = answered.await.map_err(std::io::Error::other)?;
                    let mut response = http::Response::new(Full::new(Bytes::from(body)));
                    *response.status_mut() = StatusCode::from_u16(status).unwrap();
                    Ok::<_, std::io::Error>(response)
                }
            });
            let connection = tokio::task::spawn_local(async move {
                hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(ours), service)
                    .await
                    .ok();
            });
            self.connections.borrow_mut().push(connection);
            Box::pin(async move { Ok(Box::new(theirs) as _) })
        }
    }

    struct Polling {
        server: Rc<Server>,
        asks: mpsc::UnboundedSender<(Kind, Ask)>,
        events: mpsc::UnboundedReceiver<Event>,
    }

    impl Polling {
        fn start(kind: Kind, wanted: Wanted) -> Self {
            let server = Server::new();
            let (task, asks, events) = task(kind, server.clone());
            let source = ApiSource {
                protocol: Protocol::Rest,
                cluster: "xds".into(),
                authority: None,
                initial_metadata: vec![],
                set_node_on_first_message_only: false,
                rate_limit: None,
                refresh_delay: REFRESH,
                request_timeout: TIMEOUT,
            };
            tokio::task::spawn_local(run(Arc::new(source), task));
            asks.send((kind, Ask::Replace(wanted))).unwrap();
            Self { server, asks, events }
        }

        async fn update(&mut self) -> Update {
            match self.events.recv().await.unwrap() {
                Event::Update(update) => update,
                other => panic!("{other:?}"),
            }
        }

        async fn failure(&mut self) -> String {
            match self.events.recv().await.unwrap() {
                Event::Failed { reason, .. } => reason,
                other => panic!("{other:?}"),
            }
        }

        async fn connected(&mut self) {
            let event = self.events.recv().await.unwrap();
            assert!(matches!(event, Event::Connected { .. }), "{event:?}");
        }
    }

    fn run_local(test: impl Future<Output = ()>) {
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .start_paused(true) // waits take no time, and every time can be compared
            .build()
            .unwrap();
        tokio::task::LocalSet::new().block_on(&runtime, async {
            tokio::time::timeout(Duration::from_hours(1), test).await.expect("the test hangs");
        });
    }

    fn clusters(version: &str, names: &[&str]) -> Json {
        let cluster = |name: &&str| json!({"@type": Kind::Cluster.type_url(), "name": name});
        json!({"version_info": version, "resources": names.iter().map(cluster).collect::<Vec<_>>()})
    }

    fn reject() -> Verdict {
        Verdict::Reject { message: "no".into(), rejected: vec![], nothing_applied: true }
    }

    #[test]
    fn p51_requests_have_what_envoy_s_have() {
        run_local(async {
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            let poll = polling.server.poll().await;
            assert_eq!((poll.path.as_str(), poll.host.as_str()), ("/v3/discovery:clusters", "xds"));
            let node = json!({"id": "n", "cluster": "c"});
            assert_eq!(poll.body, json!({"node": node, "type_url": Kind::Cluster.type_url()}));
            poll.answer(200, clusters("7", &["a"]));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            let poll = polling.server.poll().await;
            assert_eq!(
                poll.body,
                json!({"version_info": "7", "node": node, "type_url": Kind::Cluster.type_url()})
            );
            assert_eq!(polling.server.dials.get(), 1, "the connection is kept");
        });
    }

    #[test]
    fn p52_only_a_good_200_applies_and_nothing_ends_the_polls() {
        run_local(async {
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            polling.server.poll().await.answer(304, "");
            for (status, body, expected) in [
                (
                    404,
                    "nothing here".to_owned(),
                    "xds/v3/discovery:clusters: HTTP status 404 Not Found: \"nothing here\"",
                ),
                (500, String::new(), "xds/v3/discovery:clusters: HTTP status 500 Internal Server Error"),
                (200, "{\n[".to_owned(), "xds/v3/discovery:clusters:2: "),
                (200, "[]".to_owned(), "expected a mapping of fields"),
                (200, clusters("1", &["a"]).to_string() + "x", "the end of the text"),
            ] {
                polling.server.poll().await.answer(status, body.as_str());
                let reason = polling.failure().await;
                assert!(reason.contains(expected), "{reason}");
            }
            let silent = polling.server.poll().await;
            assert!(polling.failure().await.contains("no response within the request_timeout of 1s"));
            drop(silent);
            polling.server.down.set(true);
            assert!(polling.failure().await.contains("no usable endpoint"));
            polling.server.down.set(false);
            let poll = polling.server.poll().await;
            assert_eq!(poll.body["version_info"], "1", "what was accepted still holds");
            poll.answer(304, "");
            polling.connected().await;
        });
    }

    #[test]
    fn p53_polls_are_refresh_delay_and_up_to_as_much_again_apart() {
        run_local(async {
            let polling = Polling::start(Kind::Cluster, wildcard());
            let mut last: Option<Instant> = None;
            let mut gaps = BTreeSet::new();
            for _ in 0..50 {
                let poll = polling.server.poll().await;
                // One request in flight: the wait starts when the answer is there.
                tokio::time::sleep(TIMEOUT / 2).await;
                if let Some(last) = last.replace(Instant::now()) {
                    gaps.insert(poll.at - last);
                }
                poll.answer(304, "");
            }
            let (first, last) = (*gaps.first().unwrap(), *gaps.last().unwrap());
            assert!(first >= REFRESH && last <= REFRESH * 2 + Duration::from_millis(2), "{first:?} {last:?}");
            assert!(last > first + REFRESH / 4, "no jitter: {gaps:?}");
        });
    }

    #[test]
    fn p54_a_rejected_response_keeps_the_old_version() {
        run_local(async {
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            for _ in 0..2 {
                let poll = polling.server.poll().await;
                assert_eq!(poll.body["version_info"], "1");
                assert!(poll.body.get("error_detail").is_none() && poll.body.get("response_nonce").is_none());
                poll.answer(200, clusters("2", &["b"]));
                polling.update().await.verdict.send(reject()).unwrap();
            }
            // What the client itself throws away counts as rejected.
            let poll = polling.server.poll().await;
            assert_eq!(poll.body["version_info"], "1");
            poll.answer(200, clusters("3", &["b", "b"]));
            let event = polling.events.recv().await.unwrap();
            let Event::Rejected { version, reason, .. } = event else { panic!("{event:?}") };
            assert_eq!(
                (version.as_str(), reason.as_str()),
                ("3", "xds/v3/discovery:clusters: \"b\" comes twice")
            );
            // A resource that can't be read makes it a rejection, whatever the store says of the others.
            let mut mixed = clusters("4", &["a"]);
            mixed["resources"].as_array_mut().unwrap().push(json!({"@type": "x/y.Z", "name": "z"}));
            let poll = polling.server.poll().await;
            poll.answer(200, mixed);
            let update = polling.update().await;
            let Change::State { resources, unreadable, .. } = &update.change else { panic!() };
            assert_eq!((names(resources), unreadable.len()), (vec!["a".into()], 1));
            update.verdict.send(Verdict::Accept).unwrap();
            assert_eq!(polling.server.poll().await.body["version_info"], "1");
        });
    }

    #[test]
    fn what_is_there_already_is_not_delivered_again() {
        run_local(async {
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            polling.connected().await;
            let slow = polling.update().await;
            // The store takes its time: polls go on, and the same content is not given to it twice.
            let poll = polling.server.poll().await;
            assert!(poll.body.get("version_info").is_none());
            poll.answer(200, clusters("1", &["a"]));
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            slow.verdict.send(Verdict::Accept).unwrap();
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            // Other content under the same version is (point 7).
            polling.server.poll().await.answer(200, clusters("1", &["b"]));
            let update = polling.update().await;
            let Change::State { resources, .. } = &update.change else { panic!() };
            assert_eq!(names(resources), ["b"]);
        });
    }

    #[test]
    fn p16_more_names_are_asked_for_soon_and_without_a_version() {
        run_local(async {
            let endpoints = |version: &str| json!({"version_info": version, "resources": [{"@type": Kind::ClusterLoadAssignment.type_url(), "cluster_name": "a"}]});
            let names = |list: &[&str]| Wanted {
                wildcard: false,
                names: list.iter().map(|&name| name.into()).collect(),
            };
            let kind = Kind::ClusterLoadAssignment;
            let mut polling = Polling::start(kind, names(&["a"]));
            let poll = polling.server.poll().await;
            assert_eq!(poll.body["resource_names"], json!(["a"]));
            poll.answer(200, endpoints("1"));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            let before = Instant::now();
            polling.asks.send((kind, Ask::Add("b".into()))).unwrap();
            polling.asks.send((kind, Ask::Add("c".into()))).unwrap();
            let poll = polling.server.poll().await;
            assert!(poll.at - before < REFRESH / 10, "{:?}", poll.at - before);
            assert_eq!(poll.body["resource_names"], json!(["a", "b", "c"]));
            assert!(poll.body.get("version_info").is_none());
            // The same content: of the new names it is news.
            poll.answer(200, endpoints("1"));
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            // Fewer names are not worth a poll.
            let before = Instant::now();
            polling.asks.send((kind, Ask::Remove("b".into()))).unwrap();
            let poll = polling.server.poll().await;
            assert!(poll.at - before >= REFRESH / 2);
            assert_eq!(
                (&poll.body["resource_names"], &poll.body["version_info"]),
                (&json!(["a", "c"]), &json!("1"))
            );
            poll.answer(304, "");
            polling.asks.send((kind, Ask::Replace(Wanted::default()))).unwrap();
            polling.asks.closed().await;
        });
    }

    #[test]
    fn a_connection_that_was_closed_meanwhile_is_no_failure() {
        run_local(async {
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            polling.server.poll().await.answer(200, clusters("1", &["a"]));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            polling.server.cut();
            polling.server.poll().await.answer(200, clusters("2", &["a"]));
            polling.update().await;
            assert_eq!(polling.server.dials.get(), 2);
        });
    }

    #[test]
    fn p49_resources_end_with_their_time_to_live() {
        run_local(async {
            let wrapped = |version: &str, resource: Json| {
                let mut wrapper = json!({
                    "@type": "type.googleapis.com/envoy.service.discovery.v3.Resource", "name": "a", "ttl": "25s"});
                if !resource.is_null() {
                    wrapper["resource"] = resource;
                }
                json!({"version_info": version, "resources": [wrapper]})
            };
            let mut polling = Polling::start(Kind::Cluster, wildcard());
            let cluster = json!({"@type": Kind::Cluster.type_url(), "name": "a"});
            polling.server.poll().await.answer(200, wrapped("1", cluster));
            polling.connected().await;
            polling.update().await.verdict.send(Verdict::Accept).unwrap();
            // Heartbeats keep it.
            let mut last = Instant::now();
            for _ in 0..5 {
                polling.server.poll().await.answer(200, wrapped("1", Json::Null));
                last = Instant::now();
                let update = polling.update().await;
                let Change::State { unchanged, .. } = &update.change else { panic!("{update:?}") };
                assert_eq!(unchanged[..], ["a".into()]);
                update.verdict.send(Verdict::Accept).unwrap();
            }
            // A 304 is none.
            let server = Rc::clone(&polling.server);
            let update = loop {
                tokio::select! {
                    poll = server.poll() => poll.answer(304, ""),
                    update = polling.update() => break update,
                }
            };
            let Change::Expired(names) = update.change else { panic!() };
            assert_eq!(names, ["a".into()]);
            let after = Instant::now() - last;
            assert!(after >= Duration::from_secs(25) && after < Duration::from_secs(26), "{after:?}");
            assert!(polling.server.poll().await.body.get("version_info").is_none());
        });
    }

    #[test]
    fn p55_virtual_hosts_have_no_rest() {
        run_local(async {
            let mut polling = Polling::start(Kind::VirtualHost, wildcard());
            assert!(polling.failure().await.contains("use api_type DELTA_GRPC"));
        });
    }
}
