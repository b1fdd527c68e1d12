//! Memory of the allocator, and of the program itself.

use std::ops::Range;
use std::path::Path;

/// Gives free memory of the allocator back to the kernel. It walks all of it (some milliseconds per 100 MB): for
/// moments after much was freed, not for every day. Nothing where the C library is not glibc.
pub fn trim() {
    #[cfg(target_env = "gnu")]
    // SAFETY: it takes the allocator's own locks and touches free memory only; any thread may call it at any time.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// Has the kernel forget which pages of the program are mapped: most were needed for the start only. Those that are
/// needed again come back from the page cache, 64 KiB at a time. Without /proc nothing happens.
pub fn release_program() {
    let (Ok(program), Ok(smaps)) =
        (std::fs::read_link("/proc/self/exe"), std::fs::read_to_string("/proc/self/smaps"))
    else {
        return;
    };
    for mapping in untouched(&smaps, &program) {
        // SAFETY: a private mapping of a file without one page of our own (`untouched`), which nobody can write to
        // now: what is read there after this is what was read before. A running program's file can't be changed.
        unsafe { libc::madvise(mapping.start as *mut _, mapping.len(), libc::MADV_DONTNEED) };
    }
}

/// The parts of a file that are mapped for reading only and were never written to: code and constants, without what
/// was relocated.
fn untouched(smaps: &str, file: &Path) -> Vec<Range<usize>> {
    let mut found = Vec::new();
    let mut mapping = None;
    for line in smaps.lines() {
        if let Some(anonymous) = line.strip_prefix("Anonymous:") {
            found.extend(mapping.take().filter(|_| anonymous.trim() == "0 kB"));
        } else if line
            .as_bytes()
            .first()
            .is_some_and(|byte| byte.is_ascii_digit() || byte.is_ascii_lowercase())
        {
            mapping = read_only(line, file);
        }
    }
    found
}

/// `55d2c4a00000-55d2c5000000 r-xp 00a00000 fe:00 1234   /usr/bin/tidegate`
fn read_only(line: &str, file: &Path) -> Option<Range<usize>> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let permissions = fields.next()?;
    let path = fields.nth(3)?;
    let number = |text| usize::from_str_radix(text, 16).ok();
    (matches!(permissions, "r-xp" | "r--p") && Path::new(path) == file)
        .then_some(number(start)?..number(end)?)
}

#[cfg(test)]
#[cfg(target_env = "gnu")]
mod tests {
    use super::*;

    #[test]
    fn what_was_never_written_to_is_found() {
        let smaps = "\
            1000-3000 r--p 00000000 fe:00 7   /usr/bin/it\n\
            Rss:                   8 kB\n\
            Anonymous:             0 kB\n\
            VmFlags: rd mr mw me\n\
            3000-4000 r-xp 00002000 fe:00 7   /usr/bin/it\n\
            Anonymous:             0 kB\n\
            4000-5000 r--p 00003000 fe:00 7   /usr/bin/it\n\
            Anonymous:             4 kB\n\
            5000-6000 rw-p 00004000 fe:00 7   /usr/bin/it\n\
            Anonymous:             0 kB\n\
            6000-7000 r-xp 00000000 fe:00 8   /usr/lib/other\n\
            Anonymous:             0 kB\n\
            ff000-ff100 r--p 00000000 00:00 0\n\
            Anonymous:             0 kB\n";
        assert_eq!(untouched(smaps, Path::new("/usr/bin/it")), [0x1000..0x3000, 0x3000..0x4000]);
    }

    #[test]
    fn the_program_goes_on_after_its_release() {
        let before = resident_pages();
        release_program();
        assert!(resident_pages() < before, "{} of {before} pages", resident_pages());
        assert_eq!(format!("{:?}", [1.5, 2.5]), "[1.5, 2.5]");
    }

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
