//! `transport_socket_matches` of a cluster: which endpoints ask for encryption.

use std::sync::Arc;

use tidegate_api::{core, wkt};

/// The matches of a cluster. Cheap to clone; takes nothing when there are none.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct TransportSocketMatches(Option<Arc<[Match]>>);

/// Criteria, whether the socket is plaintext, and the name of the match.
type Match = (wkt::Struct, bool, String);

impl TransportSocketMatches {
    pub(super) fn new(matches: Vec<Match>) -> Self {
        Self((!matches.is_empty()).then(|| matches.into()))
    }

    /// The name of the match that an endpoint with this metadata selects, unless it is plaintext.
    pub(super) fn selects_encryption(&self, metadata: Option<&core::Metadata>) -> Option<&str> {
        let labels =
            metadata.and_then(|metadata| metadata.filter_metadata.get("envoy.transport_socket_match"));
        let selected = self.0.as_deref()?.iter().find(|(criteria, _, _)| {
            criteria
                .fields
                .iter()
                .all(|(key, value)| labels.is_some_and(|labels| labels.fields.get(key) == Some(value)))
        });
        selected.filter(|(_, raw, _)| !raw).map(|(_, _, name)| name.as_str())
    }
}
