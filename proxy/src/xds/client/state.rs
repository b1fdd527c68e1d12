//! What a poll and a file have in common: what is wanted, what was delivered, what holds.

use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::Instant;

use super::json::Content;
use super::ttl::Timers;
use super::{Ask, Dialer, Task};
use crate::xds::{Change, Event, Kind, Update, Verdict, Wanted};

/// What an ask comes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Asked {
    /// Nothing is wanted any more: the task ends.
    Nothing,
    /// Nothing new is wanted.
    Less,
    /// Something is wanted that was not, or is wanted again.
    More,
}

/// One subscription.
pub(super) struct State {
    task: Task,
    wanted: Wanted,
    /// Version and hash of what was accepted last of what is wanted now.
    accepted: Option<Delivered>,
    /// What the store looks at.
    judging: Option<Judging>,
    timers: Timers,
    /// Whether the last attempt failed; none: there was none.
    failing: Option<bool>,
}

#[derive(Debug, Default)]
struct Delivered {
    version: String,
    hash: Option<u64>,
}

struct Judging {
    delivered: Delivered,
    /// It is all that is wanted, and nothing of it was bad already.
    whole: bool,
    ttls: Vec<(std::sync::Arc<str>, Option<Duration>)>,
    at: Instant,
    verdict: oneshot::Receiver<Verdict>,
}

impl State {
    pub(super) fn new(task: Task) -> Self {
        Self {
            task,
            wanted: Wanted::default(),
            accepted: None,
            judging: None,
            timers: Timers::default(),
            failing: None,
        }
    }

    pub(super) fn kind(&self) -> Kind {
        self.task.key.kind
    }

    pub(super) fn dialer(&self) -> Rc<dyn Dialer> {
        Rc::clone(&self.task.dialer)
    }

    pub(super) fn wanted(&self) -> &Wanted {
        &self.wanted
    }

    /// `version_info` of what was accepted.
    pub(super) fn version(&self) -> Option<&str> {
        self.accepted.as_ref().map(|accepted| accepted.version.as_str())
    }

    /// Whether a response with this hash would change nothing: it was accepted, or the store looks at it.
    pub(super) fn has(&self, hash: u64) -> bool {
        let same = |delivered: &Delivered| delivered.hash == Some(hash);
        match &self.judging {
            Some(judging) => judging.whole && same(&judging.delivered),
            // What may run out has to be delivered again.
            None => self.timers.is_empty() && self.accepted.as_ref().is_some_and(same),
        }
    }

    /// Waits for an ask, and takes all that are there.
    pub(super) async fn next_ask(&mut self) -> Asked {
        match self.task.asks.recv().await {
            Some((_, ask)) => self.take(ask),
            None => Asked::Nothing,
        }
    }

    /// Waits until something is asked for, or until `deadline`. Verdicts and times to live are seen to meanwhile.
    pub(super) async fn wait(&mut self, deadline: Instant) -> Option<Asked> {
        loop {
            let expires = self.timers.first().map(Instant::from_std);
            let wake = expires.map_or(deadline, |at| at.min(deadline));
            tokio::select! {
                biased;
                ask = self.task.asks.recv() => {
                    return Some(ask.map_or(Asked::Nothing, |(_, ask)| self.take(ask)));
                }
                verdict = next_verdict(&mut self.judging) => self.judged(verdict),
                () = tokio::time::sleep_until(wake) => {
                    self.expire();
                    if Instant::now() >= deadline {
                        return None;
                    }
                }
            }
        }
    }

    fn take(&mut self, ask: Ask) -> Asked {
        let mut more = self.apply(ask);
        while let Ok((_, ask)) = self.task.asks.try_recv() {
            more |= self.apply(ask);
        }
        if more {
            // What was accepted, or will be, was not all that is wanted now.
            self.accepted = None;
            if let Some(judging) = &mut self.judging {
                judging.whole = false;
            }
        }
        match (self.wanted.is_empty(), more) {
            (true, _) => Asked::Nothing,
            (false, true) => Asked::More,
            (false, false) => Asked::Less,
        }
    }

    /// Whether more is wanted than was.
    fn apply(&mut self, ask: Ask) -> bool {
        let more = match &ask {
            Ask::Replace(wanted) => {
                (wanted.wildcard && !self.wanted.wildcard) || !wanted.names.is_subset(&self.wanted.names)
            }
            Ask::Add(name) => !self.wanted.names.contains(name),
            Ask::Refresh(_) => true,
            Ask::Remove(_) => false,
        };
        self.wanted.apply(ask);
        more
    }

    /// Gives a response to the store.
    pub(super) fn deliver(&mut self, content: Content, hash: Option<u64>) {
        let Content { version, identifier, resources, unreadable, unchanged, ttls } = content;
        self.succeeded(identifier);
        let (sender, verdict) = oneshot::channel();
        self.judging = Some(Judging {
            delivered: Delivered { version: version.clone(), hash },
            whole: unreadable.is_empty(),
            ttls,
            at: Instant::now(),
            verdict,
        });
        let change = Change::State { version, resources, unreadable, unchanged };
        self.send(Event::Update(Update { key: self.task.key.clone(), change, verdict: sender }));
    }

    fn judged(&mut self, verdict: Option<Verdict>) {
        let Some(judging) = self.judging.take() else { return };
        let Some(verdict) = verdict else { return }; // the store is gone
        let (rejected, nothing_applied) = match verdict {
            Verdict::Accept => {
                if judging.whole {
                    self.accepted = Some(judging.delivered);
                }
                (Vec::new(), false)
            }
            Verdict::Reject { rejected, nothing_applied, .. } => (rejected, nothing_applied),
        };
        if nothing_applied {
            return;
        }
        for (name, ttl) in judging.ttls.iter().filter(|(name, _)| !rejected.contains(name)) {
            self.timers.set(name, *ttl, judging.at.into_std());
        }
    }

    fn expire(&mut self) {
        let names = self.timers.expire(Instant::now().into_std());
        if names.is_empty() {
            return;
        }
        // The server is to say again what it has.
        self.accepted = None;
        let (verdict, _) = oneshot::channel();
        let change = Change::Expired(names);
        self.send(Event::Update(Update { key: self.task.key.clone(), change, verdict }));
    }

    /// An attempt failed.
    pub(super) fn failed(&mut self, reason: String) {
        self.failing = Some(true);
        self.send(Event::Failed { keys: vec![self.task.key.clone()], reason });
    }

    /// An attempt succeeded.
    pub(super) fn succeeded(&mut self, identifier: Option<String>) {
        if self.failing.replace(false) != Some(false) {
            self.send(Event::Connected { keys: vec![self.task.key.clone()], identifier });
        }
    }

    /// A response was thrown away as a whole.
    pub(super) fn rejected(&mut self, version: String, reason: String) {
        self.send(Event::Rejected { key: self.task.key.clone(), version, reason });
    }

    fn send(&self, event: Event) {
        self.task.events.send(event).ok(); // without a store there is nobody to tell
    }
}

/// The verdict, when one is awaited. `None`: the store has dropped it.
async fn next_verdict(judging: &mut Option<Judging>) -> Option<Verdict> {
    match judging {
        Some(judging) => (&mut judging.verdict).await.ok(),
        None => std::future::pending().await,
    }
}
