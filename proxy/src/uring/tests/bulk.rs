//! Who moves bulk runs behind those who have little to do, and does run.

use std::cell::Cell;

use super::*;

/// Waits for what is there already, again and again.
async fn always_ready(socket: Socket, mut each: impl FnMut()) {
    let mut source = Source::new(socket);
    loop {
        poll_fn(|cx| {
            let _bulk = Bulk::begin();
            source.poll_readable(cx)
        })
        .await
        .unwrap();
        each();
    }
}

/// A socket that has something to read, and its peer.
fn readable() -> (TcpStream, Socket) {
    let (mut client, server) = pair();
    client.write_all(b"more").unwrap();
    (client, server)
}

#[test]
fn a_small_message_waits_for_one_of_them_at_most() {
    const BULK: usize = 16;
    start(Engine::IoUring, async {
        let runs = Rc::new(Cell::new(0_usize));
        let (mut client, server) = pair();
        let mut clients = Vec::new();
        for i in 0..BULK {
            let (peer, socket) = readable();
            clients.push(peer);
            let runs = Rc::clone(&runs);
            let mut sender = (i == BULK / 2).then(|| client.try_clone().unwrap());
            spawn(always_ready(socket, move || {
                runs.set(runs.get() + 1);
                // The number of the run that sends it is the message.
                if let Some(client) = sender.as_mut().filter(|_| runs.get() > 10 * BULK) {
                    client.write_all(&runs.get().to_be_bytes()).unwrap();
                    sender = None;
                }
            }));
        }
        client.write_all(&0_usize.to_be_bytes()).unwrap();
        let mut source = Source::new(&server);
        for round in 0..2 {
            let received = soon(poll_fn(|cx| source.poll_receive(cx))).await.unwrap();
            let Received::Bytes(bytes) = received else { panic!("{received:?}") };
            let sent_in = bytes.with(|bytes| usize::from_be_bytes(bytes.try_into().unwrap()));
            let since = runs.get() - sent_in;
            assert!(round == 0 || since <= 1, "{since} others ran before it");
        }
    })
    .unwrap();
}

#[test]
fn small_messages_do_not_starve_bulk() {
    const MESSAGES: usize = 2_000;
    start(Engine::IoUring, async {
        let runs = Rc::new(Cell::new(0_usize));
        let (_peer, socket) = readable();
        let counted = Rc::clone(&runs);
        spawn(always_ready(socket, move || counted.set(counted.get() + 1)));
        let (one, other) = pair();
        let one = Socket::from(one);
        one.set_nonblocking(true).unwrap();
        let echo = |socket: Socket, mut first: bool| async move {
            let mut source = Source::new(&socket);
            for _ in 0..MESSAGES {
                if !std::mem::take(&mut first) {
                    let received = poll_fn(|cx| source.poll_receive(cx)).await.unwrap();
                    assert!(matches!(received, Received::Bytes(_)));
                }
                socket::send(socket.as_fd(), b"ping").unwrap();
            }
        };
        let both = [joined(echo(one, true)), joined(echo(other, false))];
        for done in both {
            soon(done).await.unwrap();
        }
        // One round in two: then it has to be waited for again.
        assert!(runs.get() >= MESSAGES / 2, "{} runs", runs.get());
    })
    .unwrap();
}

/// What is begun later by the same task is not.
#[test]
fn it_is_bulk_only_while_it_says_so() {
    start(Engine::IoUring, async {
        let (_peers, sockets): (Vec<_>, Vec<_>) = (0..4).map(|_| readable()).unzip();
        let order = Rc::new(std::cell::RefCell::new(Vec::new()));
        let tasks: Vec<_> = sockets
            .into_iter()
            .enumerate()
            .map(|(i, socket)| {
                let order = Rc::clone(&order);
                joined(async move {
                    let mut source = Source::new(&socket);
                    poll_fn(|cx| {
                        let _bulk = (i < 2).then(Bulk::begin);
                        source.poll_readable(cx)
                    })
                    .await
                    .unwrap();
                    order.borrow_mut().push(i);
                })
            })
            .collect();
        for task in tasks {
            soon(task).await.unwrap();
        }
        assert_eq!(*order.borrow(), [2, 3, 0, 1]);
    })
    .unwrap();
}
