//! What runs inside a pod or a container: holds it open, connects when a test asks, runs one script, or makes load.

use std::io::Write as _;
use std::net::TcpStream;
use std::process::ExitCode;

use tidegate_tests::load;
use tidegate_tests::script::{self, Step};
use tidegate_tests::workload::{self, Connect};

const USAGE: &str = "usage: workload hold | serve | stall ADDRESS TEXT | talk ADDRESS [TEXT] | load-client | load-server ORDER
  hold         sleep until killed
  stall        connect, send TEXT, and sleep until killed without reading
  serve        answer a test's requests on standard input (a SOCK_SEQPACKET socket)
  talk         connect, send TEXT and a FIN, print what comes back and how it ended
  load-client  be the clients of a measurement; orders are lines of JSON on standard input
  load-server  be its servers, as ORDER (JSON) says, until standard input ends";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["hold"] => loop {
            std::thread::park();
        },
        ["stall", address, text] => finish(stall(address, text)),
        ["serve"] => finish(workload::serve()),
        ["talk", address] => finish(talk(address, "")),
        ["talk", address, text] => finish(talk(address, text)),
        ["load-client"] => finish(load::agent::serve()),
        ["load-server", order] => finish(load::server::run(order)),
        _ => {
            eprintln!("{USAGE}");
            ExitCode::from(2)
        }
    }
}

fn talk(address: &str, text: &str) -> std::io::Result<()> {
    let stream = TcpStream::from(Connect::to(address).open()?);
    let peer = stream.peer_addr()?;
    let local = stream.local_addr()?;
    let transcript = script::run(stream, &[script::write(text), Step::ShutdownWrite, Step::ReadToEnd]);
    println!("{} -- peer {peer}, local {local}, ended by {:?}", transcript.text().trim_end(), transcript.end);
    Ok(())
}

fn stall(address: &str, text: &str) -> std::io::Result<()> {
    let mut stream = TcpStream::from(Connect::to(address).open()?);
    stream.write_all(text.as_bytes())?;
    loop {
        std::thread::park();
    }
}

fn finish(outcome: Result<(), impl Into<anyhow::Error>>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {:#}", error.into());
            ExitCode::FAILURE
        }
    }
}
