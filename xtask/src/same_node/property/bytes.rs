//! Order and completeness.

use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::MsgFlags;
use socket2::Socket;

use crate::same_node::site;
use crate::same_node::talk::{self, Drain};
use crate::same_node::trial::{Property, Trial, both, once, veth};

pub(super) const ALL: &[Property] = &[
    both("random writes both ways at once", random_writes),
    both("one end speaks first", speaks_first),
    once("first data makes the server's socket (TCP_DEFER_ACCEPT), more follows", deferred),
    once("first data in the SYN (TCP_FASTOPEN), more follows", fast_open),
    veth("a client that sends from the start, its line limited (tbf) and busy", busy_line),
];

/// Bytes each way.
const AMOUNT: usize = 3 << 20;

fn random_writes(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let seed = trial.seed;
    let (left_saw, right_saw) = thread::scope(|scope| {
        scope.spawn(|| write_randomly(&left, seed));
        scope.spawn(|| write_randomly(&right, seed + 1));
        let left_saw = scope.spawn(|| Drain::new(seed + 1).run(&left, AMOUNT));
        let right_saw = Drain::new(seed).run(&right, AMOUNT);
        (left_saw.join().unwrap_or_default(), right_saw)
    });
    Ok(if left_saw == right_saw { left_saw } else { format!("{left_saw}; {right_saw}") })
}

fn write_randomly(socket: &Socket, seed: u64) {
    let mut random = fastrand::Rng::with_seed(seed);
    let mut sent = 0;
    while sent < AMOUNT {
        let length = match random.u8(0..4) {
            0 => random.usize(1..64),
            1 => random.usize(1..2_000),
            _ => random.usize(1..70_000),
        };
        let length = length.min(AMOUNT - sent);
        talk::send_all(socket, &talk::bytes(seed, sent, length));
        sent += length;
    }
}

fn speaks_first(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let sent = talk::send_once(&left, b"hello", MsgFlags::empty());
    let seen = talk::receive(&right, 64, MsgFlags::empty());
    let answer = talk::send_once(&right, b"welcome", MsgFlags::empty());
    Ok(format!("{sent}, {seen}; {answer}, {}", talk::receive(&left, 64, MsgFlags::empty())))
}

fn deferred(trial: &mut Trial<'_>) -> Result<String> {
    let ends = trial.site.connect_deferred(trial.route, b"first")?;
    Ok(then_more(&ends))
}

fn fast_open(trial: &mut Trial<'_>) -> Result<String> {
    let ends = trial.site.connect_fast_open(trial.route, b"first")?;
    Ok(then_more(&ends))
}

fn busy_line(trial: &mut Trial<'_>) -> Result<String> {
    let _line = trial.site.busy_line()?;
    let (client, listener, address) = trial.site.halves(trial.route, |_| Ok(()))?;
    client.connect(&address.into())?;
    let data = talk::bytes(trial.seed, 0, 10_000);
    thread::scope(|scope| {
        scope.spawn(|| {
            for piece in data.chunks(100) {
                talk::send_all(&client, piece);
                thread::sleep(Duration::from_millis(2));
            }
        });
        Ok(Drain::new(trial.seed).run(&site::accept(&listener)?, data.len()))
    })
}

/// What the server reads when `first` was there before it, and then comes more.
fn then_more((client, server): &(Socket, Socket)) -> String {
    talk::wait_readable(server);
    talk::send_once(client, b" then", MsgFlags::empty());
    talk::send_once(client, b" more", MsgFlags::empty());
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(talk::receive(server, 64, MsgFlags::empty()));
    }
    seen.retain(|piece| piece != "EAGAIN");
    seen.concat().replace('"', "")
}
