//! One scripted ADS stream, with the proxy at its other end.

use std::cell::{Cell, RefCell};
use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use tidegate_api::discovery::{DeltaDiscoveryRequest, DiscoveryRequest, Resource};
use tidegate_api::wkt::Any;
use tidegate_tests::control_plane::resource::Transport;
use tidegate_tests::control_plane::{ControlPlane, Kind, Method, Stream, delta_response, response};
use tidegate_tests::proxy::{Proxy, Setup};

use crate::world::World;

/// A proxy that has opened its ADS stream and is not configured yet.
pub(crate) struct Ads {
    pub(crate) proxy: Proxy,
    pub(crate) stream: Stream,
    pub(crate) plane: ControlPlane,
    pub(crate) world: World,
    nonces: Cell<u32>,
    /// Kinds that the proxy has asked for.
    subscribed: RefCell<BTreeSet<Kind>>,
}

/// Whether a response was accepted.
#[derive(Debug)]
pub(crate) struct Answer {
    /// `version_info`; empty on a delta stream.
    pub(crate) version: String,
    /// Text of the NACK.
    pub(crate) error: Option<String>,
}

impl Ads {
    /// State of the world.
    pub(crate) fn sotw() -> Result<Self> {
        Self::start(Transport::Ads, Method::ADS, &[])
    }

    /// Incremental.
    pub(crate) fn delta() -> Result<Self> {
        Self::start(Transport::DeltaAds, Method::DELTA_ADS, &[])
    }

    /// With arguments for the proxy.
    pub(crate) fn start(transport: Transport, method: Method, args: &[&str]) -> Result<Self> {
        let world = World::new()?;
        let plane = ControlPlane::start(Some(&world.netns))?;
        let setup = Setup::new(&format!("{:#}", transport.bootstrap(plane.address())));
        let proxy = setup.netns(&world.netns).args(args.iter().copied()).spawn()?;
        let stream = plane.stream(method)?;
        Ok(Self { proxy, stream, plane, world, nonces: Cell::new(0), subscribed: RefCell::default() })
    }

    /// A new stream in place of one that has ended.
    pub(crate) fn replace_stream(&mut self, stream: Stream) {
        self.stream = stream;
        self.subscribed.borrow_mut().clear();
    }

    /// The proxy has asked for this kind.
    pub(crate) fn note_subscribed(&self, kind: Kind) {
        self.subscribed.borrow_mut().insert(kind);
    }

    /// Waits for the first request of a kind, unless it was there: a response to nothing is ignored.
    fn wanted(&self, kind: Kind) -> Result<()> {
        if self.subscribed.borrow_mut().insert(kind) {
            if self.stream.method.delta {
                self.stream.delta_request_for(kind)?;
            } else {
                self.stream.request_for(kind)?;
            }
        }
        Ok(())
    }

    fn nonce(&self) -> String {
        self.nonces.set(self.nonces.get() + 1);
        format!("nonce-{}", self.nonces.get())
    }

    /// Sends a state-of-the-world response to what was asked for; gives its nonce.
    pub(crate) fn send(&self, kind: Kind, version: &str, resources: Vec<Any>) -> Result<String> {
        self.wanted(kind)?;
        let nonce = self.nonce();
        self.stream.send(&response(kind, version, &nonce, resources));
        Ok(nonce)
    }

    /// Sends an incremental response to what was asked for; gives its nonce.
    pub(crate) fn send_delta(
        &self,
        kind: Kind,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> Result<String> {
        self.wanted(kind)?;
        let nonce = self.nonce();
        self.stream.send_delta(&delta_response(kind, &nonce, resources, removed));
        Ok(nonce)
    }

    /// Waits for the answer to the response with this nonce, past requests that are none.
    pub(crate) fn answer(&self, kind: Kind, nonce: &str) -> Result<Answer> {
        loop {
            let request = self.stream.request_for(kind)?;
            if request.response_nonce == nonce {
                return Ok(Answer {
                    version: request.version_info,
                    error: request.error_detail.map(|status| status.message),
                });
            }
        }
    }

    /// The same on a delta stream.
    pub(crate) fn delta_answer(&self, kind: Kind, nonce: &str) -> Result<Answer> {
        loop {
            let request = self.stream.delta_request_for(kind)?;
            if request.response_nonce == nonce {
                let error = request.error_detail.map(|status| status.message);
                return Ok(Answer { version: String::new(), error });
            }
        }
    }

    /// Sends, and waits for the ACK.
    pub(crate) fn accepted(&self, kind: Kind, version: &str, resources: Vec<Any>) -> Result<()> {
        let nonce = self.send(kind, version, resources)?;
        let answer = self.answer(kind, &nonce)?;
        ensure!(answer.error.is_none() && answer.version == version, "{kind:?} {version}: {answer:?}");
        Ok(())
    }

    /// Sends, and waits for the NACK, of which it gives the text.
    pub(crate) fn rejected(
        &self,
        kind: Kind,
        version: &str,
        resources: Vec<Any>,
    ) -> Result<(String, String)> {
        let nonce = self.send(kind, version, resources)?;
        let answer = self.answer(kind, &nonce)?;
        let error = answer.error.ok_or_else(|| anyhow::anyhow!("{kind:?} {version} was accepted"))?;
        Ok((answer.version, error))
    }

    /// Sends an incremental response, and waits for the ACK.
    pub(crate) fn accepted_delta(
        &self,
        kind: Kind,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> Result<()> {
        let nonce = self.send_delta(kind, resources, removed)?;
        let answer = self.delta_answer(kind, &nonce)?;
        ensure!(answer.error.is_none(), "{kind:?}: {answer:?}");
        Ok(())
    }

    /// Sends an incremental response, and waits for the NACK, of which it gives the text.
    pub(crate) fn rejected_delta(
        &self,
        kind: Kind,
        resources: Vec<Resource>,
        removed: &[&str],
    ) -> Result<String> {
        let nonce = self.send_delta(kind, resources, removed)?;
        let answer = self.delta_answer(kind, &nonce)?;
        answer.error.ok_or_else(|| anyhow::anyhow!("{kind:?} was accepted"))
    }

    /// The next request of a kind that is no answer.
    pub(crate) fn subscription(&self, kind: Kind) -> Result<DiscoveryRequest> {
        self.note_subscribed(kind);
        self.stream.request_for(kind)
    }

    /// The same on a delta stream.
    pub(crate) fn delta_subscription(&self, kind: Kind) -> Result<DeltaDiscoveryRequest> {
        self.note_subscribed(kind);
        self.stream.delta_request_for(kind)
    }
}
