//! A peer that is far away although it is on this machine: a line that takes its time.

use std::collections::VecDeque;
use std::fs::{File, OpenOptions};
use std::io::{Read as _, Write as _};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd as _, AsRawFd as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::libc;
use nix::poll::{PollFd, PollFlags, poll};

use crate::netns::Netns;

mod ioctl {
    nix::ioctl_write_ptr_bad!(set_interface, nix::libc::TUNSETIFF, nix::libc::ifreq);
}

/// Where source and destination are in an IPv4 header.
const ADDRESSES: [std::ops::Range<usize>; 2] = [12..16, 16..20];

/// What is sent to an address comes back from it after a while: who connects to it meets its own listener, as a peer that is far away.
/// Ends on drop.
#[derive(Debug)]
pub struct FarLine {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl FarLine {
    /// From `own` in `netns` to `far`, `delay` each way.
    pub fn new(netns: &Netns, own: Ipv4Addr, far: Ipv4Addr, delay: Duration) -> Result<Self> {
        let device = netns.enter(open)??;
        netns.ip(&format!("addr add {own} peer {far} dev far\nlink set far mtu 60000 up"))?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = std::thread::spawn(move || carry(device, delay, &stopped));
        Ok(Self { stop, thread: Some(thread) })
    }
}

impl Drop for FarLine {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Release);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// An interface whose packets are read and written here.
fn open() -> Result<File> {
    let path = "/dev/net/tun";
    let options = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NONBLOCK).open(path);
    let device = options.with_context(|| format!("open {path}"))?;
    // SAFETY: plain numbers and characters; all zero is a value.
    let mut interface: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in interface.ifr_name.iter_mut().zip(b"far") {
        *to = (*from).cast_signed();
    }
    interface.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as libc::c_short;
    // SAFETY: the kernel reads one `ifreq`, and that is one.
    unsafe { ioctl::set_interface(device.as_raw_fd(), &raw const interface) }.context("TUNSETIFF")?;
    Ok(device)
}

fn carry(mut device: File, delay: Duration, stop: &AtomicBool) {
    let mut under_way: VecDeque<(Instant, Vec<u8>)> = VecDeque::new();
    let mut packet = vec![0; 64 << 10];
    while !stop.load(Ordering::Acquire) {
        while let Ok(length) = device.read(&mut packet) {
            if length >= ADDRESSES[1].end {
                // Sums over both stay what they are.
                let (from, to) = packet.split_at_mut(ADDRESSES[1].start);
                from[ADDRESSES[0].clone()].swap_with_slice(&mut to[..4]);
                under_way.push_back((Instant::now() + delay, packet[..length].to_vec()));
            }
        }
        while under_way.front().is_some_and(|(due, _)| *due <= Instant::now()) {
            if let Some((_, packet)) = under_way.pop_front() {
                // What is lost is sent again.
                let _ = device.write(&packet);
            }
        }
        let mut wait = [PollFd::new(device.as_fd(), PollFlags::POLLIN)];
        let _ = poll(&mut wait, 1_u8);
    }
}
