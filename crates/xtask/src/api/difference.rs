//! What changed from one text to another, line by line.

/// Returns the lines that were taken away, with a `-` before them, and those that are new, with a
/// `+`, in the order in which they stand.
pub(super) fn difference(old: &str, new: &str) -> Vec<String> {
    let old: Vec<&str> = old.lines().collect();
    let new: Vec<&str> = new.lines().collect();
    let common = common(&old, &new);
    let (mut at_old, mut at_new) = (0, 0);
    let mut changes = Vec::new();
    while at_old < old.len() || at_new < new.len() {
        match (old.get(at_old), new.get(at_new)) {
            (Some(a), Some(b)) if a == b => {
                at_old += 1;
                at_new += 1;
            }
            (Some(a), b)
                if b.is_none() || common[at_old + 1][at_new] >= common[at_old][at_new + 1] =>
            {
                changes.push(format!("-{a}"));
                at_old += 1;
            }
            (_, Some(b)) => {
                changes.push(format!("+{b}"));
                at_new += 1;
            }
            (_, None) => break,
        }
    }
    changes
}

/// Returns the length of the longest common subsequence of `old[i..]` and `new[j..]`, for all `i`
/// and `j`.
fn common(old: &[&str], new: &[&str]) -> Vec<Vec<u32>> {
    let mut lengths = vec![vec![0; new.len() + 1]; old.len() + 1];
    for i in (0..old.len()).rev() {
        for j in (0..new.len()).rev() {
            lengths[i][j] = if old[i] == new[j] {
                lengths[i + 1][j + 1] + 1
            } else {
                lengths[i + 1][j].max(lengths[i][j + 1])
            };
        }
    }
    lengths
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn equal_texts_have_no_difference() {
        assert!(difference("", "").is_empty());
        assert!(difference("a\nb\n", "a\nb\n").is_empty());
    }

    #[test]
    fn only_the_lines_that_changed_are_told() {
        assert_eq!(
            difference("a\nb\nc\nd\n", "a\nx\nc\ny\nd\n"),
            ["-b", "+x", "+y"]
        );
        assert_eq!(difference("", "a\n"), ["+a"]);
        assert_eq!(difference("a\nb\n", "b\n"), ["-a"]);
        assert_eq!(difference("a\nb\n", "a\n"), ["-b"]);
    }

    #[test]
    fn another_order_is_a_difference() {
        assert_eq!(difference("a\nb\n", "b\na\n"), ["-a", "+a"]);
    }
}
