//! One HTTP or gRPC check: a request, and what its response says.

use std::io;
use std::ops::Range;

use http_body_util::{BodyExt as _, Full};
use hyper::body::{Bytes, Incoming};
use hyper::client::conn::{http1, http2};
use hyper::header::HOST;
use hyper::http::uri::{Scheme, Uri};
use hyper::{HeaderMap, Request, Response, Version};
use hyper_util::rt::{TokioExecutor, TokioIo};
use prost::Message as _;
use tokio::task::JoinSet;

use super::event::Failure;
use super::tcp::{MAX_UNMATCHED, Way, connect, contains};
use crate::config::health_check::HttpHealthCheck;

/// The response says that the host is to be used only when there are too few others.
const DEGRADED: &str = "x-envoy-degraded";
/// The service that has answered.
const SERVICE: &str = "x-envoy-upstream-healthchecked-cluster";

/// What a response means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Verdict {
    /// The host is healthy.
    Healthy { degraded: bool },
    /// It isn't.
    Unhealthy(Failure),
}

/// A connection that checks one host, perhaps several times. It ends on drop.
#[derive(Debug)]
pub(super) struct Connection {
    sender: Sender,
    _connection: JoinSet<()>,
}

#[derive(Debug)]
enum Sender {
    Http1(http1::SendRequest<Full<Bytes>>),
    Http2(http2::SendRequest<Full<Bytes>>),
}

impl Connection {
    pub(super) async fn open(way: &Way<'_>, check: &HttpHealthCheck) -> io::Result<Self> {
        let stream = TokioIo::new(connect(way).await?);
        let mut tasks = JoinSet::new();
        // How a connection ends is seen by whoever asks next.
        let sender = if check.http2 {
            let (sender, connection) =
                http2::handshake(TokioExecutor::new(), stream).await.map_err(io::Error::other)?;
            tasks.spawn(async { drop(connection.await) });
            Sender::Http2(sender)
        } else {
            let (sender, connection) = http1::handshake(stream).await.map_err(io::Error::other)?;
            tasks.spawn(async { drop(connection.await) });
            Sender::Http1(sender)
        };
        Ok(Self { sender, _connection: tasks })
    }

    /// Whether it takes another request: the server may have closed it meanwhile.
    pub(super) async fn is_ready(&mut self) -> bool {
        match &mut self.sender {
            Sender::Http1(sender) => sender.ready().await.is_ok(),
            Sender::Http2(sender) => sender.ready().await.is_ok(),
        }
    }

    /// Asks. The error says that there was no response.
    pub(super) async fn ask(&mut self, check: &HttpHealthCheck) -> io::Result<Verdict> {
        let (head, body) = self.send(check).await?.into_parts();
        let most = match check.response_buffer_size {
            _ if check.receive.is_empty() => 0,
            Some(most) => most.min(MAX_UNMATCHED),
            None => MAX_UNMATCHED,
        };
        let (body, _) = read(body, most).await?;
        Ok(verdict(check, &Response::from_parts(head, body)))
    }

    /// The same of a gRPC check.
    pub(super) async fn call(&mut self, check: &HttpHealthCheck) -> io::Result<Verdict> {
        let (mut head, body) = self.send(check).await?.into_parts();
        let (body, trailers) = read(body, MAX_UNMATCHED).await?;
        // A response without a message has its status among the headers.
        head.headers.extend(trailers);
        Ok(grpc_verdict(&Response::from_parts(head, body)))
    }

    async fn send(&mut self, check: &HttpHealthCheck) -> io::Result<Response<Incoming>> {
        let request = request(check)?;
        let response = match &mut self.sender {
            Sender::Http1(sender) => sender.send_request(request).await,
            Sender::Http2(sender) => sender.send_request(request).await,
        };
        response.map_err(io::Error::other)
    }
}

fn request(check: &HttpHealthCheck) -> io::Result<Request<Full<Bytes>>> {
    let path = check.path.clone();
    let mut headers = HeaderMap::new();
    let mut uri = Uri::from(path.clone());
    if check.http2 {
        let parts = Uri::builder().scheme(Scheme::HTTP).authority(check.host.as_bytes()).path_and_query(path);
        uri = parts.build().map_err(io::Error::other)?;
    } else {
        headers.insert(HOST, check.host.clone());
    }
    headers.extend(check.headers.clone());
    let mut request = Request::new(Full::new(Bytes::from(check.send.clone())));
    *request.method_mut() = check.method.clone();
    *request.uri_mut() = uri;
    *request.version_mut() = if check.http2 { Version::HTTP_2 } else { Version::HTTP_11 };
    *request.headers_mut() = headers;
    Ok(request)
}

/// Reads a body to its end, and keeps its first bytes, and its trailers.
async fn read(mut body: Incoming, most: usize) -> io::Result<(Vec<u8>, HeaderMap)> {
    let (mut kept, mut trailers) = (Vec::new(), HeaderMap::new());
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(io::Error::other)?;
        match frame.into_data() {
            Ok(data) => {
                let wanted = data.len().min(most - kept.len());
                kept.extend_from_slice(&data[..wanted]);
            }
            Err(frame) => trailers.extend(frame.into_trailers().unwrap_or_default()),
        }
    }
    Ok((kept, trailers))
}

/// `grpc.health.v1.HealthCheckResponse`
#[derive(Clone, Copy, PartialEq, Eq, prost::Message)]
struct HealthCheckResponse {
    #[prost(int32, tag = "1")]
    status: i32,
}

/// Of its `ServingStatus`.
const SERVING: i32 = 1;

/// Whatever is not said to serve, doesn't.
fn grpc_verdict(response: &Response<Vec<u8>>) -> Verdict {
    let succeeded = response.status().is_success()
        && response.headers().get("grpc-status").is_some_and(|status| status.as_bytes() == b"0");
    let message = match response.body().split_first_chunk::<5>() {
        Some(([0, a, b, c, d], message))
            if u32::from_be_bytes([*a, *b, *c, *d]) as usize == message.len() =>
        {
            HealthCheckResponse::decode(message).ok()
        }
        _ => None,
    };
    if succeeded && message.is_some_and(|message| message.status == SERVING) {
        Verdict::Healthy { degraded: false }
    } else {
        // Envoy's events have no status of HTTP here.
        Verdict::Unhealthy(Failure::Active { status: 0, at_once: true })
    }
}

fn verdict(check: &HttpHealthCheck, response: &Response<Vec<u8>>) -> Verdict {
    let status = response.status().as_u16();
    let is_in = |ranges: &[Range<u16>]| ranges.iter().any(|range| range.contains(&status));
    let unhealthy = |at_once| Verdict::Unhealthy(Failure::Active { status, at_once });
    let is_expected = is_in(&check.expected) || check.expected.is_empty() && status == 200;
    if !is_expected {
        return unhealthy(!is_in(&check.retriable));
    }
    let is_right_service = check.service_name.as_ref().is_none_or(|wanted| {
        let name = response.headers().get(SERVICE).and_then(|name| name.to_str().ok());
        name.is_some_and(|name| wanted.pattern.matches(name, wanted.ignore_case))
    });
    if !is_right_service || !contains(response.body(), &check.receive) {
        return unhealthy(true);
    }
    Verdict::Healthy { degraded: response.headers().contains_key(DEGRADED) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::health_check::ServiceName;
    use crate::config::tls::StringMatch;

    fn check() -> HttpHealthCheck {
        HttpHealthCheck::get("c".parse().unwrap(), "/healthz".parse().unwrap())
    }

    fn response(status: u16, headers: &[(&'static str, &str)], body: &str) -> Response<Vec<u8>> {
        let mut response = Response::new(body.as_bytes().to_vec());
        *response.status_mut() = status.try_into().unwrap();
        for (name, value) in headers {
            response.headers_mut().insert(*name, value.parse().unwrap());
        }
        response
    }

    #[test]
    fn what_a_response_means() {
        let unhealthy = |status, at_once| Verdict::Unhealthy(Failure::Active { status, at_once });
        let healthy = |degraded| Verdict::Healthy { degraded };
        let plain = check();
        for (status, expected) in
            [(200, healthy(false)), (201, unhealthy(201, true)), (503, unhealthy(503, true))]
        {
            assert_eq!(verdict(&plain, &response(status, &[], "")), expected);
        }
        assert_eq!(verdict(&plain, &response(200, &[(DEGRADED, "")], "")), healthy(true));
        let (expected, retriable) = (vec![200..205, 301..302], vec![429..430, 500..600]);
        let ranges = HttpHealthCheck { expected, retriable, ..check() };
        for (status, expected) in [
            (204, healthy(false)),
            (301, healthy(false)),
            (200, healthy(false)),
            (205, unhealthy(205, true)),
            (429, unhealthy(429, false)),
            (503, unhealthy(503, false)),
            (600, unhealthy(600, true)),
        ] {
            assert_eq!(verdict(&ranges, &response(status, &[], "")), expected);
        }
        let body = HttpHealthCheck { receive: vec![b"el".to_vec(), b"o".to_vec()], ..check() };
        assert_eq!(verdict(&body, &response(200, &[], "hello")), healthy(false));
        assert_eq!(verdict(&body, &response(200, &[], "hole")), unhealthy(200, true));
        let name = ServiceName { pattern: StringMatch::Prefix("x".into()), ignore_case: false };
        let service = HttpHealthCheck { service_name: Some(name), ..check() };
        assert_eq!(verdict(&service, &response(200, &[(SERVICE, "xyz")], "")), healthy(false));
        assert_eq!(verdict(&service, &response(200, &[(SERVICE, "yz")], "")), unhealthy(200, true));
        assert_eq!(verdict(&service, &response(200, &[], "")), unhealthy(200, true));
    }

    #[test]
    fn only_who_says_so_serves() {
        let message = |status: i32| [&[0, 0, 0, 0, 2][..], &[8, status as u8]].concat();
        let answer = |status: &str, body: &[u8]| {
            let mut response = response(200, &[("grpc-status", status)], "");
            *response.body_mut() = body.to_vec();
            grpc_verdict(&response)
        };
        let unhealthy = Verdict::Unhealthy(Failure::Active { status: 0, at_once: true });
        assert_eq!(answer("0", &message(SERVING)), Verdict::Healthy { degraded: false });
        for (status, body) in [
            ("0", message(2)),
            ("0", message(3)),
            ("0", vec![]),
            ("0", vec![0; 5]),
            ("0", vec![0, 0, 0, 0, 2, 8]),
            ("0", vec![1, 0, 0, 0, 2, 8, 1]),
            ("12", message(SERVING)),
        ] {
            assert_eq!(answer(status, &body), unhealthy, "{status} {body:?}");
        }
        let mut other = response(503, &[("grpc-status", "0")], "");
        *other.body_mut() = message(SERVING);
        assert_eq!(grpc_verdict(&other), unhealthy);
    }
}
