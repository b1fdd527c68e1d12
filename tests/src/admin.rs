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
        // HTTP/1.0: the body ends with the connection, so there are no chunks to parse.
        write!(stream, "{method} {path} HTTP/1.0\r\nhost: localhost\r\ncontent-length: 0\r\n\r\n")?;
        let mut text = String::new();
        stream.read_to_string(&mut text)?;
        let (head, body) = text.split_once("\r\n\r\n").context("no end of the response header")?;
        let status = head.split(' ').nth(1).context("no status")?.parse()?;
        Ok(Response { status, body: body.to_owned() })
    }
}
