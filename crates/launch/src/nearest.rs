//! The nearest name to a misspelt one.

/// The candidate nearest to `word`, if one is near enough to be worth suggesting.
pub(crate) fn nearest<'a>(word: &str, candidates: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // A third of the letters may differ; the Jaro-Winkler measure also finds names that share a beginning.
    candidates
        .into_iter()
        .map(|candidate| (strsim::jaro_winkler(word, candidate), candidate))
        .filter(|(score, candidate)| {
            let longest = word.chars().count().max(candidate.chars().count());
            *score > 0.8 || 3 * strsim::osa_distance(word, candidate) <= longest
        })
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::nearest;

    #[test]
    fn finds_the_misspelt_and_leaves_the_unrelated() {
        assert_eq!(nearest("worker-l", ["worker-1", "master"]), Some("worker-1"));
        assert_eq!(nearest("trian.py", ["train.py", "setup.py"]), Some("train.py"));
        assert_eq!(nearest("zebra", ["worker-1", "master"]), None);
        assert_eq!(nearest("x", []), None);
    }
}
