//! The stack machine: protocols 0 to 5 as far as `torch.save` and Python's own pickler use them.

use std::collections::HashMap;

use super::{Node, NodeId, Pickle};

/// A larger pickle is refused: a file of a thousand times as many tensors as the largest models have is smaller.
const MAX_BYTES: usize = 1 << 29;
/// Integers wider than this are refused; Python itself needs quadratic time to print them.
const MAX_INT_BYTES: usize = 1 << 12;

/// Parses `bytes`. Time and memory are proportional to their number.
///
/// # Errors
/// What is wrong, and at which byte.
pub(crate) fn parse(bytes: &[u8]) -> Result<Pickle, String> {
    if bytes.len() > MAX_BYTES {
        return Err(format!("a pickle of {} bytes, at most {MAX_BYTES} are read", bytes.len()));
    }
    let mut machine = Machine {
        bytes,
        at: 0,
        nodes: Vec::new(),
        stack: Vec::new(),
        marks: Vec::new(),
        memo: HashMap::new(),
        none: 0,
    };
    machine.none = machine.add(Node::None);
    let root = machine.run().map_err(|problem| format!("byte {} of its pickle: {problem}", machine.at))?;
    Ok(Pickle { nodes: machine.nodes, root, bytes: bytes.len() })
}

struct Machine<'a> {
    bytes: &'a [u8],
    at: usize,
    nodes: Vec<Node>,
    stack: Vec<NodeId>,
    /// Lengths of the stack at the marks.
    marks: Vec<usize>,
    memo: HashMap<u64, NodeId>,
    none: NodeId,
}

type Step<T> = Result<T, String>;

impl<'a> Machine<'a> {
    fn run(&mut self) -> Step<NodeId> {
        loop {
            match self.byte()? {
                b'.' => return self.pop(),
                opcode => self.step(opcode)?,
            }
        }
    }

    fn step(&mut self, opcode: u8) -> Step<()> {
        match opcode {
            // The protocol and the size of a frame: nothing depends on them.
            0x80 => drop(self.take(1)?),
            0x95 => drop(self.take(8)?),
            b'(' => self.marks.push(self.stack.len()),
            b'0' => drop(self.pop()?),
            b'1' => drop(self.since_mark()?),
            b'2' => {
                let top = self.top()?;
                self.stack.push(top);
            }
            b'N' => self.stack.push(self.none),
            0x88 => self.push(Node::Bool(true)),
            0x89 => self.push(Node::Bool(false)),
            b'J' => {
                let value = i32::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            b'K' => {
                let value = self.byte()?;
                self.push(Node::Int(value.into()));
            }
            b'M' => {
                let value = u16::from_le_bytes(self.array()?);
                self.push(Node::Int(value.into()));
            }
            0x8a => {
                let len = self.byte()?.into();
                self.long(len)?;
            }
            0x8b => {
                let len = self.len4()?;
                self.long(len)?;
            }
            b'I' | b'L' => self.decimal()?,
            b'F' => {
                let line = self.line()?;
                let value = line.parse().map_err(|_| format!("`{line}` is not a number"))?;
                self.push(Node::Float(value));
            }
            b'G' => {
                let value = f64::from_be_bytes(self.array()?);
                self.push(Node::Float(value));
            }
            b'X' => {
                let len = self.len4()?;
                self.text(len)?;
            }
            0x8c => {
                let len = self.byte()?.into();
                self.text(len)?;
            }
            0x8d => {
                let len = self.len8()?;
                self.text(len)?;
            }
            b'V' => {
                let line = self.line()?.to_owned();
                self.push(Node::Text(line));
            }
            b'B' | b'T' => {
                let len = self.len4()?;
                self.raw(len)?;
            }
            b'C' | b'U' => {
                let len = self.byte()?.into();
                self.raw(len)?;
            }
            0x8e | 0x96 => {
                let len = self.len8()?;
                self.raw(len)?;
            }
            b']' => self.push(Node::List(Vec::new())),
            b'l' => {
                let items = self.since_mark()?;
                self.push(Node::List(items));
            }
            b'a' => {
                let item = self.pop()?;
                self.extend(vec![item])?;
            }
            b'e' | 0x90 => {
                let items = self.since_mark()?;
                self.extend(items)?;
            }
            b')' => self.push(Node::Tuple(Vec::new())),
            b't' => {
                let items = self.since_mark()?;
                self.push(Node::Tuple(items));
            }
            0x85..=0x87 => {
                let count = usize::from(opcode - 0x84);
                let from = self.below(count)?;
                let items = self.stack.split_off(from);
                self.push(Node::Tuple(items));
            }
            b'}' => self.push(Node::Dict(Vec::new())),
            b'd' => {
                let items = self.since_mark()?;
                let pairs = pairs(&items)?;
                self.push(Node::Dict(pairs));
            }
            b's' => {
                let from = self.below(2)?;
                let items = self.stack.split_off(from);
                self.insert(&items)?;
            }
            b'u' => {
                let items = self.since_mark()?;
                self.insert(&items)?;
            }
            0x8f => self.push(Node::Set(Vec::new())),
            0x91 => {
                let items = self.since_mark()?;
                self.push(Node::Set(items));
            }
            b'c' => {
                let (module, name) = (self.line()?.to_owned(), self.line()?.to_owned());
                self.push(Node::Global(format!("{module}.{name}")));
            }
            0x93 => {
                let (name, module) = (self.pop()?, self.pop()?);
                match (self.node(module), self.node(name)) {
                    (Node::Text(module), Node::Text(name)) => {
                        let path = format!("{module}.{name}");
                        self.push(Node::Global(path));
                    }
                    _ => return Err("the name of a class is not text".to_owned()),
                }
            }
            b'R' | 0x81 => {
                let (args, callable) = (self.pop()?, self.pop()?);
                self.call(callable, args);
            }
            0x92 => {
                let (named, args, callable) = (self.pop()?, self.pop()?, self.pop()?);
                self.call(callable, args);
                self.set_state(named)?;
            }
            b'o' => {
                let mut items = self.since_mark()?;
                if items.is_empty() {
                    return Err("an object without a class".to_owned());
                }
                let callable = items.remove(0);
                let args = self.add(Node::Tuple(items));
                self.call(callable, args);
            }
            b'i' => {
                let path = format!("{}.{}", self.line()?.to_owned(), self.line()?);
                let items = self.since_mark()?;
                let (callable, args) = (self.add(Node::Global(path)), self.add(Node::Tuple(items)));
                self.call(callable, args);
            }
            b'b' => {
                let state = self.pop()?;
                self.set_state(state)?;
            }
            b'Q' => {
                let id = self.pop()?;
                self.push(Node::Persistent(id));
            }
            b'p' | b'g' => {
                let line = self.line()?;
                let index = line.parse().map_err(|_| format!("`{line}` is not a number"))?;
                self.memo(opcode == b'p', index)?;
            }
            b'q' | b'h' => {
                let index = self.byte()?.into();
                self.memo(opcode == b'q', index)?;
            }
            b'r' | b'j' => {
                let index = u32::from_le_bytes(self.array()?).into();
                self.memo(opcode == b'r', index)?;
            }
            0x94 => {
                let index = self.memo.len() as u64;
                self.memo(true, index)?;
            }
            other => return Err(format!("instruction {other:#04x} is unknown")),
        }
        Ok(())
    }

    // -- input -----------------------------------------------------------------------------------------------------

    fn take(&mut self, len: usize) -> Step<&'a [u8]> {
        let end = self.at.checked_add(len).filter(|end| *end <= self.bytes.len());
        let Some(end) = end else { return Err(format!("{len} more bytes announced than there are")) };
        let taken = &self.bytes[self.at..end];
        self.at = end;
        Ok(taken)
    }

    fn byte(&mut self) -> Step<u8> {
        Ok(self.take(1)?[0])
    }

    fn array<const N: usize>(&mut self) -> Step<[u8; N]> {
        Ok(self.take(N)?.try_into().expect("invariant: `take` gives what was asked for"))
    }

    fn len4(&mut self) -> Step<usize> {
        let len = i32::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| format!("a length of {len}"))
    }

    fn len8(&mut self) -> Step<usize> {
        let len = u64::from_le_bytes(self.array()?);
        usize::try_from(len).map_err(|_| format!("a length of {len}"))
    }

    fn line(&mut self) -> Step<&'a str> {
        let rest = &self.bytes[self.at..];
        let len = rest.iter().position(|byte| *byte == b'\n').ok_or("a line without end")?;
        self.at += len + 1;
        std::str::from_utf8(&rest[..len]).map_err(|_| "a line is not text".to_owned())
    }

    fn text(&mut self, len: usize) -> Step<()> {
        let text = std::str::from_utf8(self.take(len)?);
        // Python writes lone surrogates so; there is no such text in a name we look for.
        let text = text.map_err(|_| "a text is not UTF-8".to_owned())?.to_owned();
        self.push(Node::Text(text));
        Ok(())
    }

    fn raw(&mut self, len: usize) -> Step<()> {
        let bytes = self.take(len)?.to_vec();
        self.push(Node::Bytes(bytes));
        Ok(())
    }

    fn long(&mut self, len: usize) -> Step<()> {
        let bytes = self.take(len)?;
        if len > MAX_INT_BYTES {
            return Err(format!("an integer of {len} bytes"));
        }
        let node = if len <= 8 {
            let negative = bytes.last().is_some_and(|byte| byte & 0x80 != 0);
            let mut wide = [if negative { 0xff } else { 0 }; 8];
            wide[..len].copy_from_slice(bytes);
            Node::Int(i64::from_le_bytes(wide))
        } else {
            Node::BigInt(bytes.to_vec())
        };
        self.push(node);
        Ok(())
    }

    /// The integers of protocol 0, of which two are booleans.
    fn decimal(&mut self) -> Step<()> {
        let line = self.line()?;
        let node = match line {
            "00" => Node::Bool(false),
            "01" => Node::Bool(true),
            _ => {
                let digits = line.strip_suffix('L').unwrap_or(line);
                Node::Int(digits.parse().map_err(|_| format!("`{line}` is not a number that can be read"))?)
            }
        };
        self.push(node);
        Ok(())
    }

    // -- stack -----------------------------------------------------------------------------------------------------

    fn add(&mut self, node: Node) -> NodeId {
        let id = NodeId::try_from(self.nodes.len())
            .expect("invariant: at most 3 nodes for each of fewer than 2^29 bytes");
        self.nodes.push(node);
        id
    }

    fn push(&mut self, node: Node) {
        let id = self.add(node);
        self.stack.push(id);
    }

    fn node(&self, id: NodeId) -> &Node {
        &self.nodes[id as usize]
    }

    /// The lowest index that may be popped: what lies below the last mark belongs to others.
    fn floor(&self) -> usize {
        self.marks.last().copied().unwrap_or(0)
    }

    fn pop(&mut self) -> Step<NodeId> {
        if self.stack.len() <= self.floor() {
            return Err("nothing on the stack".to_owned());
        }
        Ok(self.stack.pop().expect("invariant: longer than the floor"))
    }

    fn top(&self) -> Step<NodeId> {
        let found = self.stack.last().filter(|_| self.stack.len() > self.floor());
        found.copied().ok_or_else(|| "nothing on the stack".to_owned())
    }

    fn below(&self, count: usize) -> Step<usize> {
        let from = self.stack.len().checked_sub(count).filter(|from| *from >= self.floor());
        from.ok_or_else(|| "too little on the stack".to_owned())
    }

    fn since_mark(&mut self) -> Step<Vec<NodeId>> {
        let mark = self.marks.pop().ok_or("no mark on the stack")?;
        if mark > self.stack.len() {
            return Err("a mark above the stack".to_owned());
        }
        Ok(self.stack.split_off(mark))
    }

    fn memo(&mut self, put: bool, index: u64) -> Step<()> {
        if put {
            let top = self.top()?;
            self.memo.insert(index, top);
        } else {
            let id = self.memo.get(&index).copied();
            self.stack.push(id.ok_or_else(|| format!("memo {index} was never filled"))?);
        }
        Ok(())
    }

    // -- objects ---------------------------------------------------------------------------------------------------

    fn call(&mut self, callable: NodeId, args: NodeId) {
        let (items, pairs) = (Vec::new(), Vec::new());
        // An ordered dict is a dict that remembers what all dicts remember by now.
        let ordered = matches!(self.node(callable), Node::Global(path) if path == "collections.OrderedDict");
        if ordered && matches!(self.node(args), Node::Tuple(items) if items.is_empty()) {
            self.push(Node::Dict(pairs));
        } else {
            self.push(Node::Called { callable, args, state: None, items, pairs });
        }
    }

    fn set_state(&mut self, new: NodeId) -> Step<()> {
        let top = self.top()?;
        match &mut self.nodes[top as usize] {
            Node::Called { state, .. } => *state = Some(new),
            // Attributes of an ordered dict: the versions of modules, which nothing here needs.
            Node::Dict(_) => {}
            _ => return Err("a state for something that has none".to_owned()),
        }
        Ok(())
    }

    fn extend(&mut self, new: Vec<NodeId>) -> Step<()> {
        let top = self.top()?;
        match &mut self.nodes[top as usize] {
            Node::List(items) | Node::Set(items) | Node::Called { items, .. } => items.extend(new),
            _ => return Err("items for something that is no list".to_owned()),
        }
        Ok(())
    }

    fn insert(&mut self, items: &[NodeId]) -> Step<()> {
        let new = pairs(items)?;
        let top = self.top()?;
        match &mut self.nodes[top as usize] {
            Node::Dict(pairs) | Node::Called { pairs, .. } => pairs.extend(new),
            _ => return Err("entries for something that is no dict".to_owned()),
        }
        Ok(())
    }
}

fn pairs(items: &[NodeId]) -> Step<Vec<(NodeId, NodeId)>> {
    if !items.len().is_multiple_of(2) {
        return Err("a key without a value".to_owned());
    }
    Ok(items.chunks_exact(2).map(|pair| (pair[0], pair[1])).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{
        super::{Object, plain, write},
        *,
    };

    fn plain_of(bytes: &[u8]) -> Result<Object, String> {
        let pickle = parse(bytes)?;
        plain(pickle.root(), &mut |_| Err("a tensor".to_owned()))
    }

    #[test]
    fn values_come_back_as_they_were_written() {
        let long = Object::BigInt(vec![7; 11]);
        let value = Object::dict([
            ("numbers", Object::List(vec![Object::Int(-3), Object::Int(1 << 40), Object::Float(0.5), long])),
            ("text", Object::Tuple(vec!["ü".into(), Object::None, Object::Bool(true)])),
            ("bytes", Object::Bytes(vec![0, 200, 255])),
            ("set", Object::Set(vec![Object::Int(1)])),
            ("size", Object::size(&[2, 3])),
            ("dtype", Object::Global("torch", "bfloat16")),
        ]);
        let again = plain_of(&write(&value)).unwrap();
        assert_eq!(format!("{again:?}"), format!("{value:?}"));
    }

    #[test]
    fn pickles_of_python_are_read() {
        // pickle.dumps({"a": [1, (2, 3.5)], "b": "x" * 3, b"c": {4}}, protocol=5)
        let protocol5 =
            b"\x80\x05\x95\x2f\0\0\0\0\0\0\0}\x94(\x8c\x01a\x94]\x94(K\x01K\x02G@\x0c\0\0\0\0\0\0\x86\x94e\
                          \x8c\x01b\x94\x8c\x03xxx\x94C\x01c\x94\x8f\x94(K\x04\x90u.";
        assert_eq!(
            format!("{:?}", plain_of(protocol5).unwrap()),
            r#"Dict([(Text("a"), List([Int(1), Tuple([Int(2), Float(3.5)])])), (Text("b"), Text("xxx")), (Bytes([99]), Set([Int(4)]))])"#
        );
        // pickle.dumps([True, 5, "x"], protocol=0)
        let protocol0 = b"(lp0\nI01\naI5\naVx\np1\na.";
        assert_eq!(format!("{:?}", plain_of(protocol0).unwrap()), r#"List([Bool(true), Int(5), Text("x")])"#);
    }

    #[test]
    fn calls_are_refused_by_name() {
        for (bytes, name) in [
            (&b"cos\nsystem\n(X\x04\0\0\0truetR."[..], "os.system"),
            (b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x04true\x85R.", "posix.system"),
            (b"(X\x04\0\0\0truei__main__\nThing\n.", "__main__.Thing"),
            (b"(cbuiltins\neval\nX\x01\0\0\x001o.", "builtins.eval"),
            (b"cbuiltins\nopen\n.", "builtins.open"),
            (b"}X\x01\0\0\0acsubprocess\nPopen\n)\x81}bs.", "subprocess.Popen"),
        ] {
            let error = plain_of(bytes).unwrap_err();
            assert!(error.contains(name), "{error}");
        }
    }

    #[test]
    fn claims_are_checked_before_memory_is_taken() {
        for bytes in [
            &b"X\xff\xff\xff\x7f"[..],
            b"X\xff\xff\xff\xff",
            b"\x8d\xff\xff\xff\xff\xff\xff\xff\xff.",
            b"\x8e\0\0\0\0\0\0\0\x10.",
            b"\x8b\xff\xff\xff\x7f.",
            b"j\xff\xff\xff\xff.",
            b"K\x01r\xff\xff\xff\xffj\xfe\xff\xff\xff.",
            b"t.",
            b"K\x01",
            b".",
            b"}K\x01u.",
            b"\xff.",
        ] {
            assert!(plain_of(bytes).is_err(), "{bytes:?}");
        }
    }

    #[test]
    fn deep_and_wide_values_are_errors() {
        let mut deep = vec![b']'; 100_000];
        deep.extend(vec![b'a'; 99_999]);
        deep.push(b'.');
        assert!(plain_of(&deep).unwrap_err().contains("deep"));
        // Each tuple holds the one before it twice.
        let mut wide = vec![b')'];
        (0..60).for_each(|_| wide.extend(b"2\x86"));
        wide.push(b'.');
        assert!(plain_of(&wide).unwrap_err().contains("more values"));
        // A list that holds itself.
        assert!(plain_of(b"]q\0h\0a.").is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            let _ = plain_of(&bytes);
        }

        #[test]
        fn no_program_makes_it_panic(ops in proptest::collection::vec(
            proptest::sample::select(b"(012NKIJM]lae)t\x85\x86\x87}dsu\x8f\x90\x91cRob\x81\x92Qqhr\x94.\x93\x8c\x01\n".to_vec()),
            0..60,
        )) {
            let _ = plain_of(&ops);
        }
    }
}
