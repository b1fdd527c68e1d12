//! FIN, RST, half-close.

use std::net::Shutdown::{Read, Write};
use std::thread;
use std::time::Duration;

use anyhow::Result;
use nix::sys::socket::MsgFlags;
use socket2::Socket;

use crate::same_node::site::PATIENCE;
use crate::same_node::talk;
use crate::same_node::trial::{Property, Trial, both};

pub(super) const ALL: &[Property] = &[
    both("1 MiB, then shutdown(SHUT_WR)", data_then_fin),
    both("1 MiB, then close, to a reader that is late", data_then_close),
    both("half-close: the answer comes after the FIN", half_close),
    both("FIN while the other end waits in recv", fin_wakes),
    both("FIN after data: poll before and after the data is read", fin_events),
    both("shutdown(SHUT_RD): data that comes after it", shut_rd),
    both("close with unread data: what the writer sees", unread),
    both("close with half of the data read", half_read),
    both("send after the other end has closed", after_close),
    both("data, then close with SO_LINGER 0, read later", reset_after_data),
    both("RST while the other end waits in recv", reset_wakes),
    both("RST: poll, SO_ERROR", reset_events),
    both("RST while the other end waits in send", reset_wakes_writer),
];

const MIB: usize = 1 << 20;

fn data_then_fin(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, MIB);
    Ok(thread::scope(|scope| {
        scope.spawn(|| (talk::send_all(&left, &data), left.shutdown(Write)));
        let seen = talk::drain(&right, trial.seed);
        format!("{seen}; again {}", talk::receive(&right, 1, MsgFlags::empty()))
    }))
}

fn data_then_close(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let data = talk::bytes(trial.seed, 0, MIB);
    Ok(thread::scope(|scope| {
        scope.spawn(|| {
            talk::send_all(&left, &data);
            drop(left);
        });
        talk::settle();
        talk::drain(&right, trial.seed)
    }))
}

fn half_close(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    let (ask, answer) = (talk::bytes(trial.seed, 0, MIB / 4), talk::bytes(trial.seed + 1, 0, MIB));
    Ok(thread::scope(|scope| {
        let seed = trial.seed;
        let asked = scope.spawn(move || {
            let seen = talk::drain(&right, seed);
            let sent = talk::send_all(&right, &answer);
            drop(right);
            format!("{seen}; {sent}")
        });
        talk::send_all(&left, &ask);
        let _ = left.shutdown(Write);
        let seen = talk::drain(&left, trial.seed + 1);
        format!("{}; {seen}", asked.join().unwrap_or_default())
    }))
}

fn fin_wakes(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    exchange(&left, &right);
    Ok(thread::scope(|scope| {
        let seen = scope.spawn(|| talk::receive(&right, 64, MsgFlags::empty()));
        talk::settle();
        drop(left);
        seen.join().unwrap_or_default()
    }))
}

fn fin_events(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"last", MsgFlags::empty());
    left.shutdown(Write)?;
    talk::settle();
    let wanted = libc::POLLIN | libc::POLLRDHUP;
    let before = talk::events(&right, wanted, PATIENCE);
    let read = talk::receive(&right, 64, MsgFlags::empty());
    let after = talk::events(&right, wanted, PATIENCE);
    Ok(format!("{before}; {read}; {after}; {}", talk::receive(&right, 64, MsgFlags::empty())))
}

fn shut_rd(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    right.shutdown(Read)?;
    let sent = talk::send_once(&left, b"for nobody", MsgFlags::empty());
    talk::settle();
    let seen = talk::receive(&right, 64, MsgFlags::empty());
    let again = talk::receive(&right, 64, MsgFlags::empty());
    Ok(format!("{sent}; {seen}, {again}; {}", talk::send_once(&left, b"x", MsgFlags::empty())))
}

fn unread(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"never read", MsgFlags::empty());
    talk::wait_readable(&right);
    drop(right);
    talk::settle();
    let seen = talk::receive(&left, 64, MsgFlags::empty());
    Ok(format!("recv {seen}; send {}", talk::send_once(&left, b"x", MsgFlags::empty())))
}

fn half_read(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_once(&left, b"read never read", MsgFlags::empty());
    talk::receive(&right, 5, MsgFlags::empty());
    drop(right);
    talk::settle();
    let seen = talk::receive(&left, 64, MsgFlags::empty());
    Ok(format!("recv {seen}; send {}", talk::send_once(&left, b"x", MsgFlags::empty())))
}

fn after_close(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    exchange(&left, &right);
    drop(right);
    talk::settle();
    let eof = talk::receive(&left, 64, MsgFlags::empty());
    let first = talk::send_once(&left, b"x", MsgFlags::empty());
    talk::settle();
    let second = talk::send_once(&left, b"x", MsgFlags::empty());
    Ok(format!("recv {eof}; send {first}, {second}; recv {}", talk::receive(&left, 64, MsgFlags::empty())))
}

fn reset_after_data(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    talk::send_all(&left, &talk::bytes(trial.seed, 0, 1000));
    talk::wait_readable(&right);
    left.set_linger(Some(Duration::ZERO))?;
    drop(left);
    talk::settle();
    let seen = talk::drain(&right, trial.seed);
    Ok(format!("{seen}; again {}", talk::receive(&right, 1, MsgFlags::empty())))
}

fn reset_wakes(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    exchange(&left, &right);
    Ok(thread::scope(|scope| {
        let seen = scope.spawn(|| talk::receive(&right, 64, MsgFlags::empty()));
        talk::settle();
        let _ = left.set_linger(Some(Duration::ZERO));
        drop(left);
        seen.join().unwrap_or_default()
    }))
}

fn reset_events(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect()?;
    exchange(&left, &right);
    left.set_linger(Some(Duration::ZERO))?;
    drop(left);
    talk::settle();
    let wanted = libc::POLLIN | libc::POLLOUT | libc::POLLRDHUP;
    let events = talk::events(&right, wanted, PATIENCE);
    Ok(format!("{events}; {}; {}", talk::pending_error(&right), talk::receive(&right, 1, MsgFlags::empty())))
}

fn reset_wakes_writer(trial: &mut Trial<'_>) -> Result<String> {
    let (left, right) = trial.connect_with(super::pressure::small_buffers)?;
    let data = vec![0; 8 << 20];
    Ok(thread::scope(|scope| {
        let outcome = scope.spawn(|| talk::send_all(&left, &data));
        talk::settle();
        let _ = right.set_linger(Some(Duration::ZERO));
        drop(right);
        let outcome = outcome.join().unwrap_or_default();
        // How much went before is a matter of buffers.
        outcome.split_once(", ").map_or(outcome.clone(), |(_, errno)| errno.to_owned())
    }))
}

/// A few bytes each way.
fn exchange(left: &Socket, right: &Socket) {
    for (from, to) in [(left, right), (right, left)] {
        talk::send_once(from, b"before", MsgFlags::empty());
        talk::receive(to, 64, MsgFlags::empty());
    }
}
