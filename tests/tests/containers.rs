//! Real containers, run by podman, captured without being configured one by one.
#![cfg(feature = "containers")]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use tidegate_tests::config::Config;
use tidegate_tests::node::Node;
use tidegate_tests::proxy::Proxy;
use tidegate_tests::run::{self, TempDir};
use tidegate_tests::{program, upstream::Upstream};

const SERVICE: &str = "172.16.0.1:50001";

/// podman with settings that work as root on machines with cgroup v1 and v2 side by side: runc puts a container
/// into the v2 hierarchy too (`0::` in /proc/PID/cgroup), crun does not.
fn podman(args: &[&str]) -> Result<String> {
    let output = Command::new("podman")
        .args(["--runtime", "runc", "--cgroup-manager=cgroupfs", "--log-level=error"])
        .args(args)
        .output()
        .context("run podman")?;
    Ok(stdout(&output).with_context(|| format!("podman {args:?}"))?.trim().to_owned())
}

fn stdout(output: &Output) -> Result<String> {
    ensure!(output.status.success(), "{}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// An image with nothing in it but one program and the libraries that it is linked with; removed on drop.
struct Image(String);

impl Image {
    fn build() -> Result<Self> {
        let name = format!("localhost/{}", run::unique("image"));
        let dir = TempDir::new("image")?;
        let root = dir.path().join("root");
        let workload = program::built("workload")?;
        fs::create_dir_all(&root)?;
        fs::copy(&workload, root.join("workload"))?;
        for library in libraries(&workload)? {
            let copy = root.join(library.strip_prefix("/")?);
            fs::create_dir_all(copy.parent().context("a library has a directory")?)?;
            fs::copy(&library, copy)?;
        }
        let file = dir.path().join("Containerfile");
        fs::write(&file, "FROM scratch\nCOPY root /\nENTRYPOINT [\"/workload\"]\nCMD [\"hold\"]\n")?;
        let (file, context) = (file.display().to_string(), dir.path().display().to_string());
        podman(&["build", "--isolation", "chroot", "-q", "-t", &name, "-f", &file, &context])?;
        Ok(Self(name))
    }
}

impl Drop for Image {
    fn drop(&mut self) {
        let _ = podman(&["image", "rm", "-f", &self.0]);
    }
}

/// The shared libraries of a program and its loader, as `ldd` lists them: `libc.so.6 => /lib/…/libc.so.6 (0x…)`, and
/// `/lib64/ld-linux-….so.2 (0x…)`.
fn libraries(program: &Path) -> Result<Vec<PathBuf>> {
    let listed = stdout(&Command::new("ldd").arg(program).output().context("run ldd")?)?;
    let paths = listed.lines().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    Ok(paths.map(PathBuf::from).collect())
}

/// A running container; removed on drop.
struct Container {
    id: String,
}

impl Container {
    /// Starts one below the cgroup that the node's pods live in, and links it to the node's router.
    fn start(node: &Node, image: &Image, address: &str) -> Result<Self> {
        let parent = node.network.cgroup().relative();
        let id = podman(&[
            "run",
            "-d",
            "--network",
            "none",
            "--cgroup-parent",
            &parent,
            "--ulimit",
            "nofile=20000:20000",
            "--ulimit",
            "nproc=10000:10000",
            &image.0,
        ])?;
        let container = Self { id };
        let pid = podman(&["inspect", "-f", "{{.State.Pid}}", &container.id])?.parse()?;
        let cgroup = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        ensure!(
            cgroup.lines().any(|line| line.starts_with(&format!("0::{parent}/"))),
            "the container is not below {parent}:\n{cgroup}"
        );
        node.network.connect_process(pid, &[address])?;
        Ok(container)
    }

    fn talk(&self, address: &str) -> Result<String> {
        podman(&["exec", &self.id, "/workload", "talk", address, "hello"])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = podman(&["rm", "-f", "-t", "0", &self.id]);
    }
}

/// Removes the images, with their containers, of runs that were killed.
fn sweep() -> Result<()> {
    for image in podman(&["images", "--format", "{{.Repository}}"])?.lines() {
        if image.strip_prefix("localhost/").is_some_and(run::maker_is_dead) {
            podman(&["image", "rm", "-f", image])?;
        }
    }
    Ok(())
}

fn wait_pods(proxy: &Proxy, count: u64) -> Result<()> {
    proxy.wait_stat("tidegate.intercept.pods_enrolled", |pods| pods == count).map(|_| ())
}

/// What the proxy counted and said, for a connection that did not go through it.
fn describe(proxy: &Proxy) -> String {
    let stats = proxy.admin().read("/stats").map(|response| response.body).unwrap_or_default();
    let counters: Vec<_> = stats.lines().filter(|line| line.starts_with("tidegate.intercept.")).collect();
    format!("{}\n{}", counters.join("\n"), proxy.log())
}

#[test]
fn containers_are_captured_without_being_configured() -> Result<()> {
    run::prepare()?;
    sweep()?;
    let node = Node::new()?;
    let server = node.pod("server", &["10.9.0.1"])?;
    let upstream = Upstream::identify(Some(server.netns()), "10.9.0.1:80", "foo")?;
    let image = Image::build()?;
    let early = Container::start(&node, &image, "10.9.0.9")?;
    let config = Config::new().service(SERVICE, "foo").cluster("foo", &["10.9.0.1:80"], json!({}));
    let proxy = node.proxy(&config).start()?;
    wait_pods(&proxy, 2)?;
    let said = early.talk(SERVICE)?;
    assert!(said.starts_with("foo\nhello -- peer 172.16.0.1:50001, local 10.9.0.9:"), "{said}");
    assert_eq!(upstream.served()?.peer.ip().to_string(), "10.9.0.9");

    let late = Container::start(&node, &image, "10.9.0.10")?;
    wait_pods(&proxy, 3)?;
    let said = late.talk(SERVICE).with_context(|| describe(&proxy))?;
    assert!(said.starts_with("foo\nhello -- peer 172.16.0.1:50001, local 10.9.0.10:"), "{said}");
    proxy.lines("access.log", "clu=foo", 2)?;

    drop(late);
    wait_pods(&proxy, 2)?;
    assert!(early.talk(SERVICE)?.starts_with("foo\nhello"));
    Ok(())
}
