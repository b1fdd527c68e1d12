extern crate std;
use core::cell::Cell;
use std::{vec, vec::Vec};

use super::*;

struct Words {
    words: Vec<u64>,
    turn: Cell<u32>,
    random: Cell<u32>,
    active: Vec<u64>,
}

impl Table for Words {
    fn word(&self, offset: u32) -> Option<u64> {
        self.words.get(offset as usize).copied()
    }
    fn random(&self) -> u32 {
        self.random.set(self.random.get().wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
        self.random.get()
    }
    fn turn(&self) -> u32 {
        self.turn.set(self.turn.get().wrapping_add(1));
        self.turn.get()
    }
    fn active(&self, host: u32) -> u64 {
        self.active[host as usize]
    }
    fn hash(&self) -> u64 {
        (self.random() as u64) << 32 | self.random() as u64
    }
}

fn table(policy: Policy, routes: &[(u8, bool)], weights: &[u32]) -> Words {
    let kind = if weights.windows(2).all(|w| w[0] == w[1]) { ListKind::Even } else { ListKind::Weighted };
    let list_at = 1 + routes.len() as u32;
    let hosts_at = list_at + 1 + weights.len() as u32;
    let mut words = vec![0];
    words.extend(
        routes.iter().map(|(below, panic)| Route { below: *below, panic: *panic, list: list_at }.encode()),
    );
    let total = weights.iter().sum();
    words.push(List { kind: kind as u8, len: weights.len() as u32, total }.encode());
    let mut bound = 0;
    for (i, weight) in weights.iter().enumerate() {
        bound += weight;
        words.push(Entry { bound, offset: hosts_at + i as u32 * ENDPOINT_WORDS }.encode());
    }
    for i in 0..weights.len() as u32 {
        words.extend(Endpoint { addr: Addr::from_v4_be(i), port: i as u16 + 1, host: i }.encode());
    }
    words[0] =
        Head { policy: policy as u8, choices: 2, routes: routes.len() as u8, words: words.len() as u32 }
            .encode();
    let active = vec![0; weights.len()];
    Words { words, turn: Cell::new(7), random: Cell::new(1), active }
}

fn counts(table: &Words, picks: usize) -> Vec<usize> {
    let mut counts = vec![0; table.active.len()];
    for _ in 0..picks {
        let pick = choose(table).unwrap();
        assert_eq!(pick.endpoint.port as u32, pick.endpoint.host + 1);
        assert_eq!(pick.endpoint.addr, Addr::from_v4_be(pick.endpoint.host));
        counts[pick.endpoint.host as usize] += 1;
    }
    counts
}

#[test]
fn equal_weights_are_taken_in_turn() {
    assert_eq!(counts(&table(Policy::RoundRobin, &[(100, false)], &[5; 7]), 70), [10; 7]);
}

#[test]
fn shares_follow_weights_closely_at_any_time() {
    let weights = [1, 2, 97, 300];
    let table = table(Policy::RoundRobin, &[(100, false)], &weights);
    let mut seen = [0_usize; 4];
    for picks in 1..=4_000_usize {
        seen[choose(&table).unwrap().endpoint.host as usize] += 1;
        for (seen, weight) in seen.iter().zip(weights) {
            let due = picks as f64 * f64::from(weight) / 400.0;
            assert!((*seen as f64 - due).abs() < 3.0, "after {picks}: {seen} of {due}");
        }
    }
}

#[test]
fn the_least_loaded_of_the_drawn_is_chosen() {
    let mut table = table(Policy::LeastRequest, &[(100, false)], &[1; 4]);
    table.active = vec![9, 9, 0, 9];
    let counts = counts(&table, 4_000);
    // Host 2 wins whenever it is among two draws: 7 of 16 times; the others share the rest.
    assert!((1_600..1_900).contains(&counts[2]), "{counts:?}");
}

#[test]
fn random_reaches_everybody_alike() {
    let counts = counts(&table(Policy::Random, &[(100, false)], &[1; 4]), 4_000);
    assert!(counts.iter().all(|count| (900..1_100).contains(count)), "{counts:?}");
}

#[test]
fn routes_get_their_percentage() {
    let table = table(Policy::RoundRobin, &[(30, false), (100, true)], &[1; 2]);
    let panics = (0..10_000).filter(|_| choose(&table).unwrap().panic).count();
    assert!((6_800..7_200).contains(&panics), "{panics}");
}

#[test]
fn what_a_function_returns_is_what_it_found() {
    let found = |at, panic| Ok(Located { at, panic });
    let errors = [NoPick::NoHost { panic: false }, NoPick::NoHost { panic: true }, NoPick::Broken].map(Err);
    for located in [found(2, false), found(u32::MAX - 2, true)].into_iter().chain(errors) {
        assert_eq!(Located::decode(Located::encode(located)), located);
    }
    for member in [true, false].map(|by_source| Member { cluster: 0x7fff_fffe, by_source }) {
        assert_eq!(Member::decode(member.encode()), member);
    }
}

#[test]
fn a_hash_belongs_to_the_next_point() {
    // A ring of the points 10, 20, 30 for the hosts 2, 0, 1.
    let mut words = vec![0, Route { below: 100, panic: false, list: 11 }.encode()];
    for i in 0..3 {
        words.extend(Endpoint { addr: Addr::from_v4_be(i), port: i as u16 + 1, host: i }.encode());
    }
    words.push(List { kind: ListKind::Ring as u8, len: 3, total: 3 }.encode());
    words.push(Places { endpoints: 2, wide: true }.encode());
    words.extend([10, 20, 30, 2 | 1 << 32]);
    let mut table = Words { words, turn: Cell::new(0), random: Cell::new(1), active: vec![0; 3] };
    table.words[0] = Head { policy: Policy::Hash as u8, choices: 0, routes: 1, words: 17 }.encode();
    for (hash, host) in [(0, 2), (10, 2), (11, 0), (20, 0), (21, 1), (30, 1), (31, 2), (u64::MAX, 2)] {
        let list = List::decode(table.words[11]);
        let at = hashed(&table, 11, list, hash).unwrap();
        assert_eq!(Endpoint::decode(Endpoint::words(&table, at).unwrap()).host, host, "{hash}");
    }
    // The same hosts in a table of five places.
    table.words[11] = List { kind: ListKind::Table as u8, len: 3, total: 5 }.encode();
    table.words[12] = Places { endpoints: 2, wide: false }.encode();
    table.words[13] = u64::from_le_bytes([1, 0, 2, 2, 0, 0, 0, 0]);
    for (hash, host) in [(0, 1), (1, 0), (3, 2), (4, 0), (5, 1), (u64::MAX, 1)] {
        let list = List::decode(table.words[11]);
        let at = hashed(&table, 11, list, hash).unwrap();
        assert_eq!(Endpoint::decode(Endpoint::words(&table, at).unwrap()).host, host, "{hash}");
    }
}

#[test]
fn nothing_to_choose_from() {
    let none = |routes| choose(&table(Policy::RoundRobin, routes, &[]));
    assert_eq!(none(&[]), Err(NoPick::NoHost { panic: false }));
    assert_eq!(none(&[(100, true)]), Err(NoPick::NoHost { panic: true }));
    let mut broken = table(Policy::RoundRobin, &[(100, false)], &[1]);
    broken.words.pop();
    assert_eq!(choose(&broken), Err(NoPick::Broken));
    broken.words.clear();
    assert_eq!(choose(&broken), Err(NoPick::Broken));
}

#[test]
fn a_locality_first_then_a_host_in_it() {
    // Two localities 1 : 3, of two hosts 1 : 1 and 1 : 4.
    let mut words = vec![0, Route { below: 100, panic: false, list: 2 }.encode()];
    words.push(List { kind: ListKind::Localities as u8, len: 2, total: 4 }.encode());
    words.push(Entry { bound: 1, offset: 5 }.encode());
    words.push(Entry { bound: 4, offset: 8 }.encode());
    words.push(List { kind: ListKind::Even as u8, len: 2, total: 0 }.encode());
    words.extend([11, 14].map(|offset| Entry { bound: 0, offset }.encode()));
    words.push(List { kind: ListKind::Weighted as u8, len: 2, total: 5 }.encode());
    words.extend([(1, 17), (5, 20)].map(|(bound, offset)| Entry { bound, offset }.encode()));
    for i in 0..4 {
        words.extend(Endpoint { addr: Addr::from_v4_be(i), port: i as u16 + 1, host: i }.encode());
    }
    words[0] = Head { policy: 0, choices: 0, routes: 1, words: words.len() as u32 }.encode();
    let table = Words { words, turn: Cell::new(0), random: Cell::new(1), active: vec![0; 4] };
    let counts = counts(&table, 8_000);
    for (count, due) in counts.iter().zip([1_000, 1_000, 1_200, 4_800]) {
        assert!(count.abs_diff(due) < 40, "{counts:?}");
    }
}
