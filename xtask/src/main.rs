//! The repository's commands: `cargo xtask <verb>`. One file per verb.

mod bench;
mod build_ebpf;
mod cargo;
mod demo;
mod deny;
mod fuzz;
mod gen_api;
mod parity;
mod root;
mod same_node;
mod soak;
mod test;

use std::process::ExitCode;

use clap::Parser;
use tidegate_tests::run;

/// The repository's commands.
#[derive(Parser, Debug)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
enum Xtask {
    /// Show tidegate at work: pods, a service address, two endpoints, then a report.
    Demo(demo::Demo),
    /// Run every test: unit, property, in-process, namespaces and eBPF.
    Test(test::Test),
    /// Mutate what others write (responses of control planes, configuration, PROXY headers, TLS hellos) for longer than
    /// the tests do.
    Fuzz(fuzz::Fuzz),
    /// Run the same cases against the real Envoy and tidegate, and print the differences.
    Parity(parity::Parity),
    /// Measure tidegate, its peers and no proxy side by side: throughput, latency, CPU, memory.
    Bench(bench::Bench),
    /// Run tidegate with pods under every kind of load for long, and fail when memory, files or anything else grows.
    Soak(soak::Soak),
    /// Compare what applications see of connections inside a node with and without acceleration from socket to socket
    /// (docs/same-node.md).
    SameNode(same_node::SameNode),
    /// Remove the namespaces, cgroups, pins and processes that killed runs of these commands have left. (Each of them does so itself before
    /// it begins.)
    Sweep,
    /// Check licences, duplicate versions and sources of the dependencies.
    Deny(deny::Deny),
    /// Rebuild proxy-ebpf/prebuilt from source.
    BuildEbpf(build_ebpf::BuildEbpf),
    /// Regenerate the checked-in code of proxy/api from its .proto files.
    GenApi(gen_api::GenApi),
}

fn main() -> ExitCode {
    let outcome = match Xtask::parse() {
        Xtask::Demo(args) => args.run(),
        Xtask::Test(args) => args.run(),
        Xtask::Fuzz(args) => args.run(),
        Xtask::Parity(args) => args.run(),
        Xtask::Bench(args) => args.run(),
        Xtask::Soak(args) => args.run(),
        Xtask::SameNode(args) => args.run(),
        Xtask::Sweep => root::become_root().and_then(|()| run::sweep()),
        Xtask::Deny(args) => args.run(),
        Xtask::BuildEbpf(args) => args.run(),
        Xtask::GenApi(args) => args.run(),
    };
    if root::is_child() {
        root::give_back();
    }
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            // No backtrace: these are messages for whoever typed the command.
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn options_of_every_verb_go_together() {
        Xtask::command().debug_assert();
    }
}
