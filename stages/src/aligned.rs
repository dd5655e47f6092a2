//! Text aligned by response token: what is trained on, measured and cached.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::sync::Arc;

use anyhow::Context;
use candle_core::Tensor;
use contract::dataset::{ANSWERS, row_name};
use contract::{Dataset, End, Inputs, Result, Row};
use lm::loss::{Divergence, Source, Target, divergence_values};
use lm::{Dropout, LanguageModel, Packed, Response};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Text of some rows, laid out for a model, with the places that predict response tokens.
///
/// A response token is found by its place in its own response, so teacher and student agree on it whatever stands before
/// the prompt.
#[derive(Clone)]
pub struct Aligned {
    /// Prompt and response without the last id, which is only predicted. Wanted are the tokens before each response
    /// token: those that predict one.
    pub packed: Packed,
    /// The ids of its sequences, one behind the other.
    ids: Vec<u32>,
    /// The response tokens.
    pub labels: Vec<u32>,
    /// Where the response tokens of each sequence lie in `labels`.
    pub responses: Vec<Range<usize>>,
}

impl Aligned {
    /// Lays out `rows`. A row without response tokens adds nothing; one without a prompt cannot predict its first token.
    pub fn of<'a>(rows: impl IntoIterator<Item = &'a Row>) -> Self {
        let mut text = Aligned { packed: Packed::new(), ids: Vec::new(), labels: Vec::new(), responses: Vec::new() };
        let mut predicts = Vec::new();
        for row in rows {
            let ids: Vec<u32> = row.prompt.iter().chain(&row.response).copied().collect();
            let tokens = Aligned::tokens_of(row);
            if tokens == 0 {
                continue;
            }
            let first = ids.len() - tokens;
            let start = text.ids.len();
            text.ids.extend(&ids[..ids.len() - 1]);
            text.packed.push(row.id, &ids[..ids.len() - 1]);
            predicts.extend((first..ids.len()).map(|at| (start + at - 1) as u32));
            let before = text.labels.len();
            text.labels.extend(&ids[first..]);
            text.responses.push(before..text.labels.len());
        }
        text.packed.wanted = Some(predicts);
        text
    }

    /// The response tokens that a row adds: all of its response, but for the first where there is no prompt.
    pub fn response_of(row: &Row) -> &[u32] {
        let skipped = usize::from(row.prompt.is_empty() && !row.response.is_empty());
        &row.response[skipped..]
    }

    /// What stands before them: the prompt, or the first response token where there is none.
    pub fn prompt_of(row: &Row) -> &[u32] {
        if row.prompt.is_empty() { &row.response[..row.response.len().min(1)] } else { &row.prompt }
    }

    /// Number of response tokens that a row adds.
    pub fn tokens_of(row: &Row) -> usize {
        Aligned::response_of(row).len()
    }

    /// Number of response tokens.
    pub fn tokens(&self) -> usize {
        self.labels.len()
    }

    /// Every sequence as a teacher cache knows it.
    pub fn rows(&self) -> Vec<Response<'_>> {
        let rows = self.packed.rows.iter().zip(&self.packed.segments).zip(&self.responses);
        let response = |((id, segment), response): ((&u64, &Range<usize>), &Range<usize>)| {
            // The last response token is predicted and not read.
            let prompt = segment.start..segment.end + 1 - response.len();
            Response { row: *id, prompt: &self.ids[prompt], tokens: &self.labels[response.clone()] }
        };
        rows.map(response).collect()
    }

    /// The rows at some places, in that order.
    pub fn part(&self, places: &[usize]) -> Aligned {
        let all = self.rows();
        let rows: Vec<Row> = places.iter().map(|place| all[*place]).map(|it| row_of(it, it.prompt)).collect();
        Aligned::of(&rows)
    }

    /// The same responses behind the prompts of a view.
    ///
    /// Errors when it lacks one of the rows.
    pub fn seen_in(&self, view: &View) -> Result<Aligned> {
        let rows = self.rows().into_iter().map(|it| Ok(row_of(it, view.prompt_of(it.row)?)));
        let rows: Vec<Row> = rows.collect::<Result<_>>()?;
        Ok(Aligned::of(&rows))
    }

    /// As who has the view reads them; as they are where there is none.
    pub fn seen_by(&self, view: Option<&View>) -> Result<Cow<'_, Aligned>> {
        Ok(match view {
            Some(view) => Cow::Owned(self.seen_in(view)?),
            None => Cow::Borrowed(self),
        })
    }

    /// The same labels at the first positions of the prompts, first with first, where nothing predicts them: what the published
    /// program for response priming learns. Prompts have a token for each.
    pub fn by_index(&self) -> Aligned {
        let mut text = Aligned { packed: Packed::new(), ids: Vec::new(), ..Aligned::of([]) };
        for Response { row, prompt, tokens } in self.rows() {
            let read = &prompt[..tokens.len()];
            text.ids.extend(read);
            text.packed.push(row, read);
        }
        Aligned { labels: self.labels.clone(), responses: self.responses.clone(), ..text }
    }

    /// Hidden states of a model (and soft prompt) where they predict response tokens, `[tokens, width]`.
    pub fn hidden(&self, model: &LanguageModel, prompt: Option<&Tensor>, dropout: Option<&Dropout>) -> Result<Tensor> {
        model.hidden(&self.packed, prompt, dropout)
    }

    /// The same, and beside it what comes out of some layers, `[tokens, width]` each.
    pub fn states(
        &self,
        model: &LanguageModel,
        prompt: Option<&Tensor>,
        dropout: Option<&Dropout>,
        layers: &[usize],
    ) -> Result<(Tensor, Vec<Tensor>)> {
        model.states(&self.packed, prompt, dropout, layers)
    }
}

/// A response behind a prompt.
fn row_of(Response { row, tokens, .. }: Response<'_>, prompt: &[u32]) -> Row {
    let (prompt, response) = (prompt.to_vec(), tokens.to_vec());
    Row { id: row, prompt, response, end: End::Length, log_probs: None, references: Vec::new(), family: None }
}

/// Where a student and its teacher are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Alignment {
    /// At the tokens of the response, whatever stands before them.
    #[default]
    Response,
    /// At the tokens of the prompt that both read behind what differs, and nowhere else; no response is learnt.
    Question,
    /// At the first positions of what each reads, first with first, whatever stands there; the tokens of the response are the labels in
    /// the same order. As the published program for response priming: the prompt is learnt by, and the teacher's positions are
    /// shifted by what stands before its prompt.
    Index,
    /// In groups of response tokens that spell the same bytes, for a teacher with another tokenizer; needs `view`.
    Bytes,
}

impl Alignment {
    /// A text as it is read.
    pub fn read(self, text: &Aligned) -> Cow<'_, Aligned> {
        match self {
            Alignment::Response | Alignment::Question | Alignment::Bytes => Cow::Borrowed(text),
            Alignment::Index => Cow::Owned(text.by_index()),
        }
    }

    /// Rows that [`Aligned`] lays out in this way, and what the teacher reads before their responses. In rows by index prompt and
    /// response are as long as the shortest of what is compared, for [`Aligned::by_index`].
    ///
    /// Errors when the view lacks one of the rows.
    pub fn rows(self, data: Arc<Dataset>, view: Option<View>) -> Result<(Arc<Dataset>, Option<View>)> {
        if matches!(self, Alignment::Response | Alignment::Bytes) {
            return Ok((data, view));
        }
        let (mut rows, mut seen) = (Vec::with_capacity(data.rows.len()), Vec::new());
        for row in &data.rows {
            let read = view.as_ref().map(|view| view.prompt_of(row.id)).transpose()?;
            let (mut row, mut before) = (row.clone(), read.map(<[u32]>::to_vec));
            if self == Alignment::Index {
                let shortest = [row.prompt.len(), row.response.len()].into_iter().chain(read.map(<[u32]>::len)).min();
                row.response.truncate(shortest.unwrap_or(0));
                row.prompt.truncate(row.response.len());
            } else {
                // The first token is read, and predicted by none.
                let same = read.map_or(row.prompt.len(), |read| {
                    row.prompt.iter().rev().zip(read.iter().rev()).take_while(|(own, other)| own == other).count()
                });
                row.response = row.prompt.split_off((row.prompt.len() + 1 - same).min(row.prompt.len()));
                if let Some(before) = &mut before {
                    before.truncate(before.len() - row.response.len());
                }
            }
            row.end = End::Length;
            seen.extend(before.map(|prompt| Row { prompt, ..row.clone() }));
            rows.push(row);
        }
        let of = |rows| Arc::new(Dataset { rows, tokenizer: data.tokenizer.clone() });
        Ok((of(rows), view.map(|_| View::of(of(seen)))))
    }
}

/// Which row of a view a row's teacher reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Pairing {
    /// That of the same id.
    #[default]
    Id,
    /// As the published program for response priming: that whose number comes at the row's place when the numbers of all rows, from
    /// 1 on, are sorted as words: 1, 10, 100, 1000, 1001 and so on. Of its 2638 rows one got its own.
    Lexicographic,
}

/// What a teacher reads in place of the prompts that its student reads, by row.
pub struct View {
    data: Arc<Dataset>,
    places: HashMap<u64, usize>,
}

impl View {
    /// The prompts of a dataset.
    pub fn of(data: Arc<Dataset>) -> Self {
        let places = data.rows.iter().enumerate().map(|(place, row)| (row.id % ANSWERS, place)).collect();
        View { data, places }
    }

    /// The same, with rows paired as `pairing` says.
    pub fn paired(mut self, pairing: Pairing) -> Self {
        if pairing == Pairing::Lexicographic {
            let mut order: Vec<usize> = (0..self.data.rows.len()).collect();
            order.sort_by_key(|place| (place + 1).to_string());
            self.places.values_mut().for_each(|place| *place = order[*place]);
        }
        self
    }

    /// That of the dataset on the input `view`, where one is connected.
    pub fn take(inputs: &mut Inputs) -> Result<Option<Self>> {
        Ok(inputs.take_optional::<Dataset>("view")?.map(View::of))
    }

    /// What is read before the responses of a row.
    ///
    /// Errors when there is no such row, or it has no prompt.
    pub fn prompt_of(&self, row: u64) -> Result<&[u32]> {
        let prompt = self.places.get(&(row % ANSWERS)).map(|place| self.data.rows[*place].prompt.as_slice());
        prompt.filter(|prompt| !prompt.is_empty()).with_context(|| {
            format!(
                "`view` has no prompt for {}: tokenise the same corpus, with room for what stands around its prompts \
                 (`max_prompt_length`, `max_length`)",
                row_name(row)
            )
        })
    }
}

/// A frozen model, and how it reads a text.
#[derive(Clone, Copy)]
pub struct Reader<'a> {
    /// The model.
    pub model: &'a LanguageModel,
    /// Its soft prompt.
    pub prompt: Option<&'a Tensor>,
    /// What it reads in place of the prompts.
    pub view: Option<&'a View>,
}

impl Reader<'_> {
    /// Its hidden states where they predict response tokens, `[tokens, width]`.
    pub fn hidden(&self, text: &Aligned) -> Result<Tensor> {
        Ok(self.states(text, &[])?.0)
    }

    /// The same, and beside it what comes out of some layers, `[tokens, width]` each.
    pub fn states(&self, text: &Aligned, layers: &[usize]) -> Result<(Tensor, Vec<Tensor>)> {
        text.seen_by(self.view)?.states(self.model, self.prompt, None, layers)
    }
}

/// Values of the response tokens of rows, row by row.
pub fn by_row<'r, 'v, T>(
    rows: impl IntoIterator<Item = &'r Row>,
    values: &'v [T],
) -> impl Iterator<Item = (&'r Row, &'v [T])> {
    let mut rest = values;
    rows.into_iter().map(move |row| {
        let (own, after) = rest.split_at(Aligned::tokens_of(row));
        rest = after;
        (row, own)
    })
}

/// How far one model is from another at every response token of rows, of which `batch` go through the two at once.
pub fn divergences(
    own: Reader<'_>,
    other: Reader<'_>,
    divergence: Divergence,
    rows: &[Row],
    batch: usize,
) -> Result<Vec<Vec<f64>>> {
    let (own_head, head) = (own.model.head()?, other.model.output_head()?.beside(own.model.vocab_size())?);
    let mut values = Vec::with_capacity(rows.len());
    for rows in rows.chunks(batch) {
        let text = Aligned::of(rows);
        let found = if text.tokens() == 0 {
            Vec::new()
        } else {
            let source = Source::Head { hidden: &other.hidden(&text)?, head: &head };
            let target = Target { source, divergence, coefficient: 1.0, temperature: 1.0 };
            divergence_values(&own.hidden(&text)?, &own_head, &[target])?.remove(0)
        };
        values.extend(by_row(rows, &found).map(|(_, own)| own.to_vec()));
    }
    Ok(values)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::row;

    fn dataset(rows: Vec<Row>) -> Arc<Dataset> {
        Arc::new(Dataset { rows, tokenizer: contract::TokenizerFile::new("", 0, 99) })
    }

    #[test]
    fn by_index_the_first_labels_meet_the_first_positions_of_what_each_reads() {
        let rows = dataset(vec![row(0, &[1, 2, 3, 4], &[11, 12, 13]), row(1, &[5, 6], &[14, 15, 16])]);
        let seen = dataset(vec![row(0, &[8, 9, 1, 2, 3, 4], &[]), row(1, &[7], &[])]);
        let (rows, view) = Alignment::Index.rows(rows, Some(View::of(seen))).unwrap();
        let text = Aligned::of(&rows.rows);
        assert_eq!(text.labels, [11, 12, 13, 14]);
        let own = text.by_index();
        assert_eq!((own.ids.as_slice(), own.packed.wanted.as_ref()), (&[1, 2, 3, 5][..], None));
        let read = text.seen_in(&view.unwrap()).unwrap().by_index();
        assert_eq!((read.ids.as_slice(), &read.labels), (&[8, 9, 1, 7][..], &text.labels));
        assert_eq!((read.packed.segments.as_slice(), read.tokens()), (&[0..3, 3..4][..], 4));
    }

    #[test]
    fn the_question_is_compared_where_both_read_the_same() {
        // The first word is another token behind a prefix.
        let rows = dataset(vec![row(0, &[1, 2, 3, 4], &[11, 12]), row(1, &[5], &[14]), row(2, &[6, 7], &[15])]);
        let seen = dataset(vec![row(0, &[8, 9, 21, 2, 3, 4], &[]), row(1, &[8, 5], &[]), row(2, &[8, 27], &[])]);
        let (rows, view) = Alignment::Question.rows(rows.clone(), Some(View::of(seen))).unwrap();
        let text = Aligned::of(&rows.rows);
        // 2 is read by both, and 3 and 4 are predicted by both.
        assert_eq!(text.labels, [3, 4]);
        let read = text.seen_in(&view.unwrap()).unwrap();
        assert_eq!(
            read.rows().iter().map(|it| (it.prompt, it.tokens)).collect::<Vec<_>>(),
            [(&[8, 9, 21, 2][..], &[3, 4][..])]
        );
        let alone = Alignment::Question.rows(dataset(vec![row(0, &[1, 2, 3], &[9])]), None).unwrap().0;
        assert_eq!(Aligned::of(&alone.rows).labels, [2, 3]);
    }

    #[test]
    fn sorted_as_words_one_of_the_published_rows_meets_its_own() {
        let rows = (0..2638u32).map(|id| row(id.into(), &[id], &[])).collect();
        let data = Arc::new(Dataset { rows, tokenizer: contract::TokenizerFile::new("", 0, 9999) });
        let view = View::of(data).paired(Pairing::Lexicographic);
        let found: Vec<u32> = (0..2638).map(|id| view.prompt_of(id).unwrap()[0] + 1).collect();
        assert_eq!(found[..8], [1, 10, 100, 1000, 1001, 1002, 1003, 1004]);
        assert_eq!(found.iter().enumerate().filter(|(place, number)| *place as u32 + 1 == **number).count(), 1);
    }

    #[test]
    fn every_response_token_is_predicted_from_the_place_before_it() {
        let rows = [row(0, &[1, 2, 3], &[4, 5]), row(1, &[6], &[]), row(2, &[], &[7, 8])];
        let text = Aligned::of(&rows);
        assert_eq!(text.ids, [1, 2, 3, 4, 7]);
        assert_eq!(text.packed.wanted, Some(vec![2, 3, 4]));
        assert_eq!(text.labels, [4, 5, 8]);
        let found: Vec<_> = text.rows().iter().map(|it| (it.row, it.prompt, it.tokens)).collect();
        assert_eq!(found, [(0, &[1, 2, 3][..], &[4, 5][..]), (2, &[7], &[8])]);
        let seen = vec![row(0, &[9, 1, 2, 3], &[]), row(2, &[8], &[])];
        let view = View::of(Arc::new(Dataset { rows: seen, tokenizer: contract::TokenizerFile::new("", 0, 9) }));
        let other = text.seen_in(&view).unwrap();
        assert_eq!(other.labels, text.labels);
        assert_eq!(other.rows().iter().map(|it| it.prompt).collect::<Vec<_>>(), [&[9, 1, 2, 3][..], &[8]]);
        assert!(view.prompt_of(1).unwrap_err().to_string().contains("row 2 of `train`"));
        for (row, found) in [&rows[0], &rows[2]].into_iter().zip(found) {
            assert_eq!((Aligned::prompt_of(row), Aligned::response_of(row)), (found.1, found.2));
        }
    }
}
