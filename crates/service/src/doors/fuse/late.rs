//! Questions that are answered late: where a file has data and holes.
//!
//! Where programs write ahead of us, pages that the kernel holds are not in the stack's file yet, and the kernel does not write
//! them before it asks (LSEEK). An answer from the stack alone would be wrong, and cp(1) would copy zeros. So first the
//! kernel is made to write the file's pages back, by a notice, which returns when that is done. Since the threads that answer
//! requests have to take those writes meanwhile, this is done by a thread of its own.

use std::io;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;

use super::device::Device;
use super::parted::Flusher;
use super::uring::Return;
use super::worker::Worker;

/// A message, and where it came from: the kernel takes the answer nowhere else.
pub struct Question {
    pub way: Way,
    pub message: Vec<u8>,
}

pub enum Way {
    Device(Device),
    Ring(Return),
}

/// The thread that answers late.
pub struct Late {
    messages: Sender<Option<Question>>,
    thread: Option<JoinHandle<()>>,
}

impl Late {
    /// `make` gives the thread its belongings.
    pub fn start(
        door: String,
        device: &Device,
        make: impl FnOnce() -> io::Result<Worker>,
    ) -> io::Result<Self> {
        let worker = make()?;
        let flusher = Flusher::start(format!("{door}.flush"), device)?;
        let (messages, waiting) = channel();
        let run = move || run(worker, &flusher, &waiting);
        let thread = std::thread::Builder::new().name(format!("{door}.late")).spawn(run)?;
        Ok(Self { messages, thread: Some(thread) })
    }

    /// For a thread that receives such questions.
    pub fn messages(&self) -> Sender<Option<Question>> {
        self.messages.clone()
    }

    /// Answers what waits and ends the thread. The threads that answer requests must still run.
    pub fn end(&mut self) {
        // Nobody is there to take it when the thread has ended.
        let _ = self.messages.send(None);
        if let Some(thread) = self.thread.take() {
            // A panic was logged by the panic hook already.
            let _ = thread.join();
        }
    }
}

fn run(mut worker: Worker, flusher: &Flusher, waiting: &Receiver<Option<Question>>) {
    while let Ok(Some(question)) = waiting.recv() {
        worker.answer_late(question, flusher);
    }
}
