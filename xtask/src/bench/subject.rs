//! Who is compared.

use std::fmt;
use std::str::FromStr;

use super::site::Ports;

/// A program, as it is compared.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Program {
    Tidegate,
    /// Another tidegate (`--tidegate-base`).
    Base,
    Envoy,
    /// As it comes.
    Haproxy,
    /// With the best tuning for bulk: forced splice, pipes of 1 MiB.
    HaproxySplice,
    Nginx,
    /// No proxy.
    Direct,
}

impl Program {
    pub(super) const ALL: [Self; 7] = [
        Self::Tidegate,
        Self::Base,
        Self::Envoy,
        Self::Haproxy,
        Self::HaproxySplice,
        Self::Nginx,
        Self::Direct,
    ];

    /// What it is called in every output.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::Tidegate => "tidegate",
            Self::Base => "base",
            Self::Envoy => "envoy",
            Self::Haproxy => "haproxy",
            Self::HaproxySplice => "haproxy-splice",
            Self::Nginx => "nginx",
            Self::Direct => "direct",
        }
    }

    pub(super) fn is_tidegate(self) -> bool {
        matches!(self, Self::Tidegate | Self::Base)
    }
}

/// How connections come to a proxy.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Way {
    /// Clients connect to its address.
    Address,
    /// Clients are in a pod and captured by eBPF.
    Intercept,
    /// Clients are in a pod and sent to a proxy that runs in it by nftables' REDIRECT, as those of a sidecar are.
    Redirect,
    /// Not at all: eBPF connects clients to the servers.
    Kernel,
    /// The same, where there are [`MANY_SERVICES`] with [`ENDPOINTS`] endpoints each.
    KernelMany,
}

impl Way {
    const ALL: [Self; 5] = [Self::Address, Self::Intercept, Self::Redirect, Self::Kernel, Self::KernelMany];

    /// What follows the name of a program.
    fn word(self) -> Option<&'static str> {
        match self {
            Self::Address => None,
            Self::Intercept => Some("intercept"),
            Self::Redirect => Some("redirect"),
            Self::Kernel => Some("kernel"),
            Self::KernelMany => Some("kernel-many"),
        }
    }

    pub(super) fn is_kernel(self) -> bool {
        matches!(self, Self::Kernel | Self::KernelMany)
    }

    /// Which programs it can be asked of.
    fn suits(self, program: Program) -> bool {
        match self {
            Self::Address => true,
            Self::Redirect => program != Program::Direct,
            Self::Intercept | Self::Kernel | Self::KernelMany => program.is_tidegate(),
        }
    }
}

/// Services of [`Way::KernelMany`].
pub(super) const MANY_SERVICES: u32 = 10_000;

/// Endpoints of each of them, and addresses of the servers on veth.
pub(super) const ENDPOINTS: u32 = 10;

/// A program and what it does beside proxying.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) struct Subject {
    pub(super) program: Program,
    /// Writes an access log to a file in memory.
    pub(super) log: bool,
    pub(super) way: Way,
}

impl Subject {
    pub(super) const TIDEGATE: Self = Self::plain(Program::Tidegate);
    pub(super) const ENVOY: Self = Self::plain(Program::Envoy);
    pub(super) const HAPROXY: Self = Self::plain(Program::Haproxy);
    pub(super) const NGINX: Self = Self::plain(Program::Nginx);
    pub(super) const DIRECT: Self = Self::plain(Program::Direct);
    pub(super) const HAPROXY_SPLICE: Self = Self::plain(Program::HaproxySplice);
    pub(super) const INTERCEPT: Self = Self { way: Way::Intercept, ..Self::TIDEGATE };
    pub(super) const KERNEL: Self = Self { way: Way::Kernel, ..Self::TIDEGATE };
    pub(super) const KERNEL_MANY: Self = Self { way: Way::KernelMany, ..Self::TIDEGATE };

    pub(super) const fn plain(program: Program) -> Self {
        Self { program, log: false, way: Way::Address }
    }

    /// Whether its clients are in a pod of their own, and connect to an address that nobody has.
    pub(super) fn is_captured(self) -> bool {
        self.way != Way::Address
    }

    /// Whether eBPF programs see their connect(2).
    pub(super) fn is_captured_by_ebpf(self) -> bool {
        self.is_captured() && self.way != Way::Redirect
    }

    /// The same in its clients' pod, behind a REDIRECT.
    pub(super) const fn redirected(self) -> Self {
        Self { way: Way::Redirect, ..self }
    }

    /// The same with an access log.
    pub(super) const fn logging(self) -> Self {
        Self { log: true, ..self }
    }

    /// Ports of its own: connections that were closed linger on the addresses that they had, and whoever shares
    /// them has to search longer for a free one.
    fn number(self) -> u16 {
        let ways = Way::ALL.len() as u16;
        (self.program as u16 * 2 + u16::from(self.log)) * ways + self.way as u16
    }

    pub(super) fn ports(self) -> Ports {
        Ports::of(self.number())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let log = if self.log { "+log" } else { "" };
        let way = self.way.word().map_or_else(String::new, |word| format!("+{word}"));
        f.pad(&format!("{}{way}{log}", self.program.name()))
    }
}

impl FromStr for Subject {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let mut words = text.split('+');
        let name = words.next().unwrap_or_default();
        let program = Program::ALL.into_iter().find(|program| program.name() == name).ok_or_else(|| {
            let names: Vec<_> = Program::ALL.iter().map(|program| program.name()).collect();
            format!(
                "no such subject; there are {}, with +log or +redirect (not direct), +intercept, +kernel, \
                 +kernel-many (tidegate)",
                names.join(", ")
            )
        })?;
        let mut subject = Self::plain(program);
        for word in words {
            let way = Way::ALL.into_iter().find(|way| way.word() == Some(word));
            match (word, way) {
                ("log", _) if program != Program::Direct => subject.log = true,
                (_, Some(way)) if way.suits(program) && !subject.is_captured() => subject.way = way,
                _ => return Err(format!("{name} can't be measured with +{word}")),
            }
        }
        Ok(subject)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    #[test]
    fn names_are_what_they_say() {
        let mut numbers = BTreeSet::new();
        for name in [
            "tidegate",
            "base",
            "envoy+log",
            "haproxy-splice",
            "nginx",
            "direct",
            "tidegate+intercept",
            "tidegate+redirect",
            "envoy+redirect",
            "haproxy-splice+redirect+log",
            "tidegate+kernel",
            "tidegate+kernel+log",
            "tidegate+kernel-many",
        ] {
            let subject: Subject = name.parse().expect("a subject");
            assert_eq!(subject.to_string(), name);
            assert!(numbers.insert(subject.number()), "{name} has ports of its own");
        }
        let both: Subject = "tidegate+log+intercept".parse().expect("a subject");
        assert!(both.log && both.is_captured());
        for wrong in [
            "direct+log",
            "envoy+intercept",
            "direct+redirect",
            "haproxy+kernel",
            "tidegate+kernel+intercept",
            "enovy",
            "",
            "nginx+",
        ] {
            assert!(wrong.parse::<Subject>().is_err(), "{wrong}");
        }
    }
}
