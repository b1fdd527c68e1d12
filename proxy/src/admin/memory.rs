//! What the process occupies, from `/proc/self/status`.

use serde_json::{Value, json};

/// Bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    /// Anonymous memory in use: heap, stacks, rings.
    pub(super) allocated: u64,
    /// Data segment, reserved and not only used.
    pub(super) heap: u64,
    /// Resident.
    pub(super) physical: u64,
}

impl Memory {
    pub(super) fn read() -> Self {
        // /proc may be hidden; zeros then, as /memory has no way to say "unknown".
        std::fs::read_to_string("/proc/self/status").map(|status| Self::parse(&status)).unwrap_or_default()
    }

    fn parse(status: &str) -> Self {
        let field = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok().map(|kib| kib << 10)
        };
        Self {
            allocated: field("RssAnon:").unwrap_or(0),
            heap: field("VmData:").unwrap_or(0),
            physical: field("VmRSS:").unwrap_or(0),
        }
    }

    /// `/memory`. What only tcmalloc knows is 0.
    pub(super) fn json(self) -> Value {
        json!({
            "allocated": self.allocated.to_string(),
            "heap_size": self.heap.to_string(),
            "pageheap_unmapped": "0",
            "pageheap_free": "0",
            "total_thread_cache": "0",
            "total_physical_bytes": self.physical.to_string(),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_kibibytes() {
        let status = "Name:\tx\nVmData:\t     20 kB\nVmRSS:\t      8 kB\nRssAnon:\t       4 kB\n";
        assert_eq!(Memory::parse(status), Memory { allocated: 4096, heap: 20480, physical: 8192 });
        assert_eq!(Memory::parse(""), Memory::default());
    }

    #[test]
    fn this_process_occupies_something() {
        assert!(Memory::read().physical > 1 << 20);
    }
}
