//! What runs inside a pod or a container: holds it open, connects when a test asks, or runs one script.

use std::net::TcpStream;
use std::process::ExitCode;

use tidegate_tests::script::{self, Step};
use tidegate_tests::workload::{self, Connect};

const USAGE: &str = "usage: workload hold | serve | talk ADDRESS [TEXT]
  hold   sleep until killed
  serve  answer a test's requests on standard input (a SOCK_SEQPACKET socket)
  talk   connect, send TEXT and a FIN, print what comes back and how it ended";

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments.as_slice() {
        ["hold"] => loop {
            std::thread::park();
        },
        ["serve"] => finish(workload::serve()),
        ["talk", address] => finish(talk(address, "")),
        ["talk", address, text] => finish(talk(address, text)),
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

fn finish(outcome: std::io::Result<()>) -> ExitCode {
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("workload: {error}");
            ExitCode::FAILURE
        }
    }
}
