//! `hash_balance_factor`: consistent hashing with bounded loads. A host with more than its share is passed over, and the others are
//! tried in an order that follows from the hash, so that what one host can't take does not all go to the next
//! (arXiv 1608.01350 and 1908.08762). The order is that of Envoy.

/// What a search among the hosts needs, kept by whoever searches often. Empty until it is needed.
#[derive(Debug, Default)]
pub struct Probe {
    order: Vec<u32>,
    random: Twister,
}

impl Probe {
    /// A host whose load is at most 1, `first` before all others; if there is none, the one with the least. `hosts` is how many there
    /// are, at least one.
    pub(super) fn find(
        &mut self,
        hash: u64,
        first: usize,
        hosts: usize,
        load: impl Fn(usize) -> f64,
    ) -> usize {
        let (mut best, mut least) = (first, load(first));
        if least <= 1.0 {
            return first;
        }
        self.order.clear();
        self.order.extend(0..hosts as u32);
        self.random.seed(hash as u32);
        for tried in 0..hosts {
            let other = tried + self.random.below((hosts - tried) as u32) as usize;
            self.order.swap(tried, other);
            let host = self.order[tried] as usize;
            if host == first {
                continue;
            }
            let load = load(host);
            if load <= 1.0 {
                return host;
            }
            if load < least {
                (best, least) = (host, load);
            }
        }
        best
    }
}

const WORDS: usize = 624;
const AHEAD: usize = 397;

/// The Mersenne Twister with 32 bits (`std::mt19937`).
#[derive(Debug, Default)]
struct Twister {
    /// Empty before the first seed.
    state: Vec<u32>,
    at: usize,
}

impl Twister {
    fn seed(&mut self, seed: u32) {
        self.state.clear();
        self.state.reserve_exact(WORDS);
        let mut word = seed;
        self.state.push(word);
        for index in 1..WORDS as u32 {
            word = 1_812_433_253_u32.wrapping_mul(word ^ (word >> 30)).wrapping_add(index);
            self.state.push(word);
        }
        self.at = WORDS;
    }

    fn twist(&mut self) {
        for index in 0..WORDS {
            let (this, next) = (self.state[index], self.state[(index + 1) % WORDS]);
            let both = this & 0x8000_0000 | next & 0x7fff_ffff;
            let odd = if next & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[index] = self.state[(index + AHEAD) % WORDS] ^ (both >> 1) ^ odd;
        }
        self.at = 0;
    }

    fn next(&mut self) -> u32 {
        if self.at == WORDS {
            self.twist();
        }
        let mut word = self.state[self.at];
        self.at += 1;
        word ^= word >> 11;
        word ^= word << 7 & 0x9d2c_5680;
        word ^= word << 15 & 0xefc6_0000;
        word ^ (word >> 18)
    }

    /// A number below `bound`, which is at least 1: numbers beyond its largest multiple are drawn again.
    fn below(&mut self, bound: u32) -> u32 {
        let part = (1_u64 << 32) / u64::from(bound);
        loop {
            let number = (u64::from(self.next()) / part) as u32;
            if number < bound {
                return number;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_twister_is_the_standard_one() {
        let mut random = Twister::default();
        random.seed(5489);
        // C++ [rand.predef]: the 10,000th number of a default mt19937.
        assert_eq!((0..10_000).map(|_| random.next()).last(), Some(4_123_659_995));
    }

    #[test]
    fn the_first_in_order_is_taken_and_else_the_least_loaded() {
        let mut probe = Probe::default();
        assert_eq!(probe.find(7, 2, 5, |_| 1.0), 2);
        assert_eq!(probe.find(7, 2, 5, |host| if host == 4 { 1.0 } else { 1.5 }), 4);
        assert_eq!(probe.find(7, 2, 5, |host| if host == 3 { 1.2 } else { 1.5 }), 3);
        assert_eq!(probe.find(7, 2, 5, |_| 1.5), 2, "nobody has less");
        assert_eq!(probe.find(7, 0, 1, |_| 9.0), 0);
    }

    #[test]
    fn the_order_follows_from_the_hash_and_spreads() {
        let find = |hash| Probe::default().find(hash, 0, 10, |host| if host == 0 { 2.0 } else { 0.0 });
        let mut seen = [0; 10];
        for hash in 0..900 {
            assert_eq!(find(hash), find(hash));
            seen[find(hash)] += 1;
        }
        assert_eq!(seen[0], 0);
        assert!(seen[1..].iter().all(|count| (60..140).contains(count)), "{seen:?}");
    }
}
