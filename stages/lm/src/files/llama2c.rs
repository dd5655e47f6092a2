//! The files of llama2.c: a header of a few numbers, and the weights of a Llama one behind another.
//!
//! Version 0 has no mark of its own: what tells it from any other file is that its seven numbers ask for exactly as many bytes
//! as there are. Versions 1 (32-bit floats) and 2 (eight bits, with a scale for each group) begin with `ak42`. The angles of
//! rotary positions turn neighbouring channels, as in GGUF files, so that rows of `wq` and `wk` are put in another order.
//!
//! Source: `export.py` and `run.c` of the repository `karpathy/llama2.c`.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;

use anyhow::{Context, anyhow, ensure};
use contract::Result;
use contract::files;
use serde_json::{Value as Json, json};

use super::gguf::{reordered, row_order};

/// What versions 1 and 2 begin with: `ak42` as a number.
const MAGIC: u32 = 0x616b_3432;
/// Bytes before the values of versions 1 and 2.
const HEADER: u64 = 256;

/// An open file, whose values stay on disk until they are asked for.
pub(crate) struct Llama2cFile {
    file: File,
    tensors: Vec<Llama2cTensor>,
}

/// A tensor of a file, by its name in Hugging Face checkpoints.
pub(crate) struct Llama2cTensor {
    pub(crate) name: String,
    pub(crate) shape: Vec<usize>,
    /// Its first byte.
    start: u64,
    /// Numbers that share a scale, where they have eight bits: the scales follow them.
    group: Option<usize>,
    /// Heads whose rows stand in another order: see [`row_order`].
    interleaved_heads: Option<usize>,
}

/// The numbers of a header.
struct Header {
    version: u32,
    width: u64,
    inner: u64,
    layers: u64,
    heads: u64,
    kv_heads: u64,
    vocabulary: u64,
    positions: u64,
    is_tied: bool,
    /// Numbers that share a scale, in version 2.
    group: u64,
}

/// A tensor in its turn: name, sizes, and the heads whose rows stand in another order.
type Laid = (String, Vec<u64>, Option<u64>);

impl Llama2cFile {
    /// Whether a file is one: it begins with the mark of newer versions, or its size is what seven numbers at its start say.
    pub(crate) fn is(path: &Path) -> bool {
        let Ok(file) = files::open(path, files::WEIGHTS) else { return false };
        let (size, file) = (file.size(), file.into_file());
        let mut magic = [0; 4];
        let is_marked = file.read_exact_at(&mut magic, 0).is_ok() && u32::from_le_bytes(magic) == MAGIC;
        is_marked || Header::read(&file).is_ok_and(|header| header.bytes() == Some(size))
    }

    /// Reads the header, and gives the `config.json` that it stands for.
    ///
    /// Errors where its numbers are none of a model, or the file is longer or shorter than they say.
    pub(crate) fn open(path: &Path) -> Result<(Self, Json)> {
        let file = files::open(path, files::WEIGHTS)?;
        let (size, file) = (file.size(), file.into_file());
        let read = || {
            let header = Header::read(&file)?;
            let expected = header.bytes().context("its header asks for more than any file holds")?;
            ensure!(size == expected, "it has {size} bytes, and by its header {expected}");
            Ok((header.tensors(), header.config()))
        };
        let (tensors, config) = read().map_err(|error: anyhow::Error| {
            anyhow!("`{}` is no whole model of llama2.c ({error:#}): get it again", path.display())
        })?;
        Ok((Llama2cFile { file, tensors }, config))
    }

    pub(crate) fn tensors(&self) -> &[Llama2cTensor] {
        &self.tensors
    }

    /// The values of a tensor, its rows in the order of Hugging Face.
    pub(crate) fn values(&self, name: &str) -> Result<Vec<f32>> {
        let tensor = self.tensors.iter().find(|tensor| tensor.name == name).context("a tensor without a place")?;
        let count = tensor.shape.iter().product::<usize>();
        let values = match tensor.group {
            None => self.floats(tensor.start, count)?,
            Some(group) => {
                let numbers = self.bytes(tensor.start, count)?;
                let scales = self.floats(tensor.start + count as u64, count / group)?;
                let groups = numbers.chunks_exact(group).zip(scales);
                groups.flat_map(|(group, scale)| group.iter().map(move |byte| f32::from(*byte as i8) * scale)).collect()
            }
        };
        let Some(heads) = tensor.interleaved_heads else { return Ok(values) };
        Ok(reordered(&values, &row_order(tensor.shape[0], heads)))
    }

    /// A file of holes may be larger than all memory.
    fn bytes(&self, start: u64, count: usize) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        bytes.try_reserve_exact(count).context("there is no memory for it")?;
        bytes.resize(count, 0);
        self.file.read_exact_at(&mut bytes, start)?;
        Ok(bytes)
    }

    fn floats(&self, start: u64, count: usize) -> Result<Vec<f32>> {
        let bytes = self.bytes(start, 4 * count)?;
        let (words, _) = bytes.as_chunks::<4>();
        Ok(words.iter().map(|word| f32::from_le_bytes(*word)).collect())
    }
}

impl Header {
    /// Errors where its numbers are none of a model, or its version is not known.
    fn read(file: &File) -> Result<Self> {
        let word = |at: u64| {
            let mut bytes = [0; 4];
            file.read_exact_at(&mut bytes, at).map_err(|_| anyhow!("its header is cut off"))?;
            Ok::<i32, anyhow::Error>(i32::from_le_bytes(bytes))
        };
        let is_marked = word(0)? as u32 == MAGIC;
        let version = if is_marked { word(4)? as u32 } else { 0 };
        ensure!(version <= 2 && (version > 0 || !is_marked), "it has version {version}: expected 0, 1 or 2");
        let first = if is_marked { 8 } else { 0 };
        let number = |index: u64, what: &str| {
            let number = word(first + 4 * index)?;
            u64::try_from(number)
                .ok()
                .filter(|number| *number > 0)
                .with_context(|| format!("its number of {what} is {number}"))
        };
        // In version 0 a head of its own is told by a size below zero.
        let vocabulary = word(first + 20)?;
        let (is_tied, group) = if is_marked {
            let mut byte = [0];
            file.read_exact_at(&mut byte, first + 28).map_err(|_| anyhow!("its header is cut off"))?;
            let group = if version == 2 { word(first + 29)? } else { 1 };
            (byte != [0], u64::try_from(group).ok().filter(|group| *group > 0).context("its groups have no numbers")?)
        } else {
            (vocabulary > 0, 1)
        };
        let header = Header {
            version,
            width: number(0, "channels")?,
            inner: number(1, "inner channels")?,
            layers: number(2, "layers")?,
            heads: number(3, "heads")?,
            kv_heads: number(4, "heads of keys and values")?,
            vocabulary: u64::from(vocabulary.unsigned_abs()),
            positions: number(6, "positions")?,
            is_tied,
            group,
        };
        let Header { width, inner, heads, kv_heads, .. } = header;
        ensure!(header.vocabulary > 0 && (vocabulary > 0 || !is_marked), "its vocabulary has {vocabulary} tokens");
        ensure!(
            width.is_multiple_of(2 * heads) && heads.is_multiple_of(kv_heads),
            "its {width} channels, {heads} heads and {kv_heads} heads of keys and values do not fit one another"
        );
        ensure!(
            width.is_multiple_of(group) && inner.is_multiple_of(group),
            "its {width} and {inner} channels are no multiples of its groups of {group}"
        );
        Ok(header)
    }

    fn kv_width(&self) -> u64 {
        self.width / self.heads * self.kv_heads
    }

    /// The matrices of a layer: names, sizes, and whether their rows are those of heads in another order.
    fn matrices(&self) -> [(&'static str, u64, u64, Option<u64>); 7] {
        let (width, inner, kv_width) = (self.width, self.inner, self.kv_width());
        [
            ("self_attn.q_proj", width, width, Some(self.heads)),
            ("self_attn.k_proj", kv_width, width, Some(self.kv_heads)),
            ("self_attn.v_proj", kv_width, width, None),
            ("self_attn.o_proj", width, width, None),
            ("mlp.gate_proj", inner, width, None),
            ("mlp.down_proj", width, inner, None),
            ("mlp.up_proj", inner, width, None),
        ]
    }

    /// Bytes of a matrix of so many numbers, which are multiples of a group.
    fn matrix_bytes(&self, numbers: u64) -> Option<u64> {
        if self.version == 2 {
            numbers.checked_add((numbers / self.group).checked_mul(4)?)
        } else {
            numbers.checked_mul(4)
        }
    }

    /// Bytes of the table of angles that version 0 has behind the last norm.
    fn angles_bytes(&self) -> Option<u64> {
        if self.version == 0 { self.positions.checked_mul(self.width / self.heads)?.checked_mul(4) } else { Some(0) }
    }

    /// Bytes of such a file; `None` where there can be none.
    fn bytes(&self) -> Option<u64> {
        let matrix = |rows: u64, columns: u64| self.matrix_bytes(rows.checked_mul(columns)?);
        let layer = self.matrices().iter().try_fold(self.width.checked_mul(8)?, |all, (_, rows, columns, _)| {
            all.checked_add(matrix(*rows, *columns)?)
        })?;
        let table = matrix(self.vocabulary, self.width)?;
        let tables = if self.is_tied { table } else { table.checked_mul(2)? };
        let header = if self.version == 0 { 28 } else { HEADER };
        [layer.checked_mul(self.layers)?, tables, 4 * self.width, self.angles_bytes()?]
            .into_iter()
            .try_fold(header, u64::checked_add)
            .filter(|bytes| *bytes <= files::WEIGHTS.bytes)
    }

    /// All tensors, in the order of the file, whose size is known to fit.
    fn tensors(&self) -> Vec<Llama2cTensor> {
        let is_first_version = self.version == 0;
        let of_layers = |part: &str, shape: &[u64], heads: Option<u64>| -> Vec<Laid> {
            let name = |layer| format!("model.layers.{layer}.{part}.weight");
            (0..self.layers).map(|layer| (name(layer), shape.to_vec(), heads)).collect()
        };
        let alone = |name: &str, shape: &[u64]| vec![(name.to_owned(), shape.to_vec(), None)];
        let table = [self.vocabulary, self.width];
        let embedding = alone("model.embed_tokens.weight", &table);
        let last_norm = alone("model.norm.weight", &[self.width]);
        let [before, behind] =
            ["input_layernorm", "post_attention_layernorm"].map(|norm| of_layers(norm, &[self.width], None));
        let matrices = self.matrices().map(|(part, rows, columns, heads)| of_layers(part, &[rows, columns], heads));
        let [attention, feed_forward] = [&matrices[..4], &matrices[4..]].map(<[Vec<Laid>]>::concat);
        let head = if self.is_tied { Vec::new() } else { alone("lm_head.weight", &table) };
        let laid = if is_first_version {
            [embedding, before, attention, behind, feed_forward, last_norm, head]
        } else {
            [before, behind, last_norm, embedding, attention, feed_forward, head]
        };
        let mut end = if is_first_version { 28 } else { HEADER };
        let place = |(name, shape, heads): Laid| {
            if name == "lm_head.weight" {
                end += self.angles_bytes().unwrap_or(0);
            }
            let (is_matrix, start) = (shape.len() == 2, end);
            let numbers = shape.iter().product::<u64>();
            end += if is_matrix { self.matrix_bytes(numbers).unwrap_or(0) } else { 4 * numbers };
            Llama2cTensor {
                name,
                shape: shape.iter().map(|size| *size as usize).collect(),
                start,
                group: (self.version == 2 && is_matrix).then_some(self.group as usize),
                interleaved_heads: heads.map(|heads| heads as usize),
            }
        };
        laid.into_iter().flatten().map(place).collect()
    }

    fn config(&self) -> Json {
        json!({
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.width,
            "intermediate_size": self.inner,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "hidden_act": "silu",
            "max_position_embeddings": self.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 10000.0,
            "tie_word_embeddings": self.is_tied,
            // Those of the tokenizer of Llama. The program stops at either: texts were joined by the token that begins one.
            "bos_token_id": 1,
            "eos_token_id": [2, 1],
        })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use std::fs;

    use proptest::prelude::*;

    use super::*;

    /// A model of two layers, 8 channels, 12 inner ones, 2 heads that share one of keys and values, 5 tokens and 6 positions.
    const SIZES: [i32; 7] = [8, 12, 2, 2, 1, 5, 6];

    fn header(version: u32, is_tied: bool, group: i32) -> Vec<u8> {
        let mut sizes = SIZES;
        if version == 0 && !is_tied {
            sizes[5] = -sizes[5];
        }
        let mut bytes: Vec<u8> = sizes.iter().flat_map(|size| size.to_le_bytes()).collect();
        if version > 0 {
            bytes.splice(0..0, [MAGIC.to_le_bytes(), version.to_le_bytes()].concat());
            bytes.push(is_tied.into());
            bytes.extend(group.to_le_bytes());
            bytes.resize(HEADER as usize, 0);
        }
        bytes
    }

    /// Bytes of a file of these sizes, whose numbers count up from 0.
    pub(crate) fn counting(version: u32, is_tied: bool) -> Vec<u8> {
        // Twice: tables of tokens; of a layer two norms, q and o, k and v, three of the feed-forward layer; then the last norm.
        let (norms, matrices) = (5 * 8, 5 * 8 * if is_tied { 1 } else { 2 } + 2 * (2 * 64 + 2 * 32 + 3 * 96));
        let angles = if version == 0 { 6 * 4 } else { 0 };
        let mut bytes = header(version, is_tied, 4);
        bytes.extend((0..norms + matrices + angles).flat_map(|x| (x as f32).to_le_bytes()));
        bytes
    }

    fn open(bytes: &[u8]) -> Result<(Llama2cFile, Json)> {
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), bytes).unwrap();
        assert!(Llama2cFile::open(file.path()).is_err() || Llama2cFile::is(file.path()));
        Llama2cFile::open(file.path())
    }

    fn error(bytes: &[u8]) -> String {
        format!("{:#}", open(bytes).err().expect("an error"))
    }

    #[test]
    fn tensors_lie_where_the_program_has_them() {
        // The first number of some tensors, by `export.py`: in version 0 tables first, in version 1 norms.
        let layer = |layer: usize, name: &str| format!("model.layers.{layer}.{name}.weight");
        for (version, is_tied, expected) in [
            (
                0,
                true,
                [
                    ("model.embed_tokens.weight".to_owned(), 0.0),
                    (layer(1, "input_layernorm"), 48.0),
                    (layer(0, "self_attn.v_proj"), 248.0),
                    (layer(1, "self_attn.o_proj"), 376.0),
                    (layer(0, "post_attention_layernorm"), 440.0),
                    (layer(0, "mlp.gate_proj"), 456.0),
                    (layer(1, "mlp.down_proj"), 744.0),
                    (layer(0, "mlp.up_proj"), 840.0),
                    ("model.norm.weight".to_owned(), 1032.0),
                ],
            ),
            (
                1,
                true,
                [
                    (layer(1, "input_layernorm"), 8.0),
                    (layer(0, "post_attention_layernorm"), 16.0),
                    ("model.norm.weight".to_owned(), 32.0),
                    ("model.embed_tokens.weight".to_owned(), 40.0),
                    (layer(0, "self_attn.v_proj"), 272.0),
                    (layer(1, "self_attn.o_proj"), 400.0),
                    (layer(0, "mlp.gate_proj"), 464.0),
                    (layer(1, "mlp.down_proj"), 752.0),
                    (layer(0, "mlp.up_proj"), 848.0),
                ],
            ),
        ] {
            let (file, config) = open(&counting(version, is_tied)).unwrap();
            for (name, first) in expected {
                assert_eq!(file.values(&name).unwrap()[0], first, "version {version}: {name}");
            }
            assert_eq!(config["tie_word_embeddings"], is_tied);
            // Rows 0 and 1 of the file are those of one pair: rows 0 and 2 of a head of four.
            let q = file.values(&layer(0, "self_attn.q_proj")).unwrap();
            let first = q[0];
            let starts: Vec<f32> = q.chunks_exact(8).map(|row| (row[0] - first) / 8.0).collect();
            assert_eq!(starts, [0.0, 2.0, 1.0, 3.0, 4.0, 6.0, 5.0, 7.0]);
        }
        let (file, config) = open(&counting(0, false)).unwrap();
        // Behind the last norm stand the angles of six positions, two numbers for each of two pairs.
        assert_eq!(file.values("lm_head.weight").unwrap()[0], 1032.0 + 8.0 + 24.0);
        assert_eq!((&config["vocab_size"], &config["tie_word_embeddings"]), (&json!(5), &json!(false)));
        let (file, _) = open(&counting(1, false)).unwrap();
        assert_eq!(file.values("lm_head.weight").unwrap().last(), Some(&(40.0 + 40.0 + 40.0 + 960.0 - 1.0)));
    }

    #[test]
    fn numbers_of_eight_bits_have_their_scales() {
        let mut bytes = header(2, true, 4);
        bytes.extend((0..40).flat_map(|x| (x as f32).to_le_bytes()));
        let matrices = [40, 64, 64, 32, 32, 32, 32, 64, 64, 96, 96, 96, 96, 96, 96];
        for (index, count) in matrices.into_iter().enumerate() {
            bytes.extend((0..count).map(|x: i32| (x % 100 - 50) as i8 as u8));
            bytes.extend((0..count / 4).flat_map(|group| ((group + index as i32) as f32 * 0.5).to_le_bytes()));
        }
        let (file, _) = open(&bytes).unwrap();
        let table = file.values("model.embed_tokens.weight").unwrap();
        assert_eq!((table[4], table[39]), (-46.0 * 0.5, -11.0 * 4.5));
        let last = file.values("model.layers.1.mlp.up_proj.weight").unwrap();
        assert_eq!((last[0], last[95]), (-50.0 * 7.0, 45.0 * 18.5));
        assert_eq!(file.values("model.norm.weight").unwrap(), (32..40).map(|x| x as f32).collect::<Vec<_>>());
    }

    #[test]
    fn what_cannot_be_is_refused() {
        let good = counting(0, true);
        let with = |place: usize, number: i32| {
            let mut bytes = good.clone();
            bytes[place..place + 4].copy_from_slice(&number.to_le_bytes());
            error(&bytes)
        };
        let cases = [
            (error(&good[..good.len() - 1]), "it has 4283 bytes, and by its header 4284"),
            (error(&good[..20]), "its header is cut off"),
            (error(&[]), "its header is cut off"),
            (with(0, 0), "its number of channels is 0"),
            (with(8, -2), "its number of layers is -2"),
            (with(20, 0), "its vocabulary has 0 tokens"),
            (with(20, i32::MIN), "and by its header"),
            (with(12, 3), "8 channels, 3 heads and 1 heads of keys and values do not fit"),
            (with(8, i32::MAX), "and by its header"),
            (error(&header(3, true, 4)), "it has version 3: expected 0, 1 or 2"),
            (error(&header(0x0100_0000, true, 4)), "it has version 16777216"),
            (error(&header(2, true, 3)), "are no multiples of its groups of 3"),
            (error(&header(2, true, 0)), "its groups have no numbers"),
            (error(&header(1, true, 4)), "it has 256 bytes"),
            (error(&[i32::MAX - 1; 7].map(i32::to_le_bytes).concat()), "2147483646 channels, 2147483646 heads"),
        ];
        for (error, expected) in cases {
            assert!(error.contains(expected) && error.contains("no whole model of llama2.c"), "{expected}: {error}");
        }
        let hostile = include_bytes!("../../../../tests/fixtures/checkpoint/hostile/sizes.llama2c");
        assert!(error(hostile).contains("its header asks for more than any file holds"), "{}", error(hostile));
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(
            numbers in prop::collection::vec(prop_oneof![0_i32..20, any::<i32>()], 0..9),
            mark in prop::option::of(0_u32..4),
            rest in prop::collection::vec(any::<u8>(), 0..300),
        ) {
            let mark = mark.map(|version| [MAGIC.to_le_bytes(), version.to_le_bytes()].concat()).unwrap_or_default();
            let numbers = numbers.iter().flat_map(|number| number.to_le_bytes()).collect();
            _ = open(&[mark, numbers, rest].concat());
        }

        #[test]
        fn no_change_of_a_file_makes_it_panic(
            changes in prop::collection::vec((0_usize..64, any::<u8>()), 1..4),
            version in 0_u32..3,
            is_tied in any::<bool>(),
        ) {
            let mut bytes = counting(version, is_tied);
            changes.into_iter().for_each(|(place, byte)| bytes[place] = byte);
            if let Ok((file, _)) = open(&bytes) {
                for tensor in file.tensors() {
                    let values = file.values(&tensor.name).unwrap();
                    prop_assert!(values.len() == tensor.shape.iter().product::<usize>() && values.len() <= bytes.len());
                }
            }
        }
    }
}
