//! Fuzzing of everything that reads what others wrote: mutates a corpus and checks a property of each input.
//!
//! No libFuzzer: on stable Rust it needs every dependency built once more with other flags, minutes that CI does not
//! have, and the decoders under the properties (prost, tls-parser, the YAML parser) have their own fuzzers. This driver
//! costs no build: the targets are tests of this crate. In place of coverage a property says what became of an input;
//! inputs with an outcome that was not seen before join the corpus of the run.
//!
//! `cargo xtask fuzz [TARGET] [--seconds N]` runs longer than the tests do. Seeds are in `proxy/fuzz/corpus/<target>`; what
//! fails is kept in `target/fuzz/<target>`, and belongs into the corpus once it is fixed.

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use fastrand::Rng;

/// Longest input, bytes.
const MAX_INPUT: usize = 16 << 10;
/// Most inputs that are mutated further.
const MAX_POOL: usize = 4000;

/// What to mutate, and how.
pub(crate) struct Target {
    /// Its folder of the corpus.
    pub(crate) name: &'static str,
    /// From a file of the corpus to an input; none for what is no seed.
    pub(crate) seed: fn(&Path, Vec<u8>) -> Option<Vec<u8>>,
    /// Words of the language.
    pub(crate) words: &'static [&'static [u8]],
}

/// A file as it is.
#[expect(clippy::unnecessary_wraps, reason = "a `Target::seed`")]
pub(crate) fn as_it_is(_: &Path, content: Vec<u8>) -> Option<Vec<u8>> {
    Some(content)
}

/// Checks `property` of every seed, then of mutations until time is up. The property panics when it does not hold, and
/// otherwise says what became of the input, in few different words.
pub(crate) fn run<O: Hash>(target: &Target, property: impl Fn(&[u8]) -> O) {
    let corpus = Path::new(env!("CARGO_MANIFEST_DIR")).join("fuzz/corpus").join(target.name);
    let mut pool = seeds(target, &corpus);
    assert!(!pool.is_empty(), "{} has no seeds", corpus.display());
    let seed = setting("TIDEGATE_FUZZ_SEED").unwrap_or_else(|| fastrand::u64(..));
    let time = Duration::from_secs(setting("TIDEGATE_FUZZ_SECONDS").unwrap_or(1));
    let mut rng = Rng::with_seed(seed);
    let mut outcomes = HashSet::new();
    let check = |input: &[u8], outcomes: &mut HashSet<u64>| {
        let found = catch_unwind(AssertUnwindSafe(|| property(input))).unwrap_or_else(|panic| {
            eprintln!("{} (seed {seed}): kept as {}", target.name, keep(target.name, input).display());
            resume_unwind(panic)
        });
        let mut hasher = DefaultHasher::new();
        found.hash(&mut hasher);
        outcomes.insert(hasher.finish())
    };
    for input in &pool {
        check(input, &mut outcomes);
    }
    let (begun, mut count) = (Instant::now(), 0_u64);
    while begun.elapsed() < time {
        let input = mutate(&mut rng, &pool, target.words);
        count += 1;
        if check(&input, &mut outcomes) && pool.len() < MAX_POOL {
            pool.push(input);
        }
    }
    println!("{}: {count} inputs, {} outcomes (seed {seed})", target.name, outcomes.len());
}

fn setting(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

fn seeds(target: &Target, corpus: &Path) -> Vec<Vec<u8>> {
    let mut files: Vec<PathBuf> = std::fs::read_dir(corpus)
        .map(|entries| entries.filter_map(|entry| Some(entry.ok()?.path())).collect())
        .unwrap_or_default();
    files.sort();
    files.iter().filter_map(|path| (target.seed)(path, std::fs::read(path).ok()?)).collect()
}

/// Keeps an input that failed.
fn keep(target: &str, input: &[u8]) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    input.hash(&mut hasher);
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/fuzz").join(target);
    let path = dir.join(format!("{:016x}.bin", hasher.finish()));
    if let Err(error) = std::fs::create_dir_all(&dir).and_then(|()| std::fs::write(&path, input)) {
        eprintln!("{}: {error}", path.display());
    }
    path
}

fn mutate(rng: &mut Rng, pool: &[Vec<u8>], words: &[&[u8]]) -> Vec<u8> {
    let mut input = pool[rng.usize(..pool.len())].clone();
    for _ in 0..=rng.usize(..4) {
        once(rng, &mut input, pool, words);
    }
    input.truncate(MAX_INPUT);
    input
}

/// One mutation. Small integers are what lengths, tags and counts are made of.
fn once(rng: &mut Rng, input: &mut Vec<u8>, pool: &[Vec<u8>], words: &[&[u8]]) {
    let at = rng.usize(..=input.len());
    let len = rng.usize(..=(input.len() - at).min(64));
    match rng.u8(..10) {
        0 if at < input.len() => input[at] ^= 1 << rng.u8(..8),
        1 if at < input.len() => {
            input[at] = *rng.choice(&[0, 1, 0x7f, 0x80, 0xff, b'\n', b'"']).unwrap_or(&0);
        }
        2 if at < input.len() => input[at] = input[at].wrapping_add(rng.u8(..)),
        3 => drop(input.drain(at..at + len)),
        4 => {
            let again = input[at..at + len].to_vec();
            input.splice(at..at, again);
        }
        5 => {
            let noise: Vec<u8> = (0..rng.usize(1..9)).map(|_| rng.u8(..)).collect();
            input.splice(at..at, noise);
        }
        6 => input.truncate(at),
        7 => {
            let other = &pool[rng.usize(..pool.len())];
            let from = rng.usize(..=other.len());
            let to = rng.usize(from..=other.len());
            input.splice(at..at + len, other[from..to].iter().copied());
        }
        8 if !words.is_empty() => {
            let word = words[rng.usize(..words.len())];
            let end = if rng.bool() { at } else { at + len };
            input.splice(at..end, word.iter().copied());
        }
        _ if at + 2 <= input.len() => {
            let value = input[at].wrapping_add(1);
            input[at + 1] = value;
        }
        _ => input.push(rng.u8(..)),
    }
}

#[test]
fn fuzz_bootstrap_yaml() {
    let target = Target {
        name: "bootstrap_yaml",
        seed: as_it_is,
        words: &[
            b"static_resources:\n",
            b"listeners:\n",
            b"- ",
            b"  ",
            b"{}",
            b"[]",
            b"&a ",
            b"*a",
            b"<<: ",
            b"!!str ",
            b"\"@type\": ",
            b"type.googleapis.com/envoy.extensions.filters.network.tcp_proxy.v3.TcpProxy",
            b"18446744073709551615",
            b"-1",
            b"1e3",
            b"0x1F",
            b".inf",
            b"\t",
            b"|\n",
            b"---\n",
            b"null",
            b"3s",
        ],
    };
    run(&target, |input| {
        let load = || {
            let source = crate::config::proto::Source::yaml("fuzz.yaml", String::from_utf8_lossy(input));
            let sources = crate::config::Sources { config_path: Some(source), config_yaml: None };
            crate::config::load(&sources, &crate::config::static_options())
                .map(|loaded| (loaded.bootstrap.listeners.len(), loaded.bootstrap.clusters.len()))
                .map_err(|error| error.to_string())
        };
        let verdict = load();
        assert_eq!(verdict, load(), "the same bytes have two verdicts");
        match verdict {
            Ok(_) => 0,
            Err(text) => {
                assert!(text.starts_with("fuzz.yaml"), "it does not say where: {text}");
                // What is wrong, without the names and numbers of this input.
                class(&text)
            }
        }
    });
}

/// What kind of text it is: its words of letters only.
pub(crate) fn class(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    let words = text.split_whitespace().filter(|word| word.bytes().all(|byte| byte.is_ascii_lowercase()));
    words.take(8).for_each(|word| word.hash(&mut hasher));
    hasher.finish()
}

#[test]
fn fuzz_proxy_header() {
    use crate::listener::filter::proxy_protocol::{MAX_HEADER, Outcome, inspect};
    let words: &[&[u8]] = &[
        b"PROXY ",
        b"TCP4 ",
        b"TCP6 ",
        b"UNKNOWN",
        b"\r\n",
        b"\r\n\r\n\0\r\nQUIT\n",
        b"\x21\x11\0\x0c",
        b"65535",
    ];
    run(&Target { name: "proxy_header", seed: hex, words }, |input| {
        let whole = inspect(input, &[], false);
        // However it arrives, the verdict is the same, and comes with the last byte that it needs.
        let mut have = 0;
        let streamed = loop {
            match inspect(&input[..have], &[], false) {
                Outcome::NeedMore(total) => {
                    assert!(total > have && total <= MAX_HEADER, "{total} after {have}");
                    if total > input.len() {
                        break inspect(input, &[], false);
                    }
                    have = total;
                }
                decided => break decided,
            }
        };
        match (whole, streamed) {
            (Outcome::Header(header), _) => {
                assert!(header.len <= input.len());
                assert_eq!(inspect(&input[..header.len], &[], false), whole, "what follows decides nothing");
                assert_eq!(whole, streamed);
                (
                    1,
                    header.addresses.is_some(),
                    u8::from(header.addresses.is_some_and(|(from, _)| from.is_ipv6())),
                )
            }
            (Outcome::NeedMore(_), _) => (2, false, 0),
            (whole, streamed) => {
                assert_eq!(whole, streamed);
                (3, matches!(whole, Outcome::NoHeader), 0)
            }
        }
    });
}

#[test]
fn fuzz_tls_hello() {
    use crate::listener::filter::tls_inspector::{Outcome, inspect};
    const MAX: usize = 4096;
    let words: &[&[u8]] =
        &[b"\x16\x03\x01", b"\0\0", b"\0\x10", b"\x02h2", b"\x08http/1.1", b"example.com", b"\0\x2b"];
    run(&Target { name: "tls_hello", seed: hex, words }, |input| {
        let input = &input[..input.len().min(MAX)];
        let whole = inspect(input, MAX);
        let mut have = 0;
        let streamed = loop {
            match inspect(&input[..have], MAX) {
                Outcome::NeedMore(total) => {
                    assert!(total > have && total <= MAX, "{total} after {have}");
                    if total > input.len() {
                        break None;
                    }
                    have = total;
                }
                decided => break Some(decided),
            }
        };
        if let Some(streamed) = streamed {
            assert_eq!(whole, streamed, "it depends on how it arrives");
        }
        match whole {
            Outcome::NeedMore(_) => (0, 0, false),
            Outcome::NotTls => (1, 0, false),
            Outcome::TooLarge => (2, 0, false),
            Outcome::Tls(hello) => {
                let name = hello.server_name.as_deref().unwrap_or_default();
                assert!(name.len() <= 255 && name.bytes().all(|byte| byte.is_ascii_graphic()));
                (3, hello.application_protocols.len(), hello.server_name.is_some())
            }
        }
    });
}

/// Bytes as hexadecimal digits, with comments after `#`.
fn hex(_: &Path, content: Vec<u8>) -> Option<Vec<u8>> {
    let text = String::from_utf8(content).ok()?;
    let digits: Vec<u8> = text
        .lines()
        .flat_map(|line| line.split('#').next().unwrap_or_default().bytes())
        .filter(|byte| !byte.is_ascii_whitespace())
        .collect();
    let pairs = digits.chunks(2).map(|pair| u8::from_str_radix(std::str::from_utf8(pair).ok()?, 16).ok());
    pairs.collect()
}

/// The driver gets away from its seeds, and a property that does not hold ends the run.
#[test]
fn what_does_not_hold_is_found() {
    let target = Target { name: "proxy_header", seed: hex, words: &[] };
    let found = std::cell::RefCell::new(Vec::new());
    let outcome = catch_unwind(AssertUnwindSafe(|| {
        run(&target, |input| {
            // No seed has it.
            if input.contains(&0xee) {
                input.clone_into(&mut found.borrow_mut());
                panic!("as it should");
            }
        });
    }));
    assert!(outcome.is_err(), "nothing was found");
    // The same bytes once more, to learn the file's name.
    std::fs::remove_file(keep("proxy_header", &found.borrow())).unwrap();
}
