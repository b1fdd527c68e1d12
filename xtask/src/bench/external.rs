//! Load from the tools that people measure with: iperf3, and wrk against nginx.

use std::fmt::Write as _;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tidegate_tests::load::account;
use tidegate_tests::load::job::{Measured, Quantiles};
use tidegate_tests::run::TempDir;

use super::running::Running;
use super::site::{HTTP_PORT, IPERF3_PORT, Site};
use super::tools::Programs;

/// What the HTTP server answers.
const BODY: &str = "The quick brown fox jumps over the lazy dog, 0123456789 times...";

/// Servers that the tools need. End on drop.
#[derive(Debug)]
pub(super) struct Servers {
    children: Vec<Child>,
    /// Of the HTTP server.
    dir: TempDir,
}

impl Servers {
    pub(super) fn start(programs: &Programs, site: &Site, http: bool, iperf3: bool) -> Result<Self> {
        let dir = TempDir::new("bench")?;
        let mut servers = Self { children: Vec::new(), dir };
        if http {
            let path = servers.dir.path().join("nginx.conf");
            fs::write(&path, nginx_config(site, servers.dir.path()))?;
            let mut command = site.server_command();
            command.arg(&programs.nginx).args(["-e", "stderr", "-c"]).arg(path);
            servers.spawn(&mut command, HTTP_PORT)?;
        }
        if iperf3 {
            let mut command = site.server_command();
            command.args(["iperf3", "--server", "--port", &IPERF3_PORT.to_string()]);
            servers.spawn(&mut command, IPERF3_PORT)?;
        }
        Ok(servers)
    }

    fn spawn(&mut self, command: &mut Command, port: u16) -> Result<()> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().context("start a server")?;
        self.children.push(child);
        let child = self.children.last_mut().context("just pushed")?;
        wait_listening(child, port)
    }
}

impl Drop for Servers {
    fn drop(&mut self) {
        for child in &mut self.children {
            let _ = child.kill();
            let _ = child.wait();
        }
    }
}

/// One process: a worker of its own would outlive a master that is killed.
fn nginx_config(site: &Site, dir: &Path) -> String {
    let dir = dir.display();
    let mut paths = String::new();
    for kind in ["client_body", "proxy", "fastcgi", "uwsgi", "scgi"] {
        let _ = writeln!(paths, "    {kind}_temp_path {dir}/{kind};");
    }
    format!(
        "daemon off;\nmaster_process off;\npid {dir}/nginx.pid;\nevents {{ worker_connections 4096; }}\n\
         http {{\n    access_log off;\n    keepalive_requests 1000000000;\n{paths}    server {{\n        \
         listen {}:{HTTP_PORT};\n        location / {{ return 200 '{BODY}'; }}\n    }}\n}}\n",
        site.server(),
    )
}

/// CPU of the proxy and of the machine while `run` runs.
fn accounted(
    running: &Running,
    run: impl FnOnce() -> Result<(u64, u64, f64, Option<Quantiles>)>,
) -> Result<Measured> {
    let before = (running.cpu_ns()?, account::machine_busy_ns()?);
    let (bytes, requests, seconds, latency) = run()?;
    let after = (running.cpu_ns()?, account::machine_busy_ns()?);
    Ok(Measured {
        seconds,
        bytes,
        requests,
        latency,
        proxy_ns: after.0 - before.0,
        // The tools are processes of a moment.
        server_ns: 0,
        client_ns: 0,
        machine_ns: after.1.saturating_sub(before.1),
    })
}

/// Downloads with iperf3.
pub(super) fn iperf3(site: &Site, running: &Running, streams: usize, duration: Duration) -> Result<Measured> {
    let to = running.fronts().iperf3;
    // It counts whole seconds.
    let seconds = duration.as_secs_f64().ceil().max(1.0);
    accounted(running, || {
        let mut command = site.client_command(running.subject());
        command
            .args(["iperf3", "--json", "--reverse", "--client", &to.ip().to_string()])
            .args(["--port", &to.port().to_string(), "--time", &seconds.to_string()])
            .args(["--parallel", &streams.to_string()]);
        let result: Value = serde_json::from_str(&output(&mut command)?).context("what iperf3 says")?;
        if let Some(error) = result["error"].as_str() {
            bail!("iperf3: {error}");
        }
        let received = &result["end"]["sum_received"];
        let bytes = received["bytes"].as_u64().context("iperf3 counts no bytes")?;
        let seconds = received["seconds"].as_f64().context("iperf3 counts no seconds")?;
        ensure!(bytes > 0, "iperf3 received nothing");
        Ok((bytes, 0, seconds, None))
    })
}

/// Requests with wrk.
pub(super) fn wrk(
    site: &Site,
    running: &Running,
    connections: usize,
    duration: Duration,
) -> Result<Measured> {
    let seconds = duration.as_secs_f64().ceil().max(1.0);
    accounted(running, || {
        let mut command = site.client_command(running.subject());
        command
            .args(["wrk", "--latency", "--threads", "1", "--connections", &connections.to_string()])
            .args(["--duration", &format!("{seconds}s"), &format!("http://{}/", running.fronts().http)]);
        let started = Instant::now();
        let text = output(&mut command)?;
        parse_wrk(&text).with_context(|| format!("wrk says after {:?}: {text}", started.elapsed()))
    })
}

/// Its summary: `  123456 requests in 1.00s, 12.3MB read`, and percentiles of 50, 75, 90 and 99.
fn parse_wrk(text: &str) -> Result<(u64, u64, f64, Option<Quantiles>)> {
    ensure!(!text.contains("Socket errors"), "connections failed");
    ensure!(!text.contains("Non-2xx"), "the answers are not those of the server");
    let line = text.lines().find(|line| line.contains(" requests in ")).context("no summary")?;
    let (requests, rest) = line.trim().split_once(" requests in ").context("no summary")?;
    let seconds = time(rest.split(',').next().unwrap_or_default()).context("no time")?;
    let percentile = |name: &str| {
        let value = text.lines().find_map(|line| line.trim().strip_prefix(name))?;
        time(value.trim())
    };
    let (p50, p99) = percentile("50%").zip(percentile("99%")).context("no percentiles")?;
    // It prints no 99.9 %.
    let latency = Quantiles { p50, p99, p999: f64::NAN };
    Ok((0, requests.parse().context("no count")?, seconds, Some(latency)))
}

/// `12.3us`, `1.2ms`, `1.00s`, `1.0m`, in seconds.
fn time(text: &str) -> Option<f64> {
    let digits = text.find(|c: char| c.is_ascii_alphabetic())?;
    let scale = match &text[digits..] {
        "us" => 1e-6,
        "ms" => 1e-3,
        "s" => 1.0,
        "m" => 60.0,
        _ => return None,
    };
    text[..digits].parse::<f64>().ok().map(|value| value * scale)
}

/// What a tool prints; it fails when the tool does.
fn output(command: &mut Command) -> Result<String> {
    let output = command.stdin(Stdio::null()).output().context("run the tool")?;
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    ensure!(output.status.success(), "{}: {text}{}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(text)
}

/// Waits until a process of some namespace listens on a port of it.
fn wait_listening(child: &mut Child, port: u16) -> Result<()> {
    let deadline = Instant::now() + Duration::from_secs(10);
    let path = format!("/proc/{}/net/tcp", child.id());
    let path6 = format!("{path}6");
    loop {
        let tables = [&path, &path6].map(|path| fs::read_to_string(path).unwrap_or_default());
        if tables.iter().any(|table| listens(table, port)) {
            return Ok(());
        }
        if let Some(status) = child.try_wait()? {
            bail!("the server on port {port} has ended: {status}");
        }
        ensure!(Instant::now() < deadline, "the server on port {port} does not listen");
        sleep(Duration::from_millis(20));
    }
}

/// Whether a table of /proc/net/tcp has a listening socket (state 0A) on the port.
fn listens(table: &str, port: u16) -> bool {
    let suffix = format!(":{port:04X}");
    table.lines().skip(1).any(|line| {
        let mut fields = line.split_whitespace().skip(1);
        fields.next().is_some_and(|local| local.ends_with(&suffix)) && fields.nth(1) == Some("0A")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const WRK: &str = "Running 1s test @ http://127.0.0.1:2003/\n  1 threads and 64 connections\n  \
        Thread Stats   Avg      Stdev     Max   +/- Stdev\n    Latency     1.21ms  345.00us   5.00ms   80.00%\n  \
        Latency Distribution\n     50%    1.10ms\n     75%    1.30ms\n     90%    1.60ms\n     99%    950.00us\n  \
        51234 requests in 1.10s, 11.22MB read\nRequests/sec:  46576.36\nTransfer/sec:     10.20MB\n";

    #[test]
    fn who_listens() {
        let table = "  sl  local_address rem_address   st\n   0: 0100007F:07C7 00000000:0000 0A 00000000:00000000\n   \
            1: 0100007F:07C6 0100007F:9999 01 00000000:00000000\n";
        assert!(listens(table, 1991));
        assert!(!listens(table, 1990), "a connection is no listener");
    }

    #[test]
    fn the_summary_of_wrk() {
        let (_, requests, seconds, latency) = parse_wrk(WRK).expect("a summary");
        assert_eq!(requests, 51234);
        assert!((seconds - 1.1).abs() < 1e-9);
        let latency = latency.expect("percentiles");
        assert!((latency.p50 - 1.1e-3).abs() < 1e-9 && (latency.p99 - 0.95e-3).abs() < 1e-9);
        let broken = format!("{WRK}  Socket errors: connect 0, read 3, write 0, timeout 0\n");
        let _ = parse_wrk(&broken).expect_err("connections failed");
    }
}
