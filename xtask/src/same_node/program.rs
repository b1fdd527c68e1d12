//! The two eBPF programs, as instructions: small enough that they need no compiler, and so no eBPF toolchain.
//!
//! Sockets are kept under (local address, remote address, local port, remote port), addresses as the kernel stores them,
//! ports in host byte order: what one end calls local the other end calls remote.

use super::kernel::Insn;

/// Bytes of a key.
pub(super) const KEY: u32 = 16;

/// Which counter: messages that were handed to the other socket, and those that went through TCP.
pub(super) const REDIRECTED: u32 = 0;
pub(super) const PASSED: u32 = 1;

const R0: u8 = 0;
const R1: u8 = 1;
const R2: u8 = 2;
const R3: u8 = 3;
const R4: u8 = 4;
/// Kept across calls: the program's argument.
const R6: u8 = 6;
const STACK: u8 = 10;

const MAP_LOOKUP_ELEM: i32 = 1;
const SOCK_HASH_UPDATE: i32 = 70;
const MSG_REDIRECT_HASH: i32 = 71;

const ACTIVE_ESTABLISHED: i32 = 4;
const PASSIVE_ESTABLISHED: i32 = 5;
const AF_INET: i32 = 2;
const INGRESS: i32 = 1;
const SK_PASS: i32 = 1;

/// Where the key and the number of a counter stand on the stack.
const KEY_AT: i16 = -16;
const COUNTER_AT: i16 = -20;

/// `sockops`: puts every IPv4 socket whose handshake has ended into the map.
pub(super) fn insert(sockets: i32) -> Vec<Insn> {
    // Offsets in struct bpf_sock_ops.
    let (op, family, remote, local, remote_port, local_port) = (0, 20, 24, 28, 64, 68);
    let mut body = vec![
        load(R2, R6, local),
        store(KEY_AT, R2),
        load(R2, R6, remote),
        store(KEY_AT + 4, R2),
        load(R2, R6, local_port),
        store(KEY_AT + 8, R2),
        load(R2, R6, remote_port),
        from_big_endian(R2),
        store(KEY_AT + 12, R2),
        mov(R1, R6),
    ];
    body.extend(map(R2, sockets));
    body.extend(address(R3, KEY_AT));
    body.extend([set(R4, 0), call(SOCK_HASH_UPDATE)]);
    let rest = body.len() as i16;
    let mut code = vec![
        mov(R6, R1),
        load(R2, R6, op),
        skip_if(R2, ACTIVE_ESTABLISHED, 1),
        skip_unless(R2, PASSIVE_ESTABLISHED, rest + 2),
        load(R2, R6, family),
        skip_unless(R2, AF_INET, rest),
    ];
    code.extend(body);
    code.extend([set(R0, 1), exit()]);
    code
}

/// `sk_msg`: hands what is sent to the socket at the other end; through TCP when that is not in the map.
pub(super) fn redirect(sockets: i32, counters: i32) -> Vec<Insn> {
    // Offsets in struct sk_msg_md.
    let (remote, local, remote_port, local_port) = (20, 24, 60, 64);
    let mut code = vec![
        mov(R6, R1),
        load(R2, R6, remote),
        store(KEY_AT, R2),
        load(R2, R6, local),
        store(KEY_AT + 4, R2),
        load(R2, R6, remote_port),
        from_big_endian(R2),
        store(KEY_AT + 8, R2),
        load(R2, R6, local_port),
        store(KEY_AT + 12, R2),
    ];
    code.extend(map(R2, sockets));
    code.extend(address(R3, KEY_AT));
    code.extend([set(R4, INGRESS), call(MSG_REDIRECT_HASH)]);
    code.extend([set(R2, PASSED as i32), skip_unless(R0, SK_PASS, 1), set(R2, REDIRECTED as i32)]);
    code.push(store(COUNTER_AT, R2));
    code.extend(map(R1, counters));
    code.extend(address(R2, COUNTER_AT));
    code.extend([call(MAP_LOOKUP_ELEM), skip_if(R0, 0, 2), set(R1, 1), add_to_memory(R0, R1)]);
    // Without a redirect the verdict sends through TCP; after one, it hands over.
    code.extend([set(R0, SK_PASS), exit()]);
    code
}

fn mov(to: u8, from: u8) -> Insn {
    Insn::new(0xbf, to, from, 0, 0)
}

fn set(to: u8, value: i32) -> Insn {
    Insn::new(0xb7, to, 0, 0, value)
}

/// Reads four bytes.
fn load(to: u8, from: u8, offset: i16) -> Insn {
    Insn::new(0x61, to, from, offset, 0)
}

/// Writes four bytes to the stack.
fn store(at: i16, from: u8) -> Insn {
    Insn::new(0x63, STACK, from, at, 0)
}

/// Ports of remote ends come in network byte order, shifted to the upper half on little-endian machines.
fn from_big_endian(register: u8) -> Insn {
    Insn::new(0xdc, register, 0, 0, 32)
}

/// The address of something on the stack.
fn address(to: u8, at: i16) -> [Insn; 2] {
    [mov(to, STACK), Insn::new(0x07, to, 0, 0, at.into())]
}

/// The map with this descriptor; two instructions, for 64 bits.
fn map(to: u8, fd: i32) -> [Insn; 2] {
    [Insn::new(0x18, to, 1, 0, fd), Insn::new(0, 0, 0, 0, 0)]
}

fn call(helper: i32) -> Insn {
    Insn::new(0x85, 0, 0, 0, helper)
}

fn exit() -> Insn {
    Insn::new(0x95, 0, 0, 0, 0)
}

fn skip_if(register: u8, value: i32, instructions: i16) -> Insn {
    Insn::new(0x15, register, 0, instructions, value)
}

fn skip_unless(register: u8, value: i32, instructions: i16) -> Insn {
    Insn::new(0x55, register, 0, instructions, value)
}

/// Adds to eight bytes, as one step.
fn add_to_memory(address: u8, addend: u8) -> Insn {
    Insn::new(0xdb, address, addend, 0, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_instruction_is_skipped_by_half() {
        for code in [insert(3), redirect(3, 4)] {
            let second_halves: Vec<_> =
                (0..code.len()).filter(|&at| at > 0 && code[at - 1].is_map()).collect();
            for (at, instruction) in code.iter().enumerate() {
                let Some(skipped) = instruction.skips() else { continue };
                let target = at + 1 + skipped;
                assert!(target < code.len() && !second_halves.contains(&target), "{at} leads to {target}");
            }
            assert_eq!(format!("{:?}", code[code.len() - 1]), format!("{:?}", exit()));
        }
    }

    #[test]
    fn what_is_local_to_one_end_is_remote_to_the_other() {
        // Offsets from which the four words of the key are read, in order, in each context.
        assert_eq!(key_offsets(&insert(3)), [28, 24, 68, 64], "local, remote, local port, remote port");
        assert_eq!(key_offsets(&redirect(3, 4)), [20, 24, 60, 64], "remote, local, remote port, local port");
    }

    fn key_offsets(code: &[Insn]) -> Vec<i16> {
        let mut loaded = 0;
        let mut offsets = Vec::new();
        for instruction in code {
            if let Some(offset) = instruction.loads() {
                loaded = offset;
            }
            if instruction.stores().is_some_and(|at| at >= KEY_AT) {
                offsets.push(loaded);
            }
        }
        offsets
    }
}
