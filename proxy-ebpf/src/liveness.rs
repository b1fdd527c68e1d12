//! Whether the agent that a connection would be sent to is alive.
//!
//! The programs are pinned: they outlive a process that is killed, while its sockets don't. So the kernel is asked for
//! the socket that the connection would arrive at. That needs no heartbeat, is right from the moment on in which the
//! listener closes, and a successor's listeners are found by the same question.

use aya_ebpf::{
    EbpfContext as _,
    bindings::{BPF_F_CURRENT_NETNS, bpf_sock, bpf_sock_tuple},
    helpers::generated::{bpf_sk_lookup_tcp, bpf_sk_release},
    programs::SockAddrContext,
};
use tidegate_common::{Addr, OwnSocket};

use crate::maps::{OWN_SOCKET, stored};

/// Sizes by which the kernel tells the two forms of a tuple apart.
const TUPLE_V4: u32 = 12;
const TUPLE_V6: u32 = 36;

/// Whether a capture listener waits for connections to this address of the socket's namespace. One that somebody else
/// opened on the same port has no mark.
#[inline(always)]
pub fn listener_waits(ctx: &SockAddrContext, addr: Addr, port: u16) -> bool {
    // From the address itself, port 0: no established connection has that, so the answer can only be a listener.
    // SAFETY: plain numbers; all zero is a value.
    let mut tuple: bpf_sock_tuple = unsafe { core::mem::zeroed() };
    let listener = if addr.is_v4() {
        tuple.__bindgen_anon_1.ipv4.saddr = addr.v4_be();
        tuple.__bindgen_anon_1.ipv4.daddr = addr.v4_be();
        tuple.__bindgen_anon_1.ipv4.dport = port.to_be();
        look_up(ctx, &mut tuple, TUPLE_V4)
    } else {
        tuple.__bindgen_anon_1.ipv6.saddr = addr.words();
        tuple.__bindgen_anon_1.ipv6.daddr = addr.words();
        tuple.__bindgen_anon_1.ipv6.dport = port.to_be();
        look_up(ctx, &mut tuple, TUPLE_V6)
    };
    if listener.is_null() {
        return false;
    }
    let ours =
        matches!(stored(&OWN_SOCKET, listener), Some(mark) if *mark == OwnSocket::CaptureListener as u32);
    // SAFETY: the lookup gave us a reference; the verifier checks that it is returned once, on every path.
    unsafe { bpf_sk_release(listener.cast()) };
    ours
}

#[inline(always)]
fn look_up(ctx: &SockAddrContext, tuple: &mut bpf_sock_tuple, size: u32) -> *mut bpf_sock {
    // SAFETY: the tuple is on the program's stack and no shorter than `size`; the verifier checks the context.
    unsafe { bpf_sk_lookup_tcp(ctx.as_ptr(), tuple, size, BPF_F_CURRENT_NETNS as u64, 0) }
}
