//! Connections whose record is in a slot, and those whose slot is another's: nobody can tell them apart.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};

use anyhow::{Context as _, Result, ensure};
use serde_json::json;
use socket2::{Domain, SockRef, Socket};
use tidegate_common::FLOW_SLOTS;
use tidegate_tests::config::Config;
use tidegate_tests::node::{Node, address_field, field};
use tidegate_tests::pod::Pod;
use tidegate_tests::proxy::{PATIENCE, Proxy};
use tidegate_tests::upstream::Upstream;

use crate::endpoints::{Eds, connect, eds, read_error};
use crate::{data_path, with_on_exit};

const SERVICE: &str = "172.16.0.1:50001";
const ENDPOINTS: [&str; 2] = ["10.9.0.1:80", "10.9.0.1:81"];

fn slot(socket: &SockRef<'_>) -> Result<u64> {
    Ok(socket.cookie()? % u64::from(FLOW_SLOTS))
}

/// A connection, and one whose socket may have the same slot only.
fn rivals(client: &Pod) -> Result<[TcpStream; 2]> {
    let (first, _) = connect(client, SERVICE)?;
    let wanted = slot(&SockRef::from(&first))?;
    let sockets = (0..40 * FLOW_SLOTS).map(|_| client.socket(Domain::IPV4));
    let is_rival = |socket: &Socket| slot(&SockRef::from(socket)).is_ok_and(|slot| slot == wanted);
    let rival = sockets.filter_map(Result::ok).find(is_rival).context("no socket has that slot")?;
    rival.connect(&SERVICE.parse::<SocketAddr>()?.into())?;
    let mut second = TcpStream::from(rival);
    second.set_read_timeout(Some(PATIENCE))?;
    second.read_exact(&mut [0; 2])?;
    for stream in [&first, &second] {
        ensure!(stream.peer_addr()? == SERVICE.parse()?, "getpeername: {}", stream.peer_addr()?);
    }
    Ok([first, second])
}

fn echo(mut stream: &TcpStream, bytes: usize) -> Result<()> {
    stream.write_all(&vec![b'x'; bytes])?;
    stream.read_exact(&mut vec![0; bytes])?;
    Ok(())
}

/// The line of each says this.
fn expect_lines(proxy: &Proxy, clients: [SocketAddr; 2], expected: [[&str; 4]; 2]) -> Result<()> {
    let lines = proxy.lines("access.log", &format!("dlocal={SERVICE}"), 2)?;
    for (client, expected) in clients.into_iter().zip(expected) {
        let line = lines.iter().find(|line| address_field(line, "dremote").is_ok_and(|from| from == client));
        let line = line.context("no line")?;
        assert_eq!(["rx", "tx", "details", "dnclose"].map(|name| field(line, name)), expected, "{line}");
    }
    Ok(())
}

#[test]
fn both_are_ended_when_their_endpoint_is_removed() -> Result<()> {
    let policy =
        json!({"@type": "type.googleapis.com/tidegate.cluster.v1.EndpointRemoval", "action": "RESET"});
    let mut fields = data_path("KERNEL");
    fields["metadata"]["typed_filter_metadata"]["tidegate.endpoint_removal"] = policy;
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &[], eds(fields));
    let proxy = node.proxy(&config).start()?;
    let mut eds = Eds::new(&proxy, &["foo"]);
    eds.apply(&ENDPOINTS[..1])?;
    let _upstream = Upstream::identify(Some(server.netns()), ENDPOINTS[0], "a")?;
    let streams = rivals(&client)?;
    let clients = [streams[0].local_addr()?, streams[1].local_addr()?];
    eds.apply(&ENDPOINTS[1..])?;
    for stream in &streams {
        assert_eq!(read_error(stream), Some(ErrorKind::ConnectionAborted));
    }
    let expected = ["0", "2", "endpoint_removed", "LocalReset"];
    expect_lines(&proxy, clients, [expected; 2])?;
    proxy.wait_stat("cluster.foo.upstream_cx_active", |value| value == 0)?;
    Ok(())
}

#[test]
fn a_successor_goes_on_with_both() -> Result<()> {
    let node = Node::new()?;
    let client = node.pod("client", &["10.9.0.9"])?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &ENDPOINTS[..1], data_path("KERNEL"));
    let setup = node.proxy(&Config::new()).config(&with_on_exit(&config, "RELEASE"));
    let mut proxy = setup.start()?;
    let _upstream = Upstream::identify(Some(server.netns()), ENDPOINTS[0], "a")?;
    let streams = rivals(&client)?;
    let clients = [streams[0].local_addr()?, streams[1].local_addr()?];
    echo(&streams[0], 10)?;
    proxy.kill()?;
    echo(&streams[1], 20)?;
    let successor = setup.clone().succeed(&proxy).start()?;
    successor.wait_stat("cluster.foo.upstream_cx_active", |value| value == 2)?;
    let [first, second] = streams;
    echo(&first, 1)?;
    // Closed with something unread.
    (&second).write_all(b"x")?;
    std::thread::sleep(std::time::Duration::from_millis(100));
    drop((first, second));
    expect_lines(&successor, clients, [["11", "13", "-", "Normal"], ["21", "23", "-", "RemoteReset"]])?;
    successor.wait_stat("cluster.foo.upstream_cx_active", |value| value == 0)?;
    successor.wait_stat("cluster.foo.upstream_cx_total", |value| value == 2)?;
    Ok(())
}
