//! Looking for the next message instead of sleeping.

use super::*;
use std::time::Instant;

/// Longer than anything here takes: whatever has to end a look, and does not, is seen.
const WINDOW: Duration = Duration::from_secs(20);

async fn receive(source: &mut Source<&Socket>) -> Vec<u8> {
    match soon(poll_fn(|cx| source.poll_receive(cx))).await.unwrap() {
        Received::Bytes(bytes) => bytes.with(<[u8]>::to_vec),
        other => panic!("{other:?}"),
    }
}

/// Answers so many messages of a client on another thread: from the first few on each wait begins with a look.
async fn converse(socket: &Socket, mut client: TcpStream, messages: u32) -> TcpStream {
    let client = std::thread::spawn(move || {
        for number in 0..messages {
            client.write_all(&number.to_be_bytes()).unwrap();
            let mut answer = [0; 4];
            client.read_exact(&mut answer).unwrap();
            assert_eq!(u32::from_be_bytes(answer), number);
        }
        client
    });
    let mut source = Source::new(socket);
    for number in 0..messages {
        let message = receive(&mut source).await;
        assert_eq!(message, number.to_be_bytes());
        socket::send(socket.as_fd(), &message).unwrap();
    }
    source.settle_receiving();
    client.join().unwrap()
}

#[test]
fn a_look_ends_with_messages_wakes_and_timers() {
    start(Engine::IoUring, async {
        set_busy_poll(WINDOW);
        let (client, server) = pair();
        let client = converse(&server, client, 200).await;
        let began = Instant::now();
        let (sender, receiver) = oneshot::channel();
        let other = std::thread::spawn(move || {
            std::thread::sleep(Duration::from_millis(20));
            sender.send(()).unwrap();
        });
        receiver.await.unwrap();
        assert!(began.elapsed() < WINDOW, "a waker on another thread");
        other.join().unwrap();

        let began = Instant::now();
        time::sleep(Duration::from_millis(20)).await;
        assert!(began.elapsed() < WINDOW, "a timer");

        let began = Instant::now();
        drop(client);
        ready(server.as_fd(), Interest::Readable).await.unwrap();
        assert!(began.elapsed() < WINDOW, "the end of a connection");
    })
    .unwrap();
}
