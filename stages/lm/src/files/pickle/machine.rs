//! The little of Python's pickle machine that a dictionary of tensors needs.
//!
//! A pickle is a program: its opcodes push values, call what they name, and may name anything that Python can import. Here
//! what may be named is a list, [`Global`], and what is called are four functions of our own, so that nothing of a file is run. An
//! opcode or a name that is not known ends the reading with an error that says which.
//!
//! Values lie in an arena, and the stack and the memo hold their indices: no value is copied, so that memory grows with the
//! length of the program, whatever it says.
//!
//! Source: `pickletools.py` of CPython, `torch/_utils.py` and `torch/_weights_only_unpickler.py` of PyTorch.

use std::collections::HashSet;

use anyhow::{Context, bail, ensure};
use contract::Result;
use contract::files::in_words;
use safetensors::Dtype;

/// Most bytes of a program: some 200 are needed for a tensor.
pub(super) const LONGEST: u64 = 32 << 20;
/// Most values that it may make.
const VALUES: usize = 1 << 20;
/// Most sizes of a tensor.
const DIMENSIONS: usize = 8;

/// Most bytes of the name of a storage: it is a number.
const KEY: usize = 64;

/// What a pickle may name.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Global {
    /// `collections.OrderedDict`.
    Dictionary,
    /// `torch._utils._rebuild_tensor_v2`.
    Tensor,
    /// `torch._utils._rebuild_parameter`.
    Parameter,
    /// A class of storages, by the type of its numbers.
    Storage(Dtype),
}

impl Global {
    fn named(module: &str, name: &str) -> Result<Self> {
        Ok(match (module, name) {
            ("collections", "OrderedDict") => Global::Dictionary,
            ("torch._utils", "_rebuild_tensor_v2") => Global::Tensor,
            ("torch._utils", "_rebuild_parameter") => Global::Parameter,
            ("torch", "FloatStorage") => Global::Storage(Dtype::F32),
            ("torch", "HalfStorage") => Global::Storage(Dtype::F16),
            ("torch", "BFloat16Storage") => Global::Storage(Dtype::BF16),
            ("torch", "DoubleStorage") => Global::Storage(Dtype::F64),
            ("torch", "LongStorage") => Global::Storage(Dtype::I64),
            ("torch", "IntStorage") => Global::Storage(Dtype::I32),
            ("torch", "ShortStorage") => Global::Storage(Dtype::I16),
            ("torch", "CharStorage") => Global::Storage(Dtype::I8),
            ("torch", "ByteStorage") => Global::Storage(Dtype::U8),
            ("torch", "BoolStorage") => Global::Storage(Dtype::BOOL),
            _ => bail!(
                "it asks Python for `{}.{}`, which no tensor needs: nothing of it was run; get the model from a source you trust, as \
                 safetensors",
                shown(module),
                shown(name)
            ),
        })
    }
}

/// A tensor as the program describes it. Nothing of it has been checked against its storage.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Described {
    pub(super) storage: Storage,
    /// The storage's first number that belongs to it.
    pub(super) offset: u64,
    pub(super) shape: Vec<u64>,
    pub(super) strides: Vec<u64>,
}

/// A storage as the program describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage {
    pub(super) dtype: Dtype,
    /// Its name in the archive.
    pub(super) key: String,
    /// How many numbers it has.
    pub(super) count: u64,
}

/// A place in the arena.
type Index = u32;

enum Value {
    /// Of no use here: none, true, false, a fraction.
    Other,
    Integer(i64),
    Text(String),
    Tuple(Vec<Index>),
    List,
    Dictionary(Vec<(Index, Index)>),
    Global(Global),
    Storage(Storage),
    Tensor(Described),
}

struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value>,
    stack: Vec<Index>,
    /// Heights of the stack that were marked.
    marks: Vec<usize>,
    memo: Vec<Option<Index>>,
}

/// What a program makes of names and tensors, in its order.
///
/// Errors where it needs more than a dictionary of tensors does.
pub(super) fn run(program: &[u8]) -> Result<Vec<(String, Described)>> {
    ensure!(
        program.len() as u64 <= LONGEST,
        "its pickle has {}, and at most {} are read",
        in_words(program.len() as u64),
        in_words(LONGEST)
    );
    let machine = Machine { rest: program, values: Vec::new(), stack: Vec::new(), marks: Vec::new(), memo: Vec::new() };
    machine.run()
}

impl Machine<'_> {
    fn run(mut self) -> Result<Vec<(String, Described)>> {
        loop {
            let [opcode] = self.array()?;
            match opcode {
                // The version, and the length of what follows.
                0x80 => drop(self.array::<1>()?),
                0x95 => drop(self.array::<8>()?),
                b'.' => break,
                b'(' => self.marks.push(self.stack.len()),
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.array::<8>()?;
                    self.push(Value::Other)?;
                }
                b'K' => {
                    let [byte] = self.array()?;
                    self.push(Value::Integer(byte.into()))?;
                }
                b'M' => {
                    let number = u16::from_le_bytes(self.array()?);
                    self.push(Value::Integer(number.into()))?;
                }
                b'J' => {
                    let number = i32::from_le_bytes(self.array()?);
                    self.push(Value::Integer(number.into()))?;
                }
                0x8a => {
                    let number = self.long()?;
                    self.push(Value::Integer(number))?;
                }
                b'X' => {
                    let length = u32::from_le_bytes(self.array()?);
                    self.text(length.into())?;
                }
                0x8c => {
                    let [length] = self.array()?;
                    self.text(length.into())?;
                }
                0x8d => {
                    let length = u64::from_le_bytes(self.array()?);
                    self.text(length)?;
                }
                b')' => self.push(Value::Tuple(Vec::new()))?,
                b']' => self.push(Value::List)?,
                b'}' => self.push(Value::Dictionary(Vec::new()))?,
                b't' => {
                    let items = self.marked()?;
                    self.push(Value::Tuple(items))?;
                }
                0x85..=0x87 => {
                    let items = self.pop_several(usize::from(opcode - 0x84))?;
                    self.push(Value::Tuple(items))?;
                }
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(Value::Global(Global::named(&module, &name)?))?;
                }
                0x93 => {
                    let [module, name] = [1, 0].map(|below| self.text_at(below));
                    let global = Global::named(&module?, &name?)?;
                    self.pop_several(2)?;
                    self.push(Value::Global(global))?;
                }
                b'q' => {
                    let [slot] = self.array()?;
                    self.remember(slot.into())?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.remember(slot as usize)?;
                }
                0x94 => self.remember(self.memo.len())?,
                b'h' => {
                    let [slot] = self.array()?;
                    self.recall(slot.into())?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot as usize)?;
                }
                b'a' => {
                    self.pop()?;
                    self.append()?;
                }
                b'e' => {
                    self.marked()?;
                    self.append()?;
                }
                b's' => {
                    let pair = self.pop_several(2)?;
                    self.insert(&pair)?;
                }
                b'u' => {
                    let pairs = self.marked()?;
                    self.insert(&pairs)?;
                }
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                // What an `OrderedDict` has beside its pairs: versions of modules.
                b'b' => {
                    self.pop()?;
                    ensure!(matches!(self.top()?, Value::Dictionary(_)), "it sets the state of what is no dictionary");
                }
                other => bail!("its pickle has the opcode {other:#04x}, which no dictionary of tensors needs"),
            }
        }
        self.result()
    }

    fn take(&mut self, count: usize) -> Result<&[u8]> {
        let (taken, rest) = self.rest.split_at_checked(count).context("its pickle is cut off")?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("as many as were asked for"))
    }

    fn line(&mut self) -> Result<String> {
        let end = self.rest.iter().position(|byte| *byte == b'\n').context("its pickle is cut off")?;
        let line = String::from_utf8_lossy(self.take(end)?).into_owned();
        self.take(1)?;
        Ok(line)
    }

    fn text(&mut self, length: u64) -> Result<()> {
        let bytes = self.take(usize::try_from(length).unwrap_or(usize::MAX))?;
        let text = String::from_utf8_lossy(bytes).into_owned();
        self.push(Value::Text(text))
    }

    fn long(&mut self) -> Result<i64> {
        let [length] = self.array()?;
        ensure!(length <= 8, "it has a number of {length} bytes");
        let bytes = self.take(length.into())?;
        let mut whole = [if bytes.last().is_some_and(|byte| byte & 0x80 != 0) { 0xff } else { 0 }; 8];
        whole[..bytes.len()].copy_from_slice(bytes);
        Ok(i64::from_le_bytes(whole))
    }

    fn push(&mut self, value: Value) -> Result<()> {
        ensure!(self.values.len() < VALUES, "its pickle makes more than {VALUES} values");
        self.stack.push(self.values.len() as Index);
        self.values.push(value);
        Ok(())
    }

    /// Takes the last so many values from the stack, none of them below a mark.
    fn pop_several(&mut self, count: usize) -> Result<Vec<Index>> {
        let floor = self.marks.last().copied().unwrap_or(0);
        let from = self.stack.len().checked_sub(count).filter(|from| *from >= floor);
        Ok(self.stack.split_off(from.context("its pickle takes what is not there")?))
    }

    fn pop(&mut self) -> Result<Index> {
        Ok(self.pop_several(1)?[0])
    }

    fn marked(&mut self) -> Result<Vec<Index>> {
        let mark = self.marks.pop().context("its pickle takes what is not there")?;
        Ok(self.stack.split_off(mark))
    }

    fn top(&self) -> Result<&Value> {
        let index = self.stack.last().context("its pickle takes what is not there")?;
        Ok(&self.values[*index as usize])
    }

    fn text_at(&self, below: usize) -> Result<String> {
        let index = self.stack.iter().rev().nth(below).map(|index| &self.values[*index as usize]);
        match index {
            Some(Value::Text(text)) => Ok(text.clone()),
            _ => bail!("its pickle names something by what is no text"),
        }
    }

    fn remember(&mut self, slot: usize) -> Result<()> {
        ensure!(slot <= VALUES, "its pickle remembers more than {VALUES} values");
        let index = *self.stack.last().context("its pickle takes what is not there")?;
        if self.memo.len() <= slot {
            self.memo.resize(slot + 1, None);
        }
        self.memo[slot] = Some(index);
        Ok(())
    }

    fn recall(&mut self, slot: usize) -> Result<()> {
        let index = self.memo.get(slot).copied().flatten().context("its pickle recalls what it did not remember")?;
        self.stack.push(index);
        Ok(())
    }

    fn append(&self) -> Result<()> {
        ensure!(matches!(self.top()?, Value::List), "its pickle appends to what is no list");
        Ok(())
    }

    fn insert(&mut self, items: &[Index]) -> Result<()> {
        let index = *self.stack.last().context("its pickle takes what is not there")?;
        let Value::Dictionary(pairs) = &mut self.values[index as usize] else {
            bail!("its pickle puts a pair into what is no dictionary")
        };
        let (new, []) = items.as_chunks::<2>() else { bail!("its pickle has a key without a value") };
        pairs.extend(new.iter().map(|[key, value]| (*key, *value)));
        Ok(())
    }

    fn tuple(&self, index: Index) -> Result<&[Index]> {
        match &self.values[index as usize] {
            Value::Tuple(items) => Ok(items),
            _ => bail!("its pickle calls with what are no arguments"),
        }
    }

    /// A tuple of numbers that are not negative.
    fn sizes(&self, index: Index) -> Result<Vec<u64>> {
        let items = self.tuple(index)?;
        ensure!(items.len() <= DIMENSIONS, "a tensor has {} sizes: expected at most {DIMENSIONS}", items.len());
        items.iter().map(|item| self.size(*item)).collect()
    }

    fn size(&self, index: Index) -> Result<u64> {
        match &self.values[index as usize] {
            Value::Integer(number) => {
                u64::try_from(*number).ok().with_context(|| format!("a size of a tensor is {number}"))
            }
            _ => bail!("a size of a tensor is no number"),
        }
    }

    /// `("storage", class, key, device, count)`, under which `torch.save` names a storage.
    fn storage(&mut self) -> Result<()> {
        let index = self.pop()?;
        let [what, class, key, _, count] = *self.tuple(index)? else { bail!("it names no storage by five values") };
        let [what, class, key] = [what, class, key].map(|index| &self.values[index as usize]);
        let (Value::Text(what), Value::Global(Global::Storage(dtype)), Value::Text(key)) = (what, class, key) else {
            bail!("it names a storage by something else")
        };
        ensure!(what == "storage", "it names a `{}`, where a storage is expected", shown(what));
        // Every tensor has a copy of it.
        ensure!(key.len() <= KEY, "it names a storage by a text of {} bytes", key.len());
        let storage = Storage { dtype: *dtype, key: key.clone(), count: self.size(count)? };
        self.push(Value::Storage(storage))
    }

    fn call(&mut self) -> Result<()> {
        let arguments = self.pop()?;
        let function = self.pop()?;
        let Value::Global(function) = self.values[function as usize] else { bail!("it calls what is no function") };
        let arguments = self.tuple(arguments)?;
        let value = match (function, arguments) {
            (Global::Dictionary, []) => Value::Dictionary(Vec::new()),
            (Global::Tensor, [storage, offset, shape, strides, ..]) => {
                let Value::Storage(storage) = &self.values[*storage as usize] else {
                    bail!("a tensor is made of what is no storage")
                };
                Value::Tensor(Described {
                    storage: storage.clone(),
                    offset: self.size(*offset)?,
                    shape: self.sizes(*shape)?,
                    strides: self.sizes(*strides)?,
                })
            }
            // A parameter is its tensor.
            (Global::Parameter, [tensor, ..]) => match &self.values[*tensor as usize] {
                Value::Tensor(tensor) => Value::Tensor(tensor.clone()),
                _ => bail!("a parameter is made of what is no tensor"),
            },
            (function, arguments) => bail!("it calls {function:?} with {} values", arguments.len()),
        };
        self.push(value)
    }

    fn result(mut self) -> Result<Vec<(String, Described)>> {
        let index = self.stack.pop().context("its pickle makes nothing")?;
        let Value::Dictionary(pairs) = &self.values[index as usize] else {
            bail!("it holds no dictionary of tensors: save the model's `state_dict()`")
        };
        let (mut tensors, mut others) = (Vec::new(), Vec::new());
        let mut names = HashSet::new();
        for (key, value) in pairs {
            let Value::Text(name) = &self.values[*key as usize] else { continue };
            ensure!(names.insert(name), "`{}` is there twice", shown(name));
            match &self.values[*value as usize] {
                Value::Tensor(tensor) => tensors.push((name.clone(), tensor.clone())),
                _ => others.push(format!("`{}`", shown(name))),
            }
        }
        if tensors.is_empty() {
            others.truncate(5);
            let with = if others.is_empty() { String::new() } else { format!(", and has {}", others.join(", ")) };
            bail!("no tensors are in its dictionary{with}: save the model's `state_dict()` alone");
        }
        Ok(tensors)
    }
}

/// A name in a message, and not too much of it.
pub(super) fn shown(name: &str) -> String {
    name.chars().map(|c| if c.is_control() { '?' } else { c }).take(80).collect()
}
