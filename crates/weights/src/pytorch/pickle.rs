//! The pickle of a state dict, read as data and never run.
//!
//! A pickle is a program for a stack machine that may call any function it can name. The machine here knows the names
//! that tensors need, and gives each a meaning of its own; at any other name it stops. Values lie in one list and refer to
//! each other by number, so that a value used a million times is one value and nothing here calls itself. What it
//! trades: the instructions that PyTorch writes, and no others. What it refuses: every other name and instruction.

use std::collections::HashMap;

use safetensors::Dtype;

/// More than any checkpoint has, and few enough to be held.
const MAX_VALUES: usize = 1 << 18;
/// More than PyTorch nests or passes; the same tuple can be passed again and again, so its length is paid each time.
const MAX_MARKS: usize = 64;
const MAX_ARGUMENTS: usize = 16;
/// Dimensions of a tensor.
const MAX_RANK: usize = 8;

/// A tensor as the pickle describes it, before anything is checked against the archive.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Stored<'a> {
    pub(super) dtype: Dtype,
    /// The storage's name in the archive.
    pub(super) key: &'a str,
    /// Elements of the storage.
    pub(super) elements: usize,
    /// The first element.
    pub(super) offset: usize,
    pub(super) shape: Vec<usize>,
    pub(super) stride: Vec<usize>,
}

/// Why a pickle is not read.
#[derive(Debug, PartialEq)]
pub(super) enum Fault {
    /// It is not what PyTorch writes.
    Damaged(String),
    /// It names this, which loading it elsewhere might call.
    Code(String),
}

/// The functions and classes that are understood.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Name {
    OrderedDict,
    Tensor,
    Parameter,
    Storage(Dtype),
}

type Id = u32;

#[derive(Clone, Debug, PartialEq)]
enum Value<'a> {
    /// None, a truth value or a fraction: nothing here asks for it.
    Other,
    Int(i64),
    Text(&'a str),
    Name(Name),
    Tuple(Vec<Id>),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    Storage {
        dtype: Dtype,
        key: &'a str,
        elements: usize,
    },
    Tensor(Box<Stored<'a>>),
}

/// The tensors of a state dict in its order, by name. What else the dict holds is passed over.
pub(super) fn read(bytes: &[u8]) -> Result<Vec<(&str, Stored<'_>)>, Fault> {
    let mut machine = Machine { rest: bytes, ..Machine::default() };
    let top = machine.run().map_err(|fault| match fault {
        Fault::Damaged(message) => {
            let place = bytes.len() - machine.rest.len();
            Fault::Damaged(format!("its data.pkl, up to byte {place}: {message}"))
        }
        code @ Fault::Code(_) => code,
    })?;
    let Value::Dict(entries) = machine.value(top) else {
        return Err(Fault::Damaged(
            "it holds no dict of tensors: save the model's state_dict() alone".into(),
        ));
    };
    let mut tensors = Vec::new();
    for &(key, value) in entries {
        if let (Value::Text(key), Value::Tensor(stored)) = (machine.value(key), machine.value(value)) {
            tensors.push((*key, (**stored).clone()));
        }
    }
    if tensors.is_empty() {
        let keys = entries.iter().filter_map(|&(key, _)| match machine.value(key) {
            Value::Text(key) => Some(format!("`{key}`")),
            _ => None,
        });
        let keys: Vec<String> = keys.take(3).collect();
        return Err(Fault::Damaged(format!(
            "no entry of its dict is a tensor (there is {}): save the model's state_dict() alone",
            if keys.is_empty() { "nothing".into() } else { keys.join(", ") }
        )));
    }
    Ok(tensors)
}

#[derive(Default)]
struct Machine<'a> {
    rest: &'a [u8],
    values: Vec<Value<'a>>,
    stack: Vec<Id>,
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

fn damaged<T>(message: impl Into<String>) -> Result<T, Fault> {
    Err(Fault::Damaged(message.into()))
}

impl<'a> Machine<'a> {
    /// Runs to the end; the value that is left.
    fn run(&mut self) -> Result<Id, Fault> {
        loop {
            let [code] = self.take()?;
            match code {
                b'.' => return self.pop(),
                0x80 => {
                    let [version] = self.take()?;
                    if version > 5 {
                        return damaged(format!("protocol {version} is not known"));
                    }
                }
                // The length of what follows, which is not needed.
                0x95 => drop(self.take::<8>()?),
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.take::<8>()?;
                    self.push(Value::Other)?;
                }
                b'J' | b'K' | b'M' | 0x8A => self.integer(code)?,
                b'X' | 0x8C | 0x8D => self.text(code)?,
                b'c' | 0x93 => self.name(code)?,
                b')' | b't' | 0x85 | 0x86 | 0x87 => self.tuple(code)?,
                b']' => self.push(Value::List(Vec::new()))?,
                b'}' => self.push(Value::Dict(Vec::new()))?,
                b'(' if self.marks.len() < MAX_MARKS => self.marks.push(self.stack.len()),
                b'(' => return damaged("it is nested too deeply"),
                b'a' | b'e' => self.append(code)?,
                b's' | b'u' => self.set_items(code)?,
                b'q' | b'r' | 0x94 => self.memoize(code)?,
                b'h' | b'j' => self.recall(code)?,
                b'Q' => self.storage()?,
                b'R' => self.call()?,
                // The attributes of a dict, which are no tensors of it.
                b'b' => drop(self.pop()?),
                other => return damaged(format!("instruction 0x{other:02x} is none that PyTorch writes")),
            }
        }
    }

    fn integer(&mut self, code: u8) -> Result<(), Fault> {
        let value = match code {
            b'J' => i32::from_le_bytes(self.take()?).into(),
            b'K' => i64::from(self.take::<1>()?[0]),
            b'M' => u16::from_le_bytes(self.take()?).into(),
            _ => {
                let [length] = self.take()?;
                let bytes = self.slice(length.into())?;
                let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
                let mut wide = [if negative { 0xFF } else { 0 }; 8];
                let Some(low) = wide.get_mut(..bytes.len()) else {
                    return damaged(format!("a number has {length} bytes"));
                };
                low.copy_from_slice(bytes);
                i64::from_le_bytes(wide)
            }
        };
        self.push(Value::Int(value))
    }

    fn text(&mut self, code: u8) -> Result<(), Fault> {
        let length = match code {
            b'X' => u32::from_le_bytes(self.take()?).into(),
            0x8C => u64::from(self.take::<1>()?[0]),
            _ => u64::from_le_bytes(self.take()?),
        };
        let bytes = self.slice(usize::try_from(length).unwrap_or(usize::MAX))?;
        match str::from_utf8(bytes) {
            Ok(text) => self.push(Value::Text(text)),
            Err(_) => damaged("a text is no UTF-8"),
        }
    }

    /// A function or class, from two lines or from two texts on the stack.
    fn name(&mut self, code: u8) -> Result<(), Fault> {
        let (module, name) = if code == b'c' {
            (self.line()?, self.line()?)
        } else {
            let (name, module) = (self.pop()?, self.pop()?);
            match (self.value(module), self.value(name)) {
                (&Value::Text(module), &Value::Text(name)) => (module, name),
                _ => return damaged("a name is no text"),
            }
        };
        match Name::find(module, name) {
            Some(name) => self.push(Value::Name(name)),
            None => Err(Fault::Code(format!("{module}.{name}"))),
        }
    }

    fn tuple(&mut self, code: u8) -> Result<(), Fault> {
        let items = match code {
            b')' => Vec::new(),
            b't' => self.pop_to_mark()?,
            code => {
                let count = usize::from(code - 0x84);
                let Some(start) = self.stack.len().checked_sub(count).filter(|&start| start >= self.floor())
                else {
                    return damaged("the stack is empty");
                };
                self.stack.split_off(start)
            }
        };
        self.push(Value::Tuple(items))
    }

    fn append(&mut self, code: u8) -> Result<(), Fault> {
        let new = if code == b'a' { vec![self.pop()?] } else { self.pop_to_mark()? };
        match self.top_mut()? {
            Value::List(items) => items.extend(new),
            _ => return damaged("only a list can grow"),
        }
        Ok(())
    }

    fn set_items(&mut self, code: u8) -> Result<(), Fault> {
        let new = if code == b's' {
            let (value, key) = (self.pop()?, self.pop()?);
            vec![key, value]
        } else {
            self.pop_to_mark()?
        };
        let (pairs, []) = new.as_chunks::<2>() else {
            return damaged("a key has no value");
        };
        match self.top_mut()? {
            Value::Dict(entries) => entries.extend(pairs.iter().map(|&[key, value]| (key, value))),
            _ => return damaged("only a dict can take keys"),
        }
        Ok(())
    }

    fn memoize(&mut self, code: u8) -> Result<(), Fault> {
        let slot = match code {
            b'q' => self.take::<1>()?[0].into(),
            b'r' => u32::from_le_bytes(self.take()?),
            _ => self.memo.len() as u32,
        };
        let top = self.top()?;
        if self.memo.len() == MAX_VALUES {
            return damaged(format!("it keeps more than {MAX_VALUES} values"));
        }
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, code: u8) -> Result<(), Fault> {
        let slot = if code == b'h' { self.take::<1>()?[0].into() } else { u32::from_le_bytes(self.take()?) };
        match self.memo.get(&slot) {
            Some(&id) => self.stack.push(id),
            None => return damaged(format!("nothing was kept under {slot}")),
        }
        Ok(())
    }

    /// `('storage', type, key, device, elements)`, the only thing that PyTorch keeps outside of the pickle.
    fn storage(&mut self) -> Result<(), Fault> {
        let id = self.pop()?;
        let storage = match self.parts(id).as_deref() {
            Some(
                &[
                    Value::Text("storage"),
                    Value::Name(Name::Storage(dtype)),
                    Value::Text(key),
                    Value::Text(_),
                    Value::Int(elements),
                ],
            ) => usize::try_from(*elements).ok().map(|elements| Value::Storage {
                dtype: *dtype,
                key,
                elements,
            }),
            _ => None,
        };
        match storage {
            Some(storage) => self.push(storage),
            None => damaged("a storage is not described as PyTorch does"),
        }
    }

    fn call(&mut self) -> Result<(), Fault> {
        let (arguments, function) = (self.pop()?, self.pop()?);
        let (Some(arguments), &Value::Name(function)) = (self.parts(arguments), self.value(function)) else {
            return damaged("what is called is no function");
        };
        let result = match (function, arguments.as_slice()) {
            (Name::OrderedDict, []) => Some(Value::Dict(Vec::new())),
            (
                Name::Tensor,
                [Value::Storage { dtype, key, elements }, Value::Int(offset), shape, stride, ..],
            ) => {
                let offset = usize::try_from(*offset).ok();
                match (offset, self.sizes(shape), self.sizes(stride)) {
                    (Some(offset), Some(shape), Some(stride)) => {
                        let (dtype, elements) = (*dtype, *elements);
                        Some(Value::Tensor(Box::new(Stored { dtype, key, elements, offset, shape, stride })))
                    }
                    _ => None,
                }
            }
            (Name::Parameter, [tensor @ Value::Tensor(_), ..]) => Some((*tensor).clone()),
            _ => None,
        };
        match result {
            Some(value) => self.push(value),
            None => damaged("a tensor is not described as PyTorch does"),
        }
    }

    /// The values in a tuple.
    fn parts(&self, id: Id) -> Option<Vec<&Value<'a>>> {
        match self.value(id) {
            Value::Tuple(items) if items.len() <= MAX_ARGUMENTS => {
                Some(items.iter().map(|&item| self.value(item)).collect())
            }
            _ => None,
        }
    }

    fn sizes(&self, tuple: &Value<'a>) -> Option<Vec<usize>> {
        let Value::Tuple(items) = tuple else { return None };
        if items.len() > MAX_RANK {
            return None;
        }
        let size = |&item: &Id| match self.value(item) {
            Value::Int(size) => usize::try_from(*size).ok(),
            _ => None,
        };
        items.iter().map(size).collect()
    }

    fn value(&self, id: Id) -> &Value<'a> {
        &self.values[id as usize]
    }

    fn push(&mut self, value: Value<'a>) -> Result<(), Fault> {
        if self.values.len() == MAX_VALUES {
            return damaged(format!("it has more than {MAX_VALUES} values, so it is no state dict"));
        }
        self.stack.push(self.values.len() as Id);
        self.values.push(value);
        Ok(())
    }

    /// How many values the last mark protects.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn top(&self) -> Result<Id, Fault> {
        match self.stack.last() {
            Some(&id) if self.stack.len() > self.floor() => Ok(id),
            _ => damaged("the stack is empty"),
        }
    }

    fn top_mut(&mut self) -> Result<&mut Value<'a>, Fault> {
        let id = self.top()?;
        Ok(&mut self.values[id as usize])
    }

    fn pop(&mut self) -> Result<Id, Fault> {
        let id = self.top()?;
        self.stack.pop();
        Ok(id)
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>, Fault> {
        match self.marks.pop() {
            Some(mark) => Ok(self.stack.split_off(mark)),
            None => damaged("a mark is missing"),
        }
    }

    fn take<const N: usize>(&mut self) -> Result<[u8; N], Fault> {
        match self.rest.split_first_chunk() {
            Some((&bytes, rest)) => {
                self.rest = rest;
                Ok(bytes)
            }
            None => damaged("it ends in the middle"),
        }
    }

    fn slice(&mut self, length: usize) -> Result<&'a [u8], Fault> {
        match self.rest.split_at_checked(length) {
            Some((bytes, rest)) => {
                self.rest = rest;
                Ok(bytes)
            }
            None => damaged("it ends in the middle"),
        }
    }

    fn line(&mut self) -> Result<&'a str, Fault> {
        let end = self.rest.iter().position(|&byte| byte == b'\n');
        let line = match end {
            Some(end) => self.slice(end)?,
            None => return damaged("it ends in the middle"),
        };
        self.take::<1>()?;
        str::from_utf8(line).or_else(|_| damaged("a name is no UTF-8"))
    }
}

impl Name {
    fn find(module: &str, name: &str) -> Option<Self> {
        Some(match (module, name) {
            ("collections", "OrderedDict") => Self::OrderedDict,
            ("torch._utils", "_rebuild_tensor_v2") => Self::Tensor,
            ("torch._utils", "_rebuild_parameter") => Self::Parameter,
            ("torch", storage) => Self::Storage(match storage.strip_suffix("Storage")? {
                "Float" => Dtype::F32,
                "Half" => Dtype::F16,
                "BFloat16" => Dtype::BF16,
                "Double" => Dtype::F64,
                "Long" => Dtype::I64,
                "Int" => Dtype::I32,
                "Short" => Dtype::I16,
                "Char" => Dtype::I8,
                "Byte" => Dtype::U8,
                "Bool" => Dtype::BOOL,
                _ => return None,
            }),
            _ => return None,
        })
    }
}
