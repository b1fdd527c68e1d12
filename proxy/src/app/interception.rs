//! Interception, as the command line and the configuration want it.

use std::sync::Arc;
use std::time::Duration;

use anyhow::Context as _;

use super::kernel_path::{self, KernelPath};
use super::{Proxy, announce};
use crate::args::{FailModeArg, ServeArgs};
use crate::config::bootstrap::{FailMode, Interception as Wanted, OnExit};
use crate::intercept::cgroup;
use crate::intercept::destinations::BLACK_HOLE;
use crate::intercept::{self, Destinations, EbpfLog, InterceptError, Interception, OnPod, PodEvent};
use crate::takeover::{Starting, StatePaths};
use crate::worker::{self, Handle, Role, SocketId};

/// How often the eBPF programs' debug lines are printed, when they are asked for.
const EBPF_LOG_INTERVAL: Duration = Duration::from_millis(100);

impl Proxy {
    /// Starts intercepting, if that is wanted and possible.
    pub(super) fn intercept(&mut self) -> anyhow::Result<()> {
        self.start_interception()?;
        if self.interception.is_none() {
            self.update_kernel_path();
        }
        Ok(())
    }

    fn start_interception(&mut self) -> anyhow::Result<()> {
        if self.args.no_interception {
            tracing::info!("interception is off: bound listeners, iptables REDIRECT and TPROXY are served");
            return Ok(());
        }
        let wanted = wanted(&self.args, self.loaded.bootstrap.interception.as_ref());
        let paths = StatePaths::from(self.args.state.clone());
        let named = !wanted.cgroups.is_empty() || !wanted.host_cgroups.is_empty();
        let asked_for = self.args.require_interception || named;
        let settings = intercept::Settings {
            wanted,
            workers: self.workers.len(),
            kernel_path: kernel_path::is_wanted(&self.loaded),
            debug: self.args.ebpf_log,
        };
        let started = Starting::claim(&paths.state_dir)
            .map_err(anyhow::Error::from)
            .and_then(|starting| Ok((starting, Interception::start(&settings, self.on_pod())?)));
        match started {
            Ok((starting, interception)) => {
                // Before anything is captured: what the proxy itself connects to must pass.
                let _ = self.shared.own_sockets.set(interception.own_sockets());
                if let Some(log) = interception.take_log() {
                    tokio::task::spawn_local(print_ebpf_log(log));
                }
                if settings.kernel_path {
                    self.kernel_path = KernelPath::start(self, &interception);
                }
                self.interception = Some(interception);
                self.update_kernel_path();
                self.apply_first_rules()?;
                self.record = Some(starting.finish()?);
                if cgroup::own_is_root() {
                    tracing::warn!(
                        "this process is in the root cgroup: its eBPF program for accepted sockets runs for every TCP \
                         connection of the machine; start tidegate in a cgroup of its own to spare the others \
                         (`tidegate check`)"
                    );
                }
            }
            Err(error) if asked_for => {
                return Err(error).context("interception was asked for, but can't be set up");
            }
            Err(error) if matches!(error.downcast_ref(), Some(InterceptError::NoCgroup)) => {
                self.awaits_kubepods = true;
                tracing::info!(
                    "nothing is intercepted: there is no kubepods cgroup here (pods will be intercepted when one \
                     appears), and none was given (--pod-cgroup, --intercept-cgroup); bound listeners, iptables \
                     REDIRECT and TPROXY are served"
                );
            }
            Err(error) => {
                tracing::warn!(
                    "{error:#}; bound listeners, iptables REDIRECT and TPROXY are served without interception"
                );
            }
        }
        Ok(())
    }

    fn apply_first_rules(&mut self) -> Result<(), InterceptError> {
        if let Some(interception) = &self.interception {
            interception.apply(&self.destinations())?;
        }
        self.settle_kernel_path();
        Ok(())
    }

    /// Ends it, or leaves the kernel path where it is.
    pub(super) fn end_interception(&mut self) {
        self.look_at_kernel_path();
        self.count_kernel_path(self.is_superseded());
        let destinations = self.destinations();
        let tables = self.kernel_path.take().map(KernelPath::end);
        let Some(interception) = self.interception.take() else { return };
        if let Some(tables) = tables.filter(|_| self.on_exit() == OnExit::Keep) {
            interception.keep_kernel_path(&destinations);
            // It has taken long enough for workers that were just writing.
            tables.forget_if_nobodys();
            tracing::info!("the kernel path goes on without this process (on_exit: KEEP)");
        } else if let Err(error) = interception.stop() {
            tracing::error!(%error, "the interception can't be removed; `tidegate cleanup` will");
        }
    }

    /// Begins to intercept as soon as there is a kubepods cgroup.
    pub(super) fn look_for_kubepods(&mut self) {
        if !self.awaits_kubepods || !intercept::has_kubepods() {
            return;
        }
        self.awaits_kubepods = false;
        match self.intercept() {
            Ok(()) => self.announce_interception(),
            Err(error) => tracing::error!("{error:#}; pods are not intercepted"),
        }
    }

    pub(super) fn destinations(&self) -> Destinations {
        let listeners: Vec<_> =
            self.store.listeners().iter().map(|listener| Arc::clone(&listener.config)).collect();
        let black_hole = self.snapshot().cluster(BLACK_HOLE).map(|cluster| Arc::clone(cluster.config()));
        let exclude = self.loaded.bootstrap.interception.as_ref().map(|it| it.exclude.clone());
        Destinations::of(&listeners, black_hole.as_deref())
            .excluding(&exclude.unwrap_or_default())
            .balanced(|listener| self.kernel_path.as_ref().and_then(|path| path.service(listener)))
    }

    /// Gives the capture sockets of pods to the workers. Runs on the pods thread.
    fn on_pod(&self) -> OnPod {
        let workers: Vec<_> = self.workers.iter().map(Handle::sender).collect();
        Box::new(move |event| match event {
            PodEvent::Enrolled { capture, sockets } => {
                let id = SocketId::Pod(capture.pod.netns().cookie());
                for (worker, socket) in workers.iter().zip(sockets) {
                    worker.send(worker::Command::Listen(id, socket, Role::Capture(Arc::clone(&capture))));
                }
            }
            PodEvent::Gone { capture } => {
                for worker in &workers {
                    worker.send(worker::Command::Gone(Arc::clone(&capture)));
                }
            }
        })
    }

    /// Says what is intercepted.
    pub(super) fn announce_interception(&self) {
        let Some(interception) = &self.interception else { return };
        for attach_point in interception.attach_points() {
            tracing::info!("intercepting connects from cgroup {}", attach_point.display());
        }
        let destinations = self.destinations().to_string();
        for line in announce::lines(&destinations) {
            tracing::info!("{line}");
        }
        for pod in interception.status().map(|status| status.pods).unwrap_or_default() {
            tracing::info!("pod {}: {:?}", pod.name, pod.state);
        }
    }
}

/// Passes the eBPF programs' debug lines on to the process log (`--ebpf-log`), soon enough for whoever reads along.
async fn print_ebpf_log(mut log: EbpfLog) {
    let mut tick = tokio::time::interval(EBPF_LOG_INTERVAL);
    loop {
        tick.tick().await;
        log.flush();
    }
}

/// What to intercept: the configuration, overridden by the command line.
fn wanted(args: &ServeArgs, configured: Option<&Wanted>) -> Wanted {
    let mut wanted = configured.cloned().unwrap_or_default();
    if !args.pod_cgroup.is_empty() {
        wanted.cgroups.clone_from(&args.pod_cgroup);
    }
    if !args.intercept_cgroup.is_empty() {
        wanted.host_cgroups.clone_from(&args.intercept_cgroup);
    }
    match args.fail_mode {
        Some(FailModeArg::Open) => wanted.fail_mode = FailMode::Open,
        Some(FailModeArg::Closed) => wanted.fail_mode = FailMode::Closed,
        None => {}
    }
    wanted.capture_port = args.capture_port.or(wanted.capture_port);
    wanted.pin_path = args.state.pin_path.clone().or(wanted.pin_path);
    wanted
}
