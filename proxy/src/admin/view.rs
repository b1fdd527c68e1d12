//! `/clusters` and `/listeners`: plain views of a snapshot, printed as Envoy prints them.

use std::fmt::Write;
use std::net::SocketAddr;
use std::sync::Arc;

use serde_json::{Map, Value, json};

use crate::addr::EndpointAddr;
use crate::config::endpoint::HealthStatus;

/// One cluster.
#[derive(Clone, Debug, Default)]
pub struct ClusterView {
    /// Its name.
    pub name: Arc<str>,
    /// `alt_stat_name`, else the name.
    pub observability_name: Arc<str>,
    /// Thresholds of priorities DEFAULT and HIGH.
    pub thresholds: [ThresholdsView; 2],
    /// It came from a control plane.
    pub added_via_api: bool,
    /// Outlier detection: average success rate and what is too far below it, in percent; for requests, then for errors
    /// that arose here. The inner ones are none when not enough was seen.
    pub outlier: Option<[Option<(f64, f64)>; 2]>,
    /// EDS service name; empty when it has none.
    pub eds_service_name: Arc<str>,
    /// Its hosts, by priority.
    pub hosts: Vec<HostView>,
}

/// Circuit breaker thresholds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ThresholdsView {
    /// Connections.
    pub max_connections: u32,
    /// Connections that are still connecting.
    pub max_pending_requests: u32,
    /// HTTP only; 1,024 unless configured.
    pub max_requests: u32,
    /// HTTP only; 3 unless configured.
    pub max_retries: u32,
}

impl Default for ThresholdsView {
    fn default() -> Self {
        Self { max_connections: 1024, max_pending_requests: 1024, max_requests: 1024, max_retries: 3 }
    }
}

/// What speaks against a host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HealthView {
    /// Active health checks fail.
    pub failed_active_health_check: bool,
    /// Ejected by outlier detection.
    pub failed_outlier_check: bool,
    /// Active health checks report it degraded.
    pub failed_active_degraded_check: bool,
    /// Not yet checked.
    pub pending_active_hc: bool,
    /// Gone from the control plane's list, kept because it is still healthy.
    pub pending_dynamic_removal: bool,
    /// The last active health check ran out of time.
    pub active_hc_timeout: bool,
    /// As the control plane sees it.
    pub eds_health_status: HealthStatus,
}

/// One host of a cluster.
#[derive(Clone, Debug)]
pub struct HostView {
    /// Its address.
    pub address: EndpointAddr,
    /// `hostname`; empty when it has none.
    pub hostname: Arc<str>,
    /// Connections open now.
    pub cx_active: u64,
    /// Connections that could not be made.
    pub cx_connect_fail: u64,
    /// Connections made or tried.
    pub cx_total: u64,
    /// TCP counts a connection as a request.
    pub rq_active: u64,
    /// HTTP only.
    pub rq_error: u64,
    /// Connects that wait.
    pub rq_pending_active: u64,
    /// HTTP only.
    pub rq_success: u64,
    /// Connects that timed out.
    pub rq_timeout: u64,
    /// Connections that carried a downstream.
    pub rq_total: u64,
    /// Its health.
    pub health: HealthView,
    /// Load balancing weight.
    pub weight: u32,
    /// Locality: region.
    pub region: Arc<str>,
    /// Locality: zone.
    pub zone: Arc<str>,
    /// Locality: sub-zone.
    pub sub_zone: Arc<str>,
    /// `canary` of its metadata.
    pub canary: bool,
    /// 0 is the highest.
    pub priority: u32,
    /// Percent, by outlier detection; none when not enough was seen.
    pub success_rate: Option<f64>,
    /// The same for errors that arose here.
    pub local_origin_success_rate: Option<f64>,
}

impl HostView {
    /// A host that nothing is known of but its address.
    pub fn new(address: EndpointAddr) -> Self {
        let empty: Arc<str> = "".into();
        Self {
            address,
            hostname: Arc::clone(&empty),
            cx_active: 0,
            cx_connect_fail: 0,
            cx_total: 0,
            rq_active: 0,
            rq_error: 0,
            rq_pending_active: 0,
            rq_success: 0,
            rq_timeout: 0,
            rq_total: 0,
            health: HealthView::default(),
            weight: 1,
            region: Arc::clone(&empty),
            zone: Arc::clone(&empty),
            sub_zone: empty,
            canary: false,
            priority: 0,
            success_rate: None,
            local_origin_success_rate: None,
        }
    }

    /// In the order in which JSON has them.
    fn counters(&self) -> [(&'static str, u64); 6] {
        [
            ("cx_connect_fail", self.cx_connect_fail),
            ("cx_total", self.cx_total),
            ("rq_error", self.rq_error),
            ("rq_success", self.rq_success),
            ("rq_timeout", self.rq_timeout),
            ("rq_total", self.rq_total),
        ]
    }

    fn gauges(&self) -> [(&'static str, u64); 3] {
        [
            ("cx_active", self.cx_active),
            ("rq_active", self.rq_active),
            ("rq_pending_active", self.rq_pending_active),
        ]
    }
}

impl HealthView {
    /// `healthy`, or what is wrong, each with a slash.
    fn flags(self) -> String {
        let down = matches!(self.eds_health_status, HealthStatus::Unhealthy | HealthStatus::Timeout);
        let flags: String = [
            (self.failed_active_health_check, "/failed_active_hc"),
            (self.failed_outlier_check, "/failed_outlier_check"),
            (down, "/failed_eds_health"),
            (self.failed_active_degraded_check, "/degraded_active_hc"),
            (self.eds_health_status == HealthStatus::Degraded, "/degraded_eds_health"),
            (self.pending_dynamic_removal, "/pending_dynamic_removal"),
            (self.pending_active_hc, "/pending_active_hc"),
            (self.active_hc_timeout, "/active_hc_timeout"),
            (self.eds_health_status == HealthStatus::Draining, "/eds_status_draining"),
        ]
        .into_iter()
        .filter_map(|(set, flag)| set.then_some(flag))
        .collect();
        if flags.is_empty() { "healthy".into() } else { flags }
    }

    fn json(self) -> Value {
        let mut health = Map::new();
        for (set, name) in [
            (self.failed_active_health_check, "failed_active_health_check"),
            (self.failed_outlier_check, "failed_outlier_check"),
            (self.failed_active_degraded_check, "failed_active_degraded_check"),
            (self.pending_dynamic_removal, "pending_dynamic_removal"),
            (self.pending_active_hc, "pending_active_hc"),
        ] {
            if set {
                health.insert(name.into(), true.into());
            }
        }
        let eds = match self.eds_health_status {
            // Envoy shows the status that it derived: what is not known is healthy.
            HealthStatus::Unknown | HealthStatus::Healthy => "HEALTHY",
            HealthStatus::Unhealthy => "UNHEALTHY",
            HealthStatus::Draining => "DRAINING",
            HealthStatus::Timeout => "TIMEOUT",
            HealthStatus::Degraded => "DEGRADED",
        };
        health.insert("eds_health_status".into(), eds.into());
        put(&mut health, "active_hc_timeout", self.active_hc_timeout, true);
        health.into()
    }
}

/// `/clusters`. Writing to a String can't fail.
pub(super) fn clusters_text(clusters: &[ClusterView]) -> String {
    let mut out = String::new();
    for cluster in clusters {
        let name = &cluster.name;
        let mut line = |text: String| {
            let _ = writeln!(out, "{name}::{text}");
        };
        line(format!("observability_name::{}", cluster.observability_name));
        let outlier =
            cluster.outlier.into_iter().flat_map(|rates| ["", "local_origin_"].into_iter().zip(rates));
        for (prefix, rates) in outlier {
            let (average, threshold) = rates.unwrap_or((-1.0, -1.0));
            line(format!("outlier::{prefix}success_rate_average::{}", significant(average)));
            line(format!("outlier::{prefix}success_rate_ejection_threshold::{}", significant(threshold)));
        }
        for (priority, thresholds) in ["default", "high"].into_iter().zip(cluster.thresholds) {
            for (field, value) in thresholds.fields() {
                line(format!("{priority}_priority::{field}::{value}"));
            }
        }
        line(format!("added_via_api::{}", cluster.added_via_api));
        if !cluster.eds_service_name.is_empty() {
            line(format!("eds_service_name::{}", cluster.eds_service_name));
        }
        for host in &cluster.hosts {
            let mut values = [host.counters().as_slice(), host.gauges().as_slice()].concat();
            values.sort_unstable();
            let mut line = |field: &str, value: &dyn std::fmt::Display| {
                let _ = writeln!(out, "{name}::{}::{field}::{value}", host.address);
            };
            for (field, value) in &values {
                line(field, value);
            }
            line("hostname", &host.hostname);
            line("health_flags", &host.health.flags());
            line("weight", &host.weight);
            line("region", &host.region);
            line("zone", &host.zone);
            line("sub_zone", &host.sub_zone);
            line("canary", &host.canary);
            line("priority", &host.priority);
            line("success_rate", &host.success_rate.unwrap_or(-1.0));
            line("local_origin_success_rate", &host.local_origin_success_rate.unwrap_or(-1.0));
        }
    }
    out
}

/// `/clusters?format=json`: proto JSON, so what has its default value is left out.
pub(super) fn clusters_json(clusters: &[ClusterView]) -> Value {
    if clusters.is_empty() {
        return json!({});
    }
    let clusters: Vec<Value> = clusters
        .iter()
        .map(|cluster| {
            let mut status = Map::new();
            status.insert("name".into(), json!(*cluster.name));
            put(&mut status, "added_via_api", cluster.added_via_api, true);
            let hosts: Vec<Value> = cluster.hosts.iter().map(host_json).collect();
            // A threshold that nobody can be below is not shown.
            let [threshold, local] = cluster
                .outlier
                .unwrap_or_default()
                .map(|rates| rates.map(|(_, threshold)| threshold).filter(|threshold| *threshold >= 0.0));
            let rate = |rate: Option<f64>| json!({"value": rate});
            put(&mut status, "success_rate_ejection_threshold", threshold.is_some(), rate(threshold));
            put(&mut status, "host_statuses", !hosts.is_empty(), hosts);
            put(&mut status, "local_origin_success_rate_ejection_threshold", local.is_some(), rate(local));
            status.insert("circuit_breakers".into(), thresholds_json(&cluster.thresholds));
            status.insert("observability_name".into(), json!(*cluster.observability_name));
            put(
                &mut status,
                "eds_service_name",
                !cluster.eds_service_name.is_empty(),
                &*cluster.eds_service_name,
            );
            status.into()
        })
        .collect();
    json!({"cluster_statuses": clusters})
}

/// As `%g`: six digits.
fn significant(value: f64) -> f64 {
    format!("{value:.5e}").parse().unwrap_or(value)
}

fn put(object: &mut Map<String, Value>, name: &str, when: bool, value: impl Into<Value>) {
    if when {
        object.insert(name.into(), value.into());
    }
}

fn host_json(host: &HostView) -> Value {
    let counter = |(name, value): (&str, u64)| {
        let mut stat = Map::new();
        put(&mut stat, "value", value > 0, value.to_string());
        stat.insert("name".into(), name.into());
        Value::from(stat)
    };
    let gauge = |(name, value): (&str, u64)| {
        let mut stat = Map::new();
        stat.insert("type".into(), "GAUGE".into());
        put(&mut stat, "value", value > 0, value.to_string());
        stat.insert("name".into(), name.into());
        Value::from(stat)
    };
    let stats: Vec<Value> =
        host.counters().into_iter().map(counter).chain(host.gauges().into_iter().map(gauge)).collect();
    let mut locality = Map::new();
    put(&mut locality, "region", !host.region.is_empty(), &*host.region);
    put(&mut locality, "zone", !host.zone.is_empty(), &*host.zone);
    put(&mut locality, "sub_zone", !host.sub_zone.is_empty(), &*host.sub_zone);
    let rate = |rate: Option<f64>| json!({"value": rate});
    let mut json = Map::new();
    json.insert("address".into(), host_address_json(&host.address));
    json.insert("stats".into(), stats.into());
    json.insert("health_status".into(), host.health.json());
    put(&mut json, "success_rate", host.success_rate.is_some(), rate(host.success_rate));
    json.insert("weight".into(), host.weight.into());
    put(&mut json, "hostname", !host.hostname.is_empty(), &*host.hostname);
    put(&mut json, "priority", host.priority > 0, host.priority);
    let local = host.local_origin_success_rate;
    put(&mut json, "local_origin_success_rate", local.is_some(), rate(local));
    json.insert("locality".into(), locality.into());
    json.into()
}

impl ThresholdsView {
    fn fields(self) -> [(&'static str, u32); 4] {
        [
            ("max_connections", self.max_connections),
            ("max_pending_requests", self.max_pending_requests),
            ("max_requests", self.max_requests),
            ("max_retries", self.max_retries),
        ]
    }
}

fn thresholds_json(thresholds: &[ThresholdsView; 2]) -> Value {
    let one = |(index, thresholds): (usize, &ThresholdsView)| {
        let mut json = Map::new();
        put(&mut json, "priority", index == 1, "HIGH");
        for (field, value) in thresholds.fields() {
            json.insert(field.into(), value.into());
        }
        Value::from(json)
    };
    json!({"thresholds": thresholds.iter().enumerate().map(one).collect::<Vec<_>>()})
}

fn host_address_json(address: &EndpointAddr) -> Value {
    match address {
        EndpointAddr::Ip(address) => address_json(*address),
        EndpointAddr::Pipe(pipe) => json!({"pipe": {"path": pipe.to_string()}}),
    }
}

fn address_json(address: SocketAddr) -> Value {
    json!({"socket_address": {"address": address.ip().to_string(), "port_value": address.port()}})
}

/// One listener.
#[derive(Clone, Debug)]
pub struct ListenerView {
    /// Its name.
    pub name: Arc<str>,
    /// `address`, then `additional_addresses`; never empty.
    pub addresses: Vec<SocketAddr>,
    /// Which way its connections take. None unless the kernel path is asked for, so that the answer is Envoy's then.
    pub data_path: Option<DataPathView>,
}

/// Which way the connections of a listener take.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DataPathView {
    /// Straight to an endpoint.
    Kernel,
    /// Through the proxy, for these reasons.
    Proxy(Vec<String>),
}

/// `/listeners`. Writing to a String can't fail.
pub(super) fn listeners_text(listeners: &[ListenerView]) -> String {
    let mut out = String::new();
    for listener in listeners {
        let mut line = |text: &dyn std::fmt::Display| {
            let _ = writeln!(out, "{}::{text}", listener.name);
        };
        for address in &listener.addresses {
            line(address);
        }
        match &listener.data_path {
            None => {}
            Some(DataPathView::Kernel) => line(&"data_path::kernel"),
            Some(DataPathView::Proxy(reasons)) => {
                for reason in reasons {
                    line(&format_args!("data_path::proxy::{reason}"));
                }
            }
        }
    }
    out
}

/// `/listeners?format=json`.
pub(super) fn listeners_json(listeners: &[ListenerView]) -> Value {
    if listeners.is_empty() {
        return json!({});
    }
    let one = |listener: &ListenerView| {
        let mut addresses = listener.addresses.iter().copied().map(address_json);
        let mut status = Map::new();
        status.insert("name".into(), json!(*listener.name));
        if let Some(first) = addresses.next() {
            status.insert("local_address".into(), first);
        }
        let more: Vec<Value> = addresses.collect();
        put(&mut status, "additional_local_addresses", !more.is_empty(), more);
        if let Some(path) = &listener.data_path {
            let path = match path {
                DataPathView::Kernel => json!({"mode": "KERNEL"}),
                DataPathView::Proxy(reasons) => json!({"mode": "PROXY", "reasons": reasons}),
            };
            status.insert("data_path".into(), path);
        }
        Value::from(status)
    };
    json!({"listener_statuses": listeners.iter().map(one).collect::<Vec<_>>()})
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::addr::Pipe;

    fn foo() -> ClusterView {
        let host = |port| HostView::new(SocketAddr::from(([127, 0, 0, 1], port)).into());
        ClusterView {
            name: "foo".into(),
            observability_name: "foo".into(),
            hosts: vec![host(15911), host(15912)],
            ..ClusterView::default()
        }
    }

    #[test]
    fn clusters_print_as_envoys() {
        assert_eq!(clusters_text(&[foo()]), include_str!("testdata/envoy_clusters.txt"));
        let expected: Value = serde_json::from_str(include_str!("testdata/envoy_clusters.json")).unwrap();
        assert_eq!(clusters_json(&[foo()]), expected);
        assert_eq!(clusters_json(&[]), json!({}));
    }

    #[test]
    fn listeners_print_as_envoys() {
        let listener = ListenerView {
            name: "127.0.0.1_15910".into(),
            addresses: vec!["127.0.0.1:15910".parse().unwrap()],
            data_path: None,
        };
        assert_eq!(
            listeners_text(std::slice::from_ref(&listener)),
            include_str!("testdata/envoy_listeners.txt")
        );
        let expected: Value = serde_json::from_str(include_str!("testdata/envoy_listeners.json")).unwrap();
        assert_eq!(listeners_json(&[listener]), expected);
    }

    #[test]
    fn listeners_say_which_way_their_connections_take() {
        let listener = |name: &str, data_path| ListenerView {
            name: name.into(),
            addresses: vec!["127.0.0.1:1".parse().unwrap()],
            data_path: Some(data_path),
        };
        let listeners = [
            listener("a", DataPathView::Kernel),
            listener("b", DataPathView::Proxy(vec!["why".into(), "and: why".into()])),
        ];
        let text = "a::127.0.0.1:1\na::data_path::kernel\nb::127.0.0.1:1\nb::data_path::proxy::why\n\
                    b::data_path::proxy::and: why\n";
        assert_eq!(listeners_text(&listeners), text);
        let json = listeners_json(&listeners);
        assert_eq!(json["listener_statuses"][0]["data_path"], json!({"mode": "KERNEL"}));
        let reasons = json!({"mode": "PROXY", "reasons": ["why", "and: why"]});
        assert_eq!(json["listener_statuses"][1]["data_path"], reasons);
    }

    /// As Envoy 1.40 printed a STRICT_DNS cluster whose host the configuration calls UNHEALTHY.
    #[test]
    fn a_host_with_everything() {
        let mut host = HostView::new(EndpointAddr::Ip("[::1]:99".parse().unwrap()));
        host.hostname = "hh".into();
        host.weight = 3;
        host.region = "r".into();
        host.zone = "z".into();
        host.sub_zone = "s".into();
        host.priority = 1;
        host.cx_total = 4;
        host.cx_active = 2;
        host.success_rate = Some(99.5);
        host.health.eds_health_status = HealthStatus::Unhealthy;
        host.health.failed_outlier_check = true;
        let cluster = ClusterView {
            name: "a:b".into(),
            added_via_api: true,
            outlier: None,
            eds_service_name: "svc".into(),
            hosts: vec![host],
            ..ClusterView::default()
        };
        let text = clusters_text(std::slice::from_ref(&cluster));
        for line in [
            "a:b::added_via_api::true",
            "a:b::eds_service_name::svc",
            "a:b::[::1]:99::cx_active::2",
            "a:b::[::1]:99::health_flags::/failed_outlier_check/failed_eds_health",
            "a:b::[::1]:99::success_rate::99.5",
            "a:b::[::1]:99::sub_zone::s",
        ] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        let json = clusters_json(&[cluster]);
        let status = &json["cluster_statuses"][0];
        let host = &status["host_statuses"][0];
        assert_eq!(status["added_via_api"], true);
        assert_eq!(
            host["health_status"],
            json!({"failed_outlier_check": true, "eds_health_status": "UNHEALTHY"})
        );
        assert_eq!(host["stats"][1], json!({"value": "4", "name": "cx_total"}));
        assert_eq!(host["stats"][6], json!({"type": "GAUGE", "value": "2", "name": "cx_active"}));
        assert_eq!(host["locality"], json!({"region": "r", "zone": "z", "sub_zone": "s"}));
        assert_eq!((&host["priority"], &host["hostname"]), (&json!(1), &json!("hh")));
    }

    /// As Envoy 1.40 printed them.
    #[test]
    fn pipes() {
        let host = |path| HostView::new(EndpointAddr::Pipe(Pipe::new(path).unwrap()));
        let cluster = ClusterView {
            name: "xds".into(),
            hosts: vec![host("./etc/istio/proxy/XDS"), host("@a\0b")],
            ..ClusterView::default()
        };
        let text = clusters_text(std::slice::from_ref(&cluster));
        for line in ["xds::./etc/istio/proxy/XDS::cx_active::0", "xds::@a@b::hostname::"] {
            assert!(text.lines().any(|l| l == line), "{line} in {text}");
        }
        let json = clusters_json(&[cluster]);
        let hosts = &json["cluster_statuses"][0]["host_statuses"];
        assert_eq!(hosts[0]["address"], json!({"pipe": {"path": "./etc/istio/proxy/XDS"}}));
        assert_eq!(hosts[1]["address"], json!({"pipe": {"path": "@a@b"}}));
    }
}
