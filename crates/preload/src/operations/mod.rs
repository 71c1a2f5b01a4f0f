//! What becomes of the calls that are looked at. No registers, no ABI here: that is `hooks`' business.

mod calls;
mod changing;
mod directories;
mod elsewhere;
mod kept;
mod link;
mod names;
mod placeholders;
mod process;
mod reading;
mod status;
mod table;
mod worth;
mod writing;

pub use calls::answer;
pub use process::{Setting, asked, begin, requests, tell};
