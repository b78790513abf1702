//! Writing a pickle, protocol 2, as `torch.save` does.

use super::{Object, StoredTensor};

/// The pickle of `object`.
pub(crate) fn write(object: &Object) -> Vec<u8> {
    let mut out = vec![0x80, 2];
    put(&mut out, object);
    out.push(b'.');
    out
}

fn put(out: &mut Vec<u8>, object: &Object) {
    match object {
        Object::None => out.push(b'N'),
        Object::Bool(value) => out.push(if *value { 0x88 } else { 0x89 }),
        Object::Int(value) => int(out, *value),
        Object::BigInt(bytes) => long(out, bytes),
        Object::Float(value) => {
            out.push(b'G');
            out.extend(value.to_be_bytes());
        }
        Object::Text(value) => text(out, value),
        Object::Bytes(bytes) => {
            // Protocol 2 has no bytes: they are text, and encoded when they are read.
            global(out, "_codecs", "encode");
            let latin1: String = bytes.iter().map(|byte| char::from(*byte)).collect();
            text(out, &latin1);
            text(out, "latin1");
            out.extend([0x86, b'R']);
        }
        Object::List(items) => list(out, items),
        Object::Tuple(items) => tuple(out, items),
        Object::Set(items) => {
            global(out, "builtins", "set");
            list(out, items);
            out.extend([0x85, b'R']);
        }
        Object::Dict(pairs) => {
            out.push(b'}');
            entries(out, pairs);
        }
        Object::OrderedDict(pairs) => {
            global(out, "collections", "OrderedDict");
            out.extend([b')', b'R']);
            entries(out, pairs);
        }
        Object::Tensor(tensor) => put_tensor(out, tensor),
        Object::Global(module, name) => global(out, module, name),
        Object::Call(module, name, arguments) => {
            global(out, module, name);
            tuple(out, arguments);
            out.push(b'R');
        }
        Object::New(module, name, attributes) => {
            global(out, module, name);
            out.extend([b')', 0x81, b'}']);
            entries(out, attributes);
            out.push(b'b');
        }
    }
}

fn put_tensor(out: &mut Vec<u8>, tensor: &StoredTensor) {
    global(out, "torch._utils", "_rebuild_tensor_v2");
    out.push(b'(');
    // The persistent id of the storage.
    out.push(b'(');
    text(out, "storage");
    global(out, "torch", tensor.class);
    text(out, &tensor.storage.to_string());
    text(out, "cpu");
    put(out, &tensor.storage_numel.into());
    out.extend([b't', b'Q']);
    put(out, &tensor.offset.into());
    let sizes = |sizes: &[usize]| Object::Tuple(sizes.iter().map(|size| Object::from(*size)).collect());
    put(out, &sizes(&tensor.shape));
    let mut stride = vec![1; tensor.shape.len()];
    for dim in (1..stride.len()).rev() {
        stride[dim - 1] = stride[dim] * tensor.shape[dim].max(1);
    }
    put(out, &sizes(&stride));
    // Requires no gradient, has no hooks.
    out.push(0x89);
    put(out, &Object::OrderedDict(Vec::new()));
    out.extend([b't', b'R']);
}

fn entries(out: &mut Vec<u8>, pairs: &[(Object, Object)]) {
    if pairs.is_empty() {
        return;
    }
    out.push(b'(');
    for (key, value) in pairs {
        put(out, key);
        put(out, value);
    }
    out.push(b'u');
}

fn list(out: &mut Vec<u8>, items: &[Object]) {
    out.push(b']');
    if items.is_empty() {
        return;
    }
    out.push(b'(');
    for item in items {
        put(out, item);
    }
    out.push(b'e');
}

fn tuple(out: &mut Vec<u8>, items: &[Object]) {
    if items.is_empty() {
        out.push(b')');
        return;
    }
    out.push(b'(');
    for item in items {
        put(out, item);
    }
    out.push(b't');
}

fn int(out: &mut Vec<u8>, value: i64) {
    if let Ok(value) = i32::try_from(value) {
        out.push(b'J');
        out.extend(value.to_le_bytes());
    } else {
        long(out, &value.to_le_bytes());
    }
}

fn long(out: &mut Vec<u8>, bytes: &[u8]) {
    if let Ok(len) = u8::try_from(bytes.len()) {
        out.extend([0x8a, len]);
    } else {
        out.push(0x8b);
        out.extend((bytes.len() as u32).to_le_bytes());
    }
    out.extend(bytes);
}

fn text(out: &mut Vec<u8>, text: &str) {
    out.push(b'X');
    out.extend((text.len() as u32).to_le_bytes());
    out.extend(text.as_bytes());
}

fn global(out: &mut Vec<u8>, module: &str, name: &str) {
    out.extend([b"c", module.as_bytes(), b"\n", name.as_bytes(), b"\n"].concat());
}
