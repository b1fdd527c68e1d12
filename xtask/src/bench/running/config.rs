//! The configuration files of the proxies.

use std::fmt::Write as _;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;

use serde_json::{Value, json};
use tidegate_tests::config::Config;

use super::super::subject::{ENDPOINTS, MANY_SERVICES, Program, Subject, Way};
use super::super::{site, tools};
use super::Fronts;

/// More connections than HAProxy can have beside a pipe for each fourth of them, where 20,000 files may be open.
const MANY: usize = 6000;

/// Forced, not `splice-auto`.
const SPLICE: &str = "    option splice-request\n    option splice-response\n";

/// What a proxy connects: name, front, back.
pub(super) struct Links([(&'static str, SocketAddr, SocketAddr); 4]);

impl Links {
    pub(super) fn new(fronts: &Fronts, backs: &Fronts) -> Self {
        Self([
            ("echo", fronts.echo, backs.echo),
            ("bulk", fronts.bulk, backs.bulk),
            ("iperf3", fronts.iperf3, backs.iperf3),
            ("http", fronts.http, backs.http),
        ])
    }
}

/// With stats and the admin server, which Envoy always has; the log is in Envoy's own format.
pub(super) fn envoy(links: &Links, way: Way, log: Option<&Path>, connections: usize) -> String {
    let limits =
        json!({"thresholds": [{"max_connections": connections, "max_pending_requests": connections}]});
    let mut config = Config::new();
    for (name, front, back) in &links.0 {
        let mut fields = json!({"name": name});
        if !matches!(way, Way::Address | Way::Redirect) {
            fields["bind_to_port"] = json!(false);
        }
        let mut cluster = json!({"circuit_breakers": limits});
        if way.is_kernel() {
            cluster["metadata"] = on_kernel_path();
        }
        // The tools' own servers have one address.
        let endpoints =
            if way == Way::KernelMany && matches!(*name, "echo" | "bulk") { ENDPOINTS } else { 1 };
        let endpoints: Vec<_> = site::servers(back.ip(), endpoints)
            .into_iter()
            .map(|ip| SocketAddr::new(ip, back.port()).to_string())
            .collect();
        let endpoints: Vec<_> = endpoints.iter().map(String::as_str).collect();
        config = config
            .listener(&front.to_string(), fields, &tcp_proxy(name, log))
            .cluster(name, &endpoints, cluster);
    }
    if way != Way::KernelMany {
        return config.to_string();
    }
    let mut config: Value = serde_json::from_str(&other_services(config).to_string()).unwrap_or_default();
    config["bootstrap_extensions"] = json!([large_tables()]);
    config.to_string()
}

/// Room for [`MANY_SERVICES`], and the others.
fn large_tables() -> Value {
    let services = MANY_SERVICES + 100;
    let hosts = services * ENDPOINTS;
    json!({"name": "tidegate.bootstrap.interception", "typed_config": {
        "@type": "type.googleapis.com/tidegate.bootstrap.v1.Interception",
        "map_sizes": {
            "services": services, "clusters": services, "hosts": hosts, "balancing_words": 16 * hosts,
        },
    }})
}

/// Metadata of a cluster.
fn on_kernel_path() -> Value {
    json!({"typed_filter_metadata": {"tidegate.data_path": {
        "@type": "type.googleapis.com/tidegate.cluster.v1.DataPath",
        "mode": "KERNEL",
    }}})
}

/// Services that nobody uses. Nothing has their addresses.
fn other_services(mut config: Config) -> Config {
    let (services, endpoints) = (Ipv4Addr::new(172, 17, 0, 0), Ipv4Addr::new(10, 128, 0, 0));
    let at = |base: Ipv4Addr, number: u32| format!("{}:80", Ipv4Addr::from(u32::from(base) + number));
    for service in 1..MANY_SERVICES {
        let name = format!("other-{service}");
        let own: Vec<_> = (0..ENDPOINTS).map(|number| at(endpoints, service * ENDPOINTS + number)).collect();
        let own: Vec<_> = own.iter().map(String::as_str).collect();
        config = config
            .listener(
                &at(services, service),
                json!({"name": name, "bind_to_port": false}),
                &tcp_proxy(&name, None),
            )
            .cluster(&name, &own, json!({"metadata": on_kernel_path()}));
    }
    config
}

fn tcp_proxy(cluster: &str, log: Option<&Path>) -> Value {
    let logs: Vec<_> = log
        .map(|path| {
            json!({"name": "envoy.access_loggers.file", "typed_config": {
                "@type": "type.googleapis.com/envoy.extensions.access_loggers.file.v3.FileAccessLog",
                "path": path,
            }})
        })
        .into_iter()
        .collect();
    json!({"name": "envoy.filters.network.tcp_proxy", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
        "stat_prefix": cluster,
        "cluster": cluster,
        "access_log": logs,
    }})
}

/// Stats are always counted; the socket is where they are asked for.
pub(super) fn haproxy(links: &Links, subject: Subject, dir: &Path, connections: usize) -> String {
    let (global, mut defaults) = match subject.program {
        // A quarter of the connections may have pipes, and a pipe is two files: of thousands they would be too many.
        Program::HaproxySplice if connections > MANY => {
            ("    tune.pipesize 1048576\n    maxpipes 250\n", SPLICE.to_owned())
        }
        Program::HaproxySplice => ("    tune.pipesize 1048576\n", SPLICE.to_owned()),
        _ => ("", String::new()),
    };
    if subject.log {
        defaults += "    log stdout format raw local0 info\n    option tcplog\n";
    }
    let mut config = format!(
        "global\n    nbthread 1\n    maxconn {connections}\n    stats socket {}\n{global}\
         defaults\n    mode tcp\n    maxconn {connections}\n    timeout connect 5s\n    timeout client 1h\n    \
         timeout server 1h\n{defaults}",
        dir.join("stats.sock").display(),
    );
    for (name, front, back) in &links.0 {
        let _ = write!(config, "listen {name}\n    bind {front}\n    server {name} {back}\n");
    }
    config
}

/// One worker; buffers of the default size. The log is buffered, as those of the others are.
pub(super) fn nginx(links: &Links, log: Option<&Path>, dir: &Path, connections: usize) -> String {
    // Room for both ends of each is taken at start.
    let room = 2 * connections + 100;
    let log = match log {
        Some(path) => format!("access_log {} tcp buffer=64k flush=1s", path.display()),
        None => "access_log off".to_owned(),
    };
    let mut config = format!(
        "load_module {};\nworker_processes 1;\ndaemon off;\npid {}/nginx.pid;\n\
         events {{ worker_connections {room}; }}\n\
         stream {{\n    log_format tcp '$remote_addr [$time_local] $protocol $status $bytes_sent $bytes_received \
         $session_time \"$upstream_addr\" $upstream_bytes_sent $upstream_bytes_received $upstream_connect_time';\n    \
         {log};\n    proxy_timeout 1h;\n",
        tools::NGINX_STREAM,
        dir.display(),
    );
    for (_, front, back) in &links.0 {
        let _ = writeln!(config, "    server {{ listen {front}; proxy_pass {back}; }}");
    }
    config + "}\n"
}

#[cfg(test)]
mod tests {
    use super::super::super::site::Ports;
    use super::*;

    #[test]
    fn only_the_kernel_path_is_asked_for_by_clusters() {
        let fronts = Ports::of(1).at("172.16.0.1".parse().expect("an address"), 0);
        let backs = Ports::of(1).at("10.0.0.2".parse().expect("an address"), 4);
        let config = |way| -> Value {
            let text = envoy(&Links::new(&fronts, &backs), way, None, 10);
            serde_json::from_str(&text).expect("JSON")
        };
        let clusters = |config: &Value| config["static_resources"]["clusters"].as_array().map_or(0, Vec::len);
        let intercept = config(Way::Intercept);
        assert!(!intercept.to_string().contains("data_path"));
        let mut kernel = config(Way::Kernel);
        for cluster in kernel["static_resources"]["clusters"].as_array_mut().expect("clusters") {
            assert_eq!(
                cluster.as_object_mut().expect("a cluster").remove("metadata"),
                Some(on_kernel_path())
            );
        }
        assert_eq!(kernel, intercept, "the same otherwise");
        let many = config(Way::KernelMany);
        assert_eq!(clusters(&many), clusters(&intercept) + MANY_SERVICES as usize - 1);
        let endpoints =
            &many["static_resources"]["clusters"][0]["load_assignment"]["endpoints"][0]["lb_endpoints"];
        assert_eq!(endpoints.as_array().map(Vec::len), Some(ENDPOINTS as usize));
    }
}
