//! Work whose instructions `cargo xtask bench instructions` counts, under callgrind: `instructions NAME` does one of
//! them, `instructions` alone lists them.

use std::hint::black_box;
use std::process::ExitCode;
use std::time::{Duration, UNIX_EPOCH};

use tidegate::access_log::{Formatter, Now};
use tidegate::cluster::WorkerBalancers;
use tidegate::config::access_log::Format;
use tidegate::config::cluster::{Discovery, LbPolicy};
use tidegate::connection::record::LogType;
use tidegate_benches::{Connections, ISTIO, Owners, by_name, by_port, by_prefix, cluster, record};

/// How often each is done. `cargo xtask bench instructions` divides by it.
const TIMES: u32 = 1000;

/// Among so many chains, hosts, listeners.
const MANY: u32 = 1000;

type Work = Box<dyn FnMut(u32)>;

/// Makes it ready, uncounted.
type Prepare = fn() -> Work;

const ALL: &[(&str, Prepare)] = &[
    ("filter_chain_by_prefix", || chain(Connections::new(MANY, by_prefix))),
    ("filter_chain_by_server_name", || chain(Connections::new(MANY, by_name))),
    ("filter_chain_by_port_and_transport", || chain(Connections::new(MANY, by_port))),
    ("pick_round_robin", || pick(LbPolicy::RoundRobin)),
    ("pick_least_request", || pick(LbPolicy::LeastRequest { choice_count: 2, active_request_bias: 1.0 })),
    ("pick_random", || pick(LbPolicy::Random)),
    ("original_dst_own_address", || {
        let owners = Owners::new(MANY);
        Box::new(move |lookup| assert!(black_box(owners.exact(lookup)).is_some()))
    }),
    ("original_dst_wildcard_address", || {
        let owners = Owners::new(MANY);
        Box::new(move |lookup| assert!(black_box(owners.wildcard(lookup)).is_some()))
    }),
    ("access_log_in_istios_format", || {
        let format = Format::Text { format: ISTIO.into(), omit_empty_values: false };
        let formatter = Formatter::parse(&format).expect("a valid format");
        // Always the same moment: other digits take other instructions.
        let now = Now { wall: UNIX_EPOCH + Duration::from_secs(1_767_225_661), ..Now::read() };
        let (record, mut out) = (record(), Vec::with_capacity(4096));
        Box::new(move |_| {
            out.clear();
            formatter.format(black_box(&record), LogType::TcpConnectionEnd, now, &mut out);
            black_box(&out);
        })
    }),
];

fn chain(connections: Connections) -> Work {
    Box::new(move |lookup| assert!(black_box(connections.find(lookup)).is_some()))
}

fn pick(policy: LbPolicy) -> Work {
    let cluster = cluster(Discovery::Static, policy, MANY as u16, |_| 1);
    let mut balancers = WorkerBalancers::with_seed(1);
    Box::new(move |_| _ = black_box(balancers.pick(&cluster, None, None)))
}

/// Callgrind counts inside of this one only: its name is how it is found.
#[inline(never)]
fn counted_by_callgrind(work: &mut Work) {
    for time in 0..TIMES {
        work(black_box(time));
    }
}

fn main() -> ExitCode {
    let Some(wanted) = std::env::args().nth(1) else {
        for (name, _) in ALL {
            println!("{name} {TIMES}");
        }
        return ExitCode::SUCCESS;
    };
    let Some((_, prepare)) = ALL.iter().find(|(name, _)| *name == wanted) else {
        eprintln!("there is no {wanted}");
        return ExitCode::from(2);
    };
    let mut work = prepare();
    // Once around, uncounted: what is only made at the first use is no part of it.
    for time in 0..TIMES {
        work(time);
    }
    counted_by_callgrind(&mut work);
    ExitCode::SUCCESS
}
