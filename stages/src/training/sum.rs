//! Sums over the parts of a batch.

use contract::Result;

use super::Mean;

/// In which order parts are added up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Order {
    /// In a binary tree over their index. Whoever has a block of parts whose length is a power of two, and which begins at a
    /// multiple of it, can add it up alone: so 1, 2, 4 or 8 of them give the same bits.
    Tree,
    /// One after the other.
    Line,
}

impl Order {
    /// The order that goes with a mean: the published programs add up in line.
    pub(super) fn of(mean: Mean) -> Self {
        match mean {
            Mean::Tokens => Order::Tree,
            Mean::MicroBatches => Order::Line,
        }
    }
}

/// A sum that is being made. It holds a partial sum for every one in the binary count of the parts so far; in line, one.
pub(super) struct Sum<T> {
    order: Order,
    join: fn(&mut T, T) -> Result<()>,
    /// Partial sums with the height of their tree, highest first.
    partial: Vec<(u32, T)>,
}

impl<T> Sum<T> {
    /// Of no parts yet; `join` adds one part to another.
    pub(super) fn new(order: Order, join: fn(&mut T, T) -> Result<()>) -> Self {
        Sum { order, join, partial: Vec::new() }
    }

    /// Adds the next part.
    pub(super) fn add(&mut self, mut part: T) -> Result<()> {
        let mut height = 0;
        while let Some((_, mut before)) =
            self.partial.pop_if(|(before, _)| self.order == Order::Line || *before == height)
        {
            (self.join)(&mut before, part)?;
            part = before;
            height += 1;
        }
        self.partial.push((height, part));
        Ok(())
    }

    /// The sum; `None` of no parts.
    pub(super) fn total(mut self) -> Result<Option<T>> {
        let Some((_, mut total)) = self.partial.pop() else { return Ok(None) };
        while let Some((_, mut before)) = self.partial.pop() {
            (self.join)(&mut before, total)?;
            total = before;
        }
        Ok(Some(total))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Parts as text, so that a sum shows how it was made.
    fn sum(order: Order, parts: impl IntoIterator<Item = String>) -> String {
        let mut sum = Sum::new(order, |a: &mut String, b| {
            *a = format!("({a}{b})");
            Ok(())
        });
        parts.into_iter().for_each(|part| sum.add(part).unwrap());
        sum.total().unwrap().unwrap_or_default()
    }

    fn parts(count: u32) -> impl Iterator<Item = String> {
        (0..count).map(|i| i.to_string())
    }

    #[test]
    fn parts_are_added_in_a_tree_or_in_line() {
        let tree = |count| sum(Order::Tree, parts(count));
        assert_eq!(
            [0, 1, 2, 3, 4, 5].map(tree),
            ["", "0", "(01)", "((01)2)", "((01)(23))", "(((01)(23))4)"].map(str::to_owned)
        );
        assert_eq!(tree(7), "(((01)(23))((45)6))");
        assert_eq!(sum(Order::Line, parts(5)), "((((01)2)3)4)");
    }

    #[test]
    fn blocks_of_a_power_of_two_can_be_added_up_apart() {
        for count in 1..40 {
            for block in [1, 2, 4, 8, 16] {
                let parts: Vec<String> = parts(count).collect();
                let blocks = parts.chunks(block).map(|block| sum(Order::Tree, block.iter().cloned()));
                assert_eq!(sum(Order::Tree, blocks), sum(Order::Tree, parts.clone()), "{count} in blocks of {block}");
            }
        }
    }
}
