//! getpeername4 and getpeername6: the application sees the address that it connected to.

use aya_ebpf::programs::SockAddrContext;
use tidegate_common::Role;

use crate::{
    connect::{ALLOW, Family, rewrite},
    maps::{ORIGINAL_DST, flow, stored},
};

/// Answers from the socket's storage. A socket that was disconnected (AF_UNSPEC) never gets here: the kernel says
/// ENOTCONN first.
#[inline(always)]
pub fn on_getpeername(ctx: &SockAddrContext, family: Family) -> i32 {
    // SAFETY: the context is the kernel's, valid while the program runs.
    let sk = unsafe { (*ctx.sock_addr).__bindgen_anon_1.sk };
    if let Some(original) = stored(&ORIGINAL_DST, sk) {
        if original.role == Role::Client as u16 {
            rewrite(ctx, family, original.addr, original.port);
        }
    } else if let Some(flow) = flow(sk) {
        rewrite(ctx, family, flow.addr, flow.port);
    }
    ALLOW
}
