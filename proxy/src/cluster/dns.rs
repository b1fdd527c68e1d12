//! STRICT_DNS: every address that the names of a cluster resolve to is an endpoint.
//!
//! Runs on the main thread. Each name is looked up every `dns_refresh_rate`, or when its records expire with
//! `respect_dns_ttl`. An answer without addresses (the name or the record type does not exist) removes the name's
//! endpoints; a failed look-up (no answer, SERVFAIL, …) keeps what was known. An answer with the same
//! addresses in another order is no change.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, SystemTime};

use hickory_resolver::config::{ConnectionConfig, NameServerConfig, ResolveHosts, ResolverConfig};
use hickory_resolver::lookup::Lookup;
use hickory_resolver::net::NetError;
use hickory_resolver::net::runtime::TokioRuntimeProvider;
use hickory_resolver::{Hosts, ResolverBuilder, TokioResolver};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::Cluster;
use crate::config::cluster::{Discovery, LookupFamily};
use crate::config::endpoint::EndpointAddress;

/// Records that expire at once (or in less than this) would make the resolver spin.
const MIN_TTL: Duration = Duration::from_secs(1);

/// The system's settings can't be used.
#[derive(Debug, thiserror::Error)]
#[error(
    "can't use the DNS settings of /etc/resolv.conf: {0} (STRICT_DNS clusters need at least one `nameserver` line there)"
)]
pub struct ResolverError(#[source] NetError);

/// Looks names up. Shared by all clusters; nothing is cached, since each name has its own schedule.
#[derive(Debug)]
pub struct Resolver {
    dns: TokioResolver,
    hosts_file: PathBuf,
    /// What the hosts file said, and when it was last changed then.
    hosts: Mutex<(Option<SystemTime>, Arc<Hosts>)>,
}

/// What a look-up gave: addresses, and how long they may be kept.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    addresses: BTreeSet<IpAddr>,
    ttl: Option<Duration>,
}

impl Resolver {
    /// With the name servers and search domains of `/etc/resolv.conf`, and `/etc/hosts`.
    pub fn from_system() -> Result<Self, ResolverError> {
        let builder = TokioResolver::builder_tokio().map_err(ResolverError)?;
        Self::build(builder, "/etc/hosts".into())
    }

    /// With one name server and a hosts file.
    pub fn with_name_server(server: SocketAddr, hosts_file: PathBuf) -> Result<Self, ResolverError> {
        let at_port = |mut connection: ConnectionConfig| {
            connection.port = server.port();
            connection
        };
        let connections = vec![at_port(ConnectionConfig::udp()), at_port(ConnectionConfig::tcp())];
        let server = NameServerConfig::new(server.ip(), true, connections);
        let config = ResolverConfig::from_parts(None, Vec::new(), vec![server]);
        let builder = TokioResolver::builder_with_config(config, TokioRuntimeProvider::default());
        Self::build(builder, hosts_file)
    }

    fn build(
        mut builder: ResolverBuilder<TokioRuntimeProvider>,
        hosts_file: PathBuf,
    ) -> Result<Self, ResolverError> {
        let options = builder.options_mut();
        options.cache_size = 0;
        // Read here, so that changes are seen.
        options.use_hosts_file = ResolveHosts::Never;
        let dns = builder.build().map_err(ResolverError)?;
        Ok(Self { dns, hosts_file, hosts: Mutex::default() })
    }

    /// The addresses of a name.
    async fn resolve(&self, name: &str, family: LookupFamily) -> Result<Answer, NetError> {
        let mut dns = self.dns.clone();
        dns.set_hosts(self.current_hosts());
        let v4 = async || answer(dns.ipv4_lookup(name).await);
        let v6 = async || answer(dns.ipv6_lookup(name).await);
        match family {
            LookupFamily::V4Only => v4().await,
            LookupFamily::V6Only => v6().await,
            LookupFamily::Auto => match v6().await {
                Ok(answer) if !answer.addresses.is_empty() => Ok(answer),
                _ => v4().await,
            },
            LookupFamily::V4Preferred => match v4().await {
                Ok(answer) if !answer.addresses.is_empty() => Ok(answer),
                _ => v6().await,
            },
            LookupFamily::All => either(tokio::join!(v4(), v6())),
        }
    }

    /// The hosts file as it is now; read again only when it was changed.
    fn current_hosts(&self) -> Arc<Hosts> {
        let changed = fs::metadata(&self.hosts_file).and_then(|metadata| metadata.modified()).ok();
        let mut known = lock(&self.hosts);
        if known.0 != changed {
            let mut hosts = Hosts::default();
            if let Err(error) = fs::File::open(&self.hosts_file).and_then(|file| hosts.read_hosts_conf(file))
            {
                tracing::warn!(file = %self.hosts_file.display(), %error, "hosts file is not readable");
            }
            *known = (changed, Arc::new(hosts));
        }
        Arc::clone(&known.1)
    }
}

fn answer(lookup: Result<Lookup, NetError>) -> Result<Answer, NetError> {
    let lookup = match lookup {
        Ok(lookup) => lookup,
        Err(error) if error.is_no_records_found() => {
            return Ok(Answer { addresses: BTreeSet::new(), ttl: None });
        }
        Err(error) => return Err(error),
    };
    let answers = lookup.answers();
    let ttl = answers.iter().map(|record| Duration::from_secs(u64::from(record.ttl))).min();
    Ok(Answer { addresses: answers.iter().filter_map(|record| record.data.ip_addr()).collect(), ttl })
}

/// Both families. One that failed must not take the other's addresses away, nor may half an answer replace them.
fn either(answers: (Result<Answer, NetError>, Result<Answer, NetError>)) -> Result<Answer, NetError> {
    match answers {
        (Ok(mut a), Ok(b)) => {
            a.addresses.extend(b.addresses);
            a.ttl = a.ttl.into_iter().chain(b.ttl).min();
            Ok(a)
        }
        (Ok(some), Err(_)) | (Err(_), Ok(some)) if !some.addresses.is_empty() => Ok(some),
        (_, Err(error)) | (Err(error), _) => Err(error),
    }
}

/// What is known of a cluster's names.
type Known = BTreeMap<Arc<str>, BTreeSet<IpAddr>>;

/// Keeps the endpoints of one STRICT_DNS cluster up to date until it is dropped. Held by the main thread as
/// long as the cluster is in force.
#[derive(Debug)]
pub struct Watch {
    known: Arc<Mutex<Known>>,
    /// Names that were not looked up yet.
    unresolved: watch::Receiver<usize>,
    _tasks: JoinSet<()>,
}

impl Watch {
    /// Starts looking up the names of a cluster. Does nothing for clusters of other types.
    ///
    /// `previous` is the watch of the cluster that this one replaces: what it knows of names that both have holds
    /// until they are looked up again. Must be called within a tokio runtime.
    pub fn start(cluster: &Arc<Cluster>, resolver: &Arc<Resolver>, previous: Option<&Self>) -> Self {
        let names = names_of(cluster);
        let mut known = previous.map(|watch| lock(&watch.known).clone()).unwrap_or_default();
        known.retain(|name, _| names.contains(name));
        if !known.is_empty() {
            apply(cluster, &known);
        }
        let known = Arc::new(Mutex::new(known));
        let (left, unresolved) = watch::channel(names.len());
        let mut tasks = JoinSet::new();
        for name in names {
            let (cluster, resolver) = (Arc::clone(cluster), Arc::clone(resolver));
            tasks.spawn(keep(name, cluster, resolver, Arc::clone(&known), left.clone()));
        }
        Self { known, unresolved, _tasks: tasks }
    }

    /// Completes when every name was looked up once, with or without success.
    pub fn warmed(&self) -> impl Future<Output = ()> + use<> {
        let mut unresolved = self.unresolved.clone();
        async move {
            // An error means that nothing is left that could be waited for.
            let _ = unresolved.wait_for(|left| *left == 0).await;
        }
    }
}

fn names_of(cluster: &Cluster) -> BTreeSet<Arc<str>> {
    if cluster.config().discovery != Discovery::StrictDns {
        return BTreeSet::new();
    }
    let groups = &cluster.config().load_assignment.localities;
    let endpoints = groups.iter().flat_map(|group| &group.endpoints);
    endpoints
        .filter_map(|endpoint| match &endpoint.address {
            EndpointAddress::Name(name, _) => Some(Arc::clone(name)),
            EndpointAddress::Ip(_) | EndpointAddress::Pipe(_) => None,
        })
        .collect()
}

fn apply(cluster: &Cluster, known: &Known) -> bool {
    cluster.set_resolved(|name, port| {
        let addresses = known.get(name).into_iter().flatten();
        addresses.map(|ip| SocketAddr::new(*ip, port)).collect()
    })
}

/// Looks one name up for ever.
async fn keep(
    name: Arc<str>,
    cluster: Arc<Cluster>,
    resolver: Arc<Resolver>,
    known: Arc<Mutex<Known>>,
    left: watch::Sender<usize>,
) {
    let dns = cluster.config().dns;
    let stats = cluster.stats();
    let mut first = true;
    let mut failing = false;
    loop {
        stats.update_attempt().inc();
        let mut wait = dns.refresh_rate;
        match resolver.resolve(&name, dns.lookup_family).await {
            Ok(answer) => {
                stats.update_success().inc();
                if let Some(ttl) = answer.ttl.filter(|ttl| dns.respect_ttl && !ttl.is_zero()) {
                    wait = ttl.max(MIN_TTL);
                }
                // Locked until the endpoints are replaced, so that names resolved at the same time don't
                // overwrite each other.
                let mut known = lock(&known);
                known.insert(Arc::clone(&name), answer.addresses);
                if !apply(&cluster, &known) {
                    stats.update_no_rebuild().inc();
                }
                failing = false;
            }
            Err(error) => {
                stats.update_failure().inc();
                if !failing {
                    let cluster = cluster.name();
                    tracing::warn!(%cluster, %name, %error, "DNS look-up failed; what was known holds");
                }
                failing = true;
            }
        }
        if std::mem::take(&mut first) {
            left.send_modify(|left| *left -= 1);
        }
        tokio::time::sleep(wait).await;
    }
}

/// What is locked is consistent after every statement, so a panic meanwhile spoils nothing.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use tokio::net::UdpSocket;

    use super::super::tests::config;
    use super::*;
    use crate::stats::Stats;

    /// What the server answers to A and AAAA questions.
    #[derive(Clone, Debug, Default)]
    struct Zone {
        code: u8,
        silent: bool,
        ttl: u32,
        addresses: Vec<IpAddr>,
    }

    /// A DNS server on loopback, speaking just enough of RFC 1035.
    struct Server {
        address: SocketAddr,
        zone: Arc<Mutex<Zone>>,
        questions: Arc<AtomicUsize>,
        _task: JoinSet<()>,
    }

    impl Server {
        async fn start(addresses: &[&str]) -> Self {
            let socket = UdpSocket::bind("127.0.0.1:0").await.unwrap();
            let address = socket.local_addr().unwrap();
            let zone = Arc::new(Mutex::new(Zone { ttl: 60, ..Zone::default() }));
            let questions = Arc::new(AtomicUsize::new(0));
            let mut task = JoinSet::new();
            task.spawn(serve(socket, Arc::clone(&zone), Arc::clone(&questions)));
            let server = Self { address, zone, questions, _task: task };
            server.has(addresses);
            server
        }

        fn has(&self, addresses: &[&str]) {
            lock(&self.zone).addresses = addresses.iter().map(|ip| ip.parse().unwrap()).collect();
        }

        fn change(&self, change: impl FnOnce(&mut Zone)) {
            change(&mut lock(&self.zone));
        }
    }

    async fn serve(socket: UdpSocket, zone: Arc<Mutex<Zone>>, questions: Arc<AtomicUsize>) {
        let mut buffer = [0; 512];
        loop {
            let (len, peer) = socket.recv_from(&mut buffer).await.unwrap();
            questions.fetch_add(1, Ordering::Relaxed);
            let zone = lock(&zone).clone();
            if !zone.silent {
                socket.send_to(&reply(&buffer[..len], &zone), peer).await.unwrap();
            }
        }
    }

    fn reply(question: &[u8], zone: &Zone) -> Vec<u8> {
        let mut end = 12;
        while question[end] != 0 {
            end += usize::from(question[end]) + 1;
        }
        let kind = u16::from_be_bytes([question[end + 1], question[end + 2]]);
        let records: Vec<Vec<u8>> = zone
            .addresses
            .iter()
            .filter_map(|ip| match ip {
                IpAddr::V4(ip) if kind == 1 => Some(ip.octets().to_vec()),
                IpAddr::V6(ip) if kind == 28 => Some(ip.octets().to_vec()),
                _ => None,
            })
            .collect();
        let mut reply = question[..2].to_vec();
        reply.extend([0x81, 0x80 | zone.code, 0, 1, 0, records.len() as u8, 0, 0, 0, 0]);
        reply.extend(&question[12..end + 5]);
        for record in records {
            reply.extend([0xc0, 12]);
            reply.extend(kind.to_be_bytes());
            reply.extend([0, 1]);
            reply.extend(zone.ttl.to_be_bytes());
            reply.extend((record.len() as u16).to_be_bytes());
            reply.extend(record);
        }
        reply
    }

    struct Fixture {
        server: Server,
        resolver: Arc<Resolver>,
        hosts: tempfile::NamedTempFile,
        stats: Arc<Stats>,
    }

    impl Fixture {
        async fn new(addresses: &[&str]) -> Self {
            let server = Server::start(addresses).await;
            let hosts = tempfile::NamedTempFile::new().unwrap();
            let resolver = Resolver::with_name_server(server.address, hosts.path().into()).unwrap();
            Self { server, resolver: Arc::new(resolver), hosts, stats: Stats::new(1) }
        }

        fn cluster(&self, family: LookupFamily, names: &[(&str, u16)]) -> Arc<Cluster> {
            let addresses: Vec<_> =
                names.iter().map(|(name, port)| EndpointAddress::Name((*name).into(), *port)).collect();
            let mut config = config("dns", Discovery::StrictDns, &addresses);
            config.dns.refresh_rate = Duration::from_millis(20);
            config.dns.lookup_family = family;
            Cluster::build(Arc::new(config), &self.stats, None)
        }

        async fn warm(&self, cluster: &Arc<Cluster>) -> Watch {
            let watch = Watch::start(cluster, &self.resolver, None);
            tokio::time::timeout(Duration::from_secs(30), watch.warmed()).await.expect("the cluster warms");
            watch
        }
    }

    fn addresses(cluster: &Cluster) -> Vec<String> {
        cluster.endpoints().iter().map(|endpoint| endpoint.address().to_string()).collect()
    }

    async fn until(what: &str, condition: impl Fn() -> bool) {
        let wait = async {
            while !condition() {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(30), wait).await.unwrap_or_else(|_| panic!("never: {what}"));
    }

    #[tokio::test]
    async fn endpoints_follow_the_answers() {
        let fixture = Fixture::new(&["10.0.0.2", "10.0.0.1"]).await;
        let cluster = fixture.cluster(LookupFamily::V4Only, &[("foo.test.", 80), ("foo.test.", 81)]);
        let watch = fixture.warm(&cluster).await;
        assert_eq!(addresses(&cluster), ["10.0.0.1:80", "10.0.0.2:80", "10.0.0.1:81", "10.0.0.2:81"]);
        assert_eq!(&*cluster.endpoints()[0].hostname, "foo.test.");
        let stats = cluster.stats();
        until("no rebuild", || stats.update_no_rebuild().value() >= 3).await;
        assert_eq!(stats.membership_change().value(), 1);

        let _active = cluster.endpoints()[1].host.connecting();
        fixture.server.has(&["10.0.0.2", "10.0.0.3"]);
        until("the new address", || addresses(&cluster)[..2] == ["10.0.0.2:80", "10.0.0.3:80"]).await;
        assert_eq!(cluster.endpoints()[0].host.cx_active(), 1, "the host that stays keeps its state");

        // The same addresses in another order are no change.
        let version = cluster.hosts().version();
        fixture.server.has(&["10.0.0.3", "10.0.0.2"]);
        let asked = stats.update_success().value();
        until("two more look-ups", || stats.update_success().value() >= asked + 2).await;
        assert_eq!(cluster.hosts().version(), version);
        drop(watch);
    }

    #[tokio::test]
    async fn no_addresses_empty_the_cluster_and_failures_keep_it() {
        let fixture = Fixture::new(&["10.0.0.1"]).await;
        let cluster = fixture.cluster(LookupFamily::Auto, &[("foo.test.", 80)]);
        let _watch = fixture.warm(&cluster).await;
        let stats = cluster.stats();
        for code in [2, 5] {
            let failed = stats.update_failure().value();
            fixture.server.change(|zone| zone.code = code);
            until("failures", || stats.update_failure().value() >= failed + 2).await;
            assert_eq!(addresses(&cluster), ["10.0.0.1:80"], "response code {code}");
        }
        // NXDOMAIN, then a name without addresses.
        for code in [3, 0] {
            fixture.server.change(|zone| (zone.code, zone.addresses) = (code, vec![]));
            until("an empty cluster", || addresses(&cluster).is_empty()).await;
            fixture
                .server
                .change(|zone| (zone.code, zone.addresses) = (0, vec!["10.0.0.1".parse().unwrap()]));
            until("the address", || addresses(&cluster) == ["10.0.0.1:80"]).await;
        }
    }

    #[tokio::test]
    async fn address_families() {
        let fixture = Fixture::new(&["10.0.0.1", "2001:db8::1"]).await;
        let (v4, v6) = ("10.0.0.1:80", "[2001:db8::1]:80");
        for (family, expected) in [
            (LookupFamily::Auto, vec![v6]),
            (LookupFamily::V4Preferred, vec![v4]),
            (LookupFamily::V4Only, vec![v4]),
            (LookupFamily::V6Only, vec![v6]),
            (LookupFamily::All, vec![v4, v6]),
        ] {
            let cluster = fixture.cluster(family, &[("foo.test.", 80)]);
            let _watch = fixture.warm(&cluster).await;
            assert_eq!(addresses(&cluster), expected, "{family:?}");
        }
        fixture.server.has(&["10.0.0.1"]);
        let cluster = fixture.cluster(LookupFamily::Auto, &[("foo.test.", 80)]);
        let _watch = fixture.warm(&cluster).await;
        assert_eq!(addresses(&cluster), [v4], "Auto falls back to IPv4");
    }

    #[tokio::test]
    async fn hosts_file_and_localhost_need_no_server() {
        let mut fixture = Fixture::new(&[]).await;
        fixture.server.change(|zone| zone.silent = true);
        writeln!(fixture.hosts, "10.9.8.7 db.example").unwrap();
        let cluster = fixture.cluster(LookupFamily::V4Only, &[("db.example", 80), ("localhost", 81)]);
        let watch = fixture.warm(&cluster).await;
        assert_eq!(addresses(&cluster), ["10.9.8.7:80", "127.0.0.1:81"]);
        assert_eq!(fixture.server.questions.load(Ordering::Relaxed), 0);
        // Seen by a changed time, so make sure that it differs.
        let later = SystemTime::now() + Duration::from_secs(10);
        writeln!(fixture.hosts, "10.9.8.8 db.example").unwrap();
        fixture.hosts.as_file().set_modified(later).unwrap();
        until("the new entry", || addresses(&cluster).contains(&"10.9.8.8:80".to_owned())).await;
        drop(watch);
    }

    #[tokio::test]
    async fn records_are_kept_for_their_ttl_when_asked_to() {
        let fixture = Fixture::new(&["10.0.0.1"]).await;
        let mut config =
            config("dns", Discovery::StrictDns, &[EndpointAddress::Name("foo.test.".into(), 80)]);
        config.dns.refresh_rate = Duration::from_millis(1);
        config.dns.respect_ttl = true;
        config.dns.lookup_family = LookupFamily::V4Only;
        let cluster = Cluster::build(Arc::new(config), &fixture.stats, None);
        let _watch = fixture.warm(&cluster).await;
        // The refresh rate alone would ask some 300 times.
        tokio::time::sleep(Duration::from_millis(300)).await;
        assert_eq!(fixture.server.questions.load(Ordering::Relaxed), 1, "the TTL is 60 s");
    }

    #[tokio::test]
    async fn a_successor_starts_with_what_was_known() {
        let fixture = Fixture::new(&["10.0.0.1"]).await;
        let old = fixture.cluster(LookupFamily::V4Only, &[("foo.test.", 80)]);
        let watch = fixture.warm(&old).await;
        fixture.server.change(|zone| zone.silent = true);
        let mut config =
            config("dns", Discovery::StrictDns, &[EndpointAddress::Name("foo.test.".into(), 443)]);
        config.dns.lookup_family = LookupFamily::V4Only;
        let new = Cluster::build(Arc::new(config), &fixture.stats, Some(&old));
        let _watch = Watch::start(&new, &fixture.resolver, Some(&watch));
        assert_eq!(addresses(&new), ["10.0.0.1:443"]);
    }

    #[tokio::test]
    async fn clusters_of_other_types_are_warm_at_once() {
        let fixture = Fixture::new(&[]).await;
        let cluster = Cluster::build(Arc::new(config("s", Discovery::Static, &[])), &fixture.stats, None);
        fixture.warm(&cluster).await;
        let literal = [EndpointAddress::Ip("10.0.0.5:80".parse().unwrap())];
        let cluster =
            Cluster::build(Arc::new(config("d", Discovery::StrictDns, &literal)), &fixture.stats, None);
        fixture.warm(&cluster).await;
        assert_eq!(
            (addresses(&cluster), &*cluster.endpoints()[0].hostname),
            (vec!["10.0.0.5:80".into()], "10.0.0.5")
        );
        assert_eq!(fixture.server.questions.load(Ordering::Relaxed), 0);
    }
}
