//! Receiving into buffers of the ring.

use super::*;

/// What comes next; a hang is a failure.
async fn next(source: &mut Source<&Socket>) -> io::Result<Received> {
    soon(poll_fn(|cx| source.poll_receive(cx))).await
}

fn text(received: &Received) -> String {
    match received {
        Received::Bytes(bytes) => bytes.with(|bytes| String::from_utf8_lossy(bytes).into_owned()),
        other => panic!("{other:?}"),
    }
}

#[test]
fn bytes_then_the_fin() {
    start(Engine::IoUring, async {
        let (mut client, server) = pair();
        let mut source = Source::new(&server);
        assert!(can_receive());
        assert!(still_pending(poll_fn(|cx| source.poll_receive(cx))).await);
        for message in ["one", "two", "three"] {
            client.write_all(message.as_bytes()).unwrap();
            assert_eq!(text(&next(&mut source).await.unwrap()), message);
        }
        client.shutdown(Shutdown::Write).unwrap();
        assert!(matches!(next(&mut source).await, Ok(Received::End)));
        assert!(!source.is_pending());
    })
    .unwrap();
}

#[test]
fn bytes_then_the_reset() {
    start(Engine::IoUring, async {
        let (mut client, server) = pair();
        let mut source = Source::new(&server);
        client.write_all(b"one").unwrap();
        assert_eq!(text(&next(&mut source).await.unwrap()), "one");
        client.write_all(b"last").unwrap();
        let client = Socket::from(client);
        client.set_linger(Some(Duration::ZERO)).unwrap();
        drop(client);
        assert_eq!(text(&next(&mut source).await.unwrap()), "last");
        assert_eq!(next(&mut source).await.unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    })
    .unwrap();
}

#[test]
fn stopped_leaves_the_rest_in_the_socket() {
    start(Engine::IoUring, async {
        let (mut client, server) = pair();
        let mut source = Source::new(&server);
        client.write_all(b"one").unwrap();
        assert_eq!(text(&next(&mut source).await.unwrap()), "one");
        assert!(still_pending(poll_fn(|cx| source.poll_receive(cx))).await);
        client.write_all(b"two").unwrap();
        source.settle_receiving();
        let mut stream = String::new();
        loop {
            match next(&mut source).await.unwrap() {
                Received::Stopped => break,
                bytes => stream += &text(&bytes),
            }
        }
        client.write_all(b"three").unwrap();
        let mut buffer = [0; 16];
        while stream.len() < "twothree".len() {
            soon(poll_fn(|cx| source.poll_readable(cx))).await.unwrap();
            match socket::receive(server.as_fd(), &mut buffer) {
                Ok(n) => stream += std::str::from_utf8(&buffer[..n]).unwrap(),
                Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
        }
        assert_eq!(stream, "twothree");
    })
    .unwrap();
}

/// Nothing is lost, and nothing hangs, when every buffer is taken, of a few first and then of more; and they all come
/// back.
#[test]
fn without_a_buffer_it_stops() {
    start(Engine::IoUring, async {
        let (mut client, server) = pair();
        let mut source = Source::new(&server);
        let sent: Vec<u8> = (0..3_u32 << 20).map(|i| (i % 251) as u8).collect();
        let copy = sent.clone();
        let writer = std::thread::spawn(move || {
            client.write_all(&copy).unwrap();
            client
        });
        let (mut received, mut kept, mut stops) = (Vec::new(), Vec::new(), Vec::new());
        while kept.len() < usize::from(buffers::COUNT) || stops.last() != Some(&kept.len()) {
            match next(&mut source).await.unwrap() {
                Received::Bytes(bytes) => {
                    bytes.with(|bytes| received.extend_from_slice(bytes));
                    kept.push(bytes);
                }
                Received::Stopped => stops.push(kept.len()),
                Received::End => panic!("not yet"),
            }
        }
        assert_eq!(stops, [64, 128, 256, 512]);
        kept.clear();
        while received.len() < sent.len() {
            match next(&mut source).await.unwrap() {
                Received::Bytes(bytes) => bytes.with(|bytes| received.extend_from_slice(bytes)),
                Received::Stopped => {}
                Received::End => panic!("not yet"),
            }
        }
        assert!(received == sent, "the stream is the same");
        drop(writer.join().unwrap());
        assert!(matches!(next(&mut source).await, Ok(Received::End)));
    })
    .unwrap();
}

/// The number of a descriptor is looked up when the kernel takes the entry: a receive that is given up before
/// that must not take the bytes of the next file with the same number.
#[test]
fn what_is_given_up_early_touches_no_other_file() {
    start(Engine::IoUring, async {
        for _ in 0..100 {
            let (_gone, server) = pair();
            let mut source = Source::new(server);
            assert!(poll_fn(|cx| Poll::Ready(source.poll_receive(cx).is_pending())).await);
            drop(source);
            let (mut client, server) = pair();
            client.write_all(b"mine").unwrap();
            time::sleep(Duration::from_micros(1)).await;
            let mut source = Source::new(&server);
            assert_eq!(text(&next(&mut source).await.unwrap()), "mine");
        }
    })
    .unwrap();
}

#[test]
fn other_engines_have_no_such_thing() {
    for engine in [Engine::TokioUring, Engine::Epoll] {
        start(engine, async {
            assert!(!can_receive());
        })
        .unwrap();
    }
}
