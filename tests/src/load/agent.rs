//! Clients in a process of their own: it enters a namespace and a cgroup, and its CPU time is its own.
//!
//! Orders and answers are lines of JSON on its standard input and output; it ends with its input.

use std::io::{BufRead, BufReader, Write};
use std::net::{SocketAddr, TcpStream};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, bail};
use nix::sys::resource::{Resource, getrlimit, setrlimit};
use serde::{Deserialize, Serialize};

use super::job::{Job, Measured};
use crate::program;

#[derive(Serialize, Deserialize)]
enum Order {
    Run(Job),
    /// Open connections to an echo and keep them.
    Hold {
        to: SocketAddr,
        count: usize,
    },
    Release,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Measured(Measured),
    Done,
    Failed(String),
}

/// A running one; killed on drop.
#[derive(Debug)]
pub struct Agent {
    child: Child,
    orders: ChildStdin,
    answers: BufReader<ChildStdout>,
}

impl Agent {
    /// Starts one through `command` (which enters a namespace, say).
    pub fn start(mut command: Command) -> Result<Self> {
        let mut child = command
            .arg(program::built("workload")?)
            .arg("load-client")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("start the load generator")?;
        let orders = child.stdin.take().context("no stdin")?;
        let answers = BufReader::new(child.stdout.take().context("no stdout")?);
        let mut agent = Self { child, orders, answers };
        agent.release().context("the load generator does not start")?;
        Ok(agent)
    }

    /// Process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Makes a measurement.
    pub fn run(&mut self, job: &Job) -> Result<Measured> {
        match self.ask(&Order::Run(job.clone()))? {
            Answer::Measured(measured) => Ok(measured),
            _ => bail!("the load generator answers something else"),
        }
    }

    /// Opens connections over which one message goes there and back, and keeps them.
    pub fn hold(&mut self, to: SocketAddr, count: usize) -> Result<()> {
        self.ask(&Order::Hold { to, count }).map(drop)
    }

    /// Closes the connections that it keeps.
    pub fn release(&mut self) -> Result<()> {
        self.ask(&Order::Release).map(drop)
    }

    fn ask(&mut self, order: &Order) -> Result<Answer> {
        writeln!(self.orders, "{}", serde_json::to_string(order)?).context("the load generator has ended")?;
        let mut line = String::new();
        self.answers.read_line(&mut line)?;
        match serde_json::from_str(&line).context("the load generator has ended")? {
            Answer::Failed(text) => bail!(text),
            answer => Ok(answer),
        }
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// `workload load-client`: does what it is told until its input ends.
pub fn serve() -> Result<()> {
    raise_file_limit()?;
    let mut held: Vec<TcpStream> = Vec::new();
    for line in std::io::stdin().lines() {
        let answer = match obey(serde_json::from_str(&line?)?, &mut held) {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

fn obey(order: Order, held: &mut Vec<TcpStream>) -> Result<Answer> {
    match order {
        Order::Run(job) => job.run().map(Answer::Measured),
        Order::Hold { to, count } => {
            held.extend(super::idle(to, count)?);
            Ok(Answer::Done)
        }
        Order::Release => {
            held.clear();
            Ok(Answer::Done)
        }
    }
}

/// As many files as this user may open.
pub fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise RLIMIT_NOFILE to its hard limit")
}
