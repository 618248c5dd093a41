//! A strict reader of Prometheus' text format, version 0.0.4.

use std::collections::{BTreeMap, BTreeSet};

/// A sample's labels and their values.
pub type Labels = BTreeMap<String, String>;

/// What a text says.
#[derive(Debug, Default)]
pub struct Exposition {
    /// The type of each family.
    pub types: BTreeMap<String, String>,
    /// The samples, by name and labels.
    pub samples: BTreeMap<(String, Labels), f64>,
}

impl Exposition {
    /// Reads a text, or says what is wrong with it.
    pub fn parse(text: &str) -> Result<Self, String> {
        if !text.ends_with('\n') {
            return Err("the last line has no end".to_owned());
        }
        let mut read = Self::default();
        let mut helped = BTreeSet::new();
        let mut family = String::new();
        for line in text.lines() {
            let wrong = |what: &str| format!("{what}: {line}");
            if let Some(rest) = line.strip_prefix("# HELP ") {
                let (name, _) = rest.split_once(' ').ok_or_else(|| wrong("no help"))?;
                if !helped.insert(name.to_owned()) {
                    return Err(wrong("a second help"));
                }
            } else if let Some(rest) = line.strip_prefix("# TYPE ") {
                let (name, kind) = rest.split_once(' ').ok_or_else(|| wrong("no type"))?;
                let known = ["counter", "gauge", "histogram"].contains(&kind);
                if !known || !helped.contains(name) || !is_name(name) {
                    return Err(wrong("no such type, or no help before it"));
                }
                if kind == "counter" && !name.ends_with("_total") {
                    return Err(wrong("a counter without `_total`"));
                }
                if read
                    .types
                    .insert(name.to_owned(), kind.to_owned())
                    .is_some()
                {
                    return Err(wrong("a second type"));
                }
                name.clone_into(&mut family);
            } else {
                let (name, labels, value) = sample(line).ok_or_else(|| wrong("no sample"))?;
                let suffix = name
                    .strip_prefix(&family)
                    .ok_or_else(|| wrong("out of its family"))?;
                let allowed: &[&str] = match read.types.get(&family).map(String::as_str) {
                    Some("histogram") => &["_bucket", "_sum", "_count"],
                    Some(_) => &[""],
                    None => &[],
                };
                if !allowed.contains(&suffix) {
                    return Err(wrong("not a sample of its family"));
                }
                if read.samples.insert((name, labels), value).is_some() {
                    return Err(wrong("a second sample of the same labels"));
                }
            }
        }
        read.check_histograms()?;
        Ok(read)
    }

    /// The value of a sample.
    #[must_use]
    pub fn get(&self, name: &str, labels: &[(&str, &str)]) -> Option<f64> {
        let owned = labels
            .iter()
            .map(|(k, v)| ((*k).to_owned(), (*v).to_owned()));
        self.samples
            .get(&(name.to_owned(), owned.collect()))
            .copied()
    }

    /// Buckets grow with their bounds, and the last one, without a bound, has all.
    fn check_histograms(&self) -> Result<(), String> {
        let mut series: BTreeMap<(&str, Labels), Vec<(f64, f64)>> = BTreeMap::new();
        for ((name, labels), value) in &self.samples {
            let Some(name) = name.strip_suffix("_bucket") else {
                continue;
            };
            let mut labels = labels.clone();
            let bound = labels
                .remove("le")
                .ok_or(format!("a bucket of {name} has no bound"))?;
            let bound = number(&bound).ok_or(format!("a bucket of {name} up to {bound}"))?;
            series
                .entry((name, labels))
                .or_default()
                .push((bound, *value));
        }
        for ((name, labels), mut buckets) in series {
            buckets.sort_by(|a, b| a.0.total_cmp(&b.0));
            let last = buckets.last().copied().unwrap_or_default();
            let of = |suffix| {
                self.samples
                    .get(&(format!("{name}{suffix}"), labels.clone()))
            };
            let grows = buckets.windows(2).all(|two| two[0].1 <= two[1].1);
            if !grows || last.0 != f64::INFINITY || of("_count") != Some(&last.1) {
                return Err(format!("the buckets of {name} {labels:?}: {buckets:?}"));
            }
            if of("_sum").is_none() {
                return Err(format!("{name} {labels:?} has no sum"));
            }
        }
        Ok(())
    }
}

fn is_name(name: &str) -> bool {
    let allowed = |c: char| c.is_ascii_alphanumeric() || c == '_';
    !name.is_empty() && name.chars().all(allowed) && !name.starts_with(|c: char| c.is_ascii_digit())
}

fn number(text: &str) -> Option<f64> {
    match text {
        "+Inf" => Some(f64::INFINITY),
        digits if digits.starts_with(|c: char| c.is_ascii_digit()) => digits.parse().ok(),
        _ => None,
    }
}

fn sample(line: &str) -> Option<(String, Labels, f64)> {
    let at = line.find(['{', ' '])?;
    let (name, mut rest) = line.split_at(at);
    let mut labels = Labels::new();
    if let Some(inside) = rest.strip_prefix('{') {
        rest = inside;
        while let Some((label, quoted)) = rest.split_once("=\"") {
            if rest.starts_with('}') {
                break;
            }
            let (value, after) = unquoted(quoted)?;
            if !is_name(label) || labels.insert(label.to_owned(), value).is_some() {
                return None;
            }
            rest = after;
            if let Some(more) = rest.strip_prefix(',') {
                rest = more;
            }
        }
        rest = rest.strip_prefix('}')?;
    }
    let value = number(rest.strip_prefix(' ')?)?;
    is_name(name).then(|| (name.to_owned(), labels, value))
}

/// The value up to its closing quote, and what follows.
fn unquoted(text: &str) -> Option<(String, &str)> {
    let mut value = String::new();
    let mut characters = text.char_indices();
    while let Some((at, character)) = characters.next() {
        match character {
            '"' => return Some((value, &text[at + 1..])),
            '\\' => value.push(match characters.next()?.1 {
                'n' => '\n',
                same @ ('\\' | '"') => same,
                _ => return None,
            }),
            other => value.push(other),
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = "# HELP a_total An a.\n# TYPE a_total counter\n\
        a_total{x=\"q\\\"\\\\\\n} ,=\\\"\",y=\"\"} 3\n\
        # HELP h A h.\n# TYPE h histogram\n\
        h_bucket{le=\"0.5\"} 1\nh_bucket{le=\"+Inf\"} 2\nh_sum 1.5\nh_count 2\n";

    #[test]
    fn a_good_text_is_read() {
        let read = Exposition::parse(GOOD).unwrap_or_else(|error| panic!("{error}"));
        let labels = [("x", "q\"\\\n} ,=\""), ("y", "")];
        assert_eq!(read.get("a_total", &labels), Some(3.0));
        assert_eq!(read.get("h_sum", &[]), Some(1.5));
        assert_eq!(read.types.len(), 2);
    }

    #[test]
    fn whatever_is_wrong_is_found() {
        for (good, bad) in [
            ("# HELP a_total An a.\n", ""),
            ("# TYPE a_total counter\n", ""),
            ("a_total counter", "a_total number"),
            ("# TYPE h ", "# TYPE a_total "),
            ("h_count 2\n", ""),
            ("h_count 2\n", "h_count 2"),
            ("h_count 2\n", "h_count 3\n"),
            ("h_sum 1.5\n", ""),
            ("h_sum 1.5\n", "h 1.5\n"),
            ("h_sum 1.5\n", "h_sum 1.5\nh_sum 1.5\n"),
            ("+Inf\"} 2", "1\"} 2"),
            ("0.5\"} 1", "0.5\"} 3"),
            ("y=\"\"", "x=\"\""),
            ("y=\"\"", "y=\"\\t\""),
            ("} 3", "} x"),
            ("} 3", " 3"),
        ] {
            assert!(GOOD.contains(good), "{good}");
            let text = GOOD.replacen(good, bad, 1);
            assert!(Exposition::parse(&text).is_err(), "{text}");
        }
    }
}
