//! What is measured in one measurement: a workload, and where it runs. The only source of its name.

use std::fmt;

use super::site::{Placement, Topology};
use super::workload::Workload;

/// A workload as it is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Case {
    pub(super) topology: Topology,
    pub(super) workload: Workload,
    pub(super) placement: Placement,
}

impl Case {
    /// In one network namespace, on any CPU.
    pub(super) const fn loopback(workload: Workload) -> Self {
        Self { topology: Topology::Loopback, workload, placement: Placement::Free }
    }

    /// Over veth, on any CPU.
    pub(super) const fn veth(workload: Workload) -> Self {
        Self { topology: Topology::Veth, workload, placement: Placement::Free }
    }

    /// The same on one CPU.
    pub(super) const fn one_cpu(self) -> Self {
        Self { placement: Placement::OneCpu, ..self }
    }

    /// Each of these workloads there.
    pub(super) const fn each<const N: usize>(
        topology: Topology,
        placement: Placement,
        workloads: [Workload; N],
    ) -> [Self; N] {
        let mut cases = [Self { topology, workload: Workload::Idle, placement }; N];
        let mut number = 0;
        while number < N {
            cases[number].workload = workloads[number];
            number += 1;
        }
        cases
    }
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(&format!("{}/{}{}", self.topology, self.workload, self.placement.suffix()))
    }
}

#[cfg(test)]
mod tests {
    use tidegate_tests::load::Direction;

    use super::*;

    #[test]
    fn a_name_has_all_three() {
        let bulk = Workload::Bulk { streams: 8, direction: Direction::Up };
        assert_eq!(Case::loopback(bulk).one_cpu().to_string(), "loopback/bulk-8-up@one-cpu");
        assert_eq!(Case::veth(Workload::Short).to_string(), "veth/short");
        let pinned = Case::each(Topology::Veth, Placement::Pinned, [Workload::Idle, bulk]);
        assert_eq!(pinned.map(|case| case.to_string()), ["veth/idle@pinned", "veth/bulk-8-up@pinned"]);
    }
}
