/// Record of the events ring buffer: something connected from a namespace that has no [`crate::Enrolment`], or from one whose
/// enrolment seems to be out of date: its capture listener was reached without an original destination.
///
/// A hint to look at once, not a fact to act on: the process may have gone, or may have entered another namespace
/// since it made the socket. The agent compares the cookie before it enrols.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NotEnrolled {
    /// Network namespace of the socket.
    pub netns_cookie: u64,
    /// cgroup v2 id of the process (inode number of its directory); 0 if the namespace is enrolled.
    pub cgroup_id: u64,
    /// Process id in the initial pid namespace; 0 likewise.
    pub tgid: u32,
    /// Zero.
    pub reserved: u32,
}

const _: () = assert!(size_of::<NotEnrolled>() == 24 && align_of::<NotEnrolled>() == 8);
