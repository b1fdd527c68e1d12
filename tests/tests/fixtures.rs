//! The fixtures themselves: a test that rests on a router that routes too much, or on a pod outside its cgroup,
//! proves nothing.

use anyhow::Result;
use tidegate_tests::client::{self, Outcome};
use tidegate_tests::network::Network;
use tidegate_tests::script::{End, Pattern, Step, write};
use tidegate_tests::upstream::Upstream;

#[test]
fn pods_reach_each_other_and_nothing_else() -> Result<()> {
    let network = Network::new()?;
    let client = network.pod("client", &["10.9.0.9", "fd00:9::9"])?;
    let server = network.pod("server", &["10.9.0.1", "fd00:9::1"])?;
    for address in ["10.9.0.1:80", "[fd00:9::1]:80"] {
        let upstream = Upstream::echo(Some(server.netns()), address)?;
        let outcome =
            client::run(client.connect(address), &[write("hello"), Step::ShutdownWrite, Step::ReadToEnd]);
        let Outcome::Connected(seen) = outcome else { panic!("{address}: {outcome:?}") };
        assert_eq!((seen.text().as_str(), seen.end), ("hello", End::Fin));
        let peer = upstream.served()?.peer.ip().to_string();
        assert!(client.addresses().contains(&peer), "{peer}");
    }
    let seen = client::run(client.connect("10.9.0.1:81"), &[]);
    assert_eq!(seen, Outcome::NotConnected("ECONNREFUSED".into()));
    let seen = client::run(client.connect("172.16.0.1:50001"), &[]);
    assert_eq!(seen, Outcome::NotConnected("ETIMEDOUT".into()), "the router must drop service addresses");
    Ok(())
}

#[test]
fn a_pod_s_processes_are_in_its_cgroup() -> Result<()> {
    let network = Network::new()?;
    let pod = network.pod("client", &["10.9.0.9"])?;
    let output = pod.command("cat").arg("/proc/self/cgroup").output()?;
    let text = String::from_utf8(output.stdout)?;
    let line = format!("0::{}", pod.cgroup().relative());
    assert!(text.lines().any(|found| found == line), "{line} in\n{text}");
    Ok(())
}

#[test]
fn resets_and_ends_of_file_are_told_apart() -> Result<()> {
    let network = Network::new()?;
    let client = network.pod("client", &["10.9.0.9"])?;
    let server = network.pod("server", &["10.9.0.1"])?;
    for (step, end) in [(Step::Reset, End::Reset), (Step::ShutdownWrite, End::Fin)] {
        let upstream = Upstream::start(Some(server.netns()), "10.9.0.1:80", vec![Step::Read(2), step])?;
        let outcome = client::run(client.connect("10.9.0.1:80"), &[write("hi"), Step::ReadToEnd]);
        let Outcome::Connected(seen) = outcome else { panic!("{outcome:?}") };
        assert_eq!(seen.end, end);
        drop(upstream);
    }
    Ok(())
}

#[test]
fn the_pattern_is_what_its_digest_says() -> Result<()> {
    let network = Network::new()?;
    let client = network.pod("client", &["10.9.0.9"])?;
    let server = network.pod("server", &["10.9.0.1"])?;
    let upstream = Upstream::start(Some(server.netns()), "10.9.0.1:80", vec![Step::ReadToEnd])?;
    client::run(client.connect("10.9.0.1:80"), &[Step::WritePattern(3_000_001)]);
    let seen = upstream.served()?.transcript;
    assert_eq!((seen.received, seen.sha256), (3_000_001, Pattern::sha256(3_000_001)));
    Ok(())
}
