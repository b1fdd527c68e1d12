//! For tests: makes a system call fail on the calling thread, as a container's seccomp profile or an older
//! kernel would.

use std::os::fd::RawFd;

/// From now on, system call `number` fails with `errno` on this thread and those that it starts; with `third`,
/// only when that descriptor is its third argument.
pub(crate) fn forbid(number: libc::c_long, errno: i32, third: Option<RawFd>) {
    let load = |offset| libc::sock_filter { code: 0x20, jt: 0, jf: 0, k: offset };
    let equal = |k, jf| libc::sock_filter { code: 0x15, jt: 0, jf, k };
    let answer = |k| libc::sock_filter { code: 0x06, jt: 0, jf: 0, k };
    let mut filter = vec![load(0), equal(number as u32, if third.is_some() { 3 } else { 1 })];
    if let Some(fd) = third {
        // The low half of args[2] of struct seccomp_data (little-endian).
        filter.extend([load(16 + 2 * 8), equal(fd as u32, 1)]);
    }
    filter.extend([answer(libc::SECCOMP_RET_ERRNO | errno as u32), answer(libc::SECCOMP_RET_ALLOW)]);
    let program = libc::sock_fprog { len: filter.len() as u16, filter: filter.as_mut_ptr() };
    // SAFETY: plain integers; the second call reads `program` and the filter it points to, both live here.
    unsafe {
        assert_eq!(libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), 0);
        assert_eq!(libc::prctl(libc::PR_SET_SECCOMP, libc::SECCOMP_MODE_FILTER, &raw const program), 0);
    }
}
