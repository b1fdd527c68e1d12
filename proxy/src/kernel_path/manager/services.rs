//! Listeners on the kernel path: their filter chains, and what leads connections to those.

use std::sync::Arc;
use std::time::Instant;

use tidegate_common::balance::{Entry, Member, ServiceHead};

use super::{Manager, key_of, write};
use crate::cluster::hashing;
use crate::intercept::tables::Tables;
use crate::kernel_path::arena::{Arena, Block};
use crate::kernel_path::compile::compile_selector;
use crate::kernel_path::mirror::Seen;
use crate::kernel_path::{ChainPlan, Obstacle, Plan, Sources};

/// Where the connections of a listener begin, and where they may be led from there.
#[derive(Debug)]
pub(super) struct OnPath {
    /// Of the one chain, or of the selector.
    pub(super) index: u32,
    chains: Vec<ServiceKey>,
}

/// Names a filter chain, also to a successor of this process.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub(super) struct ServiceKey {
    listener: Arc<str>,
    /// Its name, which several chains may have.
    chain: Arc<str>,
    nth: usize,
}

impl ServiceKey {
    /// For all chains of a plan.
    fn all(listener: &Arc<str>, chains: &[ChainPlan]) -> Vec<Self> {
        let name = |plan: &ChainPlan| Arc::clone(&plan.chain.config.name);
        let key = |(at, plan): (usize, &ChainPlan)| {
            let chain = name(plan);
            let nth = chains[..at].iter().filter(|other| name(other) == chain).count();
            Self { listener: Arc::clone(listener), chain, nth }
        };
        chains.iter().enumerate().map(key).collect()
    }

    fn number(&self) -> u64 {
        let Self { listener, chain, nth } = self;
        key_of(&format!("{listener}\0{chain}\0{nth}"))
    }
}

/// An entry of the services map, and its block.
#[derive(Debug)]
pub(super) struct Placed {
    pub(super) index: u32,
    words: Vec<u64>,
    pub(super) block: Block,
}

impl Placed {
    /// Puts these words in the place of those.
    fn replace(
        &mut self,
        key: u64,
        words: Vec<u64>,
        tables: &Tables,
        arena: &mut Arena,
        now: Instant,
    ) -> Result<(), Obstacle> {
        if self.words != words {
            let block = write(tables, arena, &words, now)?;
            tables.set_service(self.index, key, block.start);
            arena.retire(std::mem::replace(&mut self.block, block), now);
            self.words = words;
        }
        Ok(())
    }
}

/// What leads the connections of a listener to its chains.
#[derive(Debug)]
pub(super) struct Selector {
    pub(super) placed: Placed,
    /// Since when it is gone.
    pub(super) gone: Option<Instant>,
}

/// A filter chain of such a listener.
#[derive(Debug)]
pub(in crate::kernel_path) struct Service {
    pub(super) placed: Placed,
    pub(in crate::kernel_path) plan: ChainPlan,
    pub(super) seen: Seen,
    /// Since when it is gone.
    pub(super) gone: Option<Instant>,
}

impl Manager {
    /// A listener is not on the kernel path any more.
    pub(super) fn leave(&mut self, name: &Arc<str>, now: Instant) {
        let Some(OnPath { index: _, chains }) = self.listeners.remove(name) else { return };
        self.forget_chains(&chains, now);
        if let Some(selector) = self.selectors.get_mut(name) {
            selector.gone.get_or_insert(now);
        }
    }

    fn forget_chains(&mut self, chains: &[ServiceKey], now: Instant) {
        for key in chains {
            if let Some(service) = self.services.get_mut(key) {
                service.gone.get_or_insert(now);
            }
        }
    }

    /// Compiles a listener, its chains and their clusters. What is chosen is in force before anybody is led to it.
    pub(super) fn serve(&mut self, name: &Arc<str>, plan: Plan, now: Instant) -> Result<(), Vec<Obstacle>> {
        let Plan { chains, sources } = plan;
        let keys = ServiceKey::all(name, &chains);
        let mut indexes = Vec::with_capacity(chains.len());
        let served = chains.into_iter().zip(&keys).try_for_each(|(chain, key)| {
            indexes.push(self.serve_chain(key, chain, now)?);
            Ok(())
        });
        let index = served.and_then(|()| match (&indexes[..], &sources[..]) {
            ([only], [_]) => Ok(*only),
            _ => self.serve_selector(name, &sources, &indexes, now),
        });
        let index = match index {
            Ok(index) => index,
            Err(obstacle) => {
                self.forget_chains(&keys, now);
                return Err(vec![obstacle]);
            }
        };
        let before = self.listeners.insert(Arc::clone(name), OnPath { index, chains: keys });
        let Some(before) = before else { return Ok(()) };
        let stays = &self.listeners[name].chains;
        let gone: Vec<_> = before.chains.into_iter().filter(|key| !stays.contains(key)).collect();
        self.forget_chains(&gone, now);
        if let Some(selector) = self.selectors.get_mut(name).filter(|it| it.placed.index != index) {
            selector.gone.get_or_insert(now);
        }
        Ok(())
    }

    /// Compiles a filter chain and its clusters. Returns its index.
    fn serve_chain(&mut self, key: &ServiceKey, plan: ChainPlan, now: Instant) -> Result<u32, Obstacle> {
        let mut words = vec![0];
        let mut bound = 0_u32;
        // Weights of a tcp_proxy fit 32 bits together, as in Envoy.
        for (cluster, weight) in &plan.clusters {
            let index = self.compile(cluster, now)?;
            let policy = &cluster.config().lb_policy;
            let by_source = hashing::is_by_source(policy, plan.proxy.config.hash_policy.as_ref());
            bound = bound.saturating_add(*weight);
            words.push(Entry { bound, offset: Member { cluster: index, by_source }.encode() }.encode());
        }
        words[0] = ServiceHead { clusters: plan.clusters.len() as u32, total: bound }.encode();
        if let Some(service) = self.services.get_mut(key) {
            service.placed.replace(key.number(), words, &self.tables, &mut self.arena, now)?;
            (service.plan, service.gone) = (plan, None);
            return Ok(service.placed.index);
        }
        let placed = self.place(key.number(), words, now)?;
        let index = placed.index;
        self.names.services.insert(index, key.clone());
        let service = Service { placed, plan, seen: Seen::default(), gone: None };
        self.services.insert(key.clone(), service);
        Ok(index)
    }

    /// Leads sources to the chains with these indexes. Returns the selector's own.
    fn serve_selector(
        &mut self,
        name: &Arc<str>,
        sources: &[Sources],
        chains: &[u32],
        now: Instant,
    ) -> Result<u32, Obstacle> {
        let words = compile_selector(sources, chains);
        let number = key_of(name);
        if let Some(selector) = self.selectors.get_mut(name) {
            selector.placed.replace(number, words, &self.tables, &mut self.arena, now)?;
            selector.gone = None;
            return Ok(selector.placed.index);
        }
        let placed = self.place(number, words, now)?;
        let index = placed.index;
        self.selectors.insert(Arc::clone(name), Selector { placed, gone: None });
        Ok(index)
    }

    /// An entry of its own for these words.
    fn place(&mut self, key: u64, words: Vec<u64>, now: Instant) -> Result<Placed, Obstacle> {
        let block = write(&self.tables, &mut self.arena, &words, now)?;
        let Some(index) = self.free_services.take(&key) else {
            self.arena.give_back(block);
            return Err(Obstacle::TableFull { table: "services", entries: self.tables.sizes().services });
        };
        self.tables.set_service(index, key, block.start);
        Ok(Placed { index, words, block })
    }
}

/// The block of a service's entry, if it has one.
pub(super) fn service_block(tables: &Tables, index: u32) -> Option<Block> {
    let start = tables.service(index).block as u32;
    let head = (start != 0).then(|| tables.block_word(start))??;
    Some(Block { start, len: ServiceHead::decode(head).words() })
}
