//! What was copied at a door, by situation and size.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};

use parking_lot::Mutex;
use polytropo_copy::plan::{SITUATIONS, Situation};
use polytropo_wire::copies::{Copied, Counts, SIZES};

/// Where a program counts its own copies.
pub trait Counting: Send + Sync {
    fn counts(&self) -> Counts;
}

/// The copies of a door: the service's own, and those that programs say they made. Programs may say anything: only their tenant's
/// figures are wrong then.
#[derive(Default)]
pub struct Tally {
    own: Copied,
    /// Of programs that are gone.
    past: Copied,
    programs: Mutex<Vec<Weak<dyn Counting>>>,
}

impl Tally {
    pub fn add(&self, situation: Situation, size_bytes: usize) {
        self.own.add(situation as usize, size_bytes);
    }

    pub fn join(&self, program: &Arc<dyn Counting>) {
        let mut programs = self.programs.lock();
        programs.retain(|program| program.strong_count() > 0);
        programs.push(Arc::downgrade(program));
    }

    /// The last of a program, which is counted at every moment, and once.
    pub fn leave(&self, program: &Arc<dyn Counting>) {
        let mut programs = self.programs.lock();
        programs.retain(|known| !std::ptr::addr_eq(known.as_ptr(), Arc::as_ptr(program)));
        self.past.add_all(&program.counts());
    }

    /// What was counted elsewhere.
    pub fn add_past(&self, counts: &Counts) {
        self.past.add_all(counts);
    }

    pub fn counts(&self) -> Counts {
        let all = Copied::default();
        all.add_all(&self.own.counts());
        // Dropped without the lock, since one of them may be the last of its program.
        let mut alive = Vec::new();
        let programs = self.programs.lock();
        alive.extend(programs.iter().filter_map(Weak::upgrade));
        all.add_all(&self.past.counts());
        alive.iter().for_each(|program| all.add_all(&program.counts()));
        drop(programs);
        all.counts()
    }
}

/// What there is of counts, by the situation's name and the least size in bytes.
pub fn counts_by_name(counts: &Counts) -> BTreeMap<&'static str, BTreeMap<u64, u64>> {
    let named = SITUATIONS.iter().map(|(situation, name)| {
        let sizes = (0..SIZES).map(|size| (1 << size, counts[*situation as usize][size]));
        (*name, sizes.filter(|(_, count)| *count > 0).collect::<BTreeMap<_, _>>())
    });
    named.filter(|(_, sizes)| !sizes.is_empty()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Program(Copied);

    impl Counting for Program {
        fn counts(&self) -> Counts {
            self.0.counts()
        }
    }

    #[test]
    fn own_copies_and_those_of_programs_are_summed() {
        let tally = Tally::default();
        tally.add(Situation::Handed, 65_536);
        tally.add(Situation::Handed, 65_536 * 2 - 1);
        let program = Arc::new(Program(Copied::default()));
        let known: Arc<dyn Counting> = program.clone();
        tally.join(&known);
        program.0.add(Situation::Hot as usize, 0);
        program.0.add(Situation::Hot as usize, usize::MAX);
        let expected = |hot: &[(u64, u64)]| {
            let hot = ("hot", hot.iter().copied().collect());
            BTreeMap::from([("handed", BTreeMap::from([(65_536, 2)])), hot])
        };
        assert_eq!(counts_by_name(&tally.counts()), expected(&[(1, 1), (64 << 20, 1)]));
        // A program that ends is not counted twice.
        tally.leave(&known);
        drop((known, program));
        assert_eq!(counts_by_name(&tally.counts()), expected(&[(1, 1), (64 << 20, 1)]));
    }
}
