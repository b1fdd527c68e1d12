//! Choosing an endpoint in connect(2): the layout of a compiled cluster, and the choice itself.
//!
//! A cluster is compiled into a *block* of 64-bit words, which is written as a whole and never changed. The eBPF
//! programs and the agent's tests run the same [`locate`] on it; only where the words come from differs ([`Table`]).
//!
//! | word | what |
//! |---|---|
//! | [`Head`] | policy, number of routes |
//! | [`Route`]s | share of the load in percent, and the list that gets it: a priority's healthy, degraded or all hosts |
//! | [`List`] and its entries | endpoints, or lists (localities) by weight |
//! | or a [`List`] and its [`Places`] | a table (MAGLEV) or a ring (RING_HASH) of endpoints |
//! | three words for each endpoint | address, port, index of its host |
//!
//! Offsets are counted in words from the start of the block.

use crate::Addr;
use crate::selector::RANGE_WORDS;

/// Routes of a block: two for each of eight priorities.
pub const MAX_ROUTES: u32 = 16;
/// Entries of a list. The search of a weighted list takes a step for each bit.
pub const MAX_ENTRIES: u32 = 1 << 16;
/// Hosts drawn by LEAST_REQUEST.
pub const MAX_CHOICES: u32 = 8;
/// Clusters of a service.
pub const MAX_CLUSTERS: u32 = 16;
/// Points of a ring. The search takes a step for each bit.
pub const MAX_POINTS: u32 = 1 << 16;
/// Words of an endpoint.
pub const ENDPOINT_WORDS: u32 = 3;

/// How an endpoint is chosen from a list.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Policy {
    /// In turn; by weight where weights differ.
    RoundRobin = 0,
    /// The least loaded of a few random ones.
    LeastRequest = 1,
    /// Any.
    Random = 2,
    /// By what is hashed of the connection; also among routes.
    Hash = 3,
}

/// First word of a block.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head {
    /// A [`Policy`].
    pub policy: u8,
    /// LEAST_REQUEST: hosts drawn, at most [`MAX_CHOICES`].
    pub choices: u8,
    /// At most [`MAX_ROUTES`]. 0: there is no endpoint.
    pub routes: u8,
    /// Words of the block, this one included.
    pub words: u32,
}

impl Head {
    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.policy as u64
            | (self.choices as u64) << 8
            | (self.routes as u64) << 16
            | (self.words as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self {
            policy: word as u8,
            choices: (word >> 8) as u8,
            routes: (word >> 16) as u8,
            words: (word >> 32) as u32,
        }
    }
}

/// Which share of the connections a list gets.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Route {
    /// Rolls below this, and not below that of the route before, go here: 1 to 100, the last one 100.
    pub below: u8,
    /// Health is disregarded (panic mode).
    pub panic: bool,
    /// Where the list is.
    pub list: u32,
}

impl Route {
    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.below as u64 | (self.panic as u64) << 8 | (self.list as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self { below: word as u8, panic: (word >> 8) & 1 == 1, list: (word >> 32) as u32 }
    }
}

/// What the entries of a list are.
#[repr(u8)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ListKind {
    /// Endpoints of equal weight.
    Even = 0,
    /// Endpoints with bounds.
    Weighted = 1,
    /// Lists with bounds, one for each locality; these lists are [`Self::Even`] or [`Self::Weighted`].
    Localities = 2,
    /// [`Places`], then indexes of endpoints: the remainder of the hash is a place.
    Table = 3,
    /// [`Places`], then points in ascending order, then as many indexes of endpoints: a hash belongs to the point that is
    /// the next from it, after the last point to the first.
    Ring = 4,
}

/// First word of a list; its [`Entry`]s follow.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct List {
    /// A [`ListKind`].
    pub kind: u8,
    /// How many entries; at most [`MAX_ENTRIES`]. Of a table or a ring: how many endpoints. An empty list has no endpoint to
    /// offer.
    pub len: u32,
    /// Sum of all weights: the bound of the last entry. Unused in an even list. Of a table: how many places; of a ring: how
    /// many points, at most [`MAX_POINTS`].
    pub total: u32,
}

impl List {
    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.kind as u64 | (self.len as u64) << 8 | (self.total as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self { kind: word as u8, len: (word >> 8) as u32 & 0x00ff_ffff, total: (word >> 32) as u32 }
    }
}

/// Entry of a list.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Sum of the weights up to and with this one; 0 in an even list.
    pub bound: u32,
    /// Where the endpoint or the list is.
    pub offset: u32,
}

impl Entry {
    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.offset as u64 | (self.bound as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self { bound: (word >> 32) as u32, offset: word as u32 }
    }
}

/// Second word of a table or a ring.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Places {
    /// Where the endpoints are, one after the other.
    pub endpoints: u32,
    /// An index has 16 bits, otherwise 8; a word has as many of them as fit, the first in its lowest bits.
    pub wide: bool,
}

impl Places {
    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.endpoints as u64 | (self.wide as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self { endpoints: word as u32, wide: (word >> 32) & 1 == 1 }
    }

    /// How many indexes a word has.
    pub const fn per_word(self) -> usize {
        if self.wide { 4 } else { 8 }
    }

    /// The endpoint at a place. `first` is where the indexes are.
    #[inline(always)]
    fn endpoint(self, table: &impl Table, first: u32, place: u32) -> Option<u32> {
        let wide = self.wide as u32;
        let word = table.word(first + (place >> (3 - wide)))?;
        let (bits, in_word) = (8 << wide, place & ((8 >> wide) - 1));
        let index = word >> (in_word * bits) & ((1 << bits) - 1);
        Some(self.endpoints + index as u32 * ENDPOINT_WORDS)
    }
}

/// An endpoint, [`ENDPOINT_WORDS`] words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Endpoint {
    /// Where it is.
    pub addr: Addr,
    /// Port, host order.
    pub port: u16,
    /// Index of its host in the map of hosts.
    pub host: u32,
}

impl Endpoint {
    /// As words.
    pub const fn encode(self) -> [u64; ENDPOINT_WORDS as usize] {
        let words = self.addr.words();
        [
            words[0] as u64 | (words[1] as u64) << 32,
            words[2] as u64 | (words[3] as u64) << 32,
            self.port as u64 | (self.host as u64) << 32,
        ]
    }

    /// From words.
    #[inline(always)]
    pub const fn decode([a, b, c]: [u64; ENDPOINT_WORDS as usize]) -> Self {
        let addr = Addr::from_words([a as u32, (a >> 32) as u32, b as u32, (b >> 32) as u32]);
        Self { addr, port: c as u16, host: (c >> 32) as u32 }
    }

    /// The words at this offset.
    #[inline(always)]
    pub fn words(table: &impl Table, at: u32) -> Option<[u64; ENDPOINT_WORDS as usize]> {
        Some([table.word(at)?, table.word(at + 1)?, table.word(at + 2)?])
    }

    #[inline(always)]
    fn host(table: &impl Table, at: u32) -> Option<u32> {
        Some((table.word(at + 2)? >> 32) as u32)
    }
}

/// First word of a service's block; one [`Entry`] for each of its clusters follows, with bounds by weight and a
/// [`Member`] in the place of an offset. Without clusters it is a selector ([`crate::selector`]).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ServiceHead {
    /// How many clusters, at most [`MAX_CLUSTERS`]; 0: this is a selector.
    pub clusters: u32,
    /// Sum of their weights. Of a selector: how many ranges.
    pub total: u32,
}

impl ServiceHead {
    /// Whether it leads to other services.
    #[inline(always)]
    pub const fn is_selector(self) -> bool {
        self.clusters == 0
    }

    /// Words of the block, this one included.
    pub const fn words(self) -> u32 {
        if self.is_selector() { 1 + self.total.saturating_mul(RANGE_WORDS) } else { 1 + self.clusters }
    }

    /// As a word.
    #[inline(always)]
    pub const fn encode(self) -> u64 {
        self.clusters as u64 | (self.total as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Self {
        Self { clusters: word as u32, total: (word >> 32) as u32 }
    }
}

/// A cluster of a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Member {
    /// Index of the cluster, below 2^31.
    pub cluster: u32,
    /// Its policy hashes the source address of connections of this service: where that is not known, the proxy takes them.
    pub by_source: bool,
}

impl Member {
    const BY_SOURCE: u32 = 1 << 31;

    /// As an offset.
    pub const fn encode(self) -> u32 {
        if self.by_source { self.cluster | Self::BY_SOURCE } else { self.cluster }
    }

    /// From an offset.
    #[inline(always)]
    pub const fn decode(offset: u32) -> Self {
        Self { cluster: offset & !Self::BY_SOURCE, by_source: offset & Self::BY_SOURCE != 0 }
    }
}

/// The cluster for the next connection of a service: drawn by weight. None: the block is no block.
#[inline(always)]
pub fn choose_cluster(table: &impl Table) -> Option<Member> {
    let head = ServiceHead::decode(table.word(0)?);
    if head.clusters == 1 {
        return Some(Member::decode(Entry::decode(table.word(1)?).offset));
    }
    let roll = scale(table.random(), head.total);
    for i in 0..MAX_CLUSTERS {
        if i >= head.clusters {
            break;
        }
        let entry = Entry::decode(table.word(1 + i)?);
        if roll < entry.bound {
            return Some(Member::decode(entry.offset));
        }
    }
    None
}

/// Where the words of a block, and what changes from pick to pick, come from.
pub trait Table {
    /// The word at this offset of the block. None: there is no such word, the block is broken.
    fn word(&self, offset: u32) -> Option<u64>;
    /// A random number.
    fn random(&self) -> u32;
    /// Which pick of the cluster this is, counted from anywhere.
    fn turn(&self) -> u32;
    /// Active connections of a host, on both paths.
    fn active(&self, host: u32) -> u64;
    /// What is hashed of the connection, or a random number. Asked for once at most.
    fn hash(&self) -> u64;
}

/// What a pick gave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pick {
    /// The endpoint.
    pub endpoint: Endpoint,
    /// It was chosen regardless of health.
    pub panic: bool,
}

/// Why a pick gave nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NoPick {
    /// There is no usable endpoint.
    NoHost {
        /// Health was disregarded.
        panic: bool,
    },
    /// The block is no block.
    Broken,
}

/// Where the endpoint for the next connection is, before it is read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Located {
    /// Its offset.
    pub at: u32,
    /// It was chosen regardless of health.
    pub panic: bool,
}

/// Numbers of [`NoPick`] in the place of an offset, where no block has an endpoint.
const NO_HOST: u32 = u32::MAX;
const BROKEN: u32 = u32::MAX - 1;

impl Located {
    /// What [`locate`] says, as a word: what a function of an eBPF program can return.
    #[inline(always)]
    pub const fn encode(located: Result<Self, NoPick>) -> u64 {
        let (at, panic) = match located {
            Ok(Self { at, panic }) => (at, panic),
            Err(NoPick::NoHost { panic }) => (NO_HOST, panic),
            Err(NoPick::Broken) => (BROKEN, false),
        };
        at as u64 | (panic as u64) << 32
    }

    /// From a word.
    #[inline(always)]
    pub const fn decode(word: u64) -> Result<Self, NoPick> {
        let panic = (word >> 32) & 1 == 1;
        match word as u32 {
            NO_HOST => Err(NoPick::NoHost { panic }),
            BROKEN => Err(NoPick::Broken),
            at => Ok(Self { at, panic }),
        }
    }
}

/// The endpoint for the next connection.
pub fn choose(table: &impl Table) -> Result<Pick, NoPick> {
    let Located { at, panic } = locate(table)?;
    let words = Endpoint::words(table, at).ok_or(NoPick::Broken)?;
    Ok(Pick { endpoint: Endpoint::decode(words), panic })
}

/// Where the endpoint for the next connection is.
#[inline(always)]
pub fn locate(table: &impl Table) -> Result<Located, NoPick> {
    let head = Head::decode(table.word(0).ok_or(NoPick::Broken)?);
    if head.routes == 0 {
        return Err(NoPick::NoHost { panic: false });
    }
    let by_hash = head.policy == Policy::Hash as u8;
    let hash = if by_hash { table.hash() } else { 0 };
    let route = route(table, head.routes, by_hash, hash).ok_or(NoPick::Broken)?;
    let turn = table.turn();
    let none = NoPick::NoHost { panic: route.panic };
    let mut list_at = route.list;
    let mut list = List::decode(table.word(list_at).ok_or(NoPick::Broken)?);
    if list.len == 0 {
        return Err(none);
    }
    if list.kind == ListKind::Localities as u8 {
        list_at = weighted(table, list_at, list, spread(turn, LOCALITY_STEP)).ok_or(NoPick::Broken)?;
        list = List::decode(table.word(list_at).ok_or(NoPick::Broken)?);
        if list.len == 0 {
            return Err(none);
        }
    }
    let at = match head.policy {
        _ if by_hash => hashed(table, list_at, list, hash),
        _ if list.kind == ListKind::Weighted as u8 => weighted(table, list_at, list, spread(turn, HOST_STEP)),
        policy if policy == Policy::LeastRequest as u8 => {
            least_loaded(table, list_at, list.len, head.choices)
        }
        policy if policy == Policy::Random as u8 => {
            entry(table, list_at, scale(table.random(), list.len)).map(|entry| entry.offset)
        }
        _ => entry(table, list_at, turn % list.len).map(|entry| entry.offset),
    };
    Ok(Located { at: at.ok_or(NoPick::Broken)?, panic: route.panic })
}

#[inline(always)]
fn route(table: &impl Table, routes: u8, by_hash: bool, hash: u64) -> Option<Route> {
    if routes == 1 {
        return Some(Route::decode(table.word(1)?));
    }
    let roll = if by_hash { (hash % 100) as u32 } else { scale(table.random(), 100) };
    for i in 0..MAX_ROUTES {
        if i >= routes as u32 {
            break;
        }
        let route = Route::decode(table.word(1 + i)?);
        if roll < route.below as u32 {
            return Some(route);
        }
    }
    None
}

/// Multiples of an irrational number, modulo 1: they fill the unit interval more evenly than any other sequence, so
/// each share of it gets its part of any number of turns but for a few. The golden ratio and the square root of two, as
/// fractions of 2^32: two sequences that don't move in step.
const HOST_STEP: u32 = 0x9e37_79b1;
const LOCALITY_STEP: u32 = 0x6a09_e667;

#[inline(always)]
const fn spread(turn: u32, step: u32) -> u32 {
    turn.wrapping_mul(step)
}

/// From a number anywhere below 2^32 to one below `bound`, in proportion.
#[inline(always)]
const fn scale(number: u32, bound: u32) -> u32 {
    ((number as u64 * bound as u64) >> 32) as u32
}

#[inline(always)]
fn entry(table: &impl Table, list: u32, index: u32) -> Option<Entry> {
    Some(Entry::decode(table.word(list + 1 + index)?))
}

/// What the share that `position` falls into leads to.
#[inline(always)]
fn weighted(table: &impl Table, at: u32, list: List, position: u32) -> Option<u32> {
    let position = scale(position, list.total);
    // The first entry whose bound is above the position.
    let (mut low, mut high) = (0, list.len - 1);
    for _ in 0..=MAX_ENTRIES.ilog2() {
        if low >= high {
            break;
        }
        let middle = u32::midpoint(low, high);
        if entry(table, at, middle)?.bound > position {
            high = middle;
        } else {
            low = middle + 1;
        }
    }
    Some(entry(table, at, low)?.offset)
}

/// Where the endpoint is that a hash belongs to.
#[inline(always)]
fn hashed(table: &impl Table, at: u32, list: List, hash: u64) -> Option<u32> {
    let places = Places::decode(table.word(at + 1)?);
    let first = at + 2;
    if list.total == 0 {
        return None;
    }
    if list.kind == ListKind::Table as u8 {
        return places.endpoint(table, first, (hash % list.total as u64) as u32);
    }
    // The first point that is not before the hash.
    let (mut low, mut high) = (0, list.total);
    for _ in 0..=MAX_POINTS.ilog2() {
        if low >= high {
            break;
        }
        let middle = u32::midpoint(low, high);
        if table.word(first + middle)? < hash {
            low = middle + 1;
        } else {
            high = middle;
        }
    }
    places.endpoint(table, first + list.total, if low == list.total { 0 } else { low })
}

/// The first drawn on a tie; the draws need not differ.
#[inline(always)]
fn least_loaded(table: &impl Table, at: u32, len: u32, choices: u8) -> Option<u32> {
    let draw = || Some(entry(table, at, scale(table.random(), len))?.offset);
    let mut best = draw()?;
    let mut load = table.active(Endpoint::host(table, best)?);
    for i in 1..MAX_CHOICES {
        if i >= choices as u32 {
            break;
        }
        let other = draw()?;
        let other_load = table.active(Endpoint::host(table, other)?);
        if other_load < load {
            (best, load) = (other, other_load);
        }
    }
    Some(best)
}

#[cfg(test)]
mod tests;
