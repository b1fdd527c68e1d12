//! What a control plane serves, and by which methods.

use prost::Name;
use tidegate_api::cluster::Cluster;
use tidegate_api::endpoint::ClusterLoadAssignment;
use tidegate_api::listener::Listener;
use tidegate_api::route::{RouteConfiguration, VirtualHost};
use tidegate_api::tls::Secret;
use tidegate_api::wkt::Any;

/// A kind of resource.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// CDS.
    Cluster,
    /// EDS.
    Endpoints,
    /// LDS.
    Listener,
    /// RDS.
    Route,
    /// VHDS.
    VirtualHost,
    /// SDS.
    Secret,
}

impl Kind {
    /// In the order in which a control plane sends them, so that nothing refers to what is not there yet.
    pub const ALL: [Self; 6] =
        [Self::Cluster, Self::Endpoints, Self::Listener, Self::Route, Self::VirtualHost, Self::Secret];

    /// `type.googleapis.com/…`
    pub fn type_url(self) -> String {
        match self {
            Self::Cluster => Cluster::type_url(),
            Self::Endpoints => ClusterLoadAssignment::type_url(),
            Self::Listener => Listener::type_url(),
            Self::Route => RouteConfiguration::type_url(),
            Self::VirtualHost => VirtualHost::type_url(),
            Self::Secret => Secret::type_url(),
        }
    }

    /// The kind that a type URL names.
    pub fn of(type_url: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.type_url() == type_url)
    }

    /// `POST /v3/discovery:…`; VHDS has none.
    pub fn rest_path(self) -> Option<&'static str> {
        Some(match self {
            Self::Cluster => "/v3/discovery:clusters",
            Self::Endpoints => "/v3/discovery:endpoints",
            Self::Listener => "/v3/discovery:listeners",
            Self::Route => "/v3/discovery:routes",
            Self::Secret => "/v3/discovery:secrets",
            Self::VirtualHost => return None,
        })
    }

    /// Name of its services: `envoy.service.<package>.v3.<service>/{Stream,Delta}<methods>`.
    fn service(self) -> (&'static str, &'static str, &'static str) {
        match self {
            Self::Cluster => ("cluster", "ClusterDiscoveryService", "Clusters"),
            Self::Endpoints => ("endpoint", "EndpointDiscoveryService", "Endpoints"),
            Self::Listener => ("listener", "ListenerDiscoveryService", "Listeners"),
            Self::Route => ("route", "RouteDiscoveryService", "Routes"),
            Self::VirtualHost => ("route", "VirtualHostDiscoveryService", "VirtualHosts"),
            Self::Secret => ("secret", "SecretDiscoveryService", "Secrets"),
        }
    }
}

/// A gRPC method: which kinds, and which variant of the protocol.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Method {
    /// One kind; none: all of them (ADS).
    pub kind: Option<Kind>,
    /// Incremental.
    pub delta: bool,
}

impl Method {
    /// ADS, state of the world.
    pub const ADS: Self = Self { kind: None, delta: false };
    /// ADS, incremental.
    pub const DELTA_ADS: Self = Self { kind: None, delta: true };

    /// The method behind an HTTP path.
    pub fn of(path: &str) -> Option<Self> {
        let kinds = std::iter::once(None).chain(Kind::ALL.into_iter().map(Some));
        kinds
            .flat_map(|kind| [Self { kind, delta: false }, Self { kind, delta: true }])
            .find(|method| method.path() == path)
    }

    /// Its HTTP path.
    pub fn path(self) -> String {
        let (package, service, methods) = match self.kind {
            None => ("discovery", "AggregatedDiscoveryService", "AggregatedResources"),
            Some(kind) => kind.service(),
        };
        let variant = if self.delta { "Delta" } else { "Stream" };
        format!("/envoy.service.{package}.v3.{service}/{variant}{methods}")
    }
}

/// A message that a control plane serves.
pub trait Served: prost::Message + Name + Sized {
    /// Which kind it is.
    const KIND: Kind;
    /// What clients call it.
    fn resource_name(&self) -> &str;

    /// Packed.
    fn packed(&self) -> Any {
        Any { type_url: Self::type_url(), value: self.encode_to_vec() }
    }
}

macro_rules! served {
    ($($message:ty: $kind:ident by $name:ident;)*) => {
        $(impl Served for $message {
            const KIND: Kind = Kind::$kind;
            fn resource_name(&self) -> &str {
                &self.$name
            }
        })*
    };
}

served! {
    Cluster: Cluster by name;
    ClusterLoadAssignment: Endpoints by cluster_name;
    Listener: Listener by name;
    RouteConfiguration: Route by name;
    VirtualHost: VirtualHost by name;
    Secret: Secret by name;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn methods_have_envoy_s_paths() {
        assert_eq!(
            Method::ADS.path(),
            "/envoy.service.discovery.v3.AggregatedDiscoveryService/StreamAggregatedResources"
        );
        let eds = Method { kind: Some(Kind::Endpoints), delta: true };
        assert_eq!(eds.path(), "/envoy.service.endpoint.v3.EndpointDiscoveryService/DeltaEndpoints");
        assert_eq!(Method::of(&eds.path()), Some(eds));
        assert_eq!(Method::of("/x"), None);
    }
}
