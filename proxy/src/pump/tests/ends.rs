//! FIN is forwarded as FIN, RST as RST, and nothing that was accepted is lost on the way.

use super::*;
use crate::sys::socket;
use std::os::fd::AsFd;

#[test]
fn half_close_each_way() {
    for spec in Spec::all() {
        let name = spec.name();
        for first in [Side::Downstream, Side::Upstream] {
            let rig = spec.clone().start();
            let (mut closing, mut other) = match first {
                Side::Downstream => (rig.client.try_clone().unwrap(), rig.server.try_clone().unwrap()),
                Side::Upstream => (rig.server.try_clone().unwrap(), rig.client.try_clone().unwrap()),
            };
            closing.write_all(b"all I have").unwrap();
            closing.shutdown(Shutdown::Write).unwrap();
            let (bytes, end) = read_all(&mut other);
            assert_eq!(bytes, b"all I have", "{name}");
            assert!(end.is_ok(), "{name}: {end:?}");
            // The other direction lives on, in both meanings.
            std::thread::sleep(Duration::from_millis(20));
            other.write_all(&pattern(6, 300_000)).unwrap();
            std::thread::sleep(Duration::from_millis(20));
            other.write_all(b"!").unwrap();
            other.shutdown(Shutdown::Write).unwrap();
            let (bytes, end) = read_all(&mut closing);
            assert_eq!(bytes.len(), 300_001, "{name}");
            assert!(end.is_ok(), "{name}: {end:?}");
            let report = rig.finish();
            assert_eq!(report.outcome, finished(first), "{name}");
        }
    }
}

#[test]
fn a_fin_without_bytes() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        rig.client.shutdown(Shutdown::Write).unwrap();
        assert_fin(&mut rig.server, &name);
        rig.server.shutdown(Shutdown::Write).unwrap();
        assert_fin(&mut rig.client, &name);
        let report = rig.finish();
        assert_eq!(report.outcome, finished(Side::Downstream), "{name}");
        assert_eq!((report.down.received, report.up.received), (0, 0), "{name}");
    }
}

#[test]
fn a_reset_is_forwarded_each_way() {
    for spec in Spec::all() {
        let name = spec.name();
        for by in [Side::Downstream, Side::Upstream] {
            for talk_first in [false, true] {
                let mut rig = spec.clone().start();
                if talk_first {
                    rig.client.write_all(b"ping").unwrap();
                    rig.server.read_exact(&mut [0; 4]).unwrap();
                    rig.server.write_all(b"pong").unwrap();
                    rig.client.read_exact(&mut [0; 4]).unwrap();
                }
                let mut other = match by {
                    Side::Downstream => {
                        abort(rig.client);
                        rig.server
                    }
                    Side::Upstream => {
                        abort(rig.server);
                        rig.client
                    }
                };
                assert_reset(&mut other, &name);
                let report = join(rig.pump);
                let (downstream, upstream) = match by {
                    Side::Downstream => (CloseType::RemoteReset, CloseType::LocalReset),
                    Side::Upstream => (CloseType::LocalReset, CloseType::RemoteReset),
                };
                let expected = Outcome { cause: Cause::Reset { by }, downstream, upstream };
                assert_eq!(report.outcome, expected, "{name}");
                let n = if talk_first { 4 } else { 0 };
                assert_eq!((report.down.sent, report.up.sent), (n, n), "{name}");
            }
        }
    }
}

/// The endpoint answers, and resets because it did not read everything: the answer must get through.
#[test]
fn an_answer_before_a_reset_arrives() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        rig.client.write_all(b"a long request").unwrap();
        let mut byte = [0];
        while rig.server.peek(&mut byte).unwrap() == 0 {}
        rig.server.write_all(b"413 too large").unwrap();
        drop(rig.server);
        let (bytes, end) = read_all(&mut rig.client);
        assert_eq!(String::from_utf8_lossy(&bytes), "413 too large", "{name}");
        assert_eq!(end.unwrap_err().kind(), io::ErrorKind::ConnectionReset, "{name}");
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::Reset { by: Side::Upstream }, "{name}");
    }
}

/// The same while the client is still sending, so that the reset is found by writing.
#[test]
fn an_answer_before_a_reset_arrives_although_the_client_is_sending() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        let mut writer = rig.client.try_clone().unwrap();
        let sending = std::thread::spawn(move || {
            let block = vec![1; 1 << 16];
            loop {
                if let Err(e) = writer.write_all(&block) {
                    return e.kind();
                }
            }
        });
        rig.server.read_exact(&mut vec![0; 100_000]).unwrap();
        rig.server.write_all(b"413 too large").unwrap();
        drop(rig.server);
        let (bytes, end) = read_all(&mut rig.client);
        // The kernel tells a reset once, to the reader or to the writer. A FIN before it would make it EPIPE.
        let kinds = [Some(join(sending)), end.err().map(|e| e.kind())];
        assert!(kinds.contains(&Some(io::ErrorKind::ConnectionReset)), "{name}: {kinds:?}");
        assert_eq!(String::from_utf8_lossy(&bytes), "413 too large", "{name}");
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::Reset { by: Side::Upstream }, "{name}");
        assert!(report.down.discarded <= report.down.received, "{name}");
    }
}

/// The client sends, closes, and is gone long before the endpoint has read it all.
#[test]
fn what_a_gone_client_had_sent_still_arrives() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        let mut client = rig.client;
        let sending = std::thread::spawn(move || {
            let block = pattern(7, 1 << 20);
            for _ in 0..50 {
                client.write_all(&block).unwrap();
            }
            // Closed in both directions, with megabytes still on their way.
        });
        let mut got = 0;
        let mut buffer = vec![0; 1 << 18];
        loop {
            match rig.server.read(&mut buffer).unwrap() {
                0 => break,
                n => got += n,
            }
            std::thread::sleep(Duration::from_micros(100));
        }
        join(sending);
        assert_eq!(got, 50 << 20, "{name}");
        drop(rig.server);
        assert_eq!(join(rig.pump).outcome, finished(Side::Downstream), "{name}");
    }
}

/// Sends the bytes and a FIN, waits until the pump's kernel has them, and closes the other direction too. From
/// then on everything that is sent to this peer is answered with a RST.
pub(super) fn send_and_vanish(mut stream: TcpStream, bytes: &[u8]) {
    stream.write_all(bytes).unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let started = Instant::now();
    while socket::unacknowledged(stream.as_fd()).unwrap() > 0 {
        assert!(started.elapsed() < LONG, "not acknowledged");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One side sends its FIN, then is found gone by writing to it: everything it sent arrives, then the FIN.
#[test]
fn a_side_that_is_gone_after_its_fin_is_flushed() {
    for spec in Spec::all() {
        for gone in [Side::Downstream, Side::Upstream] {
            let name = format!("{}, {gone:?}", spec.name());
            let rig = spec.clone().start();
            let (vanishing, mut kept) = match gone {
                Side::Downstream => (rig.client, rig.server),
                Side::Upstream => (rig.server, rig.client),
            };
            let bytes = pattern(8, 12 << 20);
            let (ready_to_talk, talk) = std::sync::mpsc::channel();
            let sent = bytes.clone();
            let vanisher = std::thread::spawn(move || {
                send_and_vanish(vanishing, &sent);
                ready_to_talk.send(()).unwrap();
            });
            let mut talker = kept.try_clone().unwrap();
            let talking = std::thread::spawn(move || {
                talk.recv().unwrap();
                for _ in 0..10 {
                    let _ = talker.write_all(&[9; 4_000]);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            let mut got = Vec::new();
            let mut buffer = vec![0; 1 << 16];
            loop {
                match kept.read(&mut buffer).expect(&name) {
                    0 => break,
                    n => got.extend_from_slice(&buffer[..n]),
                }
                std::thread::sleep(Duration::from_micros(500));
            }
            assert!(got == bytes, "{name}: {} of {}", got.len(), bytes.len());
            join(vanisher);
            join(talking);
            drop(kept);
            let report = join(rig.pump);
            assert_eq!(report.outcome.cause, Cause::Reset { by: gone }, "{name}: {report:?}");
            let closes = (report.outcome.downstream, report.outcome.upstream);
            assert_eq!(closes, (CloseType::Normal, CloseType::Normal), "{name}: the FIN came first");
            // By then the kernel may have taken everything, and nothing is left to be flushed.
            assert!(report.flushed.is_none_or(|to| to == gone.other()), "{name}: {report:?}");
        }
    }
}

/// The other side's reset is noticed although nothing is read from it, because the reader has stalled.
#[test]
fn a_reset_behind_a_stalled_reader_is_noticed() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = Spec { send_buffer: Some(4096), ..spec }.start();
        rig.client.set_nonblocking(true).unwrap();
        let block = vec![3; 1 << 16];
        let mut quiet = 0;
        while quiet < 20 {
            let taken = rig.client.write(&block).unwrap_or(0);
            quiet = if taken > 0 { 0 } else { quiet + 1 };
            std::thread::sleep(Duration::from_millis(5));
        }
        abort(rig.client);
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::Reset { by: Side::Downstream }, "{name}");
        assert_eq!(report.down.paused, report.down.resumed + 1, "{name}");
        assert_reset(&mut rig.server, &name);
    }
}

/// The same after a FIN: the client half-closed, waits for an answer, and dies.
#[test]
fn a_reset_after_a_half_close_is_noticed() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        rig.client.write_all(b"question").unwrap();
        rig.client.shutdown(Shutdown::Write).unwrap();
        let (bytes, _) = read_all(&mut rig.server);
        assert_eq!(bytes, b"question");
        std::thread::sleep(Duration::from_millis(20));
        abort(rig.client);
        let report = join(rig.pump);
        assert_eq!(report.outcome.cause, Cause::Reset { by: Side::Downstream }, "{name}");
        assert_eq!(report.outcome.downstream, CloseType::Normal, "{name}: the FIN came first");
        assert_eq!(report.flushed, None, "{name}: nothing was left to be sent");
        assert_eq!(report.down.sent, 8, "{name}");
    }
}

/// Dropping the future instead of finishing it must still close both connections.
#[test]
fn dropping_the_pump_closes_both_sides() {
    for engine in [Engine::IoUring, Engine::TokioUring, Engine::Epoll] {
        let (mut client, downstream) = pair();
        let (mut server, upstream) = pair();
        let pump = std::thread::spawn(move || {
            uring::start(engine, async {
                let (resources, counters) = (Resources::default(), Counters::default());
                let options = Options::default();
                let running = run(&resources, [&downstream, &upstream], None, &options, &counters);
                assert!(time::timeout(Duration::from_millis(50), running).await.is_err());
                drop((downstream, upstream));
                // The runtime goes on, as a worker's does.
                time::sleep(Duration::from_millis(200)).await;
            })
            .unwrap();
        });
        assert_fin(&mut client, "client");
        assert_fin(&mut server, "server");
        join(pump);
    }
}

/// Small messages each way, and one side resets in the middle of them. The other is told by its next read or write.
#[test]
fn a_reset_amid_small_messages_is_no_fin() {
    for (spec, times) in
        Spec::all().into_iter().map(|spec| (spec.clone(), if spec.mode == Mode::Adaptive { 100 } else { 10 }))
    {
        let name = spec.name();
        for (time, by) in (0..times).flat_map(|time| [(time, Side::Downstream), (time, Side::Upstream)]) {
            let Rig { client, server, pump, .. } = spec.clone().start();
            let (mut resetting, mut other) =
                if by == Side::Downstream { (client, server) } else { (server, client) };
            let mut writer = other.try_clone().unwrap();
            let writing = std::thread::spawn(move || {
                loop {
                    if let Err(error) = writer.write_all(b"tick") {
                        return error.kind();
                    }
                    std::thread::sleep(Duration::from_micros(20));
                }
            });
            for _ in 0..=time % 5 {
                resetting.read_exact(&mut [0; 4]).unwrap();
                resetting.write_all(b"tock").unwrap();
            }
            abort(resetting);
            let (_, end) = read_all(&mut other);
            let told = [end.err().map(|error| error.kind()), Some(join(writing))];
            assert!(told.contains(&Some(io::ErrorKind::ConnectionReset)), "{name}: {told:?}");
            assert_eq!(join(pump).outcome.cause, Cause::Reset { by }, "{name}");
        }
    }
}
