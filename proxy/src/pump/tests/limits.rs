//! Time limits, memory limits, and what an idle connection costs.

use std::cell::Cell;

use nix::sys::resource::{Resource, getrlimit, setrlimit};

use super::*;

const SHORT: Duration = Duration::from_millis(150);

fn cut(cause: Cause) -> Outcome {
    Outcome { cause, downstream: CloseType::Normal, upstream: CloseType::Normal }
}

#[test]
fn an_idle_connection_ends_with_a_fin() {
    // Far apart, so that a busy machine does not take one for the other.
    let (idle, pause) = (SHORT * 2, SHORT / 3);
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = Spec { idle_timeout: Some(idle), ..spec }.start();
        let started = Instant::now();
        // Bytes in either direction keep it alive.
        for i in 0..13 {
            std::thread::sleep(pause);
            let (from, to) = if i % 2 == 0 {
                (&mut rig.client, &mut rig.server)
            } else {
                (&mut rig.server, &mut rig.client)
            };
            from.write_all(b"x").unwrap();
            to.read_exact(&mut [0]).unwrap();
        }
        assert!(started.elapsed() > idle * 2);
        assert_fin(&mut rig.client, &name);
        assert_fin(&mut rig.server, &name);
        assert_eq!(join(rig.pump).outcome, cut(Cause::IdleTimeout), "{name}");
    }
}

/// A reader that is stuck is idle too. It would take the cut-off stream for a complete one: it is reset.
#[test]
fn a_stuck_connection_is_idle() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = Spec { idle_timeout: Some(SHORT), send_buffer: Some(4096), ..spec }.start();
        rig.client.set_nonblocking(true).unwrap();
        let block = vec![3; 1 << 16];
        while !rig.pump.is_finished() {
            let _ = rig.client.write(&block);
            std::thread::sleep(Duration::from_millis(1));
        }
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::IdleTimeout, "{name}");
        assert_eq!(report.outcome.upstream, CloseType::LocalReset, "{name}");
        assert!(report.down.discarded > 0, "{name}");
        assert_reset(&mut rig.server, &name);
    }
}

/// The client is gone after its FIN, and the endpoint never reads what it had sent.
#[test]
fn a_stuck_flush_is_idle() {
    for spec in Spec::all() {
        let name = spec.name();
        let rig = Spec { idle_timeout: Some(SHORT), send_buffer: Some(4096), ..spec }.start();
        // More than the endpoint's kernel takes, and the pump's kernel has it all.
        let client = rig.client;
        join(std::thread::spawn(move || ends::send_and_vanish(client, &vec![1; 180_000])));
        let mut talker = rig.server.try_clone().unwrap();
        for _ in 0..10 {
            let _ = talker.write_all(b"are you there?");
            std::thread::sleep(Duration::from_millis(2));
        }
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::IdleTimeout, "{name}: {report:?}");
    }
}

#[test]
fn the_maximum_duration_ends_a_busy_connection() {
    for spec in Spec::all() {
        let name = spec.name();
        let rig = Spec { max_duration: Some(SHORT), idle_timeout: Some(LONG), ..spec }.start();
        let mut writer = rig.client.try_clone().unwrap();
        let writing = std::thread::spawn(move || {
            let block = vec![1; 1 << 16];
            while writer.write_all(&block).is_ok() {}
        });
        let mut server = rig.server;
        let reading = std::thread::spawn(move || read_all(&mut server).0.len());
        assert_eq!(join(rig.pump).outcome.cause, Cause::MaxDuration, "{name}");
        join(writing);
        assert!(join(reading) > 0, "{name}");

        let mut rig = Spec { max_duration: Some(SHORT), ..Spec::new(Mode::Adaptive) }.start();
        assert_fin(&mut rig.client, &name);
        assert_fin(&mut rig.server, &name);
        assert_eq!(join(rig.pump).outcome, cut(Cause::MaxDuration), "{name}");
    }
}

#[test]
fn a_drain_ends_it_with_a_fin() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = Spec { kill_after: Some(SHORT), ..spec }.start();
        rig.client.write_all(b"hello").unwrap();
        rig.server.read_exact(&mut [0; 5]).unwrap();
        assert_fin(&mut rig.client, &name);
        assert_fin(&mut rig.server, &name);
        assert_eq!(join(rig.pump).outcome, cut(Cause::Killed), "{name}");
    }
}

#[test]
fn a_stalled_reader_costs_no_more_than_the_limit() {
    for spec in Spec::all() {
        for limit in [1_024, 16_384, 1 << 20] {
            let name = format!("{}, limit {limit}", spec.name());
            let mode = spec.mode;
            let spec = Spec { buffer_limit: limit, send_buffer: Some(4096), ..spec.clone() };
            let mut rig = spec.start();
            rig.client.set_write_timeout(Some(Duration::from_millis(200))).unwrap();
            let block = pattern(10, 1 << 16);
            let mut sent = 0;
            let stalled = loop {
                match rig.client.write(&block) {
                    Ok(n) => sent += n,
                    Err(e) => break e,
                }
                assert!(sent < 256 << 20, "{name}: no backpressure");
            };
            assert_eq!(stalled.kind(), io::ErrorKind::WouldBlock, "{name}");
            let most = rig.buffered.load(Ordering::Relaxed) as usize;
            let bound = match mode {
                Mode::CopyOnly => (limit as usize).min(SCRATCH),
                _ => (limit as usize).max(SCRATCH),
            };
            assert!(most > 0 && most <= bound, "{name}: {most} held, at most {bound} expected");
            rig.client.shutdown(Shutdown::Write).unwrap();
            let (bytes, _) = read_all(&mut rig.server);
            assert_eq!(bytes.len(), sent, "{name}");
            let report = rig.finish();
            assert!(
                report.down.paused > 0 && report.down.paused == report.down.resumed,
                "{name}: {report:?}"
            );
        }
    }
}

/// An idle connection is its future and its sockets: keep the future small.
#[test]
fn the_future_is_small() {
    let size = size_of::<Running<'_>>();
    assert!(size <= 384, "{size} bytes");
}

/// One bulk connection must not keep the others of its worker waiting.
#[test]
fn bulk_does_not_starve_a_neighbour() {
    for engine in [Engine::IoUring, Engine::TokioUring, Engine::Epoll] {
        let (mut bulk_client, bulk_down) = pair();
        let (mut bulk_server, bulk_up) = pair();
        let (mut client, downstream) = pair();
        let (mut server, upstream) = pair();
        let pump = std::thread::spawn(move || {
            uring::start(engine, async {
                let resources = Rc::new(Resources::default());
                let shared = Rc::clone(&resources);
                let ended = Rc::new(Cell::new(None));
                let bulk = Rc::clone(&ended);
                uring::spawn(async move {
                    let (options, counters) = (Options::default(), Counters::default());
                    run(&shared, [&bulk_down, &bulk_up], None, &options, &counters).await;
                    bulk.set(Some(counters.downstream.sent.get()));
                });
                let (options, counters) = (Options::default(), Counters::default());
                run(&resources, [&downstream, &upstream], None, &options, &counters).await;
                ended.get()
            })
            .unwrap()
        });
        std::thread::spawn(move || {
            let block = vec![1; 1 << 20];
            while bulk_client.write_all(&block).is_ok() {}
        });
        std::thread::spawn(move || while bulk_server.read(&mut vec![0; 1 << 20]).is_ok_and(|n| n > 0) {});
        for _ in 0..200 {
            client.write_all(b"ping").unwrap();
            server.read_exact(&mut [0; 4]).unwrap();
            server.write_all(b"pong").unwrap();
            client.read_exact(&mut [0; 4]).unwrap();
        }
        drop((client, server));
        assert_eq!(join(pump), None, "the bulk connection was still busy");
    }
}

/// Peers that take nothing cost what the limits of their connections say, whatever the clients send.
#[test]
fn a_thousand_stalled_readers_cost_what_their_limits_say() {
    const LIMIT: u32 = 32 << 10;
    let (_, most) = getrlimit(Resource::RLIMIT_NOFILE).unwrap();
    setrlimit(Resource::RLIMIT_NOFILE, most, most).unwrap();
    let connections = usize::try_from(most / 4).unwrap_or(usize::MAX).saturating_sub(100).min(1_000);
    assert!(connections >= 200, "{most} descriptors are too few for this");
    for engine in [Engine::IoUring, Engine::TokioUring, Engine::Epoll] {
        let mut ends = Vec::new();
        let all: Vec<_> = (0..connections)
            .map(|_| {
                let ((client, downstream), (server, upstream)) = (pair(), pair());
                let client = Socket::from(client);
                let server = Socket::from(server);
                for socket in [&client, &downstream, &upstream, &server] {
                    socket.set_send_buffer_size(16 << 10).unwrap();
                    socket.set_recv_buffer_size(16 << 10).unwrap();
                }
                client.set_nonblocking(true).unwrap();
                // Like a conversation at first, so that what is ready for small messages is in use.
                assert_eq!(client.send(b"hello").unwrap(), 5);
                ends.push((client, server));
                (downstream, upstream)
            })
            .collect();
        let before = resident_bytes();
        let (held, grown) = uring::start(engine, async move {
            let resources = Rc::new(Resources::default());
            let counters: Vec<_> = (0..connections).map(|_| Rc::new(Counters::default())).collect();
            for (sockets, counters) in all.into_iter().zip(&counters) {
                let (resources, counters) = (Rc::clone(&resources), Rc::clone(counters));
                uring::spawn(async move {
                    let options = Options {
                        downstream_buffer_limit: LIMIT,
                        upstream_buffer_limit: LIMIT,
                        ..Options::default()
                    };
                    run(&resources, [&sockets.0, &sockets.1], None, &options, &counters).await;
                });
            }
            let bulk = vec![7; 1 << 16];
            let mut quiet = 0;
            while quiet < 20 {
                time::sleep(Duration::from_millis(5)).await;
                let sent: usize = ends.iter().map(|(client, _)| client.send(&bulk).unwrap_or(0)).sum();
                quiet = if sent == 0 { quiet + 1 } else { 0 };
            }
            let held: u64 = counters.iter().map(|counters| counters.downstream.buffered()).sum();
            (held, resident_bytes().saturating_sub(before))
        })
        .unwrap();
        let most = connections as u64 * 64 * 1024;
        assert!(held > 0, "{engine}: nobody was stalled");
        assert!(held <= most, "{engine}: {held} bytes are held for {connections} connections");
        // Buffers of the ring, the connections themselves, and what the allocator keeps.
        assert!(grown <= most + (16 << 20), "{engine}: {grown} bytes more in memory, {held} held");
    }
}

fn resident_bytes() -> u64 {
    let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = statm.split(' ').nth(1).unwrap().parse().unwrap();
    pages * 4096
}
