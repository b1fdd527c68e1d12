//! Root, and cleaning up whatever happens.

use std::os::unix::fs::MetadataExt as _;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tidegate_tests::{program, run, tool};

/// Set for the process that sudo starts, so that it does not build as root.
const CHILD: &str = "TIDEGATE_XTASK_CHILD";

/// Whether this process was started by [`become_root`].
pub(crate) fn is_child() -> bool {
    std::env::var_os(CHILD).is_some()
}

/// Runs this command again under sudo unless it runs as root already.
pub(crate) fn become_root() -> Result<()> {
    if nix::unistd::geteuid().is_root() {
        return Ok(());
    }
    if is_child() || tool::find("sudo").is_none() {
        bail!("network namespaces and eBPF need root: run this as root, or install sudo");
    }
    eprintln!("network namespaces and eBPF need root: going on under sudo");
    let error = Command::new("sudo")
        .arg("--preserve-env=HOME,CARGO,CARGO_HOME,RUSTUP_HOME,CARGO_TARGET_DIR,CARGO_MANIFEST_DIR")
        .arg("env")
        .arg(format!("{CHILD}=1"))
        // A plain user's often lacks them; sudo's own would lack cargo.
        .arg(format!("PATH={}:/usr/local/sbin:/usr/sbin:/sbin", std::env::var("PATH").unwrap_or_default()))
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("run sudo")
}

/// Directories in target/ that are written to under sudo.
const WRITTEN_BY_ROOT: [&str; 4] = ["bench", "fuzz", "tmp", "tools"];

/// Gives what root has made in target/ to whoever owns that, who could not remove it otherwise.
pub(crate) fn give_back() {
    let target = program::target();
    let Ok(owner) = std::fs::metadata(&target) else { return };
    if owner.uid() == 0 {
        return;
    }
    let made: Vec<_> =
        WRITTEN_BY_ROOT.iter().map(|name| target.join(name)).filter(|path| path.exists()).collect();
    if made.is_empty() {
        return;
    }
    let given = tool::as_root("chown")
        .args(["-R", "--no-dereference", "--from=root"])
        .arg(format!("{}:{}", owner.uid(), owner.gid()))
        .args(made)
        .status();
    if !given.is_ok_and(|status| status.success()) {
        eprintln!("some of {} belongs to root now", target.display());
    }
}

/// After SIGINT or SIGTERM: pass it on to the child that runs, remove everything that this process has made,
/// and exit. Without this, Ctrl-C would end the process before any destructor ran.
pub(crate) fn clean_up_on_signals() -> Result<()> {
    clean_up_on_signals_after(|| ())
}

/// As [`clean_up_on_signals`], with something that has to be done first.
pub(crate) fn clean_up_on_signals_after(first: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut signals = signals()?;
    std::thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            let child = CHILD_PID.load(Ordering::Acquire);
            if child > 0 {
                let _ = kill(Pid::from_raw(child), Signal::SIGTERM);
            }
            first();
            run::remove_own();
            std::process::exit(128 + signal);
        }
    });
    Ok(())
}

/// For a process that has children and makes nothing itself: a signal is passed on to the child that runs, and that is all, so that
/// what there is to be removed when it has ended is removed. A second one ends this process.
pub(crate) fn pass_on_signals() -> Result<()> {
    let mut signals = signals()?;
    std::thread::spawn(move || {
        for signal in signals.forever() {
            if SIGNAL.swap(signal, Ordering::AcqRel) != 0 {
                std::process::exit(128 + signal);
            }
            let child = CHILD_PID.load(Ordering::Acquire);
            // A terminal sends SIGINT to the child too, and two of them mean "at once".
            if child > 0 && signal != signal_hook::consts::SIGINT {
                let _ = kill(Pid::from_raw(child), Signal::SIGTERM);
            }
        }
    });
    Ok(())
}

/// Fails if a signal has come.
pub(crate) fn not_interrupted() -> Result<()> {
    ensure!(SIGNAL.load(Ordering::Acquire) == 0, "interrupted");
    Ok(())
}

fn signals() -> Result<signal_hook::iterator::Signals> {
    use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
    Ok(signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGHUP])?)
}

/// The signal that [`pass_on_signals`] has passed on; 0: none.
static SIGNAL: AtomicI32 = AtomicI32::new(0);

/// The child to which signals are passed on; 0: none.
static CHILD_PID: AtomicI32 = AtomicI32::new(0);

/// Runs a child to its end; SIGINT and SIGTERM reach it too.
pub(crate) fn run_child(command: &mut Command) -> Result<std::process::ExitStatus> {
    let mut child = command.spawn().with_context(|| format!("run {}", command.get_program().display()))?;
    CHILD_PID.store(i32::try_from(child.id())?, Ordering::Release);
    let status = child.wait();
    CHILD_PID.store(0, Ordering::Release);
    Ok(status?)
}
