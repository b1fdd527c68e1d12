//! Runs all cases against one proxy and notes what clients, upstreams, access logs and stats show.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::netns::Netns;
use tidegate_tests::proxy::{Engine, PATIENCE, Proxy, Setup};
use tidegate_tests::script::{Endpoint as Conversation, Transcript};
use tidegate_tests::upstream::Upstream;

use super::case::{Case, Client, Comparison, DROPPED, Endpoint, OUTSIDE, REDIRECTED};

/// Cases that run at the same time; each has its own listener, cluster and log.
const PARALLEL: usize = 6;

/// What one proxy did in one case: names of facts and their values.
pub(super) type Observation = BTreeMap<String, Value>;

/// Log fields of which only the presence is compared.
const PRESENCE: [&str; 5] = ["start", "duration", "connection", "upstream_connection", "upstream_local"];

/// Counters that are compared, below `tcp.<case>.`, `cluster.<case>.` and `listener.<address>.`.
const TCP_STATS: [&str; 8] = [
    "downstream_cx_total",
    "downstream_cx_no_route",
    "downstream_cx_rx_bytes_total",
    "downstream_cx_tx_bytes_total",
    "idle_timeout",
    "max_downstream_connection_duration",
    "upstream_flush_total",
    "upstream_flush_active",
];
const CLUSTER_STATS: [&str; 14] = [
    "bind_errors",
    "upstream_cx_total",
    "upstream_cx_active",
    "upstream_cx_connect_fail",
    "upstream_cx_connect_timeout",
    "upstream_cx_connect_attempts_exceeded",
    "upstream_cx_overflow",
    "upstream_cx_none_healthy",
    "upstream_cx_rx_bytes_total",
    "upstream_cx_tx_bytes_total",
    "upstream_rq_pending_overflow",
    "membership_total",
    "membership_healthy",
    "lb_healthy_panic",
];
const LISTENER_STATS: [&str; 6] = [
    "downstream_cx_total",
    "downstream_cx_active",
    "downstream_cx_overflow",
    "downstream_pre_cx_timeout",
    "downstream_listener_filter_remote_close",
    "no_filter_chain_match",
];

/// Runs all cases against `engine`.
pub(super) fn run(engine: Engine, cases: &[Case]) -> Result<Vec<Observation>> {
    let netns = namespace()?;
    let upstreams: Vec<Vec<Option<Upstream>>> = cases
        .iter()
        .enumerate()
        .map(|(number, case)| start_upstreams(&netns, case, number))
        .collect::<Result<_>>()?;
    let outside = Upstream::identify(Some(&netns), &format!("{OUTSIDE}:7777"), "outside")?;
    let outside_v6 = Upstream::identify(Some(&netns), "[fd00:9::9]:7777", "outside v6")?;
    let proxy = Setup::new(&config(cases)).engine(engine).concurrency(1).netns(&netns).start()?;
    let outcomes = netns.enter(|| drive(cases))?;
    settle(&proxy)?;
    let stats = stats(&proxy)?;
    let hosts = proxy.admin().read("/clusters").context("read /clusters")?.body;
    let observations = cases.iter().enumerate().map(|(number, case)| {
        let mut observation = Observation::new();
        note_clients(&mut observation, case, &outcomes[number]);
        note_upstreams(&mut observation, case, &upstreams[number]);
        let id = Case::id(number);
        note_log(&mut observation, case, "log", &proxy.file(&case.log_file(number)));
        note_log(&mut observation, case, "listener log", &proxy.file(&format!("{id}.listener.log")));
        note_stats(&mut observation, case, number, &stats);
        note_health(&mut observation, case, number, &stats, &hosts);
        observation
    });
    let observations = observations.collect();
    drop((outside, outside_v6));
    Ok(observations)
}

/// A namespace where service addresses are redirected for marked sockets and nothing leaves.
pub(super) fn namespace() -> Result<Netns> {
    let netns = Netns::new("parity")?;
    netns.ip(&format!(
        "addr add {OUTSIDE}/32 dev lo\naddr add {DROPPED}/32 dev lo\naddr add fd00:9::9/128 dev lo\n\
         route add 172.16.0.0/16 dev lo\nroute add fd00:172::/32 dev lo\n"
    ))?;
    netns.nft(&format!(
        "table inet parity {{
           chain redirected {{
             type nat hook output priority -100; policy accept;
             meta mark {REDIRECTED} meta l4proto tcp redirect to :15001
           }}
           chain dropped {{
             type filter hook output priority 0; policy accept;
             ip daddr {DROPPED} tcp flags & (syn | ack) == syn drop
           }}
         }}"
    ))?;
    Ok(netns)
}

fn start_upstreams(netns: &Netns, case: &Case, number: usize) -> Result<Vec<Option<Upstream>>> {
    let start = |(index, endpoint): (usize, &Endpoint)| match endpoint {
        Endpoint::Serves(steps) => {
            let (address, port) = case.endpoint_address(number, index);
            Upstream::start(Some(netns), &format!("{address}:{port}"), steps.clone()).map(Some)
        }
        Endpoint::Refuses | Endpoint::Drops => Ok(None),
    };
    case.endpoints.iter().enumerate().map(start).collect()
}

pub(super) fn config(cases: &[Case]) -> String {
    let numbered = || cases.iter().enumerate();
    let listeners: Vec<Value> = numbered().flat_map(|(number, case)| case.listeners(number)).collect();
    let clusters: Vec<Value> = numbered().flat_map(|(number, case)| case.clusters(number)).collect();
    let runtime: Map<String, Value> =
        cases.iter().filter_map(|case| case.runtime.as_object().cloned()).flatten().collect();
    let config = json!({
        "admin": {"address": super::case::socket_address("127.0.0.1", 0)},
        "layered_runtime": {"layers": [{"name": "static", "static_layer": runtime}]},
        "static_resources": {"listeners": listeners, "clusters": clusters},
    });
    serde_json::to_string_pretty(&config).unwrap_or_default()
}

/// Runs the clients of all cases, several cases at a time; must be called inside the namespace.
fn drive(cases: &[Case]) -> Vec<Vec<Outcome>> {
    let next = AtomicUsize::new(0);
    let mut done: Vec<(usize, Vec<Outcome>)> = std::thread::scope(|scope| {
        let workers: Vec<_> = (0..PARALLEL)
            .map(|_| {
                scope.spawn(|| {
                    let mut done = Vec::new();
                    loop {
                        let number = next.fetch_add(1, Ordering::Relaxed);
                        let Some(case) = cases.get(number) else { return done };
                        let listener = Case::listener_address(number);
                        let outcomes =
                            case.clients.iter().flat_map(|client| talk(client, &listener)).collect();
                        done.push((number, outcomes));
                    }
                })
            })
            .collect();
        workers.into_iter().flat_map(|worker| worker.join().unwrap_or_default()).collect()
    });
    done.sort_by_key(|(number, _)| *number);
    done.into_iter().map(|(_, outcomes)| outcomes).collect()
}

fn talk(client: &Client, listener: &str) -> Vec<Outcome> {
    std::thread::sleep(client.wait);
    let stream = match client.connect(listener).open() {
        Ok(socket) => socket.into(),
        Err(error) => return vec![Outcome::NotConnected(client::errno_name(&error))],
    };
    let mut conversation = Conversation::new(stream);
    let mut outcomes = Vec::new();
    let mut failed = false;
    let mut steps = |conversation: &mut Conversation, steps: &[tidegate_tests::script::Step]| {
        for step in steps.iter().filter(|_| !failed).collect::<Vec<_>>() {
            if let Err(error) = conversation.step(step) {
                conversation.failed(&error);
                failed = true;
                break;
            }
        }
    };
    steps(&mut conversation, &client.steps);
    if let Some(other) = &client.meanwhile {
        outcomes = talk(other, listener);
    }
    steps(&mut conversation, &client.then);
    outcomes.insert(0, Outcome::Connected(conversation.finish()));
    outcomes
}

/// Waits until no connection is left, so that every log line and counter is final.
pub(super) fn settle(proxy: &Proxy) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while Instant::now() < deadline {
        let stats = stats(proxy)?;
        let active: u64 = stats
            .iter()
            .filter(|(name, _)| {
                // This very request is one of the admin server's.
                !name.starts_with("http.admin.")
                    && !name.starts_with("listener.admin.")
                    && name.ends_with(".downstream_cx_active")
                    || name.ends_with(".upstream_flush_active")
            })
            .map(|(_, value)| value)
            .sum();
        if active == 0 {
            break;
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    // The access log is flushed every 50 ms.
    std::thread::sleep(Duration::from_millis(300));
    Ok(())
}

pub(super) fn stats(proxy: &Proxy) -> Result<BTreeMap<String, u64>> {
    let response = proxy.admin().read("/stats").context("read the stats")?;
    let parse = |line: &str| {
        let (name, value) = line.rsplit_once(": ")?;
        Some((name.to_owned(), value.parse().ok()?))
    };
    Ok(response.body.lines().filter_map(parse).collect())
}

fn note_clients(observation: &mut Observation, case: &Case, outcomes: &[Outcome]) {
    let mut seen: Vec<Value> = outcomes.iter().map(outcome).collect();
    if case.ignored.contains(&"end") {
        for client in &mut seen {
            // FIN or RST depends on whether data arrived before the close: only "closed" counts.
            if client["end"] != "TimedOut" {
                client["end"] = json!("closed");
            }
        }
    }
    match case.comparison {
        Comparison::InOrder => {}
        Comparison::Distinct | Comparison::DistinctRetries | Comparison::Shares => {
            seen.sort_by_key(ToString::to_string);
            seen.dedup();
        }
    }
    observation.insert("clients".into(), Value::Array(seen));
}

fn outcome(outcome: &Outcome) -> Value {
    match outcome {
        Outcome::NotConnected(errno) => json!({"not connected": errno}),
        Outcome::Connected(transcript) => transcript_value(transcript),
    }
}

fn transcript_value(transcript: &Transcript) -> Value {
    // The pattern is left to the digest.
    let head: String = transcript.text().chars().take(60).filter(char::is_ascii).collect();
    json!({
        "received": transcript.received,
        "sha256": transcript.sha256.get(..12),
        "head": head,
        "end": format!("{:?}", transcript.end),
    })
}

fn note_upstreams(observation: &mut Observation, case: &Case, upstreams: &[Option<Upstream>]) {
    for (index, upstream) in upstreams.iter().enumerate() {
        let Some(upstream) = upstream else { continue };
        let key = format!("endpoint {index}");
        if case.ignored.contains(&key.as_str()) {
            continue;
        }
        if case.comparison == Comparison::Shares {
            observation.insert(key, json!(upstream.accepted().len()));
            continue;
        }
        let mut served: Vec<Value> =
            upstream.ended().iter().map(|served| transcript_value(&served.transcript)).collect();
        if case.comparison != Comparison::InOrder {
            served.sort_by_key(ToString::to_string);
            served.dedup();
        }
        observation.insert(key, Value::Array(served));
    }
}

pub(super) fn note_log(observation: &mut Observation, case: &Case, key: &str, log: &str) {
    let mut lines: Vec<Value> = log
        .lines()
        .map(|line| match serde_json::from_str::<Map<String, Value>>(line) {
            Ok(mut fields) => {
                normalise(&mut fields, &case.ignored);
                Value::Object(fields)
            }
            Err(_) => json!({"text": line}),
        })
        .collect();
    match case.comparison {
        Comparison::InOrder | Comparison::Distinct => {}
        Comparison::DistinctRetries => lines.retain(|line| line["attempts"] == 2),
        Comparison::Shares => lines.clear(),
    }
    if case.comparison != Comparison::InOrder {
        lines.sort_by_key(ToString::to_string);
        lines.dedup();
    }
    // One fact per field makes differences readable.
    observation.insert(format!("{key}: lines"), json!(lines.len()));
    for (number, line) in lines.iter().enumerate() {
        for (field, value) in line.as_object().into_iter().flatten() {
            observation.insert(format!("{key}[{number}].{field}"), value.clone());
        }
    }
}

fn normalise(fields: &mut Map<String, Value>, ignored: &[&str]) {
    fields.retain(|name, _| !ignored.contains(&name.as_str()));
    for name in PRESENCE {
        if let Some(value) = fields.get_mut(name) {
            let absent = value.is_null() || *value == json!("-");
            *value = json!(if absent { "absent" } else { "present" });
        }
    }
}

pub(super) fn note_stats(
    observation: &mut Observation,
    case: &Case,
    number: usize,
    stats: &BTreeMap<String, u64>,
) {
    if matches!(case.comparison, Comparison::DistinctRetries) {
        return;
    }
    let id = Case::id(number);
    let listener = Case::listener_address(number).replace(':', "_");
    let groups: [(&str, String, &[&str]); 3] = [
        ("tcp", format!("tcp.{id}"), &TCP_STATS),
        ("cluster", format!("cluster.{id}"), &CLUSTER_STATS),
        ("listener", format!("listener.{listener}"), &LISTENER_STATS),
    ];
    for (group, prefix, names) in groups {
        for name in names.iter().filter(|name| !case.ignored.contains(name)) {
            let value = stats.get(&format!("{prefix}.{name}")).copied().unwrap_or_default();
            observation.insert(format!("{group}.{name}"), json!(value));
        }
    }
}

/// What outlier detection and health checks found, and what hashing tables have: their stats, and `/clusters`.
fn note_health(
    observation: &mut Observation,
    case: &Case,
    number: usize,
    stats: &BTreeMap<String, u64>,
    clusters: &str,
) {
    let id = Case::id(number);
    for (name, value) in stats {
        let Some(name) = name.strip_prefix(&format!("cluster.{id}.")) else { continue };
        let groups = ["outlier_detection.", "health_check.", "ring_hash_lb.", "maglev_lb."];
        if groups.iter().any(|group| name.starts_with(group)) && !case.ignored.contains(&name) {
            observation.insert(format!("cluster.{name}"), json!(value));
        }
    }
    for line in clusters.lines() {
        let Some(line) = line.strip_prefix(&format!("{id}::")) else { continue };
        if let Some((fact, value)) = line.rsplit_once("::")
            && ["::health_flags", "outlier::", "success_rate"].iter().any(|part| fact.contains(part))
            && !case.ignored.iter().any(|name| fact.rsplit("::").next() == Some(*name))
        {
            observation.insert(format!("/clusters {fact}"), json!(value));
        }
    }
}
