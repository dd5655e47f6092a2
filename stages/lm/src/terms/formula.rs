//! Formulas that are written once and computed by several machines.

use std::cell::RefCell;
use std::ops::{Add, Div, Mul, Neg, Sub};

/// What a formula is made of: an `f32`, or a [`Term`] of a formula that is written down.
pub(crate) trait Number:
    Copy + Add<Output = Self> + Sub<Output = Self> + Mul<Output = Self> + Div<Output = Self> + Neg<Output = Self>
{
    /// `x / 2`.
    fn half(self) -> Self;
    /// `1 - x`.
    fn complement(self) -> Self;
    /// `|x|`.
    fn abs(self) -> Self;
    /// 1, 0 or -1.
    fn sign(self) -> Self;
    /// `e^x`.
    fn exp(self) -> Self;
    /// At least the smallest normal number.
    fn above_zero(self) -> Self;
    /// `ln(x / y)` for `y` above zero; finite for an `x` of 0.
    fn log_ratio(self, y: Self) -> Self;
}

/// A formula that is written down, term by term.
#[derive(Default)]
pub(crate) struct Formula(RefCell<Vec<Operation<usize>>>);

/// A term of a formula.
#[derive(Clone, Copy)]
pub(crate) struct Term<'a> {
    formula: &'a Formula,
    place: usize,
}

/// What a formula of a divergence is given.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Given {
    S,
    LogS,
    T,
    LogT,
    A,
    B,
}

impl Given {
    pub(crate) const ALL: [Given; 6] = [Given::S, Given::LogS, Given::T, Given::LogT, Given::A, Given::B];
}

/// How a term comes from others.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Operation<X> {
    Given(Given),
    Add(X, X),
    Sub(X, X),
    Mul(X, X),
    Div(X, X),
    Neg(X),
    Half(X),
    Complement(X),
    Abs(X),
    Sign(X),
    Exp(X),
    AboveZero(X),
    LogRatio(X, X),
}

impl<X> Operation<X> {
    /// The same of what `f` makes of its terms.
    fn map<Y, E>(self, mut f: impl FnMut(X) -> Result<Y, E>) -> Result<Operation<Y>, E> {
        use Operation::*;
        Ok(match self {
            Given(given) => Given(given),
            Add(x, y) => Add(f(x)?, f(y)?),
            Sub(x, y) => Sub(f(x)?, f(y)?),
            Mul(x, y) => Mul(f(x)?, f(y)?),
            Div(x, y) => Div(f(x)?, f(y)?),
            Neg(x) => Neg(f(x)?),
            Half(x) => Half(f(x)?),
            Complement(x) => Complement(f(x)?),
            Abs(x) => Abs(f(x)?),
            Sign(x) => Sign(f(x)?),
            Exp(x) => Exp(f(x)?),
            AboveZero(x) => AboveZero(f(x)?),
            LogRatio(x, y) => LogRatio(f(x)?, f(y)?),
        })
    }
}

impl Formula {
    /// The term of what is given.
    pub(crate) fn given(&self, given: Given) -> Term<'_> {
        self.push(Operation::Given(given))
    }

    fn push(&self, operation: Operation<usize>) -> Term<'_> {
        let mut terms = self.0.borrow_mut();
        terms.push(operation);
        Term { formula: self, place: terms.len() - 1 }
    }

    /// Computes a term and what it is made of, nothing else. A term that occurs twice is computed once.
    pub(crate) fn compute<V: Clone, E>(
        &self,
        term: Term<'_>,
        operate: &mut impl FnMut(Operation<V>) -> Result<V, E>,
    ) -> Result<V, E> {
        self.known(term.place, &mut vec![None; self.0.borrow().len()], operate)
    }

    fn known<V: Clone, E>(
        &self,
        place: usize,
        values: &mut Vec<Option<V>>,
        operate: &mut impl FnMut(Operation<V>) -> Result<V, E>,
    ) -> Result<V, E> {
        if let Some(value) = &values[place] {
            return Ok(value.clone());
        }
        let operation = self.0.borrow()[place];
        let operation = operation.map(|x| self.known(x, values, operate))?;
        let value = operate(operation)?;
        values[place] = Some(value.clone());
        Ok(value)
    }
}

macro_rules! operators {
    ($($operator:ident $function:ident),*) => {
        $(impl $operator for Term<'_> {
            type Output = Self;

            fn $function(self, other: Self) -> Self {
                self.formula.push(Operation::$operator(self.place, other.place))
            }
        })*
    };
}
operators!(Add add, Sub sub, Mul mul, Div div);

impl Neg for Term<'_> {
    type Output = Self;

    fn neg(self) -> Self {
        self.formula.push(Operation::Neg(self.place))
    }
}

impl Number for Term<'_> {
    fn half(self) -> Self {
        self.formula.push(Operation::Half(self.place))
    }

    fn complement(self) -> Self {
        self.formula.push(Operation::Complement(self.place))
    }

    fn abs(self) -> Self {
        self.formula.push(Operation::Abs(self.place))
    }

    fn sign(self) -> Self {
        self.formula.push(Operation::Sign(self.place))
    }

    fn exp(self) -> Self {
        self.formula.push(Operation::Exp(self.place))
    }

    fn above_zero(self) -> Self {
        self.formula.push(Operation::AboveZero(self.place))
    }

    fn log_ratio(self, y: Self) -> Self {
        self.formula.push(Operation::LogRatio(self.place, y.place))
    }
}

#[cfg(test)]
impl Formula {
    /// What a term is called in the code that [`Formula::cuda`] prints.
    pub(crate) fn name(&self, term: Term<'_>) -> String {
        self.name_at(term.place)
    }

    fn name_at(&self, place: usize) -> String {
        match self.0.borrow()[place] {
            Operation::Given(given) => match given {
                Given::S => "s".to_owned(),
                Given::LogS => "log_s".to_owned(),
                Given::T => "t".to_owned(),
                Given::LogT => "log_t".to_owned(),
                Given::A => "a".to_owned(),
                Given::B => "b".to_owned(),
            },
            _ => format!("x{}", place - Given::ALL.len()),
        }
    }

    /// Its terms in CUDA, a line each, behind those that are given.
    pub(crate) fn cuda(&self, indent: &str) -> String {
        use Operation::*;
        let terms = self.0.borrow().clone();
        let named = |operation: Operation<usize>| operation.map(|place| Ok::<_, ()>(self.name_at(place))).unwrap();
        let line = |(place, operation): (usize, &Operation<usize>)| {
            let right = match named(*operation) {
                Given(_) => return None,
                Add(x, y) => format!("{x} + {y}"),
                Sub(x, y) => format!("{x} - {y}"),
                Mul(x, y) => format!("{x} * {y}"),
                Div(x, y) => format!("{x} / {y}"),
                Neg(x) => format!("-{x}"),
                Half(x) => format!("0.5f * {x}"),
                Complement(x) => format!("1.0f - {x}"),
                Abs(x) => format!("fabsf({x})"),
                Sign(x) => format!("sign({x})"),
                Exp(x) => format!("exponential<T>({x})"),
                AboveZero(x) => format!("above_zero({x})"),
                LogRatio(x, y) => format!("logarithm<T>(above_zero({x} / {y}))"),
            };
            Some(format!("{indent}float {} = {right};\n", self.name_at(place)))
        };
        terms.iter().enumerate().filter_map(line).collect()
    }
}
