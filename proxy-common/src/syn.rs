//! The original destination as an option of the application's SYN.
//!
//! The SYN travels over `lo` of the pod only: capture listeners take nothing from elsewhere, and Linux passes over options
//! that it doesn't know. The kernel keeps the SYN of each accepted socket (`TCP_SAVE_SYN`) until the proxy has read it.
//!
//! | byte | |
//! |---|---|
//! | 0 | [`KIND`] |
//! | 1 | length of all: [`LENGTH_V4`] or [`LENGTH_V6`] |
//! | 2, 3 | service port, network order |
//! | 4 … | service address, network order: 4 or 16 bytes |

use core::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use crate::Addr;

/// The option's kind. IANA has not assigned it. Not one of the two kinds for experiments: the kernel finds these only by two
/// more bytes, and an IPv6 address already takes all the room that timestamps, window scale and the like leave.
pub const KIND: u8 = 222;

/// Length of the option with an IPv4 address, bytes.
pub const LENGTH_V4: u32 = 8;

/// Length of the option with an IPv6 address, bytes.
pub const LENGTH_V6: u32 = 20;

/// Length of the option for this destination, bytes.
#[inline(always)]
pub const fn length(addr: &Addr) -> u32 {
    if addr.is_v4() { LENGTH_V4 } else { LENGTH_V6 }
}

/// The option, of which the first [`length`] bytes count.
#[inline(always)]
pub const fn encode(addr: &Addr, port: u16) -> [u32; 5] {
    let port = port.to_be_bytes();
    let head = u32::from_ne_bytes([KIND, length(addr) as u8, port[0], port[1]]);
    if addr.is_v4() {
        [head, addr.v4_be(), 0, 0, 0]
    } else {
        let words = addr.words();
        [head, words[0], words[1], words[2], words[3]]
    }
}

/// The destination that a SYN carries. `packet` is what `TCP_SAVED_SYN` gives: an IP header, then a TCP header. None when
/// there is no such option, or the packet is not whole.
pub fn destination(packet: &[u8]) -> Option<SocketAddr> {
    let mut options = tcp_options(packet)?;
    loop {
        options = match *options {
            [] | [0, ..] => return None,
            [1, ref rest @ ..] => rest,
            [kind, length, ..] => {
                let (option, rest) = options.split_at_checked(usize::from(length.max(2)))?;
                if kind == KIND {
                    return decode(option);
                }
                rest
            }
            [_] => return None,
        };
    }
}

fn decode(option: &[u8]) -> Option<SocketAddr> {
    let (head, addr) = option.split_first_chunk::<4>()?;
    let ip: IpAddr = if let Ok(v4) = <[u8; 4]>::try_from(addr) {
        Ipv4Addr::from(v4).into()
    } else {
        Ipv6Addr::from(<[u8; 16]>::try_from(addr).ok()?).into()
    };
    Some(SocketAddr::new(ip, u16::from_be_bytes([head[2], head[3]])))
}

/// The options of a TCP packet.
fn tcp_options(packet: &[u8]) -> Option<&[u8]> {
    const TCP: u8 = 6;
    let words = |byte: u8| usize::from(byte) * 4;
    let tcp = match packet.first()? >> 4 {
        4 => packet.get(words(packet[0] & 0xf)..)?,
        6 => {
            let (mut next, mut rest) = (*packet.get(6)?, packet.get(40..)?);
            // Extension headers: hop by hop, routing, destination.
            while let 0 | 43 | 60 = next {
                let length = (usize::from(*rest.get(1)?) + 1) * 8;
                (next, rest) = (rest[0], rest.get(length..)?);
            }
            if next != TCP {
                return None;
            }
            rest
        }
        _ => return None,
    };
    tcp.get(20..words(tcp.get(12)? >> 4))
}

#[cfg(test)]
mod tests {
    extern crate std;

    use std::vec;
    use std::vec::Vec;

    use super::*;

    /// A SYN as the kernel keeps it: `before` the option stand others.
    fn syn(v6: bool, before: &[u8], option: &[u8]) -> Vec<u8> {
        let mut packet = if v6 {
            let mut header = vec![0; 40];
            (header[0], header[6]) = (0x60, 6);
            header
        } else {
            let mut header = vec![0; 20];
            header[0] = 0x45;
            header
        };
        let mut tcp = vec![0; 20];
        tcp.extend_from_slice(before);
        tcp.extend_from_slice(option);
        while !tcp.len().is_multiple_of(4) {
            tcp.push(0);
        }
        tcp[12] = (tcp.len() as u8 / 4) << 4;
        packet.extend(tcp);
        packet
    }

    fn option(addr: SocketAddr) -> Vec<u8> {
        let ip = Addr::from(addr.ip());
        let bytes: Vec<u8> = encode(&ip, addr.port()).iter().flat_map(|word| word.to_ne_bytes()).collect();
        bytes[..length(&ip) as usize].to_vec()
    }

    #[test]
    fn what_is_encoded_is_found() {
        // As Linux writes them: MSS, SACK permitted and timestamps, window scale.
        let usual = [2, 4, 0xff, 0xd7, 4, 2, 8, 10, 1, 2, 3, 4, 0, 0, 0, 0, 1, 3, 3, 7];
        for text in ["172.16.0.1:50001", "[fd99::1]:50001", "255.255.255.255:65535", "[::1]:1"] {
            let addr: SocketAddr = text.parse().unwrap();
            for v6 in [false, true] {
                for before in [&usual[..], &[], &[1, 1, 1], &[222, 2]] {
                    let packet = syn(v6, before, &option(addr));
                    let expected = if before == [222, 2] { None } else { Some(addr) };
                    assert_eq!(destination(&packet), expected, "{text} after {before:?}");
                    for end in 0..packet.len() {
                        assert_eq!(destination(&packet[..end]), None, "cut off at {end}");
                    }
                }
            }
        }
        // Timestamps and all: the IPv6 option is what still fits.
        assert_eq!(usual.len() + LENGTH_V6 as usize, 40);
    }

    #[test]
    fn extension_headers_are_passed_over() {
        let addr: SocketAddr = "[fd99::1]:50001".parse().unwrap();
        let mut packet = syn(true, &[], &option(addr));
        packet[6] = 60;
        let mut extended = packet[..40].to_vec();
        extended.extend([43, 1].into_iter().chain([0; 14]));
        extended.extend([6, 0].into_iter().chain([0; 6]));
        extended.extend(&packet[40..]);
        assert_eq!(destination(&extended), Some(addr));
        extended[40] = 17;
        assert_eq!(destination(&extended), None, "not TCP");
    }

    #[test]
    fn other_packets_carry_nothing() {
        for option in
            [&[][..], &[0], &[222], &[222, 0], &[222, 7, 1, 2, 3, 4, 5], &[222, 9, 0, 80, 1, 2, 3], &[2, 1]]
        {
            for v6 in [false, true] {
                assert_eq!(destination(&syn(v6, &[], option)), None, "{option:?}");
            }
        }
        for packet in [&[][..], &[0x45], &[0x4f; 60], &[0x60; 40], &[0x00; 80], &[0xff; 200]] {
            assert_eq!(destination(packet), None);
        }
    }
}
