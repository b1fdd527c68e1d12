//! The tidegate binary: parses the command line and calls the library.

use std::process::ExitCode;

use clap::Parser;
use tidegate::args::Args;

fn main() -> ExitCode {
    tidegate::app::run(Args::parse())
}
