//! Clusters whose endpoints are checked.

use super::*;

fn checked(name: &str, more: Value) -> Any {
    let mut fields = json!({ "health_checks": [{
        "timeout": "5s", "interval": "0.01s", "no_traffic_interval": "0.01s",
        "unhealthy_threshold": 1, "healthy_threshold": 1, "tcp_health_check": {} }] });
    merge(&mut fields, more);
    cluster(name, fields)
}

fn healthy(fixture: &Fixture, name: &str) -> Option<u64> {
    fixture.stat(&format!("cluster.{name}.membership_healthy"))
}

impl Fixture {
    /// Until nothing warms any more. The store's own events come among those of a client that finds no files.
    async fn warm(&mut self) {
        while self.store.clusters.warming_len() > 0 {
            let happened = self.store.next().await;
            let changes = self.store.handle(happened);
            self.changes.push(changes);
        }
    }
}

#[tokio::test]
async fn a_cluster_is_warm_when_its_endpoints_were_checked_once() {
    let tasks = tokio::task::LocalSet::new();
    tasks
        .run_until(async {
            let alive = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = alive.local_addr().unwrap().port();
            let dead = {
                let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
                socket.local_addr().unwrap().port()
            };
            let mut fixture = Fixture::started(&json!({}));
            fixture.accepted(Kind::Cluster, vec![checked("a", json!({}))]);
            assert!(fixture.clusters().is_empty(), "no endpoints");
            fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[port, dead])]);
            assert!(fixture.clusters().is_empty(), "not checked");
            fixture.warm().await;
            assert_eq!(fixture.clusters()["a"], [port, dead]);
            assert_eq!(healthy(&fixture, "a"), Some(1));
            // One that goes while it is healthy stays until it fails; one that is not goes at once.
            fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[])]);
            assert_eq!(fixture.clusters()["a"], [port]);
            drop(alive);
            while !fixture.clusters()["a"].is_empty() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
            // A cluster without endpoints has nothing to wait for but the turn of a task.
            fixture.accepted(Kind::Cluster, vec![checked("a", json!({})), checked("b", json!({}))]);
            fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("b", &[])]);
            fixture.warm().await;
            assert_eq!(fixture.clusters().len(), 2);
            // What is removed is not checked any more.
            fixture.accepted(Kind::Cluster, vec![]);
            assert!(fixture.clusters().is_empty());
            while fixture.stat("cluster.a.health_check.attempt").is_some() {
                tokio::time::sleep(Duration::from_millis(5)).await;
                fixture.changes.clear();
            }
        })
        .await;
}

#[tokio::test]
async fn a_new_version_serves_when_it_was_checked_and_the_old_one_until_then() {
    let tasks = tokio::task::LocalSet::new();
    tasks
        .run_until(async {
            let alive = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
            let port = alive.local_addr().unwrap().port();
            let mut fixture = Fixture::started(&json!({}));
            fixture.accepted(Kind::Cluster, vec![cluster("a", json!({}))]);
            fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("a", &[port])]);
            assert_eq!(healthy(&fixture, "a"), Some(1));
            let before = fixture.store.snapshot(&[]).cluster("a").unwrap().id();
            fixture.accepted(Kind::Cluster, vec![checked("a", json!({ "connect_timeout": "1s" }))]);
            assert_eq!(fixture.store.snapshot(&[]).cluster("a").unwrap().id(), before);
            assert_eq!(healthy(&fixture, "a"), Some(1), "it is in use");
            fixture.warm().await;
            assert_ne!(fixture.store.snapshot(&[]).cluster("a").unwrap().id(), before);
            assert_eq!(healthy(&fixture, "a"), Some(1));
        })
        .await;
}
