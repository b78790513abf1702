//! What the launcher and the agent of a host say to each other, in frames of [`crate::wire::frame`].
//!
//! ```text
//!   launcher                                   agent
//!      |        <- greeting, Hello               |   the host answers
//!      |  Port ->                  <- Port       |   first host only: where rank 0 will await the others
//!      |  Start (part, folder, secret) ->        |
//!      |        <- Started or Refused            |
//!      |        <- output, Stopped, Ended ...    |
//!      |  Signal ->                              |
//!      |  Alive ->                 <- Alive      |   now and then
//!      |  Finish ->                              |   all went well
//!      X  the connection closes                  |   all that runs on the host ends
//! ```

use crate::doctor::{Answer, Question};
use crate::oversight::merge::Stream;
use crate::plan::host_part::HostPart;
use crate::ranks::evidence::Evidence;
use crate::ranks::signals::Ending;
use crate::wire::frame::{self, Frame};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use std::io;
use std::path::PathBuf;

/// A frame with a message in JSON.
const MESSAGE: u8 = 1;

/// A frame with a rank's output: the rank in 4 bytes, the stream in 1, the bytes.
const OUTPUT: u8 = 2;

const OUTPUT_HEADER: usize = 5;

/// What the launcher tells an agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) enum Order {
    /// Choose a free port, or say whether this one is free.
    Port(Option<u16>),
    /// Start the ranks of this host.
    Start(Box<Start>),
    /// Send this signal to every rank.
    Signal(i32),
    /// Answer a question of `deepspeed doctor`.
    Examine(Question),
    /// The launcher is there.
    Alive,
    /// All went well: end, and leave alone what the ranks may have left running.
    Finish,
}

/// What a host needs to start its ranks. Holds the job's secret: it is never printed.
#[derive(Clone, Serialize, Deserialize)]
pub(crate) struct Start {
    /// The host's part of the plan.
    pub(crate) part: HostPart,
    /// The folder to work in.
    pub(crate) folder: PathBuf,
    /// The job's secret.
    pub(crate) secret: String,
}

impl std::fmt::Debug for Start {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Start")
            .field("part", &self.part)
            .field("folder", &self.folder)
            .finish_non_exhaustive()
    }
}

/// What an agent tells the launcher.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum Report {
    /// The first message.
    Hello(Hello),
    /// The port, or why it cannot be had.
    Port(Result<u16, String>),
    /// The ranks run, with these processes.
    Started(Vec<i32>),
    /// The ranks could not be started.
    Refused(String),
    /// A remark.
    Note { warning: bool, text: String },
    /// A rank is over.
    Ended { rank: usize, ending: Ending, evidence: Option<Evidence>, log: Option<PathBuf>, step: Option<u64> },
    /// A rank was stopped by this signal.
    Stopped { rank: usize, signal: i32, step: Option<u64> },
    /// A rank that was stopped goes on.
    Continued { rank: usize },
    /// The answer to a question of `deepspeed doctor`.
    Answer(Answer),
    /// The agent was told to end by something else than the launcher; it says so before it ends its ranks.
    Leaving(String),
    /// The agent is there.
    Alive,
}

/// How an agent presents itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Hello {
    /// The version of its `deepspeed`.
    pub(crate) version: String,
    /// Where that lies.
    pub(crate) program: PathBuf,
    /// What the host calls itself.
    pub(crate) hostname: String,
    /// The address at which the launcher has reached the host, if it is known.
    pub(crate) reached_at: Option<String>,
    /// The launcher's address as the host sees it, if it is known.
    pub(crate) reached_from: Option<String>,
    /// The Slurm job that the agent runs in.
    pub(crate) slurm_job: Option<String>,
}

/// What came in one frame from an agent.
#[derive(Debug, PartialEq)]
pub(crate) enum Incoming {
    /// A message.
    Report(Report),
    /// A rank's output.
    Output { rank: usize, stream: Stream, bytes: Vec<u8> },
}

/// A message as a frame.
pub(crate) fn encode(message: &impl Serialize) -> io::Result<Vec<u8>> {
    frame::encode(MESSAGE, &serde_json::to_vec(message)?)
}

/// A rank's output as a frame.
pub(crate) fn encode_output(rank: usize, stream: Stream, bytes: &[u8]) -> io::Result<Vec<u8>> {
    let rank = u32::try_from(rank).map_err(io::Error::other)?;
    let mut payload = Vec::with_capacity(OUTPUT_HEADER + bytes.len());
    payload.extend_from_slice(&rank.to_le_bytes());
    payload.push(stream as u8);
    payload.extend_from_slice(bytes);
    frame::encode(OUTPUT, &payload)
}

/// The message of a frame from the launcher.
pub(crate) fn order(frame: &Frame) -> Result<Order, String> {
    match frame.kind {
        MESSAGE => json(&frame.payload),
        kind => Err(format!("a frame of the unknown kind {kind}")),
    }
}

/// The content of a frame from an agent.
pub(crate) fn incoming(frame: Frame) -> Result<Incoming, String> {
    match frame.kind {
        MESSAGE => json(&frame.payload).map(Incoming::Report),
        OUTPUT => {
            let Some(header) = frame.payload.first_chunk::<OUTPUT_HEADER>() else {
                return Err("output without a rank".to_owned());
            };
            let rank = u32::from_le_bytes([header[0], header[1], header[2], header[3]]) as usize;
            let stream = match header[4] {
                0 => Stream::Stdout,
                1 => Stream::Stderr,
                other => return Err(format!("output of the unknown stream {other}")),
            };
            let mut bytes = frame.payload;
            bytes.drain(..OUTPUT_HEADER);
            Ok(Incoming::Output { rank, stream, bytes })
        }
        kind => Err(format!("a frame of the unknown kind {kind}")),
    }
}

fn json<T: DeserializeOwned>(payload: &[u8]) -> Result<T, String> {
    serde_json::from_slice(payload).map_err(|error| format!("a message that cannot be read ({error})"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::wire::frame::Decoder;
    use proptest::prelude::*;

    #[test]
    fn what_goes_in_comes_out() {
        let evidence = Some(Evidence { out_of_memory: true, text: "x".into() });
        let report = Report::Ended { rank: 3, ending: Ending::Signal(9), evidence, log: None, step: Some(7) };
        let mut decoder = Decoder::default();
        decoder.push(&encode(&report).unwrap());
        decoder.push(&encode_output(2, Stream::Stderr, b"\xffa").unwrap());
        assert_eq!(incoming(decoder.next().unwrap().unwrap()), Ok(Incoming::Report(report)));
        assert_eq!(
            incoming(decoder.next().unwrap().unwrap()),
            Ok(Incoming::Output { rank: 2, stream: Stream::Stderr, bytes: b"\xffa".to_vec() })
        );
        assert!(incoming(Frame { kind: OUTPUT, payload: vec![0; 3] }).is_err());
        assert!(incoming(Frame { kind: OUTPUT, payload: vec![9; 6] }).is_err());
        assert!(order(&Frame { kind: OUTPUT, payload: vec![] }).is_err());
    }

    proptest! {
        #[test]
        fn any_payload_is_survived(kind in 0u8..4, payload in prop::collection::vec(any::<u8>(), 0..80)) {
            let frame = Frame { kind, payload };
            let _ = order(&frame);
            let _ = incoming(frame);
        }
    }
}
