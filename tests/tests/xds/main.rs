//! Configuration that comes while the proxy runs, from control planes.
//!
//! `pNN` in a name is the number of the point of the protocol (docs/xds.md has the list). Under `TIDEGATE_TEST_ENVOY`
//! the tests run against that Envoy, which shows whether a test expects what Envoy does.

mod ads;
mod delta;
mod fixture;
mod live;
mod others;
mod sotw;
mod transports;
mod world;
