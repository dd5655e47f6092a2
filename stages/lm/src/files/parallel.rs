//! Checkpoints of tensor-parallel programs: a model in as many parts as it had ranks, `mp4/pytorch_model_0.bin` and so on beside
//! its `config.json`, each the `state_dict()` of its rank.
//!
//! A layer that widens is divided by its outputs, the one behind it by its inputs, so that a rank computes its heads and its
//! inner channels without the others; tables of tokens are divided by tokens; norms, positions, and biases that are added
//! once are whole in every rank. GPT-2's matrices, which are `[in, out]` elsewhere, are `[out, in]` here, and of its joint
//! matrix of queries, keys and values a rank has a part of each of the three.
//!
//! Source: Shoeybi et al., "Megatron-LM", 2019, section 3, and `tools/convert_mp.py` of MiniLLM and PromptKD.

use anyhow::{Result, ensure};

use crate::families::Config;

/// Most ranks.
pub(crate) const RANKS: usize = 1024;

/// How ranks share a parameter.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Share {
    /// Every rank has all of it.
    Whole,
    /// Every rank has a part of the rows.
    Rows {
        /// So many matrices stand one above another, and a rank has a part of each.
        sections: usize,
        /// What of a section is not divided: heads, or rows.
        units: Units,
        /// Whether rows are those of the transposed matrix.
        transposed: bool,
    },
    /// Every rank has a part of the columns.
    Columns {
        /// What of them is not divided: heads, or columns.
        units: Units,
        /// Whether columns are those of the transposed matrix.
        transposed: bool,
    },
}

/// What is divided between ranks, a whole number of it to each.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Units {
    /// So many heads.
    Heads(usize),
    /// Rows or columns, each by itself.
    Lines,
}

/// How ranks share the parameter of that name.
pub(crate) fn share(config: &Config, name: &str) -> Share {
    let heads = Units::Heads(config.sizes().heads);
    let kv_heads = Units::Heads(config.kv_heads());
    let rows = |units| Share::Rows { sections: 1, units, transposed: false };
    let columns = |units| Share::Columns { units, transposed: false };
    if name == config.embedding() || name == config.head() {
        return rows(Units::Lines);
    }
    let mut parts = name.rsplit('.');
    let is_bias = parts.next() == Some("bias");
    let (part, of) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    match part {
        "c_attn" => Share::Rows { sections: 3, units: heads, transposed: !is_bias },
        "c_fc" => Share::Rows { sections: 1, units: Units::Lines, transposed: !is_bias },
        "c_proj" if !is_bias => {
            Share::Columns { units: if of == "attn" { heads } else { Units::Lines }, transposed: true }
        }
        "q_proj" | "query_key_value" => rows(heads),
        "k_proj" | "v_proj" => rows(kv_heads),
        "gate_proj" | "up_proj" | "fc1" | "dense_h_to_4h" => rows(Units::Lines),
        "o_proj" | "out_proj" | "dense" if !is_bias => columns(heads),
        "down_proj" | "fc2" | "dense_4h_to_h" if !is_bias => columns(Units::Lines),
        _ => Share::Whole,
    }
}

/// Rows and columns of a parameter as a rank's file has them; a vector is one column.
fn sizes(shape: &[usize], transposed: bool) -> (usize, usize) {
    let (rows, columns) = (shape[0], shape[1..].iter().product());
    if transposed { (columns, rows) } else { (rows, columns) }
}

impl Share {
    /// The shape of a rank's part of a parameter.
    ///
    /// Errors where so many ranks cannot share it evenly: it names the parameter.
    pub(crate) fn part_shape(self, name: &str, shape: &[usize], ranks: usize) -> Result<Vec<usize>> {
        let (sections, units, transposed, lines) = match self {
            Share::Whole => return Ok(shape.to_vec()),
            Share::Rows { sections, units, transposed } => (sections, units, transposed, "rows"),
            Share::Columns { units, transposed } => (1, units, transposed, "columns"),
        };
        let (rows, columns) = sizes(shape, transposed);
        let is_by_rows = matches!(self, Share::Rows { .. });
        let length = if is_by_rows { rows / sections } else { columns };
        let (count, what) = match units {
            Units::Heads(heads) => (heads, "heads"),
            Units::Lines => (length, lines),
        };
        ensure!(
            count.is_multiple_of(ranks) && length.is_multiple_of(ranks),
            "tensor `{name}` has {count} {what}, which {ranks} ranks do not share evenly: choose another number of ranks{}",
            if shape.len() == 2 && units == Units::Lines && is_by_rows { ", or pad it" } else { "" }
        );
        let (rows, columns) = if is_by_rows { (rows / ranks, columns) } else { (rows, columns / ranks) };
        Ok(if shape.len() == 1 { vec![rows] } else { vec![rows, columns] })
    }

    /// The part of a rank, of all values in row-major order.
    pub(crate) fn part(self, shape: &[usize], values: Vec<f32>, ranks: usize, rank: usize) -> Vec<f32> {
        match self {
            Share::Whole => values,
            Share::Rows { sections, transposed, .. } => {
                let (rows, columns) = sizes(shape, transposed);
                let values = turned(values, shape, transposed);
                let length = rows / sections / ranks * columns;
                let section = |section| &values[(section * ranks + rank) * length..][..length];
                (0..sections).flat_map(section).copied().collect()
            }
            Share::Columns { transposed, .. } => {
                let (_, columns) = sizes(shape, transposed);
                let values = turned(values, shape, transposed);
                let length = columns / ranks;
                values.chunks_exact(columns).flat_map(|row| &row[rank * length..][..length]).copied().collect()
            }
        }
    }

    /// All values of a parameter of that shape, from the parts of all ranks in order.
    pub(crate) fn joined(self, shape: &[usize], mut parts: Vec<Vec<f32>>) -> Vec<f32> {
        let ranks = parts.len();
        match self {
            Share::Whole => parts.swap_remove(0),
            Share::Rows { sections, transposed, .. } => {
                let (rows, columns) = sizes(shape, transposed);
                let length = rows / sections / ranks * columns;
                let section = |section: usize| parts.iter().flat_map(move |part| &part[section * length..][..length]);
                turned((0..sections).flat_map(section).copied().collect(), &[rows, columns], transposed)
            }
            Share::Columns { transposed, .. } => {
                let (rows, columns) = sizes(shape, transposed);
                let length = columns / ranks;
                let row = |row: usize| parts.iter().flat_map(move |part| &part[row * length..][..length]);
                turned((0..rows).flat_map(row).copied().collect(), &[rows, columns], transposed)
            }
        }
    }
}

/// A matrix of that shape, transposed where that is asked for.
fn turned(values: Vec<f32>, shape: &[usize], transposed: bool) -> Vec<f32> {
    match shape[..] {
        [rows, columns] if transposed => transpose(&values, rows, columns),
        _ => values,
    }
}

/// The transposed matrix of one with so many rows and columns.
pub(crate) fn transpose(values: &[f32], rows: usize, columns: usize) -> Vec<f32> {
    (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect()
}
