use super::*;
use std::future::poll_fn;
use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};

fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let ours: Socket = listener.accept().unwrap().0.into();
    ours.set_nonblocking(true).unwrap();
    (peer, ours)
}

/// Bytes that the ring has received, and nobody has looked at, are lost when the connection is cut: who would have
/// got them sees a reset, who sent them a FIN, as both do in Envoy when it has read them.
#[test]
fn what_waits_in_the_ring_is_missed_when_the_connection_is_cut() {
    let ((mut client, downstream), (mut server, upstream)) = (pair(), pair());
    let (outcome, counters) = uring::start(uring::Engine::IoUring, async {
        let (resources, counters) = (Resources::default(), Counters::default());
        let connections = std::rc::Rc::new(crate::drain::Connections::default());
        let open = connections.open(0);
        let options = Options { killed: Some(&open), ..Options::default() };
        let mut duplex = Duplex::new(&resources, [&downstream, &upstream], None, &options, &counters);
        let mut timer = uring::time::sleep(Duration::ZERO);
        let outcome = poll_fn(|cx| {
            assert!(duplex.poll(&mut timer, cx).is_pending());
            client.write_all(b"lost").unwrap();
            uring::flush_sends(); // enters the ring
            assert!(duplex.source(Side::Downstream).has_more());
            connections.kill_all();
            duplex.poll(&mut timer, cx)
        })
        .await;
        drop(duplex);
        (outcome, counters)
    })
    .unwrap();
    let (downstream, upstream) = (CloseType::Normal, CloseType::LocalReset);
    assert_eq!(outcome, Outcome { cause: Cause::Killed, downstream, upstream });
    let moved = &counters.downstream;
    assert_eq!((moved.received.get(), moved.sent.get(), moved.discarded()), (4, 0, 4));
    assert_eq!(client.read(&mut [0]).unwrap(), 0);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// The kernel may swallow the error of a reset (see `Lane::write`), and then end the stream as if by a
/// FIN. What the endpoint had answered must arrive, and then a reset all the same.
#[test]
fn a_reset_whose_error_was_swallowed_is_no_fin() {
    let ((mut client, downstream), (mut server, upstream)) = (pair(), pair());
    server.write_all(b"413 too large").unwrap();
    server.shutdown(Shutdown::Write).unwrap();
    let outcome = uring::start(uring::Engine::IoUring, async {
        let (resources, counters, options) = (Resources::default(), Counters::default(), Options::default());
        let mut duplex = Duplex::new(&resources, [&downstream, &upstream], None, &options, &counters);
        let mut timer = uring::time::sleep(Duration::ZERO);
        let mut told = false;
        poll_fn(|cx| {
            if !std::mem::replace(&mut told, true) {
                assert_eq!(duplex.faulted(Side::Downstream, Fault::DestinationVanished, cx), None);
            }
            duplex.poll(&mut timer, cx)
        })
        .await
    })
    .unwrap();
    let (downstream, upstream) = (CloseType::LocalReset, CloseType::RemoteReset);
    assert_eq!(outcome, Outcome { cause: Cause::Reset { by: Side::Upstream }, downstream, upstream });
    let mut answer = [0; 13];
    client.read_exact(&mut answer).unwrap();
    assert_eq!(&answer, b"413 too large");
    assert_eq!(client.read(&mut answer).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// The same from the client, of which nothing is held: Envoy counts no flush to the upstream then.
#[test]
fn a_reset_whose_error_was_swallowed_is_no_flush() {
    let ((client, downstream), (mut server, upstream)) = (pair(), pair());
    Socket::from(client).set_linger(Some(Duration::ZERO)).unwrap();
    let (outcome, flushed) = uring::start(uring::Engine::IoUring, async {
        let (resources, counters, options) = (Resources::default(), Counters::default(), Options::default());
        let mut duplex = Duplex::new(&resources, [&downstream, &upstream], None, &options, &counters);
        let mut timer = uring::time::sleep(Duration::ZERO);
        let outcome = poll_fn(|cx| {
            if duplex.flush.is_none() {
                assert_eq!(duplex.faulted(Side::Upstream, Fault::DestinationVanished, cx), None);
            }
            duplex.poll(&mut timer, cx)
        })
        .await;
        drop(duplex);
        (outcome, counters.flushed.get())
    })
    .unwrap();
    let (downstream, upstream) = (CloseType::RemoteReset, CloseType::LocalReset);
    assert_eq!(outcome, Outcome { cause: Cause::Reset { by: Side::Downstream }, downstream, upstream });
    assert_eq!(flushed, None);
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}

/// What the ring sends when the turn is over is held by nobody: Envoy has sent it by now.
#[test]
fn a_message_that_the_ring_is_about_to_send_is_no_flush() {
    let ((client, downstream), (mut server, upstream)) = (pair(), pair());
    let mut client = Some(client);
    let flushed = uring::start(uring::Engine::IoUring, async {
        let (resources, counters, options) = (Resources::default(), Counters::default(), Options::default());
        let mut duplex = Duplex::new(&resources, [&downstream, &upstream], None, &options, &counters);
        let mut timer = uring::time::sleep(Duration::ZERO);
        poll_fn(|cx| {
            if let Some(mut client) = client.take() {
                assert!(duplex.poll(&mut timer, cx).is_pending());
                client.write_all(b"last").unwrap();
                uring::flush_sends(); // enters the ring
                assert!(duplex.poll(&mut timer, cx).is_pending());
                assert!(duplex.lane(Side::Downstream).is_sending());
                Socket::from(client).set_linger(Some(Duration::ZERO)).unwrap();
                assert_eq!(duplex.faulted(Side::Upstream, Fault::DestinationVanished, cx), None);
            }
            duplex.poll(&mut timer, cx)
        })
        .await;
        counters.flushed.get()
    })
    .unwrap();
    assert_eq!(flushed, None);
    let mut message = [0; 4];
    server.read_exact(&mut message).unwrap();
    assert_eq!(&message, b"last");
}

/// The kernel tells of a reset once. When a send was told, the next read finds an end as if by a FIN.
#[test]
fn a_reset_that_only_a_send_was_told_of_is_no_fin() {
    let ((client, downstream), (mut server, upstream)) = (pair(), pair());
    let mut client = Some(client);
    let outcome = uring::start(uring::Engine::IoUring, async {
        let (resources, counters, options) = (Resources::default(), Counters::default(), Options::default());
        let mut duplex = Duplex::new(&resources, [&downstream, &upstream], None, &options, &counters);
        let mut timer = uring::time::sleep(Duration::ZERO);
        poll_fn(|cx| {
            if let Some(client) = client.take() {
                assert!(duplex.poll(&mut timer, cx).is_pending());
                server.write_all(b"unread").unwrap();
                uring::flush_sends(); // enters the ring
                assert!(duplex.poll(&mut timer, cx).is_pending());
                assert!(duplex.lane(Side::Upstream).is_sending());
                Socket::from(client).set_linger(Some(Duration::ZERO)).unwrap();
                uring::flush_sends();
                assert!(duplex.source(Side::Downstream).has_more());
            }
            duplex.poll(&mut timer, cx)
        })
        .await
    })
    .unwrap();
    let (downstream, upstream) = (CloseType::RemoteReset, CloseType::LocalReset);
    assert_eq!(outcome, Outcome { cause: Cause::Reset { by: Side::Downstream }, downstream, upstream });
    assert_eq!(server.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
}
