//! The resources of a large cluster of services, shaped like what Istio sends for plain TCP.

use anyhow::{Context, Result};
use serde_json::json;
use tidegate_api::cluster::Cluster;
use tidegate_api::core::address::Address;
use tidegate_api::discovery::Resource;
use tidegate_api::endpoint::lb_endpoint::HostIdentifier;
use tidegate_api::endpoint::{ClusterLoadAssignment, LbEndpoint};
use tidegate_api::listener::Listener;
use tidegate_tests::config::tcp_proxy;
use tidegate_tests::control_plane::{Kind, resource, wrapped};

/// Name of the cluster whose endpoint moves.
pub(super) const PROBE: &str = "probe";

/// So many clusters, listeners and endpoints.
#[derive(Debug)]
pub(super) struct World {
    pairs: u32,
    endpoints: u32,
    cluster: Cluster,
    listener: Listener,
    assignment: ClusterLoadAssignment,
}

impl World {
    pub(super) fn new(pairs: u32, endpoints: u32) -> Result<Self> {
        let ads = resource::ads();
        let cluster = resource::eds_cluster(
            "template",
            &ads,
            json!({
                "circuit_breakers": {"thresholds": [{"max_connections": 100_000, "max_pending_requests": 100_000}]},
                "metadata": {"filter_metadata": {"istio": {"services": [
                    {"host": "service.default.svc.cluster.local", "name": "service", "namespace": "default"},
                ]}}},
            }),
        )?;
        let proxy = tcp_proxy("template", json!({"access_log": []}));
        let fields = json!({"bind_to_port": false, "traffic_direction": "OUTBOUND"});
        let listener = resource::listener("10.0.0.1:80", fields, &proxy)?;
        let addresses: Vec<String> = (1..=endpoints.max(1)).map(|n| format!("10.64.0.{n}:8080")).collect();
        let addresses: Vec<&str> = addresses.iter().map(String::as_str).collect();
        let assignment = resource::endpoints("template", &addresses)?;
        Ok(Self { pairs, endpoints, cluster, listener, assignment })
    }

    /// Every cluster of this generation, and the probe's, which stays as it is.
    fn clusters(&self, generation: u32) -> Vec<Resource> {
        let mut probe = self.cluster.clone();
        PROBE.clone_into(&mut probe.name);
        let mut clusters = vec![wrapped("1", &probe)];
        for number in 0..self.pairs {
            let mut cluster = self.cluster.clone();
            cluster.name = name(number);
            cluster.connect_timeout.get_or_insert_default().seconds = 2 + i64::from(generation);
            clusters.push(wrapped(&generation.to_string(), &cluster));
        }
        clusters
    }

    /// Every listener of this generation.
    fn listeners(&self, generation: u32) -> Result<Vec<Resource>> {
        (0..self.pairs)
            .map(|number| {
                let address = format!("10.{}.{}.{}", 1 + (number >> 16), number >> 8 & 0xff, number & 0xff);
                let prefix = format!("outbound_{generation}");
                let proxy = tcp_proxy(&name(number), json!({"access_log": [], "stat_prefix": prefix}));
                let mut listener = self.listener.clone();
                listener.name = format!("{address}_80");
                set_address(&mut listener, &address)?;
                let filter = &mut listener.filter_chains[0].filters[0];
                *filter = resource::from_json(&proxy)?;
                Ok(wrapped(&generation.to_string(), &listener))
            })
            .collect()
    }

    /// The endpoints of one cluster, each generation with other addresses; none of those that don't exist.
    pub(super) fn endpoints(&self, cluster: &str, generation: u32) -> Result<Option<Resource>> {
        let Some(number) = number(cluster).filter(|number| *number < self.pairs) else { return Ok(None) };
        let mut assignment = self.assignment.clone();
        cluster.clone_into(&mut assignment.cluster_name);
        let mut hosts = assignment.endpoints.iter_mut().flat_map(|locality| &mut locality.lb_endpoints);
        for index in 0..self.endpoints {
            let host = hosts.next().context("an endpoint")?;
            let at = number * self.endpoints + index;
            let ip =
                format!("10.{}.{}.{}", 64 + 32 * (generation % 2) + (at >> 16), at >> 8 & 0xff, at & 0xff);
            set_endpoint(host, &ip)?;
        }
        Ok(Some(wrapped(&generation.to_string(), &assignment)))
    }

    /// All of them.
    fn all_endpoints(&self, generation: u32) -> Result<Vec<Resource>> {
        let each = (0..self.pairs).map(|number| self.endpoints(&name(number), generation));
        each.filter_map(Result::transpose).collect()
    }

    /// Everything of one kind; endpoints without the probe's.
    pub(super) fn resources(&self, kind: Kind, generation: u32) -> Result<Vec<Resource>> {
        match kind {
            Kind::Cluster => Ok(self.clusters(generation)),
            Kind::Listener => self.listeners(generation),
            Kind::Endpoints => self.all_endpoints(generation),
            _ => Ok(Vec::new()),
        }
    }
}

fn name(number: u32) -> String {
    format!("outbound|80||service-{number}.default.svc.cluster.local")
}

fn number(name: &str) -> Option<u32> {
    name.strip_prefix("outbound|80||service-")?.split('.').next()?.parse().ok()
}

fn set_address(listener: &mut Listener, ip: &str) -> Result<()> {
    match listener.address.as_mut().and_then(|address| address.address.as_mut()) {
        Some(Address::SocketAddress(address)) => ip.clone_into(&mut address.address),
        _ => anyhow::bail!("the listener has no address"),
    }
    Ok(())
}

fn set_endpoint(host: &mut LbEndpoint, ip: &str) -> Result<()> {
    let Some(HostIdentifier::Endpoint(endpoint)) = &mut host.host_identifier else {
        anyhow::bail!("no endpoint")
    };
    match endpoint.address.as_mut().and_then(|address| address.address.as_mut()) {
        Some(Address::SocketAddress(address)) => ip.clone_into(&mut address.address),
        _ => anyhow::bail!("the endpoint has no address"),
    }
    Ok(())
}
