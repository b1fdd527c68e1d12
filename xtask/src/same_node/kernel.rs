//! System calls for which there is no safe wrapper among the dependencies. Everything `unsafe` of this command is here.

use std::ffi::c_int;
use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::ptr;
use std::time::Duration;

use io_uring::{IoUring, cqueue, opcode, squeue, types};

/// One eBPF instruction.
#[derive(Clone, Copy, Debug)]
#[repr(transparent)]
pub(super) struct Insn(u64);

impl Insn {
    pub(super) fn new(code: u8, to: u8, from: u8, offset: i16, value: i32) -> Self {
        let bytes = [code, to | from << 4].into_iter().chain(offset.to_ne_bytes()).chain(value.to_ne_bytes());
        let mut word = [0; 8];
        word.iter_mut().zip(bytes).for_each(|(to, from)| *to = from);
        Self(u64::from_ne_bytes(word))
    }
}

#[cfg(test)]
impl Insn {
    fn code(self) -> u8 {
        self.0.to_ne_bytes()[0]
    }

    fn offset(self) -> i16 {
        let bytes = self.0.to_ne_bytes();
        i16::from_ne_bytes([bytes[2], bytes[3]])
    }

    /// Whether it is the first half of the address of a map.
    pub(super) fn is_map(self) -> bool {
        self.code() == 0x18
    }

    /// How many instructions a jump leaves out.
    pub(super) fn skips(self) -> Option<usize> {
        matches!(self.code(), 0x15 | 0x55).then(|| usize::try_from(self.offset()).expect("jumps go forward"))
    }

    /// Where it reads four bytes.
    pub(super) fn loads(self) -> Option<i16> {
        (self.code() == 0x61).then(|| self.offset())
    }

    /// Where on the stack it writes four bytes.
    pub(super) fn stores(self) -> Option<i16> {
        (self.code() == 0x63).then(|| self.offset())
    }
}

/// What a program is loaded as, and where it is attached.
#[derive(Clone, Copy, Debug)]
pub(super) enum Kind {
    SockOps,
    SkMsg,
}

impl Kind {
    fn program(self) -> u32 {
        match self {
            Self::SockOps => 13,
            Self::SkMsg => 16,
        }
    }

    fn attach(self) -> u32 {
        match self {
            Self::SockOps => 3,
            Self::SkMsg => 7,
        }
    }
}

/// The start of `union bpf_attr`, as far as the calls here use it: 32-bit words, and pointers at multiples of eight.
type Attr = [u64; 15];

/// Two 32-bit fields beside each other.
fn words(first: u32, second: u32) -> u64 {
    let mut bytes = [0; 8];
    bytes[..4].copy_from_slice(&first.to_ne_bytes());
    bytes[4..].copy_from_slice(&second.to_ne_bytes());
    u64::from_ne_bytes(bytes)
}

const MAP_CREATE: c_int = 0;
const MAP_LOOKUP_ELEM: c_int = 1;
const MAP_DELETE_ELEM: c_int = 3;
const PROG_LOAD: c_int = 5;
const PROG_ATTACH: c_int = 8;
const PROG_DETACH: c_int = 9;
const LINK_CREATE: c_int = 28;

/// # Safety
/// What `attr` points to must be as long as the command expects, and be there until it returns.
unsafe fn bpf(command: c_int, attr: &mut Attr) -> io::Result<c_int> {
    // SAFETY: `attr` is valid for its length; the rest is the caller's promise.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_mut_ptr(), size_of::<Attr>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result as c_int) }
}

/// # Safety
/// As [`bpf`], and the command must be one that returns a new descriptor.
unsafe fn bpf_fd(command: c_int, attr: &mut Attr) -> io::Result<OwnedFd> {
    // SAFETY: the caller's promise; the descriptor is new, nobody else knows its number.
    unsafe { bpf(command, attr).map(|fd| OwnedFd::from_raw_fd(fd)) }
}

fn create_map(kind: u32, key: u32, value: u32, entries: u32) -> io::Result<OwnedFd> {
    let mut attr = Attr::default();
    attr[0] = words(kind, key);
    attr[1] = words(value, entries);
    // SAFETY: MAP_CREATE takes no pointers.
    unsafe { bpf_fd(MAP_CREATE, &mut attr) }
}

/// A SOCKHASH with keys of so many bytes.
pub(super) fn create_sockhash(key: u32, entries: u32) -> io::Result<OwnedFd> {
    create_map(18, key, 4, entries)
}

/// An array of 64-bit counters.
pub(super) fn create_counters(entries: u32) -> io::Result<OwnedFd> {
    create_map(2, 4, 8, entries)
}

/// Reads a counter.
pub(super) fn counter(map: &OwnedFd, index: u32) -> io::Result<u64> {
    let mut value = 0_u64;
    let mut attr = Attr::default();
    attr[0] = words(map.as_raw_fd() as u32, 0);
    attr[1] = &raw const index as u64;
    attr[2] = &raw mut value as u64;
    // SAFETY: keys of `create_counters` have four bytes, values eight; both outlive the call.
    unsafe { bpf(MAP_LOOKUP_ELEM, &mut attr)? };
    Ok(value)
}

/// Deletes an entry of a map whose keys have this length.
pub(super) fn delete<const KEY: usize>(map: &OwnedFd, key: &[u8; KEY]) -> io::Result<()> {
    let mut attr = Attr::default();
    attr[0] = words(map.as_raw_fd() as u32, 0);
    attr[1] = key.as_ptr() as u64;
    // SAFETY: the caller's map has keys of this length; the key outlives the call.
    unsafe { bpf(MAP_DELETE_ELEM, &mut attr) }.map(drop)
}

/// Loads a program.
pub(super) fn load(kind: Kind, code: &[Insn]) -> io::Result<OwnedFd> {
    let license = c"Apache-2.0";
    let mut log = vec![0_u8; 64 << 10];
    let mut attr = Attr::default();
    attr[0] = words(kind.program(), code.len() as u32);
    attr[1] = code.as_ptr() as u64;
    attr[2] = license.as_ptr() as u64;
    attr[3] = words(1, log.len() as u32);
    attr[4] = log.as_mut_ptr() as u64;
    attr[8] = words(0, kind.attach());
    // SAFETY: the code has as many instructions as `attr` says, the log as many bytes; all of it outlives the call.
    unsafe { bpf_fd(PROG_LOAD, &mut attr) }.map_err(|error| {
        let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
        io::Error::other(format!("load {kind:?}: {error}\n{}", String::from_utf8_lossy(&log[..end])))
    })
}

/// Attaches `sockops` to a cgroup until the link is closed.
pub(super) fn link(program: &OwnedFd, cgroup: &OwnedFd) -> io::Result<OwnedFd> {
    let mut attr = Attr::default();
    attr[0] = words(program.as_raw_fd() as u32, cgroup.as_raw_fd() as u32);
    attr[1] = words(Kind::SockOps.attach(), 0);
    // SAFETY: LINK_CREATE takes no pointers here.
    unsafe { bpf_fd(LINK_CREATE, &mut attr) }
}

/// Attaches `sk_msg` to a map, in place of what was attached.
pub(super) fn attach(program: &OwnedFd, map: &OwnedFd) -> io::Result<()> {
    let mut attr = Attr::default();
    attr[0] = words(map.as_raw_fd() as u32, program.as_raw_fd() as u32);
    attr[1] = words(Kind::SkMsg.attach(), 0);
    // SAFETY: PROG_ATTACH takes no pointers.
    unsafe { bpf(PROG_ATTACH, &mut attr) }.map(drop)
}

/// Takes `sk_msg` away from a map.
pub(super) fn detach(program: &OwnedFd, map: &OwnedFd) -> io::Result<()> {
    let mut attr = Attr::default();
    attr[0] = words(map.as_raw_fd() as u32, program.as_raw_fd() as u32);
    attr[1] = words(Kind::SkMsg.attach(), 0);
    // SAFETY: PROG_DETACH takes no pointers.
    unsafe { bpf(PROG_DETACH, &mut attr) }.map(drop)
}

/// Whether the next byte is the one after urgent data.
pub(super) const SIOCATMARK: libc::Ioctl = 0x8905;
/// Bytes that were sent and not yet acknowledged.
pub(super) const SIOCOUTQ: libc::Ioctl = libc::TIOCOUTQ;

/// An ioctl that writes one `int`: FIONREAD, SIOCOUTQ, SIOCATMARK.
pub(super) fn query(socket: &impl AsRawFd, request: libc::Ioctl) -> io::Result<c_int> {
    let mut value: c_int = 0;
    // SAFETY: the requests that are made here write one int.
    if unsafe { libc::ioctl(socket.as_raw_fd(), request, &raw mut value) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(value)
}

/// TCP_INFO; fields that the kernel doesn't know are 0.
pub(super) fn tcp_info(socket: &impl AsRawFd) -> io::Result<libc::tcp_info> {
    // SAFETY: integers only.
    let mut info: libc::tcp_info = unsafe { zeroed() };
    let mut length = size_of::<libc::tcp_info>() as libc::socklen_t;
    // SAFETY: the kernel writes at most `length` bytes.
    let result = unsafe {
        libc::getsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_TCP,
            libc::TCP_INFO,
            (&raw mut info).cast(),
            &raw mut length,
        )
    };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(info) }
}

/// splice(2) without offsets; does not block on either end.
pub(super) fn splice(from: &impl AsRawFd, to: &impl AsRawFd, length: usize) -> io::Result<usize> {
    let flags = libc::SPLICE_F_NONBLOCK | libc::SPLICE_F_MOVE;
    // SAFETY: null offsets are what pipes and sockets take.
    let result = unsafe {
        libc::splice(from.as_raw_fd(), ptr::null_mut(), to.as_raw_fd(), ptr::null_mut(), length, flags)
    };
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

/// recvmmsg(2) with buffers of these sizes: how many bytes each got.
pub(super) fn recvmmsg(socket: &impl AsRawFd, sizes: &[usize], flags: c_int) -> io::Result<Vec<u32>> {
    let mut buffers: Vec<Vec<u8>> = sizes.iter().map(|&size| vec![0; size]).collect();
    let mut slices: Vec<libc::iovec> = buffers
        .iter_mut()
        .map(|buffer| libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() })
        .collect();
    let mut messages: Vec<libc::mmsghdr> = slices
        .iter_mut()
        .map(|slice| {
            // SAFETY: null pointers and integers.
            let mut message: libc::mmsghdr = unsafe { zeroed() };
            message.msg_hdr.msg_iov = slice;
            message.msg_hdr.msg_iovlen = 1;
            message
        })
        .collect();
    // SAFETY: as many messages as are there, each with one slice of a buffer that outlives the call.
    let count = unsafe {
        libc::recvmmsg(
            socket.as_raw_fd(),
            messages.as_mut_ptr(),
            messages.len() as u32,
            flags as _,
            ptr::null_mut(),
        )
    };
    let count = usize::try_from(count).map_err(|_| io::Error::last_os_error())?;
    Ok(messages[..count].iter().map(|message| message.msg_len).collect())
}

/// A ring for receives: one buffer, or a few that the kernel chooses from.
pub(super) struct Receiver {
    ring: IoUring,
    buffers: Vec<u8>,
    size: usize,
}

impl Receiver {
    /// So many buffers of so many bytes.
    pub(super) fn new(count: u16, size: usize) -> io::Result<Self> {
        let mut receiver =
            Self { ring: IoUring::new(64)?, buffers: vec![0; usize::from(count) * size], size };
        let entry = opcode::ProvideBuffers::new(receiver.buffers.as_mut_ptr(), size as i32, count, 0, 0)
            .build()
            .user_data(0);
        receiver.submit(&entry, 1)?;
        let outcome = receiver.next().map_or(-libc::EIO, |entry| entry.result());
        if outcome < 0 { Err(io::Error::from_raw_os_error(-outcome)) } else { Ok(receiver) }
    }

    /// Starts a receive that gives one completion for each piece of data; waits for one at least.
    pub(super) fn start_multishot(&mut self, socket: RawFd) -> io::Result<()> {
        let entry = opcode::RecvMulti::new(types::Fd(socket), 0).build().user_data(1);
        self.submit(&entry, 0)
    }

    /// Starts a receive into a buffer that the kernel chooses.
    pub(super) fn start(&mut self, socket: RawFd) -> io::Result<()> {
        let entry = opcode::Recv::new(types::Fd(socket), ptr::null_mut(), self.size as u32)
            .buf_group(0)
            .build()
            .flags(squeue::Flags::BUFFER_SELECT)
            .user_data(1);
        self.submit(&entry, 0)
    }

    /// The next completion, if there is one within the time: its data, or what went wrong.
    pub(super) fn wait(&mut self, within: Duration) -> Option<io::Result<Vec<u8>>> {
        let timeout = types::Timespec::new().nsec(within.subsec_nanos()).sec(within.as_secs());
        let args = types::SubmitArgs::new().timespec(&timeout);
        let _ = self.ring.submitter().submit_with_args(1, &args);
        let entry = self.next()?;
        let Ok(length) = usize::try_from(entry.result()) else {
            return Some(Err(io::Error::from_raw_os_error(-entry.result())));
        };
        let buffer = cqueue::buffer_select(entry.flags()).map_or(0, usize::from);
        let start = buffer * self.size;
        Some(Ok(self.buffers[start..start + length].to_vec()))
    }

    fn next(&mut self) -> Option<cqueue::Entry> {
        self.ring.completion().next()
    }

    fn submit(&mut self, entry: &squeue::Entry, wait: usize) -> io::Result<()> {
        // SAFETY: `buffers` lives as long as the ring, which is dropped first; its memory doesn't move.
        unsafe { self.ring.submission().push(entry) }.map_err(io::Error::other)?;
        self.ring.submit_and_wait(wait).map(drop)
    }
}

/// Sets an option that is an int.
pub(super) fn set_option(socket: &impl AsRawFd, level: c_int, option: c_int, value: c_int) -> io::Result<()> {
    let length = size_of::<c_int>() as libc::socklen_t;
    // SAFETY: `value` has the length that is passed.
    let result =
        unsafe { libc::setsockopt(socket.as_raw_fd(), level, option, (&raw const value).cast(), length) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// poll(2) of one socket: the events that are there.
pub(super) fn poll(socket: &impl AsRawFd, events: i16, within: Duration) -> io::Result<i16> {
    let mut fd = libc::pollfd { fd: socket.as_raw_fd(), events, revents: 0 };
    let milliseconds = c_int::try_from(within.as_millis()).unwrap_or(c_int::MAX);
    // SAFETY: one structure, as the count says.
    if unsafe { libc::poll(&raw mut fd, 1, milliseconds) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(fd.revents)
}
