//! Bytes that clients send before their data: a TLS ClientHello, PROXY protocol v2 headers.

/// A ClientHello as a TLS 1.2 client sends it, in one record.
pub(super) fn client_hello(server_name: Option<&str>, alpn: &[&str]) -> Vec<u8> {
    let mut extensions = Vec::new();
    if let Some(name) = server_name {
        let host = [&[0][..], &prefixed16(name.as_bytes())].concat();
        extension(&mut extensions, 0, &prefixed16(&host));
    }
    if !alpn.is_empty() {
        let names: Vec<u8> = alpn.iter().flat_map(|name| prefixed8(name.as_bytes())).collect();
        extension(&mut extensions, 16, &prefixed16(&names));
    }
    extension(&mut extensions, 10, &prefixed16(&[0, 29]));
    let mut body = vec![3, 3];
    body.extend_from_slice(&[0x5a; 32]);
    body.push(0);
    body.extend_from_slice(&prefixed16(&[0xc0, 0x2f, 0xc0, 0x30]));
    body.extend_from_slice(&[1, 0]);
    body.extend_from_slice(&prefixed16(&extensions));
    let length = u32::try_from(body.len()).unwrap_or_default().to_be_bytes();
    let handshake = [&[1][..], &length[1..], &body].concat();
    [&[22, 3, 1][..], &prefixed16(&handshake)].concat()
}

/// A PROXY protocol v2 header for 192.0.2.7:1111 → 192.0.2.8:2222, then `data`.
pub(super) fn proxy_v2(data: &[u8]) -> Vec<u8> {
    let mut bytes = signature(0x21, 0x11, 12);
    bytes.extend_from_slice(&[192, 0, 2, 7, 192, 0, 2, 8]);
    bytes.extend_from_slice(&1111u16.to_be_bytes());
    bytes.extend_from_slice(&2222u16.to_be_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// A PROXY protocol v2 LOCAL header, then `data`.
pub(super) fn proxy_v2_local(data: &[u8]) -> Vec<u8> {
    let mut bytes = signature(0x20, 0x00, 0);
    bytes.extend_from_slice(data);
    bytes
}

fn signature(command: u8, family: u8, length: u16) -> Vec<u8> {
    let mut bytes = b"\r\n\r\n\0\r\nQUIT\n".to_vec();
    bytes.extend_from_slice(&[command, family]);
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

fn extension(into: &mut Vec<u8>, kind: u16, data: &[u8]) {
    into.extend_from_slice(&kind.to_be_bytes());
    into.extend_from_slice(&prefixed16(data));
}

fn prefixed16(data: &[u8]) -> Vec<u8> {
    let length = u16::try_from(data.len()).unwrap_or_default().to_be_bytes();
    [&length[..], data].concat()
}

fn prefixed8(data: &[u8]) -> Vec<u8> {
    [&[u8::try_from(data.len()).unwrap_or_default()][..], data].concat()
}
