//! The Porter stemmer in the variant of NLTK, which ROUGE scores are computed with.
//!
//! Porter, "An algorithm for suffix stripping", 1980, with NLTK's departures: a short list of irregular words; `ies` and
//! `ied` of four-letter words give `ie`; `y` becomes `i` after any consonant but the first letter; `alli` may be followed
//! by another suffix of step 2; `bli`, `fulli` and `logi` are suffixes of step 2; a vowel and a consonant alone count as
//! ending in consonant, vowel, consonant. Neither the algorithm as published nor its successor Porter2 gives these stems.

use std::borrow::Cow;

/// The stem of a word of lower-case ASCII letters and digits.
pub fn stem(word: &str) -> Cow<'_, str> {
    if let Some(stem) = irregular(word) {
        return Cow::Borrowed(stem);
    }
    if word.len() <= 2 {
        return Cow::Borrowed(word);
    }
    let mut word = word.to_owned();
    for step in [plurals, participles, final_y, double_suffixes, single_suffixes, long_stems, final_e, final_ll] {
        word = step(word);
    }
    Cow::Owned(word)
}

fn irregular(word: &str) -> Option<&'static str> {
    Some(match word {
        "sky" | "skies" => "sky",
        "dying" => "die",
        "lying" => "lie",
        "tying" => "tie",
        "news" => "news",
        "inning" | "innings" => "inning",
        "outing" | "outings" => "outing",
        "canning" | "cannings" => "canning",
        "howe" => "howe",
        "proceed" => "proceed",
        "exceed" => "exceed",
        "succeed" => "succeed",
        _ => return None,
    })
}

/// Whether the letter at `index` is a consonant: no vowel, nor a `y` after a consonant.
fn is_consonant(word: &[u8], index: usize) -> bool {
    match word[index] {
        b'a' | b'e' | b'i' | b'o' | b'u' => false,
        b'y' => index == 0 || !is_consonant(word, index - 1),
        _ => true,
    }
}

/// How often a vowel is followed by a consonant: Porter's `m`.
fn measure(stem: &str) -> usize {
    let stem = stem.as_bytes();
    (1..stem.len()).filter(|&i| is_consonant(stem, i) && !is_consonant(stem, i - 1)).count()
}

fn has_vowel(stem: &str) -> bool {
    (0..stem.len()).any(|i| !is_consonant(stem.as_bytes(), i))
}

fn ends_in_double_consonant(word: &str) -> bool {
    let bytes = word.as_bytes();
    bytes.len() >= 2 && bytes[bytes.len() - 1] == bytes[bytes.len() - 2] && is_consonant(bytes, bytes.len() - 1)
}

/// Porter's `*o`: consonant, vowel, consonant other than `w`, `x`, `y`; or just a vowel and a consonant.
fn ends_short(word: &str) -> bool {
    let bytes = word.as_bytes();
    let kind = |back: usize| is_consonant(bytes, bytes.len() - back);
    match bytes.len() {
        0 | 1 => false,
        2 => !kind(2) && kind(1),
        n => kind(3) && !kind(2) && kind(1) && !matches!(bytes[n - 1], b'w' | b'x' | b'y'),
    }
}

/// A suffix, what takes its place, and what the stem before it must fulfil.
type Rule = (&'static str, &'static str, fn(&str) -> bool);

/// Applies the first rule whose suffix fits; if the stem does not fulfil it, the word stays as it is.
fn apply(word: String, rules: &[Rule]) -> String {
    for (suffix, replacement, fulfils) in rules {
        if let Some(stem) = word.strip_suffix(suffix) {
            return if fulfils(stem) { format!("{stem}{replacement}") } else { word };
        }
    }
    word
}

fn always(_stem: &str) -> bool {
    true
}

fn measured(stem: &str) -> bool {
    measure(stem) > 0
}

fn measured_twice(stem: &str) -> bool {
    measure(stem) > 1
}

/// Step 1a.
fn plurals(word: String) -> String {
    if word.len() == 4 && word.ends_with("ies") {
        return word[..3].to_owned();
    }
    apply(word, &[("sses", "ss", always), ("ies", "i", always), ("ss", "ss", always), ("s", "", always)])
}

/// Step 1b.
fn participles(word: String) -> String {
    if let Some(stem) = word.strip_suffix("ied") {
        return format!("{stem}{}", if word.len() == 4 { "ie" } else { "i" });
    }
    if word.ends_with("eed") {
        return apply(word, &[("eed", "ee", measured)]);
    }
    let stem = ["ed", "ing"].iter().find_map(|suffix| word.strip_suffix(suffix).filter(|stem| has_vowel(stem)));
    let Some(stem) = stem else { return word };
    if ["at", "bl", "iz"].iter().any(|end| stem.ends_with(end)) {
        return format!("{stem}e");
    }
    if ends_in_double_consonant(stem) {
        let keeps = stem.ends_with(['l', 's', 'z']);
        return stem[..stem.len() - usize::from(!keeps)].to_owned();
    }
    if measure(stem) == 1 && ends_short(stem) { format!("{stem}e") } else { stem.to_owned() }
}

/// Step 1c.
fn final_y(word: String) -> String {
    apply(word, &[("y", "i", |stem| stem.len() > 1 && is_consonant(stem.as_bytes(), stem.len() - 1))])
}

/// Step 2.
fn double_suffixes(word: String) -> String {
    if let Some(stem) = word.strip_suffix("alli").filter(|stem| measured(stem)) {
        return double_suffixes(format!("{stem}al"));
    }
    // The `l` of `logi` counts for its stem.
    if let Some(stem) = word.strip_suffix("ogi").filter(|stem| stem.ends_with('l')) {
        return if measured(stem) { format!("{stem}og") } else { word };
    }
    const RULES: [Rule; 20] = [
        ("ational", "ate", measured),
        ("tional", "tion", measured),
        ("enci", "ence", measured),
        ("anci", "ance", measured),
        ("izer", "ize", measured),
        ("bli", "ble", measured),
        ("alli", "al", measured),
        ("entli", "ent", measured),
        ("eli", "e", measured),
        ("ousli", "ous", measured),
        ("ization", "ize", measured),
        ("ation", "ate", measured),
        ("ator", "ate", measured),
        ("alism", "al", measured),
        ("iveness", "ive", measured),
        ("fulness", "ful", measured),
        ("ousness", "ous", measured),
        ("aliti", "al", measured),
        ("iviti", "ive", measured),
        ("biliti", "ble", measured),
    ];
    let rules = [&RULES[..], &[("fulli", "ful", measured)]].concat();
    apply(word, &rules)
}

/// Step 3.
fn single_suffixes(word: String) -> String {
    const RULES: [Rule; 7] = [
        ("icate", "ic", measured),
        ("ative", "", measured),
        ("alize", "al", measured),
        ("iciti", "ic", measured),
        ("ical", "ic", measured),
        ("ful", "", measured),
        ("ness", "", measured),
    ];
    apply(word, &RULES)
}

/// Step 4.
fn long_stems(word: String) -> String {
    const RULES: [Rule; 19] = [
        ("al", "", measured_twice),
        ("ance", "", measured_twice),
        ("ence", "", measured_twice),
        ("er", "", measured_twice),
        ("ic", "", measured_twice),
        ("able", "", measured_twice),
        ("ible", "", measured_twice),
        ("ant", "", measured_twice),
        ("ement", "", measured_twice),
        ("ment", "", measured_twice),
        ("ent", "", measured_twice),
        ("ion", "", |stem| measured_twice(stem) && stem.ends_with(['s', 't'])),
        ("ou", "", measured_twice),
        ("ism", "", measured_twice),
        ("ate", "", measured_twice),
        ("iti", "", measured_twice),
        ("ous", "", measured_twice),
        ("ive", "", measured_twice),
        ("ize", "", measured_twice),
    ];
    apply(word, &RULES)
}

/// Step 5a.
fn final_e(word: String) -> String {
    apply(word, &[("e", "", |stem| measured_twice(stem) || (measure(stem) == 1 && !ends_short(stem)))])
}

/// Step 5b.
fn final_ll(word: String) -> String {
    let doubled = word.ends_with("ll") && measured_twice(&word[..word.len() - 1]);
    word[..word.len() - usize::from(doubled)].to_owned()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::*;

    #[test]
    fn stems_are_those_of_nltk() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../tests/fixtures/parity/rouge/stems.json");
        let expected: BTreeMap<String, String> = serde_json::from_slice(&std::fs::read(path).unwrap()).unwrap();
        assert!(expected.len() > 500);
        let wrong: Vec<_> = expected
            .iter()
            .map(|(word, want)| (word, want, stem(word)))
            .filter(|(_, want, got)| *want != got)
            .collect();
        assert!(wrong.is_empty(), "(word, expected, got): {wrong:?}");
    }

    #[test]
    fn departures_from_the_published_algorithm() {
        let cases = [("flies", "fli"), ("dies", "die"), ("died", "die"), ("spied", "spi"), ("enjoy", "enjoy")];
        for (word, expected) in cases.into_iter().chain([("say", "say"), ("skies", "sky"), ("us", "us"), ("", "")]) {
            assert_eq!(stem(word), expected, "{word}");
        }
    }

    #[test]
    fn any_short_word_has_a_stem() {
        let letters: Vec<char> = "aeyblosdin7".chars().collect();
        let n = letters.len();
        for i in 0..n.pow(4) {
            let word: String = (0..4).map(|place| letters[i / n.pow(place) % n]).collect();
            assert!(!stem(&word).is_empty(), "{word}");
        }
    }
}
