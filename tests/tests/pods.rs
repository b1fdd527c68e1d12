//! Pods are found, enrolled and forgotten.

mod agent;

use std::io;
use std::net::Ipv4Addr;
use std::path::Path;
use std::process::{Child, Command};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use agent::{Agent, SERVICE, SERVICE_V6, pin_dir, wait, wanted};
use anyhow::{Context, Result};
use tidegate::config::bootstrap;
use tidegate::intercept::audit::{Audit, Health};
use tidegate::intercept::pods::{PodSettings, Pods};
use tidegate::intercept::{Detached, PodState, PodStatus, programs};
use tidegate::stats::Stats;
use tidegate::sys::netns::{NetNs, NetNsId};
use tidegate_common::{EnrolState, Reason, Verdict};
use tidegate_tests::cgroup::Cgroup;
use tidegate_tests::netns::Netns;
use tidegate_tests::network::Network;
use tidegate_tests::pod::{Pod, adopt};
use tidegate_tests::workload::Connect;

#[test]
fn pods_that_are_there_and_pods_that_come_later() -> Result<()> {
    let network = Network::new()?;
    let early = network.pod("early", &["10.9.0.1", "fd00:9::1"])?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let capture = agent.expect_captured(early.connect(SERVICE), SERVICE, "10.9.0.1")?;
    assert_eq!(capture.pod.capture_port, 15001);
    assert!(capture.pod.name.starts_with("pod-"), "{}", capture.pod.name);
    agent.expect_captured(early.connect(SERVICE_V6), SERVICE_V6, "fd00:9::1")?;

    let late = network.pod("late", &["10.9.0.2"])?;
    agent.wait_for_enrolled(2)?;
    let capture = agent.expect_captured(late.connect(SERVICE), SERVICE, "10.9.0.2")?;
    assert_eq!(capture.pod.netns().id(), NetNsId::of_process(late_pid(&late)?)?);
    // A second container of a pod: another cgroup, the same namespace.
    let second = late.workload_under(&[])?;
    let sidecar = Cgroup::child(network.cgroup(), &format!("{}-sidecar", late.netns().name()))?;
    adopt(sidecar.path(), second.pid())?;
    agent.expect_captured(second.connect(&Connect::to(SERVICE)), SERVICE, "10.9.0.2")?;
    assert_eq!(agent.pods().len(), 2);
    drop(second);
    assert_eq!(agent.interception.stop()?, Detached::Removed);
    Ok(())
}

/// Some process of the pod.
fn late_pid(pod: &Pod) -> Result<u32> {
    let text = std::fs::read_to_string(pod.cgroup().path().join("cgroup.procs"))?;
    text.lines().next().context("the pod has no process")?.parse().context("pid")
}

#[test]
fn a_taken_port_without_ipv6() -> Result<()> {
    let network = Network::new()?;
    let pod = network.pod("pod", &["10.9.0.1"])?;
    pod.netns().sysctl("net.ipv6.conf.all.disable_ipv6", "1")?;
    let taken = pod.netns().enter(|| std::net::TcpListener::bind("0.0.0.0:15001"))??;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let capture = agent.expect_captured(pod.connect(SERVICE), SERVICE, "10.9.0.1")?;
    assert_ne!(capture.pod.capture_port, 15001);
    // The owner of the port keeps it.
    pod.connect("10.9.0.1:15001")?;
    taken.accept()?;
    Ok(())
}

#[test]
fn two_pods_with_the_same_address_and_port() -> Result<()> {
    let network = Network::new()?;
    let beside = network.beside()?;
    let pods = [network.pod("a", &["10.9.0.1"])?, beside.pod("b", &["10.9.0.1"])?];
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    agent.apply(&[SERVICE, "172.16.0.2:50001"])?;
    let destinations = [SERVICE, "172.16.0.2:50001"];
    let mut clients = Vec::new();
    for (pod, to) in pods.iter().zip(destinations) {
        clients.push(pod.connect_with(&Connect::to(to).from("10.9.0.1:40000"))?);
    }
    for _ in 0..2 {
        let (capture, peer, original) = agent.accept()?;
        let index = pods
            .iter()
            .position(|pod| {
                late_pid(pod).and_then(|pid| Ok(NetNsId::of_process(pid)?)).ok()
                    == Some(capture.pod.netns().id())
            })
            .context("whose?")?;
        assert_eq!(original, Some(destinations[index].parse()?));
        assert_eq!(peer, "10.9.0.1:40000".parse()?);
    }
    Ok(())
}

#[test]
fn a_process_that_enters_its_namespace_after_its_cgroup() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let cgroup = network.cgroup().child("late")?;
    let script = r#"echo 0 > "$0"; sleep 0.05; exec unshare --net sh -c 'ip link set lo up; exec sleep 60'"#;
    let process = start(script, &cgroup)?;
    agent.wait_for_enrolled(1)?;
    drop(process);
    agent.wait_for_enrolled(0)
}

/// The runtime's namespace is neither ours nor the pod's.
#[test]
fn a_container_runtime_s_own_namespace_is_no_pod() -> Result<()> {
    let network = Network::new()?;
    let runtime = Netns::new("runtime")?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let cgroup = network.cgroup().child("container")?;
    // The runtime starts the process, which enters its cgroup, and a namespace of its own last.
    let script = r#"sh -c 'echo 0 > "$0"; sleep 0.5; exec unshare --net sh -c "ip link set lo up; exec sleep 60"' "$0"; true"#;
    let mut command = runtime.command("sh");
    command.args(["-c", script]).arg(cgroup.path().join("cgroup.procs"));
    let _process = Script(command.spawn()?);
    let of_runtime = NetNs::open(&runtime.path())?.id();
    agent.wait_for("the pod", |pods| !pods.is_empty())?;
    assert!(agent.pods().iter().all(|pod| pod.netns != of_runtime), "{:?}", agent.pods());
    agent.wait_for_enrolled(1)?;
    assert!(agent.pods().iter().all(|pod| pod.netns != of_runtime), "{:?}", agent.pods());
    Ok(())
}

/// A process of a pod, for programs that a shell script starts.
fn start(script: &str, cgroup: &Cgroup) -> Result<Script> {
    let procs = cgroup.path().join("cgroup.procs");
    Ok(Script(Command::new("sh").args(["-c", script]).arg(procs).spawn()?))
}

/// Killed on drop.
struct Script(Child);

impl Drop for Script {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_pod_with_a_user_namespace_of_its_own() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let cgroup = network.cgroup().child("rootless")?;
    let script = r#"echo 0 > "$0"; exec unshare --user --map-root-user --net sh -c 'ip link set lo up; exec sleep 60'"#;
    let process = start(script, &cgroup)?;
    agent.wait_for_enrolled(1)?;
    drop(process);
    agent.wait_for_enrolled(0)
}

/// Finds pods without ever walking again: what is found later was heard of.
fn without_walks(
    cgroup: &Path,
    discover: bool,
    pins: &Path,
) -> Result<(Pods, Arc<Mutex<programs::Interceptor>>)> {
    let mut options = programs::Options::new(vec![cgroup.to_owned()])?;
    options.pin_dir = pins.to_path_buf();
    let mut interceptor = programs::Interceptor::load(&options)?;
    interceptor.set_default_verdict(Verdict::Capture)?;
    let events = interceptor.take_events();
    let settings = PodSettings {
        cgroups: interceptor.attach_points().to_vec(),
        discover,
        host_namespace: false,
        capture_port: 15001,
        sockets_per_pod: 1,
        walk_interval: Duration::from_hours(1),
    };
    let interceptor = Arc::new(Mutex::new(interceptor));
    let held = Mutex::new(Vec::new());
    let on_pod = move |event| held.lock().unwrap().push(event);
    Ok((Pods::start(settings, Arc::clone(&interceptor), events, Box::new(on_pod))?, interceptor))
}

fn source(pods: &Pods) -> Option<Ipv4Addr> {
    pods.status().iter().find_map(|pod| match pod.state {
        PodState::Enrolled { v4, .. } => v4,
        _ => None,
    })
}

#[test]
fn a_new_address_is_seen_at_once() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let pod = network.pod("pod", &["10.9.0.1"])?;
    let (pods, interceptor) = without_walks(network.cgroup().path(), false, &pins)?;
    assert_eq!(source(&pods), Some(Ipv4Addr::new(10, 9, 0, 1)));
    for number in [7, 8] {
        let address = Ipv4Addr::new(10, 9, 0, number);
        pod.netns().ip(&format!(
            "addr flush dev eth0\naddr add {address}/32 dev eth0\nroute replace default via 169.254.1.1 dev eth0 onlink"
        ))?;
        wait("the address", || source(&pods) == Some(address))?;
    }
    let enrolments = interceptor.lock().unwrap().enrolments()?;
    assert!(enrolments.values().any(|enrolment| enrolment.source_v4.to_ip() == Ipv4Addr::new(10, 9, 0, 8)));
    Ok(())
}

/// A process in a namespace of its own that connects to nowhere all the time.
const CONNECTS: &str = r#"echo 0 > "$0"; exec unshare --net bash -c 'ip link set lo up
    while :; do true < /dev/tcp/198.51.100.1/9; sleep 0.1; done' 2> /dev/null"#;

#[test]
fn a_configured_cgroup_that_is_made_again_is_attached_to() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let outer = network.cgroup().child("outer")?;
    let mut inner = outer.child("inner")?;
    let (pods, interceptor) = without_walks(inner.path(), false, &pins)?;
    let captured = || interceptor.lock().unwrap().counters().unwrap()[Reason::Captured as usize].1;
    let enrolled =
        || pods.status().iter().filter(|pod| matches!(pod.state, PodState::Enrolled { .. })).count();
    for _ in 0..3 {
        drop(inner);
        inner = outer.child("inner")?;
        let before = captured();
        let process = start(CONNECTS, &inner)?;
        wait("the pod", || enrolled() == 1)?;
        wait("a captured connect", || captured() > before)?;
        drop(process);
        wait("its end", || enrolled() == 0)?;
    }
    assert!(interceptor.lock().unwrap().is_current());
    Ok(())
}

#[test]
fn a_kubepods_subtree_that_appears_is_attached_to() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let (pods, interceptor) = without_walks(network.cgroup().path(), true, &pins)?;
    let kubepods = Cgroup::new("kubepods")?;
    let pod = kubepods.child("pod")?;
    let _process = start(CONNECTS, &pod)?;
    let ours = || {
        pods.status()
            .iter()
            .any(|status| &*status.name == "pod" && matches!(status.state, PodState::Enrolled { .. }))
    };
    wait("the pod", ours)?;
    wait("a captured connect", || {
        interceptor.lock().unwrap().counters().unwrap()[Reason::Captured as usize].1 > 0
    })?;
    let attached = interceptor.lock().unwrap().attach_points().to_vec();
    assert!(attached.contains(&kubepods.path().to_owned()), "{attached:?}");
    Ok(())
}

/// Nothing but the connect itself says that there is a new namespace: no cgroup changes, and no walk is due.
#[test]
fn a_namespace_is_found_by_its_first_connect() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let (pods, interceptor) = without_walks(network.cgroup().path(), false, &pins)?;
    let cgroup = network.cgroup().child("late")?;
    // Later than the cgroup is looked at again for settling.
    let script = r#"echo 0 > "$0"; sleep 3; exec unshare --net bash -c 'ip link set lo up; sleep 1
        while :; do true < /dev/tcp/198.51.100.1/9; sleep 0.2; done' 2> /dev/null"#;
    let _process = start(script, &cgroup)?;
    let enrolled = || pods.status().iter().any(|pod| matches!(pod.state, PodState::Enrolled { .. }));
    wait("the namespace", enrolled)?;
    let counters = interceptor.lock().unwrap().counters()?;
    assert!(counters[Reason::Announced as usize].1 > 0, "{counters:?}");
    pods.stop();
    assert!(interceptor.lock().unwrap().enrolments()?.is_empty());
    Ok(())
}

#[test]
fn the_audit_sees_what_others_did() -> Result<()> {
    let network = Network::new()?;
    let _pod = network.pod("pod", &["10.9.0.1"])?;
    let (pins, stats) = (pin_dir(), Stats::new(1));
    let inner = network.cgroup().child("inner")?;
    let mut wanted = wanted(network.cgroup(), &pins);
    wanted.cgroups = vec![inner.path().to_owned(), Cgroup::new("other")?.path().to_owned()];
    // The second one is gone already.
    assert!(Agent::start_with(wanted.clone()).is_err());
    wanted.cgroups = vec![inner.path().to_owned()];
    let agent = Agent::start_with(wanted)?;
    let mut audit = Audit::default();
    assert_eq!(audit.look(&agent.interception, &stats), Health::Good);
    drop(inner);
    wait("the link to notice", || audit.look(&agent.interception, &stats) == Health::Broken)?;
    let successor = Agent::start(network.cgroup(), &pins)?;
    assert_eq!(audit.look(&agent.interception, &stats), Health::Superseded);
    assert_eq!(Audit::default().look(&successor.interception, &stats), Health::Good);
    Ok(())
}

#[test]
fn a_pod_whose_loopback_and_address_come_late() -> Result<()> {
    let network = Network::new()?;
    let pod = network.pod("pod", &[])?;
    pod.netns().ip("link set lo down")?;
    let pins = pin_dir();
    let agent = Agent::start(network.cgroup(), &pins)?;
    let reason = |pods: &[PodStatus]| match pods {
        [PodStatus { state: PodState::Waiting { reason }, .. }] => reason.clone(),
        _ => String::new(),
    };
    assert!(reason(&agent.pods()).contains("loopback interface is down"), "{:?}", agent.pods());
    pod.netns().ip("link set lo up")?;
    agent.wait_for_enrolled(1)?;
    pod.netns().ip("addr add 10.9.0.7/32 dev eth0")?;
    agent.wait_for("the address", |pods| {
        matches!(pods, [PodStatus { state: PodState::Enrolled { v4: Some(v4), .. }, .. }] if v4.octets() == [10, 9, 0, 7])
    })?;
    agent.expect_captured(pod.connect(SERVICE), SERVICE, "10.9.0.7")?;
    Ok(())
}

/// Runs `test` on a thread for which `netns` is the host's network.
fn with_host<T: Send>(netns: &Netns, test: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    netns.enter(test)?
}

#[test]
fn the_host_s_own_namespace_when_it_is_asked_for() -> Result<()> {
    let network = Network::new()?;
    let host = network.pod("host", &["10.9.0.1"])?;
    with_host(host.netns(), || {
        let pins = pin_dir();
        let wanted = bootstrap::Interception { host_namespace: true, ..wanted(network.cgroup(), &pins) };
        let agent = Agent::start_with(wanted)?;
        assert!(matches!(agent.pods()[..], [PodStatus { state: PodState::Enrolled { .. }, .. }]));
        let capture = agent.expect_captured(host.connect(SERVICE), SERVICE, "10.9.0.1")?;
        assert!(capture.pod.is_host() && capture.pod.socket_namespace().is_none());
        // A process of the same namespace outside the cgroup is left alone.
        let before = agent.count(Reason::Captured);
        let connect = Connect::to("10.9.0.1:9");
        assert_eq!(connect.open().unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(agent.count(Reason::Captured), before);
        Ok(())
    })
}

#[test]
fn host_network_pods_pass_beside_a_cgroup_of_the_host() -> Result<()> {
    let network = Network::new()?;
    let host = network.pod("host", &["10.9.0.1"])?;
    with_host(host.netns(), || {
        let pins = pin_dir();
        let scope = Cgroup::new("scope")?;
        let wanted = bootstrap::Interception {
            host_cgroups: vec![scope.path().to_owned()],
            ..wanted(network.cgroup(), &pins)
        };
        let agent = Agent::start_with(wanted)?;
        agent.apply(&["10.9.0.1:9"])?;
        // The very first connect from the host's cgroup: nobody has seen a process there before.
        let process = host.workload_under(&[])?;
        adopt(scope.path(), process.pid())?;
        let connected = process.connect(&Connect::to("10.9.0.1:9"));
        agent.expect_captured(connected, "10.9.0.1:9", "10.9.0.1")?;
        assert_eq!(agent.count(Reason::NotEnrolledPassed), 0);
        // The same namespace, from a pod's cgroup.
        assert_eq!(host.connect("10.9.0.1:9").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(agent.count(Reason::PassedExcluded), 1);
        // One that has come and gone leaves the host enrolled.
        drop(process);
        std::thread::sleep(Duration::from_millis(300));
        let process = host.workload_under(&[])?;
        adopt(scope.path(), process.pid())?;
        agent.expect_captured(process.connect(&Connect::to("10.9.0.1:9")), "10.9.0.1:9", "10.9.0.1")?;
        drop(process);
        // A cgroup of the host below one of pods can't work, and is refused.
        let below = network.cgroup().child("below")?;
        let wanted = bootstrap::Interception {
            host_cgroups: vec![below.path().to_owned()],
            ..agent::wanted(network.cgroup(), &pins)
        };
        let error = Agent::start_with(wanted).err().context("it starts")?.to_string();
        assert!(error.contains(&below.path().display().to_string()), "{error}");
        Ok(())
    })
}

#[test]
fn a_host_network_pod_passes_and_is_counted() -> Result<()> {
    let network = Network::new()?;
    let host = network.pod("host", &["10.9.0.1"])?;
    with_host(host.netns(), || {
        let pins = pin_dir();
        let agent = Agent::start(network.cgroup(), &pins)?;
        assert_eq!(agent.pods(), []);
        agent.apply(&["10.9.0.1:9"])?;
        assert_eq!(host.connect("10.9.0.1:9").unwrap_err().kind(), io::ErrorKind::ConnectionRefused);
        assert_eq!(agent.count(Reason::PassedExcluded), 1);
        let excluded = agent.interception.enrolments()?;
        assert!(excluded.values().all(|enrolment| enrolment.state == EnrolState::Excluded as u16));
        Ok(())
    })
}

#[test]
fn a_killed_process_is_succeeded_or_cleaned_up() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let stays = network.pod("stays", &["10.9.0.1"])?;
    let goes = network.pod("goes", &["10.9.0.2"])?;
    let killed = Agent::start(network.cgroup(), &pins)?;
    killed.wait_for_enrolled(2)?;
    let stale = killed.interception.enrolments()?;
    // What the kernel keeps of a killed process: what is pinned.
    drop(killed);
    drop(goes);
    let agent = Agent::start(network.cgroup(), &pins)?;
    assert_eq!(agent.pods().len(), 1);
    let now = agent.interception.enrolments()?;
    assert_eq!(now.len(), stale.len() - 1, "the enrolment of the pod that has gone meanwhile");
    agent.expect_captured(stays.connect(SERVICE), SERVICE, "10.9.0.1")?;

    assert!(programs::cleanup(&pins, false).is_err(), "a live process holds it");
    drop(agent);
    let cleaned = programs::cleanup(&pins, false)?;
    assert!(cleaned.links >= 5 && cleaned.map_dirs == 1, "{cleaned:?}");
    assert!(!pins.exists());
    assert_eq!(programs::cleanup(&pins, false)?, programs::Cleaned::default());
    // Untouched again: the router drops it.
    assert_eq!(stays.connect(SERVICE).unwrap_err().kind(), io::ErrorKind::TimedOut);
    Ok(())
}

#[test]
fn a_second_process_takes_over() -> Result<()> {
    let network = Network::new()?;
    let pins = pin_dir();
    let pod = network.pod("pod", &["10.9.0.1"])?;
    let first = Agent::start(network.cgroup(), &pins)?;
    let before = first.expect_captured(pod.connect(SERVICE), SERVICE, "10.9.0.1")?;
    assert!(!first.interception.is_superseded());

    // Not while the first is changing its tables.
    let held = first.interception.hold()?;
    let second = std::thread::scope(|scope| {
        let second = scope.spawn(|| Agent::start(network.cgroup(), &pins));
        std::thread::sleep(Duration::from_millis(300));
        assert!(!second.is_finished() && !first.interception.is_superseded());
        drop(held);
        second.join().expect("no panic")
    })?;
    assert!(first.interception.hold().is_err());
    let after = second.expect_captured(pod.connect(SERVICE), SERVICE, "10.9.0.1")?;
    assert_ne!(before.pod.capture_port, after.pod.capture_port);
    assert!(first.interception.is_superseded() && !second.interception.is_superseded());

    // Both see a pod that starts now; only the second enrols it.
    let late = network.pod("late", &["10.9.0.2"])?;
    second.wait_for_enrolled(2)?;
    second.expect_captured(late.connect(SERVICE), SERVICE, "10.9.0.2")?;
    let enrolments = second.interception.enrolments()?;
    assert!(first.apply(&[]).is_err());
    let captures = Arc::clone(&first.captures);
    assert_eq!(first.interception.stop()?, Detached::Superseded);
    assert!(captures.lock().unwrap().is_empty(), "its workers were told to close");
    assert_eq!(second.interception.enrolments()?, enrolments, "nothing of the successor's was touched");
    second.expect_captured(pod.connect(SERVICE), SERVICE, "10.9.0.1")?;

    assert_eq!(second.interception.stop()?, Detached::Removed);
    assert!(second.captures.lock().unwrap().is_empty());
    assert!(!pins.exists());
    assert_eq!(pod.connect(SERVICE).unwrap_err().kind(), io::ErrorKind::TimedOut);
    Ok(())
}
