//! The known name that a wrong one is most like.

/// Longer names than this are compared by their beginning: a hostile file costs no time.
const COMPARED: usize = 64;

/// The one of `known` that takes the fewest edits from `name`; of equals the first. A name that
/// `name` abbreviates counts as one edit away.
pub(crate) fn nearest<'a>(name: &str, known: &[&'a str]) -> Option<&'a str> {
    let name: String = name.chars().take(COMPARED).collect();
    let name = name.to_lowercase().replace('-', "_");
    known.iter().copied().min_by_key(|candidate| {
        if abbreviates(&name, candidate) {
            1
        } else {
            distance(&name, candidate)
        }
    })
}

/// Whether a text begins like the other, and has no letters but of it, in their order.
fn abbreviates(text: &str, whole: &str) -> bool {
    let mut rest = whole.chars();
    text.chars().next() == whole.chars().next() && text.chars().all(|c| rest.any(|r| r == c))
}

/// How many characters have to be put in, left out or replaced to get from one text to the other.
fn distance(from: &str, to: &str) -> usize {
    let to: Vec<char> = to.chars().collect();
    // The distances of what was read of `from` to every beginning of `to`.
    let mut row: Vec<usize> = (0..=to.len()).collect();
    for (read, a) in from.chars().enumerate() {
        let mut diagonal = row[0];
        row[0] = read + 1;
        for (index, b) in to.iter().enumerate() {
            let replaced = diagonal + usize::from(a != *b);
            diagonal = row[index + 1];
            row[index + 1] = replaced.min(diagonal + 1).min(row[index] + 1);
        }
    }
    row[to.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_distance_counts_edits() {
        for (a, b, edits) in [
            ("", "", 0),
            ("", "abc", 3),
            ("kitten", "sitting", 3),
            ("cpus", "vcpus", 1),
        ] {
            assert_eq!(distance(a, b), edits, "{a} {b}");
            assert_eq!(distance(b, a), edits, "{b} {a}");
        }
    }

    #[test]
    fn slips_of_the_pen_find_the_name_that_was_meant() {
        let known = ["kernel", "initrd", "cmdline", "vcpus", "memory", "readonly"];
        for (name, meant) in [
            ("kernal", "kernel"),
            ("cpus", "vcpus"),
            ("Memory", "memory"),
            ("mem", "memory"),
            ("read-only", "readonly"),
            ("ro", "readonly"),
            ("command_line", "cmdline"),
        ] {
            assert_eq!(nearest(name, &known), Some(meant), "{name}");
        }
        assert_eq!(nearest("x", &[]), None);
        assert!(nearest(&"é".repeat(100_000), &known).is_some());
    }
}
