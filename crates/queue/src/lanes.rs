//! Lanes side by side: one queue in which each CPU mostly works in a lane of its own, with bounded disorder.
//!
//! An operation may run in a lane only if the lane is at most `skew` tickets ahead of the one that is furthest behind,
//! full (empty) lanes aside; otherwise it goes to that one. So the tails stay within `skew` of each other, and so do the heads,
//! and an item is overtaken by at most `(lanes - 1) x (2 x skew + 1)` others, and one more for each operation under way.
//! Tickets only grow, so a lower bound of the others' tickets stays good: looking at other lanes costs once in `skew` operations.
//!
//! Full and empty are exact: all lanes were found so, and then found not to have changed since.

use crate::cell::Cell;
use crate::lane::{self, Bounds, Index, Lane, LaneControl, Refusal, Slots, TICKET_MAX};
use crate::operation::Operation;
use crate::sync::Acquire;

pub const LANES_MAX: usize = 64;

/// Each round of a search fails only because another operation succeeded, or because a peer scribbles.
const SEARCHES_MAX: u32 = 1 << 16;

pub struct Lanes<'a, C> {
    pub controls: &'a [LaneControl],
    pub slots: Slots<'a, C>,
    /// Logarithm of the slots of one lane.
    pub shift: u32,
    pub skew: u64,
    lazy: u64,
}

impl<C> Clone for Lanes<'_, C> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<C> Copy for Lanes<'_, C> {}

/// Where a participant works, and how far it may go there without looking at the other lanes.
#[derive(Clone, Copy)]
pub struct Choice {
    pub lane: usize,
    pub bounds: Bounds,
}

impl<'a, C: Cell> Lanes<'a, C> {
    pub fn new(controls: &'a [LaneControl], slots: Slots<'a, C>, shift: u32, skew: u64) -> Self {
        Self { controls, slots, shift, skew, lazy: lane::lazy(shift) }
    }

    #[inline(always)]
    pub fn lane(&self, number: usize) -> Lane<'a, C> {
        let slots = self.slots.of_lane(number, self.shift);
        Lane { control: &self.controls[number], slots, shift: self.shift, lazy: self.lazy }
    }

    pub fn all(&self) -> impl Iterator<Item = Lane<'a, C>> {
        let lanes = *self;
        (0..self.controls.len()).map(move |number| lanes.lane(number))
    }

    /// The first choice of a participant on this CPU.
    pub fn home(&self, cpu: u32) -> Choice {
        let limit = if self.controls.len() == 1 { TICKET_MAX } else { 0 };
        Choice { lane: cpu as usize & (self.controls.len() - 1), bounds: Bounds { from: 0, limit } }
    }

    /// Runs `operation` in the lane of choice, or in another if that one refuses.
    #[inline(always)]
    pub fn turn<O: Operation<C>>(
        &self,
        choice: &mut Choice,
        operation: &mut O,
    ) -> Result<O::Output, Refusal> {
        match operation.run(&self.lane(choice.lane), &mut choice.bounds) {
            Err(refusal) if self.controls.len() > 1 && refusal != Refusal::Corrupt => {
                self.search(choice, operation)
            }
            outcome => outcome,
        }
    }

    /// Most often the lane is merely too far ahead of the others, and one of them does.
    #[cold]
    #[inline(never)]
    fn search<O: Operation<C>>(&self, choice: &mut Choice, operation: &mut O) -> Result<O::Output, Refusal> {
        if let Some(lead) = self.lead(choice.lane, 0, O::end) {
            match self.follow(lead, choice, operation) {
                Err(refusal) if refusal != Refusal::Corrupt => {}
                outcome => return outcome,
            }
        }
        self.search_all(choice, operation)
    }

    /// Runs the operation where `lead` says, and stays there if that did.
    #[inline(always)]
    fn follow<O: Operation<C>>(
        &self,
        lead: Lead,
        choice: &mut Choice,
        operation: &mut O,
    ) -> Result<O::Output, Refusal> {
        let from = if lead.lane == choice.lane { choice.bounds.from } else { 0 };
        let mut bounds = Bounds { from, limit: lead.limit };
        let result = operation.run(&self.lane(lead.lane), &mut bounds)?;
        *choice = Choice { lane: lead.lane, bounds: Bounds { limit: lead.limit_of_all, ..bounds } };
        Ok(result)
    }

    #[cold]
    #[inline(never)]
    fn search_all<O: Operation<C>>(
        &self,
        choice: &mut Choice,
        operation: &mut O,
    ) -> Result<O::Output, Refusal> {
        let mut refusals = [(Refusal::Beyond, 0); LANES_MAX];
        let mut refused = 0u64;
        for _ in 0..SEARCHES_MAX {
            let Some(lead) = self.lead(choice.lane, refused, O::end) else {
                let settled = self
                    .all()
                    .zip(&refusals)
                    .all(|(lane, (refusal, ticket))| lane.is_still(*refusal, *ticket));
                if settled {
                    return Err(self.verdict(&refusals));
                }
                refused = 0;
                continue;
            };
            let from = if lead.lane == choice.lane { choice.bounds.from } else { 0 };
            let mut bounds = Bounds { from, limit: lead.limit };
            match operation.run(&self.lane(lead.lane), &mut bounds) {
                Ok(result) => {
                    let bounds = Bounds { limit: lead.limit_of_all, ..bounds };
                    *choice = Choice { lane: lead.lane, bounds };
                    return Ok(result);
                }
                Err(Refusal::Corrupt) => return Err(Refusal::Corrupt),
                Err(Refusal::Beyond) => {}
                Err(refusal) => {
                    refusals[lead.lane] = (refusal, bounds.from);
                    refused |= 1 << lead.lane;
                }
            }
        }
        Err(Refusal::Corrupt)
    }

    /// The lane to try next: the preferred one if it is not too far ahead of those that have not refused, else the one
    /// that is furthest behind. None if all have refused.
    fn lead(&self, preferred: usize, refused: u64, index: fn(&LaneControl) -> &Index) -> Option<Lead> {
        let (mut least, mut least_of_all, mut preferred_ticket) = (None, u64::MAX, u64::MAX);
        for (number, control) in self.controls.iter().enumerate() {
            let ticket = index(control).ticket.load(Acquire);
            least_of_all = least_of_all.min(ticket);
            if refused & (1 << number) != 0 {
                continue;
            }
            if number == preferred {
                preferred_ticket = ticket;
            }
            if least.is_none_or(|(_, smallest)| ticket < smallest) {
                least = Some((number, ticket));
            }
        }
        let (number, smallest) = least?;
        let limit = smallest.saturating_add(self.skew).min(TICKET_MAX);
        let lane = if preferred_ticket <= limit { preferred } else { number };
        Some(Lead { lane, limit, limit_of_all: least_of_all.saturating_add(self.skew).min(TICKET_MAX) })
    }

    fn verdict(&self, refusals: &[(Refusal, u64); LANES_MAX]) -> Refusal {
        let mut used = refusals[..self.controls.len()].iter().map(|(refusal, _)| *refusal);
        used.find(|refusal| *refusal != Refusal::Sealed).unwrap_or(Refusal::Sealed)
    }

    /// Seals every lane, all of them being empty; false if an item is there after all.
    pub fn seal_empty(&self) -> Result<bool, Refusal> {
        for lane in self.all() {
            let mut bounds = Bounds::none();
            match lane.front(&mut bounds) {
                Ok(_) => return Ok(false),
                Err(Refusal::Sealed) => {}
                Err(Refusal::Empty) if lane.seal(bounds.from) => {}
                Err(Refusal::Corrupt) => return Err(Refusal::Corrupt),
                Err(_) => return Ok(false),
            }
        }
        Ok(true)
    }

    pub fn item_count(&self) -> usize {
        self.all().map(|lane| lane.item_count()).sum()
    }
}

struct Lead {
    lane: usize,
    limit: u64,
    limit_of_all: u64,
}
