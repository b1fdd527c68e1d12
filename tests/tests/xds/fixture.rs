//! The control plane itself, tried with a client that is not ours: the real Envoy.

use anyhow::Result;
use tidegate_tests::control_plane::resource::Transport;
use tidegate_tests::proxy::Engine;
use tidegate_tests::tool;

use crate::transports::serves;

fn serves_envoy(transport: Transport) -> Result<()> {
    let envoy = Engine::Envoy(tool::envoy()?);
    serves(transport, |setup| setup.engine(envoy))
}

#[test]
fn envoy_takes_ads() -> Result<()> {
    serves_envoy(Transport::Ads)
}

#[test]
fn envoy_takes_delta_ads() -> Result<()> {
    serves_envoy(Transport::DeltaAds)
}

#[test]
fn envoy_takes_a_stream_per_kind() -> Result<()> {
    serves_envoy(Transport::Grpc)
}

#[test]
fn envoy_takes_a_delta_stream_per_kind() -> Result<()> {
    serves_envoy(Transport::DeltaGrpc)
}

#[test]
fn envoy_polls() -> Result<()> {
    serves_envoy(Transport::Rest)
}
