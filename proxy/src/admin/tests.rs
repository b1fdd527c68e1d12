use std::sync::Mutex;

use serde_json::json;
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use super::*;
use crate::addr::EndpointAddr;

/// A process as the admin server sees it; notes what it was told to do.
#[derive(Default)]
struct Process {
    calls: Mutex<Vec<String>>,
    unhealthy: Mutex<bool>,
    levels: Mutex<Vec<(String, String)>>,
    refreshed: Mutex<usize>,
}

impl Process {
    fn note(&self, call: impl Into<String>) {
        self.calls.lock().unwrap().push(call.into());
    }
}

impl State for Process {
    fn refresh(&self) -> Refresh {
        *self.refreshed.lock().unwrap() += 1;
        Box::pin(async {})
    }

    fn server_state(&self) -> ServerState {
        if *self.unhealthy.lock().unwrap() { ServerState::Draining } else { ServerState::Live }
    }

    fn server_info(&self) -> ServerInfo {
        use clap::Parser;
        let args = crate::args::Args::parse_from(["tidegate", "-c", "x.yaml", "--concurrency", "2"]);
        ServerInfo {
            version: "0/0.1.0/Clean/DEBUG/none".into(),
            uptime: Duration::from_secs(3),
            command_line_options: command_line_options(&args.serve),
            node: json!({"id": "", "cluster": ""}),
        }
    }

    fn clusters(&self) -> Vec<ClusterView> {
        let cluster = |name: &str| ClusterView {
            name: name.into(),
            observability_name: name.into(),
            hosts: vec![HostView::new(EndpointAddr::Ip("127.0.0.1:15911".parse().unwrap()))],
            ..ClusterView::default()
        };
        vec![cluster("foo"), cluster("bar")]
    }

    fn listeners(&self) -> Vec<ListenerView> {
        vec![ListenerView {
            name: "l".into(),
            addresses: vec!["127.0.0.1:1".parse().unwrap()],
            data_path: None,
        }]
    }

    fn certificates(&self) -> Vec<CertificatesView> {
        Vec::new()
    }

    fn config_dump(&self, include_eds: bool) -> Value {
        json!({"configs": [{"@type": "T", "static_clusters": [{"cluster": {"name": "foo", "eds": include_eds}}]}]})
    }

    fn init_dump(&self) -> Value {
        json!({})
    }

    fn log_levels(&self) -> Vec<(String, String)> {
        self.levels.lock().unwrap().clone()
    }

    fn set_log_level(&self, logger: Option<&str>, level: &str) -> Result<(), String> {
        if logger == Some("nosuch") {
            return Err("unknown logger name".into());
        }
        self.levels.lock().unwrap().push((logger.unwrap_or("all").into(), level.into()));
        Ok(())
    }

    fn drain_listeners(&self, drain: Drain) {
        self.note(format!("{drain:?}"));
    }

    fn set_healthy(&self, healthy: bool) {
        *self.unhealthy.lock().unwrap() = !healthy;
    }

    fn reopen_logs(&self) {
        self.note("reopen");
    }

    fn quit(&self) {
        self.note("quit");
    }
}

/// An admin server on loopback, and a client of it.
struct Fixture {
    address: SocketAddr,
    process: Arc<Process>,
    stats: Arc<Stats>,
}

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Fixture {
    async fn start() -> Self {
        let admin = Admin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap();
        let address = admin.address();
        let process = Arc::new(Process::default());
        let stats = Stats::new(2);
        tokio::spawn(admin.serve(Arc::clone(&process) as Arc<dyn State>, Arc::clone(&stats)));
        Self { address, process, stats }
    }

    async fn send(&self, method: &str, path: &str) -> Reply {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut reply = Vec::new();
        stream.read_to_end(&mut reply).await.unwrap();
        let reply = String::from_utf8(reply).unwrap();
        let (head, body) = reply.split_once("\r\n\r\n").unwrap();
        let status = head.split(' ').nth(1).unwrap().parse().unwrap();
        let body = if head.contains("chunked") { dechunked(body) } else { body.to_owned() };
        Reply { status, head: head.to_owned(), body }
    }

    async fn get(&self, path: &str) -> Reply {
        self.send("GET", path).await
    }

    async fn json(&self, path: &str) -> Value {
        let reply = self.get(path).await;
        assert_eq!(reply.status, 200, "{path}: {}", reply.body);
        assert!(reply.head.contains("content-type: application/json"), "{path}: {}", reply.head);
        serde_json::from_str(&reply.body).unwrap()
    }
}

fn dechunked(mut body: &str) -> String {
    let mut out = String::new();
    while let Some((size, rest)) = body.split_once("\r\n") {
        let size = usize::from_str_radix(size, 16).unwrap();
        out.push_str(&rest[..size]);
        body = &rest[size + 2..];
    }
    out
}

/// Runs on the kind of runtime that the main thread has.
fn on_main_runtime(test: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
        tokio::time::timeout(Duration::from_mins(1), test).await.unwrap();
    });
}

#[test]
fn ready_follows_the_state() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let ready = admin.get("/ready").await;
        assert_eq!((ready.status, ready.body.as_str()), (200, "LIVE\n"));
        for header in
            ["content-type: text/plain; charset=UTF-8", "cache-control: no-cache, max-age=0", "nosniff"]
        {
            assert!(ready.head.contains(header), "{}", ready.head);
        }
        assert_eq!(admin.send("POST", "/healthcheck/fail").await.body, "OK\n");
        let ready = admin.get("/ready").await;
        assert_eq!((ready.status, ready.body.as_str()), (503, "DRAINING\n"));
        assert_eq!(admin.json("/server_info").await["state"], "DRAINING");
        assert_eq!(admin.get("/stats?filter=server.state").await.body, "server.state: 1\n");
        admin.send("POST", "/healthcheck/ok").await;
        assert_eq!(admin.send("POST", "/ready").await.body, "LIVE\n");
        let head = admin.send("HEAD", "/ready").await;
        assert_eq!((head.status, head.body.as_str()), (200, ""));
    });
}

#[test]
fn what_counts_is_refreshed_first() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        for path in
            ["/stats", "/stats?format=json", "/stats/prometheus", "/clusters", "/clusters?format=json"]
        {
            let before = *admin.process.refreshed.lock().unwrap();
            admin.get(path).await;
            assert_eq!(*admin.process.refreshed.lock().unwrap(), before + 1, "{path}");
        }
        admin.get("/ready").await;
        assert_eq!(*admin.process.refreshed.lock().unwrap(), 5);
    });
}

#[test]
fn what_changes_state_needs_post() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        for path in [
            "/drain_listeners",
            "/healthcheck/fail",
            "/healthcheck/ok",
            "/quitquitquit",
            "/reopen_logs",
            "/reset_counters",
            "/logging?level=debug",
        ] {
            let reply = admin.get(path).await;
            assert_eq!(reply.status, 405, "{path}");
            assert_eq!(reply.body, "Method GET not allowed, POST required.");
        }
        let reply = admin.send("DELETE", "/quitquitquit").await;
        assert_eq!(reply.body, "Method DELETE not allowed, POST required.");
        assert!(admin.process.calls.lock().unwrap().is_empty());
        assert!(admin.process.log_levels().is_empty());

        for path in ["/quitquitquit", "/reopen_logs", "/drain_listeners?inboundonly&graceful"] {
            let reply = admin.send("POST", path).await;
            assert_eq!((reply.status, reply.body.as_str()), (200, "OK\n"), "{path}");
        }
        let drain = Drain { inbound_only: true, graceful: true, skip_exit: false };
        assert_eq!(*admin.process.calls.lock().unwrap(), ["quit", "reopen", &format!("{drain:?}")]);
    });
}

#[test]
fn unknown_paths_get_the_list() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let help = admin.get("/help").await;
        assert!(help.body.starts_with("admin commands are:\n  /: Admin home page\n"), "{}", help.body);
        for path in ["/nosuch", "/ready/", "/stats/"] {
            let reply = admin.get(path).await;
            assert_eq!(reply.status, 404);
            assert_eq!(reply.body, help.body.replacen("admin commands", "invalid path. admin commands", 1));
        }
        let home = admin.get("/").await;
        assert!(home.head.contains("content-type: text/html; charset=UTF-8"));
        assert!(home.body.contains("/quitquitquit"));
        // Every path of ours is one of Envoy's, and changes state only if Envoy's does.
        let envoy = include_str!("testdata/envoy_help.txt");
        for line in help.body.lines().filter(|line| line.starts_with("  /")) {
            let path = line.split(':').next().unwrap();
            let known = envoy.lines().any(|line| line.starts_with(&format!("{path}:")));
            // Envoy wants POST even to show the levels.
            assert!(known || path == "  /logging", "{path}");
        }
    });
}

#[test]
fn clusters_listeners_and_config_dump() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let text = admin.get("/clusters?filter=fo%6F").await.body;
        assert!(text.starts_with("foo::observability_name::foo\n") && !text.contains("bar::"), "{text}");
        assert_eq!(admin.get("/clusters?filter=((").await.status, 400);
        assert_eq!(admin.json("/clusters?format=json").await["cluster_statuses"][1]["name"], "bar");
        assert_eq!(admin.get("/listeners").await.body, "l::127.0.0.1:1\n");
        assert_eq!(admin.json("/listeners?format=json").await["listener_statuses"][0]["name"], "l");
        let dump = admin.json("/config_dump?include_eds").await;
        assert_eq!(dump["configs"][0]["static_clusters"][0]["cluster"]["eds"], true);
        let masked = admin.json("/config_dump?resource=static_clusters&mask=cluster.name").await;
        assert_eq!(masked["configs"][0]["cluster"], json!({"name": "foo"}));
        assert_eq!(admin.get("/config_dump?resource=nosuch").await.status, 404);
        assert_eq!(admin.get("/config_dump?name_regex=((").await.status, 400);
    });
}

#[test]
fn server_info_has_envoys_fields() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let ours = admin.json("/server_info").await;
        let envoys: Value = serde_json::from_str(include_str!("testdata/envoy_server_info.json")).unwrap();
        let keys = |value: &Value| value.as_object().unwrap().keys().cloned().collect::<Vec<_>>();
        assert_eq!(keys(&ours), keys(&envoys));
        assert_eq!(keys(&ours["command_line_options"]), keys(&envoys["command_line_options"]));
        assert_eq!(ours["command_line_options"]["concurrency"], 2);
        assert_eq!(ours["uptime_current_epoch"], "3s");
        for path in ["/certs", "/memory", "/init_dump", "/runtime"] {
            assert!(admin.json(path).await.is_object(), "{path}");
        }
        assert_eq!(admin.get("/hot_restart_version").await.body, "disabled");
    });
}

#[test]
fn logging_shows_and_changes() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        assert_eq!(admin.get("/logging").await.body, "active loggers:\n\n");
        let reply = admin.send("POST", "/logging?level=debug").await;
        assert_eq!(reply.body, "active loggers:\n  all: debug\n\n");
        admin.send("POST", "/logging?paths=pump:trace,xds:off").await;
        assert_eq!(admin.process.log_levels().len(), 3);
        for (query, reason) in [
            ("level=loud", "unknown logger level"),
            ("foo=bar", "unknown logger level"),
            ("paths=nosuch:debug", "unknown logger name"),
            ("paths=pump:info,xds:loud", "unknown logger level"),
        ] {
            let reply = admin.send("POST", &format!("/logging?{query}")).await;
            assert_eq!(reply.status, 400, "{query}");
            let expected =
                format!("error: {reason}\n\nusage: /logging?<name>=<level> (change single level)\n");
            assert!(reply.body.starts_with(&expected), "{}", reply.body);
        }
        assert_eq!(admin.process.log_levels().len(), 3, "a wrong request changes nothing");
    });
}

/// Names that Envoy has and that mean nothing here.
fn not_ours(name: &str) -> bool {
    name.contains("watchdog") || name.contains("upstream_rq_per_cx") || name.contains("days_until_first_cert")
}

#[test]
fn stats_have_envoys_names() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let _cluster = admin.stats.cluster("foo");
        let _tcp = admin.stats.tcp_proxy("foo");
        let _listener = admin.stats.listener("127.0.0.1:15910".parse().unwrap(), None);
        let ours = admin.get("/stats").await.body;
        let names = |text: &str| {
            text.lines().map(|line| line.split(": ").next().unwrap().to_owned()).collect::<Vec<_>>()
        };
        let ours = names(&ours);
        let envoys = include_str!("testdata/envoy_stats.txt");
        let missing: Vec<_> =
            names(envoys).into_iter().filter(|name| !not_ours(name) && !ours.contains(name)).collect();
        assert!(missing.is_empty(), "{missing:#?}");
    });
}

#[test]
fn prometheus_has_envoys_names_types_and_labels() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let _cluster = admin.stats.cluster("foo");
        let _tcp = admin.stats.tcp_proxy("foo");
        let _listener = admin.stats.listener("127.0.0.1:15910".parse().unwrap(), None);
        let reply = admin.get("/stats/prometheus").await;
        assert!(reply.head.contains("content-type: text/plain"));
        // Without the values. The exporter leaves out empty braces.
        let series = |text: &str| -> Vec<String> {
            let one = |line: &str| match line.strip_prefix("# ") {
                Some(comment) => comment.to_owned(),
                None => line.rsplit_once(' ').map_or(line, |(series, _)| series).replace("{}", ""),
            };
            text.lines().map(one).collect()
        };
        let ours = series(&reply.body);
        let envoys: Vec<String> = include_str!("testdata/envoy_prometheus.txt")
            .lines()
            .map(|line| line.trim_start_matches("# ").replace("{}", ""))
            .collect();
        assert!(envoys.len() > 350);
        let missing: Vec<_> =
            envoys.into_iter().filter(|line| !not_ours(line) && !ours.contains(line)).collect();
        assert!(missing.is_empty(), "{missing:#?}");
        assert_eq!(
            admin.get("/stats?format=prometheus&filter=cluster.foo.membership_total").await.body,
            "# TYPE envoy_cluster_membership_total gauge\n\
             envoy_cluster_membership_total{envoy_cluster_name=\"foo\"} 0\n"
        );
    });
}

#[test]
fn wrong_stats_parameters_and_reset() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        for query in ["type=bogus", "format=bogus", "filter=((", "histogram_buckets=bogus"] {
            assert_eq!(admin.get(&format!("/stats?{query}")).await.status, 400, "{query}");
        }
        let cluster = admin.stats.cluster("foo");
        cluster.upstream_cx_total().add(4);
        let total = "/stats?usedonly&filter=foo.upstream_cx_total&format=json";
        assert_eq!(
            admin.json(total).await,
            json!({"stats": [{"name": "cluster.foo.upstream_cx_total", "value": 4}]})
        );
        assert_eq!(admin.send("POST", "/reset_counters").await.body, "OK\n");
        assert_eq!(admin.json(total).await, json!({"stats": []}));
    });
}

/// 2,000 clusters: some 15 MB. A client that does not read holds nobody up, and does not fill memory.
#[test]
fn long_answers_stream_and_a_stalled_client_blocks_nobody() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let keep: Vec<_> = (0..2000).map(|n| admin.stats.cluster(&format!("cluster-{n:05}"))).collect();
        let mut stalled = TcpStream::connect(admin.address).await.unwrap();
        stalled.write_all(b"GET /stats HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
        assert_eq!(admin.get("/ready").await.body, "LIVE\n");
        let all = admin.get("/stats").await.body;
        let totals = all.lines().filter(|line| line.ends_with(".upstream_cx_total: 0")).count();
        assert_eq!(totals, keep.len());
        drop(stalled);
    });
}

#[test]
fn heads_are_bounded() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let mut stream = TcpStream::connect(admin.address).await.unwrap();
        let long = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "x".repeat(1 << 20));
        // It may be refused before all of it is written.
        let _ = stream.write_all(long.as_bytes()).await;
        let mut reply = Vec::new();
        let _ = stream.read_to_end(&mut reply).await;
        let reply = String::from_utf8_lossy(&reply);
        assert!(reply.is_empty() || reply.starts_with("HTTP/1.1 4"), "{reply}");
        assert_eq!(admin.get("/ready").await.status, 200);
    });
}

/// The time-out itself, on a pipe that nobody reads.
#[test]
fn a_write_that_stalls_fails() {
    on_main_runtime(async {
        let (ours, _theirs) = tokio::io::duplex(16);
        let mut stream = io::Stalling::new(ours, Duration::from_millis(20));
        let error = stream.write_all(&[0; 1000]).await.unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::TimedOut);
    });
}

#[test]
fn an_address_in_use_is_a_clear_error() {
    on_main_runtime(async {
        let admin = Fixture::start().await;
        let error = Admin::bind(admin.address).await.unwrap_err().to_string();
        assert!(error.contains(&admin.address.to_string()) && error.contains("ss -ltnp"), "{error}");
    });
}

#[tokio::test]
async fn requests_are_logged_with_envoys_operators() {
    use crate::access_log::{AccessLogs, FlushSettings, Registry};
    use crate::config::access_log::{AccessLog, Format, Sink};

    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("admin.log");
    let format = "%REQ(:METHOD)% %REQ(X-ENVOY-ORIGINAL-PATH?:PATH)% %REQ(:PATH):4% %PROTOCOL% %RESPONSE_CODE% \
                  %BYTES_SENT% %REQ(USER-AGENT)% %REQ(X-MISSING)% %RESP(content-type)% %RESPONSE_CODE_DETAILS% \
                  %ACCESS_LOG_TYPE%\n";
    let log = AccessLog {
        sink: Sink::File(path.clone()),
        filter: None,
        format: Format::Text { format: format.into(), omit_empty_values: false },
    };
    let stats = Stats::new(1);
    let registry = Registry::start(&stats, FlushSettings::default()).unwrap();
    let logs = AccessLogs::open(&[log], &registry).unwrap();
    let process = Arc::new(Process::default());
    let admin = Admin::bind("127.0.0.1:0".parse().unwrap()).await.unwrap().access_log(logs);
    let address = admin.address();
    tokio::spawn(admin.serve(process as Arc<dyn State>, Arc::clone(&stats)));
    let mut answers = String::new();
    for path in ["/hot_restart_version?a=b", "/nope"] {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};
        let mut client = tokio::net::TcpStream::connect(address).await.unwrap();
        let request =
            format!("GET {path} HTTP/1.1\r\nHost: h\r\nUser-Agent: tester\r\nConnection: close\r\n\r\n");
        client.write_all(request.as_bytes()).await.unwrap();
        client.read_to_string(&mut answers).await.unwrap();
    }
    assert!(registry.flush(Duration::from_secs(10)));
    let written = std::fs::read_to_string(&path).unwrap();
    let lines: Vec<_> = written.lines().collect();
    let tail = "tester - text/plain; charset=UTF-8 admin_filter_response DownstreamEnd";
    assert_eq!(lines[0], format!("GET /hot_restart_version?a=b /hot HTTP/1.1 200 8 {tail}"));
    assert!(lines[1].starts_with("GET /nope /nop HTTP/1.1 404 "), "{written}");
    assert_eq!(stats.admin_listener().downstream_cx_total().value(), 2);
}
