//! Envoy's v3 API, as far as tidegate reads it: Rust types and their descriptors.
//!
//! [`envoy`], [`google`], [`opentelemetry`], [`tidegate`], [`udpa`], [`validate`] and [`xds`] are generated from the
//! .proto files in `proto/` by `cargo xtask gen-api` and checked in, so that a build needs neither `protoc`
//! nor a code generator. Messages and fields are documented in their .proto files. The packages that
//! everybody uses have a short name at the top: [`core`], [`listener`], [`tcp_proxy`], …

use std::sync::{PoisonError, RwLock};

use prost_reflect::DescriptorPool;

pub use prost_types as wkt;

mod generated {
    #![allow(clippy::all, clippy::pedantic, missing_docs, unreachable_pub)]
    include!("generated/mod.rs");
}
pub use generated::{envoy, google, opentelemetry, tidegate, udpa, validate, xds};

pub use envoy::admin::v3 as admin;
pub use envoy::config::accesslog::v3 as accesslog;
pub use envoy::config::bootstrap::v3 as bootstrap;
pub use envoy::config::cluster::v3 as cluster;
pub use envoy::config::core::v3 as core;
pub use envoy::config::endpoint::v3 as endpoint;
pub use envoy::config::listener::v3 as listener;
pub use envoy::config::route::v3 as route;
pub use envoy::extensions::access_loggers::file::v3 as file_access_log;
pub use envoy::extensions::access_loggers::stream::v3 as stream_access_log;
pub use envoy::extensions::filters::network::http_connection_manager::v3 as http_connection_manager;
pub use envoy::extensions::filters::network::tcp_proxy::v3 as tcp_proxy;
pub use envoy::extensions::transport_sockets::tls::v3 as tls;
pub use envoy::service::discovery::v3 as discovery;
pub use envoy::r#type::v3 as envoy_type;
pub use tidegate::bootstrap::v1 as interception;
pub use tidegate::cluster::v1 as cluster_extension;

/// The encoded `google.protobuf.FileDescriptorSet` of every message that configuration may contain, with
/// the options of Envoy's extensions (`validate.rules`, `udpa.annotations.sensitive`, …) kept.
pub const DESCRIPTOR_SET: &[u8] = include_bytes!("generated/descriptors.bin");

/// None until it is needed, and again once it was released.
static POOL: RwLock<Option<DescriptorPool>> = RwLock::new(None);

/// The descriptors behind [`DESCRIPTOR_SET`], decoded at the first call (some 20 ms, 5 MB) and at the first one
/// after [`release_descriptors`]. Cheap to clone. It knows more messages than there are Rust types: those that are
/// checked and shown, but not acted on.
pub fn descriptors() -> DescriptorPool {
    // A poisoned lock still guards a whole pool or none.
    if let Some(pool) = &*POOL.read().unwrap_or_else(PoisonError::into_inner) {
        return pool.clone();
    }
    let mut pool = POOL.write().unwrap_or_else(PoisonError::into_inner);
    let decode =
        || DescriptorPool::decode(DESCRIPTOR_SET).expect("the embedded descriptors are checked by a test");
    pool.get_or_insert_with(decode).clone()
}

/// Forgets the descriptors. Their memory is free once nobody holds a clone, a descriptor or a dynamic message of
/// them. True if there were any.
pub fn release_descriptors() -> bool {
    POOL.write().unwrap_or_else(PoisonError::into_inner).take().is_some()
}

#[cfg(test)]
mod tests {
    use prost::Name;
    use prost_reflect::ReflectMessage;

    use super::*;

    #[test]
    fn embedded_descriptors_decode_and_know_the_generated_types() {
        for name in [
            bootstrap::Bootstrap::full_name(),
            listener::Listener::full_name(),
            cluster::Cluster::full_name(),
            tcp_proxy::TcpProxy::full_name(),
            http_connection_manager::HttpConnectionManager::full_name(),
            tls::DownstreamTlsContext::full_name(),
            interception::Interception::full_name(),
            udpa::r#type::v1::TypedStruct::full_name(),
            xds::r#type::v3::TypedStruct::full_name(),
        ] {
            assert!(descriptors().get_message_by_name(&name).is_some(), "{name}");
        }
        assert_eq!(
            tcp_proxy::TcpProxy::type_url(),
            "type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy"
        );
    }

    #[test]
    fn validate_rules_survive_in_the_descriptors() {
        let port = descriptors().get_message_by_name("envoy.config.core.v3.SocketAddress").unwrap();
        let port = port.get_field_by_name("port_value").unwrap();
        let rules = descriptors().get_extension_by_name("validate.rules").unwrap();
        let options = port.options();
        assert!(options.has_extension(&rules), "no validate.rules on port_value");
        let rules = options.get_extension(&rules).as_message().unwrap().clone();
        assert_eq!(rules.descriptor().full_name(), "validate.FieldRules");
        assert!(rules.has_field_by_name("uint32"));
    }
}
