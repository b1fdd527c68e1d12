//! PROXY protocol headers, versions 1 and 2. Pure: bytes in, verdict out.
//!
//! As in Envoy: a version 2 header with the command PROXY must carry TCP or UDP addresses over IPv4 or IPv6
//! (AF_UNSPEC and AF_UNIX are malformed), the command LOCAL keeps the socket's own addresses whatever follows,
//! and addresses that can't be an end of a TCP connection (multicast, broadcast, any) are malformed.

use std::net::{IpAddr, SocketAddr};

use crate::config::listener::ProxyProtocolVersion;

const V1_SIGNATURE: &[u8] = b"PROXY ";
const V2_SIGNATURE: &[u8] = b"\r\n\r\n\0\r\nQUIT\n";
/// Signature, version and command, family and transport, length.
const V2_FIXED: usize = 16;
/// Longest line of version 1 with its CRLF, by the specification.
const V1_MAX: usize = 107;
/// Shortest line of version 1: `PROXY UNKNOWN\r\n`.
const V1_MIN: usize = 15;

/// The longest header there can be. Bytes.
pub const MAX_HEADER: usize = V2_FIXED + u16::MAX as usize;

/// Verdict on the bytes seen so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Undecided; asking again makes sense once so many bytes are there in total.
    NeedMore(usize),
    /// These bytes can't begin a header (of a version that is looked for).
    NoHeader,
    /// A header of a version that is not allowed.
    Disallowed(ProxyProtocolVersion),
    /// A header that breaks the specification.
    Malformed(ProxyProtocolVersion),
    /// A complete header.
    Header(Header),
}

/// A complete header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Which form it has.
    pub version: ProxyProtocolVersion,
    /// Bytes to take off the stream.
    pub len: usize,
    /// Source and destination; none for LOCAL and UNKNOWN: the socket's own addresses stay.
    pub addresses: Option<(SocketAddr, SocketAddr)>,
}

/// Looks at the first bytes of a connection. `disallowed` versions are not looked for when connections
/// without a header are served (`optional`), and refused otherwise.
pub fn inspect(bytes: &[u8], disallowed: &[ProxyProtocolVersion], optional: bool) -> Outcome {
    use ProxyProtocolVersion::{V1, V2};
    for (version, signature) in [(V1, V1_SIGNATURE), (V2, V2_SIGNATURE)] {
        let seen = bytes.len().min(signature.len());
        let refused = disallowed.contains(&version);
        if bytes[..seen] != signature[..seen] || (refused && optional) {
            continue;
        }
        if seen < signature.len() {
            return Outcome::NeedMore(signature.len());
        }
        return match version {
            _ if refused => Outcome::Disallowed(version),
            V1 => inspect_v1(bytes),
            V2 => inspect_v2(bytes),
        };
    }
    if bytes.is_empty() { Outcome::NeedMore(1) } else { Outcome::NoHeader }
}

fn inspect_v1(bytes: &[u8]) -> Outcome {
    const VERSION: ProxyProtocolVersion = ProxyProtocolVersion::V1;
    let head = &bytes[..bytes.len().min(V1_MAX)];
    let Some(end) = head.windows(2).position(|pair| pair == b"\r\n") else {
        return if head.len() == V1_MAX {
            Outcome::Malformed(VERSION)
        } else {
            Outcome::NeedMore(V1_MIN.max(head.len() + 1))
        };
    };
    let len = end + 2;
    // As bytes: ppp cuts a line at its first CR, which in a text may be in the middle of a character, and panics.
    let addresses = match ppp::v1::Header::try_from(&head[..len]).map(|header| header.addresses) {
        Ok(ppp::v1::Addresses::Unknown) => None,
        Ok(ppp::v1::Addresses::Tcp4(a)) => {
            Some((socket(a.source_address, a.source_port), socket(a.destination_address, a.destination_port)))
        }
        Ok(ppp::v1::Addresses::Tcp6(a)) => {
            Some((socket(a.source_address, a.source_port), socket(a.destination_address, a.destination_port)))
        }
        Err(_) => return Outcome::Malformed(VERSION),
    };
    header(VERSION, len, addresses)
}

fn inspect_v2(bytes: &[u8]) -> Outcome {
    const VERSION: ProxyProtocolVersion = ProxyProtocolVersion::V2;
    const LOCAL: u8 = 0x20;
    const PROXY: u8 = 0x21;
    let Some(fixed) = bytes.first_chunk::<V2_FIXED>() else { return Outcome::NeedMore(V2_FIXED) };
    let (command, family) = (fixed[12], fixed[13]);
    let len = V2_FIXED + usize::from(u16::from_be_bytes([fixed[14], fixed[15]]));
    // What can be refused by the fixed part is refused before its announced length is waited for.
    let addressable = matches!(family, 0x11 | 0x12 | 0x21 | 0x22);
    if command != LOCAL && (command != PROXY || !addressable) {
        return Outcome::Malformed(VERSION);
    }
    let Some(whole) = bytes.get(..len) else { return Outcome::NeedMore(len) };
    if command == LOCAL {
        return header(VERSION, len, None);
    }
    let Ok(parsed) = ppp::v2::Header::try_from(whole) else { return Outcome::Malformed(VERSION) };
    if parsed.tlvs().any(|tlv| tlv.is_err()) {
        return Outcome::Malformed(VERSION);
    }
    match parsed.addresses {
        ppp::v2::Addresses::IPv4(a) => header(
            VERSION,
            len,
            Some((
                socket(a.source_address, a.source_port),
                socket(a.destination_address, a.destination_port),
            )),
        ),
        ppp::v2::Addresses::IPv6(a) => header(
            VERSION,
            len,
            Some((
                socket(a.source_address, a.source_port),
                socket(a.destination_address, a.destination_port),
            )),
        ),
        ppp::v2::Addresses::Unspecified | ppp::v2::Addresses::Unix(_) => Outcome::Malformed(VERSION),
    }
}

fn socket(ip: impl Into<IpAddr>, port: u16) -> SocketAddr {
    SocketAddr::new(ip.into(), port)
}

fn header(version: ProxyProtocolVersion, len: usize, addresses: Option<(SocketAddr, SocketAddr)>) -> Outcome {
    let unicast = |addr: &SocketAddr| {
        let ip = addr.ip();
        let broadcast = matches!(ip, IpAddr::V4(v4) if v4.is_broadcast());
        !ip.is_unspecified() && !ip.is_multicast() && !broadcast
    };
    match addresses {
        Some((source, destination)) if !unicast(&source) || !unicast(&destination) => {
            Outcome::Malformed(version)
        }
        addresses => Outcome::Header(Header { version, len, addresses }),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::ProxyProtocolVersion::{V1, V2};
    use super::*;

    fn plain(bytes: &[u8]) -> Outcome {
        inspect(bytes, &[], false)
    }

    pub(crate) fn v2(command: u8, family: u8, payload: &[u8]) -> Vec<u8> {
        let mut bytes = V2_SIGNATURE.to_vec();
        bytes.extend([command, family]);
        bytes.extend((payload.len() as u16).to_be_bytes());
        bytes.extend(payload);
        bytes
    }

    const V4: &[u8] = &[10, 0, 0, 9, 172, 16, 0, 1, 0x30, 0x39, 0xc3, 0x51];

    fn header_of(version: ProxyProtocolVersion, len: usize, addresses: Option<(&str, &str)>) -> Outcome {
        let addresses = addresses.map(|(a, b)| (a.parse().unwrap(), b.parse().unwrap()));
        Outcome::Header(Header { version, len, addresses })
    }

    #[test]
    fn a_stray_cr_is_malformed_wherever_it_stands() {
        for line in ["PROXY UNKNOWN\ré\r\n", "PROXY TCP4\r 1.2.3.4 5.6.7.8 1 2\r\n", "PROXY UNKNOWN$\rԬ\r\n"]
        {
            assert_eq!(plain(line.as_bytes()), Outcome::Malformed(V1), "{line:?}");
        }
    }

    #[test]
    fn version_1() {
        let line = b"PROXY TCP4 10.0.0.9 172.16.0.1 12345 50001\r\nhello";
        assert_eq!(plain(line), header_of(V1, 44, Some(("10.0.0.9:12345", "172.16.0.1:50001"))));
        let line = b"PROXY TCP6 2001:db8::9 2001:db8::1 12345 50001\r\n";
        let addresses = Some(("[2001:db8::9]:12345", "[2001:db8::1]:50001"));
        assert_eq!(plain(line), header_of(V1, line.len(), addresses));
        assert_eq!(plain(b"PROXY UNKNOWN\r\nx"), header_of(V1, 15, None));
        assert_eq!(plain(b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n"), header_of(V1, 35, None));
    }

    #[test]
    fn version_1_malformed() {
        for line in [
            &b"PROXY TCP4 10.0.0.9 172.16.0.1 12345\r\n"[..],
            b"PROXY TCP4 10.0.0.9 172.16.0.1 123456 50001\r\n",
            b"PROXY TCP4 2001:db8::9 2001:db8::1 1 2\r\n",
            b"PROXY TCP4 224.0.0.1 172.16.0.1 1 2\r\n",
            b"PROXY TCP4 0.0.0.0 172.16.0.1 1 2\r\n",
            b"PROXY TCP4 10.0.0.9 255.255.255.255 1 2\r\n",
            b"PROXY UDP4 10.0.0.9 172.16.0.1 1 2\r\n",
            b"PROXY \xff\xfe\r\n",
            &[b"PROXY UNKNOWN ".as_slice(), &[b'x'; 100]].concat(),
        ] {
            assert_eq!(plain(line), Outcome::Malformed(V1), "{}", String::from_utf8_lossy(line));
        }
    }

    #[test]
    fn version_2() {
        let header = v2(0x21, 0x11, V4);
        let addresses = Some(("10.0.0.9:12345", "172.16.0.1:50001"));
        assert_eq!(plain(&[&header[..], b"hello"].concat()), header_of(V2, 28, addresses));
        let with_tlv = v2(0x21, 0x11, &[V4, &[0x20, 0, 2, 9, 9]].concat());
        assert_eq!(plain(&with_tlv), header_of(V2, 33, addresses));
        let mut v6 = [0u8; 36];
        v6[15] = 1;
        v6[31] = 2;
        v6[33] = 5;
        v6[35] = 6;
        assert_eq!(plain(&v2(0x21, 0x21, &v6)), header_of(V2, 52, Some(("[::1]:5", "[::2]:6"))));
    }

    #[test]
    fn local_keeps_the_sockets_addresses_whatever_follows() {
        assert_eq!(plain(&v2(0x20, 0x00, b"")), header_of(V2, 16, None));
        assert_eq!(plain(&v2(0x20, 0x11, b"abc")), header_of(V2, 19, None));
        assert_eq!(plain(&v2(0x20, 0x11, b"abc")[..17]), Outcome::NeedMore(19));
    }

    #[test]
    fn version_2_malformed_is_refused_without_waiting_for_its_length() {
        for (command, family) in
            [(0x21, 0x00), (0x21, 0x31), (0x21, 0x10), (0x11, 0x11), (0x22, 0x11), (0x21, 0x13)]
        {
            assert_eq!(
                plain(&v2(command, family, &[0; 216])[..16]),
                Outcome::Malformed(V2),
                "{command:x} {family:x}"
            );
        }
        assert_eq!(plain(&v2(0x21, 0x11, &V4[..11])), Outcome::Malformed(V2), "too short for its family");
        let broken_tlv = v2(0x21, 0x11, &[V4, &[0x20, 0, 9, 1]].concat());
        assert_eq!(plain(&broken_tlv), Outcome::Malformed(V2));
    }

    #[test]
    fn absent_headers_and_disallowed_versions() {
        let (one, two) = (b"PROXY UNKNOWN\r\n", v2(0x20, 0, b""));
        assert_eq!(plain(b"hello"), Outcome::NoHeader);
        assert_eq!(plain(b"PROXZ"), Outcome::NoHeader);
        assert_eq!(plain(b"\r\n\r\nX"), Outcome::NoHeader);
        assert_eq!(inspect(one, &[V1], false), Outcome::Disallowed(V1));
        assert_eq!(inspect(&two, &[V2], false), Outcome::Disallowed(V2));
        assert_eq!(inspect(&two, &[V1], false), header_of(V2, 16, None));
        assert_eq!(inspect(one, &[V1], true), Outcome::NoHeader);
        assert_eq!(inspect(&two, &[V1, V2], true), Outcome::NoHeader);
    }

    proptest! {
        #[test]
        fn never_panics(
            bytes in proptest::collection::vec(any::<u8>(), 0..300), start in 0..3usize, optional: bool,
        ) {
            let signature: [&[u8]; 3] = [b"", V1_SIGNATURE, V2_SIGNATURE];
            inspect(&[signature[start], &bytes].concat(), &[], optional);
        }

        /// Every prefix of a header asks for more, never beyond its end.
        #[test]
        fn prefixes_ask_for_more(which in 0..4usize) {
            let header = match which {
                0 => b"PROXY TCP4 10.0.0.9 172.16.0.1 12345 50001\r\n".to_vec(),
                1 => b"PROXY UNKNOWN\r\n".to_vec(),
                2 => v2(0x21, 0x11, &[V4, &[0x20, 0, 2, 9, 9]].concat()),
                _ => v2(0x20, 0, b"12345"),
            };
            for have in 0..header.len() {
                let Outcome::NeedMore(total) = plain(&header[..have]) else {
                    return Err(TestCaseError::fail(format!("{have}: {:?}", plain(&header[..have]))));
                };
                prop_assert!(total > have && total <= header.len(), "{have}: {total}");
            }
        }
    }
}
