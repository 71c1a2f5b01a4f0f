//! Recorded histories, and whether a bounded first-in first-out queue could have produced them.
#![allow(dead_code, reason = "each test program uses a part")]

use polytropo_queue::Error;
use std::collections::{HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Call {
    Enqueue(u64),
    Dequeue,
}

#[derive(Clone, Copy, Debug)]
pub struct Operation {
    pub call: Call,
    pub outcome: Result<u64, Error>,
    pub begin: u64,
    pub end: u64,
}

/// Orders the beginnings and ends of operations.
#[derive(Default)]
pub struct Clock(AtomicU64);

impl Clock {
    pub fn record(&self, call: Call, run: impl FnOnce() -> Result<u64, Error>) -> Operation {
        let begin = self.0.fetch_add(1, Ordering::SeqCst);
        let outcome = run();
        let end = self.0.fetch_add(1, Ordering::SeqCst);
        Operation { call, outcome, begin, end }
    }
}

/// Searches for an order of the operations that respects real time and that a queue of `capacity` items could have had (Wing and
/// Gong's search; what was reached before is not searched again).
pub fn is_linearizable(history: &[Operation], capacity: usize) -> bool {
    assert!(history.len() <= 64);
    let mut seen = HashSet::new();
    let mut stack = vec![(0u64, VecDeque::<u64>::new())];
    while let Some((done, queue)) = stack.pop() {
        if done.count_ones() as usize == history.len() {
            return true;
        }
        if !seen.insert((done, queue.clone())) {
            continue;
        }
        let pending = || history.iter().enumerate().filter(|(n, _)| done & (1 << n) == 0);
        let first_end = pending().map(|(_, operation)| operation.end).min().unwrap();
        for (number, operation) in pending().filter(|(_, operation)| operation.begin < first_end) {
            let mut next = queue.clone();
            let fits = match (operation.call, operation.outcome) {
                (Call::Enqueue(item), Ok(_)) => {
                    next.push_back(item);
                    next.len() <= capacity
                }
                (Call::Enqueue(_), Err(error)) => error == Error::Full && queue.len() == capacity,
                (Call::Dequeue, Ok(item)) => next.pop_front() == Some(item),
                (Call::Dequeue, Err(error)) => error == Error::Empty && queue.is_empty(),
            };
            if fits {
                stack.push((done | 1 << number, next));
            }
        }
    }
    false
}

/// The largest number of items that overtook one: enqueued wholly after it and dequeued wholly before it. What was not dequeued counts
/// as dequeued after all else.
pub fn displacement_max(history: &[Operation]) -> usize {
    let mut items = std::collections::HashMap::<u64, (Option<&Operation>, Option<&Operation>)>::new();
    for operation in history {
        match (operation.call, operation.outcome) {
            (Call::Enqueue(item), Ok(_)) => items.entry(item).or_default().0 = Some(operation),
            (Call::Dequeue, Ok(item)) => items.entry(item).or_default().1 = Some(operation),
            _ => {}
        }
    }
    let moved: Vec<_> = items
        .values()
        .map(|(put, taken)| {
            (put.expect("taken, so put"), taken.map_or((u64::MAX, u64::MAX), |t| (t.begin, t.end)))
        })
        .collect();
    let overtakers = |put: &Operation, taken_begin: u64| {
        moved.iter().filter(|(p, (_, end))| p.begin > put.end && *end < taken_begin).count()
    };
    moved.iter().map(|(put, (begin, _))| overtakers(put, *begin)).max().unwrap_or(0)
}
