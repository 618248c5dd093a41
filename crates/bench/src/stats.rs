//! Figures of many runs.

use serde::Serialize;

/// The middle and the ends of some samples.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub(crate) struct Summary {
    pub(crate) median: f64,
    pub(crate) low: f64,
    pub(crate) high: f64,
}

impl Summary {
    /// Of samples in any order, of which there is at least one; `low` and `high` are their
    /// quartiles.
    pub(crate) fn of(samples: &[f64]) -> Self {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let at = |quarter: usize| {
            let index = (sorted.len().saturating_sub(1) * quarter + 2) / 4;
            sorted.get(index).copied().unwrap_or(f64::NAN)
        };
        Self {
            median: at(2),
            low: at(1),
            high: at(3),
        }
    }
}

/// A line of a result.
#[derive(Clone, Debug, Serialize)]
pub(crate) struct Row {
    /// What was measured, with its unit.
    pub(crate) what: String,
    /// Of whom.
    pub(crate) subject: &'static str,
    /// The figures.
    #[serde(flatten)]
    pub(crate) summary: Summary,
    /// The median over that of another, and of whom, where it was measured too.
    pub(crate) ratio: Option<Ratio>,
}

/// How many times another's figure it is.
#[derive(Clone, Copy, Debug, Serialize)]
pub(crate) struct Ratio {
    pub(crate) to: &'static str,
    pub(crate) times: f64,
}

/// Makes lines of the samples of several subjects, with ratios to the floor's.
pub(crate) fn rows(what: &str, samples: &[(&'static str, Vec<f64>)]) -> Vec<Row> {
    rows_to(crate::subject::FLOOR, what, samples)
}

/// Makes lines of the samples of several subjects, with ratios to those of `base`. Who has no
/// samples has no line.
pub(crate) fn rows_to(
    base: &'static str,
    what: &str,
    samples: &[(&'static str, Vec<f64>)],
) -> Vec<Row> {
    let measured = || samples.iter().filter(|(_, samples)| !samples.is_empty());
    let median = measured()
        .find(|(name, _)| *name == base)
        .map(|(_, samples)| Summary::of(samples).median);
    measured()
        .map(|(subject, samples)| {
            let summary = Summary::of(samples);
            Row {
                what: what.to_owned(),
                subject,
                summary,
                ratio: median.map(|median| Ratio {
                    to: base,
                    times: summary.median / median,
                }),
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_middle_of_samples_in_any_order() {
        let summary = Summary::of(&[5.0, 1.0, 4.0, 2.0, 3.0]);
        assert_eq!((summary.low, summary.median, summary.high), (2.0, 3.0, 4.0));
        assert_eq!(Summary::of(&[7.0]).median, 7.0);
    }

    #[test]
    fn ratios_are_to_the_floor() {
        let samples = [("floor", vec![2.0]), ("kiln", vec![3.0])];
        let rows = rows("x", &samples);
        assert_eq!(rows[0].ratio.unwrap().times, 1.0);
        assert_eq!(rows[1].ratio.unwrap().times, 1.5);
    }

    #[test]
    fn who_has_no_samples_has_no_line_and_is_no_base() {
        let samples = [("qemu", vec![]), ("kiln", vec![3.0])];
        let rows = rows_to("qemu", "x", &samples);
        assert_eq!(rows.len(), 1);
        assert!(rows[0].ratio.is_none());
    }
}
