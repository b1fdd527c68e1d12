//! Which path does what.

use std::borrow::Cow;
use std::convert::Infallible;
use std::fmt::Write;
use std::sync::Arc;
use std::time::SystemTime;

use http_body_util::{BodyExt, Full, combinators::UnsyncBoxBody};
use hyper::body::{Bytes, Incoming};
use hyper::header::{CACHE_CONTROL, CONTENT_TYPE, HeaderValue, SERVER, X_CONTENT_TYPE_OPTIONS};
use hyper::{Method, Request, Response, StatusCode};
use serde::Serialize;
use serde_json::{Value, json};

use crate::stats::{Format, Query, Stats};

use super::config_dump::{Selection, SelectionError, select};
use super::memory::Memory;
use super::{Drain, ServerState, State, certs, io, logging, view};

type Body = UnsyncBoxBody<Bytes, Infallible>;

/// What a request is answered from.
pub(super) struct Server {
    pub(super) state: Arc<dyn State>,
    pub(super) stats: Arc<Stats>,
}

/// A path.
struct Command {
    path: &'static str,
    /// It changes something: POST only.
    mutates: bool,
    help: &'static str,
    parameters: &'static [(&'static str, &'static str)],
    answer: fn(&Server, &Parameters) -> Answer,
}

/// Decoded query parameters, in order.
pub(super) struct Parameters(Vec<(String, String)>);

enum Answer {
    Text(StatusCode, String),
    Html(String),
    Json(Value),
    /// Errors of `/config_dump` have this type in Envoy.
    Plain(StatusCode, String),
    Stats(Query),
}

const REGEX_HELP: &str = "Regular expression (Google re2) for filtering stats";

/// Paths that show what is counted.
const SHOW_COUNTS: [&str; 3] = ["/clusters", "/stats", "/stats/prometheus"];

/// All paths, sorted as `/help` shows them.
const COMMANDS: &[Command] = &[
    Command {
        path: "/",
        mutates: false,
        help: "Admin home page",
        parameters: &[],
        answer: |_, _| Answer::Html(home()),
    },
    Command {
        path: "/certs",
        mutates: false,
        help: "print certs on machine",
        parameters: &[],
        answer: |server, _| Answer::Json(certs::json(&server.state.certificates(), SystemTime::now())),
    },
    Command {
        path: "/clusters",
        mutates: false,
        help: "upstream cluster status",
        parameters: &[
            ("filter", "Regular expression (Google re2) for filtering clusters by name"),
            ("format", "File format to use; One of (text, json)"),
        ],
        answer: clusters,
    },
    Command {
        path: "/config_dump",
        mutates: false,
        help: "dump current configs",
        parameters: &[
            ("resource", "The resource to dump"),
            (
                "mask",
                "The mask to apply. When both resource and mask are specified, the mask is applied to every element of the repeated field. The mask is parsed as a Protobuf::FieldMask",
            ),
            ("name_regex", "Dump only configurations whose names match. Can be used with resource and mask"),
            ("include_eds", "Dump endpoints too"),
        ],
        answer: config_dump,
    },
    Command {
        path: "/drain_listeners",
        mutates: true,
        help: "drain listeners",
        parameters: &[
            ("graceful", "Let connections drain for the drain time before the listeners are closed"),
            ("skip_exit", "Drain connections, but never stop the listeners"),
            ("inboundonly", "Only listeners with traffic_direction INBOUND"),
        ],
        answer: drain_listeners,
    },
    Command {
        path: "/healthcheck/fail",
        mutates: true,
        help: "cause the server to fail health checks",
        parameters: &[],
        answer: |server, _| done(|| server.state.set_healthy(false)),
    },
    Command {
        path: "/healthcheck/ok",
        mutates: true,
        help: "cause the server to pass health checks",
        parameters: &[],
        answer: |server, _| done(|| server.state.set_healthy(true)),
    },
    Command {
        path: "/help",
        mutates: false,
        help: "print out list of admin commands",
        parameters: &[],
        answer: |_, _| Answer::Text(StatusCode::OK, format!("admin commands are:\n{}", list())),
    },
    Command {
        path: "/hot_restart_version",
        mutates: false,
        help: "print the hot restart compatibility version",
        parameters: &[],
        answer: |_, _| Answer::Text(StatusCode::OK, "disabled".into()),
    },
    Command {
        path: "/init_dump",
        mutates: false,
        help: "dump targets that are not ready",
        parameters: &[],
        answer: |server, _| Answer::Json(server.state.init_dump()),
    },
    Command {
        path: "/listeners",
        mutates: false,
        help: "print listener info",
        parameters: &[("format", "File format to use; One of (text, json)")],
        answer: listeners,
    },
    Command {
        // GET shows the levels; `answer` refuses a GET that would change them.
        path: "/logging",
        mutates: false,
        help: "query/change logging levels (POST to change)",
        parameters: &[
            ("paths", "Change multiple logging levels: <logger_name1>:<level1>,<logger_name2>:<level2>"),
            (
                "level",
                "Change all loggers' level; One of (, trace, debug, info, warning, error, critical, off)",
            ),
        ],
        answer: |server, parameters| match logging::answer(&*server.state, &parameters.0) {
            Ok(text) => Answer::Text(StatusCode::OK, text),
            Err(text) => Answer::Text(StatusCode::BAD_REQUEST, text),
        },
    },
    Command {
        path: "/memory",
        mutates: false,
        help: "print current allocation/heap usage",
        parameters: &[],
        answer: |_, _| Answer::Json(Memory::read().json()),
    },
    Command {
        path: "/quitquitquit",
        mutates: true,
        help: "exit the server",
        parameters: &[],
        answer: |server, _| done(|| server.state.quit()),
    },
    Command {
        path: "/ready",
        mutates: false,
        help: "print server state, return 200 if LIVE, otherwise return 503",
        parameters: &[],
        answer: ready,
    },
    Command {
        path: "/reopen_logs",
        mutates: true,
        help: "reopen access logs",
        parameters: &[],
        answer: |server, _| done(|| server.state.reopen_logs()),
    },
    Command {
        path: "/reset_counters",
        mutates: true,
        help: "reset all counters to zero",
        parameters: &[],
        answer: |server, _| done(|| server.stats.reset_counters()),
    },
    Command {
        path: "/runtime",
        mutates: false,
        help: "print runtime values",
        parameters: &[],
        answer: |_, _| Answer::Json(json!({"entries": {}, "layers": []})),
    },
    Command {
        path: "/server_info",
        mutates: false,
        help: "print server version/status information",
        parameters: &[],
        answer: server_info,
    },
    Command {
        path: "/stats",
        mutates: false,
        help: "print server stats",
        parameters: &[
            ("usedonly", "Only include stats that have been written by system since restart"),
            ("filter", REGEX_HELP),
            ("invert_filter", "Invert the filter regex"),
            ("format", "Format to use; One of (text, json, prometheus)"),
            ("type", "Stat types to include.; One of (All, Counters, Histograms, Gauges, TextReadouts)"),
            (
                "histogram_buckets",
                "Histogram bucket display mode; One of (cumulative, disjoint, detailed, summary)",
            ),
        ],
        answer: |_, parameters| parameters.stats(Format::Text),
    },
    Command {
        path: "/stats/prometheus",
        mutates: false,
        help: "print server stats in prometheus format",
        parameters: &[
            ("usedonly", "Only include stats that have been written by system since restart"),
            ("filter", REGEX_HELP),
            ("invert_filter", "Invert the filter regex"),
            ("histogram_buckets", "Histogram bucket display mode; One of (cumulative, summary)"),
        ],
        answer: |_, parameters| parameters.stats(Format::Prometheus),
    },
];

impl Server {
    /// Answers a request. The body, if there is one, is not read.
    pub(super) async fn answer(&self, request: &Request<Incoming>) -> Response<Body> {
        let parameters = Parameters::parse(request.uri().query().unwrap_or_default());
        let method = request.method();
        if SHOW_COUNTS.contains(&request.uri().path()) {
            self.state.refresh().await;
        }
        let answer = match COMMANDS.iter().find(|command| command.path == request.uri().path()) {
            None => {
                let text = format!("invalid path. admin commands are:\n{}", list());
                Answer::Text(StatusCode::NOT_FOUND, text)
            }
            Some(command) => {
                let changes = command.mutates || command.path == "/logging" && !parameters.0.is_empty();
                if changes && method != Method::POST {
                    tracing::error!(path = command.path, %method, "admin path changes state and needs POST");
                    let text = format!("Method {method} not allowed, POST required.");
                    Answer::Text(StatusCode::METHOD_NOT_ALLOWED, text)
                } else {
                    (command.answer)(self, &parameters)
                }
            }
        };
        self.respond(answer)
    }

    fn respond(&self, answer: Answer) -> Response<Body> {
        const TEXT: &str = "text/plain; charset=UTF-8";
        let full = |text: String| Full::new(Bytes::from(text)).boxed_unsync();
        let (status, content_type, body) = match answer {
            Answer::Text(status, text) => (status, TEXT, full(text)),
            Answer::Html(text) => (StatusCode::OK, "text/html; charset=UTF-8", full(text)),
            Answer::Json(value) => (StatusCode::OK, "application/json", full(pretty(&value))),
            Answer::Plain(status, text) => (status, "text/plain", full(text)),
            Answer::Stats(query) => {
                let content_type = if query.format == Format::Json { "application/json" } else { TEXT };
                (StatusCode::OK, content_type, self.stream_stats(query))
            }
        };
        let mut response = Response::new(body);
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(CONTENT_TYPE, HeaderValue::from_static(content_type));
        headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache, max-age=0"));
        headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
        headers.insert(SERVER, HeaderValue::from_static("tidegate"));
        response
    }

    /// Stats can be long: they are written on a thread of their own while they are read.
    fn stream_stats(&self, query: Query) -> Body {
        self.refresh_server_stats();
        let (mut writer, body) = io::chunks();
        let stats = Arc::clone(&self.stats);
        tokio::task::spawn_blocking(move || {
            // It fails when the client has gone, which needs nothing more.
            let _ = stats.write(&query, &mut writer).and_then(|()| std::io::Write::flush(&mut writer));
        });
        body.boxed_unsync()
    }

    /// Stats that are read rather than counted.
    fn refresh_server_stats(&self) {
        let state = self.state.server_state();
        let server = self.stats.server();
        let memory = Memory::read();
        server.state().set(state as u64);
        server.live().set(u64::from(state == ServerState::Live));
        server.uptime().set(self.state.server_info().uptime.as_secs());
        server.concurrency().set(self.stats.workers() as u64);
        server.memory_allocated().set(memory.allocated);
        server.memory_heap_size().set(memory.heap);
        server.memory_physical_size().set(memory.physical);
    }
}

fn done(act: impl FnOnce()) -> Answer {
    act();
    Answer::Text(StatusCode::OK, "OK\n".into())
}

fn ready(server: &Server, _: &Parameters) -> Answer {
    let state = server.state.server_state();
    let status = if state == ServerState::Live { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    Answer::Text(status, format!("{}\n", state.name()))
}

fn clusters(server: &Server, parameters: &Parameters) -> Answer {
    let mut clusters = server.state.clusters();
    if let Some(filter) = parameters.value("filter") {
        match crate::stats::regex(filter) {
            Ok(filter) => clusters.retain(|cluster| filter.is_match(&cluster.name)),
            Err(error) => return Answer::Text(StatusCode::BAD_REQUEST, format!("{error}\n")),
        }
    }
    match parameters.value("format") {
        Some("json") => Answer::Json(view::clusters_json(&clusters)),
        _ => Answer::Text(StatusCode::OK, view::clusters_text(&clusters)),
    }
}

fn listeners(server: &Server, parameters: &Parameters) -> Answer {
    let listeners = server.state.listeners();
    match parameters.value("format") {
        Some("json") => Answer::Json(view::listeners_json(&listeners)),
        _ => Answer::Text(StatusCode::OK, view::listeners_text(&listeners)),
    }
}

fn config_dump(server: &Server, parameters: &Parameters) -> Answer {
    let name_regex = match parameters.value("name_regex").map(crate::stats::regex).transpose() {
        Ok(regex) => regex,
        Err(error) => {
            let text = format!("INVALID_ARGUMENT: Error while parsing name_regex: {error}\n");
            return Answer::Plain(StatusCode::BAD_REQUEST, text);
        }
    };
    let selection =
        Selection { resource: parameters.value("resource"), mask: parameters.value("mask"), name_regex };
    match select(server.state.config_dump(parameters.has("include_eds")), &selection) {
        Ok(dump) => Answer::Json(dump),
        Err(SelectionError::NotFound(text)) => Answer::Plain(StatusCode::NOT_FOUND, text),
        Err(SelectionError::Invalid(text)) => Answer::Plain(StatusCode::BAD_REQUEST, text),
    }
}

fn drain_listeners(server: &Server, parameters: &Parameters) -> Answer {
    let drain = Drain {
        inbound_only: parameters.has("inboundonly"),
        graceful: parameters.has("graceful"),
        skip_exit: parameters.has("skip_exit"),
    };
    done(|| server.state.drain_listeners(drain))
}

fn server_info(server: &Server, _: &Parameters) -> Answer {
    let info = server.state.server_info();
    let uptime = format!("{}s", info.uptime.as_secs());
    Answer::Json(json!({
        "version": info.version,
        "state": server.state.server_state().name(),
        "uptime_current_epoch": uptime,
        "uptime_all_epochs": uptime,
        "hot_restart_version": "disabled",
        "command_line_options": info.command_line_options,
        "node": info.node,
        "hot_restart_initializing": false,
    }))
}

/// JSON as Envoy indents it.
fn pretty(value: &Value) -> String {
    let mut out = Vec::new();
    let formatter = serde_json::ser::PrettyFormatter::with_indent(b" ");
    let mut serializer = serde_json::Serializer::with_formatter(&mut out, formatter);
    // A Value serializes, and a Vec takes everything.
    let _ = value.serialize(&mut serializer);
    out.push(b'\n');
    String::from_utf8(out).unwrap_or_default()
}

/// The paths, as `/help` and 404 show them. Writing to a String can't fail.
fn list() -> String {
    let mut out = String::new();
    for command in COMMANDS {
        let post = if command.mutates { " (POST)" } else { "" };
        let _ = writeln!(out, "  {}{post}: {}", command.path, command.help);
        for (name, help) in command.parameters {
            let _ = writeln!(out, "      {name}: {help}");
        }
    }
    out
}

fn home() -> String {
    let mut rows = String::new();
    for command in COMMANDS.iter().filter(|command| command.path != "/") {
        let _ = if command.mutates {
            writeln!(
                rows,
                "<tr><td><form action='{0}' method='post'><button>{0}</button></form></td><td>{1}</td></tr>",
                command.path, command.help
            )
        } else {
            writeln!(rows, "<tr><td><a href='{0}'>{0}</a></td><td>{1}</td></tr>", command.path, command.help)
        };
    }
    format!(
        "<!DOCTYPE html>\n<html lang='en'>\n<head><meta charset='UTF-8'><title>tidegate admin</title></head>\n\
         <body>\n<h1>tidegate</h1>\n<table>\n{rows}</table>\n</body>\n</html>\n"
    )
}

impl Parameters {
    fn parse(query: &str) -> Self {
        let pairs = query.split('&').filter(|pair| !pair.is_empty());
        Self(
            pairs
                .map(|pair| {
                    let (name, value) = pair.split_once('=').unwrap_or((pair, ""));
                    (decoded(name).into_owned(), decoded(value).into_owned())
                })
                .collect(),
        )
    }

    fn value(&self, name: &str) -> Option<&str> {
        let found = self.0.iter().find(|(n, _)| n == name);
        found.map(|(_, value)| value.as_str()).filter(|value| !value.is_empty())
    }

    fn has(&self, name: &str) -> bool {
        self.0.iter().any(|(n, _)| n == name)
    }

    fn stats(&self, format: Format) -> Answer {
        let pairs = self.0.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        match Query::parse(format, pairs) {
            Ok(query) => Answer::Stats(query),
            Err(error) => Answer::Text(StatusCode::BAD_REQUEST, error.to_string()),
        }
    }
}

/// Percent-decodes. A `+` stays one: it is common in the regular expressions that come here.
fn decoded(text: &str) -> Cow<'_, str> {
    if !text.contains('%') {
        return Cow::Borrowed(text);
    }
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        let hex = || {
            let mut ahead = bytes.clone();
            let mut digit = || char::from(ahead.next()?).to_digit(16);
            Some((digit()? * 16 + digit()?) as u8)
        };
        match (byte, hex()) {
            (b'%', Some(decoded)) => {
                out.push(decoded);
                bytes.nth(1);
            }
            _ => out.push(byte),
        }
    }
    Cow::Owned(String::from_utf8_lossy(&out).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_are_sorted_and_distinct() {
        assert!(COMMANDS.is_sorted_by(|a, b| a.path < b.path));
    }

    #[test]
    fn percent_decoding() {
        assert_eq!(decoded("a%7Cb%2"), "a|b%2");
        assert_eq!(decoded("%zz+%C3%A9"), "%zz+é");
        assert_eq!(decoded("%"), "%");
    }

    #[test]
    fn json_is_indented_as_envoys() {
        assert_eq!(pretty(&json!({"a": [1]})), "{\n \"a\": [\n  1\n ]\n}\n");
    }
}
