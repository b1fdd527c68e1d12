//! The admin server's access log (`admin.access_log`).

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::Pin;
use std::task::{Context, Poll};

use http_body_util::BodyExt;
use http_body_util::combinators::UnsyncBoxBody;
use hyper::body::{Body, Bytes, Frame, SizeHint};
use hyper::{HeaderMap, Request, Response};

use crate::access_log::{self, AccessLogs, HttpExchange};
use crate::connection::record::Record;

type BoxBody = UnsyncBoxBody<Bytes, Infallible>;

/// A request that is being answered.
pub(super) struct Entry {
    logs: AccessLogs,
    record: Record,
    http: HttpExchange,
}

impl Entry {
    /// Notes a request that came just now.
    pub(super) fn begin<B>(
        logs: &AccessLogs,
        request: &Request<B>,
        peer: SocketAddr,
        local: SocketAddr,
    ) -> Self {
        let mut record = Record::new(0, peer, local, None, "".into());
        // What Envoy says of its own admin server.
        record.details_mut().response_code_details = Some("admin_filter_response");
        let http = HttpExchange {
            method: request.method().clone(),
            uri: request.uri().clone(),
            version: request.version(),
            request: request.headers().clone(),
            status: 0,
            response: HeaderMap::new(),
        };
        Self { logs: logs.clone(), record, http }
    }

    /// Has the entry written once the response has gone out, or the client has.
    pub(super) fn until_sent(mut self, response: Response<BoxBody>) -> Response<BoxBody> {
        self.http.status = response.status().as_u16();
        self.http.response = response.headers().clone();
        response.map(|body| Logged { body, entry: self }.boxed_unsync())
    }
}

/// A body that writes its log entry when it ends.
struct Logged {
    body: BoxBody,
    entry: Entry,
}

impl Body for Logged {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let polled = Pin::new(&mut self.body).poll_frame(cx);
        if let Poll::Ready(Some(Ok(frame))) = &polled {
            self.entry.record.bytes_sent += frame.data_ref().map_or(0, Bytes::len) as u64;
        }
        polled
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

impl Drop for Logged {
    fn drop(&mut self) {
        let Entry { logs, record, http } = &mut self.entry;
        record.duration = Some(record.start.elapsed());
        logs.write_http(record, http);
        // Requests are rare, and no worker's flush comes by on this thread.
        access_log::flush_worker();
    }
}
