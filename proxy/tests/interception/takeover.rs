//! Two processes, one after the other or side by side: pins, takeover, cleanup.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicBool, Ordering};

use tidegate::intercept::error::InterceptError;
use tidegate::intercept::programs::{Cleaned, Detached, Interceptor, cleanup};
use tidegate_common::{Destination, Reason, Verdict};

use crate::lab::*;

const SERVICE: &str = "172.16.0.1:50001";
const PASSED: i32 = libc::EACCES;

fn capture_service(interceptor: &mut Interceptor) {
    let key = Destination::from(SERVICE.parse::<SocketAddr>().unwrap());
    interceptor.set_destinations(&HashMap::from([(key, Verdict::Capture.into())])).unwrap();
}

fn assert_captured(interceptor: &Interceptor, pod: &Pod, listener: &socket2::Socket) {
    let _client = pod.connect(SERVICE).unwrap();
    assert_eq!(original_dst(interceptor, &accept(listener)), Some(SERVICE.parse().unwrap()));
}

#[test]
fn a_successor_takes_over_and_the_old_process_cannot_undo_it() {
    let lab = Lab::new();
    let mut old = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut old);
    capture_service(&mut old);
    let client = pod.connect(SERVICE).unwrap();
    let accepted = accept(&listener);
    assert!(old.is_current());

    let mut new = lab.load();
    assert!(new.is_current() && !old.is_current());
    // Rules, enrolments and counters are still there, and so is what a socket knew.
    assert_captured(&new, &pod, &listener);
    assert_eq!(original_dst(&new, &accepted), Some(SERVICE.parse().unwrap()));
    assert_eq!(peer(&client).to_string(), SERVICE);
    assert_eq!(count(&new, Reason::HandedOver), 2, "one program ran, and its counters went on");
    assert!(new.enrolments().unwrap().contains_key(&pod.cookie));

    assert!(matches!(old.forget(pod.cookie), Err(InterceptError::Superseded(_))));
    assert!(matches!(old.set_default_verdict(Verdict::Refuse), Err(InterceptError::Superseded(_))));
    assert_eq!(old.detach().unwrap(), Detached::Superseded);
    assert_captured(&new, &pod, &listener);

    new.set_destinations(&HashMap::new()).unwrap();
    assert_eq!(pod.connect(SERVICE).unwrap_err(), PASSED);
    assert_eq!(new.detach().unwrap(), Detached::Removed);
    assert!(!lab.pin_dir.exists());
    assert_eq!(pod.connect(SERVICE).unwrap_err(), PASSED);
}

#[test]
fn no_connect_slips_through_a_takeover() {
    let lab = Lab::new();
    let mut first = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut first);
    capture_service(&mut first);
    let stop = AtomicBool::new(false);
    let mut current = first;
    let (attempts, last) = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut attempts = 0_u64;
            while !stop.load(Ordering::Relaxed) {
                let client = pod.connect(SERVICE).expect("captured");
                drop(accept(&listener));
                reset(client);
                attempts += 1;
            }
            attempts
        });
        for _ in 0..8 {
            let next = lab.load();
            assert_eq!(current.detach().unwrap(), Detached::Superseded);
            current = next;
        }
        stop.store(true, Ordering::Relaxed);
        (connecting.join().unwrap(), current)
    });
    assert!(attempts > 0);
    settled(&last);
    assert_eq!(counts(&last), [("captured", attempts), ("in_syn", attempts), ("handed_over", attempts)]);
}

#[test]
fn a_killed_process_leaves_pins_and_cleanup_removes_them() {
    let lab = Lab::new();
    assert_eq!(cleanup(&lab.pin_dir, false).unwrap(), Cleaned::default(), "nothing there is fine");
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    assert!(
        matches!(cleanup(&lab.pin_dir, false), Err(InterceptError::InUse(_))),
        "not under a process at work"
    );
    // What the kernel does for a killed process: descriptors are closed, pins stay.
    drop(interceptor);
    // Not only closed: another test's helper, just forked, may have it open for a moment.
    listener.shutdown(std::net::Shutdown::Both).unwrap();
    assert_eq!(pod.connect(SERVICE).unwrap_err(), PASSED, "nobody is there: fail mode open");
    // Five programs: four where pods are, and tcp_events there and at the agent.
    assert_eq!(lab.clean_up().unwrap(), Cleaned { links: 6, map_dirs: 1 });
    assert!(!lab.pin_dir.exists());
    assert_eq!(pod.connect(SERVICE).unwrap_err(), PASSED);
}

#[test]
fn a_restart_after_a_kill_goes_on_with_what_is_pinned() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    drop(interceptor);
    let interceptor = lab.load();
    assert_captured(&interceptor, &pod, &listener);
}

#[test]
fn a_link_of_a_dead_cgroup_is_replaced() {
    let lab = Lab::new();
    drop(lab.load());
    std::fs::remove_dir(&lab.pods).unwrap();
    std::fs::create_dir(&lab.pods).unwrap();
    let mut interceptor = lab.load();
    assert!(interceptor.is_current());
    let links = std::fs::read_dir(lab.pin_dir.join("links")).unwrap().count();
    assert_eq!(links, 6, "those of the dead cgroup are gone");
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    assert_captured(&interceptor, &pod, &listener);
}

#[test]
fn what_is_made_again_or_new_is_attached_to() {
    let lab = Lab::new();
    let mut interceptor = lab.load();
    assert!(!interceptor.attach_to_new(&[]).unwrap(), "nothing is missing");
    std::fs::remove_dir(&lab.pods).unwrap();
    assert!(!interceptor.attach_to_new(&[]).unwrap(), "there is nothing to attach to");
    std::fs::create_dir(&lab.pods).unwrap();
    assert!(interceptor.attach_to_new(&[]).unwrap());
    assert!(interceptor.is_current());
    let links = || std::fs::read_dir(lab.pin_dir.join("links")).unwrap().count();
    assert_eq!(links(), 6, "those of the dead cgroup are gone");
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    assert_captured(&interceptor, &pod, &listener);
    // One more, and one that is covered already.
    let more = [lab.agent.join("more"), lab.pods.join("below")];
    for dir in &more {
        std::fs::create_dir(dir).unwrap();
    }
    assert!(interceptor.attach_to_new(&more).unwrap());
    assert_eq!(interceptor.attach_points(), [lab.pods.clone(), more[0].clone()]);
    assert_eq!(links(), 10, "tcp_events is there already, by the agent's");
    assert!(interceptor.is_current());
    drop(interceptor);
    for dir in &more {
        std::fs::remove_dir(dir).unwrap();
    }
}

#[test]
fn a_dead_attach_point_is_noticed() {
    let lab = Lab::new();
    let interceptor = lab.load();
    std::fs::remove_dir(&lab.pods).unwrap();
    let deadline = std::time::Instant::now() + LONG;
    while interceptor.is_current() {
        assert!(std::time::Instant::now() < deadline);
        std::thread::yield_now();
    }
    assert!(matches!(interceptor.detach().unwrap(), Detached::Removed));
}

#[test]
fn nested_attach_points_run_once() {
    let lab = Lab::new();
    let mut options = lab.options();
    options.cgroups = vec![lab.pods.clone(), lab.pods.parent().unwrap().into(), lab.pods.clone()];
    let mut interceptor = Interceptor::load(&options).unwrap();
    assert_eq!(interceptor.attach_points(), [lab.pods.parent().unwrap()]);
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    assert_captured(&interceptor, &pod, &listener);
    assert_eq!(counts(&interceptor), [("captured", 1), ("in_syn", 1), ("handed_over", 1)]);
    // And when the attach points change with the successor, too.
    let successor = lab.load();
    assert_eq!(successor.attach_points(), std::slice::from_ref(&lab.pods));
    assert_captured(&successor, &pod, &listener);
    assert_eq!(counts(&successor), [("captured", 2), ("in_syn", 2), ("handed_over", 2)]);
}

#[test]
fn a_successor_with_other_map_sizes_keeps_the_contents() {
    let lab = Lab::new();
    let mut old = lab.load();
    let pod = lab.pod();
    let listener = pod.capture(&mut old);
    capture_service(&mut old);
    let mut options = lab.options();
    options.sizes.in_flight *= 2;
    options.sizes.namespaces = 77;
    options.sizes.destinations = 78;
    let new = Interceptor::load(&options).unwrap();
    assert_captured(&new, &pod, &listener);
    assert_eq!(new.enrolments().unwrap(), HashMap::from([(pod.cookie, enrolment())]));
}

#[test]
fn maps_of_another_layout_are_replaced() {
    let lab = Lab::new();
    drop(lab.load());
    std::fs::rename(maps_dir(&lab), lab.pin_dir.join("maps-v0")).unwrap();
    let interceptor = lab.load();
    assert!(interceptor.is_current());
    assert!(maps_dir(&lab).exists() && !lab.pin_dir.join("maps-v0").exists());
}

fn maps_dir(lab: &Lab) -> std::path::PathBuf {
    lab.pin_dir.join(format!("maps-v{}", tidegate_common::LAYOUT_VERSION))
}

#[test]
fn errors_say_what_to_do() {
    let lab = Lab::new();
    let mut options = lab.options();
    options.cgroups = vec![];
    assert!(matches!(Interceptor::load(&options), Err(InterceptError::NoCgroup)));
    options.cgroups = vec!["/sys/fs/bpf".into()];
    let error = Interceptor::load(&options).err().unwrap().to_string();
    assert!(error.starts_with("/sys/fs/bpf is not a cgroup v2 directory: "), "{error}");
    options.cgroups = vec![lab.pods.clone()];
    options.pin_dir = "/tmp/tidegate-not-bpffs".into();
    let error = Interceptor::load(&options).err().unwrap().to_string();
    assert!(error.contains("/tmp/tidegate-not-bpffs is not on a BPF file system"), "{error}");
    assert!(!options.pin_dir.exists());
}

#[test]
fn debug_lines_reach_the_log() {
    use std::sync::Mutex;
    struct Lines(Mutex<Vec<String>>);
    impl log::Log for Lines {
        fn enabled(&self, _: &log::Metadata<'_>) -> bool {
            true
        }
        fn log(&self, record: &log::Record<'_>) {
            self.0.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }
    static LINES: Lines = Lines(Mutex::new(Vec::new()));
    log::set_logger(&LINES).unwrap();
    log::set_max_level(log::LevelFilter::Debug);

    let lab = Lab::new();
    let mut options = lab.options();
    options.debug = true;
    let mut interceptor = Interceptor::load(&options).unwrap();
    let mut lines = interceptor.take_log().expect("debug is on");
    let pod = lab.pod();
    let listener = pod.capture(&mut interceptor);
    capture_service(&mut interceptor);
    assert_captured(&interceptor, &pod, &listener);
    lines.flush();
    let got = LINES.0.lock().unwrap().clone();
    assert!(got.iter().any(|line| line.contains("172.16.0.1]:50001 captured")), "{got:?}");
    assert!(lab.load().take_log().is_none(), "off by default");
}
