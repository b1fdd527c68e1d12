//! Who we are to a control plane.

use tidegate_api::core;
use tidegate_api::core::node::UserAgentVersionType;
use tidegate_api::envoy_type::SemanticVersion;
use tidegate_api::wkt;
use tidegate_api::wkt::value::Kind;

/// What the client can do beyond the basics, in the words of Envoy's list of client features.
const CLIENT_FEATURES: [&str; 2] = ["xds.config.resource-in-sotw", "xds.config.supports-resource-ttl"];

/// The bootstrap's node with what only the program knows: its name, its version, what it can do. What the operator
/// wrote (id, cluster, locality, metadata) stays.
pub fn identify(mut node: core::Node) -> core::Node {
    "tidegate".clone_into(&mut node.user_agent_name);
    node.user_agent_version_type = Some(UserAgentVersionType::UserAgentBuildVersion(build_version()));
    for feature in CLIENT_FEATURES {
        if !node.client_features.iter().any(|given| given == feature) {
            node.client_features.push(feature.to_owned());
        }
    }
    // Envoy lists its compiled-in extensions there, 77 KB in each request; no control plane needs them.
    node.extensions.clear();
    // For v2 control planes.
    #[expect(deprecated, reason = "it must not go out")]
    node.listening_addresses.clear();
    node
}

fn build_version() -> core::BuildVersion {
    let mut numbers = env!("CARGO_PKG_VERSION").split(['.', '-']).map(|part| part.parse().unwrap_or(0));
    let mut next = || numbers.next().unwrap_or(0);
    let version = SemanticVersion { major_number: next(), minor_number: next(), patch: next() };
    let field = |name: &str, value: &str| {
        (name.to_owned(), wkt::Value { kind: Some(Kind::StringValue(value.to_owned())) })
    };
    let build_type = if cfg!(debug_assertions) { "debug" } else { "release" };
    core::BuildVersion {
        version: Some(version),
        metadata: Some(wkt::Struct { fields: [field("build.type", build_type)].into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_operators_words_stay_and_ours_are_added() {
        let given = core::Node {
            id: "sidecar~10.0.0.1~pod.ns~ns.svc.cluster.local".into(),
            cluster: "c".into(),
            metadata: Some(wkt::Struct::default()),
            locality: Some(core::Locality { zone: "z".into(), ..Default::default() }),
            user_agent_name: "envoy".into(),
            client_features: vec!["xds.config.resource-in-sotw".into(), "mine".into()],
            ..Default::default()
        };
        let node = identify(given.clone());
        assert_eq!((&node.id, &node.cluster, &node.locality), (&given.id, &given.cluster, &given.locality));
        assert_eq!(node.metadata, given.metadata);
        assert_eq!(node.user_agent_name, "tidegate");
        assert_eq!(
            node.client_features,
            ["xds.config.resource-in-sotw", "mine", "xds.config.supports-resource-ttl"]
        );
        let Some(UserAgentVersionType::UserAgentBuildVersion(version)) = node.user_agent_version_type else {
            panic!("no version");
        };
        let version = version.version.unwrap();
        let text = format!("{}.{}.{}", version.major_number, version.minor_number, version.patch);
        assert!(env!("CARGO_PKG_VERSION").starts_with(&text), "{text}");
    }
}
