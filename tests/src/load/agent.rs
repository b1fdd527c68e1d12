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
use super::visits::{Visit, Visitors};
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
    /// Visit a server until told to stop.
    Visit {
        to: SocketAddr,
        at_once: usize,
    },
    EndVisits,
}

#[derive(Serialize, Deserialize)]
enum Answer {
    Measured(Measured),
    Visits(Vec<Visit>),
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

    /// Starts threads that connect to a [`super::Server::whereabouts`], so many at once, as fast as they can.
    pub fn visit(&mut self, to: SocketAddr, at_once: usize) -> Result<()> {
        self.ask(&Order::Visit { to, at_once }).map(drop)
    }

    /// Stops them, and gives their connections. Fails when one has failed.
    pub fn visits(&mut self) -> Result<Vec<Visit>> {
        match self.ask(&Order::EndVisits)? {
            Answer::Visits(visits) => Ok(visits),
            _ => bail!("the load generator answers something else"),
        }
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
    let mut state = State::default();
    for line in std::io::stdin().lines() {
        let answer = match obey(serde_json::from_str(&line?)?, &mut state) {
            Ok(answer) => answer,
            Err(error) => Answer::Failed(format!("{error:#}")),
        };
        println!("{}", serde_json::to_string(&answer)?);
    }
    Ok(())
}

/// What goes on between orders.
#[derive(Default)]
struct State {
    held: Vec<TcpStream>,
    visitors: Vec<Visitors>,
}

fn obey(order: Order, State { held, visitors }: &mut State) -> Result<Answer> {
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
        Order::Visit { to, at_once } => {
            visitors.push(Visitors::start(to, at_once)?);
            Ok(Answer::Done)
        }
        Order::EndVisits => {
            let visits = visitors.drain(..).map(Visitors::finish).collect::<Result<Vec<_>>>()?;
            Ok(Answer::Visits(visits.concat()))
        }
    }
}

/// As many files as this user may open.
pub fn raise_file_limit() -> Result<()> {
    let (_, hard) = getrlimit(Resource::RLIMIT_NOFILE)?;
    setrlimit(Resource::RLIMIT_NOFILE, hard, hard).context("raise RLIMIT_NOFILE to its hard limit")
}
