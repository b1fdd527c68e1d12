//! Runtime keys that have an effect here.

use std::collections::BTreeMap;

/// What the static layers of `layered_runtime` say together, later layers over earlier ones.
#[derive(Clone, Debug, Default)]
pub struct Runtime {
    /// By listener name.
    pub(super) connection_limits: BTreeMap<String, u64>,
}

impl Runtime {
    /// `envoy.resource_limits.listener.<name>.connection_limit`.
    pub fn connection_limit(&self, listener: &str) -> Option<u64> {
        self.connection_limits.get(listener).copied()
    }
}
