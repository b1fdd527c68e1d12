//! The few commands of bpf(2) that aya doesn't offer: link queries and updates by path, a map lookup without a lock or an
//! allocation for the workers, and maps in this process's memory.

use std::ffi::CString;
use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd, RawFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;
use std::ptr::NonNull;
use std::sync::atomic::AtomicU64;

use aya::Pod;

const BPF_MAP_LOOKUP_ELEM: libc::c_long = 1;
const BPF_MAP_UPDATE_ELEM: libc::c_long = 2;
const BPF_OBJ_GET: libc::c_long = 7;
const BPF_OBJ_GET_INFO_BY_FD: libc::c_long = 15;
const BPF_MAP_LOOKUP_BATCH: libc::c_long = 24;
const BPF_LINK_UPDATE: libc::c_long = 29;
const BPF_LINK_DETACH: libc::c_long = 34;

const BPF_LINK_TYPE_CGROUP: u32 = 3;

/// `bpf_attr` of the map element commands.
#[repr(C)]
struct MapElem {
    map_fd: u32,
    pad: u32,
    key: u64,
    value: u64,
    flags: u64,
}

/// `bpf_attr` of the batch commands.
#[repr(C)]
struct MapBatch {
    in_batch: u64,
    out_batch: u64,
    keys: u64,
    values: u64,
    count: u32,
    map_fd: u32,
    elem_flags: u64,
    flags: u64,
}

/// `bpf_attr` of BPF_OBJ_GET.
#[repr(C)]
struct ObjGet {
    pathname: u64,
    bpf_fd: u32,
    file_flags: u32,
}

/// `bpf_attr` of BPF_OBJ_GET_INFO_BY_FD.
#[repr(C)]
struct ObjInfo {
    bpf_fd: u32,
    info_len: u32,
    info: u64,
}

/// `bpf_attr` of BPF_LINK_UPDATE.
#[repr(C)]
struct LinkUpdate {
    link_fd: u32,
    new_prog_fd: u32,
    flags: u32,
    old_prog_fd: u32,
}

/// `bpf_attr` of BPF_LINK_DETACH.
#[repr(C)]
struct LinkDetach {
    link_fd: u32,
}

/// The kernel's `bpf_link_info` with its cgroup variant, and room for the larger ones.
#[repr(C)]
#[derive(Clone, Copy)]
struct LinkInfoRaw {
    kind: u32,
    id: u32,
    prog_id: u32,
    pad: u32,
    cgroup_id: u64,
    attach_type: u32,
    rest: [u32; 9],
}

/// What a link is attached to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct CgroupLink {
    /// Id of the program that it runs.
    pub(super) program_id: u32,
    /// Id of its cgroup; 0 when that was removed, or the link was detached.
    pub(super) cgroup_id: u64,
}

/// # Safety
///
/// `attr` is the attribute of `command`, and the pointers in it are valid for what the command does with them.
unsafe fn bpf<T>(command: libc::c_long, attr: &mut T) -> io::Result<libc::c_long> {
    // SAFETY: the caller vouches for the attribute; the kernel reads and writes `size_of::<T>()` bytes of it.
    let result = unsafe { libc::syscall(libc::SYS_bpf, command, std::ptr::from_mut(attr), size_of::<T>()) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

fn raw(fd: BorrowedFd<'_>) -> u32 {
    fd.as_raw_fd() as u32
}

/// Opens a pinned object.
pub(super) fn open_pinned(path: &Path) -> io::Result<OwnedFd> {
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut attr = ObjGet { pathname: path.as_ptr() as u64, bpf_fd: 0, file_flags: 0 };
    // SAFETY: `path` is a C string that outlives the call.
    let fd = unsafe { bpf(BPF_OBJ_GET, &mut attr)? };
    // SAFETY: the kernel just gave us this descriptor (close-on-exec), nobody else has it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as RawFd) })
}

/// Asks what a link is attached to.
pub(super) fn link_info(link: BorrowedFd<'_>) -> io::Result<CgroupLink> {
    let mut info = MaybeUninit::<LinkInfoRaw>::zeroed();
    let mut attr = ObjInfo {
        bpf_fd: raw(link),
        info_len: size_of::<LinkInfoRaw>() as u32,
        info: info.as_mut_ptr() as u64,
    };
    // SAFETY: `info` has room for `info_len` bytes.
    unsafe { bpf(BPF_OBJ_GET_INFO_BY_FD, &mut attr)? };
    // SAFETY: zeroed, integers only; the kernel filled a prefix.
    let info = unsafe { info.assume_init() };
    if info.kind != BPF_LINK_TYPE_CGROUP {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "not a cgroup link"));
    }
    Ok(CgroupLink { program_id: info.prog_id, cgroup_id: info.cgroup_id })
}

/// Replaces the program of a link: from one connect to the next, with no moment in between without a program.
pub(super) fn link_update(link: BorrowedFd<'_>, program: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkUpdate { link_fd: raw(link), new_prog_fd: raw(program), flags: 0, old_prog_fd: 0 };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_UPDATE, &mut attr) }.map(drop)
}

/// Detaches a link at once, whoever still holds it.
pub(super) fn link_detach(link: BorrowedFd<'_>) -> io::Result<()> {
    let mut attr = LinkDetach { link_fd: raw(link) };
    // SAFETY: no pointers.
    unsafe { bpf(BPF_LINK_DETACH, &mut attr) }.map(drop)
}

/// Reads what a socket has in an SK_STORAGE map; none when it has nothing.
///
/// The caller must name the map's value type: `V` is what the kernel writes.
pub(super) fn storage_get<V: Pod>(map: BorrowedFd<'_>, socket: BorrowedFd<'_>) -> io::Result<Option<V>> {
    let key = socket.as_raw_fd();
    let mut value = MaybeUninit::<V>::zeroed();
    let mut attr = MapElem {
        map_fd: raw(map),
        pad: 0,
        key: (&raw const key) as u64,
        value: value.as_mut_ptr() as u64,
        flags: 0,
    };
    // SAFETY: the key of an SK_STORAGE map is an `int`; the maps that callers pass were created (or checked when
    // they were reused) with `size_of::<V>()` bytes of value.
    match unsafe { bpf(BPF_MAP_LOOKUP_ELEM, &mut attr) } {
        // SAFETY: `V: Pod`, any bytes are a value.
        Ok(_) => Ok(Some(unsafe { value.assume_init() })),
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => Ok(None),
        Err(error) => Err(error),
    }
}

/// Writes what a socket has in an SK_STORAGE map.
pub(super) fn storage_set<V: Pod>(map: BorrowedFd<'_>, socket: BorrowedFd<'_>, value: &V) -> io::Result<()> {
    let key = socket.as_raw_fd();
    let mut attr = MapElem {
        map_fd: raw(map),
        pad: 0,
        key: (&raw const key) as u64,
        value: std::ptr::from_ref(value) as u64,
        flags: 0,
    };
    // SAFETY: as in `storage_get`; the kernel only reads.
    unsafe { bpf(BPF_MAP_UPDATE_ELEM, &mut attr) }.map(drop)
}

/// The sums over all CPUs of the first `entries` words of a per-CPU array of words. One system call for all of them.
///
/// Errors: EINVAL for another kind of map; ENOMEM.
pub(super) fn per_cpu_sums(map: BorrowedFd<'_>, entries: usize) -> io::Result<Vec<u64>> {
    let cpus = aya::util::nr_cpus().map_err(|(_, error)| error)?;
    let (mut keys, mut values) = (vec![0_u32; entries], vec![0_u64; entries * cpus]);
    let mut last = 0_u32;
    let mut attr = MapBatch {
        in_batch: 0,
        out_batch: (&raw mut last) as u64,
        keys: keys.as_mut_ptr() as u64,
        values: values.as_mut_ptr() as u64,
        count: entries as u32,
        map_fd: raw(map),
        elem_flags: 0,
        flags: 0,
    };
    // SAFETY: callers pass per-CPU arrays of words, whose keys are `u32`. The kernel writes at most `count` keys, for each of
    // them a word for each possible CPU (which are those that `nr_cpus` counts), and one key to `out_batch`.
    match unsafe { bpf(BPF_MAP_LOOKUP_BATCH, &mut attr) } {
        // The array is shorter.
        Err(error) if error.raw_os_error() == Some(libc::ENOENT) => {}
        result => drop(result?),
    }
    Ok(values.chunks_exact(cpus).map(|cpus| cpus.iter().sum()).collect())
}

/// A value from the start of what the kernel wrote; none when that is shorter.
pub(super) fn read<V: Pod>(bytes: &[u8]) -> Option<V> {
    // SAFETY: there are enough bytes, and `V: Pod`: any bytes are a value. They need not be aligned.
    (bytes.len() >= size_of::<V>()).then(|| unsafe { std::ptr::read_unaligned(bytes.as_ptr().cast()) })
}

/// An array map that was made with BPF_F_MMAPABLE, in this process's memory: words that the programs read, and add to.
#[derive(Debug)]
pub(super) struct Mapped {
    base: NonNull<AtomicU64>,
    words: usize,
}

// SAFETY: the memory is reached through atomics only, and stays mapped until the value is dropped.
unsafe impl Send for Mapped {}
// SAFETY: as above.
unsafe impl Sync for Mapped {}

impl Mapped {
    /// Maps so many words of a map whose values are whole words.
    ///
    /// Errors: EINVAL or EPERM for another kind of map, or one that is shorter; ENOMEM.
    pub(super) fn new(map: BorrowedFd<'_>, words: usize) -> io::Result<Self> {
        // SAFETY: a new mapping at an address of the kernel's choice; it fails when the map is shorter.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                words * size_of::<u64>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                map.as_raw_fd(),
                0,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(io::Error::last_os_error());
        }
        let base = NonNull::new(base.cast()).ok_or(io::ErrorKind::OutOfMemory)?;
        Ok(Self { base, words })
    }

    /// The word at this index; none beyond the end.
    pub(super) fn word(&self, index: usize) -> Option<&AtomicU64> {
        // SAFETY: within the mapping, which is aligned to pages; the kernel and the programs access the words atomically.
        (index < self.words).then(|| unsafe { self.base.add(index).as_ref() })
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made; no reference into it outlives `self`.
        unsafe { libc::munmap(self.base.as_ptr().cast(), self.words * size_of::<u64>()) };
    }
}
