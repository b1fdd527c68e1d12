//! `cargo xtask demo`: tidegate at work on this machine, in pods that can't reach anything else.

use std::io::{Read, Write};
use std::net::TcpStream;

use anyhow::{Context, Result};
use clap::Args;
use tidegate_tests::node::Node;
use tidegate_tests::pod::Pod;
use tidegate_tests::program;
use tidegate_tests::proxy::{Proxy, Setup};
use tidegate_tests::script::{self, Step, Transcript};
use tidegate_tests::tool;
use tidegate_tests::upstream::Upstream;

use crate::{cargo, root};

/// The configuration that is shown.
const CONFIG: &str = "config/seed-outbound.yaml";

/// Bytes of the bulk download.
const BULK: u64 = 64 << 20;

/// Arguments of `demo`.
#[derive(Args, Debug)]
pub(crate) struct Demo {
    /// Leave everything running and print how to try it by hand; Ctrl-C removes it.
    #[arg(long)]
    keep: bool,
}

/// The pods and what runs in them.
struct Scene {
    proxy: Proxy,
    client: Pod,
    _servers: Vec<(Pod, Vec<Upstream>)>,
    _node: Node,
}

impl Demo {
    pub(crate) fn run(&self) -> Result<()> {
        cargo::build(&["tidegate", "workload"])?;
        root::become_root()?;
        root::clean_up_on_signals()?;
        tool::require(&[("ip", "iproute2"), ("nsenter", "util-linux"), ("curl", "curl")])?;
        let scene = Scene::start()?;
        println!("{CONFIG}, and pods that reach each other and nothing else:");
        println!(
            "    client 10.0.9.9   foo-1 10.0.0.1   foo-2 10.0.0.2   bar 11.0.0.1 and 11.0.0.2   (no baz)\n"
        );
        scene.visit()?;
        scene.report()?;
        if self.keep {
            scene.keep();
        }
        Ok(())
    }
}

impl Scene {
    fn start() -> Result<Self> {
        let node = Node::new()?;
        let client = node.pod("client", &["10.0.9.9"])?;
        let servers =
            [("foo-1", &["10.0.0.1"][..]), ("foo-2", &["10.0.0.2"]), ("bar", &["11.0.0.1", "11.0.0.2"])];
        let servers = servers
            .into_iter()
            .map(|(name, addresses)| serve(&node, name, addresses))
            .collect::<Result<Vec<_>>>()?;
        let config = std::fs::read_to_string(program::repository().join(CONFIG)).context(CONFIG)?;
        let proxy = Setup::new(&config).netns(&node.netns).pods(node.network.cgroup().path()).start()?;
        Ok(Self { proxy, client, _servers: servers, _node: node })
    }

    /// Has curl connect from the client pod.
    fn visit(&self) -> Result<()> {
        self.curl("http://172.16.0.1:50001/", 6, "foo-service: captured, its two endpoints share")?;
        self.curl("http://172.16.0.2:50002/", 2, "bar-service: captured")?;
        self.curl("http://172.16.0.1:50001/bulk", 1, "64 MiB from foo-service: spliced inside the kernel")?;
        self.curl(
            "http://10.0.0.1:80/",
            1,
            "a pod's own address: no listener names it, so the kernel leaves it alone",
        )?;
        self.curl("http://172.16.0.3:50003/", 1, "baz-service: captured, but none of its endpoints exists")?;
        Ok(())
    }

    fn curl(&self, url: &str, times: usize, about: &str) -> Result<()> {
        println!("client$ curl {url}    # {about}");
        for _ in 0..times {
            let output = self.client.command("curl").args(["-sS", "--max-time", "10", url]).output()?;
            let said = if output.stdout.len() > 1000 {
                format!("({} bytes)", output.stdout.len())
            } else {
                let text = [output.stdout, output.stderr].concat();
                String::from_utf8_lossy(&text).trim().to_owned()
            };
            println!("    {said}");
        }
        Ok(())
    }

    fn report(&self) -> Result<()> {
        println!("\naccess log");
        for line in self.proxy.lines("proxy.log", "\"- - -\"", 10)? {
            println!("    {line}");
        }
        // The kernel's counters are read once a second.
        self.proxy.wait_stat("tidegate.intercept.captured", |count| count >= 10)?;
        let stats = self.proxy.admin().read("/stats")?.body;
        for (title, prefix) in
            [("kernel counters", "tidegate.intercept."), ("bytes and work per data path", "tidegate.pump.")]
        {
            println!("\n{title} ({prefix}*)");
            for (name, value) in nonzero(&stats, prefix) {
                println!("    {value:>12}  {name}");
            }
        }
        Ok(())
    }

    /// Waits for Ctrl-C.
    fn keep(&self) {
        println!("\nEverything stays until Ctrl-C. In another terminal, as root:");
        println!("    a shell in the client pod  {}", by_hand(&self.client));
        println!("      then                     curl http://172.16.0.1:50001/");
        println!("    the admin server           {}", self.admin_by_hand("/help"));
        println!("    the log                    tail -f {}", self.proxy.path("proxy.log").display());
        loop {
            std::thread::park();
        }
    }

    fn admin_by_hand(&self, path: &str) -> String {
        let admin = self.proxy.admin();
        let enter = admin.netns.as_ref().map(|netns| format!("nsenter --net={} ", netns.path().display()));
        format!("{}curl http://{}{path}", enter.unwrap_or_default(), admin.address)
    }
}

fn by_hand(pod: &Pod) -> String {
    format!(
        "sh -c 'echo 0 > {}/cgroup.procs; exec nsenter --net={} sh'",
        pod.cgroup().path().display(),
        pod.netns().path().display()
    )
}

fn nonzero<'a>(stats: &'a str, prefix: &str) -> impl Iterator<Item = (&'a str, &'a str)> {
    stats
        .lines()
        .filter_map(move |line| line.strip_prefix(prefix)?.split_once(": "))
        .filter(|(_, value)| *value != "0")
}

/// A pod that answers HTTP on port 80 of all its addresses.
fn serve(node: &Node, name: &'static str, addresses: &[&'static str]) -> Result<(Pod, Vec<Upstream>)> {
    let pod = node.pod(name, addresses)?;
    let upstreams = addresses
        .iter()
        .map(|&address| {
            Upstream::start_with(Some(pod.netns()), &format!("{address}:80"), move |stream| {
                answer(stream, name, address)
            })
        })
        .collect::<Result<Vec<_>>>()?;
    Ok((pod, upstreams))
}

fn answer(mut stream: TcpStream, name: &str, address: &str) -> Transcript {
    let mut request = Vec::new();
    let mut buffer = [0; 4096];
    while !request.windows(4).any(|bytes| bytes == b"\r\n\r\n") {
        match stream.read(&mut buffer) {
            Ok(0) | Err(_) => break,
            Ok(length) => request.extend_from_slice(&buffer[..length]),
        }
    }
    let peer = stream.peer_addr().map_or_else(|_| "?".to_owned(), |peer| peer.to_string());
    let greeting = format!("{name} ({address}) answers {peer}\n");
    let bulk = request.starts_with(b"GET /bulk ");
    let length = if bulk { BULK } else { greeting.len() as u64 };
    let head = format!("HTTP/1.1 200 OK\r\ncontent-length: {length}\r\nconnection: close\r\n\r\n");
    let _ = stream.write_all(head.as_bytes());
    let body = if bulk { Step::WritePattern(BULK) } else { script::write(&greeting) };
    script::run(stream, &[body, Step::ShutdownWrite, Step::ReadToEnd])
}
