//! What becomes of the calls that are looked at. No registers, no ABI here: that is `hooks`' business.

mod amid;
mod calls;
mod changing;
mod directories;
mod elsewhere;
mod kept;
mod link;
mod moving;
mod names;
mod placeholders;
mod process;
mod reading;
mod standins;
mod status;
mod table;
mod worth;
mod writing;

pub use process::{Setting, asked, begin, requests, tell};

use crate::hooks::Answer;

/// Decides one call.
#[inline]
pub fn answer(number: usize, arguments: &[usize; 6], at_bridge: bool) -> Answer {
    let answer = calls::answer(number, arguments, at_bridge);
    if standins::any() && matches!(answer, Answer::Pass(_)) && crate::table::names_path(number) {
        process::table().inspect(|table| standins::name_all(table));
    }
    answer
}
