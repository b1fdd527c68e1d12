//! What works without eBPF: bound listeners, REDIRECT by SO_ORIGINAL_DST, TPROXY by the socket's own address.

use anyhow::Result;
use serde_json::json;
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::config::{Config, tcp_proxy};
use tidegate_tests::node::{Node, field};
use tidegate_tests::proxy::Setup;
use tidegate_tests::script::{
    Step::{ReadToEnd, ShutdownWrite},
    write,
};
use tidegate_tests::upstream::Upstream;
use tidegate_tests::workload::Connect;

/// Marks the connections that the firewall redirects: a sidecar's rules would exempt the proxy by its uid.
const REDIRECTED: u32 = 77;

fn text(outcome: Outcome) -> Result<String> {
    match outcome {
        Outcome::Connected(transcript) => Ok(transcript.text()),
        Outcome::NotConnected(errno) => anyhow::bail!("not connected: {errno}"),
    }
}

#[test]
fn a_bound_listener_serves() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let gateway = node.pod("gateway", &["10.9.0.2"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "foo")?;
    let config = Config::new().listener("0.0.0.0:8080", json!({}), &tcp_proxy("foo", json!({}))).cluster(
        "foo",
        &["10.9.0.1:80"],
        json!({}),
    );
    let proxy = Setup::new(&config.to_string()).netns(gateway.netns()).start()?;
    let seen = client::run(client.connect("10.9.0.2:8080"), &[write("hello"), ShutdownWrite, ReadToEnd]);
    assert_eq!(text(seen)?, "foo\nhello");
    let line = proxy.lines("access.log", "", 1)?.remove(0);
    assert_eq!(field(&line, "dlocal"), "10.9.0.2:8080", "{line}");
    Ok(())
}

#[test]
fn a_redirect_of_the_firewall_is_understood() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9", "fd00:9::9"])?;
    let server = node.pod("server", &["10.9.0.1", "fd00:9::1"])?;
    let _upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "four")?;
    let _upstream_v6 = Upstream::identify(Some(server.netns()), "[fd00:9::1]:80", "six")?;
    client.netns().nft(&format!(
        "table inet sidecar {{ chain output {{
           type nat hook output priority -100; policy accept;
           meta mark {REDIRECTED} meta l4proto tcp redirect to :15001
         }}
         }}"
    ))?;
    let v6 = json!({"name": "virtualOutbound6", "use_original_dst": true});
    let config = Config::new()
        .service("172.16.0.1:50001", "foo")
        .cluster("foo", &["10.9.0.1:80"], json!({}))
        .pass_through()
        .listener("[::]:15001", v6, &tcp_proxy("PassthroughCluster", json!({})));
    let proxy = Setup::new(&config.to_string()).netns(client.netns()).start()?;
    let talk = |address: &str| {
        let connect = Connect::to(address).mark(REDIRECTED);
        text(client::run(client.connect_with(&connect), &[write("hello"), ShutdownWrite, ReadToEnd]))
    };
    assert_eq!(talk("172.16.0.1:50001")?, "four\nhello");
    assert_eq!(talk("10.9.0.1:80")?, "four\nhello");
    assert_eq!(talk("[fd00:9::1]:80")?, "six\nhello");
    proxy.lines("access.log", "dlocal=172.16.0.1:50001", 1)?;
    proxy.lines("access.log", "clu=PassthroughCluster", 2)?;
    Ok(())
}

#[test]
fn tproxy_is_understood() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let _upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "foo")?;
    let router = node.network.router();
    router.ip("rule add fwmark 1 lookup 100\nroute add local 0.0.0.0/0 dev lo table 100\n")?;
    router.nft(
        "table ip divert { chain prerouting {
           type filter hook prerouting priority mangle; policy accept;
           ip daddr 172.16.0.0/12 meta l4proto tcp tproxy to :15001 meta mark set 1 accept
         }
         }",
    )?;
    let capture = json!({"name": "virtualOutbound", "use_original_dst": true, "transparent": true});
    let config = Config::new()
        .service("172.16.0.1:50001", "foo")
        .cluster("foo", &["10.9.0.1:80"], json!({}))
        .listener("0.0.0.0:15001", capture, &tcp_proxy("BlackHoleCluster", json!({})))
        .cluster("BlackHoleCluster", &[], json!({}));
    let proxy = Setup::new(&config.to_string()).netns(router).start()?;
    let talk = |address: &str, steps: &[_]| text(client::run(client.connect(address), steps));
    assert_eq!(talk("172.16.0.1:50001", &[write("hello"), ShutdownWrite, ReadToEnd])?, "foo\nhello");
    assert_eq!(talk("172.16.0.2:50001", &[ReadToEnd])?, "");
    let line = proxy.lines("access.log", "clu=foo", 1)?.remove(0);
    assert_eq!(field(&line, "dlocal"), "172.16.0.1:50001", "{line}");
    assert!(field(&line, "dremote").starts_with("10.9.0.9:"), "{line}");
    proxy.lines("access.log", "clu=BlackHoleCluster", 1)?;
    Ok(())
}

#[test]
fn a_stranger_without_privileges_can_run_it() -> Result<()> {
    let node = Node::new()?;
    let gateway = node.pod("gateway", &["10.9.0.2"])?;
    let _upstream = Upstream::identify(Some(gateway.netns()), "10.9.0.2:80", "foo")?;
    let config = Config::new()
        .listener("10.9.0.2:8080", json!({}), &tcp_proxy("foo", json!({"access_log": []})))
        .cluster("foo", &["10.9.0.2:80"], json!({}));
    let nobody = ["setpriv", "--bounding-set=-all", "--inh-caps=-all", "--no-new-privs"];
    let _proxy = Setup::new(&config.to_string()).netns(gateway.netns()).wrapper(&nobody).start()?;
    let seen = client::run(gateway.connect("10.9.0.2:8080"), &[write("hello"), ShutdownWrite, ReadToEnd]);
    assert_eq!(text(seen)?, "foo\nhello");
    Ok(())
}
