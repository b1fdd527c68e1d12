//! One script with one client.

use std::collections::BTreeMap;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use tidegate_api::discovery::Resource;
use tidegate_api::wkt::Any;
use tidegate_tests::config::merge;
use tidegate_tests::control_plane::resource::Transport;
use tidegate_tests::control_plane::{ControlPlane, Kind, Poll, Stream, delta_response, response};
use tidegate_tests::netns::Netns;
use tidegate_tests::proxy::{Engine, Proxy, Setup};

use super::record::{self, Observation};

/// How long a client has to be silent before it has said everything.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Patience {
    /// On a machine with something to spare.
    Usual,
    /// Again, after a difference that may come from a busy machine.
    Long,
}

impl Patience {
    /// When nothing tells how much is to come.
    fn silence(self) -> Duration {
        match self {
            Self::Usual => Duration::from_millis(400),
            Self::Long => Duration::from_millis(1500),
        }
    }

    /// When as much has come as the other client sent.
    fn short_silence(self) -> Duration {
        self.silence() / 3
    }
}

/// The first request of a phase may take this long: a client waits before it connects again.
const FIRST: Duration = Duration::from_secs(5);
/// What the other client sent may take this long.
const HINTED: Duration = Duration::from_secs(4);

/// A client, its control plane, and what was heard.
pub(super) struct Session {
    engine: Engine,
    hint: Option<Observation>,
    patience: Patience,
    standing: Option<Standing>,
    observation: Observation,
    phases: usize,
    nonces: usize,
}

struct Standing {
    _proxy: Proxy,
    plane: ControlPlane,
    streams: Vec<Stream>,
    polls: BTreeMap<Kind, Poll>,
    /// Started here, so it goes last.
    _netns: Netns,
}

impl Session {
    pub(super) fn new(engine: Engine, hint: Option<Observation>, patience: Patience) -> Self {
        Self { engine, hint, patience, standing: None, observation: Observation::new(), phases: 0, nonces: 0 }
    }

    /// What was heard.
    pub(super) fn finish(self) -> Observation {
        self.observation
    }

    /// Starts the client. `fields` are merged into its bootstrap.
    pub(super) fn start(&mut self, transport: Transport, fields: Value) -> Result<()> {
        let netns = Netns::new("xds")?;
        let plane = ControlPlane::start(Some(&netns))?;
        let mut bootstrap = transport.bootstrap(plane.address());
        merge(&mut bootstrap, fields);
        let setup = Setup::new(&format!("{bootstrap:#}")).engine(self.engine.clone());
        let setup = setup.netns(&netns).concurrency(1).args(["--drain-time-s", "1"]);
        let proxy = setup.spawn()?;
        self.standing = Some(Standing {
            _proxy: proxy,
            plane,
            streams: Vec::new(),
            polls: BTreeMap::new(),
            _netns: netns,
        });
        Ok(())
    }

    fn standing(&mut self) -> Result<&mut Standing> {
        self.standing.as_mut().context("the script has started no client")
    }

    /// The stream that a kind is asked for on.
    fn stream(&mut self, kind: Kind) -> Result<&Stream> {
        let streams = &self.standing()?.streams;
        let found = streams.iter().rev().find(|stream| stream.method.kind.is_none_or(|own| own == kind));
        found.with_context(|| format!("the client has opened no stream for {kind:?}"))
    }

    fn nonce(&mut self) -> String {
        self.nonces += 1;
        format!("n{}", self.nonces)
    }

    /// Sends a state-of-the-world response.
    pub(super) fn send(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> Result<()> {
        let nonce = self.nonce();
        self.stream(kind)?.send(&response(kind, version, &nonce, resources));
        Ok(())
    }

    /// Sends one whose type is not the stream's, or nobody's.
    pub(super) fn send_typed(&mut self, on: Kind, type_url: &str, resources: Vec<Any>) -> Result<()> {
        let nonce = self.nonce();
        let mut response = response(on, "1", &nonce, resources);
        type_url.clone_into(&mut response.type_url);
        self.stream(on)?.send(&response);
        Ok(())
    }

    /// Sends an incremental response.
    pub(super) fn send_delta(
        &mut self,
        kind: Kind,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> Result<()> {
        let nonce = self.nonce();
        self.stream(kind)?.send_delta(&delta_response(kind, &nonce, resources, removed));
        Ok(())
    }

    /// Sends a gRPC message that is no response.
    pub(super) fn send_bytes(&mut self, kind: Kind, bytes: &[u8]) -> Result<()> {
        self.stream(kind)?.send_message(bytes);
        Ok(())
    }

    /// Ends the stream with a gRPC status.
    pub(super) fn end_stream(&mut self, kind: Kind, status: u32) -> Result<()> {
        self.stream(kind)?.finish(status, "the script says so");
        Ok(())
    }

    /// RST_STREAM.
    pub(super) fn reset_stream(&mut self, kind: Kind) -> Result<()> {
        self.stream(kind)?.reset();
        Ok(())
    }

    /// The server dies, and is there again at once.
    pub(super) fn restart_server(&mut self) -> Result<()> {
        let standing = self.standing()?;
        standing.streams.clear();
        standing.plane.restart()
    }

    /// Waits until the client has said everything, and notes it.
    pub(super) fn hear(&mut self, label: &str) -> Result<()> {
        self.listen(label, true, Duration::ZERO)
    }

    /// The same when it is right to say nothing, for at least this long.
    pub(super) fn hear_perhaps(&mut self, least: Duration, label: &str) -> Result<()> {
        self.listen(label, false, least)
    }

    /// The same for at least this long.
    pub(super) fn hear_for(&mut self, least: Duration, label: &str) -> Result<()> {
        self.listen(label, true, least)
    }

    fn listen(&mut self, label: &str, something: bool, least: Duration) -> Result<()> {
        self.phases += 1;
        let phase = format!("{:02} {label}", self.phases);
        let hinted = self.hint.as_ref().map(|hint| {
            let prefix = format!("{phase}/");
            hint.keys().filter(|fact| fact.starts_with(&prefix)).count()
        });
        let patience = self.patience;
        let begun = Instant::now();
        let (mut heard, mut last) = (0, begun);
        let mut counts: BTreeMap<String, usize> = BTreeMap::new();
        loop {
            let before = heard;
            let standing = self.standing.as_mut().context("no client")?;
            for stream in standing.plane.untaken_streams() {
                note(
                    &mut self.observation,
                    &phase,
                    "streams",
                    &mut counts,
                    json!({"path": stream.method.path()}),
                );
                heard += 1;
                standing.streams.push(stream);
            }
            for request in standing.streams.iter().flat_map(Stream::unread) {
                let kind = record::kind_name(request.type_url());
                note(&mut self.observation, &phase, &kind, &mut counts, record::fields(&request));
                heard += 1;
            }
            let now = Instant::now();
            if heard > before {
                last = now;
            }
            let silent = now - last;
            let enough = match hinted {
                Some(hinted) if heard >= hinted => silent >= patience.short_silence(),
                Some(_) => now - begun >= HINTED && silent >= patience.silence(),
                None if heard == 0 && something => now - begun >= FIRST,
                None => silent >= patience.silence(),
            };
            if enough && now - begun >= least {
                return Ok(());
            }
            sleep(Duration::from_millis(10));
        }
    }

    /// Waits for the next poll of a kind, and notes it. It stays open until [`Session::answer`].
    pub(super) fn hear_poll(&mut self, label: &str, kind: Kind) -> Result<()> {
        self.phases += 1;
        let phase = format!("{:02} {label}", self.phases);
        let standing = self.standing.as_mut().context("no client")?;
        let poll = standing.plane.poll(kind)?;
        let mut fields = record::sotw(&poll.request);
        fields["method"] = json!(kind.rest_path());
        note(&mut self.observation, &phase, &format!("{kind:?}"), &mut BTreeMap::new(), fields);
        if standing.polls.insert(kind, poll).is_some() {
            bail!("{phase}: a second poll while the first one is open");
        }
        Ok(())
    }

    /// Answers the open poll of a kind.
    pub(super) fn answer(&mut self, kind: Kind, status: u16, body: &[u8]) -> Result<()> {
        let poll = self.standing()?.polls.remove(&kind).context("no poll is open")?;
        poll.answer(status, body);
        Ok(())
    }

    /// Answers the open poll of a kind with resources.
    pub(super) fn answer_with(&mut self, kind: Kind, version: &str, resources: Vec<Any>) -> Result<()> {
        let poll = self.standing()?.polls.remove(&kind).context("no poll is open")?;
        poll.answer_with(&response(kind, version, "", resources))
    }
}

fn note(
    observation: &mut Observation,
    phase: &str,
    what: &str,
    counts: &mut BTreeMap<String, usize>,
    fields: Value,
) {
    let count = counts.entry(what.to_owned()).or_default();
    *count += 1;
    observation.insert(format!("{phase}/{what} {count}"), fields);
}
