//! Random dialogues, played in every mode: the peers must see what is certain, each time, and the counters must say so.
//! `cargo xtask parity` plays the same through whole proxies, and through Envoy.

use super::*;
use socket2::SockRef;
use tidegate_tests::dialogue::{self, Dialogue, End, Meeting, Seen, play};

/// By the side that reads.
fn peers(dialogue: &Dialogue, spec: &Spec) -> ([Seen; 2], Report) {
    let limit = dialogue.buffer_limit.unwrap_or(0);
    let Rig { client, server, pump, .. } = Spec { buffer_limit: limit, ..spec.clone() }.start();
    for (peer, stream) in dialogue.peers.iter().zip([&client, &server]) {
        peer.prepare(&SockRef::from(stream)).unwrap();
    }
    let meeting = Meeting::default();
    let seen = std::thread::scope(|scope| {
        let client = scope.spawn(|| play(client, dialogue, dialogue::Side::Client, &meeting));
        let server = play(server, dialogue, dialogue::Side::Server, &meeting);
        [client.join().unwrap(), server]
    });
    (seen, join(pump))
}

fn check(spec: &Spec, dialogue: &Dialogue) {
    let name = format!("TIDEGATE_SEED={} {}: {dialogue}", dialogue.seed, spec.name());
    let (seen, report) = peers(dialogue, spec);
    for (side, seen) in dialogue::Side::BOTH.into_iter().zip(&seen) {
        let wrong = dialogue.judge(side, seen);
        assert!(wrong.is_none(), "{name}: {wrong:?}, {seen:?}, {report:?}");
        let moved = if side == dialogue::Side::Server { report.down } else { report.up };
        let all = (0..=dialogue.phases.len()).map(|phase| dialogue.writes(side.other(), phase));
        let all = all.sum::<usize>() as u64;
        // It saw one byte of what it left unread.
        let unread = u64::from(dialogue.end == End::CloseUnread(side));
        let possible = seen.received + unread..=all;
        assert!(possible.contains(&moved.sent), "{name}: {side:?} saw {seen:?}, of {possible:?}: {report:?}");
    }
    check_cause(dialogue, &seen, report, &name);
}

fn check_cause(dialogue: &Dialogue, seen: &[Seen; 2], report: Report, name: &str) {
    let Outcome { cause, downstream, upstream } = report.outcome;
    let by = match dialogue.end {
        End::Fins(_) | End::BothFins => {
            assert!(matches!(cause, Cause::Finished { .. }), "{name}: {report:?}");
            return;
        }
        // The other side's FIN may be through before the reset.
        End::Close(_) if matches!(cause, Cause::Finished { .. }) => return,
        // Who cuts may take its time to read so far, with tiny buffers. When its FIN has come, the other side waits for the
        // end for a while only, and then closes by itself: it has seen no reset.
        End::Cut(by, _)
            if matches!(cause, Cause::Finished { .. })
                && dialogue.fin(by).is_some()
                && !seen[by.other() as usize].reset_later =>
        {
            return;
        }
        End::Close(by) | End::Reset(by) | End::Cut(by, _) | End::CloseUnread(by) => by,
    };
    let fin_first = dialogue.fin(by).is_some() || matches!(dialogue.end, End::Close(_));
    let (by, close) = match by {
        dialogue::Side::Client => (Side::Downstream, downstream),
        dialogue::Side::Server => (Side::Upstream, upstream),
    };
    assert_eq!(cause, Cause::Reset { by }, "{name}: {report:?}");
    let expected = if fin_first { CloseType::Normal } else { CloseType::RemoteReset };
    assert_eq!(close, expected, "{name}: {report:?}");
}

#[test]
fn every_mode_shows_the_peers_what_is_certain() {
    let given = std::env::var("TIDEGATE_SEED").ok().and_then(|seed| seed.parse().ok());
    let first: u64 = given.unwrap_or_else(|| fastrand::u64(..1 << 40));
    std::thread::scope(|scope| {
        for spec in Spec::all() {
            scope.spawn(move || (first..first + 10).for_each(|seed| check(&spec, &Dialogue::random(seed))));
        }
    });
}
