//! The loop, on real sockets and on both engines.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

use super::*;
use crate::config::access_log::AccessLog;
use crate::config::listener::{ProxyProtocolVersion, TrafficDirection};
use crate::uring::Engine;

fn listener(filters: Vec<ListenerFilter>) -> Listener {
    Listener {
        name: "l".into(),
        addresses: vec!["127.0.0.1:1".parse().unwrap()],
        bind_to_port: true,
        use_original_dst: false,
        filter_chains: vec![],
        default_filter_chain: None,
        listener_filters: filters,
        // Guards against hanging only; tests of the timeout set their own.
        listener_filters_timeout: Some(Duration::from_secs(50)),
        continue_on_listener_filters_timeout: false,
        traffic_direction: TrafficDirection::Unspecified,
        access_log: Vec::<AccessLog>::new(),
        per_connection_buffer_limit_bytes: 1 << 20,
        tcp_backlog_size: None,
        enable_reuse_port: true,
        transparent: false,
        freebind: false,
        tcp_keepalive: None,
        socket_options: vec![],
        overrides: vec![],
        tcp_fast_open_queue_length: None,
        max_connections_to_accept_per_socket_event: None,
        exact_balance: false,
        stat_prefix: None,
        connection_limit: None,
        ignore_global_conn_limit: false,
        content: 0,
    }
}

fn tls() -> ListenerFilter {
    ListenerFilter::TlsInspector {
        max_client_hello_size: 16_384,
        close_connection_on_client_hello_parsing_errors: false,
    }
}

fn hello() -> Vec<u8> {
    tls_inspector::tests::records(&tls_inspector::tests::message(Some("foo.example.com"), &["h2"], 3000), 700)
}

/// What came of the filters, and what is left in the stream when they are done.
struct Outcome {
    result: Result<(), Ended>,
    inspected: Inspected,
    rest: Vec<u8>,
    stats: Arc<Stats>,
    low_water: libc::c_int,
}

/// Runs the filters of `listener` on one end of a connection while `client` has the other one.
fn inspect_with(
    engine: Engine,
    listener: &Listener,
    client: impl FnOnce(TcpStream) + Send + 'static,
) -> Outcome {
    let accepting = TcpListener::bind("127.0.0.1:0").unwrap();
    let peer = TcpStream::connect(accepting.local_addr().unwrap()).unwrap();
    peer.set_nodelay(true).unwrap();
    let socket = Socket::from(accepting.accept().unwrap().0);
    socket.set_nonblocking(true).unwrap();
    let client = thread::spawn(move || client(peer));
    let stats = Stats::new(1);
    let mut inspected = Inspected::default();
    let result = uring::start(engine, run(&socket, listener, &stats, &mut inspected)).unwrap();
    let low_water = socket::receive_low_water(socket.as_fd()).unwrap();
    let mut rest = Vec::new();
    let mut stream = TcpStream::from(socket);
    if result.is_ok() {
        stream.set_nonblocking(false).unwrap();
        stream.read_to_end(&mut rest).unwrap();
    }
    drop(stream);
    client.join().unwrap();
    Outcome { result, inspected, rest, stats, low_water }
}

fn both(listener: &Listener, client: impl Fn(TcpStream) + Clone + Send + 'static, check: impl Fn(Outcome)) {
    for engine in [Engine::IoUring, Engine::TokioUring, Engine::Epoll] {
        check(inspect_with(engine, listener, client.clone()));
    }
}

/// Sends the bytes in pieces of this size, each in a segment of its own, and then a FIN.
fn sending(bytes: Vec<u8>, piece: usize) -> impl Fn(TcpStream) + Clone + Send + 'static {
    move |mut stream| {
        for piece in bytes.chunks(piece) {
            // The other end may have refused the beginning already.
            let _ = stream.write_all(piece);
            thread::sleep(Duration::from_millis(2));
        }
        let _ = stream.shutdown(Shutdown::Write);
        // Until the other end is done with it, so that no RST can throw away what it has not read.
        let _ = stream.read(&mut [0]);
    }
}

#[test]
fn a_client_hello_in_many_segments_is_found_and_left_in_the_stream() {
    let sent = [hello(), b"application data".to_vec()].concat();
    both(&listener(vec![tls()]), sending(sent.clone(), 97), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!(outcome.inspected.transport_protocol, "tls");
        assert_eq!(outcome.inspected.server_name.as_deref(), Some("foo.example.com"));
        assert_eq!(outcome.rest, sent);
        assert_eq!(outcome.low_water, 1);
        assert_eq!(outcome.stats.tls_inspector().tls_found().value(), 1);
        assert_eq!(outcome.stats.tls_inspector().sni_found().value(), 1);
    });
}

#[test]
fn plaintext_is_passed_on_as_soon_as_it_is_known() {
    both(&listener(vec![tls()]), sending(b"hello".to_vec(), 1), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!((outcome.inspected.transport_protocol, &outcome.rest[..]), ("", &b"hello"[..]));
        assert_eq!(outcome.stats.tls_inspector().tls_not_found().value(), 1);
    });
}

#[test]
fn inspectors_run_one_after_the_other_on_the_same_bytes() {
    let request = b"GET / HTTP/1.1\r\n\r\n".to_vec();
    both(&listener(vec![tls(), ListenerFilter::HttpInspector]), sending(request.clone(), 3), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!(outcome.inspected.application_protocols, ["http/1.1".into()]);
        assert_eq!(outcome.rest, request);
    });
}

#[test]
fn a_proxy_header_is_taken_to_the_byte_and_what_follows_is_inspected() {
    let header = b"PROXY TCP4 10.0.0.9 172.16.0.1 12345 50001\r\n".to_vec();
    let sent = [header, hello()].concat();
    both(&listener(vec![ListenerFilter::proxy_protocol(), tls()]), sending(sent, 11), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!(outcome.inspected.source, Some("10.0.0.9:12345".parse().unwrap()));
        assert_eq!(outcome.inspected.destination, Some("172.16.0.1:50001".parse().unwrap()));
        assert_eq!(outcome.inspected.server_name.as_deref(), Some("foo.example.com"));
        assert_eq!(outcome.rest, hello());
        assert_eq!(outcome.stats.proxy_protocol("").v1_found().value(), 1);
    });
}

#[test]
fn a_long_version_2_header_is_taken_whole() {
    let tlv = [&[0x20, 0xf0, 0x00][..], &vec![7; 0xf000]].concat();
    let addresses = [10, 0, 0, 9, 172, 16, 0, 1, 0x30, 0x39, 0xc3, 0x51];
    let header = proxy_protocol::tests::v2(0x21, 0x11, &[&addresses[..], &tlv].concat());
    let sent = [header, b"rest".to_vec()].concat();
    both(&listener(vec![ListenerFilter::proxy_protocol()]), sending(sent, 8192), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!(outcome.inspected.source, Some("10.0.0.9:12345".parse().unwrap()));
        assert_eq!(outcome.rest, b"rest");
    });
}

#[test]
fn bad_and_missing_proxy_headers_are_refused_and_counted() {
    both(
        &listener(vec![ListenerFilter::proxy_protocol()]),
        sending(b"PROXY TCP4 nonsense\r\n".to_vec(), 9),
        |outcome| {
            assert!(matches!(outcome.result, Err(Ended::Refused)), "{:?}", outcome.result);
            assert_eq!(outcome.stats.proxy_protocol("").v1_error().value(), 1);
        },
    );
    both(&listener(vec![ListenerFilter::proxy_protocol()]), sending(b"hello".to_vec(), 9), |outcome| {
        assert!(matches!(outcome.result, Err(Ended::Refused)), "{:?}", outcome.result);
        assert_eq!(outcome.stats.proxy_protocol("").not_found_disallowed().value(), 1);
    });
    let optional = ListenerFilter::ProxyProtocol {
        allow_requests_without_proxy_protocol: true,
        disallowed_versions: vec![ProxyProtocolVersion::V1],
        stat_prefix: "".into(),
    };
    let line = b"PROXY UNKNOWN\r\n".to_vec();
    both(&listener(vec![optional]), sending(line.clone(), 99), |outcome| {
        assert!(outcome.result.is_ok(), "{:?}", outcome.result);
        assert_eq!(outcome.rest, line, "a disallowed version is not looked for");
        assert_eq!(outcome.stats.proxy_protocol("").not_found_allowed().value(), 1);
    });
}

#[test]
fn a_fin_before_the_end_of_the_inspection_ends_the_connection() {
    both(&listener(vec![ListenerFilter::HttpInspector]), sending(b"hello".to_vec(), 5), |outcome| {
        assert!(matches!(outcome.result, Err(Ended::RemoteClose)), "{:?}", outcome.result);
        assert_eq!(outcome.low_water, 1);
    });
    both(&listener(vec![tls()]), sending(vec![], 1), |outcome| {
        assert!(matches!(outcome.result, Err(Ended::RemoteClose)), "{:?}", outcome.result);
    });
}

#[test]
fn a_reset_ends_the_connection() {
    let reset = |mut stream: TcpStream| {
        stream.write_all(&hello()[..50]).unwrap();
        thread::sleep(Duration::from_millis(20));
        Socket::from(stream).set_linger(Some(Duration::ZERO)).unwrap();
    };
    both(&listener(vec![tls()]), reset, |outcome| {
        assert!(matches!(outcome.result, Err(Ended::RemoteClose)), "{:?}", outcome.result);
    });
}

#[test]
fn the_timeout_ends_the_connection_or_the_inspection() {
    let waiting = |mut stream: TcpStream| {
        stream.write_all(&hello()[..50]).unwrap();
        let mut rest = Vec::new();
        let _ = stream.set_read_timeout(Some(Duration::from_secs(5)));
        thread::sleep(Duration::from_millis(300));
        let _ = stream.shutdown(Shutdown::Write);
        let _ = stream.read_to_end(&mut rest);
    };
    let mut config = listener(vec![tls(), ListenerFilter::HttpInspector]);
    config.listener_filters_timeout = Some(Duration::from_millis(50));
    both(&config, waiting, |outcome| {
        assert!(matches!(outcome.result, Err(Ended::Timeout)), "{:?}", outcome.result);
        assert_eq!(outcome.low_water, 1);
    });
    config.continue_on_listener_filters_timeout = true;
    both(&config, waiting, |outcome| {
        assert!(outcome.result.is_ok() && outcome.inspected.timed_out, "{:?}", outcome.result);
        assert_eq!((outcome.inspected.transport_protocol, outcome.rest.len()), ("", 50));
    });
}

/// Peeked bytes keep a socket readable: waiting for more of them must not spin.
#[test]
fn waiting_for_the_rest_of_a_hello_costs_no_cpu() {
    fn thread_cpu() -> Duration {
        use nix::sys::resource::{UsageWho, getrusage};
        let usage = getrusage(UsageWho::RUSAGE_THREAD).unwrap();
        let times = [usage.user_time(), usage.system_time()];
        times
            .map(|time| Duration::from_micros((time.tv_sec() * 1_000_000 + time.tv_usec()) as u64))
            .iter()
            .sum()
    }
    let slow = |mut stream: TcpStream| {
        let hello = hello();
        stream.write_all(&hello[..100]).unwrap();
        thread::sleep(Duration::from_millis(700));
        stream.write_all(&hello[100..]).unwrap();
        stream.shutdown(Shutdown::Write).unwrap();
        let _ = stream.read(&mut [0]);
    };
    both(&listener(vec![tls()]), slow, |outcome| assert!(outcome.result.is_ok(), "{:?}", outcome.result));
    let before = thread_cpu();
    both(&listener(vec![tls()]), slow, |_| {});
    let spent = thread_cpu().saturating_sub(before);
    // Two runs of 700 ms each: a loop that spins would spend nearly all of it, one that waits about 1 ms.
    assert!(spent < Duration::from_millis(350), "{spent:?} of CPU in 1.4 s of waiting");
}

#[test]
fn proxy_protocol_stats_are_kept_by_prefix() {
    let filter = ListenerFilter::ProxyProtocol {
        allow_requests_without_proxy_protocol: false,
        disallowed_versions: Vec::new(),
        stat_prefix: "edge".into(),
    };
    both(&listener(vec![filter]), sending(b"PROXY TCP4 nonsense\r\n".to_vec(), 21), |outcome| {
        assert!(matches!(outcome.result, Err(Ended::Refused)), "{:?}", outcome.result);
        assert_eq!(outcome.stats.proxy_protocol("edge").v1_error().value(), 1);
        assert_eq!(outcome.stats.proxy_protocol("").v1_error().value(), 0);
        assert_eq!(outcome.stats.root().downstream_cx_proxy_proto_error().value(), 1);
    });
}
