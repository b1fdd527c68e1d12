//! Bytes arrive, all of them, once, in order; and by the path that they should take.

use super::*;

/// Sends `total` pseudo-random bytes, then a FIN.
fn send_pattern(mut stream: TcpStream, seed: u64, total: usize) {
    let block = pattern(seed, 1 << 20);
    let (mut left, mut at) = (total, 0);
    while left > 0 {
        // Odd sizes, so that nothing is aligned.
        let n = left.min(299_993).min(block.len() - at);
        stream.write_all(&block[at..at + n]).unwrap();
        left -= n;
        at = (at + n) % block.len();
    }
    stream.shutdown(Shutdown::Write).unwrap();
}

/// Reads to the FIN, slowly at first, and compares; returns how many bytes came.
fn expect_pattern(mut stream: TcpStream, seed: u64, slowly: bool) -> usize {
    let block = pattern(seed, 1 << 20);
    let mut buffer = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let at = total % block.len();
        let n = stream.read(&mut buffer[..block.len() - at]).unwrap();
        if n == 0 {
            return total;
        }
        assert!(buffer[..n] == block[at..at + n], "wrong bytes between {total} and {}", total + n);
        total += n;
        if slowly && total < 8 << 20 {
            std::thread::sleep(Duration::from_millis(2));
        }
    }
}

#[test]
fn both_ways_at_once_with_a_slow_reader() {
    let total: usize = if cfg!(debug_assertions) { 256 << 20 } else { 1 << 30 };
    for spec in Spec::all() {
        let name = spec.name();
        let mode = spec.mode;
        let rig = spec.start();
        let (client, server) = (rig.client.try_clone().unwrap(), rig.server.try_clone().unwrap());
        let (client2, server2) = (rig.client.try_clone().unwrap(), rig.server.try_clone().unwrap());
        let up = std::thread::spawn(move || send_pattern(client, 1, total));
        let down = std::thread::spawn(move || send_pattern(server, 2, total));
        let at_server = std::thread::spawn(move || expect_pattern(server2, 1, true));
        let at_client = std::thread::spawn(move || expect_pattern(client2, 2, false));
        join(up);
        join(down);
        assert_eq!((join(at_server), join(at_client)), (total, total), "{name}");
        let report = rig.finish();
        assert!(matches!(report.outcome.cause, Cause::Finished { .. }), "{name}: {report:?}");
        assert_eq!((report.down.sent, report.up.sent), (total as u64, total as u64), "{name}");
        match mode {
            Mode::CopyOnly => assert_eq!((report.spliced, report.pipes), (0, 0)),
            Mode::SpliceOnly => assert_eq!(report.copied, 0),
            Mode::Adaptive => {
                assert!(report.spliced > report.copied * 9, "{name}: bulk is not spliced: {report:?}");
                assert!(report.down.to_splice >= 1 && report.up.to_splice >= 1, "{name}: {report:?}");
            }
        }
        assert_eq!(
            (report.down.paused, report.up.paused),
            (report.down.resumed, report.up.resumed),
            "{name}"
        );
    }
}

#[test]
fn single_bytes() {
    for spec in Spec::all() {
        let name = spec.name();
        let mode = spec.mode;
        let mut rig = spec.start();
        for i in 0..3_000_u32 {
            let byte = [(i % 251) as u8];
            rig.client.write_all(&byte).unwrap();
            if i % 3 == 0 {
                continue;
            }
            rig.server.write_all(&byte).unwrap();
        }
        rig.client.shutdown(Shutdown::Write).unwrap();
        rig.server.shutdown(Shutdown::Write).unwrap();
        let (at_server, _) = read_all(&mut rig.server);
        let (at_client, _) = read_all(&mut rig.client);
        let expected: Vec<_> = (0..3_000_u32).map(|i| (i % 251) as u8).collect();
        assert_eq!(at_server, expected, "{name}");
        let expected: Vec<_> = (0..3_000_u32).filter(|i| i % 3 != 0).map(|i| (i % 251) as u8).collect();
        assert_eq!(at_client, expected, "{name}");
        let report = rig.finish();
        if mode != Mode::SpliceOnly {
            assert_eq!((report.spliced, report.pipes), (0, 0), "{name}: single bytes are copied");
        }
    }
}

/// A stalled reader, and single-byte writes that fill the pipe's slots long before its bytes.
#[test]
fn single_bytes_into_a_stalled_reader() {
    for spec in Spec::all() {
        let name = spec.name();
        let spec = Spec { send_buffer: Some(4096), ..spec };
        let mut rig = spec.start();
        rig.client.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
        let mut accepted = Vec::new();
        while accepted.len() < 300_000 {
            let byte = (accepted.len() % 251) as u8;
            match rig.client.write(&[byte]) {
                Ok(n) => accepted.extend(std::iter::repeat_n(byte, n)),
                Err(_) => break,
            }
        }
        rig.client.shutdown(Shutdown::Write).unwrap();
        let (at_server, end) = read_all(&mut rig.server);
        assert!(end.is_ok(), "{name}");
        assert_eq!(at_server.len(), accepted.len(), "{name}");
        assert!(at_server == accepted, "{name}: not in order");
        rig.finish();
    }
}

#[test]
fn ping_pong_of_all_sizes() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        let bytes = pattern(3, 1 << 20);
        let mut echo = rig.server.try_clone().unwrap();
        let server = std::thread::spawn(move || {
            let mut buffer = vec![0; 1 << 16];
            loop {
                match echo.read(&mut buffer).unwrap() {
                    0 => return echo.shutdown(Shutdown::Write).unwrap(),
                    n => echo.write_all(&buffer[..n]).unwrap(),
                }
            }
        });
        let sizes =
            [1, 64, 1_448, 4_096, SCRATCH - 1, SCRATCH, SCRATCH + 1, 200_000, 2, 3, 4, 5, 6, 1 << 20, 7];
        for size in sizes {
            let mut writer = rig.client.try_clone().unwrap();
            std::thread::scope(|scope| {
                scope.spawn(|| writer.write_all(&bytes[..size]).unwrap());
                let mut answer = vec![0; size];
                rig.client.read_exact(&mut answer).unwrap();
                assert!(answer == bytes[..size], "{name}: {size}");
            });
        }
        rig.client.shutdown(Shutdown::Write).unwrap();
        assert_fin(&mut rig.client, &name);
        join(server);
        let report = rig.finish();
        assert_eq!(report.outcome, finished(Side::Downstream), "{name}");
    }
}

#[test]
fn the_server_may_speak_first() {
    for spec in Spec::all() {
        let name = spec.name();
        let mut rig = spec.start();
        rig.server.write_all(b"220 ready").unwrap();
        let mut banner = [0; 9];
        rig.client.read_exact(&mut banner).unwrap();
        assert_eq!(&banner, b"220 ready", "{name}");
        rig.finish();
    }
}

#[test]
fn bulk_then_trickle_goes_back_to_copying_and_returns_the_pipe() {
    let mut rig = Spec::new(Mode::Adaptive).start();
    let bytes = pattern(4, 4 << 20);
    let mut writer = rig.client.try_clone().unwrap();
    let sent = bytes.clone();
    let writing = std::thread::spawn(move || writer.write_all(&sent).unwrap());
    let mut got = vec![0; bytes.len()];
    rig.server.read_exact(&mut got).unwrap();
    join(writing);
    assert!(got == bytes);
    for i in 0..20_u8 {
        rig.client.write_all(&[i]).unwrap();
        let mut byte = [0];
        rig.server.read_exact(&mut byte).unwrap();
        assert_eq!(byte, [i]);
    }
    let report = rig.finish();
    assert_eq!((report.down.to_splice, report.down.to_copy), (1, 1), "{report:?}");
    assert!(report.copied >= 15, "{report:?}");
    assert!(report.spare_pipes >= 1);
}

#[test]
fn without_pipes_it_copies() {
    for pipes in [PipeBudget { pipes: 0, bytes: 1 << 20 }, PipeBudget { pipes: 1, bytes: 1 << 16 }] {
        for mode in [Mode::Adaptive, Mode::SpliceOnly] {
            let rig = Spec { pipes, ..Spec::new(mode) }.start();
            let (client, server) = (rig.client.try_clone().unwrap(), rig.server.try_clone().unwrap());
            let up = std::thread::spawn(move || send_pattern(client, 5, 8 << 20));
            assert_eq!(expect_pattern(server, 5, true), 8 << 20);
            join(up);
            let report = rig.finish();
            assert!(report.pipes <= pipes.pipes);
            if pipes.pipes == 0 {
                assert!(report.spliced == 0 && report.refused_pipes > 0, "{report:?}");
            }
        }
    }
}

/// Old kernels can't splice between all kinds of sockets: what the pipe holds by then must not be lost.
#[test]
fn where_splice_is_impossible_it_copies() {
    for mode in [Mode::Adaptive, Mode::SpliceOnly] {
        for forbidden in [(libc::ENOSYS, None), (libc::EINVAL, Some(Side::Upstream))] {
            let rig = Spec { forbid_splice: Some(forbidden), ..Spec::new(mode) }.start();
            let (client, server) = (rig.client.try_clone().unwrap(), rig.server.try_clone().unwrap());
            let up = std::thread::spawn(move || send_pattern(client, 11, 8 << 20));
            assert_eq!(expect_pattern(server, 11, true), 8 << 20);
            join(up);
            let report = rig.finish();
            assert_eq!((report.spliced, report.copied), (0, 8 << 20), "{report:?}");
        }
    }
}
