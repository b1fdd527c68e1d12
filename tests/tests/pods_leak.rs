//! A pod that ends leaves nothing behind. Alone in its program: it counts the process's descriptors.

mod agent;

use std::process::Command;

use agent::{Agent, SERVICE, pin_dir, wait};
use anyhow::Result;
use tidegate_tests::network::Network;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/self/fd").unwrap().count()
}

#[test]
fn a_pod_that_ends_leaves_nothing() -> Result<()> {
    let network = Network::new()?;
    let stays = network.pod("stays", &["10.9.0.1"])?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    agent.wait_for_enrolled(1)?;
    let enrolments = agent.interception.enrolments()?;
    let descriptors = open_descriptors();
    let links = || {
        let listing = Command::new("ip").args(["-n", network.router().name(), "-o", "link"]).output();
        String::from_utf8(listing.unwrap().stdout)
            .unwrap()
            .lines()
            .filter(|line| line.contains(" pod"))
            .count()
    };
    assert_eq!(links(), 1);
    for round in 0..3 {
        let goes: Vec<_> =
            (0..3).map(|i| network.pod("goes", &[&format!("10.9.1.{i}")])).collect::<Result<_>>()?;
        agent.wait_for_enrolled(4)?;
        for (i, pod) in goes.iter().enumerate() {
            agent.expect_captured(pod.connect(SERVICE), SERVICE, &format!("10.9.1.{i}"))?;
        }
        assert_eq!(links(), 4);
        drop(goes);
        agent.wait_for_enrolled(1)?;
        assert_eq!(agent.interception.enrolments()?, enrolments, "round {round}");
        assert_eq!(agent.captures.lock().unwrap().len(), 1);
        // The namespaces are really gone: their ends of the links, and with them ours.
        wait("the namespaces' end", || links() == 1)?;
        wait("descriptors to be closed", || open_descriptors() == descriptors)?;
    }
    agent.expect_captured(stays.connect(SERVICE), SERVICE, "10.9.0.1")?;
    assert_eq!(agent.interception.status()?.in_flight, 0);
    Ok(())
}
