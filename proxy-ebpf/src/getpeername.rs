//! getpeername4 and getpeername6: the application sees the address that it connected to.

use core::ptr::addr_of;

use aya_ebpf::{EbpfContext as _, programs::SockAddrContext};
use tidegate_common::Role;

use crate::{
    connect::{ALLOW, Family, IPPROTO_TCP, rewrite},
    maps::{ORIGINAL_DST, stored},
    record,
};

/// Answers from the socket's storage. A socket that was disconnected (AF_UNSPEC) never gets here: the kernel says
/// ENOTCONN first.
#[inline(always)]
pub fn on_getpeername(ctx: &SockAddrContext, family: Family) -> i32 {
    // SAFETY: the context is the kernel's, valid while the program runs. Volatile: the verifier wants one load of the field's own size.
    let (sk, protocol) = unsafe {
        let a = ctx.sock_addr;
        ((*a).__bindgen_anon_1.sk, addr_of!((*a).protocol).read_volatile())
    };
    // Sockets of the whole node come here.
    if protocol != IPPROTO_TCP {
        return ALLOW;
    }
    if let Some(original) = stored(&ORIGINAL_DST, sk) {
        if original.role == Role::Client as u16 {
            rewrite(ctx, family, original.addr, original.port);
        }
    } else if let Some(record) = record::find(ctx.as_ptr(), sk) {
        let (addr, port) = (record.flow.addr, record.flow.port);
        // Older kernels do not lock the socket here: its connection may end meanwhile.
        if record.is_still_there() {
            rewrite(ctx, family, addr, port);
        }
    }
    ALLOW
}
