//! What becomes of connections whose endpoint goes, by the policy of the cluster. That they stay without one is in `live`.

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use tidegate_tests::control_plane::{Kind, resource};

use crate::live::{Standing, endpoint, endpoints};
use crate::world::{LISTENER, State, World, with_log};

/// `tidegate.cluster.v1.EndpointRemoval` in a cluster.
fn policy(mut policy: Value) -> Value {
    policy["@type"] = json!("type.googleapis.com/tidegate.cluster.v1.EndpointRemoval");
    json!({"metadata": {"typed_filter_metadata": {"tidegate.endpoint_removal": policy}}})
}

impl Standing {
    /// The endpoints of the cluster are these from now on.
    fn has(&mut self, addresses: &[&str]) -> Result<()> {
        self.plane.set(&resource::endpoints("c", addresses)?);
        with_log(self.plane.accepted(Kind::Endpoints), &self.proxy)
    }

    /// The connection ends like this, and the log says why.
    fn ended(&mut self, state: State, reason: &str) -> Result<()> {
        let found = with_log(self.live.end(), &self.proxy)?;
        ensure!(found == state, "{found:?}");
        let details = format!("flags=- details={reason} ");
        let line = self.proxy.lines("proxy.log", &details, 1)?.remove(0);
        ensure!(line.contains(&format!("closed={reason}")), "{line}");
        // As Envoy counts those that close_connections_on_host_health_failure ends.
        for stat in ["destroy", "destroy_local", "destroy_with_active_rq", "destroy_local_with_active_rq"] {
            self.proxy.wait_stat(&format!("cluster.c.upstream_cx_{stat}"), |count| count >= 1)?;
        }
        Ok(())
    }
}

/// The deadline is not measured: the connection stands right after the change, and ends.
#[test]
fn closes_after_the_deadline() -> Result<()> {
    let mut standing = Standing::with(policy(json!({"action": "CLOSE", "deadline": "2s"})))?;
    let others = resource::endpoints("c", &[World::B])?;
    standing.change(Kind::Endpoints, |plane| plane.set(&others))?;
    standing.world.reaches(LISTENER, "b")?;
    standing.ended(State::Fin, "endpoint_removed")
}

#[test]
fn keeps_those_of_an_endpoint_that_comes_back_in_time() -> Result<()> {
    let mut standing = Standing::with(policy(json!({"action": "CLOSE", "deadline": "2s"})))?;
    standing.has(&[World::A, World::B])?;
    let mut doomed = loop {
        let mut live = standing.world.connect(LISTENER)?;
        if live.name()? == "b" {
            break live;
        }
    };
    // Both go at the same time, and one comes back.
    standing.plane.set(&endpoints(&[])?);
    with_log(standing.plane.accepted(Kind::Endpoints), &standing.proxy)?;
    standing.has(&[World::A])?;
    ensure!(doomed.end()? == State::Fin);
    ensure!(standing.live.state()? == State::Open, "{}", standing.proxy.log_tail());
    Ok(())
}

#[test]
fn resets_at_once() -> Result<()> {
    let mut standing = Standing::with(policy(json!({"action": "RESET"})))?;
    standing.has(&[World::A, World::B])?;
    ensure!(standing.live.state()? == State::Open, "an endpoint that comes ends nothing");
    standing.has(&[World::B])?;
    standing.ended(State::Reset, "endpoint_removed")?;
    standing.world.reaches(LISTENER, "b")
}

#[test]
fn resets_when_the_endpoint_is_unhealthy_if_that_is_wanted() -> Result<()> {
    let mut standing = Standing::with(policy(json!({"action": "RESET", "include_unhealthy": true})))?;
    let both = |health| endpoints(&[endpoint(World::A, health), endpoint(World::B, "HEALTHY")]);
    let degraded = both("DEGRADED")?;
    standing.change(Kind::Endpoints, |plane| plane.set(&degraded))?;
    standing.plane.set(&both("DRAINING")?);
    standing.ended(State::Reset, "endpoint_unhealthy")
}

#[test]
fn unhealthy_ones_are_not_removed() -> Result<()> {
    let mut standing = Standing::with(policy(json!({"action": "RESET"})))?;
    let changed = endpoints(&[endpoint(World::A, "UNHEALTHY"), endpoint(World::B, "HEALTHY")])?;
    standing.change(Kind::Endpoints, |plane| plane.set(&changed))?;
    standing.world.reaches(LISTENER, "b")?;
    ensure!(standing.live.state()? == State::Open);
    Ok(())
}

/// Both a new version of a cluster without the endpoint, and its end.
#[test]
fn closes_when_the_cluster_changes_or_goes() -> Result<()> {
    let fields = policy(json!({"action": "CLOSE"}));
    let mut standing = Standing::with(fields.clone())?;
    standing.plane.set(&resource::cluster("c", &[World::B], fields)?);
    standing.ended(State::Fin, "endpoint_removed")?;
    standing.world.reaches(LISTENER, "b")?;
    let mut second = standing.world.connect(LISTENER)?;
    ensure!(second.name()? == "b");
    standing.plane.remove(Kind::Cluster, "c");
    ensure!(with_log(second.end(), &standing.proxy)? == State::Fin);
    Ok(())
}

/// Envoy's own fields end nothing here: they are about active health checks, outlier detection and connection pools.
#[test]
fn envoy_s_fields_keep_connections() -> Result<()> {
    let mut standing = Standing::with(json!({
        "close_connections_on_host_health_failure": true,
        "ignore_health_on_host_removal": true,
        "common_lb_config": {"close_connections_on_host_set_change": true},
    }))?;
    for changed in [
        endpoints(&[endpoint(World::A, "UNHEALTHY"), endpoint(World::B, "HEALTHY")])?,
        resource::endpoints("c", &[World::B])?,
    ] {
        standing.change(Kind::Endpoints, |plane| plane.set(&changed))?;
        standing.world.reaches(LISTENER, "b")?;
    }
    standing.stays()
}

#[test]
fn a_policy_that_can_t_be_is_refused() -> Result<()> {
    let standing = Standing::with(json!({}))?;
    let refused = |fields| -> Result<String> {
        standing.plane.set(&resource::cluster("bad", &[World::A], fields)?);
        with_log(standing.plane.rejected(Kind::Cluster), &standing.proxy)
    };
    let error = refused(policy(json!({"action": "CLOSE", "deadline": "-1s"})))?;
    ensure!(error.contains("deadline"), "{error}");
    let untyped = json!({"filter_metadata": {"tidegate.endpoint_removal": {"action": "CLOSE"}}});
    let error = refused(json!({"metadata": untyped}))?;
    ensure!(error.contains("typed_filter_metadata"), "{error}");
    Ok(())
}
