//! The programs that are compared and those that make load, found or installed.

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use tidegate_tests::tool;

use super::subject::{Program, Subject, Way};

/// nginx's module for TCP, as Debian installs it.
pub(super) const NGINX_STREAM: &str = "/usr/lib/nginx/modules/ngx_stream_module.so";

/// Where the programs are; empty paths of what is not measured.
#[derive(Clone, Debug, Default)]
pub(super) struct Programs {
    pub(super) tidegate: PathBuf,
    pub(super) base: PathBuf,
    pub(super) envoy: PathBuf,
    pub(super) haproxy: PathBuf,
    pub(super) nginx: PathBuf,
}

impl Programs {
    /// Debian's packages of those that are measured. As root.
    pub(super) fn install(&mut self, subjects: &[Subject], http: bool, iperf3: bool) -> Result<()> {
        let measured = |program| subjects.iter().any(|subject| subject.program == program);
        let mut wanted = vec![("ip", "iproute2"), ("nsenter", "util-linux")];
        let haproxy = measured(Program::Haproxy) || measured(Program::HaproxySplice);
        let nginx = http || measured(Program::Nginx);
        let redirect = subjects.iter().any(|subject| subject.way == Way::Redirect);
        wanted.extend(redirect.then_some(("nft", "nftables")));
        wanted.extend(haproxy.then_some(("haproxy", "haproxy")));
        wanted.extend(nginx.then_some(("nginx", "nginx")));
        wanted.extend(http.then_some(("wrk", "wrk")));
        wanted.extend(iperf3.then_some(("iperf3", "iperf3")));
        tool::require(&wanted)?;
        if haproxy {
            self.haproxy = tool::find("haproxy").context("haproxy")?;
        }
        if nginx {
            self.nginx = tool::find("nginx").context("nginx")?;
        }
        if measured(Program::Nginx) && !Path::new(NGINX_STREAM).exists() {
            tool::apt_install(&["libnginx-mod-stream"])?;
            ensure!(Path::new(NGINX_STREAM).exists(), "libnginx-mod-stream did not bring {NGINX_STREAM}");
        }
        Ok(())
    }
}
