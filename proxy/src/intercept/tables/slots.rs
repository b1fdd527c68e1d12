//! The slots where the programs keep records of connections. Read only.

use std::io;
use std::mem::offset_of;
use std::os::fd::BorrowedFd;
use std::sync::atomic::Ordering::Acquire;

use tidegate_common::{FLOW_SLOTS, Flow, FlowSlot};

use crate::intercept::bpf::{self, Mapped};

/// Of one slot.
pub(super) const WORDS: usize = size_of::<FlowSlot>() / 8;
const OWNER: usize = offset_of!(FlowSlot, owner) / 8;
const FLOW: usize = offset_of!(FlowSlot, flow) / 8;

#[derive(Debug)]
pub(super) struct Slots {
    memory: Mapped,
    entries: usize,
}

impl Slots {
    pub(super) fn new(map: BorrowedFd<'_>, entries: u32) -> io::Result<Self> {
        let entries = entries as usize;
        Ok(Self { memory: Mapped::new(map, entries * WORDS)?, entries })
    }

    /// The record of the socket with this cookie, if it has a slot. A connection that ends meanwhile has none.
    pub(super) fn flow(&self, cookie: u64) -> Option<Flow> {
        let at = (cookie % u64::from(FLOW_SLOTS)) as usize;
        if self.owner(at)? != cookie {
            return None;
        }
        let first = at * WORDS + FLOW;
        let mut bytes = Vec::with_capacity(size_of::<Flow>());
        for at in first..first + size_of::<Flow>() / 8 {
            bytes.extend(self.memory.word(at)?.load(Acquire).to_ne_bytes());
        }
        // Else some of it may be the next owner's.
        (self.owner(at)? == cookie).then(|| bpf::read(&bytes)).flatten()
    }

    /// How many are somebody's.
    pub(super) fn in_use(&self) -> usize {
        (0..self.entries).filter(|at| self.owner(*at).is_some_and(|owner| owner != 0)).count()
    }

    /// Cookie of the socket whose it is.
    fn owner(&self, at: usize) -> Option<u64> {
        self.memory.word(at * WORDS + OWNER).map(|owner| owner.load(Acquire) & !FlowSlot::RELEASED)
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd as _;
    use std::os::unix::fs::FileExt as _;

    use super::*;

    #[test]
    fn a_record_is_found_by_its_owner_s_cookie_only() {
        let file = tempfile::tempfile().unwrap();
        file.set_len(3 * WORDS as u64 * 8).unwrap();
        let write = |at: u64, word: u64| file.write_all_at(&word.to_ne_bytes(), at * 8).unwrap();
        let slots = Slots::new(file.as_fd(), 3).unwrap();
        let cookie = u64::from(FLOW_SLOTS) * 7 + 2;
        assert_eq!((slots.flow(cookie), slots.in_use()), (None, 0));
        let owner = 2 * WORDS as u64;
        for state in [0, FlowSlot::RELEASED] {
            write(owner, cookie | state);
            // Service and cluster.
            write(owner + (FLOW + offset_of!(Flow, service) / 8) as u64, 5 | 6 << 32);
            let flow = slots.flow(cookie).unwrap();
            assert_eq!((flow.service, flow.cluster, flow.host), (5, 6, 0));
            assert_eq!(slots.in_use(), 1);
        }
        let modulo = u64::from(FLOW_SLOTS);
        for other in [cookie - modulo, cookie + modulo, cookie + 1, cookie - 1, 2] {
            assert_eq!(slots.flow(other), None, "{other}");
        }
    }
}
