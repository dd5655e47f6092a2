//! What tokens spell: the bytes of text behind every id, and the places where two tokenizers divide the same text alike.

use std::collections::HashMap;
use std::ops::Range;

use anyhow::{Context, Result, bail};
use contract::TokenizerFile;
use contract::tokenizer::tokens;
use serde_json::Value as Json;

/// The bytes that each token of a tokenizer spells. Of byte-level vocabularies and of SentencePiece's.
#[derive(Clone, Debug)]
pub struct Spelling {
    /// By id: bytes, and whether the token is one byte that has no other token.
    tokens: Vec<Option<(Vec<u8>, bool)>>,
    /// Tokens that steer, by id: they spell nothing.
    controls: HashMap<u32, String>,
    end: u32,
}

impl Spelling {
    /// Of the tokenizer that a dataset or model carries.
    ///
    /// Errors where its tokens do not spell a text byte by byte.
    pub fn of(file: &TokenizerFile) -> Result<Self> {
        let json: Json = serde_json::from_slice(&file.json).context("cannot read the tokenizer")?;
        let make = Make::of(&json)?;
        let added = json["added_tokens"].as_array().into_iter().flatten();
        let added: HashMap<u32, &Json> =
            added.filter_map(|token| Some((u32::try_from(token["id"].as_u64()?).ok()?, token))).collect();
        let steers = |id: u32| [Some(file.end), file.begin, file.pad, file.unk].contains(&Some(id));
        let all = tokens(&json);
        let size = all.keys().last().map_or(0, |id| *id as usize + 1);
        let mut spelling = Spelling { tokens: vec![None; size], controls: HashMap::new(), end: file.end };
        for (id, token) in all {
            let special = added.get(&id).is_some_and(|added| added["special"] == true);
            if special || steers(id) {
                spelling.controls.insert(id, token);
            } else if added.contains_key(&id) {
                spelling.tokens[id as usize] = Some((token.into_bytes(), false));
            } else {
                spelling.tokens[id as usize] = make.bytes(&token);
            }
        }
        Ok(spelling)
    }

    /// The bytes of a token; `None` where it spells nothing: one that steers, and one that there is not.
    pub fn bytes(&self, id: u32) -> Option<&[u8]> {
        self.tokens.get(id as usize)?.as_ref().map(|(bytes, _)| bytes.as_slice())
    }

    /// Bytes of tokens, up to the first that spells nothing.
    pub fn each<'a>(&'a self, ids: &[u32]) -> Vec<&'a [u8]> {
        ids.iter().map_while(|id| self.bytes(*id)).collect()
    }

    /// The text of tokens, as far as they spell one: up to a token that steers, or to bytes that are no character.
    pub fn text(&self, ids: &[u32]) -> String {
        let bytes = self.each(ids).concat();
        let valid = std::str::from_utf8(&bytes).map_or_else(|error| error.valid_up_to(), str::len);
        String::from_utf8_lossy(&bytes[..valid]).into_owned()
    }

    /// For each token of `other` the token of this tokenizer with which it would begin to spell the same: the longest that its bytes
    /// begin with, itself where both have it. Tokens that steer stand for one another where they end a text, or are spelled alike.
    /// `None` where there is none.
    pub fn begins(&self, other: &Spelling) -> Vec<Option<u32>> {
        // Of tokens of the same bytes the first of one is the first of the other.
        let (own, others) = (self.ranked(), other.ranked());
        let mut found =
            vec![None; other.tokens.len().max(other.controls.keys().max().map_or(0, |id| *id as usize + 1))];
        for (bytes, ids) in &others {
            let prefix = (1..=bytes.len()).rev().find_map(|length| Some((length, own.get(&bytes[..length])?)));
            let Some((length, mine)) = prefix else { continue };
            for (rank, id) in ids.iter().enumerate() {
                let same = (length == bytes.len()).then(|| mine.get(rank)).flatten();
                found[*id as usize] = same.or(mine.first()).copied();
            }
        }
        for (id, control) in &other.controls {
            let alike = self.controls.iter().filter(|(_, own)| *own == control).map(|(own, _)| *own).min();
            found[*id as usize] = if *id == other.end { Some(self.end) } else { alike.filter(|own| *own != self.end) };
        }
        found
    }

    /// Ids by their bytes: those that are no substitute for a character first.
    fn ranked(&self) -> HashMap<&[u8], Vec<u32>> {
        let mut ranked: HashMap<&[u8], Vec<u32>> = HashMap::new();
        for substitute in [false, true] {
            for (id, token) in (0..).zip(&self.tokens) {
                if let Some((bytes, is_substitute)) = token
                    && *is_substitute == substitute
                    && !bytes.is_empty()
                {
                    ranked.entry(bytes).or_default().push(id);
                }
            }
        }
        ranked
    }
}

/// How a vocabulary writes bytes.
#[derive(Clone, Copy)]
enum Make {
    /// Each byte is a character of its own.
    ByteLevel,
    /// Text in which `▁` is a space, and maybe `<0x0A>` for bytes that have no other token.
    Pieces { byte_fallback: bool },
}

impl Make {
    fn of(json: &Json) -> Result<Self> {
        let parts = ["pre_tokenizer", "decoder", "normalizer"].map(|part| json[part].to_string());
        if parts[..2].iter().any(|part| part.contains("\"ByteLevel\"")) {
            Ok(Make::ByteLevel)
        } else if parts.iter().any(|part| part.contains('▁')) {
            Ok(Make::Pieces { byte_fallback: json["model"]["byte_fallback"] == true })
        } else {
            bail!(
                "its tokens do not spell a text byte by byte: tokenizers of the make of GPT-2 (byte-level) and of Llama \
                 (SentencePiece) do"
            )
        }
    }

    /// What a token of the vocabulary spells, and whether it is a byte that has no other token.
    fn bytes(self, token: &str) -> Option<(Vec<u8>, bool)> {
        match self {
            Make::ByteLevel => token.chars().map(byte_of).collect::<Option<Vec<u8>>>().map(|bytes| (bytes, false)),
            Make::Pieces { byte_fallback } => {
                let digits = token.strip_prefix("<0x").and_then(|rest| rest.strip_suffix('>'));
                let byte = digits.filter(|digits| byte_fallback && digits.len() == 2);
                match byte.and_then(|digits| u8::from_str_radix(digits, 16).ok()) {
                    Some(byte) => Some((vec![byte], true)),
                    None => Some((token.replace('▁', " ").into_bytes(), false)),
                }
            }
        }
    }
}

/// The byte that a character of a byte-level vocabulary stands for: those that can be seen for themselves, the others, in order, for
/// characters from 256 on.
fn byte_of(character: char) -> Option<u8> {
    let seen = |byte: u32| matches!(byte, 33..=126 | 161..=172 | 174..=255);
    let code = u32::from(character);
    if code < 256 {
        return seen(code).then_some(code as u8);
    }
    let place = usize::try_from(code - 256).ok()?;
    (0..256).filter(|byte| !seen(*byte)).nth(place).map(|byte| byte as u8)
}

/// Tokens of two tokenizers that spell the same bytes at the same place.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Group {
    /// Places of the student's tokens.
    pub student: Range<usize>,
    /// Places of the teacher's tokens.
    pub teacher: Range<usize>,
}

/// The shortest groups of tokens that begin and end at the same places of a text, from its beginning on, up to where the two differ
/// or the shorter ends. `student` and `teacher` are the bytes that each token spells.
///
/// A space that the teacher's tokenizer puts before every text is taken off its first token.
pub fn groups(student: &[&[u8]], teacher: &[&[u8]]) -> Vec<Group> {
    let (text, other) = (student.concat(), teacher.concat());
    let common = |other: &[u8]| text.iter().zip(other).take_while(|(a, b)| a == b).count();
    let added = usize::from(
        other.first() == Some(&b' ') && {
            let (with, without) = (common(&other), common(&other[1..]));
            without > with || without == with && other.len() > text.len()
        },
    );
    let same = common(&other[added..]);

    let mut groups = Vec::new();
    let mut places = (0, 0);
    // Where the tokens that were taken end.
    let mut ends = (0, 0);
    let own = |place: usize| student.get(place).map(|bytes| bytes.len());
    let others = |place: usize| Some(teacher.get(place)?.len() - if place == 0 { added } else { 0 });
    while let (Some(own_length), Some(other_length)) = (own(places.0), others(places.1)) {
        let start = places;
        places = (places.0 + 1, places.1 + 1);
        ends = (ends.0 + own_length, ends.1 + other_length);
        // The one that is behind goes on.
        while ends.0 != ends.1 {
            if ends.0 < ends.1 {
                let Some(length) = own(places.0) else { return groups };
                (places.0, ends.0) = (places.0 + 1, ends.0 + length);
            } else {
                let Some(length) = others(places.1) else { return groups };
                (places.1, ends.1) = (places.1 + 1, ends.1 + length);
            }
        }
        if ends.0 > same {
            break;
        }
        groups.push(Group { student: start.0..places.0, teacher: start.1..places.1 });
    }
    groups
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use contract::random::{below, philox};

    use super::*;
    use crate::testing::shared_data;
    use crate::text::{SpecialTokens, Text};
    use crate::tokenizer::open_tokenizer;
    use crate::train_tokenizer;

    fn named(group: &Group) -> (Range<usize>, Range<usize>) {
        (group.student.clone(), group.teacher.clone())
    }

    fn of(student: &[&str], teacher: &[&str]) -> Vec<(Range<usize>, Range<usize>)> {
        let bytes = |tokens: &[&str]| tokens.iter().map(|token| token.as_bytes().to_vec()).collect::<Vec<_>>();
        let (student, teacher) = (bytes(student), bytes(teacher));
        groups(&slices(&student), &slices(&teacher)).iter().map(named).collect()
    }

    fn slices(tokens: &[Vec<u8>]) -> Vec<&[u8]> {
        tokens.iter().map(Vec::as_slice).collect()
    }

    #[test]
    fn groups_end_where_both_end() {
        assert_eq!(of(&["a", "b"], &["a", "b"]), [(0..1, 0..1), (1..2, 1..2)]);
        assert_eq!(of(&["ab", "cd"], &["a", "bc", "d"]), [(0..2, 0..3)]);
        assert_eq!(of(&["he", "llo", " you"], &["hello", " y", "ou"]), [(0..2, 0..1), (2..3, 1..3)]);
        assert_eq!(of(&["a", "b"], &[]), []);
        // A space before the text, by itself or with the first word.
        assert_eq!(of(&["a", "b"], &[" a", "b"]), [(0..1, 0..1), (1..2, 1..2)]);
        assert_eq!(of(&["a", "b"], &[" ", "a", "b"]), [(0..1, 0..2), (1..2, 2..3)]);
        assert_eq!(of(&[" a"], &[" ", " a"]), [(0..1, 0..2)]);
        assert_eq!(of(&[" ", " "], &["   "]), [(0..2, 0..1)]);
        // Up to where the two are not the same text.
        assert_eq!(of(&["a", "b", "c"], &["a", "x", "c"]), [(0..1, 0..1)]);
        assert_eq!(of(&["a", "bc"], &["a", "b"]), [(0..1, 0..1)]);
    }

    /// A text that tokenizers find hard, the same for the same number.
    fn hard_text(number: u32) -> String {
        const PARTS: [&str; 24] = [
            " ",
            "  ",
            "\n",
            "\n\n",
            "\t",
            "the",
            "The",
            " student",
            "1234",
            "3.14",
            "e\u{301}",
            "é",
            "naïve",
            "ß",
            "日本",
            "語の",
            "한국어",
            "😀",
            "👩\u{200d}👩\u{200d}👧",
            "🇨🇭",
            "\u{feff}",
            "\u{0}",
            "▁",
            "<0x41>",
        ];
        let draw = |place: u32, bound: u32| {
            let [high, low, ..] = philox(7, [99, number, place, 0]);
            below(high, low, bound.into()) as u32
        };
        let length = draw(0, 14);
        let part = |place: u32| match draw(2 * place + 1, 3) {
            0 => char::from_u32(draw(2 * place + 2, 0x3000)).map(String::from).unwrap_or_default(),
            _ => PARTS[draw(2 * place + 2, PARTS.len() as u32) as usize].to_owned(),
        };
        (0..length).map(part).collect()
    }

    /// Ends of tokens in the text that they spell.
    fn ends(tokens: &[&[u8]]) -> BTreeSet<usize> {
        let mut at = 0;
        tokens
            .iter()
            .map(|bytes| {
                at += bytes.len();
                at
            })
            .collect()
    }

    /// What a student wrote and its teacher reads is put into the groups that the sets of their tokens' ends give, and each spells the
    /// same on both sides. Gives the number of groups, and how many of them have several tokens on a side.
    fn check(text: &str, own: &(Text, Spelling), other: &(Text, Spelling)) -> (usize, usize) {
        let own_ids = own.0.encode(text).unwrap();
        let written = own.1.text(&own_ids);
        assert!([text.to_owned(), format!(" {text}")].contains(&written), "{text:?} is {written:?}");
        let other_ids = other.0.encode(&written).unwrap();
        let (student, mut teacher) = (own.1.each(&own_ids), other.1.each(&other_ids));
        assert_eq!((student.len(), teacher.len()), (own_ids.len(), other_ids.len()), "{text:?}");
        let found = groups(&student, &teacher);
        // What a tokenizer puts before a text is no part of it.
        if teacher.concat().len() > written.len() {
            teacher[0] = &teacher[0][1..];
        }
        assert_eq!([student.concat(), teacher.concat()], [written.as_bytes(), written.as_bytes()], "{text:?}");
        let common: Vec<usize> = ends(&student).intersection(&ends(&teacher)).copied().filter(|end| *end > 0).collect();
        assert_eq!(found.len(), common.len(), "{text:?}");
        let (mut at, mut before) = (0, (0, 0));
        for (group, end) in found.iter().zip(common) {
            assert_eq!((group.student.start, group.teacher.start), before, "{text:?}");
            before = (group.student.end, group.teacher.end);
            let spelt = [student[group.student.clone()].concat(), teacher[group.teacher.clone()].concat()];
            assert_eq!(spelt, [&written.as_bytes()[at..end]; 2], "{text:?}");
            at = end;
        }
        assert_eq!(at, written.len(), "{text:?}");
        (found.len(), found.iter().filter(|group| group.student.len() + group.teacher.len() > 2).count())
    }

    /// SentencePiece writes a space as `▁`, and cannot tell the two apart.
    fn without_mark(text: &str) -> String {
        text.replace('▁', "_")
    }

    /// A tokenizer as those of Llama are: pieces of text with `▁` for a space and one more before every text, and bytes for what has no
    /// piece.
    fn of_pieces() -> TokenizerFile {
        let controls = ["<unk>", "<s>", "</s>"].map(str::to_owned).into_iter();
        let bytes = (0..256).map(|byte| format!("<0x{byte:02X}>"));
        let characters = "▁abcdefghijklmnopqrstuvwxyzT0123456789.é日".chars().map(String::from);
        let merges = [("t", "h"), ("th", "e"), ("▁", "the"), ("▁", "▁"), ("▁", "s"), ("u", "d"), ("1", "2")];
        let merged = merges.iter().map(|(left, right)| format!("{left}{right}"));
        let tokens: Vec<String> = controls.chain(bytes).chain(characters).chain(merged).collect();
        let vocabulary: serde_json::Map<String, Json> =
            tokens.iter().cloned().zip((0..).map(|id: u32| id.into())).collect();
        let added = |id: u32, content: &str| {
            serde_json::json!({"id": id, "content": content, "special": true, "single_word": false, "lstrip": false,
                "rstrip": false, "normalized": false})
        };
        let json = serde_json::json!({
            "version": "1.0",
            "added_tokens": [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")],
            "normalizer": {"type": "Sequence", "normalizers": [
                {"type": "Prepend", "prepend": "▁"},
                {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
            ]},
            "pre_tokenizer": null, "post_processor": null, "decoder": null,
            "model": {"type": "BPE", "vocab": vocabulary, "merges": merges, "unk_token": "<unk>", "byte_fallback": true,
                "fuse_unk": true},
        });
        TokenizerFile { begin: Some(1), unk: Some(0), ..TokenizerFile::new(json.to_string(), 2, tokens.len() as u32) }
    }

    fn ready(file: &TokenizerFile) -> (Text, Spelling) {
        (Text::new(file, SpecialTokens::Text).unwrap(), Spelling::of(file).unwrap())
    }

    #[test]
    fn no_group_of_hard_texts_is_misaligned() {
        let made = [
            ready(&train_tokenizer::trained(320)),
            ready(&train_tokenizer::trained(700)),
            ready(&train_tokenizer::from_merges(&["a b", "h e", "Ġ s", "t h"])),
            ready(&of_pieces()),
        ];
        for (own, other) in [(0, 1), (1, 0), (2, 1), (0, 3), (3, 1), (1, 1)] {
            let counts = (0..10_000).map(|number| {
                let text = if own.max(other) == 3 { without_mark(&hard_text(number)) } else { hard_text(number) };
                check(&text, &made[own], &made[other])
            });
            let (all, several) = counts.fold((0, 0), |sum, new| (sum.0 + new.0, sum.1 + new.1));
            assert!(all > 10_000 && (several > 0) == (own != other), "{own} {other}: {several} of {all}");
        }
    }

    #[test]
    fn no_group_is_misaligned_by_the_tokenizers_of_gpt_2_opt_and_llama() {
        let Some(data) = shared_data("tokenizers") else { return };
        let open = |name: &str| ready(&open_tokenizer(&data.join(name), None).unwrap().tokenizer);
        let opt = tempfile::tempdir().unwrap();
        for (name, from) in [("vocab.json", "gpt2-vocab.json"), ("merges.txt", "gpt2-merges.txt")] {
            std::fs::copy(data.join("opt").join(from), opt.path().join(name)).unwrap();
        }
        let opt = ready(&open_tokenizer(opt.path(), None).unwrap().tokenizer);
        let all = [open("gpt2"), opt, open("llama2"), ready(&train_tokenizer::trained(700))];
        let dolly = shared_data("dolly/dolly-eval-1of2.jsonl").unwrap();
        let dolly = std::fs::read_to_string(dolly).unwrap();
        let lines: Vec<&str> = dolly.lines().collect();
        let text = |number: u32| match number % 8 {
            0 => lines[number as usize / 8 % lines.len()].chars().take(400).collect(),
            _ => without_mark(&hard_text(number)),
        };
        for (own, other) in [(0, 1), (0, 2), (2, 0), (1, 2), (3, 0), (3, 2)] {
            let counts = (0..10_000).map(|number| check(&text(number), &all[own], &all[other]));
            let (groups, several) = counts.fold((0, 0), |sum, new| (sum.0 + new.0, sum.1 + new.1));
            println!("{own} {other}: {groups} groups, {several} of several tokens");
        }
    }

    #[test]
    fn tokens_of_another_tokenizer_begin_with_the_longest_of_ones_own() {
        let files = [
            train_tokenizer::from_merges(&["h e", "he l", "l o"]),
            train_tokenizer::from_merges(&["h e", "l l", "he ll", "hell o"]),
        ];
        let [own, other] = files.each_ref().map(|file| Spelling::of(file).unwrap());
        let id = |spelling: &Spelling, text: &str| {
            (0..300).find(|id| spelling.bytes(*id) == Some(text.as_bytes())).unwrap_or_else(|| panic!("{text}"))
        };
        let begins = own.begins(&other);
        for (token, first) in [("he", "he"), ("ll", "l"), ("hello", "hel"), ("q", "q")] {
            assert_eq!(begins[id(&other, token) as usize], Some(id(&own, first)), "{token}");
        }
        assert_eq!(begins[0], Some(0), "both end a text with it");
        // Of the same tokenizer every token is itself.
        assert!(own.begins(&own).iter().zip(0..).all(|(found, id)| *found == Some(id)));
        assert_eq!(own.text(&[id(&own, "he"), id(&own, "lo"), 0, id(&own, "q")]), "helo");
        let bytes: Vec<u32> = "é"
            .bytes()
            .map(|byte| own.tokens.iter().position(|it| it.as_ref().is_some_and(|it| it.0 == [byte])).unwrap() as u32)
            .collect();
        assert_eq!((own.text(&bytes), own.text(&bytes[..1])), ("é".to_owned(), String::new()));
    }
}
