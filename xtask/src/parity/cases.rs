//! The cases, by subject.

mod bind;
mod connect;
mod data;
mod hashing;
mod health;
mod logs;
mod matching;
mod routing;
mod timers;

use super::case::Case;

/// Every case. The order gives the ports, so it is the same for both proxies.
pub(super) fn all() -> Vec<Case> {
    [
        data::cases(),
        connect::cases(),
        timers::cases(),
        matching::cases(),
        routing::cases(),
        logs::cases(),
        health::cases(),
        hashing::cases(),
        bind::cases(),
    ]
    .into_iter()
    .flatten()
    .collect()
}
