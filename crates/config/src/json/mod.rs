//! JSON with comments, every key and value with its byte range.
//!
//! serde_json tells where a document breaks but forgets positions once it has parsed, and a contradiction between two
//! settings must point at both. This scanner keeps the range of everything, and explains broken text in terms of what
//! its author probably meant.
//!
//! Beyond RFC 8259 it accepts what users and clients write: `//`, `#` and `/* */` comments, a comma before a closing
//! bracket, a byte order mark, and the numbers `Infinity`, `-Infinity` and `NaN` (accelerate emits
//! `"steps_per_print": Infinity`).

mod scanner;
mod tree;

pub use scanner::{MAX_DEPTH, SyntaxError, parse};
pub use tree::{Member, Node, Number, Span, Value};
