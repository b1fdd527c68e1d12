//! The kernel path: the app's own socket is connected straight to an endpoint that the eBPF programs choose, and no proxy
//! stands in between. What the proxy would add has to be nothing, or be done elsewhere: [`predicate::plan`] decides that
//! for each listener, and says what is in the way. docs/kernel-path.md has the rules for operators.
//!
//! [`Board`] holds what became of each listener, for the admin server and the log.

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

mod arena;
pub mod compile;
pub mod journal;
pub mod manager;
mod mirror;
pub mod predicate;
pub mod removal;
mod slots;

pub use journal::{Ids, Journal};
pub use manager::Manager;
pub use predicate::{ChainPlan, ClusterObstacle, Obstacle, Plan, Sources, is_candidate, plan};

/// Which way the connections of a listener take.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Straight to an endpoint.
    Kernel,
    /// Through the proxy, for these reasons; never empty.
    Proxy(Vec<Obstacle>),
}

impl State {
    /// Nobody asked for the kernel path, so that there is nothing to tell.
    pub fn is_unasked(&self) -> bool {
        matches!(self, Self::Proxy(obstacles) if obstacles.iter().all(|it| *it == Obstacle::NotWanted))
    }
}

impl fmt::Display for State {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self::Proxy(obstacles) = self else { return f.write_str("the kernel path") };
        f.write_str("the proxy")?;
        for (index, obstacle) in obstacles.iter().enumerate() {
            write!(f, "{} {obstacle}", if index == 0 { ":" } else { ";" })?;
        }
        Ok(())
    }
}

/// What became of each listener that could take the kernel path, by name. Cheap to clone: all clones are one board.
/// Written by whoever fills the kernel's tables.
#[derive(Clone, Debug, Default)]
pub struct Board(Arc<Mutex<BTreeMap<Arc<str>, State>>>);

impl Board {
    /// A listener takes this way from now on. Logs it if that is news.
    pub fn set(&self, listener: &Arc<str>, state: State) {
        let mut states = self.lock();
        let before = states.get(listener);
        if before == Some(&state) {
            return;
        }
        if !(state.is_unasked() && before.is_none_or(State::is_unasked)) {
            tracing::info!("listener '{listener}': new connections take {state}");
        }
        states.insert(Arc::clone(listener), state);
    }

    /// Forgets listeners that are gone.
    pub fn retain(&self, is_there: impl Fn(&str) -> bool) {
        self.lock().retain(|listener, _| is_there(listener));
    }

    /// Which way a listener takes. None: it could not take another one than through the proxy, or nothing was decided.
    pub fn state(&self, listener: &str) -> Option<State> {
        self.lock().get(listener).cloned()
    }

    /// The map is consistent after every statement, so a panic while it was locked spoils nothing.
    fn lock(&self) -> MutexGuard<'_, BTreeMap<Arc<str>, State>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_board_knows_the_last_state_of_those_that_are_there() {
        let board = Board::default();
        let (a, b): (Arc<str>, Arc<str>) = ("a".into(), "b".into());
        board.set(&a, State::Proxy(vec![Obstacle::MixedDataPath]));
        board.clone().set(&b, State::Kernel);
        board.set(&a, State::Kernel);
        assert_eq!((board.state("a"), board.state("b")), (Some(State::Kernel), Some(State::Kernel)));
        board.retain(|listener| listener == "b");
        assert_eq!((board.state("a"), board.state("b")), (None, Some(State::Kernel)));
    }

    #[test]
    fn a_state_says_every_reason() {
        let state = State::Proxy(vec![Obstacle::MixedDataPath, Obstacle::ConnectionLimit(7)]);
        let text = state.to_string();
        assert!(text.starts_with("the proxy: ") && text.contains("; connection_limit is 7"), "{text}");
        assert_eq!(State::Kernel.to_string(), "the kernel path");
        assert!(State::Proxy(vec![Obstacle::NotWanted]).is_unasked() && !state.is_unasked());
    }
}
