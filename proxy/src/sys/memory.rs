//! Memory of the allocator.

/// Gives free memory of the allocator back to the kernel. It walks all of it (some milliseconds per 100 MB): for
/// moments after much was freed, not for every day. Nothing where the C library is not glibc.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and touches free memory only; any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;

    fn resident_pages() -> u64 {
        let statm = std::fs::read_to_string("/proc/self/statm").unwrap();
        statm.split(' ').nth(1).unwrap().parse().unwrap()
    }

    #[test]
    fn freed_memory_goes_back_to_the_kernel() {
        // Small pieces, since big ones are mapped one by one; the last one keeps the end of the heap in use.
        let mut pieces: Vec<_> = (0..40_000_u32).map(|number| vec![number as u8; 1000]).collect();
        let last = pieces.pop();
        drop(pieces);
        let before = resident_pages();
        trim();
        let after = resident_pages();
        drop(last);
        assert!(after + 5_000 < before, "resident pages: {before} before, {after} after");
    }
}
