//! What goes over the connection between the launcher and an agent: who is there ([`handshake`]), where a message ends ([`frame`]), and what it
//! says ([`message`]). Reads and writes nothing itself.

pub(crate) mod frame;
pub(crate) mod handshake;
pub(crate) mod message;
