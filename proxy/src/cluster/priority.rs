//! How load spreads over the priorities of a cluster, and when panic mode sets in.
//!
//! The health of a priority is its share of healthy hosts times the overprovisioning factor, at most 100 %. Load
//! goes to priority 0 as far as its health reaches, the rest to the next, healthy hosts of all priorities before
//! degraded ones. When all of them together do not reach 100 %, the load is scaled up to it, and a priority whose
//! share of usable hosts is below the panic threshold uses all its hosts, whatever their health.

/// How many hosts of a priority can be used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Availability {
    /// All hosts.
    pub hosts: usize,
    /// Of those, the ones that don't count in shares.
    pub excluded: usize,
    /// Healthy hosts.
    pub healthy: usize,
    /// Degraded hosts.
    pub degraded: usize,
}

/// Load of each priority in percent; `healthy` and `degraded` together sum up to 100.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Loads {
    /// To healthy hosts (to all hosts where `panic` is set).
    pub healthy: Vec<u8>,
    /// To degraded hosts.
    pub degraded: Vec<u8>,
    /// Priorities in panic mode.
    pub panic: Vec<bool>,
}

impl Loads {
    /// Spreads load. `overprovisioning_factor` and `panic_threshold` are percentages (140, 50); the threshold is
    /// rounded to a whole number and 0 turns panic mode off.
    pub fn new(priorities: &[Availability], overprovisioning_factor: u32, panic_threshold: f64) -> Self {
        let threshold = panic_threshold.round().clamp(0.0, 100.0);
        let health = |count: fn(&Availability) -> usize| -> Vec<u64> {
            priorities.iter().map(|p| p.health(count(p), overprovisioning_factor)).collect()
        };
        let (healthy, degraded) = (health(|p| p.healthy), health(|p| p.degraded));
        let available = (healthy.iter().sum::<u64>() + degraded.iter().sum::<u64>()).min(100);

        let mut loads = Self::spread(&healthy, &degraded, available);
        if available == 0 && threshold == 0.0 {
            // Nothing is usable and nothing may panic: the pick from priority 0 finds no host.
            loads.healthy[0] = 100;
            return loads;
        }
        loads.panic = priorities
            .iter()
            .map(|priority| available != 100 && priority.usable_percent() < threshold)
            .collect();
        if loads.panic.iter().all(|panic| *panic) {
            loads.spread_by_host_count(priorities);
        }
        loads
    }

    /// Gives each priority what its health allows, in order, until all load is given away.
    fn spread(healthy: &[u64], degraded: &[u64], available: u64) -> Self {
        let mut left = 100;
        let mut give = |health: &[u64]| -> Vec<u8> {
            let share = |health: &u64| {
                let load = (health * 100).checked_div(available).unwrap_or(0).min(left);
                left -= load;
                load as u8
            };
            health.iter().map(share).collect()
        };
        let mut loads =
            Self { healthy: give(healthy), degraded: give(degraded), panic: vec![false; healthy.len()] };
        // What is left comes from rounding.
        let first = |health: &[u64]| health.iter().position(|health| *health > 0);
        if let Some(at) = first(healthy) {
            loads.healthy[at] += left as u8;
        } else if let Some(at) = first(degraded) {
            loads.degraded[at] += left as u8;
        }
        loads
    }

    /// Every priority is in panic: health says nothing any more, numbers do.
    fn spread_by_host_count(&mut self, priorities: &[Availability]) {
        self.healthy.fill(0);
        self.degraded.fill(0);
        let total: usize = priorities.iter().map(|priority| priority.hosts).sum();
        let Some(first) = priorities.iter().position(|priority| priority.hosts > 0) else {
            self.healthy[0] = 100;
            return;
        };
        let mut left = 100;
        for (load, priority) in self.healthy.iter_mut().zip(priorities) {
            *load = (100 * priority.hosts / total) as u8;
            left -= *load;
        }
        self.healthy[first] += left;
    }

    /// The priority for a number from 0 to 99, and whether its degraded hosts are meant.
    pub fn choose(&self, roll: u8) -> (usize, bool) {
        let mut below = 0;
        for (loads, degraded) in [(&self.healthy, false), (&self.degraded, true)] {
            for (priority, load) in loads.iter().enumerate() {
                below += load;
                if roll < below {
                    return (priority, degraded);
                }
            }
        }
        (0, false)
    }

    /// Whether all load goes to healthy hosts of one priority, so that nothing has to be drawn.
    pub fn only(&self) -> Option<usize> {
        self.healthy.iter().position(|load| *load == 100)
    }
}

impl Availability {
    fn counted(&self) -> usize {
        self.hosts - self.excluded
    }

    /// 0 to 100.
    fn health(&self, usable: usize, overprovisioning_factor: u32) -> u64 {
        let raw = u64::from(overprovisioning_factor) * usable as u64;
        raw.checked_div(self.counted() as u64).unwrap_or(0).min(100)
    }

    fn usable_percent(&self) -> f64 {
        match self.counted() {
            0 => 0.0,
            counted => 100.0 * (self.healthy + self.degraded) as f64 / counted as f64,
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    /// Priorities of 100 hosts each.
    fn percent(healthy: &[usize], degraded: &[usize]) -> Vec<Availability> {
        healthy
            .iter()
            .zip(degraded.iter().chain(std::iter::repeat(&0)))
            .map(|(healthy, degraded)| Availability {
                hosts: 100,
                excluded: 0,
                healthy: *healthy,
                degraded: *degraded,
            })
            .collect()
    }

    /// The tables of Envoy's documentation of priority levels.
    #[test]
    fn load_spills_over_as_health_falls() {
        for (health, load) in [
            (vec![100, 100], vec![100, 0]),
            (vec![72, 100], vec![100, 0]),
            (vec![71, 100], vec![99, 1]),
            (vec![50, 100], vec![70, 30]),
            (vec![25, 100], vec![35, 65]),
            (vec![0, 100], vec![0, 100]),
            (vec![72, 72, 100], vec![100, 0, 0]),
            (vec![71, 71, 100], vec![99, 1, 0]),
            (vec![50, 50, 100], vec![70, 30, 0]),
            (vec![25, 100, 100], vec![35, 65, 0]),
            (vec![25, 25, 100], vec![35, 35, 30]),
            (vec![25, 25, 20], vec![37, 35, 28]),
        ] {
            let loads = Loads::new(&percent(&health, &[]), 140, 0.0);
            assert_eq!(loads.healthy, load, "health {health:?}");
            assert!(loads.panic.iter().all(|panic| !panic));
        }
    }

    #[test]
    fn degraded_hosts_take_what_healthy_ones_leave() {
        for (healthy, degraded, to_healthy, to_degraded) in [
            ([0, 0], [100, 0], [0, 0], [100, 0]),
            ([50, 0], [50, 0], [70, 0], [30, 0]),
            ([5, 50], [20, 50], [7, 70], [23, 0]),
            ([0, 100], [100, 0], [0, 100], [0, 0]),
        ] {
            let loads = Loads::new(&percent(&healthy, &degraded), 140, 50.0);
            assert_eq!((&*loads.healthy, &*loads.degraded), (&to_healthy[..], &to_degraded[..]));
        }
    }

    /// The tables of Envoy's documentation of the panic threshold (50 %).
    #[test]
    fn panic_needs_too_little_health_overall() {
        for (health, load, panic) in [
            (vec![72, 72], vec![100, 0], vec![false, false]),
            (vec![71, 71], vec![99, 1], vec![false, false]),
            (vec![50, 60], vec![70, 30], vec![false, false]),
            (vec![25, 100], vec![35, 65], vec![false, false]),
            // Everything panics: by number of hosts.
            (vec![25, 25], vec![50, 50], vec![true, true]),
            // The share that rounding leaves over goes to the first.
            (vec![5, 65], vec![8, 92], vec![true, false]),
        ] {
            let loads = Loads::new(&percent(&health, &[]), 140, 50.0);
            assert_eq!((loads.healthy, loads.panic), (load, panic), "health {health:?}");
        }
    }

    #[test]
    fn without_any_host_and_without_panic() {
        let none = Availability::default();
        let loads = Loads::new(&[none], 140, 50.0);
        assert_eq!((loads.healthy, loads.panic), (vec![100], vec![true]));
        let loads = Loads::new(&percent(&[0, 0], &[]), 140, 0.0);
        assert_eq!((loads.healthy, loads.panic), (vec![100, 0], vec![false, false]));
    }

    #[test]
    fn excluded_hosts_do_not_count_in_shares() {
        let half = Availability { hosts: 10, excluded: 5, healthy: 5, degraded: 0 };
        let next = Availability { hosts: 1, healthy: 1, ..Availability::default() };
        assert_eq!(Loads::new(&[half, next], 140, 50.0).healthy, [100, 0]);
    }

    fn any_availability() -> impl Strategy<Value = Availability> {
        (0..20usize, 0..20usize, 0..20usize, 0..5usize).prop_map(|(healthy, degraded, rest, excluded)| {
            Availability { hosts: healthy + degraded + rest, excluded: excluded.min(rest), healthy, degraded }
        })
    }

    proptest! {
        #[test]
        fn load_is_always_one_hundred_and_goes_to_hosts(
            priorities in prop::collection::vec(any_availability(), 1..6),
            factor in 100..300u32,
            threshold in 0..=100u32,
        ) {
            let loads = Loads::new(&priorities, factor, f64::from(threshold));
            let sum: u32 = loads.healthy.iter().chain(&loads.degraded).map(|load| u32::from(*load)).sum();
            prop_assert_eq!(sum, 100);
            let any_host = priorities.iter().any(|p| p.healthy + p.degraded > 0);
            for (at, priority) in priorities.iter().enumerate().filter(|_| any_host) {
                if loads.healthy[at] > 0 && !loads.panic[at] {
                    prop_assert!(priority.healthy > 0, "load without a healthy host: {:?}", loads);
                }
                if loads.degraded[at] > 0 && !loads.panic[at] {
                    prop_assert!(priority.degraded > 0, "load without a degraded host: {:?}", loads);
                }
            }
            let mut drawn = vec![0u8; priorities.len() * 2];
            for roll in 0..100 {
                let (priority, degraded) = loads.choose(roll);
                drawn[priority * 2 + usize::from(degraded)] += 1;
            }
            for at in 0..priorities.len() {
                prop_assert_eq!((drawn[at * 2], drawn[at * 2 + 1]), (loads.healthy[at], loads.degraded[at]));
            }
        }
    }
}
