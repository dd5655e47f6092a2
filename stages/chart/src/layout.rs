//! Places for boxes in layers, so that lines lead down and cross little: layers by longest path, order within a layer by the
//! middle of neighbours, and places by the same (Sugiyama, Tagawa and Toda, 1981).

/// Distance between two layers, and between neighbours of one.
const DOWN: f64 = 36.0;
const ACROSS: f64 = 18.0;

/// Where things came to lie.
pub(crate) struct Layout {
    /// Upper left corner of each item.
    pub(crate) corners: Vec<(f64, f64)>,
    pub(crate) size: (f64, f64),
    /// For each edge the points between its ends, one a layer that it passes.
    pub(crate) bends: Vec<Vec<(f64, f64)>>,
}

/// Lays out items of those sizes with edges from earlier to later layers. Edges that would close a circle are no help and are
/// left out by the caller.
pub(crate) fn lay_out(sizes: &[(f64, f64)], edges: &[(usize, usize)]) -> Layout {
    let layers = layers(sizes.len(), edges);
    let depth = layers.iter().max().map_or(0, |last| last + 1);
    // What an edge passes by takes up a place of its own.
    let mut widths: Vec<f64> = sizes.iter().map(|size| size.0).collect();
    let mut rows: Vec<Vec<usize>> = vec![Vec::new(); depth];
    for (item, layer) in layers.iter().enumerate() {
        rows[*layer].push(item);
    }
    let mut links: Vec<(usize, usize)> = Vec::new();
    let mut passed: Vec<Vec<usize>> = Vec::new();
    for &(from, to) in edges {
        let mut chain = Vec::new();
        let mut last = from;
        for row in rows.iter_mut().take(layers[to]).skip(layers[from] + 1) {
            let place = widths.len();
            widths.push(6.0);
            row.push(place);
            links.push((last, place));
            chain.push(place);
            last = place;
        }
        links.push((last, to));
        passed.push(chain);
    }
    let (mut above, mut below) = (vec![Vec::new(); widths.len()], vec![Vec::new(); widths.len()]);
    for (from, to) in links {
        below[from].push(to);
        above[to].push(from);
    }
    order(&mut rows, &above, &below);
    let centres = centres(&rows, &widths, &above, &below);

    let heights: Vec<f64> = rows
        .iter()
        .map(|row| row.iter().filter_map(|item| sizes.get(*item)).map(|size| size.1).fold(10.0, f64::max))
        .collect();
    let mut tops = Vec::with_capacity(depth);
    let mut y = 0.0;
    for height in &heights {
        tops.push(y);
        y += height + DOWN;
    }
    let edge = |item: usize, sign: f64| centres[item] + sign * widths[item] / 2.0;
    let first = (0..widths.len()).map(|item| edge(item, -1.0)).fold(f64::INFINITY, f64::min);
    let last = (0..widths.len()).map(|item| edge(item, 1.0)).fold(f64::NEG_INFINITY, f64::max);
    let first = if first.is_finite() { first } else { 0.0 };
    let corner = |item: usize| {
        let (layer, (width, height)) = (layers[item], sizes[item]);
        (centres[item] - width / 2.0 - first, tops[layer] + (heights[layer] - height) / 2.0)
    };
    let bends = edges.iter().zip(&passed).map(|((from, _), chain)| {
        let place = |(step, item): (usize, &usize)| {
            let layer = layers[*from] + 1 + step;
            (centres[*item] - first, tops[layer] + heights[layer] / 2.0)
        };
        chain.iter().enumerate().map(place).collect()
    });
    Layout {
        corners: (0..sizes.len()).map(corner).collect(),
        size: ((last - first).max(0.0), (y - DOWN).max(0.0)),
        bends: bends.collect(),
    }
}

/// The layer of each item: one below the lowest that it needs; what needs nothing is right above who needs it first.
fn layers(count: usize, edges: &[(usize, usize)]) -> Vec<usize> {
    let mut layers = vec![0; count];
    // Without circles this ends; with one it would not, so it is bounded.
    for _ in 0..count {
        let mut has_moved = false;
        for &(from, to) in edges {
            if layers[to] < layers[from] + 1 && layers[from] + 1 < count {
                layers[to] = layers[from] + 1;
                has_moved = true;
            }
        }
        if !has_moved {
            break;
        }
    }
    for item in (0..count).filter(|item| edges.iter().all(|edge| edge.1 != *item)) {
        if let Some(first) = edges.iter().filter(|edge| edge.0 == item).map(|edge| layers[edge.1]).min() {
            layers[item] = first.saturating_sub(1);
        }
    }
    layers
}

/// Sorts every row by the middle of its neighbours, down and up again, as long as fewer lines cross.
fn order(rows: &mut Vec<Vec<usize>>, above: &[Vec<usize>], below: &[Vec<usize>]) {
    let mut best = (crossings(rows, below), rows.clone());
    for round in 0..12 {
        let mut place = vec![0.0; above.len()];
        for row in rows.iter() {
            for (index, item) in row.iter().enumerate() {
                place[*item] = index as f64;
            }
        }
        let neighbours = if round % 2 == 0 { above } else { below };
        let indices: Vec<usize> =
            if round % 2 == 0 { (0..rows.len()).collect() } else { (0..rows.len()).rev().collect() };
        for index in indices {
            let middle = |item: &usize| {
                let near = &neighbours[*item];
                if near.is_empty() {
                    place[*item]
                } else {
                    near.iter().map(|other| place[*other]).sum::<f64>() / near.len() as f64
                }
            };
            let mut sorted: Vec<(f64, usize)> = rows[index].iter().map(|item| (middle(item), *item)).collect();
            sorted.sort_by(|a, b| a.0.total_cmp(&b.0));
            rows[index] = sorted.into_iter().map(|(_, item)| item).collect();
            for (at, item) in rows[index].iter().enumerate() {
                place[*item] = at as f64;
            }
        }
        let found = crossings(rows, below);
        if found < best.0 {
            best = (found, rows.clone());
        }
    }
    *rows = best.1;
}

/// How many lines between neighbouring rows cross.
fn crossings(rows: &[Vec<usize>], below: &[Vec<usize>]) -> usize {
    let mut count = 0;
    for pair in rows.windows(2) {
        let place = |item: &usize| pair[1].iter().position(|other| other == item);
        let lines: Vec<(usize, usize)> = pair[0]
            .iter()
            .enumerate()
            .flat_map(|(at, item)| below[*item].iter().filter_map(place).map(move |to| (at, to)))
            .collect();
        for (index, a) in lines.iter().enumerate() {
            count += lines[index + 1..].iter().filter(|b| (a.0 < b.0 && a.1 > b.1) || (a.0 > b.0 && a.1 < b.1)).count();
        }
    }
    count
}

/// The middle of each item along its row: near its neighbours, and on nobody.
fn centres(rows: &[Vec<usize>], widths: &[f64], above: &[Vec<usize>], below: &[Vec<usize>]) -> Vec<f64> {
    let mut centres = vec![0.0; widths.len()];
    for row in rows {
        let mut x = 0.0;
        for item in row {
            centres[*item] = x + widths[*item] / 2.0;
            x += widths[*item] + ACROSS;
        }
    }
    for round in 0..24 {
        let indices: Vec<usize> =
            if round % 2 == 0 { (0..rows.len()).collect() } else { (0..rows.len()).rev().collect() };
        for index in indices {
            let wanted: Vec<f64> = rows[index]
                .iter()
                .map(|item| {
                    let near: Vec<f64> =
                        above[*item].iter().chain(&below[*item]).map(|other| centres[*other]).collect();
                    if near.is_empty() { centres[*item] } else { near.iter().sum::<f64>() / near.len() as f64 }
                })
                .collect();
            for (item, centre) in rows[index].iter().zip(apart(&wanted, &rows[index], widths)) {
                centres[*item] = centre;
            }
        }
    }
    centres
}

/// Places as near as can be to those wanted, in the same order and with room between: neighbours that push one another move
/// as one block, to the middle of what they want (Pool adjacent violators).
fn apart(wanted: &[f64], row: &[usize], widths: &[f64]) -> Vec<f64> {
    let mut offsets = Vec::with_capacity(row.len());
    let mut offset = 0.0;
    for (index, item) in row.iter().enumerate() {
        if index > 0 {
            offset += (widths[row[index - 1]] + widths[*item]) / 2.0 + ACROSS;
        }
        offsets.push(offset);
    }
    let mut blocks: Vec<(f64, usize)> = Vec::new();
    for (want, offset) in wanted.iter().zip(&offsets) {
        blocks.push((want - offset, 1));
        while let [.., (a, m), (b, n)] = blocks[..]
            && a > b
        {
            blocks.truncate(blocks.len() - 2);
            blocks.push(((a * m as f64 + b * n as f64) / (m + n) as f64, m + n));
        }
    }
    let starts = blocks.into_iter().flat_map(|(start, count)| std::iter::repeat_n(start, count));
    starts.zip(offsets).map(|(start, offset)| start + offset).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nothing_lies_on_anything_and_lines_lead_down() {
        let sizes: Vec<(f64, f64)> = (0..9).map(|index| (60.0 + 5.0 * index as f64, 30.0)).collect();
        let edges = [(0, 1), (0, 2), (1, 3), (2, 3), (0, 4), (4, 5), (3, 6), (5, 6), (0, 6), (7, 8)];
        let layout = lay_out(&sizes, &edges);
        for (from, to) in edges {
            assert!(layout.corners[from].1 + 30.0 < layout.corners[to].1, "{from} is above {to}");
        }
        for a in 0..sizes.len() {
            let (x, y) = layout.corners[a];
            assert!(x >= -1e-9 && x + sizes[a].0 <= layout.size.0 + 1e-9 && y + 30.0 <= layout.size.1 + 1e-9);
            for b in a + 1..sizes.len() {
                let (u, v) = layout.corners[b];
                assert!(y != v || x + sizes[a].0 <= u || u + sizes[b].0 <= x, "{a} lies on {b}");
            }
        }
        assert_eq!(layout.bends[8].len(), 2);
        assert_eq!(lay_out(&[], &[]).size, (0.0, 0.0));
    }

    #[test]
    fn two_lines_that_need_not_cross_do_not() {
        let sizes = [(50.0, 20.0); 4];
        let layout = lay_out(&sizes, &[(0, 3), (1, 2)]);
        let x = |item: usize| layout.corners[item].0;
        assert!((x(0) < x(1)) == (x(3) < x(2)));
    }
}
