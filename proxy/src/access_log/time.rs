//! Times as `%START_TIME(...)%` prints them: strftime, with Envoy's and absl's ways to ask for fractions.

use std::io::Write;
use std::time::{SystemTime, UNIX_EPOCH};

use jiff::civil::DateTime;
use jiff::tz::{Offset, TimeZone};

const MONTHS: [&str; 12] = [
    "January",
    "February",
    "March",
    "April",
    "May",
    "June",
    "July",
    "August",
    "September",
    "October",
    "November",
    "December",
];
const DAYS: [&str; 7] = ["Sunday", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday"];

/// A time format, parsed. Printing takes no allocation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct TimeFormat {
    parts: Vec<Part>,
    local: bool,
}

#[derive(Clone, Debug, PartialEq, Eq)]
enum Part {
    Literal(Box<str>),
    /// A strftime conversion.
    Directive(u8),
    /// So many digits of the fraction of the second.
    Fraction(u8),
    /// Seconds with so many digits of their fraction; `None`: as many as needed.
    Seconds(Option<u8>),
    /// The offset with a colon.
    Offset {
        seconds: bool,
    },
}

const DIRECTIVES: &[u8] = b"aAbBhcCdDeFgGHIjklmMnpPrRsStTuUVwWxXyYzZ";

impl TimeFormat {
    /// Parses a format. Conversions that don't exist print as they are, as in Envoy.
    pub(super) fn parse(format: &str, local: bool) -> Self {
        let mut parts = Vec::new();
        let mut literal = String::new();
        let mut rest = format;
        while let Some(at) = rest.find('%') {
            literal.push_str(&rest[..at]);
            rest = &rest[at + 1..];
            match conversion(rest) {
                Some((Part::Literal(text), length)) => {
                    literal.push_str(&text);
                    rest = &rest[length..];
                }
                Some((part, length)) => {
                    if !literal.is_empty() {
                        parts.push(Part::Literal(std::mem::take(&mut literal).into()));
                    }
                    parts.push(part);
                    rest = &rest[length..];
                }
                None => literal.push('%'),
            }
        }
        literal.push_str(rest);
        if !literal.is_empty() {
            parts.push(Part::Literal(literal.into()));
        }
        Self { parts, local }
    }

    /// What `%START_TIME%` prints.
    pub(super) fn iso8601() -> Self {
        Self::parse("%Y-%m-%dT%H:%M:%S.%3fZ", false)
    }

    /// What `%START_TIME_LOCAL%` prints.
    pub(super) fn iso8601_local() -> Self {
        Self::parse("%Y-%m-%dT%H:%M:%S.%3f%z", true)
    }

    /// Prints a time. Times before 1970 print as 1970.
    pub(super) fn write(&self, time: SystemTime, out: &mut Vec<u8>) {
        let since = time.duration_since(UNIX_EPOCH).unwrap_or_default();
        let timestamp = jiff::Timestamp::from_second(since.as_secs() as i64).unwrap_or(jiff::Timestamp::MAX);
        let zone = if self.local { TimeZone::system() } else { TimeZone::UTC };
        let info = zone.to_offset_info(timestamp);
        let when = Moment {
            civil: info.offset().to_datetime(timestamp),
            offset: info.offset(),
            zone: info.abbreviation(),
            epoch: timestamp.as_second(),
            nanos: since.subsec_nanos(),
        };
        self.parts.iter().for_each(|part| when.write(part, out));
    }
}

/// The conversion after a `%`, and how many bytes of `rest` it takes.
fn conversion(rest: &str) -> Option<(Part, usize)> {
    let bytes = rest.as_bytes();
    match *bytes.first()? {
        b'%' => Some((Part::Literal("%".into()), 1)),
        b'f' => Some((Part::Fraction(9), 1)),
        digit @ b'1'..=b'9' if bytes.get(1) == Some(&b'f') => Some((Part::Fraction(digit - b'0'), 2)),
        b'E' => match (bytes.get(1)?, bytes.get(2)) {
            (b'z', _) => Some((Part::Offset { seconds: false }, 2)),
            (b'*', Some(b'z')) => Some((Part::Offset { seconds: true }, 3)),
            (b'*', Some(b'S')) => Some((Part::Seconds(None), 3)),
            (b'*', Some(b'f')) => Some((Part::Fraction(9), 3)),
            (b'4', Some(b'Y')) => Some((Part::Directive(b'Y'), 3)),
            (digit @ b'0'..=b'9', Some(b'S')) => Some((Part::Seconds(Some(digit - b'0')), 3)),
            (digit @ b'0'..=b'9', Some(b'f')) => Some((Part::Fraction(digit - b'0'), 3)),
            _ => None,
        },
        directive if DIRECTIVES.contains(&directive) => Some((Part::Directive(directive), 1)),
        _ => None,
    }
}

struct Moment<'a> {
    civil: DateTime,
    offset: Offset,
    zone: &'a str,
    epoch: i64,
    nanos: u32,
}

impl Moment<'_> {
    fn write(&self, part: &Part, out: &mut Vec<u8>) {
        match part {
            Part::Literal(text) => out.extend_from_slice(text.as_bytes()),
            Part::Fraction(digits) => fraction(self.nanos, *digits, out),
            Part::Seconds(digits) => {
                digits2(self.civil.second() as i64, out);
                let (digits, nanos) = match digits {
                    Some(digits) => (*digits, self.nanos),
                    None => (9 - trailing_zeros(self.nanos), self.nanos),
                };
                if digits > 0 {
                    out.push(b'.');
                    fraction(nanos, digits, out);
                }
            }
            Part::Offset { seconds } => self.offset(true, *seconds, out),
            Part::Directive(directive) => self.directive(*directive, out),
        }
    }

    fn directive(&self, directive: u8, out: &mut Vec<u8>) {
        let c = &self.civil;
        let date = c.date();
        let weekday = c.weekday().to_sunday_zero_offset();
        let yearday = i64::from(date.day_of_year());
        let hour12 = match c.hour() % 12 {
            0 => 12,
            hour => hour,
        };
        let day = DAYS[weekday as usize];
        let month = MONTHS[c.month() as usize - 1];
        let weekday = i64::from(weekday);
        match directive {
            b'a' => out.extend_from_slice(&day.as_bytes()[..3]),
            b'A' => out.extend_from_slice(day.as_bytes()),
            b'b' | b'h' => out.extend_from_slice(&month.as_bytes()[..3]),
            b'B' => out.extend_from_slice(month.as_bytes()),
            b'c' => self.all(b"a b e T Y", b' ', out),
            b'C' => digits2(i64::from(c.year()) / 100, out),
            b'd' => digits2(c.day().into(), out),
            b'D' | b'x' => self.all(b"m d y", b'/', out),
            b'e' => padded(c.day().into(), 2, b' ', out),
            b'F' => self.all(b"Y m d", b'-', out),
            b'g' => digits2(i64::from(date.iso_week_date().year()) % 100, out),
            b'G' => number(date.iso_week_date().year().into(), out),
            b'H' => digits2(c.hour().into(), out),
            b'I' => digits2(hour12.into(), out),
            b'j' => padded(yearday, 3, b'0', out),
            b'k' => padded(c.hour().into(), 2, b' ', out),
            b'l' => padded(hour12.into(), 2, b' ', out),
            b'm' => digits2(c.month().into(), out),
            b'M' => digits2(c.minute().into(), out),
            b'n' => out.push(b'\n'),
            b'p' => out.extend_from_slice(if c.hour() < 12 { b"AM" } else { b"PM" }),
            b'P' => out.extend_from_slice(if c.hour() < 12 { b"am" } else { b"pm" }),
            b'r' => {
                self.all(b"I M S", b':', out);
                out.push(b' ');
                self.directive(b'p', out);
            }
            b'R' => self.all(b"H M", b':', out),
            b's' => number(self.epoch, out),
            b'S' => digits2(c.second().into(), out),
            b't' => out.push(b'\t'),
            b'T' | b'X' => self.all(b"H M S", b':', out),
            b'u' => number(if weekday == 0 { 7 } else { weekday }, out),
            b'U' => digits2((yearday + 6 - weekday) / 7, out),
            b'V' => digits2(date.iso_week_date().week().into(), out),
            b'w' => number(weekday, out),
            b'W' => digits2((yearday + 6 - (weekday + 6) % 7) / 7, out),
            b'y' => digits2(i64::from(c.year()) % 100, out),
            b'Y' => number(c.year().into(), out),
            b'z' => self.offset(false, false, out),
            b'Z' => out.extend_from_slice(self.zone.as_bytes()),
            _ => {}
        }
    }

    /// Several conversions, given with blanks in between, joined by `separator`.
    fn all(&self, directives: &[u8], separator: u8, out: &mut Vec<u8>) {
        for directive in directives {
            match directive {
                b' ' => out.push(separator),
                directive => self.directive(*directive, out),
            }
        }
    }

    fn offset(&self, colon: bool, with_seconds: bool, out: &mut Vec<u8>) {
        let seconds = self.offset.seconds();
        out.push(if seconds < 0 { b'-' } else { b'+' });
        let seconds = i64::from(seconds.abs());
        digits2(seconds / 3600, out);
        if colon {
            out.push(b':');
        }
        digits2(seconds / 60 % 60, out);
        if with_seconds {
            out.push(b':');
            digits2(seconds % 60, out);
        }
    }
}

fn digits2(value: i64, out: &mut Vec<u8>) {
    out.push(b'0' + (value / 10 % 10) as u8);
    out.push(b'0' + (value % 10) as u8);
}

fn padded(value: i64, width: u32, pad: u8, out: &mut Vec<u8>) {
    for place in (1..width).rev() {
        if value < 10_i64.pow(place) {
            out.push(pad);
        }
    }
    number(value, out);
}

fn number(value: i64, out: &mut Vec<u8>) {
    // Writing to a Vec can't fail.
    let _ = write!(out, "{value}");
}

fn fraction(nanos: u32, digits: u8, out: &mut Vec<u8>) {
    let mut scale = 100_000_000;
    for _ in 0..digits {
        out.push(b'0' + (nanos / scale % 10) as u8);
        scale /= 10;
    }
}

fn trailing_zeros(nanos: u32) -> u8 {
    (0..9).take_while(|place| nanos.is_multiple_of(10_u32.pow(place + 1))).count() as u8
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn print(format: &str, time: Duration) -> String {
        let mut out = Vec::new();
        TimeFormat::parse(format, false).write(UNIX_EPOCH + time, &mut out);
        String::from_utf8(out).unwrap()
    }

    /// What Envoy 1.40 printed for this moment.
    #[test]
    fn prints_what_envoy_prints() {
        let time = Duration::new(1_795_313_120, 470_592_000);
        for (format, expected) in [
            ("%Y-%m-%dT%H:%M:%S.%3f%z", "2026-11-22T02:05:20.470+0000"),
            ("%s", "1795313120"),
            ("%s.%6f", "1795313120.470592"),
            ("%f", "470592000"),
            ("%E3S", "20.470"),
            (
                "%Y/%m/%d %H:%M:%S %3f %1f %%x %Z %b %j %a %e",
                "2026/11/22 02:05:20 470 4 %x UTC Nov 326 Sun 22",
            ),
            ("%s%3f", "1795313120470"),
            ("%d/%b/%Y:%H:%M:%S %z", "22/Nov/2026:02:05:20 +0000"),
            ("%Q %10f %", "%Q %10f %"),
            ("%E*S %E4Y %Ez", "20.470592 2026 +00:00"),
        ] {
            assert_eq!(print(format, time), expected, "{format}");
        }
    }

    /// Every conversion against the C library's, over days that cover leap years and both ends of ISO weeks.
    #[test]
    fn agrees_with_date_1() {
        const FORMAT: &str = "%a|%A|%b|%B|%h|%C|%d|%D|%e|%F|%g|%G|%H|%I|%j|%k|%l|%m|%M|%p|%P|%R|%s|%S|%T|%u|%U|%V|%w|%W|%y|%Y|%z|%Z|%r|%c|%x|%X";
        let seconds: Vec<u64> =
            (0..40).map(|n| 946_684_799 + n * 86_400 * 91 + n * 3_607).chain([0, 1_104_537_599]).collect();
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("dates");
        std::fs::write(&list, seconds.iter().map(|s| format!("@{s}")).collect::<Vec<_>>().join("\n") + "\n")
            .unwrap();
        let output = std::process::Command::new("date")
            .env("LC_ALL", "C")
            .arg("-u")
            .arg("-f")
            .arg(&list)
            .arg(format!("+{FORMAT}"))
            .output()
            .unwrap();
        let expected = String::from_utf8(output.stdout).unwrap();
        assert_eq!(expected.lines().count(), seconds.len());
        for (second, expected) in seconds.iter().zip(expected.lines()) {
            assert_eq!(print(FORMAT, Duration::from_secs(*second)), expected, "@{second}");
        }
    }

    #[test]
    fn times_before_1970_do_not_fail() {
        let mut out = Vec::new();
        TimeFormat::iso8601().write(UNIX_EPOCH - Duration::from_secs(5), &mut out);
        assert_eq!(out, b"1970-01-01T00:00:00.000Z");
    }
}
