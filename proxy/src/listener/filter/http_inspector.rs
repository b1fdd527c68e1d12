//! Recognises HTTP/1.x by its request line and HTTP/2 by its preface. Pure: bytes in, verdict out.

/// More than this without an end of the request line ends the connection. Bytes; Envoy's limit.
pub const MAX_INSPECT_SIZE: usize = 64 * 1024;

const HTTP2_PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";

/// Verdict on the bytes seen so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Undecided; asking again makes sense once so many bytes are there in total.
    NeedMore(usize),
    /// Not HTTP.
    NotHttp,
    /// The request line does not end within [`MAX_INSPECT_SIZE`].
    TooLarge,
    /// HTTP/1.1.
    Http11,
    /// Any other HTTP/1 version.
    Http10,
    /// The HTTP/2 preface in plaintext.
    Http2,
}

/// Looks at the first bytes of a connection; `bytes` holds at most [`MAX_INSPECT_SIZE`] of them.
pub fn inspect(bytes: &[u8]) -> Outcome {
    if bytes.len() >= HTTP2_PREFACE.len() && bytes.starts_with(HTTP2_PREFACE) {
        return Outcome::Http2;
    }
    if HTTP2_PREFACE.starts_with(bytes) {
        return Outcome::NeedMore(HTTP2_PREFACE.len());
    }
    match bytes.iter().position(|byte| *byte == b'\n') {
        Some(end) => request_line(bytes[..end].strip_suffix(b"\r").unwrap_or(&bytes[..end])),
        None if !could_begin_request_line(bytes) => Outcome::NotHttp,
        None if bytes.len() >= MAX_INSPECT_SIZE => Outcome::TooLarge,
        None => Outcome::NeedMore(bytes.len() + 1),
    }
}

fn could_begin_request_line(bytes: &[u8]) -> bool {
    let bytes = bytes.strip_suffix(b"\r").unwrap_or(bytes);
    let method_end = bytes.iter().position(|byte| *byte == b' ').unwrap_or(bytes.len());
    let (method, rest) = bytes.split_at(method_end);
    !method.is_empty()
        && method.iter().all(|byte| is_token(*byte))
        && rest.iter().all(|byte| is_visible(*byte))
}

fn request_line(line: &[u8]) -> Outcome {
    if !could_begin_request_line(line) {
        return Outcome::NotHttp;
    }
    let Some(version_at) = line.iter().rposition(|byte| *byte == b' ') else { return Outcome::NotHttp };
    let (request, version) = (&line[..version_at], &line[version_at + 1..]);
    let has_target = request.iter().position(|byte| *byte == b' ').is_some_and(|at| at + 1 < request.len());
    match version {
        _ if !has_target => Outcome::NotHttp,
        b"HTTP/1.1" => Outcome::Http11,
        [b'H', b'T', b'T', b'P', b'/', major, b'.', minor]
            if major.is_ascii_digit() && minor.is_ascii_digit() =>
        {
            Outcome::Http10
        }
        _ => Outcome::NotHttp,
    }
}

/// `tchar` of RFC 9110, 5.6.2.
fn is_token(byte: u8) -> bool {
    byte.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&byte)
}

/// Spaces, visible characters and bytes above ASCII; a request line has no control characters.
fn is_visible(byte: u8) -> bool {
    byte >= b' ' && byte != 0x7f
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn recognises_versions() {
        assert_eq!(inspect(b"GET / HTTP/1.1\r\nhost: a\r\n"), Outcome::Http11);
        assert_eq!(inspect(b"GET /a b HTTP/1.0\n"), Outcome::Http10);
        assert_eq!(inspect(b"CUSTOM-METHOD http://h/ HTTP/0.9\r\n"), Outcome::Http10);
        assert_eq!(inspect(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0"), Outcome::Http2);
    }

    #[test]
    fn other_protocols_are_not_http() {
        for other in [
            &b"\x16\x03\x01"[..],
            b"\r\nGET / HTTP/1.1\r\n",
            b"SSH-2.0-OpenSSH_9\r\n",
            b"EHLO mail\r\n",
            b"GET HTTP/1.1\r\n",
            b"GET /\r\n",
            b"GE\0T",
            b" GET / HTTP/1.1\r\n",
            b"GET / HTTP/x.1\r\n",
        ] {
            assert_eq!(inspect(other), Outcome::NotHttp, "{other:?}");
        }
    }

    #[test]
    fn waits_for_the_end_of_the_line_up_to_the_limit() {
        assert_eq!(inspect(b"hello"), Outcome::NeedMore(6));
        assert_eq!(inspect(b""), Outcome::NeedMore(24));
        assert_eq!(inspect(b"PRI * HTTP"), Outcome::NeedMore(24));
        assert_eq!(inspect(b"PRINT"), Outcome::NeedMore(6));
        assert_eq!(inspect(&vec![b'a'; MAX_INSPECT_SIZE]), Outcome::TooLarge);
        assert_eq!(inspect(&vec![b'a'; MAX_INSPECT_SIZE - 1]), Outcome::NeedMore(MAX_INSPECT_SIZE));
    }

    proptest! {
        /// Whatever a prefix asks for is reachable, and a verdict never changes when more bytes come.
        #[test]
        fn verdicts_are_final(bytes in "[A-Z/ .0-2\r\n\u{1}HTP]{0,40}", cut in 0..40usize) {
            let bytes = bytes.as_bytes();
            let prefix = &bytes[..cut.min(bytes.len())];
            match inspect(prefix) {
                Outcome::NeedMore(total) => prop_assert!(total > prefix.len()),
                verdict => prop_assert_eq!(verdict, inspect(bytes)),
            }
        }
    }
}
