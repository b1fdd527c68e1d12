use super::*;
use crate::sys::forbid::forbid;
use crate::sys::socket::{ListenerOptions, StreamOptions, listen, local_addr, stream};
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::AsRawFd;
use std::rc::Rc;
use std::time::Duration;

use tokio::sync::oneshot;

mod bulk;
mod busy_poll;
mod receive;

const ALL: [Engine; 3] = [Engine::IoUring, Engine::TokioUring, Engine::Epoll];

/// A blocking client, and the nonblocking socket under test.
fn pair() -> (TcpStream, Socket) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let client = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    client.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    let server: Socket = listener.accept().unwrap().0.into();
    server.set_nonblocking(true).unwrap();
    (client, server)
}

/// Spawns a task whose output is wanted.
fn joined<T: 'static>(future: impl Future<Output = T> + 'static) -> oneshot::Receiver<T> {
    let (sender, receiver) = oneshot::channel();
    spawn(async move { drop(sender.send(future.await)) });
    receiver
}

/// Fails instead of hanging.
async fn soon<F: Future>(future: F) -> F::Output {
    time::timeout(Duration::from_secs(10), future).await.expect("not within 10 s")
}

/// Whether it is still pending after the runtime had every chance to complete it.
async fn still_pending<F: Future>(future: F) -> bool {
    time::timeout(Duration::from_millis(100), future).await.is_err()
}

/// Sends until nothing more is taken.
async fn fill(socket: &Socket) -> usize {
    let mut sent = 0;
    let chunk = vec![7; 1 << 16];
    for _ in 0..20 {
        while let Ok(n) = socket::send(socket.as_fd(), &chunk) {
            sent += n;
        }
        time::sleep(Duration::from_millis(5)).await;
    }
    sent
}

/// What a blocking read on the peer's side ends with.
fn end_of(client: &mut TcpStream) -> io::Result<usize> {
    let mut buffer = vec![0; 1 << 16];
    loop {
        match client.read(&mut buffer) {
            Ok(0) => return Ok(0),
            Ok(_) => {}
            Err(e) => return Err(e),
        }
    }
}

#[test]
fn probe_finds_a_usable_ring_here() {
    let (engine, refused) = best();
    assert_eq!(engine, Engine::IoUring);
    assert!(refused.is_none());
}

#[test]
fn local_tasks_timers_and_results() {
    for engine in ALL {
        let answer = start(engine, async {
            let task = joined(async {
                time::sleep(Duration::from_millis(1)).await;
                41
            });
            task.await.unwrap() + 1
        });
        assert_eq!(answer.unwrap(), 42);
    }
}

#[test]
fn readable_waits_for_bytes_and_for_fin() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let mut source = Source::new(&server);
            // Stays pending across several polls of the task, and across dropped futures.
            assert!(still_pending(poll_fn(|cx| source.poll_readable(cx))).await);
            client.write_all(b"x").unwrap();
            assert!(soon(poll_fn(|cx| source.poll_readable(cx))).await.unwrap().is_readable());
            assert_eq!(socket::receive(server.as_fd(), &mut [0; 4]).unwrap(), 1);
            client.shutdown(Shutdown::Write).unwrap();
            loop {
                assert!(soon(poll_fn(|cx| source.poll_readable(cx))).await.unwrap().is_readable());
                match socket::receive(server.as_fd(), &mut [0; 4]) {
                    Ok(n) => break assert_eq!(n, 0),
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
        })
        .unwrap();
    }
}

/// io_uring adds EPOLLRDHUP to every poll: a naive wait completes at once after the peer's FIN, for ever.
#[test]
fn writable_waits_although_the_peer_has_sent_its_fin() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let sent = fill(&server).await;
            client.shutdown(Shutdown::Write).unwrap();
            let mut source = Source::new(&server);
            let mut wakes = 0;
            let spin = poll_fn(|cx| {
                loop {
                    if source.poll_writable(cx).is_pending() {
                        return Poll::<()>::Pending;
                    }
                    wakes += 1;
                    assert!(wakes < 10, "{engine}: spins");
                }
            });
            assert!(still_pending(spin).await);
            let reader = std::thread::spawn(move || {
                let mut left = sent;
                let mut buffer = vec![0; 1 << 16];
                while left > 0 {
                    left = left.saturating_sub(client.read(&mut buffer).unwrap());
                }
                client
            });
            loop {
                soon(poll_fn(|cx| source.poll_writable(cx))).await.unwrap();
                match socket::send(server.as_fd(), b"x") {
                    Ok(n) => break assert_eq!(n, 1),
                    Err(e) => assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
                }
            }
            while !reader.is_finished() {
                time::sleep(Duration::from_millis(1)).await;
            }
        })
        .unwrap();
    }
}

#[test]
fn hang_up_is_the_reset_and_not_the_fin() {
    for engine in ALL {
        start(engine, async {
            let (client, server) = pair();
            let mut source = Source::new(&server);
            assert!(still_pending(poll_fn(|cx| source.poll_hang_up(cx))).await);
            client.shutdown(Shutdown::Write).unwrap();
            assert!(still_pending(poll_fn(|cx| source.poll_hang_up(cx))).await);
            let client = Socket::from(client);
            client.set_linger(Some(Duration::ZERO)).unwrap();
            drop(client);
            assert!(soon(poll_fn(|cx| source.poll_hang_up(cx))).await.unwrap().is_hung_up());
            // After the peer's FIN the kernel reports its reset as EPIPE.
            assert_eq!(socket::error(server.as_fd()).unwrap().unwrap().raw_os_error(), Some(libc::EPIPE));
        })
        .unwrap();
    }
}

#[test]
fn both_directions_wait_in_one_task() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let sent = fill(&server).await;
            let mut source = Source::new(&server);
            let mut both = poll_fn(|cx| {
                let writable = source.poll_writable(cx).is_ready();
                let readable = source.poll_readable(cx).is_ready();
                if writable || readable { Poll::Ready((readable, writable)) } else { Poll::Pending }
            });
            assert!(still_pending(&mut both).await);
            client.write_all(b"x").unwrap();
            let (readable, writable) = soon(&mut both).await;
            assert!(readable && !writable, "{engine}");
            let mut left = sent;
            let mut buffer = vec![0; 1 << 20];
            while left > 0 {
                left -= client.read(&mut buffer).unwrap();
            }
            let _ = socket::receive(server.as_fd(), &mut [0; 4]);
            soon(poll_fn(|cx| source.poll_writable(cx))).await.unwrap();
        })
        .unwrap();
    }
}

/// Without the cancellation the peer would see nothing, for ever, and the file would leak.
#[test]
fn dropping_a_pending_wait_lets_the_close_through() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let mut source = Source::new(server);
            let _ = still_pending(poll_fn(|cx| source.poll_readable(cx))).await;
            drop(source);
            // The entry reaches the kernel when this thread parks.
            time::sleep(Duration::from_millis(1)).await;
            assert_eq!(end_of(&mut client).unwrap(), 0, "{engine}: a FIN");

            let (mut client, server) = pair();
            let mut source = Source::new(server);
            let _ = still_pending(poll_fn(|cx| source.poll_readable(cx))).await;
            socket::reset_on_close(source.fd()).unwrap();
            drop(source);
            time::sleep(Duration::from_millis(1)).await;
            assert_eq!(end_of(&mut client).unwrap_err().kind(), io::ErrorKind::ConnectionReset, "{engine}");
        })
        .unwrap();
    }
}

#[test]
fn closing_gracefully_completes_the_waits_and_sends_a_fin() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let mut source = Source::new(&server);
            let _ = still_pending(poll_fn(|cx| source.poll_readable(cx))).await;
            socket::send(server.as_fd(), b"last").unwrap();
            close_gracefully(server.as_fd());
            source.release();
            drop(source);
            drop(server);
            time::sleep(Duration::from_millis(1)).await;
            let mut buffer = Vec::new();
            client.read_to_end(&mut buffer).unwrap();
            assert_eq!(buffer, b"last", "{engine}");
        })
        .unwrap();
    }
}

#[test]
fn reset_completes_the_waits_and_is_a_reset() {
    for engine in ALL {
        start(engine, async {
            let (mut client, server) = pair();
            let mut source = Source::new(&server);
            let _ = still_pending(poll_fn(|cx| source.poll_readable(cx))).await;
            assert!(reset(server.as_fd()));
            source.release();
            drop(source);
            drop(server);
            assert_eq!(end_of(&mut client).unwrap_err().kind(), io::ErrorKind::ConnectionReset, "{engine}");
        })
        .unwrap();
    }
}

#[test]
fn cancelling_one_wait_leaves_the_others_of_the_file() {
    start(Engine::TokioUring, async {
        let (mut client, server) = pair();
        let mut kept = Source::new(&server);
        assert!(still_pending(poll_fn(|cx| kept.poll_readable(cx))).await);
        assert!(still_pending(ready(server.as_fd(), Interest::Readable)).await, "dropped: cancels both");
        assert!(still_pending(poll_fn(|cx| kept.poll_readable(cx))).await, "starts again by itself");
        client.write_all(b"x").unwrap();
        assert!(soon(poll_fn(|cx| kept.poll_readable(cx))).await.unwrap().is_readable());
    })
    .unwrap();
}

/// More completions at once than the queue has entries: none may be lost.
#[test]
fn an_overflowing_completion_queue_loses_nothing() {
    start(Engine::IoUring, async {
        let (mut client, server) = pair();
        let server = Rc::new(server);
        let waits: Vec<_> = (0..COMPLETIONS * 2)
            .map(|_| {
                let server = Rc::clone(&server);
                joined(async move { ready(server.as_fd(), Interest::Readable).await })
            })
            .collect();
        time::sleep(Duration::from_millis(100)).await;
        client.write_all(b"x").unwrap();
        for wait in waits {
            assert!(soon(wait).await.unwrap().unwrap().is_readable());
        }
    })
    .unwrap();
}

#[test]
fn connects_or_says_why_not() {
    for engine in ALL {
        start(engine, async {
            let listener = listen("127.0.0.1:0".parse().unwrap(), &ListenerOptions::default()).unwrap();
            let address = local_addr(&listener).unwrap();
            let socket = stream(address, &StreamOptions::default()).unwrap();
            soon(connect(&socket, &address.into())).await.unwrap();
            drop(listener);
            let socket = stream(address, &StreamOptions::default()).unwrap();
            let error = soon(connect(&socket, &address.into())).await.unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::ConnectionRefused, "{engine}");
        })
        .unwrap();
    }
}

/// A full accept queue swallows the SYN; giving up must leave no socket behind.
#[test]
fn giving_up_on_a_connect_closes_the_socket() {
    for engine in ALL {
        start(engine, async {
            let options = ListenerOptions { backlog: 0, ..Default::default() };
            let listener = listen("127.0.0.1:0".parse().unwrap(), &options).unwrap();
            let address = local_addr(&listener).unwrap();
            let target = address.into();
            let mut established = Vec::new();
            let local = loop {
                assert!(established.len() < 8, "the accept queue never fills");
                let socket = stream(address, &StreamOptions::default()).unwrap();
                let connected = time::timeout(Duration::from_millis(200), connect(&socket, &target));
                match connected.await {
                    Ok(result) => result.unwrap(),
                    Err(_) => break local_addr(&socket).unwrap(),
                }
                established.push(socket);
            };
            let mine = format!(":{:04X} 0100007F:{:04X} 02", local.port(), address.port());
            for attempt in 0.. {
                time::sleep(Duration::from_millis(1)).await;
                if !std::fs::read_to_string("/proc/self/net/tcp").unwrap().contains(&mine) {
                    break;
                }
                assert!(attempt < 1_000, "{engine}: still in SYN_SENT");
            }
        })
        .unwrap();
    }
}

#[test]
fn accepts_all_that_wait_and_frees_the_port() {
    for engine in ALL {
        let address = start(engine, async {
            let listener = listen("127.0.0.1:0".parse().unwrap(), &ListenerOptions::default()).unwrap();
            let address = local_addr(&listener).unwrap();
            let mut acceptor = Acceptor::new(listener);
            assert!(still_pending(acceptor.accept()).await);
            let clients: Vec<_> = (0..5).map(|_| TcpStream::connect(address).unwrap()).collect();
            for client in &clients {
                let (socket, peer) = soon(acceptor.accept()).await.unwrap();
                assert_eq!(peer, client.local_addr().unwrap());
                assert!(socket.nonblocking().unwrap());
            }
            assert!(still_pending(acceptor.accept()).await);
            drop(acceptor);
            time::sleep(Duration::from_millis(1)).await;
            // Without SO_REUSEADDR on ours, any socket that still listened would refuse this.
            let listener = listen(address, &ListenerOptions::default()).unwrap();
            let mut again = Acceptor::new(listener);
            // Left pending by a task at the end of the runtime.
            spawn(async move { drop(again.accept().await) });
            time::sleep(Duration::from_millis(1)).await;
            address
        })
        .unwrap();
        listen(address, &ListenerOptions::default()).unwrap();
    }
}

#[test]
fn no_descriptor_is_left_behind() {
    // Other tests of this process open and close descriptors too, so look for this socket by its inode.
    start(Engine::IoUring, async {
        let (_client, server) = pair();
        let link = std::fs::read_link(format!("/proc/self/fd/{}", server.as_raw_fd())).unwrap();
        let mut source = Source::new(server);
        assert!(still_pending(poll_fn(|cx| source.poll_readable(cx))).await);
        drop(source);
        let open = || {
            std::fs::read_dir("/proc/self/fd")
                .unwrap()
                .flatten()
                .any(|entry| std::fs::read_link(entry.path()).is_ok_and(|l| l == link))
        };
        for attempt in 0.. {
            time::sleep(Duration::from_millis(1)).await;
            if !open() {
                break;
            }
            assert!(attempt < 1_000, "the duplicate stays open");
        }
    })
    .unwrap();
}

#[test]
fn without_io_uring_it_says_so_and_epoll_serves() {
    for (errno, expected) in [(libc::EPERM, "kernel.io_uring_disabled"), (libc::ENOSYS, "5.19")] {
        std::thread::spawn(move || {
            forbid(libc::SYS_io_uring_setup, errno, None);
            let (engine, refused) = best();
            assert_eq!(engine, Engine::Epoll);
            let text = refused.unwrap().to_string();
            assert!(text.contains(expected), "{text}");
            let text = start(Engine::IoUring, async {}).unwrap_err().to_string();
            assert!(text.contains(expected), "{text}");
            start(Engine::Epoll, async {
                let (mut client, server) = pair();
                client.write_all(b"x").unwrap();
                assert!(soon(ready(server.as_fd(), Interest::Readable)).await.unwrap().is_readable());
            })
            .unwrap();
        })
        .join()
        .unwrap();
    }
}

#[test]
fn older_kernels_get_fewer_flags() {
    let mut attempts = 0;
    let result = with_flags(|_| {
        attempts += 1;
        if attempts == 1 { Err(io::Error::from_raw_os_error(libc::EINVAL)) } else { Ok(()) }
    });
    assert!(result.is_ok());
    assert_eq!(attempts, 2);
    let refused = with_flags(|_| Err::<(), _>(io::Error::from_raw_os_error(libc::EINVAL)));
    assert!(matches!(refused, Err(StartError::TooOld)));
}

/// Tasks are woken by other threads, also while the executor waits for the kernel.
#[test]
fn other_threads_wake_tasks_and_the_main_future() {
    for engine in ALL {
        let (sender, mut receiver) = tokio::sync::mpsc::unbounded_channel();
        let (answer, mut answers) = tokio::sync::mpsc::unbounded_channel();
        let asker = std::thread::spawn(move || {
            for i in 0..1_000 {
                sender.send(i).unwrap();
                assert_eq!(answers.blocking_recv(), Some(i));
            }
        });
        start(engine, async {
            let (done, finished) = oneshot::channel();
            spawn(async move {
                while let Some(i) = receiver.recv().await {
                    answer.send(i).unwrap();
                }
                done.send(()).unwrap();
            });
            soon(finished).await.unwrap();
        })
        .unwrap();
        asker.join().unwrap();
    }
}

/// A bug in one connection must not end the others.
#[test]
fn a_panic_ends_its_task_only() {
    for engine in ALL {
        start(engine, async {
            let (_client, server) = pair();
            let (reached, panicked) = oneshot::channel::<()>();
            spawn(async move {
                let _reached = reached;
                let mut source = Source::new(&server);
                poll_fn(|cx| -> Poll<()> {
                    let _ = source.poll_readable(cx);
                    cx.waker().wake_by_ref();
                    panic!("on purpose")
                })
                .await;
            });
            assert!(soon(panicked).await.is_err(), "what it owned is dropped");
            let task = joined(async {
                time::sleep(Duration::from_millis(1)).await;
                1
            });
            assert_eq!(soon(task).await.unwrap(), 1, "{engine}");
        })
        .unwrap();
    }
}

/// What is left at the end is dropped on its thread, whatever it waits for, and may spawn and wake on its way.
#[test]
fn tasks_that_are_left_are_dropped() {
    struct Last(Rc<std::cell::Cell<u32>>);
    impl Drop for Last {
        fn drop(&mut self) {
            self.0.set(self.0.get() + 1);
        }
    }
    for engine in ALL {
        let dropped = Rc::new(std::cell::Cell::new(0));
        start(engine, async {
            let (sender, receiver) = oneshot::channel::<()>();
            for _ in 0..3 {
                let last = Last(Rc::clone(&dropped));
                spawn(async move {
                    let _last = last;
                    time::sleep(Duration::from_hours(1)).await;
                });
            }
            let last = Last(Rc::clone(&dropped));
            spawn(async move {
                let (_last, _sender) = (last, sender);
                std::future::pending::<()>().await;
            });
            let last = Last(Rc::clone(&dropped));
            spawn(async move {
                let _last = last;
                drop(receiver.await);
                std::future::pending::<()>().await;
            });
            time::sleep(Duration::from_millis(1)).await;
            let last = Last(Rc::clone(&dropped));
            spawn(async move { drop(last) }); // never begun, or done
        })
        .unwrap();
        assert_eq!(dropped.get(), 6, "{engine}");
    }
}
