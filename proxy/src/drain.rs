//! Ending connections on purpose: one worker's open connections, and the handle by which each is told to end.
//!
//! A drain has two steps: stop accepting and wait, then end what is left. Both are a worker's own business,
//! so nothing here is shared between threads.

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashSet;
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};

use crate::cluster::endpoint::Host;
use crate::cluster::removal::Loss;
use crate::connection::meter::Meter;
use crate::listener::ChainId;
use crate::listener::balance::{Balance, Place};
use crate::pages::Pages;

/// Slots kept for later connections.
const SPARE: usize = 64;

/// The open connections of one worker.
#[derive(Debug, Default)]
pub struct Connections {
    open: RefCell<Pages<Rc<Slot>>>,
    /// See [`Open::prepare_next`].
    spare: RefCell<Vec<Rc<Slot>>>,
    /// Woken when the last connection has ended.
    empty: RefCell<Vec<Waker>>,
    /// Where those are counted that [`Open::keep`] was called for, and as which worker's.
    balance: Option<(Arc<Balance>, usize)>,
}

#[derive(Default)]
struct Slot {
    /// Whose connection it is (see [`Connections::open`]).
    owner: Cell<u64>,
    /// The filter chain that serves it, once there is one.
    chain: Cell<Option<ChainId>>,
    /// Its endpoint, once it is connected to it.
    host: OnceCell<Arc<Host>>,
    ending: Cell<Option<Ending>>,
    /// Its number among the open ones.
    key: Cell<u32>,
    /// It has a place in [`Connections::balance`].
    balanced: Cell<bool>,
    /// Set when both its sides stand.
    meter: OnceCell<Meter>,
    waker: Cell<Option<Waker>>,
}

/// Why a connection is told to end.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Ending {
    /// The process stops, its pod is gone, or its filter chain is: with a FIN.
    Drained,
    /// Its endpoint is gone, and the cluster has a policy for that.
    Lost(Loss),
}

impl Ending {
    /// With a RST instead of a FIN.
    pub fn resets(self) -> bool {
        matches!(self, Self::Lost(loss) if loss.reset)
    }
}

/// Held by a connection's task while it lives; says when it is to end.
#[derive(Debug)]
pub struct Open {
    connections: Rc<Connections>,
    slot: Rc<Slot>,
}

impl Connections {
    /// Those of a worker, which keep their places in `balance`.
    pub fn new(balance: Arc<Balance>, worker: usize) -> Self {
        Self { balance: Some((balance, worker)), ..Self::default() }
    }

    /// Registers a connection. `owner` groups connections for [`Connections::kill`]; the worker uses the cookie of
    /// the pod's network namespace, 0 for connections of no pod.
    pub fn open(self: &Rc<Self>, owner: u64) -> Open {
        let slot = self.spare.borrow_mut().pop().unwrap_or_default();
        slot.owner.set(owner);
        slot.key.set(self.open.borrow_mut().insert(Rc::clone(&slot)));
        Open { connections: Rc::clone(self), slot }
    }

    /// How many connections are open.
    pub fn len(&self) -> usize {
        self.open.borrow().len()
    }

    /// Whether none is open.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Brings the stats that count bytes up to date.
    pub fn flush_meters(&self) {
        for slot in self.open.borrow().iter() {
            if let Some(meter) = slot.meter.get() {
                meter.flush();
            }
        }
    }

    /// Tells every open connection to end now.
    pub fn kill_all(&self) {
        self.end_where(Ending::Drained, |_| true);
    }

    /// Tells the connections of one owner to end now.
    pub fn kill(&self, owner: u64) {
        self.end_where(Ending::Drained, |slot| slot.owner.get() == owner);
    }

    /// Tells the connections of these filter chains to end now.
    pub fn kill_chains(&self, chains: &HashSet<ChainId>) {
        self.end_where(Ending::Drained, |slot| slot.chain.get().is_some_and(|chain| chains.contains(&chain)));
    }

    /// Tells the connections to these endpoints to end now.
    pub fn end_hosts(&self, hosts: &[Arc<Host>], loss: Loss) {
        let lost: HashSet<_> = hosts.iter().map(Arc::as_ptr).collect();
        self.end_where(Ending::Lost(loss), |slot| {
            slot.host.get().is_some_and(|host| lost.contains(&Arc::as_ptr(host)))
        });
    }

    fn end_where(&self, ending: Ending, wanted: impl Fn(&Slot) -> bool) {
        for slot in self.open.borrow().iter().filter(|slot| wanted(slot)) {
            slot.end(ending);
        }
    }

    /// Completes when no connection is open.
    pub async fn drained(&self) {
        std::future::poll_fn(|cx| {
            if self.is_empty() {
                return Poll::Ready(());
            }
            self.empty.borrow_mut().push(cx.waker().clone());
            Poll::Pending
        })
        .await;
    }
}

impl fmt::Debug for Slot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Slot")
            .field("owner", &self.owner)
            .field("chain", &self.chain)
            .field("ending", &self.ending)
            .finish_non_exhaustive()
    }
}

impl Slot {
    /// The first reason stays.
    fn end(&self, ending: Ending) {
        if self.ending.get().is_none() {
            self.ending.set(Some(ending));
        }
        if let Some(waker) = self.waker.take() {
            waker.wake();
        }
    }
}

impl Open {
    /// Makes what a later connection needs here. Called while the memory is in use that this one takes to set up: the next
    /// one will want that again, and made later, this would lie in the middle of it.
    pub fn prepare_next(&self) {
        let mut spare = self.connections.spare.borrow_mut();
        if spare.len() < SPARE {
            spare.push(Rc::default());
        }
    }

    /// Keeps a place until the connection ends, if it is one that its worker's connections keep here.
    pub fn keep(&self, place: Place) -> Option<Place> {
        let own = self.connections.balance.as_ref();
        if own.is_none_or(|(balance, worker)| !place.is_of(balance) || place.worker() != *worker) {
            return Some(place);
        }
        place.keep();
        self.slot.balanced.set(true);
        None
    }

    /// Says which filter chain serves the connection.
    pub fn set_chain(&self, chain: ChainId) {
        self.slot.chain.set(Some(chain));
    }

    /// Says which endpoint it is connected to, which may be gone by now.
    pub fn set_host(&self, host: &Arc<Host>) {
        let _ = self.slot.host.set(Arc::clone(host));
        if let Some(loss) = host.lost() {
            self.slot.end(Ending::Lost(loss));
        }
    }

    /// Why it is to end; none while it isn't.
    pub fn ending(&self) -> Option<Ending> {
        self.slot.ending.get()
    }

    /// Counts the connection's bytes from now on. The first call decides what into.
    pub fn meter(&self, into: impl FnOnce() -> Meter) -> &Meter {
        self.slot.meter.get_or_init(into)
    }

    /// Ready once the connection is to end. Only the latest caller's task is woken.
    pub fn poll_killed(&self, cx: &mut Context<'_>) -> Poll<Ending> {
        if let Some(ending) = self.slot.ending.get() {
            return Poll::Ready(ending);
        }
        let waker = match self.slot.waker.take() {
            Some(waker) if waker.will_wake(cx.waker()) => waker,
            _ => cx.waker().clone(),
        };
        self.slot.waker.set(Some(waker));
        Poll::Pending
    }

    /// Completes once the connection is to end.
    pub async fn killed(&self) -> Ending {
        std::future::poll_fn(|cx| self.poll_killed(cx)).await
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        if self.slot.balanced.take()
            && let Some((balance, worker)) = &self.connections.balance
        {
            balance.release(*worker);
        }
        let mut open = self.connections.open.borrow_mut();
        open.remove(self.slot.key.get());
        if open.is_empty() {
            drop(open);
            self.connections.empty.borrow_mut().drain(..).for_each(Waker::wake);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn poll<F: Future>(future: std::pin::Pin<&mut F>) -> bool {
        future.poll(&mut Context::from_waker(Waker::noop())).is_ready()
    }

    #[test]
    fn drained_waits_for_the_last_connection() {
        let connections = Rc::new(Connections::default());
        let (first, second) = (connections.open(0), connections.open(0));
        let watched = Rc::clone(&connections);
        let mut drained = std::pin::pin!(watched.drained());
        assert!(!poll(drained.as_mut()));
        drop(first);
        assert!(!poll(drained.as_mut()));
        drop(second);
        assert!(poll(drained.as_mut()));
    }

    #[test]
    fn kill_reaches_every_open_connection_and_no_later_one() {
        let connections = Rc::new(Connections::default());
        let before = connections.open(0);
        let mut killed = std::pin::pin!(before.killed());
        assert!(!poll(killed.as_mut()));
        connections.kill_all();
        assert!(poll(killed.as_mut()));
        let after = connections.open(7);
        assert!(!poll(std::pin::pin!(after.killed())));
        connections.kill(8);
        assert!(!poll(std::pin::pin!(after.killed())));
        connections.kill(7);
        assert!(poll(std::pin::pin!(after.killed())));
    }
}
