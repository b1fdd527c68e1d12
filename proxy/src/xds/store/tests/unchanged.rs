//! What does not change costs nothing, and the snapshot follows what does.

use proptest::prelude::{ProptestConfig, prop, proptest};

use super::*;
use crate::cluster::ClusterId;

fn id(fixture: &Fixture, name: &str) -> ClusterId {
    fixture.store.snapshot(&[]).cluster(name).unwrap_or_else(|| panic!("no cluster {name}")).id()
}

#[test]
fn p42_a_state_of_the_world_in_which_one_resource_changed_touches_that_one() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({})), cluster("b", json!({}))]);
        let both = vec![endpoints("a", &[1]), endpoints("b", &[2])];
        fixture.accepted(Kind::ClusterLoadAssignment, both.clone());
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a"), listener("m", 81, "b")]);
        let (a, b, l) = (id(&fixture, "a"), id(&fixture, "b"), fixture.listener("l"));
        let changed = cluster("b", json!({ "connect_timeout": "7s" }));
        fixture.accepted(Kind::Cluster, vec![cluster("a", json!({})), changed]);
        assert_eq!(id(&fixture, "a"), a);
        assert_ne!(id(&fixture, "b"), b, "what is known of its endpoints holds at once");
        assert_eq!(fixture.stats.cluster_manager().cluster_modified().value(), 1);
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a"), listener("m", 82, "b")]);
        assert!(Arc::ptr_eq(&fixture.listener("l"), &l));
        assert_eq!(fixture.stats.listener_manager().listener_modified().value(), 1);
        let stats = fixture.store.clusters.in_force("a").unwrap().stats().clone();
        let before = (stats.update_success().value(), stats.update_no_rebuild().value());
        fixture.accepted(Kind::ClusterLoadAssignment, both);
        let after = (stats.update_success().value(), stats.update_no_rebuild().value());
        assert_eq!(after, (before.0 + 1, before.1 + 1));
        assert_eq!(fixture.clusters(), BTreeMap::from([("a".into(), vec![1]), ("b".into(), vec![2])]));
    });
}

#[test]
fn p10_twice_the_same_is_twice_too_many_even_if_it_is_known() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let a = || cluster("a", json!({}));
        fixture.accepted(Kind::Cluster, vec![a()]);
        let verdict = fixture.state(Kind::Cluster, "2", vec![a(), a()]);
        let (message, _, nothing_applied) = rejected(&verdict);
        assert!(message.contains("duplicate resource") && nothing_applied, "{message}");
    });
}

#[test]
fn a_refused_update_that_is_taken_back_leaves_no_error() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        let nowhere = any::<tidegate_api::listener::Listener>(&json!({ "name": "l" }));
        assert!(matches!(fixture.state(Kind::Listener, "2", vec![nowhere]), Verdict::Reject { .. }));
        let has_error = |fixture: &Fixture| {
            let tables = fixture.tables.lock();
            tables.kind(Kind::Listener).is_some_and(|table| table.records["l"].error.is_some())
        };
        assert!(has_error(&fixture));
        fixture.accepted(Kind::Listener, vec![listener("l", 80, "a")]);
        assert!(!has_error(&fixture));
    });
}

#[test]
fn routes_and_virtual_hosts_that_are_sent_again_are_counted_and_not_read() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let body = any::<tidegate_api::listener::Listener>(&listener_json("h", 80, &[http("r")]));
        fixture.accepted(Kind::Listener, vec![body]);
        let vhds = json!({ "name": "r", "vhds": { "config_source": file("other") } });
        let with_hosts = any::<tidegate_api::route::RouteConfiguration>(&vhds);
        fixture.accepted(Kind::RouteConfiguration, vec![with_hosts.clone()]);
        let host = |cluster: &str| {
            any::<tidegate_api::route::VirtualHost>(&json!({ "name": "r/h", "domains": ["*"],
                "routes": [{ "match": { "prefix": "/" }, "route": { "cluster": cluster } }] }))
        };
        fixture.delta(Kind::VirtualHost, vec![("r/h", host("a"))], &[]);
        let listener = fixture.listener("h");
        let chosen = || {
            let crate::listener::Service::Http(http) = &listener.chains()[0].service else { panic!() };
            http.choose("10.0.0.1:80".parse().unwrap()).unwrap().0
        };
        let (rds, hosts) = (fixture.stats.rds("h", "r"), fixture.stats.vhds("h", "r"));
        let counts = || [&rds, &hosts].map(|it| (it.update_success().value(), it.config_reload().value()));
        assert_eq!(counts(), [(1, 1), (1, 1)]);
        let before = chosen();
        fixture.accepted(Kind::RouteConfiguration, vec![with_hosts.clone()]);
        fixture.delta(Kind::VirtualHost, vec![("r/h", host("a"))], &[]);
        assert!(Arc::ptr_eq(&chosen(), &before), "it is the same object");
        assert_eq!(counts(), [(2, 1), (2, 1)]);
        fixture.delta(Kind::VirtualHost, vec![("r/h", host("b"))], &[]);
        assert!(!Arc::ptr_eq(&chosen(), &before));
        assert_eq!(counts(), [(2, 2), (3, 2)]);
        // The same bytes for another source's routes are news to them.
        assert!(!fixture.store.routes.knows(&source("other"), "r", &with_hosts.value));
        assert!(!fixture.store.routes.knows_host(&source("rds"), "r/h", &host("b").value));
        // A file without it is an update, too.
        fixture.accepted(Kind::RouteConfiguration, vec![]);
        assert_eq!((rds.update_empty().value(), counts()[0]), (1, (3, 2)));
    });
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// However listeners and clusters come and go, the snapshot is what one made of the whole state would be.
    #[test]
    fn the_snapshot_is_the_state(
        steps in prop::collection::vec(
            (
                prop::collection::btree_map(0u8..5, 1u8..4, 0..5), // clusters: name, connect timeout
                prop::collection::btree_map(0u8..5, 1u16..6, 0..5), // listeners: name, port
                prop::bool::ANY, // endpoints come
            ),
            1..8,
        ),
    ) {
        local(|| {
            let mut fixture = Fixture::started(&json!({}));
            for (clusters, listeners, with_endpoints) in steps {
                let timeout = |seconds: u8| json!({ "connect_timeout": format!("{seconds}s") });
                let clusters: Vec<_> = clusters.iter().map(|(name, t)| (format!("c{name}"), *t)).collect();
                let resources = clusters.iter().map(|(name, t)| cluster(name, timeout(*t))).collect();
                fixture.state(Kind::Cluster, "1", resources);
                if with_endpoints {
                    let resources = clusters.iter().map(|(name, _)| endpoints(name, &[1])).collect();
                    fixture.state(Kind::ClusterLoadAssignment, "1", resources);
                }
                // Ports that two listeners want are refused for the second.
                let resources = listeners.iter().map(|(name, port)| listener(&format!("l{name}"), *port, "c0"));
                fixture.state(Kind::Listener, "1", resources.collect());

                let snapshot = fixture.store.snapshot(&[]);
                let names = |listeners: Vec<&Arc<Listener>>| -> BTreeMap<_, _> {
                    listeners.into_iter().map(|l| (l.config.name.to_string(), Arc::as_ptr(l))).collect()
                };
                let active = fixture.store.listeners();
                assert_eq!(names(snapshot.listeners().collect()), names(active.iter().collect()));
                for port in 1..6 {
                    let address = std::net::SocketAddr::from(([10, 0, 0, 1], port));
                    let owner = active.iter().find(|l| l.config.addresses.contains(&address));
                    assert_eq!(snapshot.owner(address).map(Arc::as_ptr), owner.map(Arc::as_ptr), "{address}");
                }
                for number in 0..5 {
                    let name = format!("c{number}");
                    let in_force = fixture.store.clusters.in_force(&name).map(Arc::as_ptr);
                    assert_eq!(snapshot.cluster(&name).map(Arc::as_ptr), in_force, "{name}");
                }
            }
        });
    }
}
