//! The store, driven by what a client would tell it.

mod health;
mod secrets;
mod unchanged;

use std::collections::BTreeMap;
use std::rc::Rc;

use prost::Name;
use serde_json::{Value, json};
use tidegate_api::wkt::Any;
use tokio::sync::oneshot;

use super::*;
use crate::access_log::FlushSettings;
use crate::config;
use crate::config::config_source::PathSource;
use crate::xds::client::{Alpn, DialError, Dialer, Dialing, Settings};
use crate::xds::{Change, Resource, Unreadable, Update, Verdict};

/// No test dials.
struct Nowhere;

impl Dialer for Nowhere {
    fn dial<'a>(&'a self, cluster: &'a str, _: Alpn) -> Dialing<'a> {
        Box::pin(async move { Err(DialError::UnknownCluster(cluster.to_owned())) })
    }
}

/// A store whose control plane is the test. Its sources are files that nobody writes.
struct Fixture {
    store: Store,
    stats: Arc<Stats>,
    tables: Tables,
    changes: Vec<Changes>,
}

fn file(name: &str) -> Value {
    json!({ "path_config_source": { "path": format!("/nonexistent/tidegate/{name}") } })
}

fn source(name: &str) -> Source {
    let path = format!("/nonexistent/tidegate/{name}").into();
    Source::Path(Arc::new(PathSource { path, watched_directory: None }))
}

fn key(kind: Kind) -> Key {
    let name = match kind {
        Kind::Cluster => "cds",
        Kind::Listener => "lds",
        Kind::ClusterLoadAssignment => "eds",
        Kind::RouteConfiguration => "rds",
        Kind::VirtualHost | Kind::Secret => "other",
    };
    Key { source: source(name), kind }
}

/// A message of the API from JSON.
fn any<M: Name + Default>(value: &Value) -> Any {
    let text = config::proto::Source {
        name: "test".into(),
        text: value.to_string(),
        format: config::proto::Format::Json,
    };
    let parsed = config::proto::parse::<M>(&text, &config::proto::Options::default());
    let message = parsed.unwrap_or_else(|error| panic!("{error}")).message;
    Any { type_url: M::type_url(), value: message.encode_to_vec() }
}

fn cluster(name: &str, more: Value) -> Any {
    let mut value =
        json!({ "name": name, "type": "EDS", "eds_cluster_config": { "eds_config": file("eds") } });
    merge(&mut value, more);
    any::<tidegate_api::cluster::Cluster>(&value)
}

fn endpoints(cluster: &str, ports: &[u16]) -> Any {
    let endpoint = |port: &u16| json!({ "endpoint": { "address": socket("127.0.0.1", *port) } });
    let endpoints: Vec<_> = ports.iter().map(endpoint).collect();
    any::<tidegate_api::endpoint::ClusterLoadAssignment>(
        &json!({ "cluster_name": cluster, "endpoints": [{ "lb_endpoints": endpoints }] }),
    )
}

fn socket(address: &str, port: u16) -> Value {
    json!({ "socket_address": { "address": address, "port_value": port } })
}

fn tcp_proxy(cluster: &str) -> Value {
    json!({ "name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": "t", "cluster": cluster } })
}

fn http(rds: &str) -> Value {
    json!({ "name": "envoy.filters.network.http_connection_manager", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "h", "rds": { "route_config_name": rds, "config_source": file("rds") } } })
}

fn listener_json(name: &str, port: u16, filters: &[Value]) -> Value {
    let chains: Vec<_> = filters
        .iter()
        .enumerate()
        .map(|(index, filter)| {
            let matches = if index == 0 { json!({}) } else { json!({ "destination_port": index }) };
            json!({ "filter_chain_match": matches, "filters": [filter] })
        })
        .collect();
    json!({ "name": name, "bind_to_port": false, "address": socket("10.0.0.1", port), "filter_chains": chains })
}

fn listener(name: &str, port: u16, cluster: &str) -> Any {
    any::<tidegate_api::listener::Listener>(&listener_json(name, port, &[tcp_proxy(cluster)]))
}

fn routes(name: &str, cluster: &str) -> Any {
    any::<tidegate_api::route::RouteConfiguration>(&json!({ "name": name, "virtual_hosts": [{
        "name": "all", "domains": ["*"],
        "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster } }] }] }))
}

fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
}

fn resource(body: Any) -> Resource {
    Resource { name: None, version: String::new(), body, unknown_fields: Vec::new() }
}

impl Fixture {
    fn new(static_resources: &Value) -> Self {
        Self::with_cache(static_resources, None)
    }

    fn with_cache(static_resources: &Value, cache: Option<&std::path::Path>) -> Self {
        let bootstrap = json!({
            "static_resources": static_resources,
            "dynamic_resources": { "cds_config": file("cds"), "lds_config": file("lds") },
        });
        let text = config::proto::Source {
            name: "bootstrap".into(),
            text: bootstrap.to_string(),
            format: config::proto::Format::Json,
        };
        let sources = config::Sources { config_path: Some(text), config_yaml: None };
        let loaded =
            config::load(&sources, &config::static_options()).unwrap_or_else(|error| panic!("{error}"));
        let stats = Stats::new(1);
        let flush = FlushSettings { interval: Duration::from_secs(10), min_size: 65536 };
        let logs = access_log::Registry::start(&stats, flush).unwrap();
        // Nothing is subscribed to: the events come from the test.
        let (sender, events) = mpsc::unbounded_channel();
        let settings = Settings { node: tidegate_api::core::Node::default(), ads: None };
        let tables = Tables::default();
        let parts = Parts {
            stats: Arc::clone(&stats),
            logs,
            workers: 1,
            client: Client::new(settings, Rc::new(Nowhere), sender),
            events,
            tables: tables.clone(),
            mark_own: Arc::new(|_| Ok(())),
            unknown_fields: UnknownFields::Warn,
            cache: cache.map(|dir| Cache::open(dir, &tables).unwrap()),
        };
        let store = Store::new(&loaded.bootstrap, parts).unwrap();
        let mut fixture = Self { store, stats, tables, changes: Vec::new() };
        let changes = fixture.store.start(&loaded.bootstrap);
        fixture.changes.push(changes);
        fixture
    }

    fn change(&mut self, kind: Kind, change: Change) -> Verdict {
        let (verdict, mut answer) = oneshot::channel();
        let changes =
            self.store.handle(Happened::Event(Event::Update(Update { key: key(kind), change, verdict })));
        self.changes.push(changes);
        answer.try_recv().expect("every update is answered at once")
    }

    fn state(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> Verdict {
        let resources = resources.into_iter().map(resource).collect();
        let change = Change::State {
            version: version.into(),
            resources,
            unchanged: Vec::new(),
            unreadable: Vec::new(),
        };
        self.change(kind, change)
    }

    #[track_caller]
    fn accepted(&mut self, kind: Kind, resources: Vec<Any>) {
        let verdict = self.state(kind, "1", resources);
        assert!(matches!(verdict, Verdict::Accept), "{verdict:?}");
    }

    fn delta(&mut self, kind: Kind, resources: Vec<(&str, Any)>, removed: &[&str]) -> Verdict {
        let resources = resources
            .into_iter()
            .map(|(name, body)| Resource { name: Some(name.into()), version: "1".into(), ..resource(body) })
            .collect();
        let removed = removed.iter().map(|name| Arc::from(*name)).collect();
        self.change(kind, Change::Delta { version: "1".into(), resources, removed })
    }

    /// Cluster name to endpoint ports, of clusters in force.
    fn clusters(&self) -> BTreeMap<String, Vec<u16>> {
        let snapshot = self.store.snapshot(&[]);
        let ports = |cluster: &Arc<crate::cluster::Cluster>| {
            cluster.endpoints().iter().map(|endpoint| endpoint.address().ip().unwrap().port()).collect()
        };
        snapshot.clusters().map(|cluster| (cluster.name().to_string(), ports(cluster))).collect()
    }

    fn listeners(&self) -> Vec<String> {
        self.store.listeners().iter().map(|listener| listener.config.name.to_string()).collect()
    }

    fn listener(&self, name: &str) -> Arc<Listener> {
        let found = self.store.listeners().into_iter().find(|listener| &*listener.config.name == name);
        found.unwrap_or_else(|| panic!("no listener {name} among {:?}", self.listeners()))
    }

    /// Past start-up: nothing but what the test says.
    fn started(static_resources: &Value) -> Self {
        let mut fixture = Self::new(static_resources);
        fixture.accepted(Kind::Cluster, vec![]);
        fixture.accepted(Kind::Listener, vec![]);
        assert_eq!(fixture.store.phase(), Phase::Done);
        fixture
    }

    fn drained(&mut self) -> usize {
        let changes = std::mem::take(&mut self.changes);
        changes.iter().flat_map(|changes| &changes.draining).map(|draining| draining.chains.len()).sum()
    }
}

/// A store in which something wants one resource of each kind, for what fuzzing finds acceptable.
pub(crate) struct Ready {
    fixture: Fixture,
    /// How many changes were accepted.
    pub(crate) accepted: usize,
}

impl Ready {
    /// Must be called, and used, within [`local`].
    pub(crate) fn new() -> Self {
        Self { fixture: Fixture::started(&json!({})), accepted: 0 }
    }

    /// Applies a change to the same state each time, twice. What could reach beyond the process is left out: ports to
    /// bind, and files of access logs.
    pub(crate) fn apply(&mut self, kind: Kind, change: &[Resource], removed: Option<&[Arc<str>]>) {
        let Some(resources) = change.iter().map(|it| harmless(kind, it)).collect::<Option<Vec<_>>>() else {
            return;
        };
        let fixture = &mut self.fixture;
        fixture.state(Kind::Cluster, "0", vec![]);
        fixture.state(Kind::Listener, "0", vec![]);
        fixture.state(Kind::Cluster, "1", vec![cluster("a", json!({})), cluster("b", json!({}))]);
        fixture.add(secrets::secure("s", Some(secrets::tls())), 1);
        fixture.state(Kind::ClusterLoadAssignment, "1", vec![endpoints("a", &[1]), endpoints("b", &[2])]);
        let http = any::<tidegate_api::listener::Listener>(&listener_json("h", 80, &[http("r")]));
        fixture.state(Kind::Listener, "1", vec![http, listener("l", 81, "a")]);
        fixture.state(Kind::RouteConfiguration, "1", vec![routes("r", "a")]);
        let once = |fixture: &mut Fixture| {
            let resources = resources.clone();
            let change = match removed {
                Some(removed) => Change::Delta { version: "2".into(), resources, removed: removed.to_vec() },
                None => Change::State {
                    version: "2".into(),
                    resources,
                    unchanged: Vec::new(),
                    unreadable: Vec::new(),
                },
            };
            match fixture.change(kind, change) {
                Verdict::Accept => None,
                Verdict::Reject { message, .. } => Some(message),
            }
        };
        let first = once(fixture);
        assert_eq!(first, once(fixture), "the same again has another verdict");
        self.accepted += usize::from(first.is_none() && !resources.is_empty());
        assert!(first.is_none_or(|message| !message.is_empty()));
        let snapshot = fixture.store.snapshot(&[]);
        for cluster in snapshot.clusters() {
            cluster.hosts().priorities();
        }
        fixture.changes.clear();
    }
}

/// The resource without effect on anything but the store; none where that is not simple.
fn harmless(kind: Kind, resource: &Resource) -> Option<Resource> {
    use tidegate_api::listener::Listener;
    let value = &resource.body.value;
    if value.windows(10).any(|window| window == b"access_log") {
        return None;
    }
    if kind == Kind::Cluster {
        return Some(without_events(resource));
    }
    if kind != Kind::Listener {
        return Some(resource.clone());
    }
    // What can't be read is refused anyhow.
    let Ok(mut listener) = <Listener as prost::Message>::decode(&value[..]) else {
        return Some(resource.clone());
    };
    listener.bind_to_port = Some(false);
    let value = prost::Message::encode_to_vec(&listener);
    Some(Resource { body: Any { value, ..resource.body.clone() }, ..resource.clone() })
}

/// The same, but health checks write no files.
fn without_events(resource: &Resource) -> Resource {
    use tidegate_api::cluster::Cluster;
    let Ok(mut cluster) = <Cluster as prost::Message>::decode(&resource.body.value[..]) else {
        return resource.clone();
    };
    if cluster.health_checks.is_empty() {
        return resource.clone();
    }
    for check in &mut cluster.health_checks {
        #[expect(deprecated, reason = "it is what opens a file")]
        check.event_log_path.clear();
        check.event_logger.clear();
    }
    let value = prost::Message::encode_to_vec(&cluster);
    Resource { body: Any { value, ..resource.body.clone() }, ..resource.clone() }
}

pub(crate) fn local(test: impl FnOnce()) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    tokio::task::LocalSet::new().block_on(&runtime, async { test() });
}

fn rejected(verdict: &Verdict) -> (&str, Vec<&str>, bool) {
    match verdict {
        Verdict::Accept => panic!("accepted"),
        Verdict::Reject { message, rejected, nothing_applied } => {
            (message, rejected.iter().map(|name| &**name).collect(), *nothing_applied)
        }
    }
}

#[test]
fn p34_clusters_then_endpoints_then_listeners() {
    local(|| {
        let mut fixture = Fixture::new(&json!({}));
        assert_eq!(fixture.store.phase(), Phase::Clusters);
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        assert_eq!(fixture.store.phase(), Phase::Clusters, "a has no endpoints yet");
        assert_eq!(fixture.clusters(), BTreeMap::new());
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1, 2])]);
        assert_eq!(fixture.store.phase(), Phase::Listeners);
        assert_eq!(fixture.clusters(), BTreeMap::from([("a".into(), vec![1, 2])]));
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        assert_eq!((fixture.store.phase(), fixture.listeners()), (Phase::Done, vec!["l".to_owned()]));
    });
}

#[test]
fn p35_p36_silence_ends_start_up_and_late_endpoints_count() {
    local(|| {
        let mut fixture = Fixture::new(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        for Reverse((_, deadline)) in std::mem::take(&mut fixture.store.deadlines) {
            fixture.store.deadlines.push(Reverse((Instant::now(), deadline))); // as if its time had come
        }
        let changes = fixture.store.handle(Happened::Deadline);
        fixture.changes.push(changes);
        assert_eq!(fixture.clusters(), BTreeMap::from([("a".into(), vec![])]));
        assert_eq!(fixture.store.phase(), Phase::Listeners);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[7])]);
        assert_eq!(fixture.clusters()["a"], [7]);
    });
}

#[test]
fn p22_p23_what_a_state_lacks_is_gone_for_clusters_and_listeners_only() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({})), cluster("b", json!({}))]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("b", &[2])]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![]);
        assert_eq!(fixture.clusters(), BTreeMap::from([("a".into(), vec![1]), ("b".into(), vec![2])]));
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a"), listener("m", 81, "b")]);
        fixture.accepted(Kind::Listener, vec![listener("m", 81, "b")]);
        assert_eq!(fixture.listeners(), ["m"]);
        fixture.accepted(Kind::Cluster, vec![cluster("b", json!({}))]);
        assert_eq!(fixture.clusters().into_keys().collect::<Vec<_>>(), ["b"]);
        fixture.accepted(Kind::Listener, vec![]);
        fixture.accepted(Kind::Cluster, vec![]);
        assert!(fixture.listeners().is_empty() && fixture.clusters().is_empty());
        assert!(fixture.store.assignments.is_empty());
    });
}

#[test]
fn p24_p25_delta_removes_what_it_names() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.delta(
            Kind::Cluster,
            vec![("a", cluster("a", json!({}))), ("b", cluster("b", json!({})))],
            &[],
        );
        fixture.delta(
            Kind::ClusterLoadAssignment,
            vec![("a", endpoints("a", &[1])), ("b", endpoints("b", &[2]))],
            &[],
        );
        assert!(matches!(fixture.delta(Kind::Cluster, vec![], &["b", "nobody"]), Verdict::Accept));
        assert!(matches!(fixture.delta(Kind::ClusterLoadAssignment, vec![], &["a"]), Verdict::Accept));
        assert_eq!(fixture.clusters(), BTreeMap::from([("a".into(), vec![1])]));
    });
}

#[test]
fn p28_a_wrapper_with_another_name_is_refused() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let verdict = fixture.delta(Kind::Cluster, vec![("x", cluster("a", json!({})))], &[]);
        assert!(rejected(&verdict).2);
        assert!(rejected(&verdict).0.contains("the resource inside is named \"a\""));
    });
}

#[test]
fn p29_the_good_resources_of_a_response_are_applied() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Listener, vec![listener("gone", 1, "a"), listener("old", 2, "a")]);
        let mut filter = tcp_proxy("a");
        filter["typed_config"]["@type"] = json!("type.googleapis.com/stats.PluginConfig");
        filter["typed_config"] = json!({
            "@type": "type.googleapis.com/xds.type.v3.TypedStruct", "type_url": "type.googleapis.com/does.not.Exist" });
        filter["name"] = json!("x.unknown");
        let bad = any::<tidegate_api::listener::Listener>(&listener_json("old", 2, &[filter]));
        let verdict = fixture.state(Kind::Listener, "2", vec![bad, listener("good", 3, "a")]);
        let (message, names, nothing) = rejected(&verdict);
        assert_eq!((names, nothing), (vec!["old"], false));
        assert!(message.starts_with("Error adding/updating listener(s) old: "), "{message}");
        assert!(message.contains("Didn't find a registered implementation for 'x.unknown'"), "{message}");
        assert_eq!(fixture.listeners(), ["old", "good"], "the former version of the bad one stays");
        let tables = fixture.tables.lock();
        let record = &tables.kind(Kind::Listener).unwrap().records["old"];
        assert!(record.active.is_some() && record.error.is_some());
        assert_eq!(&*record.error.as_ref().unwrap().version, "2");
    });
}

#[test]
fn p30_a_broken_rule_of_the_api_spoils_the_response() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let zero = tidegate_api::cluster::Cluster {
            name: "zero".into(),
            connect_timeout: Some(tidegate_api::wkt::Duration { seconds: 0, nanos: 0 }),
            ..Default::default()
        };
        let zero =
            Any { type_url: Kind::Cluster.type_url().into(), value: prost::Message::encode_to_vec(&zero) };
        let verdict = fixture.state(Kind::Cluster, "1", vec![zero, cluster("good", json!({}))]);
        let (message, names, nothing) = rejected(&verdict);
        assert!(message.contains("zero: connect_timeout: must be greater than 0s"), "{message}");
        assert_eq!((names, nothing), (vec![], true));
        assert!(!fixture.store.clusters.contains("good"));
    });
}

#[test]
fn p09_p10_garbage_and_duplicates_spoil_the_response() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let garbage = Any { type_url: Kind::Cluster.type_url().into(), value: vec![0xff; 9] };
        assert!(rejected(&fixture.state(Kind::Cluster, "1", vec![garbage, cluster("a", json!({}))])).2);
        let verdict =
            fixture.state(Kind::Cluster, "1", vec![cluster("a", json!({})), cluster("a", json!({}))]);
        assert!(rejected(&verdict).0.contains("duplicate resource"), "{verdict:?}");
        assert!(!fixture.store.clusters.contains("a"));
    });
}

#[test]
fn a_resource_that_could_not_be_read_spoils_itself_only() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let change = Change::State {
            version: "1".into(),
            resources: vec![resource(cluster("a", json!({})))],
            unchanged: vec![],
            unreadable: vec![Unreadable { name: Some("b".into()), error: "cds.yaml:3: name: no".into() }],
        };
        let verdict = fixture.change(Kind::Cluster, change);
        assert_eq!(
            rejected(&verdict),
            ("Error adding/updating cluster(s) b: cds.yaml:3: name: no", vec!["b"], false)
        );
        assert!(fixture.store.clusters.contains("a"));
    });
}

#[test]
fn p33_unknown_fields_are_counted_and_ignored() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let mut unknown = cluster("a", json!({ "type": "STATIC" }));
        unknown.value.extend([0xfa, 0xff, 0x01, 0x01, 0x78]); // field 4095, length 1
        fixture.accepted(Kind::Cluster, vec![unknown]);
        assert_eq!(fixture.stats.server().dynamic_unknown_fields().value(), 1);
        assert!(fixture.clusters().contains_key("a"));
        fixture.store.unknown_fields = UnknownFields::Reject;
        let mut unknown = cluster("b", json!({ "type": "STATIC" }));
        unknown.value.extend([0xfa, 0xff, 0x01, 0x01, 0x78]);
        let verdict =
            fixture.state(Kind::Cluster, "2", vec![unknown, cluster("c", json!({ "type": "STATIC" }))]);
        assert!(rejected(&verdict).0.contains("b: CDS (unnamed): unknown field number 4095"), "{verdict:?}");
        assert!(fixture.clusters().contains_key("c") && !fixture.clusters().contains_key("b"));
    });
}

#[test]
fn p37_a_changed_cluster_serves_when_its_new_endpoints_are_there() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        let renamed = json!({ "eds_cluster_config": { "eds_config": file("eds"), "service_name": "svc" } });
        fixture.accepted(Kind::Cluster, vec![cluster("a", renamed)]);
        assert_eq!(fixture.clusters()["a"], [1], "the old one serves");
        assert_eq!(fixture.stats.cluster_manager().warming_clusters().value(), 1);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[3])]);
        assert_eq!(fixture.clusters()["a"], [3], "and follows its own endpoints meanwhile");
        assert_eq!(fixture.stats.cluster_manager().warming_clusters().value(), 1);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("svc", &[2])]);
        assert_eq!(fixture.clusters()["a"], [2]);
        assert_eq!(fixture.stats.cluster_manager().warming_clusters().value(), 0);
        // Endpoints that are known hold for a changed cluster at once.
        let slower = json!({ "connect_timeout": "9s", "eds_cluster_config": { "eds_config": file("eds"), "service_name": "svc" } });
        fixture.accepted(Kind::Cluster, vec![cluster("a", slower)]);
        assert_eq!(fixture.clusters()["a"], [2]);
        assert_eq!(fixture.store.assignments.len(), 1, "nobody wants the endpoints of the first version");
    });
}

#[test]
fn p39_a_listener_serves_when_its_routes_are_there() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let body = any::<tidegate_api::listener::Listener>(&listener_json("h", 80, &[http("r")]));
        fixture.accepted(Kind::Listener, vec![body]);
        assert!(fixture.listeners().is_empty());
        assert_eq!(
            fixture.store.unready(),
            [("listeners", vec!["h".to_owned()]), ("routes", vec!["r".to_owned()])]
        );
        fixture.accepted(Kind::RouteConfiguration, vec![routes("other", "x"), routes("r", "a")]);
        let listener = fixture.listener("h");
        let cluster = || {
            let crate::listener::Service::Http(http) = &listener.chains()[0].service else { panic!() };
            http.choose("10.0.0.1:80".parse().unwrap())
                .map(|(proxy, _)| format!("{:?}", proxy.config.clusters))
        };
        assert_eq!(cluster().unwrap(), "Single(\"a\")");
        fixture.changes.clear();
        fixture.accepted(Kind::RouteConfiguration, vec![routes("r", "b")]);
        assert_eq!(cluster().unwrap(), "Single(\"b\")", "the listener that serves has the new routes");
        assert!(fixture.changes.iter().all(Changes::is_empty), "and nothing was drained for it");
        fixture.accepted(Kind::Listener, vec![]);
        assert!(fixture.store.routes.waiting().next().is_none());
        assert!(!fixture.store.routes.wants(&source("rds"), &"r".into()));
    });
}

#[test]
fn a_listener_waits_for_its_cluster_that_is_coming_but_not_for_an_unknown_one() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a"), listener("m", 81, "nobody")]);
        assert_eq!(fixture.listeners(), ["m"]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[])]);
        assert_eq!(fixture.listeners(), ["l", "m"]);
    });
}

#[test]
fn p42_what_did_not_change_is_not_touched() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        let before = fixture.listener("l");
        fixture.changes.clear();
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        assert!(Arc::ptr_eq(&before, &fixture.listener("l")));
        assert!(fixture.changes.iter().all(Changes::is_empty));
    });
}

#[test]
fn filter_chains_are_compared_one_by_one() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let body = |filters: &[Value], more: Value| {
            let mut value = listener_json("l", 80, filters);
            merge(&mut value, more);
            any::<tidegate_api::listener::Listener>(&value)
        };
        fixture.accepted(Kind::Listener, vec![body(&[tcp_proxy("a"), tcp_proxy("b")], json!({}))]);
        let before = fixture.listener("l");
        fixture.changes.clear();
        // One chain changes, one is added.
        fixture.accepted(
            Kind::Listener,
            vec![body(&[tcp_proxy("a"), tcp_proxy("B"), tcp_proxy("c")], json!({}))],
        );
        let after = fixture.listener("l");
        assert!(Arc::ptr_eq(&before.chains()[0], &after.chains()[0]));
        assert_eq!(fixture.drained(), 1);
        assert_eq!(fixture.stats.listener_manager().listener_in_place_updated().value(), 1);
        // Something of the whole listener changes.
        fixture.accepted(
            Kind::Listener,
            vec![body(&[tcp_proxy("a"), tcp_proxy("B"), tcp_proxy("c")], json!({ "stat_prefix": "s" }))],
        );
        assert_eq!(fixture.drained(), 3);
        fixture.accepted(Kind::Listener, vec![]);
        assert_eq!(fixture.drained(), 3);
    });
}

#[test]
fn static_resources_are_not_for_control_planes_to_change() {
    local(|| {
        let mut fixture = Fixture::started(&json!({
            "clusters": [{ "name": "c", "type": "STATIC" }],
            "listeners": [listener_json("s", 70, &[tcp_proxy("c")])],
        }));
        fixture.accepted(Kind::Cluster, vec![cluster("c", json!({}))]);
        fixture.accepted(Kind::Listener, vec![listener("s", 71, "d")]);
        assert_eq!(fixture.listener("s").config.address().port(), 70);
        fixture.accepted(Kind::Cluster, vec![]);
        fixture.accepted(Kind::Listener, vec![]);
        assert_eq!((fixture.listeners(), fixture.clusters().len()), (vec!["s".to_owned()], 1));
    });
}

#[test]
fn no_two_listeners_have_one_address() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let verdict =
            fixture.state(Kind::Listener, "1", vec![listener("l", 80, "a"), listener("m", 80, "a")]);
        assert_eq!(
            rejected(&verdict).0,
            "Error adding/updating listener(s) m: has duplicate address '10.0.0.1:80' as existing listener 'l'"
        );
        // What is removed by the same response is out of the way.
        fixture.accepted(Kind::Listener, vec![listener("m", 80, "a")]);
        assert_eq!(fixture.listeners(), ["m"]);
        fixture.accepted(Kind::Listener, vec![listener("m", 81, "a")]);
        fixture.accepted(Kind::Listener, vec![listener("m", 81, "a"), listener("n", 80, "a")]);
        assert_eq!(fixture.listeners(), ["m", "n"]);
    });
}

#[test]
fn p49_what_expired_is_gone_but_endpoints_stay() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        fixture.change(Kind::ClusterLoadAssignment, Change::Expired(vec!["a".into()]));
        fixture.change(Kind::Listener, Change::Expired(vec!["l".into()]));
        assert_eq!((fixture.listeners().len(), fixture.clusters()["a"].clone()), (0, vec![1]));
        fixture.change(Kind::Cluster, Change::Expired(vec!["a".into()]));
        assert!(fixture.clusters().is_empty());
    });
}

#[test]
fn p19_endpoints_that_nobody_asked_for_are_ignored() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("nobody", &[1])]);
        assert!(fixture.store.assignments.is_empty());
        assert!(fixture.tables.lock().kind(Kind::ClusterLoadAssignment).unwrap().records.is_empty());
    });
}

#[test]
fn bad_endpoints_keep_the_good_ones() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        let named = any::<tidegate_api::endpoint::ClusterLoadAssignment>(
            &json!({ "cluster_name": "a", "endpoints": [
            { "lb_endpoints": [{ "endpoint": { "address": socket("foo.example", 80) } }] }] }),
        );
        let verdict = fixture.state(Kind::ClusterLoadAssignment, "2", vec![named]);
        assert!(rejected(&verdict).0.contains("malformed IP address: foo.example"), "{verdict:?}");
        assert_eq!(fixture.clusters()["a"], [1]);
    });
}

#[test]
fn without_a_control_plane_the_cache_serves_and_is_marked_stale() {
    local(|| {
        let dir = tempfile::tempdir().unwrap();
        let mut before = Fixture::with_cache(&json!({}), Some(dir.path()));
        before.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        before.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        let body = any::<tidegate_api::listener::Listener>(&listener_json("h", 80, &[http("r")]));
        before.accepted(Kind::Listener, vec![listener("l", 81, "a"), body]);
        before.accepted(Kind::RouteConfiguration, vec![routes("r", "a")]);
        before.store.finish();
        drop(before);

        let mut after = Fixture::with_cache(&json!({}), Some(dir.path()));
        let mut fail = |kind| {
            let failed = Event::Failed { keys: vec![key(kind)], reason: "refused".into() };
            after.store.handle(Happened::Event(failed));
        };
        fail(Kind::Cluster);
        fail(Kind::ClusterLoadAssignment);
        fail(Kind::Listener);
        fail(Kind::RouteConfiguration);
        assert_eq!(after.store.phase(), Phase::Done);
        assert_eq!(after.clusters(), BTreeMap::from([("a".into(), vec![1])]));
        assert_eq!(after.listeners(), ["h", "l"]);
        assert_eq!(after.tables.lock().stale(), 5);
        // The control plane is back, with less.
        after.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        after.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[2])]);
        after.accepted(Kind::Listener, vec![listener("l", 81, "a")]);
        assert_eq!((after.listeners(), after.clusters()["a"].clone()), (vec!["l".to_owned()], vec![2]));
        assert_eq!(after.tables.lock().stale(), 0);
    });
}

#[test]
fn a_first_response_that_is_thrown_away_does_not_hold_up_the_start() {
    local(|| {
        let mut fixture = Fixture::new(&json!({}));
        let garbage = Any { type_url: Kind::Cluster.type_url().into(), value: vec![0xff; 9] };
        assert!(rejected(&fixture.state(Kind::Cluster, "1", vec![garbage])).2);
        assert_eq!(fixture.store.phase(), Phase::Listeners);
        let event =
            Event::Rejected { key: key(Kind::Listener), version: "1".into(), reason: "other type".into() };
        fixture.store.handle(Happened::Event(event));
        assert_eq!(fixture.store.phase(), Phase::Done);
    });
}

#[test]
fn the_address_of_a_version_that_never_came_into_force_is_free_again() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let waiting = |port| any::<tidegate_api::listener::Listener>(&listener_json("h", port, &[http("r")]));
        fixture.accepted(Kind::Listener, vec![waiting(80)]);
        fixture.accepted(Kind::Listener, vec![waiting(81)]);
        assert!(fixture.listeners().is_empty());
        fixture.accepted(Kind::Listener, vec![waiting(81), listener("l", 80, "a")]);
        assert_eq!(fixture.listeners(), ["l"]);
    });
}

#[test]
fn endpoints_are_wanted_further_when_only_the_patience_changes() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[1])]);
        let mut config = file("eds");
        config["initial_fetch_timeout"] = json!("1s");
        let patient = json!({ "eds_cluster_config": { "eds_config": config } });
        fixture.accepted(Kind::Cluster, vec![cluster("a", patient)]);
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[2])]);
        assert_eq!(fixture.clusters()["a"], [2]);
    });
}
