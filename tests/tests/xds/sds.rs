//! Secrets: fetched, validated, waited for, rotated and shown, for TLS to control planes.

use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tidegate_api::tls::Secret;
use tidegate_api::wkt::Any;
use tidegate_tests::config::{self, socket_address, tcp_proxy};
use tidegate_tests::control_plane::resource::{self, Transport, http2};
use tidegate_tests::control_plane::{
    Authority, ControlPlane, Identity, Kind, Method, Served, Stream, delta_response, response, wrapped,
    write_atomically,
};
use tidegate_tests::proxy::{PATIENCE, Proxy, Setup};
use tidegate_tests::run::TempDir;

use crate::world::{LISTENER, World, with_log};

/// Name of the server, in its certificate.
const SERVER: &str = "istiod.istio-system.svc";
/// The cluster that needs secrets.
const SECURE: &str = "secure";

/// Who is who.
struct Pki {
    authority: Authority,
    /// The proxy's certificates, one after the other.
    first: Identity,
    second: Identity,
}

impl Pki {
    fn new() -> Result<Self> {
        let authority = Authority::new()?;
        let [first, second] =
            [1, 2].map(|n| authority.issue(&[&format!("spiffe://cluster.local/ns/foo/sa/{n}")]));
        Ok(Self { first: first?, second: second?, authority })
    }

    /// A server that asks for a certificate of this authority.
    fn server(&self) -> Result<Identity> {
        Ok(self.authority.issue(&[SERVER])?.for_known_clients())
    }

    /// A control plane that only talks to those who have a certificate.
    fn plane(&self, world: &World) -> Result<ControlPlane> {
        ControlPlane::start_tls(Some(&world.netns), self.server()?)
    }
}

pub(crate) fn certificate(name: &str, chain: &str, key: &str) -> Result<Secret> {
    resource::from_json(&json!({"name": name, "tls_certificate": {
        "certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}}))
}

fn own(identity: &Identity) -> Result<Secret> {
    certificate("own", identity.chain_pem(), &identity.key_pem())
}

fn ca(pem: &str) -> Result<Secret> {
    resource::from_json(&json!({"name": "ca", "validation_context": {"trusted_ca": {"inline_string": pem}}}))
}

/// `UpstreamTlsContext` with this certificate, and the CA from there.
fn context(certificate: &Value, ca: &Value) -> Value {
    let mut common = json!({"combined_validation_context": {
        "default_validation_context": {
            "match_typed_subject_alt_names": [{"san_type": "DNS", "matcher": {"exact": SERVER}}]},
        "validation_context_sds_secret_config": {"name": "ca", "sds_config": ca},
    }});
    config::merge(&mut common, certificate.clone());
    json!({"transport_socket": {"name": "envoy.transport_sockets.tls", "typed_config": {
        "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.UpstreamTlsContext",
        "sni": SERVER,
        "common_tls_context": common,
    }}})
}

/// Both from the same source.
fn from(source: &Value) -> Value {
    let own = json!({"tls_certificate_sds_secret_configs": [{"name": "own", "sds_config": source}]});
    context(&own, source)
}

/// A bootstrap that takes LDS and CDS by ADS from a cluster with TLS, and more clusters.
fn bootstrap(plane: &ControlPlane, context: Value, more: Vec<Value>) -> Value {
    let mut fields = http2();
    config::merge(&mut fields, context);
    let mut clusters = vec![config::cluster(SECURE, &[&plane.address().to_string()], fields)];
    clusters.extend(more);
    json!({
        "admin": {"address": socket_address("127.0.0.1:0")},
        "node": {"id": "test-node", "cluster": "test-cluster"},
        "dynamic_resources": {
            "ads_config": {"api_type": "GRPC", "transport_api_version": "V3",
                "grpc_services": [{"envoy_grpc": {"cluster_name": SECURE}}]},
            "lds_config": resource::ads(), "cds_config": resource::ads(),
        },
        "static_resources": {"clusters": clusters},
    })
}

/// `sds_config` of a server behind the cluster `sds`.
fn from_server(api_type: &str) -> Value {
    let server = match api_type {
        "REST" => json!({"cluster_names": ["sds"], "refresh_delay": "0.05s", "request_timeout": "5s"}),
        _ => json!({"grpc_services": [{"envoy_grpc": {"cluster_name": "sds"}}]}),
    };
    let mut api = json!({"api_type": api_type, "transport_api_version": "V3"});
    config::merge(&mut api, server);
    json!({"api_config_source": api, "resource_api_version": "V3"})
}

fn sds_cluster(plane: &ControlPlane, fields: Value) -> Value {
    config::cluster("sds", &[&plane.address().to_string()], fields)
}

fn start(world: &World, bootstrap: &Value) -> Result<Proxy> {
    let mut proxy = Setup::new(&format!("{bootstrap:#}")).netns(&world.netns).spawn()?;
    proxy.wait_answering()?;
    Ok(proxy)
}

/// Gives a proxy on a scripted ADS stream a cluster and a listener.
pub(crate) fn configure(stream: &Stream) -> Result<()> {
    let cluster = resource::cluster("c", &[World::A], json!({}))?;
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    stream.request_for(Kind::Cluster)?;
    stream.send(&response(Kind::Cluster, "1", "c1", vec![cluster.packed()]));
    stream.request_for(Kind::Listener)?;
    stream.send(&response(Kind::Listener, "1", "l1", vec![listener.packed()]));
    accepted(stream, Kind::Listener)
}

/// The stream is at work: what is sent gets its answer.
fn works(stream: &Stream, nonce: &str) -> Result<()> {
    let cluster = resource::cluster("c", &[World::A], json!({}))?;
    stream.send(&response(Kind::Cluster, nonce, nonce, vec![cluster.packed()]));
    loop {
        let request = stream.request_for(Kind::Cluster)?;
        if request.response_nonce == nonce {
            ensure!(request.error_detail.is_none(), "{request:?}");
            return Ok(());
        }
    }
}

pub(crate) fn accepted(stream: &Stream, kind: Kind) -> Result<()> {
    let request = stream.request_for(kind)?;
    ensure!(request.error_detail.is_none() && request.version_info == "1", "{request:?}");
    Ok(())
}

/// Writes a file with secrets, as a control plane's response.
fn write_secrets(path: &Path, version: &str, secrets: &[&Secret]) -> Result<()> {
    let secrets = secrets.iter().map(|secret| secret.packed()).collect();
    let json = resource::to_json(&response(Kind::Secret, version, "", secrets))?;
    write_atomically(path, &serde_json::to_vec_pretty(&json)?)
}

/// One resource of `/config_dump`.
fn dumped(proxy: &Proxy, field: &str, name: &str) -> Result<Value> {
    let body = proxy.admin().read(&format!("/config_dump?resource={field}&name_regex=^{name}$"))?.body;
    let dump: Value = serde_json::from_str(&body)?;
    Ok(dump["configs"][0].clone())
}

/// No line of a key is anywhere that an operator or a control plane looks at.
fn assert_hidden(identities: &[&Identity], texts: &[&str]) {
    for identity in identities {
        let key = identity.key_pem();
        for line in key.lines().filter(|line| !line.starts_with("-----")) {
            for text in texts {
                for piece in [&line[..16], &line[line.len() - 16..]] {
                    assert!(!text.contains(piece), "a key is shown: {text}");
                }
            }
        }
    }
}

/// Everything that the proxy shows.
fn shown(proxy: &Proxy) -> Result<String> {
    let mut all = proxy.log();
    for path in ["/config_dump", "/certs", "/clusters", "/init_dump", "/stats"] {
        all += &proxy.admin().read(path)?.body;
    }
    Ok(all)
}

#[test]
fn files_rotated_by_rename() -> Result<()> {
    let (world, pki, dir) = (World::new()?, Pki::new()?, TempDir::new("sds")?);
    let mut plane = pki.plane(&world)?;
    let path = |name: &str| dir.path().join(name);
    let put = |name: &str, text: &str| write_atomically(&path(name), text.as_bytes());
    put("chain.pem", pki.first.chain_pem())?;
    put("key.pem", &pki.first.key_pem())?;
    put("ca.pem", &pki.authority.pem())?;
    let own: Secret = resource::from_json(&json!({"name": "own", "tls_certificate": {
        "certificate_chain": {"filename": path("chain.pem")}, "private_key": {"filename": path("key.pem")}}}))?;
    let ca: Secret = resource::from_json(&json!({"name": "ca", "validation_context": {
        "trusted_ca": {"filename": path("ca.pem")}}}))?;
    write_secrets(&path("own.json"), "1", &[&own])?;
    write_secrets(&path("ca.json"), "1", &[&ca])?;
    let certificate = json!({"tls_certificate_sds_secret_configs": [
        {"name": "own", "sds_config": resource::file(&path("own.json"))}]});
    let context = context(&certificate, &resource::file(&path("ca.json")));
    let proxy = start(&world, &bootstrap(&plane, context, vec![]))?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    configure(&stream)?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;

    // What the operator sees.
    let certs: Value = serde_json::from_str(&proxy.admin().read("/certs")?.body)?;
    let chain = &certs["certificates"][0]["cert_chain"][0];
    assert_eq!(chain["subject_alt_names"], json!([{"uri": "spiffe://cluster.local/ns/foo/sa/1"}]));
    let serial = chain["serial_number"].clone();
    assert!(certs["certificates"][0]["ca_cert"][0]["expiration_time"].is_string(), "{certs:#}");
    let active = dumped(&proxy, "dynamic_active_secrets", "own")?;
    assert_eq!(active["version_info"], "1");
    assert!(active["secret"]["tls_certificate"]["certificate_chain"].is_object(), "{active:#}");
    for (stat, value) in [
        ("sds.own.update_success", 1),
        ("sds.own.update_rejected", 0),
        ("sds.own.key_rotation_failed", 0),
        ("sds.own.version", 13_237_225_503_670_494_420),
        ("cluster.secure.client_ssl_socket_factory.ssl_context_update_by_sds", 2),
        ("cluster.secure.client_ssl_socket_factory.upstream_context_secrets_not_ready", 0),
    ] {
        assert_eq!(proxy.stat(stat)?, value, "{stat}");
    }

    // Half of a new pair is not used; the open stream does not care.
    put("key.pem", &pki.second.key_pem())?;
    with_log(proxy.wait_stat("sds.own.key_rotation_failed", |count| count > 0), &proxy)?;
    works(&stream, "2")?;
    plane.restart()?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    // All of it is, for new connections.
    put("chain.pem", pki.second.chain_pem())?;
    proxy
        .wait_stat("cluster.secure.client_ssl_socket_factory.ssl_context_update_by_sds", |count| count > 2)?;
    stream.request_for(Kind::Cluster)?;
    works(&stream, "3")?;
    let certs: Value = serde_json::from_str(&proxy.admin().read("/certs")?.body)?;
    assert_ne!(certs["certificates"][0]["cert_chain"][0]["serial_number"], serial);
    plane.restart()?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.second.der()));
    assert_eq!(proxy.stat("sds.own.update_success")?, 1, "the secret itself did not change");
    assert_hidden(&[&pki.first, &pki.second], &[&shown(&proxy)?]);
    Ok(())
}

/// How a server brings secrets.
enum Bringer {
    Sotw(Stream),
    Delta(Stream),
    Rest,
}

/// A server of secrets, and how it is spoken to.
struct Server {
    plane: ControlPlane,
    bringer: Bringer,
}

impl Server {
    /// Sends secrets. Gives the text of the NACK, if it was one.
    fn send(&self, version: &str, secrets: &[&Secret]) -> Result<Option<String>> {
        match &self.bringer {
            Bringer::Sotw(stream) => {
                let secrets: Vec<Any> = secrets.iter().map(|secret| secret.packed()).collect();
                stream.send(&response(Kind::Secret, version, version, secrets));
                loop {
                    let request = stream.request_for(Kind::Secret)?;
                    if request.response_nonce == version {
                        return Ok(request.error_detail.map(|error| error.message));
                    }
                }
            }
            Bringer::Delta(stream) => {
                let secrets = secrets.iter().map(|secret| wrapped(version, *secret)).collect();
                stream.send_delta(&delta_response(Kind::Secret, version, secrets, &[]));
                loop {
                    let request = stream.delta_request_for(Kind::Secret)?;
                    if request.response_nonce == version {
                        return Ok(request.error_detail.map(|error| error.message));
                    }
                }
            }
            Bringer::Rest => {
                let secrets = secrets.iter().map(|secret| secret.packed()).collect();
                let poll = self.plane.poll(Kind::Secret)?;
                poll.answer_with(&response(Kind::Secret, version, "", secrets))?;
                // Whether it was accepted shows in what is said next.
                let poll = self.plane.poll(Kind::Secret)?;
                let says = poll.request.version_info.clone();
                poll.answer(304, b"");
                Ok((says != version).then_some(says))
            }
        }
    }

    /// The names that were asked for.
    fn asked(&self) -> Result<Vec<String>> {
        let mut names = match &self.bringer {
            Bringer::Sotw(stream) => stream.request_for(Kind::Secret)?.resource_names,
            Bringer::Delta(stream) => stream.delta_request_for(Kind::Secret)?.resource_names_subscribe,
            Bringer::Rest => {
                let poll = self.plane.poll(Kind::Secret)?;
                let names = poll.request.resource_names.clone();
                drop(poll); // as if it had been lost
                names
            }
        };
        names.sort();
        Ok(names)
    }
}

/// Secrets come from a server of their own: waited for, taken, refused, rotated.
fn from_a_server(api_type: &str) -> Result<()> {
    let (world, pki) = (World::new()?, Pki::new()?);
    let mut plane = pki.plane(&world)?;
    let sds = ControlPlane::start(Some(&world.netns))?;
    let fields = if api_type == "REST" { json!({}) } else { http2() };
    let context = from(&from_server(api_type));
    let proxy = start(&world, &bootstrap(&plane, context, vec![sds_cluster(&sds, fields)]))?;
    let method = |delta| Method { kind: Some(Kind::Secret), delta };
    let bringer = match api_type {
        "GRPC" => Bringer::Sotw(with_log(sds.stream(method(false)), &proxy)?),
        "DELTA_GRPC" => Bringer::Delta(with_log(sds.stream(method(true)), &proxy)?),
        _ => Bringer::Rest,
    };
    let server = Server { plane: sds, bringer };
    // Both names on one subscription; nobody is connected to before they came.
    assert_eq!(server.asked()?, ["ca", "own"]);
    assert_eq!(proxy.admin().read("/ready")?.status, 503);
    assert_eq!(dumped(&proxy, "dynamic_warming_secrets", "own")?["version_info"], "uninitialized");
    assert!(plane.untaken_streams().is_empty());
    let (own_first, ca) = (own(&pki.first)?, ca(&pki.authority.pem())?);
    assert_eq!(with_log(server.send("1", &[&own_first, &ca]), &proxy)?, None);
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    configure(&stream)?;
    with_log(world.reaches(LISTENER, "a"), &proxy)?;
    // A bad one is refused by name, and the one before goes on serving.
    let mixed = certificate("own", pki.second.chain_pem(), &pki.first.key_pem())?;
    let nack = server.send("2", &[&mixed])?.context("no NACK")?;
    if api_type != "REST" {
        assert!(
            nack.contains(
                "own: tls_certificate: Failed to load private key from <inline>: it is not the key"
            ),
            "{nack}"
        );
    }
    proxy.wait_stat("sds.own.update_rejected", |count| count == 1)?;
    let dump = dumped(&proxy, "dynamic_active_secrets", "own")?;
    assert_eq!((&dump["version_info"], &dump["error_state"]["version_info"]), (&json!("1"), &json!("2")));
    let details = dump["error_state"]["details"].as_str().unwrap_or_default();
    assert!(details.contains("it is not the key of the certificate"), "{dump:#}");
    works(&stream, "2")?;
    plane.restart()?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    // A good one is for new connections.
    assert_eq!(with_log(server.send("3", &[&own(&pki.second)?]), &proxy)?, None);
    assert!(dumped(&proxy, "dynamic_active_secrets", "own")?["error_state"].is_null());
    stream.request_for(Kind::Cluster)?;
    works(&stream, "3")?;
    plane.restart()?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.second.der()));
    assert_hidden(&[&pki.first, &pki.second], &[&shown(&proxy)?, &nack]);
    Ok(())
}

#[test]
fn p40_p57_state_of_the_world() -> Result<()> {
    from_a_server("GRPC")
}

#[test]
fn p40_p57_incremental() -> Result<()> {
    from_a_server("DELTA_GRPC")
}

#[test]
fn p40_p57_polls() -> Result<()> {
    from_a_server("REST")
}

#[test]
fn p39_a_late_secret_needs_no_restart() -> Result<()> {
    let (world, pki) = (World::new()?, Pki::new()?);
    let plane = pki.plane(&world)?;
    let sds = ControlPlane::start(Some(&world.netns))?;
    let mut source = from_server("GRPC");
    source["initial_fetch_timeout"] = json!("0.3s");
    let proxy = start(&world, &bootstrap(&plane, from(&source), vec![sds_cluster(&sds, http2())]))?;
    let stream = sds.stream(Method { kind: Some(Kind::Secret), delta: false })?;
    stream.request_for(Kind::Secret)?;
    // The CA is there, the certificate is not.
    stream.send(&response(Kind::Secret, "1", "1", vec![ca(&pki.authority.pem())?.packed()]));
    accepted(&stream, Kind::Secret)?;
    with_log(proxy.wait_stat("sds.own.init_fetch_timeout", |count| count == 1), &proxy)?;
    proxy.lines("proxy.log", "waiting for the secret 'own', which SDS has not brought yet", 1)?;
    let not_ready = "cluster.secure.client_ssl_socket_factory.upstream_context_secrets_not_ready";
    assert!(proxy.stat(not_ready)? > 0);
    assert!(plane.untaken_streams().is_empty());
    stream.send(&response(Kind::Secret, "2", "2", vec![own(&pki.first)?.packed()]));
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    configure(&stream)?;
    with_log(world.reaches(LISTENER, "a"), &proxy)
}

#[test]
fn ads_brings_what_another_server_asks_for() -> Result<()> {
    let (world, pki) = (World::new()?, Pki::new()?);
    let secure = pki.plane(&world)?;
    let ads = ControlPlane::start(Some(&world.netns))?;
    let mut bootstrap = Transport::Ads.bootstrap(ads.address());
    let cluster = config::cluster(SECURE, &[&secure.address().to_string()], from(&resource::ads()));
    bootstrap["static_resources"]["clusters"].as_array_mut().context("clusters")?.push(cluster);
    bootstrap["dynamic_resources"]["lds_config"] = json!({"resource_api_version": "V3", "api_config_source": {
        "api_type": "REST", "transport_api_version": "V3", "cluster_names": [SECURE],
        "refresh_delay": "0.05s", "request_timeout": "5s"}});
    let proxy = start(&world, &bootstrap)?;
    let stream = with_log(ads.stream(Method::ADS), &proxy)?;
    stream.request_for(Kind::Secret)?;
    let secrets = vec![own(&pki.first)?.packed(), ca(&pki.authority.pem())?.packed()];
    stream.send(&response(Kind::Secret, "1", "1", secrets));
    accepted(&stream, Kind::Secret)?;
    let cluster = resource::cluster("c", &[World::A], json!({}))?;
    stream.request_for(Kind::Cluster)?;
    stream.send(&response(Kind::Cluster, "1", "c1", vec![cluster.packed()]));
    let poll = with_log(secure.poll(Kind::Listener), &proxy)?;
    assert_eq!(poll.certificate.as_deref(), Some(pki.first.der()));
    let listener = resource::listener(LISTENER, json!({}), &tcp_proxy("c", json!({})))?;
    poll.answer_with(&response(Kind::Listener, "1", "", vec![listener.packed()]))?;
    with_log(world.reaches(LISTENER, "a"), &proxy)
}

#[test]
fn static_secrets_serve_by_name() -> Result<()> {
    let (world, pki) = (World::new()?, Pki::new()?);
    let plane = pki.plane(&world)?;
    let context = context(&json!({"tls_certificate_sds_secret_configs": [{"name": "own"}]}), &Value::Null);
    let mut bootstrap = bootstrap(&plane, context, vec![]);
    let secret = |secret: &Secret| resource::to_json(secret);
    bootstrap["static_resources"]["secrets"] = json!([
        secret(&own(&pki.first)?)?, secret(&ca(&pki.authority.pem())?)?,
        {"name": "unused", "generic_secret": {"secret": {"inline_string": pki.second.key_pem()}}},
    ]);
    let proxy = start(&world, &bootstrap)?;
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    let dump = dumped(&proxy, "static_secrets", "own")?;
    assert_eq!(dump["secret"]["tls_certificate"]["private_key"], json!({"inline_string": "[redacted]"}));
    let dump = dumped(&proxy, "static_secrets", "unused")?;
    assert_eq!(dump["secret"]["generic_secret"]["secret"], json!({"inline_string": "[redacted]"}));
    assert_hidden(&[&pki.first, &pki.second], &[&shown(&proxy)?]);
    Ok(())
}

/// Whatever is wrong with a secret, and however loud the log: its key is nowhere.
#[test]
fn keys_never_leak() -> Result<()> {
    let (world, pki, dir) = (World::new()?, Pki::new()?, TempDir::new("sds")?);
    let plane = pki.plane(&world)?;
    let sds = ControlPlane::start(Some(&world.netns))?;
    let path = dir.path().join("secrets.yaml");
    write_secrets(&path, "1", &[&ca(&pki.authority.pem())?])?;
    let own =
        json!({"tls_certificate_sds_secret_configs": [{"name": "own", "sds_config": from_server("REST")}]});
    let context = context(&own, &resource::file(&path));
    let bootstrap = bootstrap(&plane, context, vec![sds_cluster(&sds, json!({}))]);
    let cache = dir.path().join("cache");
    let mut proxy = Setup::new(&format!("{bootstrap:#}"))
        .netns(&world.netns)
        .args(["-l", "trace", "--xds-cache", cache.to_str().context("a path")?])
        .spawn()?;
    proxy.wait_answering()?;
    let (chain, key) = (pki.first.chain_pem(), pki.first.key_pem());
    let body: String = key.lines().filter(|line| !line.starts_with("-----")).collect();
    let one_line = key.replace('\n', "");
    let secret = |certificate: Value| {
        json!({"version_info": "1", "resources": [{
            "@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret",
            "name": "own", "tls_certificate": certificate}]})
        .to_string()
    };
    let inline = |chain: &str, key: &str| {
        secret(json!({"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key}}))
    };
    let bad = [
        inline(chain, &one_line),
        inline(chain, &body),
        inline(&one_line, &key),
        inline(&key, chain),
        inline(pki.second.chain_pem(), &key),
        // The wrong shape, and the wrong field.
        secret(json!({"private_key": key})),
        secret(json!({"private_key": {"inline_bytes": format!("{body}*")}})),
        secret(json!({"private_key": {"inline_string": [key]}})),
        secret(json!({"private_key": {key.clone(): 1}})),
        secret(json!({"private_key": {"inlin_string": key}})),
        secret(json!({"certificate_chain": {"inline_string": chain}, "private_key": {"inline_string": key},
            "password": {"inline_string": body}})),
        // No JSON at all.
        inline(chain, "KEY").replace("\"KEY\"", &body),
        inline(chain, "KEY").replace("KEY\"", &key),
    ];
    for text in &bad {
        let poll = with_log(sds.poll(Kind::Secret), &proxy)?;
        poll.answer(200, text.as_bytes());
    }
    // The next poll comes after the last answer was judged.
    let poll = with_log(sds.poll(Kind::Secret), &proxy)?;
    let seen = proxy.stat("sds.own.update_rejected")? + proxy.stat("sds.own.update_failure")?;
    assert_eq!(seen, bad.len() as u64, "{}", proxy.log_tail());
    assert_hidden(&[&pki.first, &pki.second], &[&shown(&proxy)?]);
    // The same from a file.
    let yaml =
        format!("resources:\n- name: own\n  tls_certificate:\n    private_key: |\n      {key}\n{body}: 1\n");
    write_atomically(&path, yaml.as_bytes())?;
    with_log(proxy.wait_stat("sds.ca.update_failure", |count| count > 0), &proxy)?;
    // A good one is not shown either, nor written to the disk.
    poll.answer(200, inline(chain, &key).as_bytes());
    with_log(plane.stream(Method::ADS), &proxy)?;
    proxy.stop()?;
    let mut texts = vec![proxy.log()];
    for entry in std::fs::read_dir(&cache)? {
        texts.push(String::from_utf8_lossy(&std::fs::read(entry?.path())?).into_owned());
    }
    assert_hidden(&[&pki.first, &pki.second], &texts.iter().map(String::as_str).collect::<Vec<_>>());
    Ok(())
}

/// A bootstrap of `config/`, with this in the place of that.
pub(crate) fn example(name: &str, replacements: &[(&str, &str)]) -> Result<String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../config").join(name);
    let mut text = std::fs::read_to_string(&path).with_context(|| path.display().to_string())?;
    for (from, to) in replacements {
        ensure!(text.contains(from), "{name} has no {from}");
        text = text.replace(from, to);
    }
    Ok(text.replace("port_value: 15000", "port_value: 0"))
}

#[test]
fn example_for_istio_as_it_is_written() -> Result<()> {
    let (world, pki, dir) = (World::new()?, Pki::new()?, TempDir::new("sds")?);
    let mut plane = pki.plane(&world)?;
    let put = |name: &str, text: &str| write_atomically(&dir.path().join(name), text.as_bytes());
    put("cert-chain.pem", pki.first.chain_pem())?;
    put("key.pem", &pki.first.key_pem())?;
    put("root-cert.pem", &pki.authority.pem())?;
    let port = format!("port_value: {}", plane.address().port());
    let bootstrap = example(
        "xds-istio-mtls.yaml",
        &[
            ("/etc/istio-output-certs", &dir.path().display().to_string()),
            ("{ address: istiod.istio-system.svc", "{ address: 127.0.0.1"),
            ("port_value: 15012", &port),
        ],
    )?;
    let mut proxy = Setup::new(&bootstrap).netns(&world.netns).spawn()?;
    proxy.wait_answering()?;
    let stream = with_log(plane.stream(Method::DELTA_ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    // Renewed files are for the next connection, whatever the order in which they come.
    put("cert-chain.pem", pki.second.chain_pem())?;
    put("key.pem", &pki.second.key_pem())?;
    plane.restart()?;
    let stream = with_log(plane.stream(Method::DELTA_ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(pki.second.der()));
    let certs: Value = serde_json::from_str(&proxy.admin().read("/certs")?.body)?;
    assert_eq!(
        certs["certificates"][0]["cert_chain"][0]["path"],
        json!(dir.path().join("cert-chain.pem").display().to_string())
    );
    Ok(())
}

#[test]
fn example_with_sds_as_it_is_written() -> Result<()> {
    let (world, dir, authority) = (World::new()?, TempDir::new("sds")?, Authority::new()?);
    let server = authority.issue(&["control-plane.example.com"])?.for_known_clients();
    let plane = ControlPlane::start_tls(Some(&world.netns), server)?;
    let sds = ControlPlane::start(Some(&world.netns))?;
    let node = authority.issue(&["node-1"])?;
    let path = |name: &str| dir.path().join(name);
    write_atomically(&path("control-plane-ca.pem"), authority.pem().as_bytes())?;
    // As docs/xds.md has it.
    let secret = format!(
        r#"version_info: "1"
resources:
- "@type": type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret
  name: control-plane-ca
  validation_context:
    trusted_ca: {{ filename: {} }}
"#,
        path("control-plane-ca.pem").display()
    );
    write_atomically(&path("control-plane-ca.yaml"), secret.as_bytes())?;
    let ports = [&plane, &sds].map(|plane| format!("port_value: {}", plane.address().port()));
    let bootstrap = example(
        "xds-sds.yaml",
        &[
            ("/etc/tidegate/sds", &dir.path().display().to_string()),
            ("{ address: control-plane.example.com", "{ address: 127.0.0.1"),
            ("port_value: 18443", &ports[0]),
            ("port_value: 8234", &ports[1]),
        ],
    )?;
    let mut proxy = Setup::new(&bootstrap).netns(&world.netns).spawn()?;
    proxy.wait_answering()?;
    let stream = with_log(sds.stream(Method { kind: Some(Kind::Secret), delta: false }), &proxy)?;
    assert_eq!(stream.request_for(Kind::Secret)?.resource_names, ["node-1"]);
    stream.send(&response(
        Kind::Secret,
        "1",
        "1",
        vec![certificate("node-1", node.chain_pem(), &node.key_pem())?.packed()],
    ));
    let stream = with_log(plane.stream(Method::ADS), &proxy)?;
    assert_eq!(stream.certificate.as_deref(), Some(node.der()));
    configure(&stream)?;
    with_log(world.reaches(LISTENER, "a"), &proxy)
}

#[test]
fn p57_two_users_share_a_subscription() -> Result<()> {
    let (world, pki) = (World::new()?, Pki::new()?);
    let plane = pki.plane(&world)?;
    let sds = ControlPlane::start(Some(&world.netns))?;
    let context = from(&from_server("GRPC"));
    let mut fields = http2();
    config::merge(&mut fields, context.clone());
    let other = config::cluster("other", &[&plane.address().to_string()], fields);
    let mut bootstrap = bootstrap(&plane, context, vec![sds_cluster(&sds, http2()), other]);
    bootstrap["dynamic_resources"]["lds_config"] = json!({"resource_api_version": "V3", "api_config_source": {
        "api_type": "GRPC", "transport_api_version": "V3",
        "grpc_services": [{"envoy_grpc": {"cluster_name": "other"}}]}});
    let proxy = start(&world, &bootstrap)?;
    let stream = sds.stream(Method { kind: Some(Kind::Secret), delta: false })?;
    let mut names = stream.request_for(Kind::Secret)?.resource_names;
    names.sort();
    assert_eq!(names, ["ca", "own"]);
    // What start-up waits for has a name.
    let deadline = Instant::now() + PATIENCE;
    while !proxy.admin().read("/init_dump")?.body.contains("\"own\"") {
        ensure!(Instant::now() < deadline, "/init_dump does not name the secret");
        sleep(Duration::from_millis(20));
    }
    stream.send(&response(
        Kind::Secret,
        "1",
        "1",
        vec![own(&pki.first)?.packed(), ca(&pki.authority.pem())?.packed()],
    ));
    accepted(&stream, Kind::Secret)?;
    let clusters = with_log(plane.stream(Method::ADS), &proxy)?;
    clusters.request_for(Kind::Cluster)?;
    clusters.send(&response(Kind::Cluster, "1", "1", vec![]));
    let listeners = with_log(plane.stream(Method { kind: Some(Kind::Listener), delta: false }), &proxy)?;
    for stream in [&clusters, &listeners] {
        assert_eq!(stream.certificate.as_deref(), Some(pki.first.der()));
    }
    assert_eq!((stream.unread(), sds.untaken_streams().len()), (vec![], 0), "one subscription, one stream");
    for user in [SECURE, "other"] {
        let updates = format!("cluster.{user}.client_ssl_socket_factory.ssl_context_update_by_sds");
        assert_eq!(proxy.stat(&updates)?, 2);
    }
    Ok(())
}
