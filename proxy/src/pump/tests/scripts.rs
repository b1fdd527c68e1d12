//! Random scripts, played in every mode: the peers must see what the scripts say, each time.

use super::*;
use crate::sys::socket;
use std::os::fd::AsFd;
use std::sync::Barrier;
use std::sync::atomic::AtomicUsize;

const LONGEST: usize = 1_500_000;

#[derive(Clone, Copy, Debug)]
enum Act {
    /// So many bytes.
    Write(usize),
    /// Milliseconds.
    Sleep(u64),
    /// A FIN; nothing is written after it.
    Fin,
}

/// What one peer does. A peer without a FIN sends one when both are through, unless there is a reset.
#[derive(Clone, Debug)]
struct Script {
    acts: Vec<Act>,
    /// Resets when all bytes of both have arrived.
    resets: bool,
    /// Pauses before each read, in microseconds.
    reads_after: u64,
}

impl Script {
    fn random(rng: &mut fastrand::Rng) -> Self {
        let mut acts: Vec<_> = (0..rng.usize(1..12))
            .map(|_| match rng.u32(0..10) {
                0..=4 => Act::Write(rng.usize(1..200)),
                5..=6 => Act::Write(rng.usize(1_000..100_000)),
                7 => Act::Write(rng.usize(100_000..LONGEST)),
                _ => Act::Sleep(rng.u64(0..3)),
            })
            .collect();
        if rng.bool() {
            acts.push(Act::Fin);
        }
        Self { acts, resets: false, reads_after: if rng.u32(0..3) == 0 { rng.u64(0..500) } else { 0 } }
    }

    /// What the other peer must see.
    fn bytes(&self, seed: u64) -> Vec<u8> {
        let source = pattern(seed, LONGEST);
        let writes = self.acts.iter().filter_map(|act| match act {
            Act::Write(n) => Some(&source[..*n]),
            _ => None,
        });
        writes.flatten().copied().collect()
    }
}

/// What a peer saw: the bytes, and how they ended.
type Seen = (Vec<u8>, Option<io::ErrorKind>);

fn read(mut stream: TcpStream, pause: Duration, count: &AtomicUsize) -> Seen {
    let mut bytes = Vec::new();
    let mut buffer = vec![0; 1 << 16];
    loop {
        if !pause.is_zero() {
            std::thread::sleep(pause);
        }
        match stream.read(&mut buffer) {
            Ok(0) => return (bytes, None),
            Ok(n) => bytes.extend_from_slice(&buffer[..n]),
            Err(e) => return (bytes, Some(e.kind())),
        }
        count.store(bytes.len(), Ordering::Release);
    }
}

/// Plays one peer: writes on this thread, reads on another, so that no script can lock itself up.
/// `expected` is how many bytes come from the other peer.
fn play(
    stream: &TcpStream,
    script: &Script,
    seed: u64,
    expected: usize,
    arrived: &Barrier,
    ends_by_reset: bool,
) -> Seen {
    let bytes = pattern(seed, LONGEST);
    let count = &AtomicUsize::new(0);
    std::thread::scope(|scope| {
        let reader = stream.try_clone().unwrap();
        let pause = Duration::from_micros(script.reads_after);
        let reading = scope.spawn(move || read(reader, pause, count));
        let mut writer = stream;
        let mut fin = false;
        for act in &script.acts {
            match act {
                Act::Write(n) => writer.write_all(&bytes[..*n]).unwrap(),
                Act::Sleep(ms) => std::thread::sleep(Duration::from_millis(*ms)),
                Act::Fin => {
                    stream.shutdown(Shutdown::Write).unwrap();
                    fin = true;
                }
            }
        }
        let started = Instant::now();
        while count.load(Ordering::Acquire) < expected {
            assert!(started.elapsed() < LONG, "{} of {expected} bytes came", count.load(Ordering::Acquire));
            std::thread::sleep(Duration::from_micros(200));
        }
        arrived.wait();
        if script.resets {
            socket::disconnect(stream.as_fd()).unwrap();
        } else if !fin && !ends_by_reset {
            stream.shutdown(Shutdown::Write).unwrap();
        }
        reading.join().unwrap()
    })
}

fn check(spec: &Spec, scripts: &[Script; 2], seed: u64) {
    let name = format!("TIDEGATE_SEED={seed} {}: {scripts:?}", spec.name());
    let rig = spec.clone().start();
    let ends_by_reset = scripts.iter().any(|script| script.resets);
    let sent = [scripts[0].bytes(seed), scripts[1].bytes(seed + 1)];
    let arrived = Barrier::new(2);
    let seen = std::thread::scope(|scope| {
        let client =
            scope.spawn(|| play(&rig.client, &scripts[0], seed, sent[1].len(), &arrived, ends_by_reset));
        let server = play(&rig.server, &scripts[1], seed + 1, sent[0].len(), &arrived, ends_by_reset);
        [client.join().expect(&name), server]
    });
    for (i, (bytes, end)) in seen.iter().enumerate() {
        assert!(
            *bytes == sent[1 - i],
            "{name}: peer {i} saw {} bytes, not {}",
            bytes.len(),
            sent[1 - i].len()
        );
        // A side that had got the other's FIN before sees no reset by reading.
        let fin_came = scripts[1 - i].acts.iter().any(|act| matches!(act, Act::Fin));
        if ends_by_reset && !scripts[i].resets && !fin_came {
            assert_eq!(*end, Some(io::ErrorKind::ConnectionReset), "{name}: peer {i}");
        } else if !scripts[i].resets {
            assert_eq!(*end, None, "{name}: peer {i}");
        }
    }
    let report = rig.finish();
    assert_eq!((report.down.sent, report.up.sent), (sent[0].len() as u64, sent[1].len() as u64), "{name}");
    let resetter = [Side::Downstream, Side::Upstream].into_iter().find(|side| scripts[*side as usize].resets);
    match (report.outcome.cause, resetter) {
        (Cause::Reset { by }, Some(resetter)) => assert_eq!(by, resetter, "{name}"),
        (Cause::Finished { .. }, None) => {}
        // Both FINs may be through before the reset, which then changes nothing any more.
        (Cause::Finished { .. }, Some(_)) => {
            let fins = scripts.iter().flat_map(|script| &script.acts).filter(|act| matches!(act, Act::Fin));
            assert_eq!(fins.count(), 2, "{name}: {report:?}");
        }
        _ => panic!("{name}: {report:?}"),
    }
}

#[test]
fn every_mode_shows_the_peers_what_the_scripts_say() {
    let given = std::env::var("TIDEGATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let first: u64 = given.unwrap_or_else(|| fastrand::u64(..1 << 40));
    for seed in first..first + 8 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut scripts = [Script::random(&mut rng), Script::random(&mut rng)];
        if rng.u32(0..3) == 0 {
            scripts[rng.usize(0..2)].resets = true;
        }
        for spec in Spec::all() {
            check(&spec, &scripts, seed);
        }
    }
}
