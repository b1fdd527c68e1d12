//! Configuration that comes while the proxy runs, from control planes.
//!
//! Tests of one rule of the protocol have its number in their names: `p22`, as in the unit tests of `xds::client`. Under
//! `TIDEGATE_TEST_ENVOY` the tests run against that Envoy, which shows whether a test expects what Envoy does. Of Envoy
//! 1.40 these don't hold, for the reasons in docs/xds.md ("Where it differs from Envoy"): `p6_…` (it answers everything),
//! `p41_make_before_break`, `p8_p9_p10_…` (it applies the first of two), `sotw::p49_p50_…`, `p12_p13_…` and
//! `p28_…` (it takes the resource under its own name); those of `removal` (the policy is ours), but for
//! `envoy_s_fields_…`; and those with HTTP listeners that carry plain TCP (`p39_…`, `p56_…`, `p21_…`) or with
//! interception, which it does not have.
//! Of `sds`, `files_rotated_by_rename`, `static_secrets_serve_by_name` and `example_with_sds_…` hold of Envoy; others expect
//! one subscription for all secrets of a source, renewed files at the next connection, or our words, and `ads_brings_…`
//! crashes it. Of `pipes`, `rest_…` and `spire_…` hold of Envoy; the other has words of ours, and an extension of Istio's.

mod ads;
mod delta;
mod fixture;
mod live;
mod others;
mod pipes;
mod removal;
mod sds;
mod sotw;
mod stats;
mod transports;
mod world;
