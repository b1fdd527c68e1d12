//! Clusters that need secrets.

use super::*;
use crate::config::tls::{Certificate, Provided, SecretSource, UpstreamTls, Validation};
use crate::secret::NotReady;
use crate::secret::tests::{Authority, inline};

/// Where they come from.
fn from() -> ConfigSource {
    ConfigSource { source: source("other"), initial_fetch_timeout: Some(Duration::from_mins(1)) }
}

fn wanted(name: &str) -> SecretSource {
    SecretSource { name: name.into(), config: from() }
}

/// TLS with a certificate and a CA from SDS.
pub(super) fn tls() -> UpstreamTls {
    UpstreamTls {
        sni: None,
        auto_sni_san_validation: false,
        certificate: Some(Provided::Secret(wanted("own"))),
        validation: Validation::default(),
        validation_secret: Some(wanted("ca")),
        alpn_protocols: vec![],
        tls12: true,
        tls13: true,
    }
}

/// A cluster with TLS. The bootstrap has such clusters only for control planes; where one comes from does not matter here.
pub(super) fn secure(name: &str, tls: Option<UpstreamTls>) -> Cluster {
    let address = crate::config::endpoint::EndpointAddress::Ip(([127, 0, 0, 1], 1).into());
    let config = crate::cluster::tests::config(name, crate::config::cluster::Discovery::Static, &[address]);
    Cluster { tls: tls.map(Arc::new), ..config }
}

pub(super) fn certificate(name: &str, (chain, key): (&str, &str)) -> Any {
    any::<tidegate_api::tls::Secret>(&json!({ "name": name, "tls_certificate": {
        "certificate_chain": { "inline_string": chain }, "private_key": { "inline_string": key } } }))
}

pub(super) fn authority(name: &str, pem: &str) -> Any {
    any::<tidegate_api::tls::Secret>(
        &json!({ "name": name, "validation_context": { "trusted_ca": { "inline_string": pem } } }),
    )
}

impl Fixture {
    pub(super) fn add(&mut self, config: Cluster, content: u64) {
        self.store.add_cluster(config, content, Origin::Dynamic);
        let changes = self.store.settle();
        self.changes.push(changes);
    }

    /// Whether a handshake could begin, and why not.
    fn ready(&self, cluster: &str) -> Result<(), String> {
        let snapshot = self.store.snapshot(&[]);
        let cluster = snapshot.cluster(cluster).ok_or("it is not in force")?;
        let credentials = cluster.credentials().ok_or("it has none")?;
        credentials.current().map(drop).map_err(|error: NotReady| error.to_string())
    }

    pub(super) fn stat(&self, name: &str) -> Option<u64> {
        let blocks = self.stats.blocks();
        blocks.iter().find_map(|block| {
            let name = name.strip_prefix(&block.scope())?;
            let stat = block.layout().stats.iter().find(|stat| stat.name == name)?;
            Some(block.value(stat))
        })
    }

    /// Waits until a replaced file was noticed.
    async fn renamed(&mut self) {
        loop {
            let happened = self.store.next().await;
            let is_it = matches!(happened, Happened::Files(_));
            self.store.handle(happened);
            if is_it {
                return;
            }
        }
    }

    fn secrets(&self) -> Vec<String> {
        let tables = self.tables.lock();
        let records = tables.kind(Kind::Secret).map(|table| table.records.keys());
        records.into_iter().flatten().map(ToString::to_string).collect()
    }
}

#[test]
fn p39_a_cluster_warms_until_all_its_secrets_came() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        fixture.add(secure("s", Some(tls())), 1);
        let mut waiting = fixture.store.unready().into_iter().find(|(kind, _)| *kind == "secrets").unwrap().1;
        waiting.sort();
        assert_eq!(waiting, ["ca", "own"]);
        assert_eq!(fixture.ready("s").unwrap_err(), "it is not in force");
        fixture.accepted(Kind::Secret, vec![certificate("own", (&chain, &key))]);
        assert_eq!(fixture.ready("s").unwrap_err(), "it is not in force", "the CA is missing");
        fixture.accepted(Kind::Secret, vec![authority("ca", &ca.pem())]);
        assert_eq!(fixture.ready("s"), Ok(()));
        assert!(fixture.changes.last().unwrap().clusters, "to be published");
        assert_eq!(fixture.store.unready(), []);
        // One more that wants the same has it at once.
        fixture.add(secure("t", Some(tls())), 1);
        assert_eq!(fixture.ready("t"), Ok(()));
        assert_eq!(fixture.stat("sds.own.update_success"), Some(1));
    });
}

#[test]
fn p39_silence_ends_the_wait_and_a_late_secret_counts() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        fixture.add(secure("s", Some(tls())), 1);
        fixture.accepted(Kind::Secret, vec![authority("ca", &ca.pem())]);
        for Reverse((_, deadline)) in std::mem::take(&mut fixture.store.deadlines) {
            fixture.store.deadlines.push(Reverse((Instant::now(), deadline))); // as if its time had come
        }
        fixture.store.handle(Happened::Deadline);
        let missing = fixture.ready("s").unwrap_err();
        assert_eq!(missing, "waiting for the secret 'own', which SDS has not brought yet");
        assert_eq!(
            (fixture.stat("sds.own.init_fetch_timeout"), fixture.stat("sds.ca.init_fetch_timeout")),
            (Some(1), Some(0))
        );
        fixture.accepted(Kind::Secret, vec![certificate("own", (&chain, &key))]);
        assert_eq!(fixture.ready("s"), Ok(()));
    });
}

#[test]
fn p40_a_bad_secret_is_refused_alone_and_changes_nothing() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        let (_, other_key) = ca.issue(&["b"]);
        fixture.add(secure("s", Some(tls())), 1);
        let bad = certificate("own", (&chain, &other_key));
        let verdict = fixture.state(Kind::Secret, "1", vec![bad.clone(), authority("ca", &ca.pem())]);
        let (message, rejected_names, nothing) = rejected(&verdict);
        assert!(message.starts_with("own: ") && message.contains("it is not the key"), "{message}");
        assert_eq!((rejected_names, nothing), (vec!["own"], false));
        // The wait is over, as in Envoy; without the secret nobody is connected to.
        assert!(fixture.ready("s").unwrap_err().starts_with("waiting for the secret 'own'"));
        fixture.accepted(Kind::Secret, vec![certificate("own", (&chain, &key))]);
        assert_eq!(fixture.ready("s"), Ok(()));
        fixture.state(Kind::Secret, "3", vec![bad]);
        assert_eq!(fixture.ready("s"), Ok(()));
        let tables = fixture.tables.lock();
        let record = &tables.kind(Kind::Secret).unwrap().records["own"];
        assert_eq!(&*record.active.as_ref().unwrap().version, "1");
        assert_eq!(&*record.error.as_ref().unwrap().version, "3");
        drop(tables);
        assert_eq!(fixture.stat("sds.own.update_rejected"), Some(2));
        // It is for something else than what it is.
        let verdict = fixture.state(Kind::Secret, "4", vec![authority("own", &ca.pem())]);
        assert!(rejected(&verdict).0.contains("wanted as a tls_certificate (by cluster 's')"), "{verdict:?}");
        // Whom to trust would be missing.
        let empty = any::<tidegate_api::tls::Secret>(&json!({ "name": "ca", "validation_context": {} }));
        let verdict = fixture.state(Kind::Secret, "5", vec![empty]);
        assert!(rejected(&verdict).0.contains("ca: it has no trusted_ca"), "{verdict:?}");
        assert_eq!(fixture.ready("s"), Ok(()));
        // Removal means nothing, as in Envoy.
        fixture.delta(Kind::Secret, vec![], &["own", "ca"]);
        assert_eq!(fixture.ready("s"), Ok(()));
    });
}

#[test]
fn p57_a_secret_is_wanted_as_long_as_anybody_wants_it() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        fixture.add(secure("s", Some(tls())), 1);
        fixture.add(secure("t", Some(tls())), 1);
        assert_eq!(
            (fixture.stat("sds.own.update_attempt"), fixture.secrets()),
            (Some(0), vec!["ca".into(), "own".into()]), // a file counts when it is read
        );
        let own = certificate("own", (&chain, &key));
        fixture.accepted(Kind::Secret, vec![own.clone(), authority("ca", &ca.pem())]);
        fixture.delta(Kind::Cluster, vec![], &["s"]);
        assert_eq!((fixture.ready("t"), fixture.secrets().len()), (Ok(()), 2));
        // Another version wants the same, but does not wait as long.
        let mut patient = tls();
        patient.validation_secret.as_mut().unwrap().config.initial_fetch_timeout = None;
        fixture.add(secure("t", Some(patient)), 4);
        assert_eq!((fixture.ready("t"), fixture.secrets().len()), (Ok(()), 2));
        // Another version wants the CA only, and then nothing.
        let own_certificate = Provided::Here(Certificate {
            chain: inline(&chain),
            private_key: inline(&key),
            watched_directories: vec![],
        });
        fixture.add(secure("t", Some(UpstreamTls { certificate: Some(own_certificate), ..tls() })), 2);
        assert_eq!((fixture.ready("t"), fixture.secrets()), (Ok(()), vec!["ca".into()]));
        assert_eq!(fixture.stat("sds.own.update_attempt"), None);
        fixture.add(secure("t", None), 3);
        assert_eq!((fixture.secrets(), fixture.stat("sds.ca.update_attempt")), (vec![], None));
        // What still comes is for nobody.
        fixture.accepted(Kind::Secret, vec![own]);
        assert_eq!(fixture.secrets(), Vec::<String>::new());
    });
}

#[test]
fn a_secret_that_is_sent_again_is_counted_and_not_read() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        let own = || certificate("own", (&chain, &key));
        let all = || vec![own(), authority("ca", &ca.pem())];
        fixture.add(secure("s", Some(tls())), 1);
        fixture.accepted(Kind::Secret, all());
        let published = |fixture: &Fixture| fixture.stats.client_tls("s").ssl_context_update_by_sds().value();
        assert_eq!((published(&fixture), fixture.stat("sds.own.update_success")), (2, Some(1)));
        let knows = |fixture: &Fixture| fixture.store.secrets.knows(&source("other"), "own", &own().value);
        assert!(knows(&fixture));
        fixture.accepted(Kind::Secret, all());
        assert_eq!((published(&fixture), fixture.stat("sds.own.update_success")), (2, Some(2)));
        // What is refused is not what is in use: the one before takes its place again.
        let bad = certificate("own", (&chain, "no key"));
        assert!(matches!(fixture.state(Kind::Secret, "3", vec![bad]), Verdict::Reject { .. }));
        let has_error = |fixture: &Fixture| {
            fixture.tables.lock().kind(Kind::Secret).unwrap().records["own"].error.is_some()
        };
        assert!(has_error(&fixture));
        fixture.accepted(Kind::Secret, all());
        assert!(!has_error(&fixture) && knows(&fixture));
        assert_eq!(fixture.stat("sds.own.update_success"), Some(3));
        // The files of one that has some are read each time.
        let files = any::<tidegate_api::tls::Secret>(&json!({ "name": "ca",
            "validation_context": { "trusted_ca": { "filename": "/nonexistent/ca.pem" } } }));
        assert!(matches!(fixture.state(Kind::Secret, "4", vec![files]), Verdict::Reject { .. }));
        assert!(!fixture.store.secrets.knows(&source("other"), "ca", &authority("ca", &ca.pem()).value));
    });
}

#[test]
fn a_name_that_two_sources_have_is_two_secrets() {
    local(|| {
        let (ca, mut fixture) = (Authority::new(), Fixture::started(&json!({})));
        let (chain, key) = ca.issue(&["a"]);
        let mut elsewhere = tls();
        let config = ConfigSource { source: source("elsewhere"), initial_fetch_timeout: None };
        elsewhere.certificate =
            Some(Provided::Secret(SecretSource { name: "own".into(), config: config.clone() }));
        fixture.add(secure("s", Some(tls())), 1);
        fixture.add(secure("t", Some(elsewhere)), 1);
        let keys = fixture.secrets();
        assert_eq!((keys.len(), &*keys[0], &*keys[1]), (3, "ca", "own"));
        assert!(keys[2].starts_with("own\0"), "{keys:?}");
        fixture.accepted(Kind::Secret, vec![certificate("own", (&chain, &key)), authority("ca", &ca.pem())]);
        let active = |fixture: &Fixture| -> Vec<bool> {
            let tables = fixture.tables.lock();
            tables.kind(Kind::Secret).unwrap().records.values().map(|it| it.active.is_some()).collect()
        };
        assert_eq!(active(&fixture), [true, true, false], "what comes is from one source");
        assert_eq!((fixture.ready("s"), fixture.ready("t")), (Ok(()), Err("it is not in force".into())));
        // It goes with its user, and the other stays.
        fixture.delta(Kind::Cluster, vec![], &["s"]);
        assert_eq!(fixture.secrets(), ["ca", &keys[2]]);
    });
}

#[test]
fn a_secret_is_asked_for_when_its_server_can_be_reached() {
    local(|| {
        let mut fixture = Fixture::started(&json!({}));
        let api = crate::config::config_source::ApiSource {
            protocol: crate::config::config_source::Protocol::Grpc,
            cluster: "sds".into(),
            authority: None,
            initial_metadata: vec![],
            set_node_on_first_message_only: false,
            rate_limit: None,
            refresh_delay: Duration::ZERO,
            request_timeout: Duration::from_secs(1),
        };
        let config = ConfigSource { source: Source::Api(Arc::new(api)), ..from() };
        let own = Provided::Secret(SecretSource { name: "own".into(), config });
        fixture.add(secure("s", Some(UpstreamTls { certificate: Some(own), ..tls() })), 1);
        assert_eq!(fixture.stat("sds.own.update_attempt"), Some(0));
        fixture.delta(Kind::Cluster, vec![("sds", cluster("sds", json!({})))], &[]);
        assert_eq!(fixture.stat("sds.own.update_attempt"), Some(0), "it has no endpoints");
        fixture.accepted(Kind::ClusterLoadAssignment, vec![endpoints("sds", &[1])]);
        assert_eq!(fixture.stat("sds.own.update_attempt"), Some(1));
    });
}

#[tokio::test]
async fn files_that_are_replaced_are_read_again() {
    let dir = tempfile::tempdir().unwrap();
    let put = |name: &str, text: &str| {
        std::fs::write(dir.path().join("new"), text).unwrap();
        std::fs::rename(dir.path().join("new"), dir.path().join(name)).unwrap();
    };
    let ca = Authority::new();
    let tasks = tokio::task::LocalSet::new();
    tasks
        .run_until(async {
            let mut fixture = Fixture::started(&json!({}));
            let only_ca = UpstreamTls { certificate: None, ..tls() };
            fixture.add(secure("s", Some(only_ca)), 1);
            let secret = any::<tidegate_api::tls::Secret>(&json!({ "name": "ca", "validation_context": {
                "trusted_ca": { "filename": dir.path().join("ca.pem") } } }));
            // There is no file yet: refused, and taken when there is one.
            let verdict = fixture.state(Kind::Secret, "1", vec![secret]);
            assert!(rejected(&verdict).0.contains("trusted_ca can't be read from /"), "{verdict:?}");
            assert!(fixture.ready("s").is_err());
            put("ca.pem", &ca.pem());
            fixture.renamed().await;
            assert_eq!(fixture.ready("s"), Ok(()));
            assert!(fixture.tables.lock().kind(Kind::Secret).unwrap().records["ca"].error.is_none());
            // Junk is not taken.
            put("ca.pem", "junk");
            fixture.renamed().await;
            assert_eq!(fixture.ready("s"), Ok(()));
            assert_eq!(fixture.stat("sds.ca.key_rotation_failed"), Some(1));
            put("ca.pem", &Authority::new().pem());
            fixture.renamed().await;
            let updates = fixture.stat("cluster.s.client_ssl_socket_factory.ssl_context_update_by_sds");
            assert_eq!(updates, Some(2));
        })
        .await;
}
