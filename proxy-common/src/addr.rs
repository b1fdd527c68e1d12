use core::net::{IpAddr, Ipv4Addr, Ipv6Addr};

/// An IPv4 or IPv6 address, 16 bytes in network order; IPv4 is `::ffff:a.b.c.d`.
///
/// Held as four words because the kernel's contexts are read and written in words. Each word keeps the memory
/// order of its four bytes: no word is ever byte-swapped.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Addr {
    words: [u32; 4],
}

const _: () = assert!(size_of::<Addr>() == 16 && align_of::<Addr>() == 4);

/// Third word of a v4-mapped address: `00 00 ff ff` in memory.
const MAPPED: u32 = 0x0000_ffff_u32.to_be();

impl Addr {
    /// `::`, and "none" where a field says so.
    pub const ZERO: Self = Self { words: [0; 4] };

    /// `::1`.
    pub const LOOPBACK_V6: Self = Self { words: [0, 0, 0, 1_u32.to_be()] };

    /// From four words in network byte order, as in `bpf_sock_addr.user_ip6`.
    #[inline(always)]
    pub const fn from_words(words: [u32; 4]) -> Self {
        Self { words }
    }

    /// From an IPv4 address in network byte order, as in `bpf_sock_addr.user_ip4`.
    #[inline(always)]
    pub const fn from_v4_be(v4: u32) -> Self {
        Self { words: [0, 0, MAPPED, v4] }
    }

    /// The four words in network byte order.
    #[inline(always)]
    pub const fn words(&self) -> [u32; 4] {
        self.words
    }

    /// The IPv4 address in network byte order; meaningful when [`Self::is_v4`].
    #[inline(always)]
    pub const fn v4_be(&self) -> u32 {
        self.words[3]
    }

    /// As two numbers, the upper half first, so that addresses can be compared.
    #[inline(always)]
    pub const fn halves(&self) -> [u64; 2] {
        const fn half(upper: u32, lower: u32) -> u64 {
            (u32::from_be(upper) as u64) << 32 | u32::from_be(lower) as u64
        }
        let [a, b, c, d] = self.words;
        [half(a, b), half(c, d)]
    }

    /// Whether this is an IPv4 address.
    #[inline(always)]
    pub const fn is_v4(&self) -> bool {
        (self.words[0] | self.words[1] | (self.words[2] ^ MAPPED)) == 0
    }

    /// Bits of [`Self::prefix_key`] before the address itself.
    pub const PREFIX_KEY_HEAD: u32 = 32;

    /// Key of a trie of networks: the family, then the address from its first bit. So that `::/0` is no prefix of IPv4.
    #[inline(always)]
    pub const fn prefix_key(&self) -> [u32; 5] {
        if self.is_v4() {
            [4, self.v4_be(), 0, 0, 0]
        } else {
            [6, self.words[0], self.words[1], self.words[2], self.words[3]]
        }
    }

    /// Whether all bytes are zero. `0.0.0.0` is not (see [`Self::is_unspecified`]).
    #[inline(always)]
    pub const fn is_zero(&self) -> bool {
        (self.words[0] | self.words[1] | self.words[2] | self.words[3]) == 0
    }

    /// `::` or `0.0.0.0`: the kernel connects these to the loopback.
    #[inline(always)]
    pub const fn is_unspecified(&self) -> bool {
        self.is_zero() || (self.is_v4() && self.words[3] == 0)
    }

    /// `::1` or `127.0.0.0/8`.
    #[inline(always)]
    pub const fn is_loopback(&self) -> bool {
        if self.is_v4() {
            u32::from_be(self.words[3]) >> 24 == 127
        } else {
            (self.words[0] | self.words[1] | self.words[2] | (self.words[3] ^ 1_u32.to_be())) == 0
        }
    }

    /// `fe80::/10`. Its scope id would be lost on the way to the proxy.
    #[inline(always)]
    pub const fn is_v6_link_local(&self) -> bool {
        u32::from_be(self.words[0]) >> 22 == 0xfe80 >> 6
    }

    /// Equality without a call to `memcmp`, which a BPF program doesn't have.
    #[inline(always)]
    pub const fn same(&self, other: &Self) -> bool {
        ((self.words[0] ^ other.words[0])
            | (self.words[1] ^ other.words[1])
            | (self.words[2] ^ other.words[2])
            | (self.words[3] ^ other.words[3]))
            == 0
    }

    /// As an [`IpAddr`]; v4-mapped comes back as plain IPv4.
    pub fn to_ip(self) -> IpAddr {
        let mut bytes = [0; 16];
        for (i, word) in self.words.iter().enumerate() {
            bytes[i * 4..i * 4 + 4].copy_from_slice(&word.to_ne_bytes());
        }
        Ipv6Addr::from(bytes).to_canonical()
    }
}

impl From<Ipv4Addr> for Addr {
    fn from(v4: Ipv4Addr) -> Self {
        Self::from_v4_be(u32::from_ne_bytes(v4.octets()))
    }
}

impl From<Ipv6Addr> for Addr {
    fn from(v6: Ipv6Addr) -> Self {
        let b = v6.octets();
        let word = |i: usize| u32::from_ne_bytes([b[i], b[i + 1], b[i + 2], b[i + 3]]);
        Self { words: [word(0), word(4), word(8), word(12)] }
    }
}

impl From<IpAddr> for Addr {
    fn from(ip: IpAddr) -> Self {
        match ip {
            IpAddr::V4(v4) => v4.into(),
            IpAddr::V6(v6) => v6.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn addr(text: &str) -> Addr {
        text.parse::<IpAddr>().unwrap().into()
    }

    #[test]
    fn v4_is_stored_mapped_and_comes_back_plain() {
        let a = addr("172.16.0.1");
        assert!(a.is_v4());
        assert_eq!(a, addr("::ffff:172.16.0.1"));
        assert_eq!(a.v4_be().to_ne_bytes(), [172, 16, 0, 1]);
        assert_eq!(a.to_ip(), "172.16.0.1".parse::<IpAddr>().unwrap());
        assert_eq!(addr("2001:db8::1").to_ip(), "2001:db8::1".parse::<IpAddr>().unwrap());
    }

    #[test]
    fn classes() {
        for (text, loopback, unspecified, link_local) in [
            ("127.0.0.1", true, false, false),
            ("127.255.1.2", true, false, false),
            ("::ffff:127.0.0.1", true, false, false),
            ("::1", true, false, false),
            ("::2", false, false, false),
            ("1::1", false, false, false),
            ("128.0.0.1", false, false, false),
            ("0.0.0.0", false, true, false),
            ("::", false, true, false),
            ("fe80::1", false, false, true),
            ("febf::1", false, false, true),
            ("fec0::1", false, false, false),
            ("169.254.1.1", false, false, false),
        ] {
            let a = addr(text);
            let got = (a.is_loopback(), a.is_unspecified(), a.is_v6_link_local());
            assert_eq!(got, (loopback, unspecified, link_local), "{text}");
        }
    }

    #[test]
    fn same_agrees_with_equality() {
        let all = ["127.0.0.1", "::1", "::", "0.0.0.0", "2001:db8::1", "2001:db8::2"].map(addr);
        for a in all {
            for b in all {
                assert_eq!(a.same(&b), a == b);
            }
        }
    }
}
