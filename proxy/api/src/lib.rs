//! Envoy v3 API types (generated) and their descriptors.
