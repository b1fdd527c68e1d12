//! What a ClientHello says before any key exists: SNI and ALPN. Pure: bytes in, verdict out.
//!
//! The message is looked at through `MSG_PEEK`, so that the upstream still gets every byte of it. It may be
//! split over TLS records and over segments in any way.

use tls_parser::parse_tls_handshake_client_hello;
use tls_parser::{TlsExtension, parse_tls_extension_alpn_content, parse_tls_extension_sni_content};

/// Bytes of a record header: type, version, length.
const RECORD_HEADER: usize = 5;
/// Bytes of a handshake header: type, 24-bit length.
const HANDSHAKE_HEADER: usize = 4;
/// Content type `handshake`.
const HANDSHAKE: u8 = 22;
/// Handshake type `client_hello`.
const CLIENT_HELLO: u8 = 1;
/// Major version of every record since SSL 3.0.
const MAJOR_VERSION: u8 = 3;
/// Largest plaintext fragment of a record (RFC 8446, 5.1).
const MAX_FRAGMENT: usize = 1 << 14;

/// Verdict on the bytes seen so far.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Undecided; asking again makes sense once so many bytes are there in total.
    NeedMore(usize),
    /// These bytes can't begin a TLS connection.
    NotTls,
    /// A ClientHello that does not end within `max_client_hello_size`.
    TooLarge,
    /// A complete ClientHello.
    Tls(ClientHello),
}

/// What a ClientHello offers.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct ClientHello {
    /// SNI in lower case. Bytes that no host name can contain are replaced by `?`.
    pub server_name: Option<Box<str>>,
    /// ALPN in the client's order; empty when it is absent or malformed.
    pub application_protocols: Vec<Box<str>>,
}

/// Looks at the first bytes of a connection; `bytes` holds at most `max_client_hello_size` of them.
pub fn inspect(bytes: &[u8], max_client_hello_size: usize) -> Outcome {
    let mut message = Fragments::default();
    let mut at = 0;
    loop {
        let record = match Record::parse(&bytes[at..]) {
            Err(NotARecord) => return Outcome::NotTls,
            Ok(None) => return need(at + RECORD_HEADER, max_client_hello_size),
            Ok(Some(record)) => record,
        };
        message.push(record.fragment);
        let joined = message.joined();
        if joined.first().is_some_and(|kind| *kind != CLIENT_HELLO) {
            return Outcome::NotTls;
        }
        let missing = match declared_len(joined) {
            Some(total) if joined.len() >= total => return hello(&joined[HANDSHAKE_HEADER..total]),
            Some(total) => total - joined.len(),
            None => HANDSHAKE_HEADER - joined.len(),
        };
        at += RECORD_HEADER + record.fragment.len();
        // From here on, not from the end of what is there: that may have some of what is missing.
        if at + missing > max_client_hello_size {
            return Outcome::TooLarge;
        }
        if record.missing > 0 {
            return need(at + missing.min(record.missing), max_client_hello_size);
        }
    }
}

fn need(total: usize, max_client_hello_size: usize) -> Outcome {
    if total > max_client_hello_size { Outcome::TooLarge } else { Outcome::NeedMore(total) }
}

struct NotARecord;

/// A plaintext record, perhaps not all of it yet.
struct Record<'a> {
    fragment: &'a [u8],
    /// Bytes of the fragment that have not arrived.
    missing: usize,
}

impl<'a> Record<'a> {
    /// `None`: the header is not complete. As in Envoy, nothing is judged before that: a client that sends less and a
    /// FIN is not served.
    fn parse(bytes: &'a [u8]) -> Result<Option<Self>, NotARecord> {
        let Some((header, body)) = bytes.split_at_checked(RECORD_HEADER) else { return Ok(None) };
        let len = usize::from(u16::from_be_bytes([header[3], header[4]]));
        if header[0] != HANDSHAKE || header[1] != MAJOR_VERSION || len > MAX_FRAGMENT {
            return Err(NotARecord);
        }
        let there = len.min(body.len());
        Ok(Some(Self { fragment: &body[..there], missing: len - there }))
    }
}

/// The handshake message: one slice of the input in the usual case, copied only when records split it.
#[derive(Default)]
struct Fragments<'a> {
    first: &'a [u8],
    copied: Vec<u8>,
}

impl<'a> Fragments<'a> {
    fn push(&mut self, fragment: &'a [u8]) {
        if self.first.is_empty() {
            self.first = fragment;
            return;
        }
        if self.copied.is_empty() {
            self.copied.extend_from_slice(self.first);
        }
        self.copied.extend_from_slice(fragment);
    }

    fn joined(&self) -> &[u8] {
        if self.copied.is_empty() { self.first } else { &self.copied }
    }
}

/// Length of the handshake message with its header, once that has arrived.
fn declared_len(message: &[u8]) -> Option<usize> {
    let header = message.first_chunk::<HANDSHAKE_HEADER>()?;
    Some(HANDSHAKE_HEADER + u32::from_be_bytes([0, header[1], header[2], header[3]]) as usize)
}

fn hello(body: &[u8]) -> Outcome {
    let Ok((_, contents)) = parse_tls_handshake_client_hello(body) else { return Outcome::NotTls };
    match extensions(contents.ext.unwrap_or_default()) {
        Some(hello) => Outcome::Tls(hello),
        None => Outcome::NotTls,
    }
}

/// SNI and ALPN of an extension block; `None` when the block, or the SNI in it, is malformed: a TLS server
/// would refuse it too, and a wrong guess of the name would choose a wrong filter chain.
fn extensions(mut block: &[u8]) -> Option<ClientHello> {
    const SERVER_NAME: u16 = 0;
    const ALPN: u16 = 16;
    let (mut found, mut seen_sni, mut seen_alpn) = (ClientHello::default(), false, false);
    while !block.is_empty() {
        let (header, rest) = block.split_at_checked(4)?;
        let kind = u16::from_be_bytes([header[0], header[1]]);
        let (content, rest) = rest.split_at_checked(u16::from_be_bytes([header[2], header[3]]).into())?;
        block = rest;
        match kind {
            SERVER_NAME if seen_sni => return None,
            SERVER_NAME => {
                found.server_name = Some(server_name(content)?);
                seen_sni = true;
            }
            ALPN if seen_alpn => return None,
            ALPN => {
                found.application_protocols = application_protocols(content).unwrap_or_default();
                seen_alpn = true;
            }
            _ => {}
        }
    }
    Some(found)
}

/// The one host name of an SNI extension.
fn server_name(content: &[u8]) -> Option<Box<str>> {
    const HOST_NAME: u8 = 0;
    let Ok(([], TlsExtension::SNI(names))) = parse_tls_extension_sni_content(content) else { return None };
    let [(kind, name)] = names[..] else { return None };
    // The list's own length and the name's must agree: what a lenient parser skips could be a second name.
    if kind.0 != HOST_NAME || name.is_empty() || name.len() > 255 || name.len() + 5 != content.len() {
        return None;
    }
    let printable =
        |byte: &u8| if byte.is_ascii_graphic() { char::from(byte.to_ascii_lowercase()) } else { '?' };
    Some(name.iter().map(printable).collect::<String>().into())
}

fn application_protocols(content: &[u8]) -> Option<Vec<Box<str>>> {
    let Ok(([], TlsExtension::ALPN(protocols))) = parse_tls_extension_alpn_content(content) else {
        return None;
    };
    let parsed: usize = protocols.iter().map(|name| name.len() + 1).sum();
    if parsed + 2 != content.len() || protocols.iter().any(|name| name.is_empty()) {
        return None;
    }
    Some(protocols.into_iter().map(|name| String::from_utf8_lossy(name).into()).collect())
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAX: usize = 65_536;

    /// A ClientHello message as `openssl s_client -servername … -alpn …` lays it out, `padding` bytes longer.
    pub(crate) fn message(server_name: Option<&str>, alpn: &[&str], padding: usize) -> Vec<u8> {
        let mut block = Vec::new();
        let mut extension = |kind: u16, content: &[u8]| {
            block.extend(kind.to_be_bytes());
            block.extend((content.len() as u16).to_be_bytes());
            block.extend(content);
        };
        if let Some(name) = server_name {
            let mut content = ((name.len() + 3) as u16).to_be_bytes().to_vec();
            content.push(0);
            content.extend((name.len() as u16).to_be_bytes());
            content.extend(name.as_bytes());
            extension(0, &content);
        }
        if !alpn.is_empty() {
            let list: Vec<u8> =
                alpn.iter().flat_map(|name| [&[name.len() as u8], name.as_bytes()].concat()).collect();
            extension(16, &[&(list.len() as u16).to_be_bytes()[..], &list].concat());
        }
        extension(43, &[2, 3, 4]);
        if padding > 0 {
            extension(21, &vec![0; padding]);
        }
        let mut body = vec![3, 3];
        body.extend([7; 32]);
        body.push(0);
        body.extend([0, 2, 0x13, 1, 1, 0]);
        body.extend((block.len() as u16).to_be_bytes());
        body.extend(block);
        let mut message = (body.len() as u32).to_be_bytes().to_vec();
        message[0] = CLIENT_HELLO;
        message.extend(body);
        message
    }

    /// The message in records of at most `fragment` bytes.
    pub(crate) fn records(message: &[u8], fragment: usize) -> Vec<u8> {
        message
            .chunks(fragment)
            .flat_map(|part| [&[HANDSHAKE, 3, 1][..], &(part.len() as u16).to_be_bytes(), part].concat())
            .collect()
    }

    fn expected(server_name: &str, alpn: &[&str]) -> Outcome {
        Outcome::Tls(ClientHello {
            server_name: Some(server_name.into()),
            application_protocols: alpn.iter().map(|name| (*name).into()).collect(),
        })
    }

    #[test]
    fn reads_sni_in_lower_case_and_alpn_in_order() {
        let hello = records(&message(Some("Foo.Example.COM"), &["h2", "http/1.1"], 0), MAX_FRAGMENT);
        assert_eq!(inspect(&hello, MAX), expected("foo.example.com", &["h2", "http/1.1"]));
        let bare = records(&message(None, &[], 0), MAX_FRAGMENT);
        assert_eq!(inspect(&bare, MAX), Outcome::Tls(ClientHello::default()));
    }

    #[test]
    fn plaintext_is_told_apart_by_its_first_bytes() {
        for plain in [
            &b"hello"[..],
            b"GET / HTTP/1.1\r\n",
            b"\x16\x02\0\0\0",
            b"\x80\x2e\x01\0\0",
            b"\x17\x03\x03\0\0",
        ] {
            assert_eq!(inspect(plain, MAX), Outcome::NotTls, "{plain:?}");
        }
        for undecided in [&b""[..], b"h", b"helo", b"\x16\x03\x01\0"] {
            assert_eq!(inspect(undecided, MAX), Outcome::NeedMore(RECORD_HEADER), "{undecided:?}");
        }
        assert_eq!(inspect(b"\x16\x03\x01\x40\x01", MAX), Outcome::NotTls, "fragment over 2^14");
        assert_eq!(inspect(b"\x16\x03\x01\x00\x04\x02", MAX), Outcome::NotTls, "a ServerHello");
    }

    #[test]
    fn a_hello_that_just_fits_may_come_in_several_records_at_once() {
        let hello = records(&message(Some("a.b"), &[], 5000), 3000);
        assert_eq!(inspect(&hello, hello.len()), expected("a.b", &[]));
        assert_eq!(inspect(&hello[..hello.len() - 1], hello.len() - 1), Outcome::TooLarge);
    }

    #[test]
    fn a_hello_that_can_not_fit_is_too_large_as_soon_as_its_length_is_known() {
        let hello = records(&message(Some("a.b"), &[], 5000), MAX_FRAGMENT);
        assert_eq!(inspect(&hello[..RECORD_HEADER + HANDSHAKE_HEADER], 4096), Outcome::TooLarge);
        assert_eq!(inspect(&hello, hello.len()), expected("a.b", &[]));
        assert_eq!(inspect(&hello[..hello.len() - 1], hello.len() - 1), Outcome::TooLarge);
    }

    #[test]
    fn a_second_or_malformed_server_name_is_not_guessed_at() {
        let name = |content: &[u8]| server_name(content);
        assert_eq!(name(b"\0\x04\0\0\x01a").as_deref(), Some("a"));
        assert_eq!(name(b"\0\x08\0\0\x01a\0\0\x01b"), None, "two names");
        assert_eq!(name(b"\0\x03\0\0\0"), None, "empty name");
        assert_eq!(name(b"\0\x05\0\0\x01ab"), None, "bytes after the name");
        assert_eq!(name(b""), None);
        assert_eq!(name(b"\0\x06\0\0\x03a\xffB").as_deref(), Some("a?b"));
        let twice = b"\0\0\0\x06\0\x04\0\0\x01a\0\0\0\x06\0\x04\0\0\x01b";
        assert_eq!(extensions(twice), None);
    }

    #[test]
    fn malformed_alpn_counts_as_none() {
        assert_eq!(application_protocols(b"\0\x03\x02h2"), Some(vec!["h2".into()]));
        assert_eq!(application_protocols(b"\0\x04\x02h2\0"), None);
        assert_eq!(application_protocols(b"\0\x03\x05h2"), None);
    }

    proptest! {
        #[test]
        fn never_panics(bytes in proptest::collection::vec(any::<u8>(), 0..600), max in 0..700usize) {
            inspect(&bytes[..bytes.len().min(max)], max);
        }

        #[test]
        fn never_panics_on_mutated_hellos(
            fragment in 1..400usize, at in any::<prop::sample::Index>(), byte: u8, cut in any::<prop::sample::Index>(),
        ) {
            let mut hello = records(&message(Some("foo.example.com"), &["h2"], 30), fragment);
            let at = at.index(hello.len());
            hello[at] = byte;
            hello.truncate(cut.index(hello.len() + 1));
            inspect(&hello, MAX);
        }

        /// However records and segments split it: every prefix asks for more, at least one byte and never
        /// beyond the end, and the whole gives the same answer.
        #[test]
        fn fragmentation_does_not_matter(fragment in 1..400usize, padding in 0..300usize) {
            let hello = records(&message(Some("foo.example.com"), &["h2"], padding), fragment);
            let mut have = 0;
            loop {
                match inspect(&hello[..have], MAX) {
                    Outcome::NeedMore(total) => {
                        prop_assert!(total > have && total <= hello.len(), "{} of {}", total, hello.len());
                        have = total;
                    }
                    outcome => {
                        prop_assert_eq!(outcome, expected("foo.example.com", &["h2"]));
                        prop_assert_eq!(have, hello.len());
                        break;
                    }
                }
            }
            for prefix in 0..hello.len() {
                prop_assert!(matches!(inspect(&hello[..prefix], MAX), Outcome::NeedMore(_)), "{}", prefix);
            }
        }
    }
}
