//! From registers to operations and back: no thinking here.

use crate::entry::Call;
use crate::{sys, trace};

/// The length of a `syscall` instruction.
const SYSCALL_BYTES: usize = 2;

/// What becomes of one call.
pub enum Answer {
    /// The kernel is asked, by the program's own instruction.
    Pass(trace::Why),
    /// This is the result, or a negated errno.
    #[expect(dead_code, reason = "nothing is answered here yet")]
    Done(isize),
}

/// Called by the entry for every call that the table does not pass on unseen.
pub extern "C" fn dispatch(call: &mut Call) {
    match answer(call) {
        Answer::Pass(why) => trace::count(trace::Counter::Kernel(why)),
        Answer::Done(result) => {
            trace::count(trace::Counter::Process);
            call.rax = result as usize;
            call.resume_at += SYSCALL_BYTES;
        }
    }
}

fn answer(call: &Call) -> Answer {
    match call.rax {
        sys::nr::EXIT_GROUP => {
            trace::report();
            Answer::Pass(trace::Why::EndOfProcess)
        }
        _ => Answer::Pass(trace::Why::NotOurs),
    }
}
