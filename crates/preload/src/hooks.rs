//! From registers to operations and back: no thinking here.

use crate::entry::{Call, FROM_BRIDGE};
use crate::operations;
use crate::trace::{self, Counter};

/// The length of a `syscall` instruction.
const SYSCALL_BYTES: usize = 2;

/// What becomes of one call.
pub enum Answer {
    /// The kernel is asked, by the program's own instruction.
    Pass(trace::Why),
    /// The kernel was asked here: its answer.
    Asked(isize),
    /// Answered without the kernel: a result, or a negated errno.
    Done(isize),
}

/// Called by the entry for every call that the table does not pass on unseen.
pub extern "C" fn dispatch(call: &mut Call) {
    let requests = operations::requests();
    let (counter, result) = match operations::answer(call.rax, &call.arguments, call.resume_at == FROM_BRIDGE)
    {
        Answer::Pass(why) => (Counter::Kernel(why), None),
        Answer::Asked(result) => (Counter::Kernel(trace::Why::Asked), Some(result)),
        Answer::Done(result) if operations::requests() == requests => (Counter::Process, Some(result)),
        Answer::Done(result) => (Counter::Request, Some(result)),
    };
    if trace::count(counter) {
        operations::tell();
    }
    let Some(result) = result else { return };
    call.rax = result as usize;
    call.resume_at += SYSCALL_BYTES;
}
