//! A client of the admin server.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use anyhow::{Context, Result};

use crate::netns::Netns;

/// Where an admin server is.
#[derive(Clone, Debug)]
pub struct Admin {
    /// Its address.
    pub address: SocketAddr,
    /// The namespace it listens in; none: the caller's.
    pub netns: Option<Netns>,
}

/// An HTTP response.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Body.
    pub body: String,
}

impl Admin {
    /// GET.
    pub fn read(&self, path: &str) -> Result<Response> {
        self.request("GET", path)
    }

    /// POST without a body.
    pub fn post(&self, path: &str) -> Result<Response> {
        self.request("POST", path)
    }

    /// The value of a counter or gauge of `/stats`; 0 when it has never been touched.
    pub fn stat(&self, name: &str) -> Result<u64> {
        let response = self.read("/stats")?;
        let line = response.body.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(": "));
        line.map_or(Ok(0), |value| value.parse().with_context(|| format!("{name}: {value}")))
    }

    fn request(&self, method: &str, path: &str) -> Result<Response> {
        let exchange = || self.exchange(method, path);
        match &self.netns {
            Some(netns) => netns.enter(exchange)?,
            None => exchange(),
        }
        .with_context(|| format!("{method} http://{}{path}", self.address))
    }

    fn exchange(&self, method: &str, path: &str) -> Result<Response> {
        let mut stream = TcpStream::connect_timeout(&self.address, Duration::from_secs(5))?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        // One write: a server that answers before it has read all of the request may reset the connection.
        let request = format!(
            "{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"
        );
        stream.write_all(request.as_bytes())?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no end of the response header")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        let chunked = head.to_ascii_lowercase().contains("transfer-encoding: chunked");
        Ok(Response { status, body: if chunked { unchunk(body)? } else { body.to_owned() } })
    }
}

/// Joins the chunks of a body.
fn unchunk(mut rest: &str) -> Result<String> {
    let mut body = String::new();
    loop {
        let (length, data) = rest.split_once("\r\n").context("no chunk length")?;
        let length = usize::from_str_radix(length, 16).with_context(|| format!("chunk length {length}"))?;
        if length == 0 {
            return Ok(body);
        }
        body += data.get(..length).context("a short chunk")?;
        rest = data.get(length + 2..).context("no end of a chunk")?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn chunks_are_joined() -> Result<()> {
        assert_eq!(unchunk("5\r\nhello\r\n1\r\n!\r\n0\r\n\r\n")?, "hello!");
        assert!(unchunk("5\r\nhel").is_err());
        Ok(())
    }
}
