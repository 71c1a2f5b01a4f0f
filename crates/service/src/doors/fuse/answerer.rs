//! One thread's way from a request to its answer, whichever way both travel.

use std::sync::Arc;
use std::time::{Duration, Instant};

use super::abi::opcode;
use super::reply::{Held, Reply};
use super::request::Request;
use super::session::{Answer, Own, Session};
use super::statistics::Counters;

/// What a thread takes to answer.
pub struct Answerer {
    pub session: Arc<Session>,
    held: Vec<Held>,
    own: Own,
    counters: Arc<Counters>,
}

/// An answer whose payload stands in the buffer.
#[derive(Clone, Copy, Debug)]
pub struct Answered {
    pub opcode: u32,
    pub unique: u64,
    /// Negative, or 0.
    pub error: i32,
    pub payload_bytes: usize,
    /// The kernel expects none.
    pub silent: bool,
    pub at: Instant,
    failed: bool,
    given_up: bool,
    took: Duration,
}

impl Answerer {
    pub fn new(session: Arc<Session>, counters: Arc<Counters>) -> Self {
        Self { own: Own::new(&session), session, held: Vec::new(), counters }
    }

    /// Does what was asked for, which arrived at `began`.
    pub fn answer(&mut self, request: Request<'_>, buffer: &mut [u8], began: Instant) -> Answered {
        let header = request.header;
        let mut reply = Reply::new(buffer, &mut self.held);
        let answer = self.session.answer(request, &mut reply, &self.own);
        let (error, payload_bytes) = match answer {
            Answer::Error(errno) => (-errno.raw_os_error(), 0),
            Answer::Payload => (0, reply.len()),
            Answer::Silence => (0, 0),
        };
        let at = Instant::now();
        Answered {
            opcode: header.opcode,
            unique: header.unique,
            error,
            payload_bytes,
            silent: answer == Answer::Silence,
            at,
            failed: reply.nothing_there || error != 0,
            given_up: reply.given_up,
            took: at - began,
        }
    }

    /// Counts an answer; `buffer` still holds its payload.
    pub fn record(&self, answered: &Answered, buffer: &[u8]) {
        if !answered.failed {
            match answered.opcode {
                opcode::READ => self.counters.record_bytes(opcode::READ, answered.payload_bytes as u64),
                opcode::WRITE => {
                    let written = buffer.first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes));
                    self.counters.record_bytes(opcode::WRITE, written.into());
                }
                _ => {}
            }
        }
        if answered.given_up {
            self.counters.record_given_up();
        }
        self.counters.record(answered.opcode, answered.failed, answered.took);
    }

    /// The kernel has taken the last answer, or does not want it.
    pub fn answered(&self) {
        self.own.answered();
    }

    /// The kernel did not take the last answer: gives back what it would hold.
    pub fn abandon(&mut self) {
        self.session.abandon(&mut self.held);
    }
}
